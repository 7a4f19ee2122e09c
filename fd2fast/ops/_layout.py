"""Memory layouts of [N, C, H, W] tensors that kernels take."""

import torch
from torch import Tensor


def dense_format(tensor: Tensor) -> torch.memory_format | None:
    """channels_last or contiguous_format, whichever the tensor is without gaps (channels_last if both), or None."""
    for layout in (torch.channels_last, torch.contiguous_format):
        if tensor.is_contiguous(memory_format=layout):
            return layout
    return None


def dense(tensor: Tensor) -> Tensor:
    """The tensor itself where its layout is dense, else a contiguous copy."""
    return tensor if dense_format(tensor) is not None else tensor.contiguous()


def dense_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """The tensor in the dense layout of `pattern`, copied where it has another."""
    return tensor.contiguous(memory_format=dense_format(pattern) or torch.contiguous_format)
