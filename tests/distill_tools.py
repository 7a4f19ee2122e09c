"""Tiny teachers and settings for the tests of the step and the distill stage."""

from pathlib import Path

import numpy as np
import torch

from fd2fast.artifacts import Artifact, open_stage, write_npy
from fd2fast.data.pixels import save_image
from fd2fast.data.store import load_split
from fd2fast.methods import resolve
from fd2fast.models.backbone import build_backbone
from fd2fast.models.teacher import Teacher
from fd2fast.settings.config import DataConfig, DistillConfig, PatchesConfig, PretrainConfig, replace
from fd2fast.settings.recipe import Recipe

MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.3, 0.2)
SMALL = "timm:test_resnet"
OTHER = "timm:test_efficientnet"


def tiny_teacher(
    name: str = SMALL,
    classes: int = 5,
    *,
    size: int = 32,
    maps: int = 3,
    alpha: float = 0.4,
    seed: int = 0,
    accuracy: float = 50.0,
    dtype: torch.dtype = torch.float64,
) -> Teacher:
    """A frozen random teacher with settled BN statistics and prototypes of two kinds (unit norm, and .05 of it)."""
    torch.manual_seed(seed)
    teacher = Teacher(build_backbone(name, classes), maps, alpha=alpha, size=size, accuracy=accuracy).to(dtype)
    # a random head sits on its kinks (attention and features at 0); a trained one is mostly away from them
    torch.nn.init.constant_(teacher.head.attentions.bn.bias, 1.0)
    torch.nn.init.constant_(teacher.backbone.bn_layers()[-1][1].bias, 0.5)
    teacher.train()
    with torch.no_grad():
        for _ in range(8):
            teacher(torch.randn(8, 3, size, size, dtype=dtype) * 1.5)
        teacher.eval()
        z = torch.stack([teacher(torch.randn(4, 3, size, size, dtype=dtype)).z.mean(0) for _ in range(classes)])
        z = torch.nn.functional.normalize(z + 0.3 * z.mean() * torch.rand_like(z), dim=1)
        teacher.prototypes_ema.copy_(z)
        teacher.prototypes_last.copy_(0.05 * z.roll(1, dims=1))
    return teacher.requires_grad_(False)


def tiny_config(method: str, *, classes: int = 5, size: int = 32, **changes: object) -> Recipe:
    """A recipe in fp64."""
    config = replace(DistillConfig(method=method, precision="fp64"), **changes)
    return resolve(config, classes=classes, size=size)


def make_dataset(path: Path, classes: int = 5, size: int = 32, per_class: int = 4, seed: int = 0) -> Artifact:
    """A "dataset" artifact of smooth random images."""
    stage = open_stage(path, "dataset", DataConfig(size=size, seed=seed), {})
    rng = np.random.default_rng(seed)
    for split in ("train", "test"):
        coarse = torch.from_numpy(rng.random((classes * per_class, 3, 4, 4)))
        images = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
        write_npy(stage.path / f"{split}_images.npy", (images * 255).to(torch.uint8).numpy())
        write_npy(stage.path / f"{split}_labels.npy", np.repeat(np.arange(classes), per_class))
    count = classes * per_class
    facts = {"name": "smooth", "train": count, "test": count, "per_class": {"train": [per_class] * classes}}
    return stage.finish(classes=[f"class {k}" for k in range(classes)], size=size, mean=MEAN, std=STD, facts=facts)


def make_teacher(path: Path, dataset: Artifact, name: str = f"{SMALL},output_stride=8", **settings: object) -> Artifact:
    """A "teacher" artifact with a tiny random teacher."""
    stage = open_stage(path, "teacher", PretrainConfig(model=name), {"dataset": dataset})
    teacher = tiny_teacher(name, len(dataset.classes), size=dataset.size, dtype=torch.float32, **settings)
    teacher.save(stage.path / "teacher.safetensors")
    facts = {"model": teacher.name, "attention_maps": teacher.attention_maps, "backbone_accuracy": teacher.accuracy}
    return stage.finish_like(dataset, facts)


def make_patches(path: Path, dataset: Artifact, per_class: int = 3) -> Artifact:
    """A "patches" artifact: the first training images of each class."""
    stage = open_stage(path, "patches", PatchesConfig(per_class=per_class), {"dataset": dataset})
    train = load_split(dataset, "train")
    for label in range(len(dataset.classes)):
        for index, pixels in enumerate(train.pixels(train.of_class(label)[:per_class])):
            save_image(stage.path / f"images/{label:05d}/class{label:05d}_id{index:05d}.png", pixels)
    return stage.finish_like(dataset, {"factor": 1, "per_class": per_class})


def saved_pixels(images: torch.Tensor) -> np.ndarray:
    """Normalised images [n, 3, S, S] as `paper` saves them: uint8, rounded."""
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    return ((images.double() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
