"""The processes of one torchrun job: which one this is, waiting for each other, and sharing out numbered work."""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from fd2fast.errors import UserError

T = TypeVar("T")

# waves of a large set take hours; a peer that dies ends the job at once, through torchrun
_PATIENCE = datetime.timedelta(days=30)


def is_first() -> bool:
    """Whether this process speaks for its job: the only one, or rank 0."""
    return os.environ.get("RANK", "0") == "0"


def local_count() -> int:
    """Processes of the job on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class Workers:
    """All processes of the job, seen from this one; every process must make the same calls in the same order."""

    def __init__(self, rank: int = 0, world: int = 1, store: Any = None):
        """store: torch.distributed store that all processes reach; not needed by one alone."""
        self.rank, self.world = rank, world
        self._store = store
        self._shared = 0
        self._told = 0

    def wait(self) -> None:
        """Return when every process has come here; UserError when one of them is gone."""
        if self.world > 1:
            import torch.distributed as dist

            with _together():
                dist.barrier()

    def share(self, count: int) -> Iterator[int]:
        """Numbers 0 .. count-1 in rising order, each to one process only: to whichever asks first."""
        self._shared += 1
        if self.world == 1:
            yield from range(count)
            return
        while (number := self._next()) < count:
            yield number

    def _next(self) -> int:
        with _together():
            return int(self._store.add(f"shared/{self._shared}", 1)) - 1

    def told(self, call: Callable[[], T]) -> T:
        """What `call()` gives the first process, which alone makes it: a value that JSON can hold, for all of them."""
        if self.world == 1:
            return call()
        self._told += 1
        key = f"told/{self._told}"
        found = json.dumps(call()) if self.rank == 0 else ""
        with _together():
            if self.rank == 0:
                self._store.set(key, found)
            return json.loads(self._store.get(key))

    def first(self, call: Callable[[], T]) -> T:
        """`call()` by rank 0, then by the others (who find what it made), and nobody goes on before all are done."""
        if self.rank == 0:
            found = call()
            self.wait()
        else:
            self.wait()
            found = call()
        self.wait()
        return found


@contextlib.contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of gloo or the store: the connection is closed
        raise UserError(
            "another process of this job has ended (and said why if it could); "
            "what is finished is kept: run the same command again"
        ) from error


@functools.cache
def current() -> Workers:
    """The job that torchrun (or RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) says this process belongs to."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return Workers()
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    store, rank, world = next(rendezvous("env://", timeout=datetime.timedelta(minutes=5)))
    store.set_timeout(_PATIENCE)
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("group", store), rank=rank, world_size=world, timeout=_PATIENCE
    )
    return Workers(rank, world, dist.PrefixStore("fd2fast", store))
