"""What the backends of the BN operations share: a frozen layer's constants, and the operations that follow from two functions."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fd2fast import reference
from fd2fast.ops._segments import distance, on_host
from fd2fast.reference._offsets import Offsets, accumulation_dtype, device_offsets


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


def operations(
    statistics: type[torch.autograd.Function], bn_act: type[torch.autograd.Function]
) -> dict[str, Callable[..., Any]]:
    """segment_statistics, bn_matching, bn_act_matching and bn_act of a backend that reads offsets on the host.

    statistics: (x, segments) -> mean and variance [2, S, C]; bn_act: (x, residual, scale, shift, running_mean, running_var,
    segments, activation) -> (y, loss [S]).
    """

    def segment_statistics(x: Tensor, segments: Offsets) -> Tensor:
        both: Tensor = statistics.apply(x, on_host(segments))
        return both

    def bn_matching(x: Tensor, running_mean: Tensor, running_var: Tensor, segments: Offsets) -> Tensor:
        known = on_host(segments)
        mean, var = segment_statistics(x, known).unbind()
        return distance(mean, var, running_mean, running_var, known)

    def bn_act_matching(
        x: Tensor, residual: Tensor | None, bn: BatchNorm, segments: Offsets, activation: str
    ) -> tuple[Tensor, Tensor]:
        y, loss = bn_act.apply(x, residual, *bn.affine(x), on_host(segments), activation)
        return y, loss

    def act_alone(x: Tensor, residual: Tensor | None, bn: BatchNorm, activation: str) -> Tensor:
        return bn_act_matching(x, residual, bn, (0, len(x)), activation)[0]

    runs = (segment_statistics, bn_matching, bn_act_matching, act_alone)
    return dict(zip(("segment_statistics", "bn_matching", "bn_act_matching", "bn_act"), runs, strict=True))


def joined_loss(statistics: Sequence[Tensor], bn: BatchNorm, segments: Offsets) -> Tensor:
    """The matching loss [S] of joined maps from the statistics [2, S, c_i] of each, wherever the offsets are."""
    mean, var = torch.cat(list(statistics), dim=2).unbind()
    loss = reference.match_statistics(mean, var, bn.running_mean, bn.running_var)
    return torch.where(device_offsets(segments, loss.device).diff() > 0, loss, 0.0)
