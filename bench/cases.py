"""What the benches of the step work on: random teachers at the paper's sizes, and segments of random images with priors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd2fast.distillation.planner import iteration_table
from fd2fast.errors import UserError
from fd2fast.methods import METHODS, check_name, resolve
from fd2fast.models.backbone import build_backbone
from fd2fast.models.teacher import Teacher
from fd2fast.settings.config import DistillConfig
from fd2fast.settings.recipe import Recipe
from fd2fast.system.device import settle_precision

MEAN, STD = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
# App. Table 3, CUB-200-2011
MAPS = {"ResNet18": 8, "ResNet50": 8, "MobileNetV2": 16, "DenseNet121": 16, "ShuffleNetV2": 16}
# App. Sec. 3.2, fine-grained data sets
POOL = ("ResNet18", "MobileNetV2", "ResNet50", "DenseNet121")
PAPER_METHODS = ("sre2l++", "sre2l++_fd2", "fadrm+", "fadrm+_fd2")


@dataclass
class Case:
    """One method on one segment: what every implementation is given."""

    config: Recipe
    teachers: list[Teacher]
    initial: Tensor
    labels: Tensor
    priors: list[Tensor]  # per teacher, attention [rows, P, M, h, w]; empty for a base method
    low: Tensor
    high: Tensor
    draws: Tensor  # int [T, 1, 7]

    @property
    def rows(self) -> int:
        return len(self.labels)


def make_teacher(name: str, *, classes: int, size: int, device: torch.device) -> Teacher:
    """Random weights, settled BN statistics and prototypes, frozen, NCHW: time and memory do not depend on the values."""
    torch.manual_seed(0)
    teacher = Teacher(build_backbone(name, classes), MAPS.get(name, 4), alpha=0.5, size=size, accuracy=50)
    for _, layer in teacher.bn_layers():
        nn.init.uniform_(layer.weight, 0.5, 1.0)
        nn.init.normal_(layer.bias, std=0.2)
    # a random head sits on its kinks, attention and features at 0; a trained one is mostly away from them
    nn.init.constant_(teacher.head.attentions.bn.bias, 1.0)
    nn.init.constant_(teacher.backbone.bn_layers()[-1][1].bias, 0.5)
    teacher = teacher.to(device).train()
    with torch.no_grad():
        for _ in range(3):
            teacher(torch.randn(8, 3, size, size, device=device))
        teacher.eval().requires_grad_(False)
        z = teacher(torch.randn(4, 3, size, size, device=device)).z
        near = F.normalize(z.mean(0) + 0.3 * z.mean() * torch.rand(teacher.prototypes_ema.shape, device=device), dim=1)
        teacher.prototypes_ema.copy_(near)
        teacher.prototypes_last.copy_(0.05 * near)
    return teacher


def check_method(method: str) -> None:
    """UserError for a method that is unknown or that the benches of a step cannot run."""
    check_name(method)
    if method not in METHODS:
        raise UserError(f"{method} picks real images and has no iterations to measure")
    if METHODS[method].least > 1 and METHODS[method].fields["teacher_schedule"] != "round_robin":
        raise UserError(f"{method} weighs several teachers in one iteration; the benches measure one at a time")


def teachers_of(method: str, teacher: str, pool: Sequence[str]) -> tuple[str, ...]:
    """The backbones a method works with: the pool where it needs several, else the one."""
    return tuple(pool) if METHODS[method].least > 1 else (teacher,)


def make_case(
    method: str,
    teachers: Sequence[Teacher],
    *,
    rows: int,
    priors: int,
    precision: str,
    device: torch.device,
    images: Tensor | None = None,
) -> Case:
    """A segment of `rows` classes whose images have `priors` finished ones before them.

    images: normalised [rows, 3, S, S], random ones if there are none. precision: of rival and engine.
    """
    size, classes = teachers[0].size, min(t.classes for t in teachers)
    wanted = DistillConfig(
        method=method,
        precision=precision,  # type: ignore[arg-type]
        iterations=(1_000_000,),
        sizes=(size,),
        segment_size=min(rows, classes),
        device=str(device),
    )
    config = resolve(settle_precision(wanted), classes=classes, size=size)
    low, high = ((0 - MEAN) / STD).to(device), ((1 - MEAN) / STD).to(device)
    if images is None:
        unit = torch.rand(rows, 3, size, size, generator=torch.Generator().manual_seed(1))
        images = (unit - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
    initial = images.to(device)
    maps = []
    if config.fd2 and priors:
        with torch.no_grad():
            for teacher in teachers:
                found = teacher(initial.flip(0)).attention
                maps.append((found[:, None] * torch.rand(1, priors, 1, 1, 1, device=device)).contiguous())
    draws = torch.from_numpy(iteration_table(0, [0], 0, 64, size, jitter=config.jitter))
    labels = (torch.arange(rows) % classes).to(device)
    return Case(config, list(teachers), initial, labels, maps, low, high, draws)
