"""Layers of a frozen network with backward passes of their own, so that each keeps only what its input gradient needs.

Autograd keeps a convolution's input even where the weight asks for no gradient, and torch.compile does the same; a ReLU keeps
its result, an average pooling its input. Here a convolution keeps its weight, a BN with addition and activation its input
(and one bit per element where a ReLU follows an addition), a max pooling one byte per output. Rows of a batch belong to
segments given by host row offsets (ints from 0 to N).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fd2fast.models import cpu
from fd2fast.models.convolution import (
    Choices,
    Convolution,
    input_gradient_by_phases,
    phase_weight,
    plain_input_gradient,
)
from fd2fast.ops import (
    _dispatch,
    bilinear_attention_pool,
    bn_act,
    bn_act_matching,
    max_pool,
    segment_statistics,
)
from fd2fast.ops.max_pool import pooled_size

Segments = tuple[int, ...]

ACTIVATIONS = ("identity", "relu", "relu6")


def accumulation(dtype: torch.dtype) -> torch.dtype:
    """Sums, norms and the arithmetic inside an operation: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _common_length(segments: Segments) -> int | None:
    length = segments[1] - segments[0]
    equal = length > 0 and all(b - a == length for a, b in zip(segments[1:], segments[2:], strict=False))
    return length if equal else None


def _make_owner(segments: Segments, device: torch.device) -> Tensor:
    rows = [s for s, (a, b) in enumerate(zip(segments, segments[1:], strict=False)) for _ in range(a, b)]
    return torch.tensor(rows, dtype=torch.int64).to(device)


