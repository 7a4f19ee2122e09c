"""CDA: its crops are those of the published schedule, and its images those of the plain loop with these crops."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from distill_tools import MEAN, STD, make_dataset, make_teacher, saved_pixels, tiny_config

from fd2fast.artifacts import Artifact
from fd2fast.data.distilled import load_images
from fd2fast.methods import method_of
from fd2fast.models.teacher import load_teacher
from fd2fast.reference.loop import optimise_segment
from fd2fast.reference.planner import iteration_table
from fd2fast.seeding import generator
from fd2fast.settings.config import DistillConfig
from fd2fast.stages import distill

CLASSES, SIZE, ITERATIONS, SEED = 5, 32, 12, 4
LOW = [-m / s for m, s in zip(MEAN, STD, strict=True)]
HIGH = [(1 - m) / s for m, s in zip(MEAN, STD, strict=True)]


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, list[Artifact]]:
    root = tmp_path_factory.mktemp("cda")
    dataset = make_dataset(root / "dataset", CLASSES, SIZE)
    return dataset, [make_teacher(root / "teacher", dataset)]


def settings(**changes: object) -> DistillConfig:
    return DistillConfig("cda", ipc=2, segment_size=3, iterations=(ITERATIONS,), precision="fp64", seed=SEED, **changes)


def smallest(iteration: int) -> float:
    return 0.08 + (1.0 - 0.08) * (1 + math.cos(math.pi * iteration / ITERATIONS)) / 2


def test_crops_go_from_the_whole_image_to_small_ones() -> None:
    recipe = tiny_config("cda", iterations=(ITERATIONS,))
    shares = [method_of("cda").smallest_crop(recipe, t) for t in range(ITERATIONS)]
    assert shares == pytest.approx([smallest(t) for t in range(ITERATIONS)], abs=1e-15)
    assert shares[0] == 1.0
    assert shares == sorted(shares, reverse=True)
    assert 0.08 < shares[-1] < 0.1


def test_images_are_those_of_the_plain_loop(parents: tuple[Artifact, list[Artifact]], tmp_path: Path) -> None:
    """Noise, crops from the specification's draws with the published schedule, fp64: every saved byte."""
    dataset, teachers = parents
    made = distill.run(settings(), tmp_path / "images", dataset, teachers)
    teacher = load_teacher(teachers[0], "cpu", torch.float64)
    images, labels = load_images(made)
    pixels = dict(zip(zip(labels.tolist(), [0, 1] * CLASSES, strict=True), images, strict=True))
    areas = []
    for segment in range(4):
        image_id, first = segment // 2, 3 * (segment % 2)
        rows = list(range(first, min(CLASSES, first + 3)))
        draws = [
            iteration_table(SEED, [segment], t, 1, SIZE, jitter=4, scale=(smallest(t), 1.0))[0][0]
            for t in range(ITERATIONS)
        ]
        areas.append([height * width for _, _, height, width, *_ in draws])
        shape = (len(rows), 3, SIZE, SIZE)
        initial = torch.randn(shape, generator=generator(SEED, "noise", segment)).double()
        recipe = tiny_config("cda", iterations=(ITERATIONS,))
        final = optimise_segment(initial, torch.tensor(rows), [teacher], draws, recipe, low=LOW, high=HIGH)
        for label, image in zip(rows, saved_pixels(final), strict=True):
            assert np.array_equal(pixels[label, image_id], image)
    assert np.mean(areas, axis=0)[:3].min() > np.mean(areas, axis=0)[-3:].max()


def test_grouped_is_alone(parents: tuple[Artifact, list[Artifact]], tmp_path: Path) -> None:
    dataset, teachers = parents
    made = [
        load_images(distill.run(settings(segments_per_step=n), tmp_path / str(n), dataset, teachers))[0]
        for n in (1, None)
    ]
    assert np.array_equal(*made)
    assert made[0].std() > 10
