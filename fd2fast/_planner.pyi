"""Types of the C++ extension; `fd2fast.distillation.planner` is what to call."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

def make_plan(
    *,
    classes: int,
    ipc: int,
    group_size: int,
    segment_size: int,
    segments_per_step: int,
    max_rows: int,
    memory_limit: int,
    bytes_per_row: int,
    bytes_fixed: int,
    bucket_sizes: Sequence[int],
) -> dict[str, Any]: ...
def iteration_table(
    *,
    seed: int,
    segments: NDArray[np.int64],
    first_iteration: int,
    count: int,
    size: int,
    jitter: int,
    augment: bool,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    threads: int,
) -> NDArray[np.int32]: ...
def cosine_rates(lr: float, first_iteration: int, count: int, total: int) -> NDArray[np.float64]: ...
def philox(seed: int, counters: NDArray[np.uint32]) -> NDArray[np.uint32]: ...

class TableStream:
    def __init__(
        self,
        *,
        seed: int,
        segments: NDArray[np.int64],
        first_iteration: int,
        count: int,
        size: int,
        jitter: int,
        augment: bool,
        scale: tuple[float, float],
        ratio: tuple[float, float],
        lr: float,
        total: int,
        chunk: int,
        depth: int,
        keep: int,
    ) -> None: ...
    def next(self) -> tuple[NDArray[np.int32], NDArray[np.float64]]: ...
    def close(self) -> None: ...
    @property
    def memory(self) -> NDArray[np.uint8]: ...
