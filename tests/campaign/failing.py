"""A process whose disk or memory fails from one of its operations on; which one, and how, is asked at each of them."""

from __future__ import annotations

import collections
import errno
import os
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from . import layer

DISK = ("ENOSPC", "EIO", "EDQUOT", "EROFS")
MEMORY = ("torch memory", "python memory")
# Operations that need no room: a full disk allows them after the first that failed.
FREEING = ("unlink", "rmdir")
# Operations of torch that end the memory at once are those of one thread; the files' may come from any.
Choose = Callable[[str, int, Collection[str]], str | None]


class Failing:
    """Asks `choose` (place, how often it was met before, kinds of fault that it can meet) until that names a fault.

    A place is a kind of operation (of torch: its name) and `layer.site`. Once struck, a disk that is full or read-only stays so;
    EIO and the end of memory come once.
    """

    def __init__(self, root: Path, choose: Choose, *, disk: bool, memory: bool):
        """disk, memory: which operations are watched."""
        self.choose, self.disk, self.memory = choose, disk, memory
        self.layer = layer.Layer(root, self._file)
        self._fault: str | None = None
        self._met: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()

    def install(self) -> None:
        """In the thread whose operations of torch are meant."""
        if self.disk:
            self.layer.install()
        if self.memory:
            self._watch_torch()

    def met(self, place: str, times: int) -> bool:
        """Whether the place was met more than so many times."""
        return self._met[place] > times

    def _asked(self, operation: str, kinds: Collection[str]) -> bool:
        """Whether this operation is the one that fails."""
        if self._fault is not None:
            return False
        place = f"{operation} {layer.site()}"
        with self._lock:
            before = self._met[place]
            self._met[place] += 1
        fault = self.choose(place, before, kinds)
        if fault is None:
            return False
        self._fault = fault
        return True

    def _file(self, number: int, kind: str, path: str) -> None:
        first = self._asked(kind, DISK)
        fault = self._fault
        if fault not in DISK or (fault == "EIO" and not first):
            return
        if kind in FREEING and not first and fault != "EROFS":
            return
        if kind == "native":
            raise RuntimeError(
                "[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"  # what torch's writer says
            )
        code = getattr(errno, fault)
        raise OSError(code, os.strerror(code), path)

    def _watch_torch(self) -> None:
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode

        failing = self

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
                if failing._asked(str(function), MEMORY):
                    if failing._fault == "python memory":
                        raise MemoryError
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
                return function(*arguments, **(named or {}))

        Mode().__enter__()


def at(root: Path, fault: str, place: str, times: int) -> Callable[[], None]:
    """For `forks.run(before=...)`: `fault` when `place` is met after `times` before."""

    def choose(met: str, before: int, kinds: Collection[str]) -> str | None:
        return fault if (met, before) == (place, times) and fault in kinds else None

    return lambda: Failing(root, choose, disk=fault in DISK, memory=fault in MEMORY).install()


def counter(root: Path, into: Path) -> Callable[[], None]:
    """For `forks.run(before=...)`: the places of torch's operations, one a line, in the file `into`."""

    def before() -> None:
        log = open(into, "a", encoding="utf-8", buffering=1)  # noqa: SIM115

        def choose(place: str, times: int, kinds: Collection[str]) -> None:
            log.write(f"{place}\n")

        Failing(root, choose, disk=False, memory=True).install()

    return before
