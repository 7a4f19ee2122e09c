"""Makes a network train faster on a CPU: its 3 x 3 convolutions by Winograd's algorithm, forward and both gradients.

Its sums run in fp32, so that bf16 maps gain nothing from it where the processor multiplies bf16: measured on an EPYC (Zen 4) with
the main job's networks, direct -> this, student of 10 images on one thread fp32 (AVX2) 53.8 -> 42.8 ms, bf16 32.6 -> 31.5 ms,
teacher of 16 on two threads fp32 47.7 -> 40.1, bf16 37.3 -> 43.9 ms. There they stay as they are.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fd2fast.models import winograd
from fd2fast.ops.cpu import native
from fd2fast.system.device import fast_bf16

# Tiles of 4 x 4 outputs for each channel pair's 36 products, below which transforming the weight costs more than it saves.
_LEAST_TILES = 24


class _Winograd(torch.autograd.Function):
    """F.conv2d(x, weight, bias, padding=padding) with 3 x 3 filters; the weight is transformed in each pass, in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding, ctx.with_bias = padding, bias is not None
        added = None if bias is None else bias.float()
        return native.winograd(x, native.winograd_transform(weight, False), added, len(weight), padding)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last)
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            around = 2 - ctx.padding[0], 2 - ctx.padding[1]
            grad_x = native.winograd(grad, native.winograd_transform(weight, True), None, x.shape[1], around)
        if ctx.needs_input_grad[1]:
            grad_weight = native.winograd_weight_gradient(x, grad, ctx.padding, weight).to(weight.dtype)
        if ctx.with_bias and ctx.needs_input_grad[2]:
            grad_bias = grad.float().sum(dim=(0, 2, 3))
        return grad_x, grad_weight, grad_bias, None


class WinogradConv2d(nn.Conv2d):
    """A Conv2d that runs by Winograd's algorithm on CPU maps that are large enough for it; parameters and names stay."""

    def forward(self, input: Tensor) -> Tensor:
        """[N, C_in, H, W] -> [N, C_out, H', W']; under autocast in its type, as F.conv2d."""
        if input.device.type != "cpu" or not self._pays(input):
            return super().forward(input)
        if torch.is_autocast_enabled("cpu"):
            input = input.to(torch.get_autocast_dtype("cpu"))
        if input.dtype != torch.float32 and (input.dtype != torch.bfloat16 or _bf16_products()):
            return super().forward(input)
        input = input.contiguous(memory_format=torch.channels_last)
        if not native.takes(input):
            return super().forward(input)
        with torch.autocast("cpu", enabled=False):
            return _Winograd.apply(input, self.weight, self.bias, _padding(self))

    def _pays(self, x: Tensor) -> bool:
        if x.ndim != 4:
            return False
        return len(x) * (-(-x.shape[2] // 4)) * (-(-x.shape[3] // 4)) >= _LEAST_TILES


@cache
def _bf16_products() -> bool:
    return fast_bf16(torch.device("cpu"))


def _pair(value: tuple[int, ...]) -> tuple[int, int]:
    return int(value[0]), int(value[1])


def _padding(layer: nn.Conv2d) -> tuple[int, int]:
    assert not isinstance(layer.padding, str)
    return _pair(layer.padding)


def accelerate(network: nn.Module) -> int:
    """Let the network's 3 x 3 convolutions run faster on a CPU, in place; how many do. Others, and other devices, stay.

    The values agree with torch's within a few roundings; state dicts are the same.
    """
    count = 0
    for layer in network.modules():
        if type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
            kernel, stride, dilation = (_pair(s) for s in (layer.kernel_size, layer.stride, layer.dilation))
            channels = layer.in_channels, layer.out_channels
            if winograd.supports(torch.float32, kernel, stride, _padding(layer), dilation, layer.groups, channels):
                layer.__class__ = WinogradConv2d
                count += 1
    return count
