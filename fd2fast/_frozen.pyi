"""Types of the C++ kernels of csrc/frozen.hpp; every int that is not a size is the address of a tensor's memory, 0 for none."""

from collections.abc import Sequence

class Map:
    def __init__(self, half: bool, segments: Sequence[int], area: int, channels: int, threads: int) -> None: ...

def bn_act_forward(
    map: Map,
    constants: Sequence[int],
    activation: int,
    x: int,
    residual: int,
    y: int,
    bits: int,
    mean: int,
    var: int,
    loss: int,
    /,
) -> None: ...
def bn_act_backward(
    map: Map,
    constants: Sequence[int],
    activation: int,
    x: int,
    grad: int,
    bits: int,
    mean: int,
    var: int,
    grad_loss: int,
    grad_x: int,
    grad_residual: int,
    /,
) -> None: ...
def statistics(map: Map, x: int, mean: int, var: int, /) -> None: ...
def statistics_backward(map: Map, x: int, mean: int, grad_mean: int, grad_var: int, grad_x: int, /) -> None: ...
def join_forward(
    map: Map,
    constants: Sequence[int],
    activation: int,
    maps: Sequence[int],
    statistics: Sequence[int],
    channels: Sequence[int],
    y: int,
    loss: int,
    /,
) -> None: ...
def join_backward(
    map: Map,
    constants: Sequence[int],
    activation: int,
    maps: Sequence[int],
    statistics: Sequence[int],
    channels: Sequence[int],
    grad: int,
    grad_loss: int,
    grads: Sequence[int],
    grad_statistics: Sequence[int],
    /,
) -> None: ...
def max_pool_forward(
    half: bool,
    images: int,
    channels: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    size: Sequence[int],
    out: Sequence[int],
    x: int,
    y: int,
    places: int,
    threads: int,
    /,
) -> None: ...
def max_pool_backward(
    half: bool,
    images: int,
    channels: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    size: Sequence[int],
    out: Sequence[int],
    grad: int,
    places: int,
    grad_x: int,
    threads: int,
    /,
) -> None: ...
def distances(rows: int, classes: int, dims: int, z: int, prototypes: int, out: int, threads: int, /) -> None: ...
def pull(
    rows: int, classes: int, dims: int, z: int, prototypes: int, weights: int, out: int, threads: int, /
) -> None: ...
def unit_root_forward(rows: int, dims: int, eps: float, x: int, z: int, norms: int, threads: int, /) -> None: ...
def unit_root_backward(
    rows: int, dims: int, eps: float, x: int, z: int, norms: int, grad: int, grad_x: int, threads: int, /
) -> None: ...
def processor_level() -> int:
    """1 any processor, 3 and 4 the x86-64 levels, 5 level 4 with bf16."""

def level() -> int:
    """What is in force, at most `processor_level`. ValueError for an unknown cap."""

def winograd_packed_floats(channels_in: int, channels_out: int) -> int: ...
def winograd_transform(
    weight: int, strides: Sequence[int], channels_in: int, channels_out: int, turned: bool, packed: int, threads: int
) -> None: ...
def winograd_weight_gradient(
    half: bool,
    images: int,
    channels_in: int,
    channels_out: int,
    size: tuple[int, int],
    out: tuple[int, int],
    padding: tuple[int, int],
    x: int,
    grad: int,
    grad_weight: int,
    strides: Sequence[int],
    threads: int,
) -> None: ...
def winograd_convolve(
    half: bool,
    images: int,
    channels_in: int,
    channels_out: int,
    size: tuple[int, int],
    out: tuple[int, int],
    padding: tuple[int, int],
    x: int,
    packed: int,
    bias: int,
    y: int,
    threads: int,
) -> None: ...
