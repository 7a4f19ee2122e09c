"""Semantics "released" against images that the published recover scripts computed from the same teachers, patches and draws.

data/released.npz holds two runs in fp64: SRe2L++ with FD2 and one teacher, FADRM+ with FD2 and two; of each the teachers'
weights, the patches, every crop, flip and roll, the losses of iteration 0 and the images after 60 iterations; `meta` holds
the settings. No pixel comes near black or white there: the clamp is test_parity's.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dropin_tools import network_state
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fd2fast.artifacts import Artifact, Images, open_stage, read_json
from fd2fast.data.pixels import save_image
from fd2fast.data.prepare import prepare
from fd2fast.distillation import runner
from fd2fast.distillation.planner import make_plan
from fd2fast.models.teacher import Teacher, load_teacher
from fd2fast.settings.config import DataConfig, DistillConfig, PatchesConfig
from fd2fast.stages import distill
from fd2fast.stages.exchange import import_teacher
from fd2fast.step import TERMS

FILE = Path(__file__).parent / "data" / "released.npz"
CASES: dict[str, dict[str, Any]] = json.loads(str(np.load(FILE)["meta"]))

# Relative L2 of the images, which moved by 0.06 of their norm. Measured: 2e-15 (sre2l) and 6e-12 (fadrm) with AVX-512 and with
# AVX2, in one thread and in two, 3e-15 and 8e-12 without either; a factor of 100 is left for other processors and libraries.
IMAGE_BOUND = 1e-9
# losses.json keeps six digits: at most 5e-6 by rounding.
LOSS_BOUND = 1e-5


@dataclass(frozen=True)
class Released:
    """One case and what the distill stage made of it."""

    case: dict[str, Any]
    dataset: Artifact
    teachers: list[Artifact]
    result: Artifact
    found: dict[
        tuple[int, int], NDArray[np.float64]
    ]  # (block, image id) -> images [n, 3, S, S] before they are rounded
    recorded: dict[str, NDArray[Any]]  # the case's arrays by their names in the file

    @property
    def keys(self) -> list[tuple[int, int]]:
        """(block of classes, image id) of every segment."""
        blocks = self.case["classes"] // self.case["segment_size"]
        return [(block, image_id) for block in range(blocks) for image_id in range(self.case["ipc"])]


def settings(case: dict[str, Any]) -> DistillConfig:
    names = ("method", "semantics", "ipc", "segment_size", "lr", "r_bn", "first_bn_multiplier", "lam", "beta")
    names += ("group_size", "ls_threshold", "jitter", "adam_eps")
    given = {name: case[name] for name in names} | {n: tuple(case[n]) for n in ("iterations", "sizes", "betas")}
    if "residual" in case:
        given["residual"] = case["residual"]
    return DistillConfig(**given, patch_choice="id", precision="fp64", device="cpu")


def made_dataset(case: dict[str, Any], patches: dict[tuple[int, int], NDArray[np.uint8]], folder: Path) -> Artifact:
    """Its images are of no account: only classes, size and normalisation are read."""
    for split in ("train", "test"):
        for label in range(case["classes"]):
            path = folder / "data" / split / f"c{label:02d}" / "0.png"
            path.parent.mkdir(parents=True)
            save_image(path, patches[label, 0])
    config = DataConfig("folder", folder / "data", size=case["size"], mean=tuple(case["mean"]), std=tuple(case["std"]))
    return prepare(config, folder / "dataset")


def made_patches(
    dataset: Artifact, teacher: Artifact, patches: dict[tuple[int, int], NDArray[np.uint8]], ipc: int, folder: Path
) -> Artifact:
    parents = {"dataset": dataset, "teacher": teacher}
    stage = open_stage(folder / "patches", "patches", PatchesConfig(per_class=ipc), parents)
    for (label, image_id), pixels in patches.items():
        save_image(stage.path / f"images/{label:05d}/class{label:05d}_id{image_id:05d}.png", pixels)
    facts = {"factor": 2, "per_class": ipc}
    return stage.finish(classes=dataset.classes, size=dataset.size, mean=dataset.mean, std=dataset.std, facts=facts)


@pytest.fixture(scope="module", params=list(CASES))
def released(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Released:
    """The stage, run with the scripts' own draws; every segment shares its step with the other block's."""
    tag, case, folder = request.param, CASES[request.param], tmp_path_factory.mktemp(request.param)
    classes, ipc, rows = case["classes"], case["ipc"], case["segment_size"]
    with np.load(FILE) as data, pytest.MonkeyPatch.context() as patch:
        recorded = {n.removeprefix(f"{tag}/"): data[n] for n in data.files if n.startswith(f"{tag}/")}
        patches = {(k, i): recorded[f"patch/{k}/{i}"] for k in range(classes) for i in range(ipc)}
        dataset = made_dataset(case, patches, folder)
        teachers = []
        for teacher in case["teachers"]:
            name = teacher["tag"]
            content = {
                teacher["key"]: network_state(data, f"{name}/backbone"),
                "cal": network_state(data, f"{name}/cal"),
                "feature_center": torch.tensor(data[f"{name}/feature_center"]),
            }
            torch.save(content, folder / teacher["file"])
            teachers.append(import_teacher(folder / teacher["file"], teacher["key"], folder / name, dataset))
        plan = make_plan(classes, ipc, group_size=case["group_size"], segment_size=rows)
        keys = [(int(k) // rows, int(i)) for k, i in zip(plan.first_class, plan.image_id, strict=True)]
        draws = {s: recorded[f"draws/{block}/{i}"] for s, (block, i) in enumerate(keys)}
        views = {s: recorded[f"prior_draws/{block}/{i}"] for s, (block, i) in enumerate(keys) if i > 0}

        passed: list[NDArray[np.float64]] = []

        def watched(images: Tensor, *rest: Any) -> Tensor:
            passed.extend(images.double().contiguous().numpy().reshape(-1, rows, *images.shape[1:]))
            return quantize(images, *rest)

        quantize = runner.quantize
        patch.setattr(runner, "quantize", watched)
        begun = made_patches(dataset, teachers[0], patches, ipc, folder)
        result = distill.run(
            settings(case), folder / "images", dataset, teachers, begun, draws=draws, prior_draws=views
        )
    order = [int(s) for step in plan.steps() for s in step.segments]
    found = {keys[s]: images for s, images in zip(order, passed, strict=True)}
    return Released(case, dataset, teachers, result, found, recorded)


def released_jpeg(image: NDArray[np.float64], mean: list[float], std: list[float]) -> bytes:
    """What the scripts write of a normalised image [3, S, S]: clipped, truncated to 8 bits, Pillow's JPEG as it comes."""
    unit = np.clip(image * np.array(std)[:, None, None] + np.array(mean)[:, None, None], 0, 1)
    file = io.BytesIO()
    Image.fromarray((unit * 255).astype(np.uint8).transpose(1, 2, 0)).save(file, "JPEG")
    return file.getvalue()


