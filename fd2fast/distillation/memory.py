"""How much memory a step takes, measured on one iteration of few images, and how much is free."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fd2fast.errors import UserError
from fd2fast.models.fused import FusedTeacher
from fd2fast.settings.recipe import Recipe
from fd2fast.step import GroupedStep, Priors
from fd2fast.system import causes, limits
from fd2fast.system.device import pick_device

logger = logging.getLogger("fd2fast")

# Rows that are measured; the rest follows from the straight line through both.
_ROWS = (2, 4)
# Workspaces of libraries and the allocator's rounding, which the measurement does not see or sees at few rows only.
_MARGIN = 1.08
# Bytes of a limited address space that are left to libraries' code and descriptions.
_LIBRARIES = 32 << 20
# What a warning was given of.
_scarce: set[str] = set()
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a step of r rows needs at its peak, beyond the teachers: fixed + r * row."""

    fixed: int
    row: int

    def of(self, rows: int) -> int:
        """Bytes of a step of so many images."""
        return self.fixed + rows * self.row


def measure(recipe: Recipe, teachers: Sequence[FusedTeacher], device: torch.device) -> StepMemory:
    """The memory of a step of this method: most over the teachers' turns, at the largest side of any phase.

    Runs one iteration of 2 and of 4 random images for every turn: on a GPU torch's own count of allocated bytes is read, on
    a CPU the bytes of all tensors alive are added up as they come and go. Includes images, moments, initial images, the view,
    priors (as many as the last image of a group has) and everything an iteration keeps or needs.
    Raises UserError where not even this fits.
    """
    side = max(recipe.sizes)
    turns = len(teachers) if recipe.teacher_schedule == "round_robin" else 1
    single = replace(recipe, iterations=(turns,), sizes=(side,))
    shapes = [_map_shape(teacher, side, device) for teacher in teachers]

    def once(rows: int) -> None:
        left = limits.spare()
        if device.type == "cpu" and left is not None and left < _LIBRARIES:
            raise MemoryError
        _iterate(single, teachers, shapes, rows, device)

    try:
        # what libraries and convolutions make at first use, and keep, is not what a row needs
        once(_ROWS[0])
        peaks = [peak_bytes(device, functools.partial(once, rows)) for rows in _ROWS]
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise too_small(None, _ROWS[1], free_bytes(device), recipe.precision) from error
    row = max(0, peaks[1] - peaks[0]) / (_ROWS[1] - _ROWS[0])
    fixed = max(0.0, peaks[0] - _ROWS[0] * row)
    return StepMemory(int(_MARGIN * fixed), int(_MARGIN * row) + 1)


def _map_shape(teacher: FusedTeacher, side: int, device: torch.device) -> tuple[int, ...]:
    with torch.no_grad():
        image = torch.zeros(1, 3, side, side, dtype=teacher.classifier.dtype, device=device)
        return tuple(teacher(image, (0, 1))[0].attention.shape[1:])


