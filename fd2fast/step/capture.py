"""Captures an iteration as a CUDA graph and replays it: which graph, when it is recorded, and what happens where it cannot be."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor

log = logging.getLogger("fd2fast")

Work = Callable[[], Tensor]

# Eager iterations of a kind before it is recorded: kernels are compiled and loaded, algorithms chosen, constants copied.
WARM_UPS = 1
# More kinds than this stay eager: each graph holds host memory for its nodes.
MOST_GRAPHS = 32

_told: set[str] = set()


class Recorder(Protocol):
    """What `Captures` needs of a device. Work reads and writes buffers that stay where they are, and returns a tensor."""

    def warm_up(self, work: Work) -> Tensor:
        """Run the work as it is, in the surroundings of a recording; its result."""

    def record(self, work: Work) -> Work:
        """Record the work without running it; a function that runs the recording and gives a result of its own."""

    def release(self) -> None:
        """Let go of what recordings shared; they are gone."""


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all steps: libraries keep a workspace for each stream they were used on."""
    return torch.cuda.Stream(device)


class CudaRecorder:
    """CUDA graphs that share one memory pool; warmed up and recorded on one side stream.

    Sharing is safe because nothing but the returned result outlives a replay inside the pool, and that is never freed while
    its graph lives; replays follow each other on one stream.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = _side_stream(device)
        self._pool: Any = None  # a pool handle of torch's allocator

    def warm_up(self, work: Work) -> Tensor:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                found = work()
        finally:
            current.wait_stream(self._stream)
        # the caller's stream may go on reading while the side stream uses the memory again
        return found.clone()

    def record(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.device(self._device):
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            try:
                # thread_local: a writer or a loader in another thread may allocate meanwhile
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    found = work()
            except BaseException:
                torch.cuda.set_stream(current)  # a failed capture may leave its own (torch before 2.12)
                raise

        def replay() -> Tensor:
            graph.replay()
            return found.clone()

        return replay

    def release(self) -> None:
        self._pool = None
        torch.cuda.synchronize(self._device)  # the last replay may still be running in the pool


class Captures:
    """One recording for each kind of work, by key: eager at first, then recorded once and replayed.

    The first WARM_UPS runs of a kind are ordinary ones, so nothing needs to be saved or restored: recording executes
    nothing. Where recording fails, everything is eager from then on, with the reason logged once.
    """

    def __init__(self, recorder: Recorder):
        self._recorder = recorder
        self._replays: dict[Hashable, Work] = {}
        self._warm: dict[Hashable, int] = {}
        self.reason: str | None = None  # why everything is eager
        self.replayed = False  # whether the last run was a replay

    def __len__(self) -> int:
        return len(self._replays)

    def run(self, key: Hashable, work: Work) -> Tensor:
        """Do the work once, however; raises what the work raises when it runs eagerly."""
        self.replayed = False
        if key in self._replays:
            return self._replay(key)
        if self.reason is not None or len(self._replays) >= MOST_GRAPHS:
            return work()
        if self._warm.get(key, 0) < WARM_UPS:
            found = self._recorder.warm_up(work)
            self._warm[key] = self._warm.get(key, 0) + 1
            return found
        try:
            self._replays[key] = self._recorder.record(work)
        except Exception as error:  # a fallback module may do anything that cannot be captured
            self._give_up(error)
        if self.reason is None:
            return self._replay(key)
        self.clear()
        return work()

    def _replay(self, key: Hashable) -> Tensor:
        self.replayed = True
        return self._replays[key]()

    def _give_up(self, error: Exception) -> None:
        told = str(error).strip().splitlines()
        self.reason = f"{type(error).__name__}: {told[0] if told else 'no reason given'}"
        if self.reason not in _told:
            _told.add(self.reason)
            log.warning("iterations run without CUDA graphs: %s", self.reason)

    def clear(self) -> None:
        """Forget all recordings and their memory; what comes next is warmed up and recorded anew."""
        had = bool(self._replays) or bool(self._warm)
        self._replays.clear()
        self._warm.clear()
        if had:
            self._recorder.release()
