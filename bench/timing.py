"""How the benches measure: runs that take turns, quantiles, peak memory, and what the device can do at most."""

from __future__ import annotations

import functools
import gc
import itertools
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fd2fast.distillation.memory import is_out_of_memory, peak_bytes
from fd2fast.errors import UserError
from fd2fast.models.frozen_layers import FrozenConv

Run = Callable[[int], None]

# Passes of an iteration over each BN input: written by the convolution, read and written by BN, read by the next one, and
# back: two reads and a write through BN, a read and a write through the convolution.
PASSES = 9
# Counted periods of one turn, by device.
BURST = {"cuda": 5, "cpu": 3}


def once(run: Run, t: int, device: torch.device) -> float:
    """Milliseconds of iteration t: between CUDA events, or on the wall clock of a CPU."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        run(t)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    run(t)
    return 1e3 * (time.perf_counter() - begin)


def back_to_back(run: Run, first: int, periods: int, period: int, device: torch.device) -> list[float]:
    """Milliseconds an iteration, a value for each period; nothing waits between them, as the engine runs them."""
    marks: list[Any] = []
    if device.type == "cuda":
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(periods + 1)]
        torch.cuda.synchronize()
        marks[0].record()
    else:
        marks.append(time.perf_counter())
    for n in range(periods):
        for t in range(first + n * period, first + (n + 1) * period):
            run(t)
        if device.type == "cuda":
            marks[n + 1].record()
        else:
            marks.append(time.perf_counter())
    if device.type == "cuda":
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / period for a, b in itertools.pairwise(marks)]
    return [1e3 * (b - a) / period for a, b in itertools.pairwise(marks)]


def first_five(run: Run) -> float:
    """The paper's protocol: mean of the first 5 iterations on the host's clock, not waiting for the device; milliseconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for t in range(5):
        run(t)
    return 1e3 * (time.perf_counter() - begin) / 5


def interleaved(
    runs: dict[str, Run], rounds: int, period: int, device: torch.device, warm_up: int = 2
) -> dict[str, list[float]]:
    """Milliseconds an iteration, at least `rounds` values, each over `period` iterations (every teacher once); runs take turns.

    A turn is BURST periods, after one that is not counted: in it a GPU's host gets ahead, and a CPU's caches fill again with what
    the run before has driven out (measured: 2 of 20 ms, 20 images of 64 x 64). A run that runs out of memory is dropped from
    `runs`; its list is empty.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    burst, ahead = BURST[device.type], 1
    for turn in range(-warm_up, -(-rounds // burst)):
        for name in list(runs):
            first = (turn + warm_up) * (ahead + burst) * period
            try:
                taken = back_to_back(runs[name], first, ahead + burst, period, device)[ahead:]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                traceback.clear_frames(error.__traceback__)  # they hold its tensors
                del runs[name]
                found[name] = []
                continue
            if turn >= 0:
                found[name] += taken
    return found


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """10 %, median, 90 %."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return cuts[0], statistics.median(values), cuts[8]


def ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median over the rounds of slow / fast."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def peak_memory(make: Callable[[], Run], period: int, device: torch.device) -> tuple[float | None, float | None]:
    """MB that the run holds at most from its making on, allocated and reserved, teachers not counted.

    On a GPU over three periods, warm-up and recording included: what a graph works on counts while it is recorded, a replay
    allocates nothing. On a CPU what its tensors hold over one period; nothing is reserved there.
    """
    gc.collect()

    def work() -> None:
        run = make()
        for t in range(period):
            run(t)

    if device.type != "cuda":
        return peak_bytes(device, work) / 1e6, None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    run = make()
    for t in range(3 * period):
        run(t)
    torch.cuda.synchronize()
    return (
        (torch.cuda.max_memory_allocated() - before) / 1e6,
        (torch.cuda.max_memory_reserved() - reserved) / 1e6,
    )


@functools.cache
def product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the best of a few square matrix products; in fp32 on a GPU by TF32, which convolutions may use, too."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    best = min(once(lambda _: _use(a @ b), 0, device) for _ in range(12))
    torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * side**3 / (best * 1e-3)


def best_rate(dtype: torch.dtype, device: torch.device) -> float:
    """`product_rate` of work in this type: on a CPU also fp32's, since one that has no bf16 products emulates them."""
    dtypes = {dtype, torch.float32} if device.type == "cpu" else {dtype}
    return max(product_rate(d, device) for d in dtypes)


@functools.cache
def copy_rate(device: torch.device) -> float:
    """Bytes/s, reads and writes together, of the best of a few large copies."""
    count = (1 << 30) if device.type == "cuda" else (1 << 26)
    a = torch.empty(count, dtype=torch.uint8, device=device)
    b = torch.ones_like(a)
    best = min(once(lambda _: _use(a.copy_(b)), 0, device) for _ in range(12))
    return 2 * count / (best * 1e-3)


def _use(_: object) -> None:
    return None


def use_threads(count: int) -> None:
    """Threads on a CPU; 0 leaves torch's own choice. Raises UserError for fewer."""
    if count < 0:
        raise UserError(f"threads must be 0 or more, got {count}")
    if count:
        torch.set_num_threads(count)


def weight_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of parameters and buffers, and of the packed forms that frozen convolutions keep on a CPU."""
    modules = list(modules)
    packed = sum(layer.packed_bytes for m in modules for layer in m.modules() if isinstance(layer, FrozenConv))
    return packed + sum(t.nbytes for m in modules for t in (*m.parameters(), *m.buffers()))


def convolution_flops(module: nn.Module, image: torch.Tensor) -> float:
    """FLOPs for one image of the module's products and convolutions, forward and gradient to the input."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        module(image[:1])
    return 2.0 * counter.get_total_flops()


def traffic_elements(module: nn.Module, image: torch.Tensor) -> float:
    """Elements moved for one image: PASSES over the input of each batch norm, and the image's own."""
    total = 0

    def count(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal total
        total += inputs[0].numel()

    hooks = [m.register_forward_pre_hook(count) for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        module(image[:1])
    for hook in hooks:
        hook.remove()
    return PASSES * total
