"""Typed face of the C++ extension _frozen: tensors in, tensors out, no autograd, no checks."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from fd2fast.ops.cpu.extension import load
from fd2fast.reference.activation import ACTIVATIONS

_native, WHY_NOT = load("_frozen")

# by the number that the extension has for each
_ACTIVATIONS = {name: number for number, name in enumerate(ACTIVATIONS)}
_TYPES = (torch.float32, torch.bfloat16)


# glibc's mallopt: M_TRIM_THRESHOLD, M_MMAP_MAX, M_TOP_PAD
_KEEP = ((-1, 2**31 - 1), (-4, 0), (-2, 1 << 28))


@cache
def keep_memory() -> bool:
    """Ask the C library to keep what the process frees, up to 2 GiB; whether it will. Settings from outside are left alone.

    Maps of many megabytes come and go with every layer. Pages that go back to the system are cleared when they return, which
    can cost more than the work on them: measured on a virtual machine with an EPYC, one thread, ResNet-18 at 224 x 224 in bf16,
    a clone of a 16 MB map 1 ms or 40 ms; iterations of 40 images 1.69 s (60 thousand page faults) before, 1.55 s after.
    """
    if os.environ.get("GLIBC_TUNABLES") or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return False
    return all(mallopt(option, value) == 1 for option, value in _KEEP)


def missing() -> str | None:
    """Why the kernels cannot run in this process, or None."""
    return WHY_NOT


def takes(x: Tensor) -> bool:
    """Whether the kernels can work on maps such as x [N, C, H, W]: CPU, fp32 or bf16, dense channels_last, a plain tensor."""
    return _native is not None and why_not(x) is None


def why_not(x: Tensor) -> str | None:
    """Why the kernels, where they are built, cannot work on maps such as x, or None."""
    if torch.compiler.is_compiling():
        return "torch.compile does not trace C++ kernels"
    if type(x) is not Tensor:
        return f"a map is a {type(x).__name__}, not a plain tensor"
    if x.device.type != "cpu":
        return f"the maps are on {x.device.type}"
    if x.dtype not in _TYPES:
        return f"the maps are in {x.dtype}"
    if x.ndim != 4 or x.numel() == 0:
        return f"a map is {list(x.shape)}"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return f"a map has strides {list(x.stride())}, not channels_last"
    return None


def _like(tensor: Tensor, x: Tensor) -> Tensor:
    """A tensor in the type and memory order of x."""
    return tensor.to(x.dtype).contiguous(memory_format=torch.channels_last)


def _map(x: Tensor, segments: Sequence[int]) -> Any:
    area = x.shape[2] * x.shape[3]
    return _described(x.dtype == torch.bfloat16, tuple(segments), area, x.shape[1], torch.get_num_threads())


@lru_cache(maxsize=1024)
def _described(bf16: bool, segments: tuple[int, ...], area: int, channels: int, threads: int) -> Any:
    assert _native is not None
    return _native.Map(bf16, segments, area, channels, threads)


def _pointers(constants: Sequence[Tensor]) -> list[int]:
    return [t.data_ptr() for t in constants]


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def bn_act_forward(
    x: Tensor, residual: Tensor | None, constants: Sequence[Tensor], segments: Sequence[int], activation: str
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """y, bits (with residual and activation; else None), mean and variance [S, C], loss [S].

    constants: scale, shift, running_mean, running_var, float32 [C] each, contiguous.
    """
    assert _native is not None
    n, c, h, w = x.shape
    mean, var = torch.empty(2, len(segments) - 1, c).unbind()
    loss = torch.empty(len(segments) - 1)
    y, bits = _empty_like(x), None
    if residual is not None:
        residual = _like(residual, x)
        if activation != "identity":
            bits = torch.empty(n * h * w, (c + 7) // 8, dtype=torch.uint8)
    _native.bn_act_forward(
        _map(x, segments),
        _pointers(constants),
        _ACTIVATIONS[activation],
        x.data_ptr(),
        0 if residual is None else residual.data_ptr(),
        y.data_ptr(),
        0 if bits is None else bits.data_ptr(),
        mean.data_ptr(),
        var.data_ptr(),
        loss.data_ptr(),
    )
    return y, bits, mean, var, loss


def bn_act_backward(
    x: Tensor,
    grad: Tensor,
    bits: Tensor | None,
    mean: Tensor,
    var: Tensor,
    grad_loss: Tensor,
    constants: Sequence[Tensor],
    segments: Sequence[int],
    activation: str,
    with_residual: bool,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and of the residual (None without one) from those of y and of the loss."""
    assert _native is not None
    grad, grad_loss = _like(grad, x), grad_loss.float().contiguous()
    grad_x = _empty_like(x)
    if with_residual and activation == "identity":
        grad_residual, own = grad, None
    else:
        grad_residual = own = _empty_like(x) if with_residual else None  # type: ignore[assignment]
    _native.bn_act_backward(
        _map(x, segments),
        _pointers(constants),
        _ACTIVATIONS[activation],
        x.data_ptr(),
        grad.data_ptr(),
        0 if bits is None else bits.data_ptr(),
        mean.data_ptr(),
        var.data_ptr(),
        grad_loss.data_ptr(),
        grad_x.data_ptr(),
        0 if own is None else own.data_ptr(),
    )
    return grad_x, grad_residual if with_residual else None