def _iterate(
    recipe: Recipe,
    teachers: Sequence[FusedTeacher],
    shapes: Sequence[tuple[int, ...]],
    rows: int,
    device: torch.device,
) -> None:
    """One iteration of every turn, from nothing."""
    side, earlier = recipe.sizes[0], recipe.group_size - 1 if recipe.fd2 else 0
    dtype = torch.float64 if recipe.precision == "fp64" else torch.float32
    offsets = tuple(range(0, rows * earlier + 1, earlier)) if earlier else ()
    priors = [
        Priors(torch.rand(rows * earlier, *shape, dtype=dtype, device=device), offsets) if earlier else None
        for shape in shapes
    ]
    bound = torch.full((3,), 3.0, dtype=dtype)
    classes = min(teacher.classes for teacher in teachers)
    step = GroupedStep(
        recipe,
        list(teachers),
        torch.rand(rows, 3, side, side, dtype=dtype, device=device),
        torch.arange(rows) % classes,
        (0, rows),
        low=-bound,
        high=bound,
        priors=priors,
        graphs=False,
    )
    with step:
        for _ in range(recipe.iterations[0]):
            step.iterate(torch.tensor([[0, 0, max(1, side // 2), max(1, side // 2), 1, 1, 1]], dtype=torch.int32))


def peak_bytes(device: torch.device, work: Callable[[], None]) -> int:
    """Most bytes that the work holds at once, beyond what was there before."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveTensors() as live:
        work()
    return live.peak


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._take(leaf)
        return found

    def _take(self, tensor: Tensor) -> None:
        if tensor.is_mkldnn:  # packed weights: a teacher's own, made once, and no storage to look into
            return
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def free_bytes(device: torch.device) -> int:
    """Bytes a step can have: on a GPU free ones and those torch caches; on a CPU what the system and its limits leave."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").is_file() else []
    found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    if "MemAvailable" not in found:
        raise UserError("this system does not say how much memory is free: give --memory-limit in GB")
    spare = limits.spare()
    bounded = [] if spare is None else [max(0, spare - _LIBRARIES)]
    return min([found["MemAvailable"], *_left_of_cgroup(), *bounded])


def map_bytes(precision: str) -> int:
    """Bytes of a value that training keeps, at least: "auto" may be half of fp32's."""
    return 2 if precision in ("auto", "bf16", "fp16") else 4


def beyond_memory(what: str, needed: int, device: str) -> list[str]:
    """The fault that `needed` bytes, which `what` surely takes at once, are more than the whole device (or host) has.

    Less than that, but more than is free at the moment, is said as a warning, once.
    """
    where = pick_device(device)
    whole = total_bytes(where)
    if whole is None:
        return []
    if needed <= whole:
        with contextlib.suppress(UserError):
            free = free_bytes(where)
            if needed > free and what not in _scarce:
                _scarce.add(what)
                logger.warning(
                    "%s: keeps at least %s at once, %s are free at the moment", what, _text(needed), _text(free)
                )
        return []
    return [f"{what}: keeps at least {_text(needed)} at once, the memory has {_text(whole)}; take a smaller number"]


def total_bytes(device: torch.device) -> int | None:
    """All memory there is, free or not: the GPU's, or the system's with its swap and within its limits; None if not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.endswith("kB")}
        whole, swap = found["MemTotal"], found.get("SwapTotal", 0)
    except (OSError, ValueError, KeyError, IndexError):
        return None
    try:
        whole = min(whole, int((_CGROUP / "memory.max").read_text()))
    except (OSError, ValueError):  # no limit
        pass
    limit = limits.address_space()
    return whole + swap if limit is None else min(whole + swap, limit)


def _left_of_cgroup() -> list[int]:
    """What a container's limit leaves; nothing where there is none."""
    try:
        most = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        cached = [
            line for line in (_CGROUP / "memory.stat").read_text().splitlines() if line.startswith("inactive_file ")
        ]
        return [] if most == "max" else [int(most) - used + int(cached[0].split()[1])]
    except (OSError, ValueError, IndexError):
        return []


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error is a device's or the host's way to say that the memory is full."""
    return isinstance(error, torch.OutOfMemoryError) or bool(causes.out_of_memory(error))


def too_small(memory: StepMemory | None, rows: int, free: int, precision: str) -> UserError:
    """The error for one segment that does not fit: what it needs, what is free, what to change."""
    needs = f", they need about {_text(memory.of(rows))}" if memory is not None else ""
    half = "" if precision in ("bf16", "fp16") else "precision bf16, "
    return UserError(
        f"{rows} images at once do not fit the memory{needs}; {_text(free)} are free. Use {half}a smaller "
        "group_size, a device with more memory, or a smaller segment_size (part of the method: it changes the BN statistics); "
        "what is finished is kept"
    )


def _text(size: float) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
