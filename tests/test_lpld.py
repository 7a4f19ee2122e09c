"""LPLD: the images of a class are a segment, and its images those of the plain loop one class after the other."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from distill_tools import MEAN, STD, make_dataset, make_teacher, saved_pixels, tiny_config

from fd2fast.artifacts import Artifact
from fd2fast.data.distilled import load_images
from fd2fast.errors import UserError
from fd2fast.methods import resolve
from fd2fast.models.teacher import load_teacher
from fd2fast.reference.loop import optimise_segment
from fd2fast.reference.planner import iteration_table
from fd2fast.seeding import generator
from fd2fast.settings.config import DistillConfig, replace
from fd2fast.stages import distill

CLASSES, SIZE, IPC, ITERATIONS, SEED = 4, 32, 3, 10, 2
LOW = [-m / s for m, s in zip(MEAN, STD, strict=True)]
HIGH = [(1 - m) / s for m, s in zip(MEAN, STD, strict=True)]


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, list[Artifact]]:
    root = tmp_path_factory.mktemp("lpld")
    dataset = make_dataset(root / "dataset", CLASSES, SIZE)
    return dataset, [make_teacher(root / "teacher", dataset)]


def settings(**changes: object) -> DistillConfig:
    config = DistillConfig("lpld", ipc=IPC, iterations=(ITERATIONS,), precision="fp64", seed=SEED)
    return replace(config, **changes)


@pytest.mark.parametrize("segment_size", [None, 2])
def test_images_are_those_of_the_plain_loop(
    segment_size: int | None, parents: tuple[Artifact, list[Artifact]], tmp_path: Path
) -> None:
    """One class after the other, all of its images at once or two and one, fp64: every saved byte."""
    dataset, teachers = parents
    made = distill.run(settings(segment_size=segment_size), tmp_path / "images", dataset, teachers)
    teacher = load_teacher(teachers[0], "cpu", torch.float64)
    recipe = tiny_config("lpld", classes=CLASSES, ipc=IPC, iterations=(ITERATIONS,))
    images, labels = load_images(made)
    assert labels.tolist() == [k for k in range(CLASSES) for _ in range(IPC)]
    segment = 0
    for label in range(CLASSES):
        finals = []
        for count in [IPC] if segment_size is None else [2, 1]:
            draws = iteration_table(SEED, [segment], 0, ITERATIONS, SIZE, jitter=4)
            initial = torch.randn((count, 3, SIZE, SIZE), generator=generator(SEED, "noise", segment)).double()
            rows = torch.full((count,), label)
            table = [row[0] for row in draws]
            finals.append(optimise_segment(initial, rows, [teacher], table, recipe, low=LOW, high=HIGH))
            segment += 1
        assert np.array_equal(images[label * IPC : (label + 1) * IPC], saved_pixels(torch.cat(finals)))
    record = json.loads(made.file("losses.json").read_text())["segments"]["1"]
    expected = ([1, 2], [0, 3]) if segment_size is None else ([0, 1], [2, 3])
    assert (record["classes"], record["image_ids"]) == expected


def test_grouped_is_alone(parents: tuple[Artifact, list[Artifact]], tmp_path: Path) -> None:
    dataset, teachers = parents
    made = [
        load_images(distill.run(settings(segments_per_step=n), tmp_path / str(n), dataset, teachers))[0]
        for n in (1, None)
    ]
    assert np.array_equal(*made)
    assert made[0].std() > 10


def test_sizes_of_segments() -> None:
    assert resolve(settings(ipc=7), classes=CLASSES, size=SIZE).segment_size == 7
    with pytest.raises(UserError, match="segment_size must be at most the 3 images of a class, got 4"):
        resolve(settings(segment_size=4), classes=CLASSES, size=SIZE)
    with pytest.raises(UserError, match="'lpld' optimises the images of a class together, which FD2's L_S cannot"):
        resolve(settings(fd2=True), classes=CLASSES, size=SIZE)