def statistics(x: Tensor, segments: Sequence[int]) -> Tensor:
    """Mean and biased variance [2, S, C], float32."""
    assert _native is not None
    both = torch.empty(2, len(segments) - 1, x.shape[1])
    mean, var = both.unbind()
    _native.statistics(_map(x, segments), x.data_ptr(), mean.data_ptr(), var.data_ptr())
    return both


def statistics_backward(x: Tensor, both: Tensor, grad: Tensor, segments: Sequence[int]) -> Tensor:
    """The gradient of x from that of `statistics`' result, both [2, S, C]."""
    assert _native is not None
    out, grad = _empty_like(x), grad.float().contiguous()
    var = grad.numel() // 2 * grad.element_size()  # bytes before the variances
    _native.statistics_backward(
        _map(x, segments), x.data_ptr(), both.data_ptr(), grad.data_ptr(), grad.data_ptr() + var, out.data_ptr()
    )
    return out


def join_forward(
    maps: Sequence[Tensor],
    statistics: Sequence[Tensor],
    constants: Sequence[Tensor],
    segments: Sequence[int],
    activation: str,
) -> tuple[Tensor, Tensor]:
    """y = activation(cat(maps) scale + shift) and the matching loss [S]; the maps all as `takes` wants them.

    statistics: mean and variance [2, S, c] of each map, float32, contiguous; constants as of `bn_act_forward`.
    """
    assert _native is not None
    n, _, h, w = maps[0].shape
    channels = [x.shape[1] for x in maps]
    y = torch.empty(n, sum(channels), h, w, dtype=maps[0].dtype, memory_format=torch.channels_last)
    loss = torch.empty(len(segments) - 1)
    _native.join_forward(
        _map(y, segments),
        _pointers(constants),
        _ACTIVATIONS[activation],
        _pointers(maps),
        _pointers(statistics),
        channels,
        y.data_ptr(),
        loss.data_ptr(),
    )
    return y, loss


