"""Tiny teachers and settings for the tests of the step and the distill stage."""

import torch

from fd2fast.config import DistillConfig, replace
from fd2fast.methods import resolve
from fd2fast.models.backbone import build_backbone
from fd2fast.models.teacher import Teacher

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


def tiny_config(method: str, *, classes: int = 5, size: int = 32, **changes: object) -> DistillConfig:
    """A resolved configuration in fp64."""
    config = replace(DistillConfig(method=method, precision="fp64"), **changes)
    return resolve(config, classes=classes, size=size)
