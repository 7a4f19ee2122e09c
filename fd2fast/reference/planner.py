"""Specification of the C++ planner: the plan and the random draws in plain Python, and the draws again in numpy.

Draws. Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) with the 64-bit seed as key
(low word first) and the counter (j, iteration, segment low word, segment high word); word x gives u = x * 2^-32.
Crop of a square image of side n, as torchvision's RandomResizedCrop: for j = 0 .. 9, area = n^2 * (a + u0 (b - a)) for
scale (a, b), aspect = exp(log c + u1 (log d - log c)) for ratio (c, d), width = round(sqrt(area * aspect)), height =
round(sqrt(area / aspect)), half to even; the first that fits 0 < width, height <= n is taken at top = floor(u2 (n -
height + 1)), left = floor(u3 (n - width + 1)). After ten failures: the largest centred crop within the ratios.
Block j = 10: flip = u0 < 1/2, roll_down = floor(u1 (jitter + 1)), roll_right = floor(u2 (jitter + 1)).
"""

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fd2fast.schedules import half_cosine

TRIES = 10
MOST = 2**31 - 1  # ids and counts fit int32


@dataclass
class PlanLists:
    """The fields of fd2fast.distillation.planner.Plan as plain lists."""

    segments_per_step: int
    max_rows_per_step: int
    first_class: list[int]
    end_class: list[int]
    block: list[int]
    image_id: list[int]
    group: list[int]
    slot: list[int]
    step_segments: list[int]
    step_offsets: list[int]
    step_wave: list[int]
    prior_segments: list[int]
    prior_offsets: list[int]