def join_backward(
    maps: Sequence[Tensor],
    statistics: Sequence[Tensor],
    grad: Tensor,
    grad_loss: Tensor,
    constants: Sequence[Tensor],
    segments: Sequence[int],
    activation: str,
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of the maps and of their statistics from those of `join_forward`'s results."""
    assert _native is not None
    grad, grad_loss = _like(grad, maps[0]), grad_loss.float().contiguous()
    grads, grad_statistics = [_empty_like(x) for x in maps], [torch.empty_like(s) for s in statistics]
    _native.join_backward(
        _map(grad, segments),
        _pointers(constants),
        _ACTIVATIONS[activation],
        _pointers(maps),
        _pointers(statistics),
        [x.shape[1] for x in maps],
        grad.data_ptr(),
        grad_loss.data_ptr(),
        _pointers(grads),
        _pointers(grad_statistics),
    )
    return grads, grad_statistics


def unit_root_forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """z = r / |r| [N, D] of r = sign(x) sqrt(|x| + eps), x float32 [N, D], contiguous; and |r| [N], at least 1e-12."""
    assert _native is not None
    z, norms = torch.empty_like(x), torch.empty(len(x))
    _native.unit_root_forward(*x.shape, eps, *_pointers((x, z, norms)), torch.get_num_threads())
    return z, norms


def unit_root_backward(x: Tensor, z: Tensor, norms: Tensor, grad: Tensor, eps: float) -> Tensor:
    """The gradient of x from that of z; the slope at 0 is 0."""
    assert _native is not None
    grad_x, grad = torch.empty_like(x), grad.float().contiguous()
    _native.unit_root_backward(*x.shape, eps, *_pointers((x, z, norms, grad, grad_x)), torch.get_num_threads())
    return grad_x


def max_pool_forward(x: Tensor, window: Sequence[Sequence[int]], out: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Max pooling and the uint8 places of the maxima within their windows; window: kernel, stride, padding, dilation."""
    assert _native is not None
    n, c, *size = x.shape
    y = torch.empty(n, c, *out, dtype=x.dtype, memory_format=torch.channels_last)
    places = torch.empty(n, c, *out, dtype=torch.uint8, memory_format=torch.channels_last)
    _native.max_pool_forward(
        x.dtype == torch.bfloat16,
        n,
        c,
        *window,
        size,
        out,
        x.data_ptr(),
        y.data_ptr(),
        places.data_ptr(),
        torch.get_num_threads(),
    )
    return y, places


def max_pool_backward(grad: Tensor, places: Tensor, window: Sequence[Sequence[int]], shape: Sequence[int]) -> Tensor:
    """The input's gradient [shape]."""
    assert _native is not None
    n, c, *size = shape
    grad = grad.contiguous(memory_format=torch.channels_last)
    found = torch.empty(n, c, *size, dtype=grad.dtype, memory_format=torch.channels_last)
    _native.max_pool_backward(
        grad.dtype == torch.bfloat16,
        n,
        c,
        *window,
        size,
        list(grad.shape[2:]),
        grad.data_ptr(),
        places.data_ptr(),
        found.data_ptr(),
        torch.get_num_threads(),
    )
    return found


def depthwise_backward(grad: Tensor, taps: Tensor, window: Sequence[Sequence[int]], shape: Sequence[int]) -> Tensor:
    """The input's gradient [shape] of a convolution with one filter for each channel.

    taps: float32 [k_h k_w, C], contiguous; window: kernel, stride, padding, dilation. For strides above 1, where oneDNN has no
    such kernel in bf16: measured on an EPYC with AVX-512, 10 maps of 96 channels, 112 x 112, stride 2, one thread: 77 -> 3.6 ms;
    with stride 1 oneDNN's is faster (144 channels, 56 x 56, bf16: 1.6 ms, this 3.4 ms).
    """
    assert _native is not None
    n, c, *size = shape
    grad = grad.contiguous(memory_format=torch.channels_last)
    found = torch.empty(n, c, *size, dtype=grad.dtype, memory_format=torch.channels_last)
    _native.depthwise_backward(
        grad.dtype == torch.bfloat16,
        n,
        c,
        *window,
        size,
        list(grad.shape[2:]),
        grad.data_ptr(),
        taps.data_ptr(),
        found.data_ptr(),
        torch.get_num_threads(),
    )
    return found


def winograd_transform(weight: Tensor, turned: bool) -> Tensor:
    """The weight [C_out, C_in, 3, 3], in any order of its memory, transformed for `winograd`: float32 in the order it reads.

    turned: for the input gradient: channels exchanged, filters turned by 180 degrees.
    """
    assert _native is not None
    weight = weight.detach().float()
    c_out, c_in = (weight.shape[1], weight.shape[0]) if turned else (weight.shape[0], weight.shape[1])
    packed = torch.empty(_native.winograd_packed_floats(c_in, c_out))
    threads = torch.get_num_threads()
    _native.winograd_transform(weight.data_ptr(), weight.stride(), c_in, c_out, turned, packed.data_ptr(), threads)
    return packed


def winograd_weight_gradient(x: Tensor, grad: Tensor, padding: tuple[int, int], weight: Tensor) -> Tensor:
    """The gradient of a weight [C_out, C_in, 3, 3] in float32, in the order of its memory.

    x [N, C_in, H, W] and the result's gradient grad [N, C_out, H', W'] of one type, as `takes` wants them.
    """
    assert _native is not None
    n, c, h, w = x.shape
    found = torch.empty_like(weight, dtype=torch.float32)
    _native.winograd_weight_gradient(
        x.dtype == torch.bfloat16,
        n,
        c,
        grad.shape[1],
        (h, w),
        (grad.shape[2], grad.shape[3]),
        padding,
        x.data_ptr(),
        grad.data_ptr(),
        found.data_ptr(),
        found.stride(),
        torch.get_num_threads(),
    )
    return found


def winograd(x: Tensor, packed: Tensor, bias: Tensor | None, channels: int, padding: tuple[int, int]) -> Tensor:
    """The 3 x 3 convolution with stride 1 of x [N, C_in, H, W], as `takes` wants it -> [N, channels, H', W'] in its type.

    packed: of `winograd_transform`; bias: float32 [channels], contiguous.
    """
    assert _native is not None
    n, c, h, w = x.shape
    out = h + 2 * padding[0] - 2, w + 2 * padding[1] - 2
    y = torch.empty(n, channels, *out, dtype=x.dtype, memory_format=torch.channels_last)
    _native.winograd_convolve(
        x.dtype == torch.bfloat16,
        n,
        c,
        channels,
        (h, w),
        out,
        padding,
        x.data_ptr(),
        packed.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


def distances(z: Tensor, prototypes: Tensor) -> Tensor:
    """|z_n - c_k| [N, K] of float32 z [N, D] and prototypes [K, D], contiguous, from differences."""
    assert _native is not None
    out = torch.empty(len(z), len(prototypes))
    _native.distances(len(z), *prototypes.shape, *_pointers((z, prototypes, out)), torch.get_num_threads())
    return out


def pull(z: Tensor, prototypes: Tensor, weights: Tensor) -> Tensor:
    """The sum over k of weights [N, K] times (z_n - c_k), [N, D]."""
    assert _native is not None
    out, weights = torch.empty_like(z), weights.contiguous()
    _native.pull(len(z), *prototypes.shape, *_pointers((z, prototypes, weights, out)), torch.get_num_threads())
    return out
