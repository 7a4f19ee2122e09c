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
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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

    def watch(self) -> None:
        """From now on."""
        submit, jobs = ThreadPoolExecutor.submit, self._jobs

        def submitted(pool: ThreadPoolExecutor, call: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
            future = submit(pool, call, *arguments, **named)
            left = [job for job in jobs.get(pool, []) if not job.done()]
            jobs[pool] = [*left, future]
            return future

        setattr(ThreadPoolExecutor, "submit", submitted)  # noqa: B010

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

    def __init__(self, faults: Collection[str], each_time: bool):
        self.faults, self.each_time = faults, each_time
        self._met: set[tuple[str, str, int]] = set()

    def met(self, fault: str, place: str, times: int) -> None:
        """This one was, after so many times before."""
        self._met.add((fault, place, times if self.each_time else 0))

    def at(self, fault: str, place: str, times: int) -> bool:
        """Whether it is still to be met."""
        return (fault, place, times if self.each_time else 0) not in self._met


class Sweep:
    """For `forks.run(before=Sweep(...).begin)`; `results` gives what its forks came to."""

    def __init__(self, out: Path, into: Path, wanted: Wanted, seen: Collection[str] = (), most: int = 1 << 30):
        """out: where the command works; into: a folder of the same file system for results.

        seen: states of which no copy is needed. most: forks after which the run ends, at the end of a place.
        """
        self.out, self.into, self.wanted, self.seen, self.most = out, into, wanted, seen, most
        self.forks = 0
        self.executors = Executors()
        self.fork = False  # whether this is one

    def begin(self) -> None:
        disk, memory = (any(fault in kinds for fault in self.wanted.faults) for kinds in (failing.DISK, failing.MEMORY))
        (self.into / "states").mkdir(parents=True, exist_ok=True)
        self._report = open(self.into / "forks.jsonl", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self.executors.watch()
        self.failing = failing.Failing(self.out, self._choose, disk=disk, memory=memory)
        self.failing.install()

    def _choose(self, place: str, times: int, kinds: Collection[str]) -> str | None:
        if self.fork:
            return None
        chosen = [fault for fault in self.wanted.faults if fault in kinds and self.wanted.at(fault, place, times)]
        if not chosen:
            return None
        if reason := self._reason_against():
            self._tell({"place": place, "times": times, "faults": chosen, "not forked": reason})
            return None
        self.failing.layer.paused = True
        kept = states.Kept(self.out, self.into / "links")
        for fault in chosen:
            if (child := self._forked()) == 0:
                self.failing.layer.paused = False
                return fault
            self._tell({"place": place, "times": times, "fault": fault, **self._end_of(child)})
            kept.put_back()
            self.wanted.met(fault, place, times)
            self.forks += 1
        kept.drop()
        self.failing.layer.paused = False
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
        from fd2fast import lock

        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        owned = dict(lock._table)
        child = os.fork()
        if child:
            return child
        self.fork = True
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
