"""One run of a command that forks at its operations: each fork meets a fault there and ends, the run itself goes on unhurt."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import failing, forks, states

# Threads that a fork does without: they wait for signals, for the next sign of life of a lock (15 s), to draw slow bars (10 s).
QUIET = ("fd2fast-lock", "fd2fast-stopping", "tqdm_monitor")
# Seconds that threads which write behind the work may take to come to rest.
_REST = 20.0


class Executors:
    """The thread pools of this process and their jobs, so that a fork can begin their threads anew."""

    def __init__(self) -> None:
        self._jobs: weakref.WeakKeyDictionary[ThreadPoolExecutor, list[Future[Any]]] = weakref.WeakKeyDictionary()
        self._thread = threading.local()

    def watch(self, point: Callable[[], int]) -> None:
        """From now on. point: how far the main thread is."""
        submit, jobs, thread = ThreadPoolExecutor.submit, self._jobs, self._thread

        def submitted(pool: ThreadPoolExecutor, call: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
            now = point()

            def marked() -> Any:
                thread.point = now
                return call(*arguments, **named)

            future = submit(pool, marked)
            left = [job for job in jobs.get(pool, []) if not job.done()]
            jobs[pool] = [*left, future]
            return future

        setattr(ThreadPoolExecutor, "submit", submitted)  # noqa: B010

    @property
    def asked_at(self) -> int | None:
        """How far the main thread was when it asked for the job that the calling thread does."""
        return getattr(self._thread, "point", None)

    def rest(self) -> bool:
        """Wait until no job is left; False where that takes too long."""
        deadline = time.monotonic() + _REST
        while any(not job.done() for jobs in list(self._jobs.values()) for job in jobs):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.0005)
        return True

    @property
    def threads(self) -> set[threading.Thread]:
        """Of all pools."""
        return {thread for pool in list(self._jobs) for thread in pool._threads}

    def begin_anew(self) -> None:
        """In a fork, where no thread but one has come along: pools at rest begin threads with the next job."""
        for pool in list(self._jobs):
            inner: Any = pool
            inner._threads = set()
            inner._work_queue = queue.SimpleQueue()
            inner._idle_semaphore = threading.Semaphore(0)
            inner._shutdown_lock = threading.Lock()


class Wanted:
    """Which faults are still to be met at which places: each place once, or each time that it is met."""

    def __init__(self, faults: Collection[str], each_time: bool, among: Callable[[str], bool] = lambda trial: True):
        """among: whether a trial, FAULT/PLACE/TIMES, is asked for at all."""
        self.faults, self.each_time, self._among = faults, each_time, among
        self._met: set[tuple[str, str, int]] = set()

    def met(self, fault: str, place: str, times: int) -> None:
        """This one was, after so many times before."""
        self._met.add((fault, place, times if self.each_time else 0))

    def at(self, fault: str, place: str, times: int) -> bool:
        """Whether it is still to be met."""
        new = (fault, place, times if self.each_time else 0) not in self._met
        return new and self._among(f"{fault}/{place}/{times}")


@dataclass(frozen=True)
class Aim:
    """A fault at a place in another thread, whose job was asked for when the main one had come by so many points.

    A point is an operation of disk or torch.
    """

    fault: str
    place: str
    times: int
    point: int


class Sweep:
    """For `forks.run(before=Sweep(...).begin)`; `results` gives what its forks came to."""

    def __init__(
        self,
        out: Path,
        into: Path,
        wanted: Wanted,
        *,
        aims: Collection[Aim] = (),
        seen: Collection[str] = (),
        most: int = 1 << 30,
    ):
        """out: where the command works; into: a folder of the same file system for results.

        aims: met by forks that begin ahead of them. seen: states of which no copy is needed. most: forks after which the run
        ends, at the end of a place.
        """
        self.out, self.into, self.wanted, self.seen, self.most = out, into, wanted, seen, most
        self.aims = sorted(aims, key=lambda aim: aim.point)
        self.forks = 0
        self.executors = Executors()
        self._points = 0
        self._fork = False  # whether this is one
        self._aim: Aim | None = None

    def begin(self) -> None:
        disk, memory = (any(fault in kinds for fault in self.wanted.faults) for kinds in (failing.DISK, failing.MEMORY))
        (self.into / "states").mkdir(parents=True, exist_ok=True)
        self._report = open(self.into / "forks.jsonl", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self.executors.watch(lambda: self._points)
        self.failing = failing.Failing(self.out, self._choose, disk=disk, memory=memory)
        self.failing.install()
        if not memory:
            self._count_torch()

    def _count_torch(self) -> None:
        """Torch's operations are points too."""
        from torch.utils._python_dispatch import TorchDispatchMode

        sweep = self

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
                sweep._point()
                return function(*arguments, **(named or {}))

        Mode().__enter__()

    def _choose(self, place: str, times: int, kinds: Collection[str]) -> str | None:
        if self._fork:
            aim = self._aim
            if aim is None or (aim.place, aim.times) != (place, times) or aim.fault not in kinds:
                return None
            (self.into / "struck").touch()
            return aim.fault
        self._point()
        chosen = [fault for fault in self.wanted.faults if fault in kinds and self.wanted.at(fault, place, times)]
        point = self.executors.asked_at
        aims = [Aim(fault, place, times, self._points if point is None else point) for fault in chosen]
        if not aims or self._fork:
            return None
        if reason := self._reason_against():
            self._tell({"not forked": reason, "aims": [asdict(aim) for aim in aims]})
            return None
        return aim.fault if (aim := self._fork_for(aims)) is not None else None

    def _point(self) -> None:
        """Fork for what is aimed at from here, unless it was met already."""
        if self._fork or threading.current_thread() is not threading.main_thread():
            return
        self._points += 1
        if not self.aims or self.aims[0].point > self._points or self._reason_against():
            return
        due = [aim for aim in self.aims if aim.point <= self._points]
        self.aims = self.aims[len(due) :]
        if due := [aim for aim in due if not self.failing.met(aim.place, aim.times)]:
            self._aim = self._fork_for(due, ahead=True)

    def _fork_for(self, aims: Sequence[Aim], ahead: bool = False) -> Aim | None:
        """One fork after the other; in each, what it is for. None in the run itself, whose folder is as it was."""
        watched = self.failing.layer
        watched.paused = True
        kept = states.Kept(self.out, self.into / "links")
        for aim in aims:
            if (child := self._forked()) == 0:
                watched.paused = False
                return aim
            line = self._end_of(child)
            struck = not ahead or (self.into / "struck").exists()
            (self.into / "struck").unlink(missing_ok=True)
            if struck:
                self._tell({"fault": aim.fault, "place": aim.place, "times": aim.times, **line})
                self.wanted.met(aim.fault, aim.place, aim.times)
            kept.put_back()
            self.forks += 1
        kept.drop()
        watched.paused = False
        if self.forks >= self.most:
            self._tell({"stopped": True})
            os._exit(0)
        return None

    def _tell(self, line: dict[str, Any]) -> None:
        self._report.write(json.dumps(line) + "\n")

    def _reason_against(self) -> str:
        """Why no fork can stand for this process here; empty where one can. Threads behind the work are at rest then."""
        if threading.current_thread() is not threading.main_thread():
            return "another thread"
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            return "other processes"
        if not self.executors.rest():
            return "threads at work"
        known = {threading.main_thread()} | self.executors.threads
        others = [t.name for t in threading.enumerate() if t not in known and t.name not in QUIET]
        return f"threads: {', '.join(others)}" if others else ""

    def _forked(self) -> int:
        """0 in the fork, which owns what this process owns and speaks into files."""
        from fd2fast.system import lock

        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        owned, parent = dict(lock._table), os.getpid()
        child = os.fork()
        if child:
            return child
        forks.end_with(parent)
        self._fork = True
        lock._table.update(owned)
        for hold in owned.values():
            hold.pid = os.getpid()
        self.executors.begin_anew()
        for number, name in ((1, "out"), (2, "err")):
            opened = os.open(self.into / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(opened, number)
            os.close(opened)
        return 0

    def _end_of(self, child: int) -> dict[str, Any]:
        """How a fork ended, what it said, and the state of the folder, whose copy lies in INTO/states."""
        began, hung = time.monotonic(), False
        while True:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            if not hung and time.monotonic() - began > forks.PATIENCE:
                hung = True
                os.kill(child, signal.SIGKILL)
            time.sleep(0.001)
        said = [(self.into / name).read_text(encoding="utf-8", errors="replace") for name in ("out", "err")]
        state = states.read(self.out)
        name = states.digest(state)
        if name not in self.seen and not (copy := self.into / "states" / name).exists():
            states.copy(state, copy)
        seconds = time.monotonic() - began
        code = os.waitstatus_to_exitcode(status)
        return {"code": code, "out": said[0], "err": said[1], "seconds": seconds, "hung": hung, "state": name}


def results(into: Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's forks."""
    with contextlib.suppress(FileNotFoundError), open(into / "forks.jsonl", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def ended(line: dict[str, Any]) -> forks.Ended:
    """How the fork of a line ended."""
    return forks.Ended(line["code"], line["out"], line["err"], line["seconds"], line["hung"])
