"""Tasks side by side: results by task, reports, failures by name, processes that die, nothing left behind."""

import os
import signal
import sys
import time

import pytest

from fd2fast.errors import UserError
from fd2fast.system import tasks as pool
from fd2fast.system.tasks import Task, side_by_side

HERE = "test_pool_calls"


@pytest.fixture(autouse=True)
def _calls(tmp_path, monkeypatch):
    """A module that the processes can import."""
    (tmp_path / f"{HERE}.py").write_text(
        """
import os, signal, time
from fd2fast.errors import UserError

def square(given, report):
    for step in range(given["steps"]):
        report({"step": step})
    return {"square": given["x"] ** 2, "pid": os.getpid(), "threads": os.environ.get("OMP_NUM_THREADS")}

def talk(given, report):
    print("libraries print")
    return 1

def refuse(given, report):
    raise UserError("x must be even")

def fail(given, report):
    raise KeyError("of the code")

def die(given, report):
    os.kill(os.getpid(), signal.SIGKILL)

def sleep(given, report):
    report({"pid": os.getpid()})
    time.sleep(600)
"""
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop(HERE, None)


def task(name, **given):
    return Task(f"task {name}", f"{HERE}:{name}", given)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_task_is_done_once_with_its_reports(processes):
    reports = []
    tasks = [task("square", x=x, steps=x) for x in range(5)]
    found = dict(side_by_side(tasks, lambda i, state: reports.append((i, state["step"])), processes=processes))
    assert {i: r["square"] for i, r in found.items()} == {x: x * x for x in range(5)}
    assert sorted(reports) == [(i, step) for i in range(5) for step in range(i)]
    assert (os.getpid() in {r["pid"] for r in found.values()}) is (processes == 1)
    assert len({r["pid"] for r in found.values()}) <= processes
    if processes > 1:
        assert {r["threads"] for r in found.values()} == {"1"}


def test_as_many_processes_as_the_environment_allows(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    found = dict(side_by_side([task("square", x=x, steps=0) for x in range(6)], lambda *_: None))
    assert len({r["pid"] for r in found.values()}) == 2


@pytest.mark.parametrize("processes", [1, 2])
def test_what_libraries_print_does_not_disturb(processes):
    assert dict(side_by_side([task("talk")] * 3, lambda *_: None, processes=processes)) == {0: 1, 1: 1, 2: 1}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_failing_task_is_named(processes):
    tasks = [task("square", x=1, steps=0), task("refuse"), task("square", x=2, steps=0)]
    with pytest.raises(UserError, match="task refuse: x must be even"):
        list(side_by_side(tasks, lambda *_: None, processes=processes))


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match=r"(?s)task fail: .*KeyError: 'of the code'"):
        list(side_by_side([task("fail")] * 2, lambda *_: None, processes=2))


def test_a_process_that_dies_is_named_and_the_others_end():
    pids = []
    tasks = [task("sleep"), task("die")]
    with pytest.raises(UserError, match=r"task die: its process ended with signal SIGKILL \(out of memory\?\)"):
        list(side_by_side(tasks, lambda i, state: pids.append(state["pid"]), processes=2))
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_an_interrupt_ends_all_at_once():
    pids = []

    def interrupt(index, state):
        pids.append(state["pid"])
        if len(pids) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(side_by_side([task("sleep")] * 3, interrupt, processes=2))
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_worker_ends_when_nobody_asks_any_more(tmp_path):
    worker = pool._Worker(0, pool.queue.Queue())
    worker.begin(0, task("sleep"))
    worker.process.stdin.close()  # as when the parent is killed
    assert worker.process.wait(timeout=600) == 0
    worker.end()


def test_a_terminal_interrupt_is_left_to_the_parent():
    inbox = pool.queue.Queue()
    worker = pool._Worker(0, inbox)
    worker.begin(0, task("sleep"))
    inbox.get(timeout=600)  # it works
    worker.process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    assert worker.process.poll() is None
    worker.end()
    assert worker.process.returncode == -signal.SIGKILL
