"""BN statistics, matching and BN with addition and activation by Triton's kernels."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fd2fast.ops import _dispatch
from fd2fast.ops._batch_norm import BatchNorm, joined_loss
from fd2fast.ops._layout import dense, dense_like
from fd2fast.reference._offsets import Offsets, accumulation_dtype, device_offsets


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
def _statistics(x: Tensor, segments: Tensor) -> Tensor:
    return torch.stack(_kernels().bn_fwd(x, None, None, segments)[2:4])


@_statistics.register_fake
def _(x, segments):
    return _wide(x, 2, segments.numel() - 1, x.shape[1])


@torch.library.custom_op("fd2fast::segment_statistics_backward", mutates_args=())
def _statistics_backward(x: Tensor, segments: Tensor, statistics: Tensor, grad: Tensor) -> Tensor:
    grad = grad.contiguous()
    return _kernels().bn_bwd(x, segments, given=(statistics[0], grad[0], grad[1]))[0]


@_statistics_backward.register_fake
def _(x, segments, statistics, grad):
    return torch.empty_like(x)


def _statistics_save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _statistics_gradient(ctx: Any, grad: Tensor) -> tuple:
    return _statistics_backward(*ctx.saved_tensors, grad), None


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


def _statistics_by_triton(x: Tensor, segments: Offsets) -> Tensor:
    return _statistics(dense(x), device_offsets(segments, x.device))


def _fused(
    x: Tensor, residual: Tensor | None, bn: BatchNorm, segments: Offsets, activation: str, matching: bool
) -> tuple[Tensor, ...]:
    x = dense(x)
    residual = None if residual is None else dense_like(residual, x)
    bounds = device_offsets(segments, x.device)
    return _act(x, *(c.contiguous() for c in bn.constants), bounds, residual, activation, bn.eps, matching)


def _act_by_triton(x: Tensor, residual: Tensor | None, bn: BatchNorm, activation: str) -> Tensor:
    return _fused(x, residual, bn, [0, x.shape[0]], activation, False)[0]


def _act_matching_by_triton(
    x: Tensor, residual: Tensor | None, bn: BatchNorm, segments: Offsets, activation: str
) -> tuple[Tensor, ...]:
    return _fused(x, residual, bn, segments, activation, True)[:2]


class _Joined(torch.autograd.Function):
    """activation(BN(cat(maps))), keeping the maps only (which others keep too): their concatenation is made twice, never kept."""

    @staticmethod
    def forward(ctx: Any, bn: BatchNorm, activation: str, *maps: Tensor) -> Tensor:
        ctx.save_for_backward(*bn.constants, *maps)
        ctx.settings = activation, bn.eps
        return _act_by_triton(torch.cat(maps, dim=1), None, bn, activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        constants, maps = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        x = torch.cat(maps, dim=1)
        grad_x, _ = torch.ops.fd2fast.bn_act_backward(
            grad, None, x, *constants, _all_rows(len(x), x.device), *(x.new_empty(0),) * 4, *ctx.settings, None
        )
        return None, None, *grad_x.split([m.shape[1] for m in maps], dim=1)


@lru_cache(maxsize=1024)
def _all_rows(rows: int, device: torch.device) -> Tensor:
    """Offsets of one segment; kept, because a captured graph may not copy from the host."""
    return torch.tensor([0, rows]).to(device)


def _joined_by_triton(
    maps: Sequence[Tensor], statistics: Sequence[Tensor], bn: BatchNorm, segments: Offsets, activation: str
) -> tuple[Tensor, Tensor]:
    return _Joined.apply(bn, activation, *maps), joined_loss(statistics, bn, segments)


def _few_joined_rows(maps: Sequence[Tensor], *arguments: Any) -> str | None:
    return _few_rows(maps[0])


_dispatch.register_triton("bn_matching", _matching_by_triton, limits=_few_rows)
_dispatch.register_triton("segment_statistics", _statistics_by_triton, limits=_few_rows)
_dispatch.register_triton("bn_act", _act_by_triton, tensors=2, limits=_few_rows)
_dispatch.register_triton("bn_act_matching", _act_matching_by_triton, tensors=2, limits=_few_rows)
_dispatch.register_triton("joined_bn_act_matching", _joined_by_triton, limits=_few_joined_rows)
