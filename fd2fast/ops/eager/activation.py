"""activation in torch's operations, keeping one bit for each element; its masks, for others too."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fd2fast.ops import _dispatch
from fd2fast.ops._layout import is_channels_last
from fd2fast.ops.eager import why_not
from fd2fast.reference.activation import activation as activate


def is_open(x: Tensor, activation: str) -> Tensor:
    """Where the activation's slope at x is 1 (it is 0 elsewhere; 0 at the kinks, as autograd has it)."""
    return (x > 0) & (x < 6) if activation == "relu6" else x > 0


# one bit per byte <-> eight bits in one byte, on little-endian words of eight bytes
_GATHER = 0x0102040810204080
_SPREAD = 0x0101010101010101
_SELECT = 0x8040201008040201 - (1 << 64)


def pack_bits(mask: Tensor) -> Tensor:
    """Bool mask -> uint8 [ceil(numel / 8)], one bit per element, in the order of its memory."""
    flat = (mask.permute(0, 2, 3, 1) if is_channels_last(mask) else mask).reshape(-1)
    if flat.numel() % 8:
        flat = F.pad(flat, (0, -flat.numel() % 8))
    return ((flat.view(torch.int64) * _GATHER) >> 56).to(torch.uint8)


def unpack_bits(packed: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    """The bool mask [shape] that `pack_bits` was given; channels_last tells the order of its memory."""
    words = (packed.to(torch.int64) * _SPREAD) & _SELECT
    flat = words.view(torch.uint8) != 0
    flat = flat[: torch.Size(shape).numel()]
    if channels_last:
        n, c, h, w = shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)
    return flat.view(shape)


class _MaskedActivation(torch.autograd.Function):
    """ReLU or ReLU6 that keeps one bit per element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str) -> Tensor:
        mask = is_open(x, activation)
        ctx.save_for_backward(pack_bits(mask))
        ctx.layout = tuple(mask.shape), is_channels_last(mask)
        return activate(x, activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (packed,) = ctx.saved_tensors
        return grad * unpack_bits(packed, *ctx.layout), None


def _by_torch(x: Tensor, name: str) -> Tensor:
    if name == "identity":
        return x
    y: Tensor = _MaskedActivation.apply(x, name)
    return y


_dispatch.register("activation", "eager", _by_torch, why_not)
