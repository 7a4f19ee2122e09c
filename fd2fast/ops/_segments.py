"""Statistics of segments in torch's operations: rows of a batch belong to segments by host row offsets (ints from 0 to N)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fd2fast.reference._offsets import Offsets, accumulation_dtype, constant_tensor, equal_length, host_offsets

Segments = tuple[int, ...]


def on_host(segments: Offsets) -> Segments:
    """The offsets as ints, which a backend's reasons have made sure can be had without waiting for a device."""
    if isinstance(segments, tuple):
        return segments
    known = host_offsets(segments)
    assert known is not None
    return known


def _owner(segments: Segments, device: torch.device) -> Tensor:
    """int64 [N], the segment of each row; copied to a device once."""
    rows = [s for s, (a, b) in enumerate(zip(segments, segments[1:], strict=False)) for _ in range(a, b)]
    return constant_tensor(rows, torch.int64, device)


def _lengths(segments: Segments, like: Tensor) -> Tensor:
    """[S], the rows of each segment in the type of `like`; copied to its device once."""
    lengths = [float(b - a) for a, b in zip(segments, segments[1:], strict=False)]
    return constant_tensor(lengths, like.dtype, like.device)


def per_row(values: Tensor, segments: Segments) -> Tensor:
    """[S, C] -> [N, C, 1, 1]: each row its segment's values."""
    length = equal_length(segments)
    if length is None:
        rows = values.index_select(0, _owner(segments, values.device))
    else:
        rows = values.unsqueeze(1).expand(-1, length, -1).flatten(0, 1)
    return rows[:, :, None, None]


def pixels(segments: Segments, shape: Sequence[int], like: Tensor) -> Tensor | float:
    """Values that a channel's statistics are taken over: a number, or [S, 1] where segments differ (at least 1)."""
    length, area = equal_length(segments), shape[2] * shape[3]
    if length is not None:
        return float(length * area)
    return _lengths(segments, like).clamp_min(1)[:, None] * area


def statistics(x: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [S, C] of the rows and pixels of each segment of x [N, C, H, W]; 0 for an empty one."""
    x = x.to(accumulation_dtype(x))
    length = equal_length(segments)
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


def affine(
    mean: Tensor, grad_mean: Tensor, grad_var: Tensor, segments: Segments, shape: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Slope and offset [S, C] of dL/dx = slope x + offset, from the gradients of mean and variance."""
    count = pixels(segments, shape, mean)
    slope = 2 * grad_var / count
    return slope, grad_mean / count - slope * mean
