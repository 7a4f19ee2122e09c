"""Tiny data sets and teachers for the tests of models and their stages."""

from pathlib import Path

import numpy as np
import torch

from fd2fast.artifacts import Artifact, open_stage, write_npy
from fd2fast.models.backbone import build_backbone
from fd2fast.models.teacher import Teacher
from fd2fast.settings.config import DataConfig, PretrainConfig

MEAN, STD = (0.5, 0.4, 0.45), (0.25, 0.2, 0.3)
TINY = "timm:resnet10t,channels=8x8x16x16,stem_width=4,output_stride=16"


def make_dataset(
    path: Path,
    *,
    per_class: tuple[int, ...] = (9, 9, 9),
    test: int = 4,
    size: int = 32,
    name: str = "folder",
    seed: int = 0,
) -> Artifact:
    """A dataset artifact of noisy stripes: class k has stripes of its own direction and colour."""
    stage = open_stage(path, "dataset", DataConfig(dataset="folder", seed=seed), {})
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]

    def images(counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        labels = np.repeat(np.arange(len(counts)), counts)
        angle = labels * np.pi / len(counts)
        phase = rng.uniform(0, 6, len(labels))
        wave = np.sin((np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y) + phase[:, None, None])
        colour = 0.3 + 0.4 * np.eye(3)[labels % 3]
        pixels = (
            0.5 + 0.4 * wave[:, None] * colour[:, :, None, None] + rng.normal(0, 0.05, (len(labels), 3, size, size))
        )
        return (pixels.clip(0, 1) * 255).astype(np.uint8), labels.astype(np.int64)

    counts = {"train": per_class, "test": (test,) * len(per_class)}
    for split, wanted in counts.items():
        pixels, labels = images(wanted)
        write_npy(path / f"{split}_images.npy", pixels)
        write_npy(path / f"{split}_labels.npy", labels)
    facts = {"name": name, "train": sum(per_class), "test": test * len(per_class)}
    classes = [f"class {k}" for k in range(len(per_class))]
    return stage.finish(classes=classes, size=size, mean=MEAN, std=STD, facts=facts)


def make_teacher(path: Path, dataset: Artifact, *, model: str = TINY, maps: int = 2, seed: int = 0) -> Artifact:
    """A teacher artifact with random weights, no training."""
    torch.manual_seed(seed)
    teacher = Teacher(build_backbone(model, len(dataset.classes)), maps, alpha=0.5, size=dataset.size, accuracy=50.0)
    for _, layer in teacher.bn_layers():
        layer.running_mean.normal_(0, 0.1)
        layer.running_var.uniform_(0.5, 2)
    stage = open_stage(path, "teacher", PretrainConfig(model=model, seed=seed), {"dataset": dataset})
    teacher.save(path / "teacher.safetensors")
    facts = {"model": teacher.name, "attention_maps": maps, "alpha": 0.5, "channels": teacher.backbone.channels}
    return stage.finish(classes=dataset.classes, size=dataset.size, mean=dataset.mean, std=dataset.std, facts=facts)


def tree_bytes(path: Path) -> dict[str, bytes]:
    """Every file below `path` but the manifest."""
    return {
        p.relative_to(path).as_posix(): p.read_bytes()
        for p in sorted(path.rglob("*"))
        if p.is_file() and p.name != "manifest.json"
    }
