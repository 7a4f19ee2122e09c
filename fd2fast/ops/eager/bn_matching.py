"""BN statistics, matching and BN with addition and activation in torch's operations, keeping one tensor for the backward pass."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fd2fast.ops import _dispatch
from fd2fast.ops._batch_norm import BatchNorm, operations
from fd2fast.ops._layout import is_channels_last
from fd2fast.ops._segments import Segments, affine, distance, on_host, per_row, statistics
from fd2fast.ops.eager import why_not
from fd2fast.ops.eager.activation import activate, is_open, pack_bits, unpack_bits
from fd2fast.reference._offsets import Offsets


class _Statistics(torch.autograd.Function):
    """Mean and variance [2, S, C], keeping only x and the means: the gradient is a_c + b_c x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, segments: Segments) -> Tensor:
        mean, var = statistics(x, segments)
        ctx.save_for_backward(x, mean)
        ctx.segments = segments
        return torch.stack((mean, var))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, mean = ctx.saved_tensors
        slope, offset = affine(mean, grad[0], grad[1], ctx.segments, x.shape)
        grad_x = x.to(mean.dtype) * per_row(slope, ctx.segments) + per_row(offset, ctx.segments)
        return grad_x.to(x.dtype), None


class _BnAct(torch.autograd.Function):
    """(activation(x scale + shift + residual), matching loss [S]); keeps x, the statistics, bits if there is a residual."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        scale: Tensor,
        shift: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        segments: Segments,
        activation: str,
    ) -> tuple[Tensor, Tensor]:
        constants = scale, shift, running_mean, running_var
        ctx.segments, ctx.activation = segments, activation
        ctx.residual_dtype = None if residual is None else residual.dtype
        mean, var = statistics(x, segments)
        loss = distance(mean, var, running_mean, running_var, segments)
        y = torch.addcmul(shift[:, None, None], x.to(scale.dtype), scale[:, None, None])
        bits = None
        if residual is not None:
            y = y + residual.to(scale.dtype)
            if activation != "identity":
                mask = is_open(y, activation)
                bits = pack_bits(mask)
                ctx.layout = tuple(mask.shape), is_channels_last(mask)
        ctx.save_for_backward(x, bits, *constants, mean, var)
        y = activate(y, activation)
        # compiled by torch 2.11, an output that `to` hands on as it is would lose its gradient
        return y if y.dtype == x.dtype else y.to(x.dtype), loss

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_loss: Tensor) -> Any:
        x, bits, *constants, mean, var = ctx.saved_tensors
        scale, shift, running_mean, running_var = constants
        wide = x.to(scale.dtype)
        opened = grad_y.to(scale.dtype)
        if bits is not None:
            opened = torch.where(unpack_bits(bits, *ctx.layout), opened, 0.0)
        elif ctx.activation != "identity":
            before = torch.addcmul(shift[:, None, None], wide, scale[:, None, None])
            opened = torch.where(is_open(before, ctx.activation), opened, 0.0)
        grad_mean = _unit(mean - running_mean) * grad_loss[:, None]
        grad_var = _unit(var - running_var) * grad_loss[:, None]
        slope, offset = affine(mean, grad_mean, grad_var, ctx.segments, x.shape)
        grad = opened * scale[:, None, None] + (wide * per_row(slope, ctx.segments) + per_row(offset, ctx.segments))
        residual = None if ctx.residual_dtype is None else opened.to(ctx.residual_dtype)
        return grad.to(x.dtype), residual, *(None,) * 6


def _unit(v: Tensor) -> Tensor:
    """Rows [S, C] divided by their norm; 0 where the norm is 0."""
    norm = torch.linalg.vector_norm(v, dim=1, keepdim=True)
    return torch.where(norm > 0, v / norm, 0.0)


class _JoinedBnAct(torch.autograd.Function):
    """activation(cat(maps) scale + shift), keeping the maps only (which others keep too), not their concatenation."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, shift: Tensor, activation: str, *maps: Tensor) -> Tensor:
        ctx.save_for_backward(scale, shift, *maps)
        ctx.activation = activation
        parts = []
        for x, a, b in _with_channels(maps, scale, shift):
            parts.append(activate(torch.addcmul(b, x.to(a.dtype), a), activation).to(x.dtype))
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        scale, shift, *maps = ctx.saved_tensors
        grads, first = [], 0
        for x, a, b in _with_channels(maps, scale, shift):
            part = grad[:, first : first + x.shape[1]].to(a.dtype)
            first += x.shape[1]
            if ctx.activation != "identity":
                part = torch.where(is_open(torch.addcmul(b, x.to(a.dtype), a), ctx.activation), part, 0.0)
            grads.append((part * a).to(x.dtype))
        return None, None, None, *grads


def _with_channels(maps: Sequence[Tensor], scale: Tensor, shift: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each map with its part of scale and shift [c, 1, 1]."""
    sizes = [x.shape[1] for x in maps]
    parts = zip(maps, scale.split(sizes), shift.split(sizes), strict=True)
    return [(x, a[:, None, None], b[:, None, None]) for x, a, b in parts]


def _joined_by_torch(
    maps: Sequence[Tensor], statistics: Sequence[Tensor], bn: BatchNorm, segments: Offsets, activation: str
) -> tuple[Tensor, Tensor]:
    scale, shift, running_mean, running_var = bn.affine(maps[0])
    mean, var = torch.cat(list(statistics), dim=2).unbind()
    y: Tensor = _JoinedBnAct.apply(scale, shift, activation, *maps)
    return y, distance(mean, var, running_mean, running_var, on_host(segments))


for _name, _run in (operations(_Statistics, _BnAct) | {"joined_bn_act_matching": _joined_by_torch}).items():
    _dispatch.register(_name, "eager", _dispatch.without_autocast(_run), why_not)
