"""The operations bn_matching, bn_act_matching and their parts: per-segment BN statistics, alone and fused with BN."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fd2fast import reference
from fd2fast.ops import _checks, _dispatch
from fd2fast.ops._batch_norm import BatchNorm, joined_loss
from fd2fast.reference._offsets import Offsets
from fd2fast.reference.activation import ACTIVATIONS


def _statistics_by_reference(x: Tensor, segments: Offsets) -> Tensor:
    return torch.stack(reference.segment_statistics(x, segments))


def _act_by_reference(x: Tensor, residual: Tensor | None, bn: BatchNorm, activation: str) -> Tensor:
    return reference.bn_act(x, *bn.constants, residual=residual, activation=activation, eps=bn.eps)


def _act_matching_by_reference(
    x: Tensor, residual: Tensor | None, bn: BatchNorm, segments: Offsets, activation: str
) -> tuple[Tensor, Tensor]:
    return reference.bn_act_matching(x, *bn.constants, segments, residual=residual, activation=activation, eps=bn.eps)


def _joined_by_reference(
    maps: Sequence[Tensor], statistics: Sequence[Tensor], bn: BatchNorm, segments: Offsets, activation: str
) -> tuple[Tensor, Tensor]:
    y = reference.bn_act(torch.cat(list(maps), dim=1), *bn.constants, activation=activation, eps=bn.eps)
    return y, joined_loss(statistics, bn, segments)


for _name, _run in (
    ("bn_matching", reference.bn_matching),
    ("segment_statistics", _statistics_by_reference),
    ("bn_act", _act_by_reference),
    ("bn_act_matching", _act_matching_by_reference),
    ("joined_bn_act_matching", _joined_by_reference),
    ("match_statistics", reference.match_statistics),
):
    _dispatch.register(_name, "reference", _dispatch.without_autocast(_run))


def _check_x(x: Tensor, **channels: Tensor) -> None:
    _checks.shape("x", x, ("N", "C", "H", "W"))
    _checks.floating("x", x)
    if x.shape[2] * x.shape[3] == 0:
        raise ValueError(f"x must have at least one pixel, got {list(x.shape)}")
    for name, tensor in channels.items():
        _checks.shape(name, tensor, (x.shape[1],))
        _checks.floating(name, tensor)
        _checks.same_device(name, tensor, "x", x)
        _checks.constant(name, tensor)


def _check_act(x: Tensor, residual: Tensor | None, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f'activation must be "relu", "relu6" or "identity", got {activation!r}')
    if residual is not None:
        _checks.shape("residual", residual, tuple(x.shape))
        _checks.floating("residual", residual)
        _checks.same_device("residual", residual, "x", x)


def segment_statistics(x: Tensor, segments: Offsets, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Mean and biased variance [S, C] of each segment; see fd2fast.reference.segment_statistics.

    x: float [N, C, H, W]; segments: int row offsets [S+1] (tensor, list or tuple) from 0 to N. Returns float32 (float64
    for float64), 0 for an empty segment. Differentiable in x. For DenseNets: channels that several BN layers see are
    measured once, concatenated, and compared with match_statistics. Raises ValueError as bn_matching.
    """
    _check_x(x)
    segments = _checks.offsets("segments", segments, x.shape[0], "the rows of x")
    mean, var = _dispatch.run("segment_statistics", backend, x, segments).unbind()
    return mean, var


def match_statistics(
    mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, *, backend: str = "auto"
) -> Tensor:
    """|var - running_var|_2 + |mean - running_mean|_2 over channels: float [S, C] x 2, [C] x 2 -> [S].

    Differentiable in mean and var. Raises ValueError for shapes, types or devices that do not fit.
    """
    _checks.shape("mean", mean, ("S", "C"))
    _checks.shape("var", var, tuple(mean.shape))
    _checks.same_device("var", var, "mean", mean)
    for name, tensor in (("running_mean", running_mean), ("running_var", running_var)):
        _checks.shape(name, tensor, (mean.shape[1],))
        _checks.same_device(name, tensor, "mean", mean)
    for name, tensor in (("mean", mean), ("var", var), ("running_mean", running_mean), ("running_var", running_var)):
        _checks.floating(name, tensor)
    distance: Tensor = _dispatch.run("match_statistics", backend, mean, var, running_mean, running_var)
    return distance


