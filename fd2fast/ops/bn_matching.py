"""The operations bn_matching, bn_act_matching and their parts: per-segment BN statistics, alone and fused with BN."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fd2fast import reference
from fd2fast.ops import _checks, _dispatch
from fd2fast.ops._layout import dense, dense_like
from fd2fast.reference._offsets import Offsets, accumulation_dtype, device_offsets

ACTIVATIONS = ("identity", "relu", "relu6")


def _few_rows(x: Tensor, *arguments: Any, **settings: Any) -> str | None:
    n, _, h, w = x.shape
    return f"x has {n * h * w} pixel rows, 2^31 or more" if n * h * w >= 1 << 31 else None


def _kernels() -> Any:
    return _dispatch.kernels("bn_matching")


def _wide(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=accumulation_dtype(x), device=x.device)


@torch.library.custom_op("fd2fast::bn_matching", mutates_args=())
def _matching(
    x: Tensor, running_mean: Tensor, running_var: Tensor, segments: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loss [S], and for the backward dmean, dvar [S, C] and norms [S, 2]."""
    return _kernels().bn_fwd(x, running_mean, running_var, segments)[1:5]


@_matching.register_fake
def _(x, running_mean, running_var, segments):
    s, c = segments.numel() - 1, x.shape[1]
    return _wide(x, s), _wide(x, s, c), _wide(x, s, c), _wide(x, s, 2)


@torch.library.custom_op("fd2fast::bn_matching_backward", mutates_args=())
def _matching_backward(
    x: Tensor, running_mean: Tensor, segments: Tensor, dmean: Tensor, dvar: Tensor, norms: Tensor, grad: Tensor
) -> Tensor:
    matching = (dmean, dvar, norms, grad.contiguous())
    return _kernels().bn_bwd(x, segments, running_mean=running_mean, matching=matching)[0]


@_matching_backward.register_fake
def _(x, running_mean, segments, dmean, dvar, norms, grad):
    return torch.empty_like(x)


def _matching_save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, running_mean, _, segments = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, running_mean, segments, *output[1:])


