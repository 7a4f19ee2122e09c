"""A user's own frozen network, fused: logits and BN matching loss in one pass that keeps one tensor for each BN."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fd2fast.models.backbone import Backbone
from fd2fast.models.frozen_layers import FrozenConv, Segments
from fd2fast.models.rewrite import rewrite
from fd2fast.system.device import repeatable

# Largest relative error (L2) of logits and BN losses against the module itself.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3}


class FusedNetwork(nn.Module):
    """A frozen classifier whose one call gives its logits and its BN matching loss. Made by `fuse`.

    `fallbacks` names the modules and functions that run as they were, with ordinary autograd; `dtype` is the type of the maps.
    """

    def __init__(self, backbone: Backbone, dtype: torch.dtype, probe: Tensor):
        super().__init__()
        self.body = rewrite(backbone, dtype, probe)
        self.dtype, self.fallbacks = dtype, list(self.body.fallbacks)
        self.bn_names = [name for name, _ in backbone.bn_layers()]
        self.eval()

    def forward(
        self, images: Tensor, segments: Segments | None = None, *, first_bn_multiplier: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """[N, 3, H, W] -> (logits [N, K], loss [S]), differentiable in the images; both float32 (float64 for float64).

        segments: host row offsets (S + 1 ints from 0 to N) of the images that share statistics; None: all of them. The loss of a
        segment is the sum over BN layers of |var - running_var| + |mean - running_mean| of the layer's input (the
        hook of SRe2L); the first layer's counts `first_bn_multiplier` times.
        """
        rows = (0, len(images)) if segments is None else tuple(int(row) for row in segments)
        if rows[0] != 0 or rows[-1] != len(images) or any(b < a for a, b in zip(rows, rows[1:], strict=False)):
            raise ValueError(f"segments must rise from 0 to the {len(images)} images, got {rows}")
        with torch.autocast(images.device.type, enabled=False):
            given = images.to(self.dtype, memory_format=torch.channels_last)
            _, logits, losses = self.body(given, rows)
            weighted = [loss * first_bn_multiplier if index == 0 else loss for index, loss in losses]
            return logits.to(weighted[0].dtype), torch.stack(weighted).sum(dim=0)


def fuse(model: nn.Module, *, size: int, dtype: torch.dtype | None = None) -> FusedNetwork:
    """The fused twin of a classifier in eval mode that takes images [N, 3, size, size] and has BatchNorm2d layers.

    dtype: float64, float32, bfloat16 or float16, the type of the maps; None: that of the weights. Weights are copied: later
    changes of the module do not show. The twin is checked against the module on two random images. Raises ValueError for a
    module in train mode, one that does not take such images, or one whose twin disagrees; TypeError for what is no module;
    UserError for one without BatchNorm2d or without running statistics. What has no fused counterpart (`fallbacks`) is kept.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the network must be an nn.Module, got a {type(model).__name__}")
    training = [name or type(model).__name__ for name, part in model.named_modules() if part.training]
    if training:
        raise ValueError(f"the network must be in eval mode, but {training[0]} is in train mode")
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    if weight is None:
        raise ValueError(f"the network must have weights, {type(model).__name__} has none")
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"size must be a number of pixels, got {size!r}")
    probe = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        with torch.no_grad():
            logits = model(probe)
    except Exception as error:  # a model's own code may raise anything
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        raise ValueError(f"{type(model).__name__} does not take images [2, 3, {size}, {size}]: {reason}") from error
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise ValueError(
            f"the network must give logits [N, classes], got {getattr(logits, 'shape', type(logits).__name__)}"
        )
    backbone = Backbone(
        type(model).__name__,
        model,
        channels=logits.shape[1],
        classes=logits.shape[1],
        head="",
        features=lambda net, images: net(images),
        logits=lambda net, outputs: outputs,
    )
    own = FusedNetwork(backbone, weight.dtype, probe)
    expected = _losses(backbone, probe)
    with torch.no_grad(), repeatable(allow_tf32=False):
        given_logits, given_loss = own(probe, (0, 1, 2))
    apart = max(_relative(given_logits, logits), _relative(given_loss, expected))
    if not apart <= TOLERANCE.get(weight.dtype, 0.2):
        raise ValueError(f"{backbone.name} cannot be fused: its twin is off by {apart:.1e} of its outputs")
    fused = own if dtype is None or dtype == weight.dtype else FusedNetwork(backbone, dtype, probe)
    for layer in fused.modules():
        if isinstance(layer, FrozenConv):
            layer.forget_packed()  # made for the probe
    return fused


def _losses(backbone: Backbone, images: Tensor) -> Tensor:
    """The BN matching loss of each image, by hooks on the module itself."""
    total = torch.zeros(len(images), dtype=torch.float64)

    def add(layer: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        variance, mean = torch.var_mean(inputs[0].double(), dim=(2, 3), correction=0)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        for own, running in ((variance, layer.running_var), (mean, layer.running_mean)):
            total.add_(torch.linalg.vector_norm(own - running.double(), dim=1).cpu())

    handles = [layer.register_forward_pre_hook(add) for _, layer in backbone.bn_layers()]
    try:
        with torch.no_grad(), repeatable(allow_tf32=False):
            backbone(images)
    finally:
        for handle in handles:
            handle.remove()
    return total


def _relative(actual: Tensor, expected: Tensor) -> float:
    expected = expected.double().cpu()
    return float((actual.double().cpu() - expected).norm() / expected.norm().clamp_min(1e-30))
