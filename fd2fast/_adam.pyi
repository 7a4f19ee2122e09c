"""Types of the C++ kernel of csrc/adam.hpp; images, gradients and moments are addresses of tensors' memory."""

from collections.abc import Sequence

def step_clamp(
    planes: int,
    area: int,
    rates: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    grad: int,
    image: int,
    exp_avg: int,
    exp_avg_sq: int,
    threads: int,
    /,
) -> None: ...