def _matching_gradient(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple:
    if grad is None:
        return (None,) * 4
    return _matching_backward(*ctx.saved_tensors, grad), None, None, None


_matching.register_autograd(_matching_gradient, setup_context=_matching_save)


@torch.library.custom_op("fd2fast::segment_statistics", mutates_args=())
def _statistics(x: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    return _kernels().bn_fwd(x, None, None, segments)[2:4]


@_statistics.register_fake
def _(x, segments):
    s, c = segments.numel() - 1, x.shape[1]
    return _wide(x, s, c), _wide(x, s, c)


@torch.library.custom_op("fd2fast::segment_statistics_backward", mutates_args=())
def _statistics_backward(x: Tensor, segments: Tensor, mean: Tensor, grad_mean: Tensor, grad_var: Tensor) -> Tensor:
    given = (mean, grad_mean.contiguous(), grad_var.contiguous())
    return _kernels().bn_bwd(x, segments, given=given)[0]


@_statistics_backward.register_fake
def _(x, segments, mean, grad_mean, grad_var):
    return torch.empty_like(x)


def _statistics_save(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.save_for_backward(*inputs, output[0])


def _statistics_gradient(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> tuple:
    return _statistics_backward(*ctx.saved_tensors, grad_mean, grad_var), None


_statistics.register_autograd(_statistics_gradient, setup_context=_statistics_save)


@torch.library.custom_op("fd2fast::bn_act", mutates_args=())
def _act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    segments: Tensor,
    residual: Tensor | None,
    activation: str,
    eps: float,
    matching: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, loss [S], and for the backward dmean, dvar [S, C], norms [S, 2] and the mask; [0] without matching."""
    return _kernels().bn_fwd(
        x,
        running_mean,
        running_var,
        segments,
        affine=(weight, bias),
        residual=residual,
        activation=activation,
        eps=eps,
        statistics=matching,
    )


@_act.register_fake
def _(x, weight, bias, running_mean, running_var, segments, residual, activation, eps, matching):
    s, c = segments.numel() - 1, x.shape[1]
    shapes = [(s,), (s, c), (s, c), (s, 2)] if matching else [(0,)] * 4
    mask = torch.empty(_mask_elements(x, activation, residual), dtype=torch.uint8, device=x.device)
    return (torch.empty_like(x), *(_wide(x, *shape) for shape in shapes), mask)


def _mask_elements(x: Tensor, activation: str, residual: Tensor | None) -> int:
    """As the kernels keep it: a bit for each element in channels_last, else a byte; none where it follows from x."""
    if residual is None or activation == "identity":
        return 0
    last = x.is_contiguous(memory_format=torch.channels_last)
    return x.numel() // 8 if last and x.shape[1] % 8 == 0 else x.numel()


@torch.library.custom_op("fd2fast::bn_act_backward", mutates_args=())
def _act_backward(
    grad_y: Tensor | None,
    grad_loss: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    segments: Tensor,
    dmean: Tensor,
    dvar: Tensor,
    norms: Tensor,
    mask: Tensor,
    activation: str,
    eps: float,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    return _kernels().bn_bwd(
        x,
        segments,
        running_mean=running_mean,
        running_var=running_var,
        affine=(weight, bias),
        grad_y=None if grad_y is None else dense_like(grad_y, x),
        mask=mask,
        residual_dtype=residual_dtype,
        activation=activation,
        eps=eps,
        matching=None if grad_loss is None else (dmean, dvar, norms, grad_loss.contiguous()),
    )


@_act_backward.register_fake
def _(
    grad_y,
    grad_loss,
    x,
    weight,
    bias,
    running_mean,
    running_var,
    segments,
    dmean,
    dvar,
    norms,
    mask,
    activation,
    eps,
    residual_dtype,
):
    none = residual_dtype is None or grad_y is None
    residual = x.new_empty(0) if none else torch.empty_like(x, dtype=residual_dtype)
    return torch.empty_like(x), residual


def _act_save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, running_mean, running_var, segments, residual, activation, eps, matching = inputs
    # no zeros, at each backward, for the outputs that only it reads
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, running_mean, running_var, segments, *output[2:])
    ctx.residual_dtype = None if residual is None else residual.dtype
    ctx.activation, ctx.eps, ctx.matching = activation, eps, matching


def _act_gradient(ctx: Any, grad_y: Tensor | None, grad_loss: Tensor | None, *_: Tensor | None) -> tuple:
    if grad_y is None and grad_loss is None:
        return (None,) * 10
    grad_x, grad_residual = _act_backward(
        grad_y,
        grad_loss if ctx.matching else None,
        *ctx.saved_tensors,
        ctx.activation,
        ctx.eps,
        ctx.residual_dtype,
    )
    no_residual = ctx.residual_dtype is None or grad_y is None
    return grad_x, *[None] * 5, None if no_residual else grad_residual, None, None, None


_act.register_autograd(_act_gradient, setup_context=_act_save)


def _matching_by_triton(x: Tensor, running_mean: Tensor, running_var: Tensor, segments: Offsets) -> Tensor:
    bounds = device_offsets(segments, x.device)
    return _matching(dense(x), running_mean.contiguous(), running_var.contiguous(), bounds)[0]


def _statistics_by_triton(x: Tensor, segments: Offsets) -> tuple[Tensor, Tensor]:
    return _statistics(dense(x), device_offsets(segments, x.device))


def _fused(
    x: Tensor,
    residual: Tensor | None,
    constants: Sequence[Tensor],
    segments: Offsets,
    activation: str,
    eps: float,
    matching: bool,
) -> tuple[Tensor, ...]:
    x = dense(x)
    residual = None if residual is None else dense_like(residual, x)
    bounds = device_offsets(segments, x.device)
    return _act(x, *(c.contiguous() for c in constants), bounds, residual, activation, eps, matching)


def _act_by_triton(x: Tensor, residual: Tensor | None, *constants: Tensor, activation: str, eps: float) -> Tensor:
    return _fused(x, residual, constants, [0, x.shape[0]], activation, eps, False)[0]


def _act_by_reference(x: Tensor, residual: Tensor | None, *constants: Tensor, activation: str, eps: float) -> Tensor:
    return reference.bn_act(x, *constants, residual=residual, activation=activation, eps=eps)


def _act_matching_by_triton(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    segments: Offsets,
    *,
    activation: str,
    eps: float,
) -> tuple[Tensor, ...]:
    return _fused(x, residual, (weight, bias, running_mean, running_var), segments, activation, eps, True)[:2]


def _act_matching_by_reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    segments: Offsets,
    *,
    activation: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    constants = weight, bias, running_mean, running_var
    return reference.bn_act_matching(x, *constants, segments, residual=residual, activation=activation, eps=eps)


_dispatch.register_triton("bn_matching", _matching_by_triton, limits=_few_rows)
_dispatch.register("bn_matching", "reference", _dispatch.without_autocast(reference.bn_matching))
_dispatch.register_triton("segment_statistics", _statistics_by_triton, limits=_few_rows)
_dispatch.register("segment_statistics", "reference", _dispatch.without_autocast(reference.segment_statistics))
_dispatch.register_triton("bn_act", _act_by_triton, tensors=2, limits=_few_rows)
_dispatch.register("bn_act", "reference", _dispatch.without_autocast(_act_by_reference))
_dispatch.register_triton("bn_act_matching", _act_matching_by_triton, tensors=2, limits=_few_rows)
_dispatch.register("bn_act_matching", "reference", _dispatch.without_autocast(_act_matching_by_reference))
_dispatch.register("match_statistics", "reference", reference.match_statistics)


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
    mean, var = _dispatch.run("segment_statistics", backend, x, segments)
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
    constants = weight, bias, running_mean, running_var
    y: Tensor = _dispatch.run("bn_act", backend, x, residual, *constants, activation=activation, eps=eps)
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
    given = x, residual, weight, bias, running_mean, running_var, segments
    y, loss = _dispatch.run("bn_act_matching", backend, *given, activation=activation, eps=eps)
    return y, loss
