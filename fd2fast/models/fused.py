"""The fused teacher: a frozen teacher's outputs and its BN matching loss in one pass that keeps one tensor for each BN."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from fd2fast import ops
from fd2fast.models.attention_head import POOL_EPS, SCALE
from fd2fast.models.convolution import Choices
from fd2fast.models.frozen_layers import FrozenBatchNorm, FrozenConv, Segments
from fd2fast.models.rewrite import Rewritten, by_modules, rewrite
from fd2fast.models.teacher import Teacher, TeacherOutput
from fd2fast.ops import _dispatch
from fd2fast.reference._offsets import accumulation_dtype
from fd2fast.system.device import repeatable

log = logging.getLogger("fd2fast")

# side of the images that shapes are read from and that the rewritten network is checked with
_PROBE_SIDE = 64


class FusedTeacher(nn.Module):
    """A frozen teacher for the distillation step. Made by `fuse`.

    `name`, `classes`, `attention_maps`, `alpha`, `accuracy`, `size`, `prototypes_ema`, `prototypes_last` are the teacher's;
    `dtype` is the type of the maps (and of what is kept for the backward pass), `fallbacks` names the modules and functions
    that run as they were, with ordinary autograd.
    """

    prototypes_ema: Tensor
    prototypes_last: Tensor
    classifier: Tensor

    def __init__(self, teacher: Teacher, body: Rewritten, dtype: torch.dtype):
        super().__init__()
        self.name, self.classes, self.size = teacher.name, teacher.classes, teacher.size
        self.attention_maps, self.alpha, self.accuracy = teacher.attention_maps, teacher.alpha, teacher.accuracy
        self.dtype = dtype
        self.body = body
        self.fallbacks = list(body.fallbacks)
        self._bn_layers = teacher.bn_layers()
        self.attention_conv = FrozenConv(teacher.head.attentions.conv, dtype)
        last = len(self._bn_layers) - 1
        self.attention_bn = FrozenBatchNorm(teacher.head.attentions.bn, "relu", last, dtype)
        wide = accumulation_dtype(dtype)
        self.register_buffer("classifier", teacher.head.fc.weight.detach().to(wide), persistent=False)
        for name in ("prototypes_ema", "prototypes_last"):
            self.register_buffer(name, getattr(teacher, name), persistent=False)
        self.eval()

    def bn_layers(self) -> list[tuple[str, nn.BatchNorm2d]]:
        """The teacher's own BN layers: the backbone's in registration order, then ("cal", the head's)."""
        return list(self._bn_layers)

    def choose_by(self, choices: Choices) -> None:
        """Take the convolutions' algorithms on a CPU from these choices."""
        for layer in self._convolutions():
            layer.choose_by(choices)

    def forget_packed(self) -> None:
        """Let go of the weights' forms that convolutions made; those that are needed are made again."""
        for layer in self._convolutions():
            layer.forget_packed()

    def _convolutions(self) -> list[FrozenConv]:
        return [layer for layer in self.modules() if isinstance(layer, FrozenConv)]

    def forward(
        self, x: Tensor, segments: Segments, *, first_bn_multiplier: float = 10.0, cal_bn: bool = True
    ) -> tuple[TeacherOutput, Tensor]:
        """[N, 3, H, W] -> (TeacherOutput, BN loss [S] in fp32, fp64 for fp64).

        segments: host row offsets (S+1 ints from 0 to N). The loss of a segment is the sum of the matching losses of the BN
        layers' inputs; the first layer's counts `first_bn_multiplier` times, the head's only with `cal_bn`.
        z, logits and cal_logits are in fp32 (fp64), features and attention in `dtype`. Any autocast around is without effect.
        """
        with torch.autocast(x.device.type, enabled=False):
            features, logits, losses = self.body(self._entry(x), segments)
            attention, cal_loss = self.attention_bn(self.attention_conv(features), segments)
            z = _dispatch.run("bilinear_attention_pool", "auto", features, attention, eps=POOL_EPS)
            cal_logits = nn.functional.linear(SCALE * z, self.classifier)
            if cal_bn:
                losses = [*losses, (self.attention_bn.index, cal_loss)]
            return TeacherOutput(features, attention, z, logits, cal_logits), _total(losses, first_bn_multiplier)

    def backbone_logits(
        self, x: Tensor, segments: Segments, *, first_bn_multiplier: float = 10.0
    ) -> tuple[Tensor, Tensor]:
        """[N, 3, H, W] -> (logits [N, K] of the backbone branch, BN loss [S] of the backbone); see `forward`."""
        with torch.autocast(x.device.type, enabled=False):
            _, logits, losses = self.body(self._entry(x), segments)
            return logits, _total(losses, first_bn_multiplier)

    def _entry(self, x: Tensor) -> Tensor:
        return x.to(self.dtype, memory_format=torch.channels_last)


def _total(losses: list[tuple[int, Tensor]], first_multiplier: float) -> Tensor:
    """Sum over the layers [S]; layer 0 counts `first_multiplier` times."""
    stacked = torch.stack([loss * first_multiplier if index == 0 else loss for index, loss in losses])
    return stacked.sum(dim=0)


def fuse(teacher: Teacher, dtype: torch.dtype | None = None) -> FusedTeacher:
    """The fused twin of a teacher in eval mode, on its device.

    dtype: float64, float32, bfloat16 or float16, the type of the maps; None: the teacher's. Weights are copied: later changes
    of the teacher do not show. The rewritten network is checked on two random images against the teacher (outputs and BN
    losses, in the teacher's type); one that disagrees is rewritten module by module instead, which is logged.
    Raises ValueError for a teacher in train mode, UserError for BN layers without statistics.
    """
    training = [name for name, layer in teacher.bn_layers() if layer.training]
    if training:
        raise ValueError(f"teacher {teacher.name} must be in eval mode, but {training[0]} is in train mode")
    own = teacher.head.fc.weight
    dtype = own.dtype if dtype is None else dtype
    probe = _probe(teacher, own)
    body = rewrite(teacher.backbone, dtype, probe)
    trial = body if dtype == own.dtype else rewrite(teacher.backbone, own.dtype, probe)
    error = _disagreement(teacher, trial, probe)
    if not error <= _tolerance(own.dtype):
        reason = f"fused by graph it disagrees (relative error {error:.1e})"
        log.warning("%s is rewritten module by module: %s", teacher.name, reason)
        body = by_modules(teacher.backbone, dtype, reason)
        error = _disagreement(teacher, by_modules(teacher.backbone, own.dtype, reason), probe)
        if not error <= _tolerance(own.dtype):
            raise RuntimeError(f"teacher {teacher.name} cannot be fused: relative error {error:.1e}")
    fused = FusedTeacher(teacher, body, dtype)
    fused.forget_packed()  # made for the probe
    return fused


def _probe(teacher: Teacher, own: Tensor) -> Tensor:
    """Two random images [2, 3, s, s] of a side that the teacher can see."""
    generator = torch.Generator().manual_seed(0)
    small = torch.randn(2, 3, min(_PROBE_SIDE, teacher.size), min(_PROBE_SIDE, teacher.size), generator=generator)
    try:
        with torch.no_grad():
            teacher.backbone.features(small.to(own))
    except (RuntimeError, AssertionError, ValueError):  # a fixed or a smallest input size
        small = torch.randn(2, 3, teacher.size, teacher.size, generator=generator)
    return small.to(own)


def _disagreement(teacher: Teacher, body: Rewritten, images: Tensor) -> float:
    """Largest relative error (L2) of features, logits and BN losses; without TF32, which would be the larger error."""
    measured: dict[str, Tensor] = {}
    layers = teacher.backbone.bn_layers()
    segments = (0, 1, len(images))

    def measure(name: str, layer: nn.BatchNorm2d, x: Tensor) -> None:
        loss = ops.bn_matching(x, layer.running_mean, layer.running_var, segments)  # type: ignore[arg-type]
        measured[name] = measured.get(name, 0.0) + loss

    handles = [
        layer.register_forward_pre_hook(lambda module, inputs, name=name: measure(name, module, inputs[0]))
        for name, layer in layers
    ]
    try:
        with torch.no_grad(), repeatable(allow_tf32=False):
            features = teacher.backbone.features(images)
            logits = teacher.backbone.logits(features)
            found_features, found_logits, losses = body(images.contiguous(memory_format=torch.channels_last), segments)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, Tensor] = {}
    for index, loss in losses:
        name = layers[index][0]
        found[name] = found.get(name, 0.0) + loss
    pairs = [(found_features, features), (found_logits, logits)]
    if found.keys() != measured.keys():
        return float("inf")
    pairs += [(found[name], measured[name]) for name in measured]
    return max(_relative(a, b) for a, b in pairs)


def _relative(actual: Tensor, expected: Tensor) -> float:
    if actual.shape != expected.shape:
        return float("inf")
    error, size = (actual.double() - expected.double()).norm().item(), expected.double().norm().item()
    return error / size if size > 0 else (0.0 if error == 0 else float("inf"))


def _tolerance(dtype: torch.dtype) -> float:
    return {torch.float64: 1e-9, torch.float32: 2e-3}.get(dtype, 0.2)
