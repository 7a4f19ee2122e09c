"""Layers of a frozen network that keep only what their input's gradient needs; they leave it to the operations how.

Autograd keeps a convolution's input even where the weight asks for no gradient, and torch.compile does the same; an average
pooling keeps its input. Here a convolution keeps its weight, an average pooling nothing. Rows of a batch belong to segments
given by host row offsets (ints from 0 to N).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fd2fast.models.convolution import (
    Choices,
    Convolution,
    input_gradient_by_phases,
    phase_weight,
    plain_input_gradient,
)
from fd2fast.ops import _dispatch
from fd2fast.ops._batch_norm import BatchNorm
from fd2fast.ops._layout import is_channels_last
from fd2fast.ops.cpu import native
from fd2fast.reference._offsets import accumulation_dtype

Segments = tuple[int, ...]


class FrozenBatchNorm(nn.Module):
    """A BatchNorm2d in eval mode with the addition and the activation that follow it, and its matching loss.

    Statistics, scale and shift are held in fp32 (fp64 for fp64) whatever the type of the maps.
    """

    scale: Tensor
    shift: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, layer: nn.BatchNorm2d, activation: str, index: int, dtype: torch.dtype):
        """index: place of the layer in the order of the teacher's BN layers."""
        super().__init__()
        self.activation, self.index, self.eps = activation, index, layer.eps
        wide = accumulation_dtype(dtype)
        mean, var = layer.running_mean, layer.running_var
        assert mean is not None
        assert var is not None
        mean, var = mean.detach().to(wide), var.detach().to(wide)
        weight = torch.ones_like(mean) if layer.weight is None else layer.weight.detach().to(wide)
        bias = torch.zeros_like(mean) if layer.bias is None else layer.bias.detach().to(wide)
        scale = weight * torch.rsqrt(var + layer.eps)
        held = {"weight": weight, "bias": bias, "running_mean": mean, "running_var": var}
        for name, value in {**held, "scale": scale, "shift": bias - mean * scale}.items():
            self.register_buffer(name, value, persistent=False)

    def extra_repr(self) -> str:
        return f"{self.scale.numel()}, activation={self.activation}, index={self.index}"

    def forward(self, x: Tensor, segments: Segments, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[N, C, H, W] -> (y [N, C, H, W], loss [S])."""
        y, loss = _dispatch.run("bn_act_matching", "auto", x, residual, self._batch_norm(), segments, self.activation)
        return y, loss

    def _batch_norm(self) -> BatchNorm:
        constants = self.weight, self.bias, self.running_mean, self.running_var
        return BatchNorm(*constants, self.eps, self.scale, self.shift)


class FrozenJoin(FrozenBatchNorm):
    """A BatchNorm2d and activation over the concatenation of maps whose statistics are known (DenseNet)."""

    def forward(  # type: ignore[override]
        self, maps: Sequence[Tensor], statistics: Sequence[Tensor], segments: Segments
    ) -> tuple[Tensor, Tensor]:
        """[N, c_i, H, W] each with its mean and variance [2, S, c_i] -> (y [N, sum c_i, H, W], loss [S])."""
        given = tuple(maps), statistics, self._batch_norm(), segments, self.activation
        y, loss = _dispatch.run("joined_bn_act_matching", "auto", *given)
        return y, loss


def map_statistics(x: Tensor, segments: Segments) -> Tensor:
    """Mean and variance [2, S, C], for maps whose channels several BN layers see: taken once, compared often."""
    both: Tensor = _dispatch.run("segment_statistics", "auto", x, segments)
    return both


class _Conv(torch.autograd.Function):
    """Convolution whose backward gives the input's gradient and keeps the weight only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        groups: int,
        phases: Tensor | None,
        taps: Tensor | None,
        on_cpu: Convolution | None,
    ) -> Tensor:
        ctx.save_for_backward(weight, phases, taps)
        ctx.settings, ctx.shape = (stride, padding, dilation, groups), tuple(x.shape)
        ctx.on_cpu = on_cpu if on_cpu is not None and native.takes(x) else None
        if ctx.on_cpu is not None:
            return ctx.on_cpu.forward(x, weight, bias)
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        weight, phases, taps = ctx.saved_tensors
        if ctx.on_cpu is not None:
            return ctx.on_cpu.input_gradient(grad, weight, ctx.shape, phases, taps), *(None,) * 9
        if phases is not None:
            stride, padding, *_ = ctx.settings
            return input_gradient_by_phases(grad, phases, stride, padding, ctx.shape), *(None,) * 9
        return plain_input_gradient(grad, weight, ctx.shape, *ctx.settings), *(None,) * 9