def make_plan(
    classes: int,
    ipc: int,
    *,
    group_size: int = 4,
    segment_size: int | None = None,
    segments_per_step: int | str = 1,
    max_rows_per_step: int | None = None,
    bytes_per_row: int | None = None,
    memory_limit: int | None = None,
    bytes_fixed: int = 0,
    bucket_sizes: list[int] | tuple[int, ...] | None = None,
    layout: str = "across",
) -> PlanLists:
    """The plan by its definition; arguments and ValueErrors of fd2fast.distillation.planner.make_plan."""
    _at_least("classes", classes, 1)
    _at_least("ipc", ipc, 1)
    _at_least("group_size", group_size, 1)
    # along what a segment extends: classes, or the images of one class
    extent, others = (classes, ipc) if layout == "across" else (ipc, classes)
    size = (min(100, classes) if layout == "across" else ipc) if segment_size is None else segment_size
    _at_least("segment_size", size, 1)
    if layout == "within" and group_size != 1:
        raise ValueError(f"group_size must be 1 for segments within a class, got {group_size}")
    if layout == "within" and size > ipc:
        raise ValueError(f"segment larger than the images of a class: {size} > {ipc}")
    if segments_per_step != "max":
        _at_least("segments_per_step", int(segments_per_step), 1)
    if (memory_limit is None) != (bytes_per_row is None):
        raise ValueError("memory_limit and bytes_per_row go together")
    if size > extent:
        raise ValueError(f"segment larger than the class count: {size} > {extent}")

    limits = []
    if max_rows_per_step is not None:
        if max_rows_per_step < size:
            raise ValueError(
                f"max_rows_per_step too small for one segment: {size} rows needed, got {max_rows_per_step}"
            )
        limits.append(max_rows_per_step)
    if memory_limit is not None and bytes_per_row is not None:
        need = bytes_fixed + size * bytes_per_row
        if memory_limit < need:
            raise ValueError(
                f"memory_limit too small for one segment: {need} bytes needed "
                f"({bytes_fixed} + {size} rows of {bytes_per_row}), got {memory_limit}"
            )
        limits.append((memory_limit - bytes_fixed) // bytes_per_row)
    max_rows = min(limits, default=0)

    blocks = [(first, min(first + size, extent)) for first in range(0, extent, size)]
    if len(blocks) * others > MOST:
        raise ValueError(f"number of segments must be at most {MOST}, got {len(blocks) * others}")
    rest = ipc % group_size
    priors = ipc // group_size * math.comb(group_size, 2) + math.comb(rest, 2)
    if len(blocks) * priors > MOST:
        raise ValueError(f"number of priors must be at most {MOST}, got {len(blocks) * priors}")
    groups = -(-others // group_size)
    limit = len(blocks) * groups if segments_per_step == "max" else int(segments_per_step)
    plan = PlanLists(limit, max_rows, [], [], [], [], [], [], [], [0], [], [], [0])
    counts: list[int] = []
    for image, (b, (first, end)) in itertools.product(range(others), enumerate(blocks)):
        counts.append(end - first)
        plan.block.append(b)
        if layout == "within":
            plan.first_class.append(image)
            plan.end_class.append(image + 1)
            plan.image_id.append(first)
            plan.group.append(first)
            plan.slot.append(0)
        else:
            plan.first_class.append(first)
            plan.end_class.append(end)
            plan.image_id.append(image)
            plan.group.append(image // group_size)
            plan.slot.append(image % group_size)
            plan.prior_segments += [i * len(blocks) + b for i in range(image - image % group_size, image)]
        plan.prior_offsets.append(len(plan.prior_segments))

    def rows(s: int) -> int:
        return counts[s]

    for wave in range(min(group_size, ipc)):
        waiting = sorted((s for s, slot in enumerate(plan.slot) if slot == wave), key=lambda s: (-rows(s), s))
        while waiting:
            fit = 1
            while fit < min(limit, len(waiting)) and not 0 < max_rows < sum(rows(s) for s in waiting[: fit + 1]):
                fit += 1
            fit = max((bucket for bucket in bucket_sizes or () if bucket <= fit), default=fit)
            plan.step_segments += waiting[:fit]
            plan.step_offsets.append(len(plan.step_segments))
            plan.step_wave.append(wave)
            waiting = waiting[fit:]
    return plan


def philox(seed: int, counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Four 32-bit words of Philox4x32-10."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def exponential(x: Any) -> Any:
    """e^x of a float or an array, from IEEE sums and products in a fixed order: the same bits in every language.

    x = k ln 2 + r, Taylor polynomial of degree 13 in r (|r| <= 0.35, truncation below 2^-57), times 2^k.
    """
    k = np.rint(x * 1.4426950408889634)
    r = (x - k * 6.93147180369123816490e-01) - k * 1.90821492927058770002e-10
    p = 1.0 / math.factorial(13)
    for n in range(12, -1, -1):
        p = p * r + 1.0 / math.factorial(n)
    return np.ldexp(p, np.asarray(k, np.int32))


def iteration_table(
    seed: int,
    segments: list[int],
    first_iteration: int,
    count: int,
    size: int,
    *,
    jitter: int,
    augment: bool = True,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> list[list[list[int]]]:
    """[count][len(segments)][7], one draw after the other, by the definition above."""
    return [
        [_row(seed, segment, t, size, jitter, augment, scale, ratio) for segment in segments]
        for t in range(first_iteration, first_iteration + count)
    ]


def _row(
    seed: int,
    segment: int,
    iteration: int,
    size: int,
    jitter: int,
    augment: bool,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> list[int]:
    where = (iteration, segment & 0xFFFFFFFF, segment >> 32)
    x0, x1, x2, _ = philox(seed, (TRIES, *where))
    rolls = [x1 * (jitter + 1) >> 32, x2 * (jitter + 1) >> 32]
    if not augment:
        return [0, 0, size, size, 0, *rolls]
    flip = int(x0 < 2**31)
    low, span = math.log(ratio[0]), math.log(ratio[1]) - math.log(ratio[0])
    for attempt in range(TRIES):
        x0, x1, x2, x3 = philox(seed, (attempt, *where))
        area = float(size) * float(size) * (scale[0] + x0 * 2.0**-32 * (scale[1] - scale[0]))
        aspect = float(exponential(low + x1 * 2.0**-32 * span))
        width, height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < width <= size and 0 < height <= size:
            return [x2 * (size - height + 1) >> 32, x3 * (size - width + 1) >> 32, height, width, flip, *rolls]
    return [*_fallback(size, ratio), flip, *rolls]


def _fallback(size: int, ratio: tuple[float, float]) -> list[int]:
    """torchvision's: the largest centred crop of a square whose aspect lies within the ratios; at least one pixel."""
    height = max(1, round(size / ratio[0])) if ratio[0] > 1 else size
    width = max(1, round(size * ratio[1])) if ratio[1] < 1 else size
    return [(size - height) // 2, (size - width) // 2, height, width]


def cosine_rates(lr: float, first_iteration: int, count: int, total: int) -> list[float]:
    """Half a cosine from lr at iteration 0 to 0 at `total` (the public recover scripts' schedule)."""
    return [half_cosine(t, total) * lr for t in range(first_iteration, first_iteration + count)]


def philox_array(seed: int, counters: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """`philox` of uint32 [n, 4] -> uint32 [n, 4]."""
    c0, c1, c2, c3 = counters.astype(np.uint64).T
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
        c0, c1, c2, c3 = (b >> shift) ^ c1 ^ np.uint64(k0), b & low, (a >> shift) ^ c3 ^ np.uint64(k1), a & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def iteration_array(
    seed: int,
    segments: NDArray[np.int64],
    first_iteration: int,
    count: int,
    size: int,
    *,
    jitter: int,
    augment: bool = True,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> NDArray[np.int32]:
    """`iteration_table` as int32 [count, len(segments), 7], all rows at once; each try only for the rows that need it."""
    segments = np.asarray(segments, np.int64)
    rows = count * len(segments)
    counters = np.empty((rows, 4), np.uint32)
    counters[:, 1] = np.repeat(np.arange(first_iteration, first_iteration + count, dtype=np.int64), len(segments))
    counters[:, 2] = np.tile(segments & 0xFFFFFFFF, count)
    counters[:, 3] = np.tile(segments >> 32, count)

    counters[:, 0] = TRIES
    bits = philox_array(seed, counters).astype(np.int64)
    table = np.empty((rows, 7), np.int32)
    table[:, :4] = [0, 0, size, size]
    table[:, 4] = augment & (bits[:, 0] < 2**31)
    table[:, 5:] = bits[:, 1:3] * (jitter + 1) >> 32
    if augment:
        table[:, :4] = _fallback(size, ratio)
        low, span = math.log(ratio[0]), math.log(ratio[1]) - math.log(ratio[0])
        left = np.arange(rows)
        for attempt in range(TRIES):
            counters[:, 0] = attempt
            bits = philox_array(seed, counters[left]).astype(np.int64)
            area = float(size) * float(size) * (scale[0] + bits[:, 0] * 2.0**-32 * (scale[1] - scale[0]))
            aspect = exponential(low + bits[:, 1] * 2.0**-32 * span)
            width, height = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
            fits = (0 < width) & (width <= size) & (0 < height) & (height <= size)
            h, w, x = height[fits].astype(np.int64), width[fits].astype(np.int64), bits[fits]
            crop = [x[:, 2] * (size - h + 1) >> 32, x[:, 3] * (size - w + 1) >> 32, h, w]
            table[left[fits], :4] = np.stack(crop, axis=1)
            left = left[~fits]
    return table.reshape(count, len(segments), 7)


def _at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
