"""The constants of a frozen BatchNorm layer, as the backends of its operations read them."""

from typing import NamedTuple

import torch
from torch import Tensor

from fd2fast.reference._offsets import accumulation_dtype


class BatchNorm(NamedTuple):
    """weight, bias, running_mean, running_var [C], eps; and, where a layer keeps them, scale and shift [C]: y = x scale + shift.

    scale and shift, and then running_mean and running_var too, are contiguous and in float32 (float64 for float64 maps).
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    eps: float
    scale: Tensor | None = None
    shift: Tensor | None = None

    @property
    def constants(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """weight, bias, running_mean, running_var."""
        return self.weight, self.bias, self.running_mean, self.running_var

    def affine(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """scale, shift, running_mean, running_var for maps such as x, contiguous and in the type that x is summed in."""
        if self.scale is not None and self.shift is not None:
            return self.scale, self.shift, self.running_mean, self.running_var
        dtype = accumulation_dtype(x)
        weight, bias, mean, var = (c.detach().to(dtype).contiguous() for c in self.constants)
        scale = weight * torch.rsqrt(var + self.eps)
        return scale, bias - mean * scale, mean, var