def _make_lengths(segments: Segments, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor([float(b - a) for a, b in zip(segments, segments[1:], strict=False)], dtype=dtype).to(device)


# kept, because each copy to a device waits for it, and a captured graph may not make one
_kept_owner = lru_cache(maxsize=1024)(_make_owner)
_kept_lengths = lru_cache(maxsize=1024)(_make_lengths)


def _owner(segments: Segments, device: torch.device) -> Tensor:
    """int64 [N], the segment of each row; copied to a device once."""
    return (_make_owner if torch.compiler.is_compiling() else _kept_owner)(segments, device)


def _lengths(segments: Segments, like: Tensor) -> Tensor:
    """[S], the rows of each segment in the type of `like`; copied to its device once."""
    make = _make_lengths if torch.compiler.is_compiling() else _kept_lengths
    return make(segments, like.dtype, like.device)


def per_row(values: Tensor, segments: Segments) -> Tensor:
    """[S, C] -> [N, C, 1, 1]: each row its segment's values."""
    length = _common_length(segments)
    if length is None:
        rows = values.index_select(0, _owner(segments, values.device))
    else:
        rows = values.unsqueeze(1).expand(-1, length, -1).flatten(0, 1)
    return rows[:, :, None, None]


def pixels(segments: Segments, shape: Sequence[int], like: Tensor) -> Tensor | float:
    """Values that a channel's statistics are taken over: a number, or [S, 1] where segments differ (at least 1)."""
    length, area = _common_length(segments), shape[2] * shape[3]
    if length is not None:
        return float(length * area)
    return _lengths(segments, like).clamp_min(1)[:, None] * area


def statistics(x: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [S, C] of the rows and pixels of each segment of x [N, C, H, W]; 0 for an empty one."""
    x = x.to(accumulation(x.dtype))
    length = _common_length(segments)
    if length is not None:
        var, mean = torch.var_mean(x.unflatten(0, (-1, length)), dim=(1, 3, 4), correction=0)
        return mean, var
    owner = _owner(segments, x.device)
    count = pixels(segments, x.shape, x)
    zero = x.new_zeros(len(segments) - 1, x.shape[1])
    mean = zero.index_add(0, owner, x.sum(dim=(2, 3))) / count
    centred = x - mean.index_select(0, owner)[:, :, None, None]
    return mean, zero.index_add(0, owner, centred.square().sum(dim=(2, 3))) / count


def distance(mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor, segments: Segments) -> Tensor:
    """|var_s - running_var| + |mean_s - running_mean| [S]; 0 for an empty segment. Differentiable in mean and var."""
    norm = torch.linalg.vector_norm
    loss = norm(var - running_var, dim=1) + norm(mean - running_mean, dim=1)
    filled = all(b > a for a, b in zip(segments, segments[1:], strict=False))
    return loss if filled else loss * (_lengths(segments, loss) > 0)


class _Statistics(torch.autograd.Function):
    """`statistics`, keeping only x and the means: the gradient is a_c + b_c x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
        mean, var = cpu.statistics(x, segments) if cpu.takes(x) else statistics(x, segments)
        ctx.save_for_backward(x, mean)
        ctx.segments = segments
        return mean, var

    @staticmethod
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> Any:
        x, mean = ctx.saved_tensors
        slope, offset = _affine(mean, grad_mean, grad_var, ctx.segments, x.shape)
        if cpu.takes(x):
            return cpu.affine(x, slope, offset, ctx.segments), None
        grad = x.to(mean.dtype) * per_row(slope, ctx.segments) + per_row(offset, ctx.segments)
        return grad.to(x.dtype), None


def _affine(
    mean: Tensor, grad_mean: Tensor, grad_var: Tensor, segments: Segments, shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Slope and offset [S, C] of dL/dx = slope x + offset, from the gradients of mean and variance."""
    count = pixels(segments, shape, mean)
    slope = 2 * grad_var / count
    return slope, grad_mean / count - slope * mean


def map_statistics(x: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """`statistics` with gradient, for maps whose channels several BN layers see: taken once, compared often."""
    if _dispatch.choose("segment_statistics", (x,), "auto") == "triton":
        return segment_statistics(x, segments)
    return _Statistics.apply(x, segments)


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation by name; ValueError for another."""
    if activation == "relu":
        return F.relu(x)
    if activation == "relu6":
        return F.relu6(x)
    if activation == "identity":
        return x
    raise ValueError(f'activation must be "relu", "relu6" or "identity", got {activation!r}')


def _is_open(x: Tensor, activation: str) -> Tensor:
    """Where the activation's slope at x is 1 (it is 0 elsewhere; 0 at the kinks, as autograd has it)."""
    return (x > 0) & (x < 6) if activation == "relu6" else x > 0


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


# one bit per byte <-> eight bits in one byte, on little-endian words of eight bytes
_GATHER = 0x0102040810204080
_SPREAD = 0x0101010101010101
_SELECT = 0x8040201008040201 - (1 << 64)


def pack_bits(mask: Tensor) -> Tensor:
    """Bool mask -> uint8 [ceil(numel / 8)], one bit per element, in the order of its memory."""
    flat = (mask.permute(0, 2, 3, 1) if _is_channels_last(mask) else mask).reshape(-1)
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
        mask = _is_open(x, activation)
        ctx.save_for_backward(pack_bits(mask))
        ctx.layout = tuple(mask.shape), _is_channels_last(mask)
        return activate(x, activation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (packed,) = ctx.saved_tensors
        return grad * unpack_bits(packed, *ctx.layout), None


def masked_activation(x: Tensor, activation: str) -> Tensor:
    """ReLU or ReLU6 whose backward keeps one bit per element."""
    return _MaskedActivation.apply(x, activation)


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
        ctx.native = cpu.takes(x)
        if ctx.native:
            y, bits, mean, var, loss = cpu.bn_act_forward(x, residual, constants, segments, activation)
            ctx.save_for_backward(x, bits, *constants, mean, var)
            return y, loss
        mean, var = statistics(x, segments)
        loss = distance(mean, var, running_mean, running_var, segments)
        y = torch.addcmul(shift[:, None, None], x.to(scale.dtype), scale[:, None, None])
        bits = None
        if residual is not None:
            y = y + residual.to(scale.dtype)
            if activation != "identity":
                mask = _is_open(y, activation)
                bits = pack_bits(mask)
                ctx.layout = tuple(mask.shape), _is_channels_last(mask)
        ctx.save_for_backward(x, bits, *constants, mean, var)
        y = activate(y, activation)
        # compiled by torch 2.11, an output that `to` hands on as it is would lose its gradient
        return y if y.dtype == x.dtype else y.to(x.dtype), loss

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_loss: Tensor) -> Any:
        x, bits, *constants, mean, var = ctx.saved_tensors
        if ctx.native:
            with_residual = ctx.residual_dtype is not None
            settings = constants, ctx.segments, ctx.activation, with_residual
            grad, residual = cpu.bn_act_backward(x, grad_y, bits, mean, var, grad_loss, *settings)
            if residual is not None:
                residual = residual.to(ctx.residual_dtype)
            return grad, residual, *(None,) * 6
        scale, shift, running_mean, running_var = constants
        wide = x.to(scale.dtype)
        opened = grad_y.to(scale.dtype)
        if bits is not None:
            opened = torch.where(unpack_bits(bits, *ctx.layout), opened, 0.0)
        elif ctx.activation != "identity":
            before = torch.addcmul(shift[:, None, None], wide, scale[:, None, None])
            opened = torch.where(_is_open(before, ctx.activation), opened, 0.0)
        grad_mean = _unit(mean - running_mean) * grad_loss[:, None]
        grad_var = _unit(var - running_var) * grad_loss[:, None]
        slope, offset = _affine(mean, grad_mean, grad_var, ctx.segments, x.shape)
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
        if all(cpu.takes(x) for x in maps):
            return cpu.join_forward(maps, (scale, shift, scale, shift), activation)
        parts = []
        for x, a, b in _with_channels(maps, scale, shift):
            parts.append(activate(torch.addcmul(b, x.to(a.dtype), a), activation).to(x.dtype))
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        scale, shift, *maps = ctx.saved_tensors
        if all(cpu.takes(x) for x in maps):
            return None, None, None, *cpu.join_backward(maps, grad, (scale, shift, scale, shift), ctx.activation)
        grads, first = [], 0
        for x, a, b in _with_channels(maps, scale, shift):
            part = grad[:, first : first + x.shape[1]].to(a.dtype)
            first += x.shape[1]
            if ctx.activation != "identity":
                part = torch.where(_is_open(torch.addcmul(b, x.to(a.dtype), a), ctx.activation), part, 0.0)
            grads.append((part * a).to(x.dtype))
        return None, None, None, *grads


class _JoinedByKernel(torch.autograd.Function):
    """_JoinedBnAct by the kernels of ops.bn_act: the concatenation is made twice and never kept."""

    @staticmethod
    def forward(ctx: Any, constants: tuple[Tensor, ...], activation: str, eps: float, *maps: Tensor) -> Tensor:
        ctx.save_for_backward(*constants, *maps)
        ctx.settings = activation, eps
        return bn_act(torch.cat(maps, dim=1), *constants, activation=activation, eps=eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        constants, maps = ctx.saved_tensors[:4], ctx.saved_tensors[4:]
        x = torch.cat(maps, dim=1)
        found, _ = torch.ops.fd2fast.bn_act_backward(
            grad, None, x, *constants, _all_rows(len(x), x.device), *(x.new_empty(0),) * 4, *ctx.settings, None
        )
        return None, None, None, *found.split([m.shape[1] for m in maps], dim=1)


@lru_cache(maxsize=1024)
def _all_rows(rows: int, device: torch.device) -> Tensor:
    """Offsets of one segment; kept, because a captured graph may not copy from the host."""
    return torch.tensor([0, rows]).to(device)


def _with_channels(maps: Sequence[Tensor], scale: Tensor, shift: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each map with its part of scale and shift [c, 1, 1]."""
    sizes = [x.shape[1] for x in maps]
    parts = zip(maps, scale.split(sizes), shift.split(sizes), strict=True)
    return [(x, a[:, None, None], b[:, None, None]) for x, a, b in parts]


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
        wide = accumulation(dtype)
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
        if _dispatch.choose("bn_act_matching", (x,), "auto") == "triton":
            return bn_act_matching(
                x,
                self.weight,
                self.bias,
                self.running_mean,
                self.running_var,
                segments,
                residual=residual,
                activation=self.activation,
                eps=self.eps,
            )
        return _BnAct.apply(
            x, residual, self.scale, self.shift, self.running_mean, self.running_var, segments, self.activation
        )


class FrozenJoin(FrozenBatchNorm):
    """A BatchNorm2d and activation over the concatenation of maps whose statistics are known (DenseNet)."""

    def forward(  # type: ignore[override]
        self, maps: Sequence[Tensor], statistics: Sequence[tuple[Tensor, Tensor]], segments: Segments
    ) -> tuple[Tensor, Tensor]:
        """[N, c_i, H, W] each with its (mean, var) [S, c_i] -> (y [N, sum c_i, H, W], loss [S])."""
        mean = torch.cat([m for m, _ in statistics], dim=1)
        var = torch.cat([v for _, v in statistics], dim=1)
        loss = distance(mean, var, self.running_mean, self.running_var, segments)
        if _dispatch.choose("bn_act", (maps[0],), "auto") == "triton":
            constants = self.weight, self.bias, self.running_mean, self.running_var
            return _JoinedByKernel.apply(constants, self.activation, self.eps, *maps), loss
        return _JoinedBnAct.apply(self.scale, self.shift, self.activation, *maps), loss


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
        ctx.on_cpu = on_cpu if on_cpu is not None and cpu.takes(x) else None
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


class _MaxPool(torch.autograd.Function):
    """Max pooling that keeps, for each output, the place of the maximum within its window (one byte)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool) -> Tensor:
        ctx.native = cpu.takes(x)
        if ctx.native:
            window = kernel, stride, padding, dilation
            ctx.settings, ctx.shape = (*window, ceil), tuple(x.shape)
            y, places = cpu.max_pool_forward(x, window, pooled_size(x.shape[2:], *window, ceil))
            ctx.save_for_backward(places)
            return y
        y, indices = torch.ops.aten.max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil)
        ctx.settings = kernel, stride, padding, dilation, ceil
        ctx.shape, ctx.dense = tuple(x.shape), _is_channels_last(x)
        width = x.shape[-1]
        down, right = _window_starts(y, stride, padding)
        row = torch.div(indices // width - down, dilation[0], rounding_mode="floor")
        column = torch.div(indices % width - right, dilation[1], rounding_mode="floor")
        ctx.save_for_backward((row * kernel[1] + column).to(torch.uint8))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (places,) = ctx.saved_tensors
        kernel, stride, padding, dilation, ceil = ctx.settings
        if ctx.native:
            window = kernel, stride, padding, dilation
            return cpu.max_pool_backward(grad, places, window, ctx.shape), *(None,) * 5
        down, right = _window_starts(places, stride, padding)
        places = places.to(torch.int64)
        row = down + torch.div(places, kernel[1], rounding_mode="floor") * dilation[0]
        column = right + places % kernel[1] * dilation[1]
        order = torch.channels_last if ctx.dense else torch.contiguous_format
        shape_only = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=order)
        found = torch.ops.aten.max_pool2d_with_indices_backward(
            grad, shape_only, kernel, stride, padding, dilation, ceil, row * ctx.shape[-1] + column
        )
        return found, *(None,) * 5


def _window_starts(y: Tensor, stride: Sequence[int], padding: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Input row [h, 1] and column [w] of each output's first window pixel (negative in the padding)."""
    down = torch.arange(y.shape[-2], device=y.device) * stride[0] - padding[0]
    right = torch.arange(y.shape[-1], device=y.device) * stride[1] - padding[1]
    return down[:, None], right


class _AvgPool(torch.autograd.Function):
    """Average pooling that keeps only shapes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *settings: Any) -> Tensor:
        ctx.settings, ctx.shape, ctx.dense = settings, tuple(x.shape), _is_channels_last(x)
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
        if _dispatch.choose("max_pool", (x,), "auto") == "triton":
            return max_pool(x, self.kernel, self.stride, self.padding, self.dilation, self.ceil)
        return _MaxPool.apply(x, self.kernel, self.stride, self.padding, self.dilation, self.ceil)


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


class _Pool(torch.autograd.Function):
    """Bilinear attention pooling that keeps its inputs and the matrix G; fd2fast.reference has the equations."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, attention: Tensor, eps: float) -> Tensor:
        wide = accumulation(features.dtype)
        f, a = features.to(wide).flatten(2), attention.to(wide).flatten(2)
        gram = torch.bmm(a, f.transpose(1, 2)) / f.shape[2]  # [N, M, C]
        ctx.save_for_backward(features, attention, gram)
        ctx.eps = eps
        return _unit_root(gram, eps)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        features, attention, gram = ctx.saved_tensors
        z, norm = _unit_root(gram, ctx.eps)
        grad = (grad - z * (z * grad).sum(dim=1, keepdim=True)) / norm
        slope = torch.where(gram == 0, 0.0, 0.5 * torch.rsqrt(gram.abs() + ctx.eps))
        grad = grad.view_as(gram) * slope / (features.shape[2] * features.shape[3])
        f, a = features.to(grad.dtype).flatten(2), attention.to(grad.dtype).flatten(2)
        grad_f = torch.bmm(grad.transpose(1, 2), a).view_as(features).to(features.dtype)
        grad_a = torch.bmm(grad, f).view_as(attention).to(attention.dtype)
        return grad_f, grad_a, None


def _unit_root(gram: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    root = (torch.sign(gram) * torch.sqrt(gram.abs() + eps)).flatten(1)
    # never below its bound: a sample whose G is 0 everywhere has z = 0 and no gradient
    norm = torch.linalg.vector_norm(root, dim=1, keepdim=True).clamp_min(1e-12)
    return root / norm, norm


def attention_pool(features: Tensor, attention: Tensor, *, eps: float) -> Tensor:
    """ops.bilinear_attention_pool; without its kernel, a form that keeps the maps in their own type."""
    if _dispatch.choose("bilinear_attention_pool", (features, attention), "auto") == "triton":
        return bilinear_attention_pool(features, attention, eps=eps)
    return _Pool.apply(features, attention, eps)
