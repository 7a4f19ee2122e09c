"""The operations bn_matching and bn_act_matching: per-segment BN statistics loss, alone and fused with BN."""

import torch
from torch import Tensor

from fd2fast import reference
from fd2fast.ops import _checks, _dispatch
from fd2fast.reference._offsets import Offsets

_dispatch.register("bn_matching")
_dispatch.register("bn_act_matching")

ACTIVATIONS = ("identity", "relu", "relu6")


def _check(x: Tensor, segments: Offsets, **channels: Tensor) -> Offsets:
    _checks.shape("x", x, ("N", "C", "H", "W"))
    _checks.floating("x", x)
    if x.shape[2] * x.shape[3] == 0:
        raise ValueError(f"x must have at least one pixel, got {list(x.shape)}")
    for name, tensor in channels.items():
        _checks.shape(name, tensor, (x.shape[1],))
        _checks.floating(name, tensor)
        _checks.same_device(name, tensor, "x", x)
        _checks.constant(name, tensor)
    return _checks.offsets("segments", segments, x.shape[0], "the rows of x")


def bn_matching(
    x: Tensor, running_mean: Tensor, running_var: Tensor, segments: Offsets, *, backend: str = "auto"
) -> Tensor:
    """|var_s - running_var|_2 + |mean_s - running_mean|_2 per segment; see fd2fast.reference.bn_matching.

    x: float [N, C, H, W]; running_mean, running_var: float [C]; segments: int row offsets [S+1] (tensor, list
    or tuple) from 0 to N; returns [S] in float32 (float64 for float64), 0 for an empty segment.
    Differentiable in x. Raises ValueError for shapes, types, devices or offsets that do not fit.
    """
    segments = _check(x, segments, running_mean=running_mean, running_var=running_var)
    _dispatch.choose("bn_matching", (x,), backend)
    with torch.autocast(x.device.type, enabled=False):
        return reference.bn_matching(x, running_mean, running_var, segments)


def bn_act_matching(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    segments: Offsets,
    *,
    residual: Tensor | None = None,
    activation: str = "relu",
    eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Eval-mode BN, addition, activation, and the matching loss of x; see fd2fast.reference.bn_act_matching.

    x, residual: float [N, C, H, W]; weight, bias, running_mean, running_var: float [C]; segments: int row
    offsets [S+1] (tensor, list or tuple) from 0 to N; activation: "relu", "relu6" or "identity". Returns y
    [N, C, H, W] in x's type and the loss [S] of bn_matching. Differentiable in x and residual. Raises
    ValueError for shapes, types, devices or offsets that do not fit, and where weight or bias require a
    gradient (the teacher is frozen).
    """
    channels = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    segments = _check(x, segments, **channels)
    if activation not in ACTIVATIONS:
        raise ValueError(f'activation must be "relu", "relu6" or "identity", got {activation!r}')
    if residual is not None:
        _checks.shape("residual", residual, tuple(x.shape))
        _checks.floating("residual", residual)
        _checks.same_device("residual", residual, "x", x)
    _dispatch.choose("bn_act_matching", (x,) if residual is None else (x, residual), backend)
    with torch.autocast(x.device.type, enabled=False):
        return reference.bn_act_matching(
            x,
            weight,
            bias,
            running_mean,
            running_var,
            segments,
            residual=residual,
            activation=activation,
            eps=eps,
        )