def bn_matching(
    x: Tensor, running_mean: Tensor, running_var: Tensor, segments: Offsets, *, backend: str = "auto"
) -> Tensor:
    """|var_s - running_var|_2 + |mean_s - running_mean|_2 per segment; see fd2fast.reference.bn_matching.

    x: float [N, C, H, W]; running_mean, running_var: float [C]; segments: int row offsets [S+1] (tensor, list or
    tuple) from 0 to N; returns [S] in float32 (float64 for float64), 0 for an empty segment. Differentiable in x.
    Raises ValueError for shapes, types, devices or offsets that do not fit.
    """
    _check_x(x, running_mean=running_mean, running_var=running_var)
    segments = _checks.offsets("segments", segments, x.shape[0], "the rows of x")
    loss: Tensor = _dispatch.run("bn_matching", backend, x, running_mean, running_var, segments)
    return loss


def bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    residual: Tensor | None = None,
    activation: str = "relu",
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    """Eval-mode BN, optional addition and activation: bn_act_matching's y without the loss.

    x, residual: float [N, C, H, W]; weight, bias, running_mean, running_var: float [C]; returns [N, C, H, W] in x's
    type. Differentiable in x and residual. Raises ValueError as bn_act_matching.
    """
    _check_x(x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    _check_act(x, residual, activation)
    bn = BatchNorm(weight, bias, running_mean, running_var, eps)
    y: Tensor = _dispatch.run("bn_act", backend, x, residual, bn, activation)
    return y


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

    x, residual: float [N, C, H, W]; weight, bias, running_mean, running_var: float [C]; segments: int row offsets
    [S+1] (tensor, list or tuple) from 0 to N; activation: "relu", "relu6" or "identity". Returns y [N, C, H, W] in
    x's type and the loss [S] of bn_matching. Differentiable in x and residual. Raises ValueError for shapes, types,
    devices or offsets that do not fit, and where weight or bias require a gradient (the teacher is frozen).
    """
    _check_x(x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var)
    segments = _checks.offsets("segments", segments, x.shape[0], "the rows of x")
    _check_act(x, residual, activation)
    bn = BatchNorm(weight, bias, running_mean, running_var, eps)
    y, loss = _dispatch.run("bn_act_matching", backend, x, residual, bn, segments, activation)
    return y, loss


def joined_bn_act_matching(
    maps: Sequence[Tensor],
    statistics: Sequence[tuple[Tensor, Tensor]],
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    segments: Offsets,
    *,
    activation: str = "relu",
    eps: float = 1e-5,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """bn_act_matching of the maps' concatenation along the channels, whose statistics are known (DenseNet).

    maps: float [N, c_i, H, W], of one type; statistics: of each its (mean, var) [S, c_i] by segment_statistics; weight, bias,
    running_mean, running_var: float [sum c_i]; segments and activation as in bn_act_matching. Returns y [N, sum c_i, H, W] in
    the maps' type and the loss [S], 0 for an empty segment. Differentiable in maps and statistics; what is kept for the
    backward are the maps. Raises ValueError for shapes, types, devices or offsets that do not fit.
    """
    if not maps or len(maps) != len(statistics):
        raise ValueError(f"maps and statistics must be as many, at least one, got {len(maps)} and {len(statistics)}")
    n, _, h, w = maps[0].shape
    segments = _checks.offsets("segments", segments, n, "the rows of the maps")
    count = (segments.numel() if isinstance(segments, Tensor) else len(segments)) - 1
    for i, (x, (mean, var)) in enumerate(zip(maps, statistics, strict=True)):
        _check_x(x)
        _checks.shape(f"maps[{i}]", x, (n, "c", h, w))
        _checks.same_device(f"maps[{i}]", x, "maps[0]", maps[0])
        if x.dtype != maps[0].dtype:
            raise ValueError(f"maps must be of one type, got {maps[0].dtype} and {x.dtype}")
        for name, tensor in (("mean", mean), ("var", var)):
            _checks.shape(f"statistics[{i}] ({name})", tensor, (count, x.shape[1]))
            _checks.same_device(f"statistics[{i}] ({name})", tensor, "maps[0]", maps[0])
    _check_act(maps[0], None, activation)
    bn = BatchNorm(weight, bias, running_mean, running_var, eps)
    for name, constant in zip(bn._fields, bn.constants, strict=False):
        _checks.shape(name, constant, (sum(x.shape[1] for x in maps),))
        _checks.constant(name, constant)
    stacked = [torch.stack(pair) for pair in statistics]
    y, loss = _dispatch.run("joined_bn_act_matching", backend, tuple(maps), stacked, bn, segments, activation)
    return y, loss
