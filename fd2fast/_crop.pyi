"""Types of the C++ kernels of csrc/crop.hpp; an image, a view and a gradient is the address of a tensor's memory."""

from collections.abc import Sequence

def forward(
    half: bool,
    segments: Sequence[int],
    rows: Sequence[Sequence[int]],
    shape: Sequence[int],
    stride: Sequence[int],
    image: int,
    view_shape: Sequence[int],
    view_stride: Sequence[int],
    view: int,
    threads: int,
    /,
) -> None: ...
def backward(
    half: bool,
    segments: Sequence[int],
    rows: Sequence[Sequence[int]],
    view_shape: Sequence[int],
    view_stride: Sequence[int],
    grad: int,
    shape: Sequence[int],
    stride: Sequence[int],
    grad_image: int,
    threads: int,
    /,
) -> None: ...