def test_images_are_the_released(released: Released) -> None:
    errors = {
        key: np.linalg.norm(released.found[key] - wanted) / np.linalg.norm(wanted)
        for key in released.keys
        for wanted in [released.recorded["final/{}/{}".format(*key)]]
    }
    assert max(errors.values()) < IMAGE_BOUND, errors


def test_files_are_the_released(released: Released) -> None:
    """Byte for byte, encoded here with the same Pillow."""
    case = released.case
    for block, image_id in released.keys:
        for row, image in enumerate(released.recorded[f"final/{block}/{image_id}"]):
            name = Images.image_name(block * case["segment_size"] + row, image_id, "jpg")
            assert released.result.file(name).read_bytes() == released_jpeg(image, case["mean"], case["std"]), name


def test_first_losses_are_the_released(released: Released) -> None:
    """Every term of every segment in iteration 0."""
    segments = read_json(released.result.file("losses.json"))["segments"].values()
    assert len(segments) == len(released.keys)
    for segment in segments:
        block = segment["classes"][0] // released.case["segment_size"]
        wanted = released.recorded[f"losses0/{block}/{segment['image_id']}"]
        assert segment["iterations"][0] == 0
        np.testing.assert_allclose([segment[term][0] for term in TERMS], wanted, rtol=LOSS_BOUND, atol=1e-8)


def test_imported_teachers_are_the_released(released: Released) -> None:
    """Maps and alpha from the file's name, prototypes as stored."""
    with np.load(FILE) as data:
        for artifact, teacher in zip(released.teachers, released.case["teachers"], strict=True):
            model, maps, alpha = artifact.facts["model"], artifact.facts["attention_maps"], artifact.facts["alpha"]
            assert model.startswith(teacher["key"])
            assert teacher["file"].endswith(f"_M{maps}_{10 * alpha:.0f}e-1cal.pth")
            loaded: Teacher = load_teacher(artifact, torch.device("cpu"), torch.float64)
            stored = data[f"{teacher['tag']}/feature_center"]
            np.testing.assert_array_equal(loaded.prototypes_last.numpy(), stored.astype(np.float64))