class FrozenConv(nn.Module):
    """A Conv2d without gradient for its weight; with `same`, padded at run time as TensorFlow does (timm's Conv2dSame)."""

    weight: Tensor
    bias: Tensor | None
    phases: Tensor | None
    taps: Tensor | None

    def __init__(self, layer: nn.Conv2d, dtype: torch.dtype, *, same: bool = False):
        super().__init__()
        if isinstance(layer.padding, str):
            same_sides = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
            if layer.padding == "same" and any(total % 2 for total in same_sides):
                raise ValueError(f"padding of {layer} is not symmetric")
            self.padding = (0, 0) if layer.padding == "valid" else (same_sides[0] // 2, same_sides[1] // 2)
        else:
            self.padding = (0, 0) if same else _pair(layer.padding)
        self.stride, self.dilation, self.groups = _pair(layer.stride), _pair(layer.dilation), layer.groups
        self.same = same
        self.register_buffer("weight", _channels_last(layer.weight.detach().to(dtype)), persistent=False)
        bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        self.register_buffer("bias", bias, persistent=False)
        by_phases = (
            layer.in_channels <= 4
            and layer.groups == 1
            and layer.stride[0] == layer.stride[1] > 1
            and tuple(layer.dilation) == (1, 1)
            and dtype != torch.float64
        )
        phases = phase_weight(self.weight, self.stride) if by_phases else None
        self.register_buffer("phases", phases, persistent=False)
        depthwise = layer.groups == layer.in_channels == layer.out_channels
        by_taps = depthwise and max(self.stride) > 1 and self.weight[0].numel() <= 256
        taps = self.weight.float().flatten(1).t().contiguous() if by_taps else None
        self.register_buffer("taps", taps, persistent=False)
        self._on_cpu = Convolution(self.stride, self.padding, self.dilation, self.groups)

    @property
    def packed_bytes(self) -> int:
        """Bytes held beside the buffers; 0 before the first use and where the weight is used as it is."""
        return self._on_cpu.nbytes

    def forget_packed(self) -> None:
        """Let go of them; those that are needed are made again."""
        self._on_cpu.forget()

    def choose_by(self, choices: Choices) -> None:
        """Take the algorithms on a CPU from these choices, which several layers may share."""
        self._on_cpu.choices = choices

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, stride={self.stride}, padding={'same' if self.same else self.padding}"

    def forward(self, x: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, C_out, H', W']."""
        if self.same:
            x = pad_same(x, self.weight.shape[-2:], self.stride, self.dilation, 0.0)
        # a gradient by phases pays off for float types other than float64, on every device measured so far
        settings = self.stride, self.padding, self.dilation, self.groups
        on_cpu = None if torch.compiler.is_compiling() else self._on_cpu
        return _Conv.apply(x, self.weight, self.bias, *settings, self.phases, self.taps, on_cpu)


def _channels_last(weight: Tensor) -> Tensor:
    """A copy in channels_last, also by its strides where one dimension is 1 and torch would call any order contiguous."""
    o, i, h, w = weight.shape
    kept = torch.empty_strided((o, i, h, w), (h * w * i, 1, w * i, i), dtype=weight.dtype, device=weight.device)
    return kept.copy_(weight)


def pad_same(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], value: float) -> Tensor:
    """x padded so that a window of `kernel` gives ceil(side / stride) outputs; the odd pixel at the right and bottom."""
    sides = []
    for side, k, s, d in zip(x.shape[-2:], kernel, stride, dilation, strict=True):
        total = max((-(-side // s) - 1) * s + (k - 1) * d + 1 - side, 0)
        sides.append((total // 2, total - total // 2))
    (top, bottom), (left, right) = sides
    return F.pad(x, (left, right, top, bottom), value=value) if any((top, bottom, left, right)) else x


class _AvgPool(torch.autograd.Function):
    """Average pooling that keeps only shapes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *settings: Any) -> Tensor:
        ctx.settings, ctx.shape, ctx.dense = settings, tuple(x.shape), is_channels_last(x)
        return torch.ops.aten.avg_pool2d(x, *settings)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        order = torch.channels_last if ctx.dense else torch.contiguous_format
        shape_only = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=order)
        return torch.ops.aten.avg_pool2d_backward(grad, shape_only, *ctx.settings), *(None,) * len(ctx.settings)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    first, second = value if len(value) == 2 else (value[0], value[0])
    return first, second


class FrozenMaxPool(nn.Module):
    """nn.MaxPool2d that keeps one byte per output; kernels of up to 256 pixels."""

    def __init__(self, layer: nn.MaxPool2d, *, same: bool = False):
        super().__init__()
        self.kernel, self.stride, self.dilation = _pair(layer.kernel_size), _pair(layer.stride), _pair(layer.dilation)
        self.padding = (0, 0) if same else _pair(layer.padding)
        self.ceil, self.same = layer.ceil_mode, same
        if self.kernel[0] * self.kernel[1] > 256:
            raise ValueError(f"a pooling window of {self.kernel} has more than 256 pixels")

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H', W']."""
        if self.same:
            x = pad_same(x, self.kernel, self.stride, self.dilation, float("-inf"))
        window = self.kernel, self.stride, self.padding, self.dilation
        y: Tensor = _dispatch.run("max_pool", "auto", x, *window, self.ceil)
        return y


class FrozenAvgPool(nn.Module):
    """nn.AvgPool2d that keeps nothing."""

    def __init__(self, layer: nn.AvgPool2d):
        super().__init__()
        self.settings = (
            _pair(layer.kernel_size),
            _pair(layer.stride),
            _pair(layer.padding),
            layer.ceil_mode,
            layer.count_include_pad,
            layer.divisor_override,
        )

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H', W']."""
        return _AvgPool.apply(x, *self.settings)
