"""Runs independent tasks side by side, one process a core with one thread each; results do not depend on how many."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fd2fast.errors import UserError
from fd2fast.system import threads
from fd2fast.system.streams import open_closed, steady

# Variables of a torchrun job, which its processes' children do not belong to.
_JOB = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK", "ROLE_RANK")


@dataclass(frozen=True)
class Task:
    """A call to be made: `function` ("fd2fast.module:name") is given `arguments` (JSON) and a function for its reports."""

    name: str  # as people know it, for messages
    function: str
    arguments: dict[str, Any]


def side_by_side(
    tasks: Sequence[Task], report: Callable[[int, dict[str, Any]], None], *, processes: int | None = None
) -> Iterator[tuple[int, Any]]:
    """(index, result) of each task as it ends; `report` is given (index, what the task tells) meanwhile.

    processes: None for as many as `threads.budget` and the tasks allow; with 1 the tasks run here, one after the other, in one
    thread on a CPU. Results and reports are JSON values. The first task that fails ends the others, whose saved work stays.
    Raises UserError with the task's name for its UserError and for a process that died, RuntimeError for other errors.
    """
    count = min(threads.budget() if processes is None else processes, len(tasks))
    if count > 1:
        yield from _by_processes(tasks, report, count)
        return
    with _threads(1 if processes is None else None):
        for index, task in enumerate(tasks):
            try:
                yield index, _call(task.function, task.arguments, functools.partial(report, index))
            except UserError as error:
                raise UserError(f"{task.name}: {error}") from error


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _call(function: str, arguments: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> Any:
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)(arguments, report)


class _Worker:
    """A process that makes one call after the other; its lines arrive in a queue with its number."""

    def __init__(self, number: int, inbox: queue.Queue[tuple[int, dict[str, Any] | None]]):
        environment = {k: v for k, v in os.environ.items() if k not in _JOB}
        environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "FD2FAST_PROGRESS": "0"}
        # the same modules as here, wherever this was started
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self.number = number
        self.task: int | None = None
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fd2fast.system.tasks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        self._listener = threading.Thread(target=self._listen, args=(inbox,), daemon=True)
        self._listener.start()

    def _listen(self, inbox: queue.Queue[tuple[int, dict[str, Any] | None]]) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            inbox.put((self.number, json.loads(line)))
        inbox.put((self.number, None))

    def begin(self, index: int, task: Task) -> None:
        assert self.process.stdin is not None
        self.task = index
        with contextlib.suppress(BrokenPipeError):  # it died: its end is in the queue
            self.process.stdin.write(json.dumps({"function": task.function, "arguments": task.arguments}) + "\n")
            self.process.stdin.flush()

    def end(self) -> None:
        """No more tasks; one at work is killed."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if self.task is not None:
            self.process.kill()
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.wait()
        self._listener.join()
        self.process.stdout.close()


def _by_processes(
    tasks: Sequence[Task], report: Callable[[int, dict[str, Any]], None], count: int
) -> Iterator[tuple[int, Any]]:
    inbox: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
    waiting = list(enumerate(tasks))[::-1]
    workers: list[_Worker] = []
    try:
        for number in range(count):
            workers.append(_Worker(number, inbox))
            workers[-1].begin(*waiting.pop())
        left = len(tasks)
        while left:
            number, message = inbox.get()
            worker = workers[number]
            if worker.task is None:  # it has nothing to do and is gone
                continue
            task = tasks[worker.task]
            if message is None:
                raise _died(task, worker.process.wait())
            if "report" in message:
                report(worker.task, message["report"])
            elif "error" in message:
                if message["user"]:
                    raise UserError(f"{task.name}: {message['error']}")
                unforeseen = RuntimeError(f"{task.name}: {message['error']}")
                unforeseen.add_note(message["details"])
                raise unforeseen
            else:
                index, worker.task = worker.task, None
                left -= 1
                if waiting:
                    worker.begin(*waiting.pop())
                yield index, message["result"]
    finally:
        for worker in workers:
            worker.end()


def _died(task: Task, code: int) -> UserError:
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return UserError(f"{task.name}: its process ended with {how}{hint}; what is finished is kept, run the same again")


def _serve() -> None:
    """The worker's side: calls from stdin, one JSON object a line, results to stdout; ends with the process that asks."""
    open_closed()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; who asks decides
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print
    calls: queue.Queue[str] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            calls.put(line)
        os._exit(0)  # nobody waits for a result any more

    threading.Thread(target=listen, daemon=True).start()

    def say(message: dict[str, Any]) -> None:
        out.write(json.dumps(message) + "\n")
        out.flush()

    while True:
        call = json.loads(calls.get())
        try:
            found = _call(call["function"], call["arguments"], lambda state: say({"report": state}))
        except Exception as error:
            if isinstance(error, UserError):
                say({"error": str(error), "user": True})
            else:
                import traceback

                details = "".join(traceback.format_exception(error))
                told = " ".join(f"{type(error).__name__}: {error}".split())[:500]
                say({"error": told, "user": False, "details": details})
        else:
            say({"result": found})


if __name__ == "__main__":
    with steady():
        _serve()
