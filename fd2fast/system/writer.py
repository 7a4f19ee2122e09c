"""Files written behind the running work: copies that leave a device without stopping it, and one thread that saves them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


def to_host(tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
    """Begin to copy tensors to the host as they are now; the function returned waits for the copies and gives them.

    On a GPU the copies take their turn in the current stream and end in pinned memory; the host goes on at once.
    """
    copies: dict[str, Tensor] = {}
    copied = None
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        if tensor.device.type == "cuda":
            copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            copies[name].copy_(tensor, non_blocking=True)
        else:
            copies[name] = tensor.clone(memory_format=torch.contiguous_format)
    if any(t.device.type == "cuda" for t in tensors.values()):
        copied = torch.cuda.Event()
        copied.record()

    def result() -> dict[str, Tensor]:
        if copied is not None:
            copied.synchronize()
        return copies

    return result


class Writer:
    """One background thread that runs jobs in the order given; what a job raises comes out of the next call."""

    def __init__(self, depth: int = 4):
        """depth: jobs that may wait before `submit` does."""
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fd2fast-writer")
        self._jobs: deque[Future[None]] = deque()
        self._depth = depth

    @property
    def busy(self) -> bool:
        """Whether a job is waiting or running."""
        self._collect(len(self._jobs))
        return bool(self._jobs)

    def submit(self, job: Callable[..., Any], *arguments: Any) -> None:
        """Run the job later; waits while too many others do."""
        self._collect(self._depth)
        self._jobs.append(self._pool.submit(job, *arguments))

    def flush(self) -> None:
        """Wait for every job."""
        self._collect(0)

    def _collect(self, most: int) -> None:
        """Take finished jobs away, and wait until at most `most` are left."""
        while self._jobs and (len(self._jobs) > most or self._jobs[0].done()):
            self._jobs.popleft().result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self.flush()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
