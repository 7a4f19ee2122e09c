"""BN statistics, matching and BN with addition and activation by the C++ kernels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fd2fast.ops import _dispatch
from fd2fast.ops._batch_norm import BatchNorm, operations
from fd2fast.ops._segments import Segments, on_host
from fd2fast.ops.cpu import native
from fd2fast.reference._offsets import Offsets


class _Statistics(torch.autograd.Function):
    """Mean and variance [2, S, C], keeping x and the means."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, segments: Segments) -> Tensor:
        both = native.statistics(x, segments)
        ctx.save_for_backward(x, both)
        ctx.segments = segments
        return both

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _dispatch.only_once()
        x, both = ctx.saved_tensors
        return native.statistics_backward(x, both, grad, ctx.segments), None


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
        y, bits, mean, var, loss = native.bn_act_forward(x, residual, constants, segments, activation)
        ctx.save_for_backward(x, bits, *constants, mean, var)
        return y, loss

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_loss: Tensor) -> Any:
        _dispatch.only_once()
        x, bits, *constants, mean, var = ctx.saved_tensors
        with_residual = ctx.residual_dtype is not None
        settings = constants, ctx.segments, ctx.activation, with_residual
        grad, residual = native.bn_act_backward(x, grad_y, bits, mean, var, grad_loss, *settings)
        if residual is not None:
            residual = residual.to(ctx.residual_dtype)
        return grad, residual, *(None,) * 6


class _Joined(torch.autograd.Function):
    """(activation(cat(maps) scale + shift), matching loss [S]), keeping the maps (which others keep too) and their statistics.

    The loss is part of it: by torch's operations each layer of DenseNet-121 has some twenty small ones, forward and backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        scale: Tensor,
        shift: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        segments: Segments,
        activation: str,
        *maps_and_statistics: Tensor,
    ) -> tuple[Tensor, Tensor]:
        constants = scale, shift, running_mean, running_var
        ctx.save_for_backward(*constants, *maps_and_statistics)
        ctx.settings = segments, activation
        half = len(maps_and_statistics) // 2
        maps, statistics = maps_and_statistics[:half], maps_and_statistics[half:]
        return native.join_forward(maps, statistics, constants, segments, activation)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_loss: Tensor) -> Any:
        _dispatch.only_once()
        constants, both = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        maps, statistics = both[: len(both) // 2], both[len(both) // 2 :]
        grads, grad_statistics = native.join_backward(maps, statistics, grad_y, grad_loss, constants, *ctx.settings)
        return *(None,) * 6, *grads, *grad_statistics


def _joined_by_cpu(
    maps: Sequence[Tensor], statistics: Sequence[Tensor], bn: BatchNorm, segments: Offsets, activation: str
) -> tuple[Tensor, Tensor]:
    y, loss = _Joined.apply(*bn.affine(maps[0]), on_host(segments), activation, *maps, *statistics)
    return y, loss


def _off_cpu(x: Tensor, *arguments: Any, **settings: Any) -> str | None:
    reason = native.why_not(x)
    if reason is None and any(isinstance(a, Tensor) and a.device.type != "cpu" for a in arguments):
        reason = "not all tensors are on the CPU"
    return reason


def _joined_off_cpu(maps: Sequence[Tensor], statistics: Sequence[Tensor], *arguments: Any) -> str | None:
    for x in maps:
        reason = native.why_not(x)
        if reason is not None:
            return reason
    if any(s.dtype != torch.float32 or not s.is_contiguous() for s in statistics):
        return "statistics are not contiguous float32"
    return None


for _name, _run in operations(_Statistics, _BnAct).items():
    # only the distance is torch's, and each layer of a step would pay for the guard
    _guarded = _dispatch.without_autocast(_run) if _name == "bn_matching" else _run
    _dispatch.register(_name, "cpu", _guarded, _off_cpu, native.missing)
_dispatch.register("joined_bn_act_matching", "cpu", _joined_by_cpu, _joined_off_cpu, native.missing)
