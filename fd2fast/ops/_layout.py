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


def is_channels_last(images: Tensor) -> bool:
    """Whether the layout is channels_last and not contiguous as well."""
    return images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()


def layout_of(images: Tensor) -> torch.memory_format:
    """channels_last where the tensor is that and nothing else, otherwise contiguous_format."""
    return torch.channels_last if is_channels_last(images) else torch.contiguous_format


def converted(views: Tensor, dtype: torch.dtype | None, memory_format: torch.memory_format | None) -> Tensor:
    """The views in this type and order of memory; None: as they are."""
    if dtype is None and memory_format is None:
        return views
    return views.to(views.dtype if dtype is None else dtype, memory_format=memory_format or torch.preserve_format)
