"""The owner of an output folder: refusals, stale locks, takers at once, jobs of several processes, and what a job loses."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fd2fast import artifacts
from fd2fast.errors import UserError
from fd2fast.system import lock

DEAD = 0x7FFFFFF0  # above every system's largest process id


@dataclasses.dataclass(frozen=True)
class Config:
    text: str = "x"


def make(folder: Path, text: str = "x", *, overwrite: bool = False, parents: dict | None = None) -> artifacts.Artifact:
    stage = artifacts.open_stage(folder, "thing", Config(text), parents or {}, overwrite=overwrite)
    return stage.finished or finish(stage, text)


def finish(stage: artifacts.Stage, text: str = "x") -> artifacts.Artifact:
    artifacts.write_bytes(stage.path / "file.txt", text.encode())
    return stage.finish(classes=["a", "b"], size=8, mean=(0.5,) * 3, std=(0.2,) * 3)


def owner(**changes: object) -> dict:
    """A lock of this machine whose process has ended; with changes that of another one."""
    return dataclasses.asdict(lock._owner("0123456789abcdef" * 2)) | {"pid": DEAD} | changes


def elsewhere(**changes: object) -> dict:
    return owner(host="node7", machine="", boot="b" * 36, pid=4242, command="fd2fast pretrain --out O", **changes)


def leave(folder: Path, content: object, age: float = 0.0) -> Path:
    """A lock file in the folder, last renewed `age` seconds ago."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / lock.LOCK
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    now = file.stat().st_mtime
    os.utime(file, (now - age, now - age))
    return file


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


JOB = """
import os, signal, sys
from dataclasses import dataclass
from pathlib import Path
from fd2fast import artifacts
from fd2fast.errors import UserError
@dataclass(frozen=True)
class Config:
    text: str = "x"
folder, text = Path(sys.argv[1]), sys.argv[2]
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored where the tests run under nohup
try:
    stage = artifacts.open_stage(folder, "thing", Config(text), {}, overwrite="--overwrite" in sys.argv)
    artifacts.write_bytes(folder / "file.txt", text.encode())
    print("ready", flush=True)
    if (said := sys.stdin.readline().strip()) == "raise":
        raise RuntimeError("meant")
    if said == "finish":
        print(stage.finish(classes=["a", "b"], size=8, mean=(.5,) * 3, std=(.2,) * 3).id)
except UserError as error:
    print("refused:", error)
except KeyboardInterrupt:
    print("stopped")
"""


class Job:
    """Another process that makes the thing in `folder` and waits half-way."""

    def __init__(self, folder: Path, text: str = "x", *flags: str):
        command = [sys.executable, "-c", JOB, str(folder), text, *flags]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.pid = self.process.pid
        self.first = self.process.stdout.readline().decode().strip()

    def end(self, said: str = "finish") -> str:
        out, err = self.process.communicate(said.encode() + b"\n", timeout=60)
        self.error = err.decode()
        return out.decode().strip()

    def kill(self, number: int) -> int:
        self.process.send_signal(number)
        self.process.communicate(timeout=60)
        return self.process.returncode


@pytest.fixture(autouse=True)
def _nothing_is_left():
    yield
    for held in list(lock._table.values()):
        lock._give_free(held)
    lock._table.clear()
    lock._default_signals()


# a running job


def test_a_folder_at_work_is_refused_whatever_is_asked_for_and_its_job_ends_well(tmp_path):
    job = Job(tmp_path / "a")
    assert job.first == "ready"
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*") if p.name != lock.LOCK}
    for text, overwrite in (("x", False), ("y", False), ("x", True), ("y", True)):
        with pytest.raises(lock.InUse, match=f"a is in use by process {job.pid} on .* since .* UTC .*another output"):
            make(tmp_path / "a", text, overwrite=overwrite)
    with pytest.raises(UserError, match=f"is being made by process {job.pid}"):
        artifacts.load(tmp_path / "a")
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*") if p.name != lock.LOCK} == before
    assert job.end() == artifacts.load(tmp_path / "a").id
    assert names(tmp_path / "a") == ["file.txt", "manifest.json"]
    assert make(tmp_path / "a", "y", overwrite=True).config == {"text": "y"}


def test_the_second_command_is_the_one_that_is_refused(tmp_path):
    stage = artifacts.open_stage(tmp_path / "a", "thing", Config(), {})
    job = Job(tmp_path / "a", "y", "--overwrite")
    assert job.first.startswith(f"refused: {tmp_path / 'a'} is in use by process {os.getpid()} on ")
    job.end()
    made = finish(stage)
    made.verify()
    assert made.config == {"text": "x"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_after_kill_9_the_same_command_goes_on_at_once(tmp_path, overwrite):
    job = Job(tmp_path / "a")
    assert job.kill(signal.SIGKILL) == -signal.SIGKILL
    assert (tmp_path / "a" / lock.LOCK).exists()
    make(tmp_path / "a", overwrite=overwrite).verify()
    assert names(tmp_path / "a") == ["file.txt", "manifest.json"]


def test_a_stopped_process_still_owns_its_folder(tmp_path):
    job = Job(tmp_path / "a")
    job.process.send_signal(signal.SIGSTOP)
    file = tmp_path / "a" / lock.LOCK
    os.utime(file, (0, 0))  # it shows no sign of life
    with pytest.raises(lock.InUse, match=str(job.pid)):
        make(tmp_path / "a", overwrite=True)
    job.process.send_signal(signal.SIGCONT)
    assert job.end() == artifacts.load(tmp_path / "a").id


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_releases_the_folder_and_ends_the_process_as_ever(tmp_path, number):
    code = Job(tmp_path / "a").kill(number)
    assert code == (0 if number == signal.SIGINT else -number)
    assert names(tmp_path / "a") == ["file.txt", "state"]


@pytest.mark.parametrize("said", ["raise", "leave"])
def test_the_end_of_a_process_releases_the_folder(tmp_path, said):
    job = Job(tmp_path / "a")
    job.end(said)
    assert ("RuntimeError: meant" in job.error) == (said == "raise")
    assert names(tmp_path / "a") == ["file.txt", "state"]


def test_a_stage_that_fails_releases_the_folder_also_where_its_exception_is_kept(tmp_path):
    @lock.released_at_end()
    def stage_of_a_notebook() -> None:
        artifacts.open_stage(tmp_path / "a", "thing", Config(), {})
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as kept:
        stage_of_a_notebook()
    assert kept.value.__traceback__ is not None
    assert names(tmp_path / "a") == ["state"]


def test_a_refused_command_leaves_no_folder_behind(tmp_path):
    with pytest.raises(TypeError):
        artifacts.open_stage(tmp_path / "a" / "b", "thing", Config(text={1, object()}), {})
    with pytest.raises(RuntimeError, match="meant"), lock.own(tmp_path / "b"):
        raise RuntimeError("meant")
    assert names(tmp_path) == []


def test_who_has_patience_waits_for_the_owner(tmp_path):
    job = Job(tmp_path / "a")
    timer = threading.Timer(0.3, lambda: job.end("leave"))
    timer.start()
    with lock.own(tmp_path / "a", patience=30) as hold:
        assert hold.fresh
    timer.join()


# locks of other machines, of ended processes, of no process


def test_another_machine_is_believed_as_long_as_it_shows_signs_of_life(tmp_path, monkeypatch):
    leave(tmp_path / "a", elsewhere(), age=lock.STALE / 2)
    monkeypatch.setattr(time, "time", lambda: 1e10)  # a wrong clock here does not matter
    with pytest.raises(
        lock.InUse, match=r"process 4242 on node7 .*\(fd2fast pretrain --out O\).* 180 s after its last"
    ):
        make(tmp_path / "a")


@pytest.mark.parametrize("age", [lock.STALE + 5, 1e6, -1e6])
def test_another_machine_without_signs_of_life_counts_as_ended(tmp_path, age):
    leave(tmp_path / "a", elsewhere(), age=age)
    make(tmp_path / "a")
    assert names(tmp_path / "a") == ["file.txt", "manifest.json"]


def test_an_owner_from_before_the_machine_was_started_again_has_ended(tmp_path, monkeypatch):
    host, _, boot, namespace = lock._place()
    monkeypatch.setattr(lock, "_place", lambda: (host, "m" * 32, boot or "b", namespace))
    leave(tmp_path / "a", owner(pid=os.getpid(), boot="an earlier one"))
    make(tmp_path / "a")
    leave(tmp_path / "b", owner(pid=os.getpid(), boot="an earlier one", machine="another"))
    with pytest.raises(lock.InUse):
        make(tmp_path / "b")
    monkeypatch.setattr(lock, "_place", lambda: (host, "", boot or "b", namespace))  # in a container
    leave(tmp_path / "c", owner(boot="an earlier one"))
    with pytest.raises(lock.InUse):
        make(tmp_path / "c")


@pytest.mark.parametrize("changes", [{"boot": "c" * 36}, {"namespace": "pid:[1]"}, {"host": "node7", "boot": ""}])
def test_a_process_id_of_elsewhere_says_nothing_here(tmp_path, changes):
    """This process's own id, of an earlier boot, in another container, on a system that does not say its boot."""
    leave(tmp_path / "a", owner(**{"pid": os.getpid(), "machine": "", **changes}))
    with pytest.raises(lock.InUse):
        make(tmp_path / "a")
    leave(tmp_path / "a", owner(**{"pid": os.getpid(), "machine": "", **changes}), age=lock.STALE + 1)
    make(tmp_path / "a")


def test_a_process_id_used_again_is_another_process(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    start = lock._started(other.pid)
    if start is None:
        pytest.skip("processes have no start time here")
    leave(tmp_path / "a", owner(pid=other.pid, start=start))
    with pytest.raises(lock.InUse, match=f"process {other.pid} "):
        make(tmp_path / "a")
    for number, earlier in enumerate((start - 1, start + 1, 0)):
        leave(tmp_path / str(number), owner(pid=other.pid, start=earlier))
        make(tmp_path / str(number))
    other.kill()  # and not waited for: it is still listed
    while lock._started(other.pid) not in (-1, None):
        time.sleep(0.01)
    make(tmp_path / "a")
    other.communicate()


def test_processes_that_are_hidden_are_judged_by_their_signs_of_life(tmp_path, monkeypatch):
    def forbidden(pid: int, number: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(lock, "_started", lambda pid: 5 if pid == os.getpid() else None)
    monkeypatch.setattr(os, "kill", forbidden)
    leave(tmp_path / "a", owner(start=77))
    with pytest.raises(lock.InUse):
        make(tmp_path / "a")
    leave(tmp_path / "a", owner(start=77), age=lock.STALE + 1)
    make(tmp_path / "a")


GARBAGE = {
    "empty": b"",
    "zeros": b"\0" * 512,
    "half": json.dumps(owner()).encode()[:60],
    "text": b"locked by hand\n",
    "null": b"null",
    "list": b"[1, 2]",
    "deep": b"[" * 60_000,
    "bytes": b"\xff\xfe\x00{",
    "missing key": {k: v for k, v in owner().items() if k != "pid"},
    "other key": owner(extra=1),
    "pid text": owner(pid="1"),
    "pid true": owner(pid=True),
    "pid 0": owner(pid=0),
    "pid of all": owner(pid=-1),
    "pid huge": owner(pid=1 << 70),
    "start text": owner(start="0"),
    "token a path": owner(token="../../../x"),
    "token a number": owner(token=7),
    "host a list": owner(host=["h"]),
}


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_a_lock_that_is_none_is_replaced(tmp_path, content):
    (tmp_path / "x").write_text("outside")
    leave(tmp_path / "a" / "b", content, age=60)
    make(tmp_path / "a" / "b")
    assert names(tmp_path / "a" / "b") == ["file.txt", "manifest.json"]
    assert (tmp_path / "x").read_text() == "outside"


def test_a_lock_being_written_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_GRACE", 0.4)
    leave(tmp_path / "a", b"{")
    began = time.monotonic()
    make(tmp_path / "a")
    assert time.monotonic() - began > 0.2
    monkeypatch.setattr(lock, "_GRACE", 60)
    file = leave(tmp_path / "b", b"{")
    timer = threading.Timer(0.2, lambda: file.write_text(json.dumps(elsewhere())))
    timer.start()
    with pytest.raises(lock.InUse, match="node7"):
        make(tmp_path / "b")
    timer.join()


def test_other_things_in_the_place_of_a_lock(tmp_path):
    (tmp_path / "a" / lock.LOCK).mkdir(parents=True)
    with pytest.raises(UserError, match=rf"{lock.LOCK} is a folder where the lock of .*: remove it"):
        make(tmp_path / "a")
    (tmp_path / "mine").write_text("precious")
    for name, target in (("b", tmp_path / "mine"), ("c", tmp_path / "nothing")):
        (tmp_path / name).mkdir()
        (tmp_path / name / lock.LOCK).symlink_to(target)
        os.utime(tmp_path / name / lock.LOCK, (0, 0), follow_symlinks=False)
        make(tmp_path / name)
    assert (tmp_path / "mine").read_text() == "precious"
    assert not (tmp_path / "nothing").exists()
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / "d" / lock.LOCK)
    os.utime(tmp_path / "d" / lock.LOCK, (0, 0))
    make(tmp_path / "d")


def test_what_a_lock_says_is_shown_as_plain_text(tmp_path):
    leave(tmp_path / "a", elsewhere() | {"command": "rm\x1b[2J\nerror: \u202e" + "x" * 5000})
    with pytest.raises(lock.InUse) as refused:
        make(tmp_path / "a")
    text = str(refused.value)
    assert text.isprintable()
    assert len(text) < 900


# takers at once


RACE = """
import errno, json, os, sys
from fd2fast.system import lock
folder, rounds, count = sys.argv[1], 5, 8
def no_links(*_):
    raise OSError(errno.EPERM, "Operation not permitted")
if sys.argv[2] == "without links":
    os.link = no_links
    lock._GRACE = 1.0
for turn in range(rounds):
    go, said, end = os.pipe(), os.pipe(), os.pipe()
    children = []
    for _ in range(count):
        if not (pid := os.fork()):
            os.close(go[1]); os.close(end[1])
            os.read(go[0], 1)
            try:
                lock.take(folder)
                answer = b"1"
            except lock.InUse:
                answer = b"0"
            except BaseException as error:
                os.write(2, repr(error).encode())
                answer = b"?"
            os.write(said[1], answer)
            os.read(end[0], 1)
            os._exit(0)  # as killed: the next round finds a stale lock
        children.append(pid)
    os.close(go[1])
    answers = b""
    while len(answers) < count:
        answers += os.read(said[0], count)
    names = os.listdir(folder)
    os.close(end[1])
    for pid in children:
        os.waitpid(pid, 0)
    assert answers.count(b"1") == 1 and answers.count(b"0") == count - 1, (turn, answers)
    assert names == [lock.LOCK], names
    for descriptor in (go[0], *said, end[0]):
        os.close(descriptor)
print("one of", count, "each time")
"""


@pytest.mark.parametrize("how", ["with links", "without links"])
def test_of_many_takers_of_a_stale_lock_one_gets_it(tmp_path, how):
    leave(tmp_path / "a", elsewhere(), age=1e4)
    ended = subprocess.run([sys.executable, "-c", RACE, str(tmp_path / "a"), how], capture_output=True, text=True)
    assert (ended.stdout, ended.returncode) == ("one of 8 each time\n", 0), ended.stderr


DIES = """
import os, signal, sys
from fd2fast.system import lock
real = os.replace
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
lock.take(sys.argv[1])
"""


def test_takers_that_are_killed_while_they_take_over_leave_no_riddle(tmp_path):
    leave(tmp_path / "a", owner())
    for _ in range(3):
        assert subprocess.run([sys.executable, "-c", DIES, str(tmp_path / "a")]).returncode == -signal.SIGKILL
    assert [n for n in names(tmp_path / "a") if "take" in n]
    make(tmp_path / "a")
    assert names(tmp_path / "a") == ["file.txt", "manifest.json"]


def test_a_folder_that_its_owner_takes_away_when_it_ends_is_made_again(tmp_path, monkeypatch):
    real, calls = os.link, []

    def link(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) < 3:
            shutil.rmtree(tmp_path / "a")
        real(source, target)

    monkeypatch.setattr(os, "link", link)
    make(tmp_path / "a")
    assert len(calls) == 3


# what an old job may still do


def test_a_job_whose_folder_was_taken_over_fails_and_changes_nothing(tmp_path):
    stage = artifacts.open_stage(tmp_path / "a", "thing", Config(), {})
    leave(tmp_path / "a", elsewhere())
    for act in (lambda: stage.checkpoint("s.pt", {}), lambda: finish(stage)):
        with pytest.raises(UserError, match=r"a was taken over by process 4242 on node7 .* nothing more is written"):
            act()
    assert not (tmp_path / "a" / "manifest.json").exists()
    stage.release()
    assert (tmp_path / "a" / lock.LOCK).exists()


def test_an_old_job_does_not_end_over_the_result_of_a_new_one(tmp_path):
    """Its lock was removed by hand, and a new job overwrote the folder and has ended."""
    stage = artifacts.open_stage(tmp_path / "a", "thing", Config("old"), {})
    (tmp_path / "a" / lock.LOCK).unlink()
    job = Job(tmp_path / "a", "new", "--overwrite")
    made = job.end()
    with pytest.raises(UserError, match="was removed or made by another process"):
        stage.finish(classes=["a", "b"], size=8, mean=(0.5,) * 3, std=(0.2,) * 3)
    stage.release()
    assert artifacts.load(tmp_path / "a").id == made
    artifacts.load(tmp_path / "a").verify()


def test_an_old_job_does_not_end_in_an_emptied_folder(tmp_path):
    for number, leave_it in enumerate((False, True)):
        stage = artifacts.open_stage(tmp_path / str(number), "thing", Config(), {})
        artifacts.write_bytes(stage.path / "first.txt", b"half of the work")
        shutil.rmtree(stage.path)
        if leave_it:
            stage.path.mkdir()
        with pytest.raises(UserError, match="was removed or "):
            finish(stage)
        assert not (stage.path / "manifest.json").exists()


def test_a_lock_removed_by_hand_costs_no_work(tmp_path):
    stage = artifacts.open_stage(tmp_path / "a", "thing", Config(), {})
    (tmp_path / "a" / lock.LOCK).unlink()
    finish(stage).verify()
    assert names(tmp_path / "a") == ["file.txt", "manifest.json"]


def test_signs_of_life_are_given_and_a_loss_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.02)
    monkeypatch.setattr(lock, "_beating", None)
    stage = artifacts.open_stage(tmp_path / "a", "thing", Config(), {})
    os.utime(tmp_path / "a" / lock.LOCK, (0, 0))
    until(lambda: (tmp_path / "a" / lock.LOCK).stat().st_mtime > 0)
    leave(tmp_path / "a", elsewhere(), age=1e4)
    held = lock._table[Path(os.path.realpath(tmp_path / "a"))]
    until(lambda: held.lost)
    assert (tmp_path / "a" / lock.LOCK).stat().st_mtime < time.time() - 5e3  # nobody else's lock is renewed
    with pytest.raises(UserError, match="taken over by process 4242"):
        artifacts.write_bytes(stage.path / "deep" / "file.txt", b"late")
    artifacts.write_bytes(tmp_path / "b" / "file.txt", b"elsewhere")
    assert not (stage.path / "deep").exists()


def until(true: object, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_thread_that_gives_signs_of_life_ends_with_the_last_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    monkeypatch.setattr(lock, "_beating", None)
    with lock.own(tmp_path / "a"):
        thread = lock._beating
        assert thread.is_alive()
    thread.join(20)
    assert not thread.is_alive()


# claims within a process


def test_a_process_may_open_its_folder_again_and_the_last_claim_frees_it(tmp_path):
    with lock.own(tmp_path / "a") as outer:
        assert outer.fresh
        with lock.own(tmp_path / "a") as inner:
            assert not inner.fresh
        job = Job(tmp_path / "a")
        assert job.first.startswith("refused")
        job.end()
        inner.release()
        assert (tmp_path / "a" / lock.LOCK).exists()
    assert not (tmp_path / "a").exists()


def test_two_stages_of_one_pipeline(tmp_path):
    with lock.own(tmp_path / "run"):
        first = artifacts.open_stage(tmp_path / "run" / "1", "thing", Config(), {})
        second = artifacts.open_stage(tmp_path / "run" / "2", "thing", Config(), {"first": finish(first)})
        again = artifacts.open_stage(tmp_path / "run" / "2", "thing", Config(), {"first": first_of(first)})
        del second
        assert (tmp_path / "run" / "2" / lock.LOCK).exists()
        finish(again)
    assert not list(tmp_path.rglob(f"{lock.OURS}*"))


def first_of(stage: artifacts.Stage) -> artifacts.Artifact:
    return artifacts.load(stage.path)


def test_threads_do_not_share_a_folder(tmp_path):
    found: list = []

    def try_it() -> None:
        try:
            found.append(lock.take(tmp_path / "a"))
        except lock.InUse as error:
            found.append(str(error))

    def in_a_thread() -> None:
        thread = threading.Thread(target=try_it)
        thread.start()
        thread.join()

    with lock.own(tmp_path / "a"):
        in_a_thread()
        assert "in use by another thread of this process" in found[0]
    in_a_thread()
    assert found[1].fresh
    with lock.own(tmp_path / "a") as mine:  # of a thread that has ended
        assert not mine.fresh


def test_many_threads_at_once(tmp_path):
    barrier, found = threading.Barrier(12), []
    done = threading.Event()

    def try_it() -> None:
        barrier.wait()
        try:
            found.append(lock.take(tmp_path / "a"))
        except lock.InUse:
            found.append(None)
        done.wait(20)

    threads = [threading.Thread(target=try_it) for _ in range(12)]
    for thread in threads:
        thread.start()
    until(lambda: len(found) == 12)
    done.set()
    for thread in threads:
        thread.join()
    assert len([hold for hold in found if hold is not None]) == 1


FORK = """
import os, sys
from fd2fast.system import lock
hold = lock.take(sys.argv[1])
if not (pid := os.fork()):
    hold.release()
    try:
        lock.take(sys.argv[1])
    except lock.InUse as error:
        assert f"process {os.getppid()} " in str(error)
        sys.exit(7)  # with all exit functions
    sys.exit(8)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
assert os.path.exists(os.path.join(sys.argv[1], lock.LOCK)) and hold.check()
"""

EXEC = """
import os, sys
from fd2fast.system import lock
with lock.own(sys.argv[1]) as hold:
    if len(sys.argv) == 2:
        os.execv(sys.executable, [sys.executable, "-c", open(sys.argv[0]).read(), *sys.argv[1:], "again"])
    assert hold.fresh
"""


def test_a_forked_child_neither_has_nor_frees_the_folder(tmp_path):
    ended = subprocess.run([sys.executable, "-c", FORK, str(tmp_path / "a")], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert not (tmp_path / "a").exists()


def test_a_process_that_became_another_program_does_not_block_itself(tmp_path):
    (tmp_path / "script.py").write_text(EXEC)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "a")]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


# jobs of several processes


def test_processes_of_one_job_join_and_others_do_not(tmp_path, monkeypatch):
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "node1", "MASTER_PORT": "29400", "TORCHELASTIC_RUN_ID": "r1"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "0")
    leave(tmp_path / "a", elsewhere(job="r0/node1:29400"))
    with pytest.raises(lock.InUse):
        artifacts.open_stage(tmp_path / "a", "thing", Config(), {})
    # the first process of another job of the same name is another owner
    leave(tmp_path / "a", elsewhere(job=lock._job()))
    with pytest.raises(lock.InUse):
        artifacts.open_stage(tmp_path / "a", "thing", Config(), {})
    (tmp_path / "a" / lock.LOCK).unlink()
    artifacts.open_stage(tmp_path / "a", "thing", Config(), {}).release()
    temporary = tmp_path / "a" / f"{lock.TEMPORARY}99-x"
    for rank in ("1", "7"):
        monkeypatch.setenv("RANK", rank)
        content = (leave(tmp_path / "a", elsewhere(job=lock._job()))).read_bytes()
        temporary.write_bytes(b"of another process of the job")
        stage = artifacts.open_stage(tmp_path / "a", "thing", Config(), {})
        stage.checkpoint("s.pt", {})
        stage.release()
        assert (tmp_path / "a" / lock.LOCK).read_bytes() == content
        assert temporary.exists()
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", f"other{rank}")
        with pytest.raises(lock.InUse, match="node7"):
            artifacts.open_stage(tmp_path / "a", "thing", Config(), {})
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "r1")


def test_a_process_of_a_job_owns_what_it_makes_by_itself(tmp_path, monkeypatch):
    job = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29400", "TORCHELASTIC_RUN_ID": "r1"}
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    leave(tmp_path, elsewhere(job=lock._job()))  # the run's folder is the first process's
    with lock.by_itself():
        stage = artifacts.open_stage(tmp_path / "a", "thing", Config(), {})
        assert (tmp_path / "a" / lock.LOCK).exists()
    made = finish(stage)
    with lock.by_itself():
        anew = artifacts.open_stage(tmp_path / "a", "thing", Config("y"), {}, overwrite=True)
        assert not (tmp_path / "a" / "manifest.json").exists()
        assert finish(anew, "y").id != made.id
        leave(tmp_path / "b", elsewhere(job=lock._job()))
        with pytest.raises(lock.InUse):  # another process of the job has it
            artifacts.open_stage(tmp_path / "b", "thing", Config(), {})
        leave(tmp_path, elsewhere(job="another"))
        with pytest.raises(lock.InUse):
            artifacts.open_stage(tmp_path / "a", "thing", Config("z"), {}, overwrite=True)
    artifacts.open_stage(tmp_path / "c", "thing", Config(), {})
    assert not (tmp_path / "c" / lock.LOCK).exists()


def test_a_pool_of_one_is_a_process_of_its_own(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "3")
    assert not lock.joins()


# folders of every kind


def test_all_paths_of_a_folder_lead_to_one_lock(tmp_path, monkeypatch):
    (tmp_path / "disk" / "run 1 ü").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "run 1 ü")
    monkeypatch.chdir(tmp_path / "disk")
    job = Job(tmp_path / "link")
    for path in ("run 1 ü", "./run 1 ü/../run 1 ü", tmp_path / "link", tmp_path / "disk/../link/."):
        with pytest.raises(lock.InUse, match=str(job.pid)):
            make(Path(path))
    monkeypatch.chdir(tmp_path / "disk" / "run 1 ü")
    with pytest.raises(lock.InUse):
        make(Path("."))
    job.end()
    assert make(Path("."), "y", overwrite=True).config == {"text": "y"}
    assert make(tmp_path / "link", "z", overwrite=True).config == {"text": "z"}
    assert (tmp_path / "link").is_symlink()
    artifacts.load(tmp_path / "disk" / "run 1 ü").verify()


def test_a_link_to_nothing_is_named(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "unmounted" / "run")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("link", "loop"):
        with pytest.raises(UserError, match=f"{name} is a symbolic link to .*, which is missing"):
            make(tmp_path / name)
    assert not (tmp_path / "unmounted").exists()


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EROFS, "cannot write .*a: the disk is mounted read-only"),
        (errno.EACCES, "cannot write .*a: permission denied"),
        (errno.ENOSPC, "no space left while writing .*a .*free some space"),
        (errno.EDQUOT, "no space left"),
        (errno.EIO, "cannot write .*a: the disk or network share reports"),
    ],
)
def test_a_folder_that_cannot_be_written_is_named_and_a_finished_result_in_it_found(
    tmp_path, monkeypatch, number, message
):
    made = make(tmp_path / "a")
    leave(tmp_path / "a", owner())  # of a process killed just after it had finished
    real = os.open

    def refuse(path: object, flags: int, *rest: object, **more: object) -> int:
        if flags & os.O_CREAT:
            raise OSError(number, os.strerror(number))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    assert make(tmp_path / "a").id == made.id
    with pytest.raises(UserError, match=message):
        make(tmp_path / "a", overwrite=True)
    monkeypatch.undo()
    assert artifacts.load(tmp_path / "a").id == made.id


def test_a_finished_result_needs_no_lock(tmp_path, monkeypatch):
    made = make(tmp_path / "a")
    monkeypatch.setattr(lock, "take", lambda *_: pytest.fail("taken"))
    assert make(tmp_path / "a").id == made.id
    with pytest.raises(UserError, match="made with other settings"):
        make(tmp_path / "a", "y")


def test_what_a_process_left_that_ended_just_after_the_manifest_is_removed(tmp_path):
    made = make(tmp_path / "a")
    leave(tmp_path / "a", owner())
    (tmp_path / "a" / "state").mkdir()
    (tmp_path / "a" / "state" / "begun.json").write_text("{}")
    assert make(tmp_path / "a").id == made.id
    assert names(tmp_path / "a") == ["file.txt", "manifest.json"]
    leave(tmp_path / "a", elsewhere())  # who is still at it does it himself
    assert make(tmp_path / "a").id == made.id
    assert lock.LOCK in names(tmp_path / "a")


# overwriting and left-overs


OVERWRITES = """
import os, shutil, signal, sys
from pathlib import Path
from fd2fast import artifacts
def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[2] == "folders":
    shutil.rmtree = die
else:
    real = Path.unlink
    Path.unlink = lambda self, **more: die() if self.name == "zzz.txt" else real(self, **more)
sys.argv[2:] = ["y", "--overwrite"]
"""


@pytest.mark.parametrize("what", ["folders", "files"])
def test_an_overwrite_that_is_killed_half_way_is_completed(tmp_path, what):
    """Neither is the rest of the old result taken for the new one, nor is it called foreign."""
    stage = artifacts.open_stage(tmp_path / "a", "thing", Config(), {})
    artifacts.write_bytes(tmp_path / "a" / "folder" / "old.txt", b"old")
    artifacts.write_bytes(tmp_path / "a" / "zzz.txt", b"old")
    finish(stage)
    ended = subprocess.run([sys.executable, "-c", OVERWRITES + JOB, str(tmp_path / "a"), what], capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not (tmp_path / "a" / "manifest.json").exists()
    assert [n for n in names(tmp_path / "a") if n in ("folder", "zzz.txt")]
    assert sorted(make(tmp_path / "a", "y").manifest["files"]) == ["file.txt"]
    assert names(tmp_path / "a") == ["file.txt", "manifest.json"]


def test_a_folder_that_is_owned_anew_loses_what_a_killed_process_left(tmp_path):
    for name in ("report.md", "grid.png", "run.json"):
        (tmp_path / f"{lock.TEMPORARY}1-{name}").write_bytes(b"half")
    (tmp_path / "kept").touch()
    with lock.own(tmp_path):
        assert sorted(p.name for p in tmp_path.iterdir()) == [lock.LOCK, "kept"]


def test_only_an_owner_that_is_alone_sweeps_and_nothing_temporary_is_part_of_a_result(tmp_path):
    stage = artifacts.open_stage(tmp_path / "a", "thing", Config(), {})
    left = [tmp_path / "a" / f"{lock.TEMPORARY}1-x", tmp_path / "a" / "state" / f"{lock.TEMPORARY}77-0a-y.pt"]
    for path in left:
        path.write_bytes(b"half")
    again = artifacts.open_stage(tmp_path / "a", "thing", Config(), {})
    assert all(path.exists() for path in left)
    again.release()
    stage.release()
    stage = artifacts.open_stage(tmp_path / "a", "thing", Config(), {})
    assert not any(path.exists() for path in left)
    left[0].write_bytes(b"half")
    assert list(finish(stage).manifest["files"]) == ["file.txt"]


def test_foreign_files_are_not_touched(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.jpg").write_text("precious")
    before = (tmp_path / "photos").stat().st_mtime_ns
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds other files"):
            make(tmp_path / "photos", overwrite=overwrite)
    assert names(tmp_path / "photos") == ["mine.jpg"]
    assert (tmp_path / "photos").stat().st_mtime_ns == before


def test_nothing_is_overwritten_below_a_run_that_is_at_work(tmp_path):
    made = make(tmp_path / "run" / "dataset")
    job = Job(tmp_path / "run2")
    shutil.copy(tmp_path / "run2" / lock.LOCK, tmp_path / "run" / lock.LOCK)
    with pytest.raises(lock.InUse, match=f"run is in use by process {job.pid}"):
        make(tmp_path / "run" / "dataset", "y", overwrite=True)
    assert artifacts.load(tmp_path / "run" / "dataset").id == made.id
    make(tmp_path / "run" / "more")  # beside its results, others may be made
    job.end()
    make(tmp_path / "run" / "dataset", "y", overwrite=True)


def test_a_run_is_told_before_its_first_stage_that_a_folder_is_in_use(tmp_path):
    assert artifacts.obstacle(tmp_path / "a", "thing", Config()) is None
    job = Job(tmp_path / "a")
    assert f"a is in use by process {job.pid} " in artifacts.obstacle(tmp_path / "a", "thing", Config())
    job.end("leave")
    stage = artifacts.open_stage(tmp_path / "a", "thing", Config(), {})  # its own is no obstacle
    assert artifacts.obstacle(tmp_path / "a", "thing", Config()) is None
    stage.release()


def test_a_stage_whose_parent_is_made_anew_meanwhile_does_not_finish(tmp_path):
    first = make(tmp_path / "first")
    stage = artifacts.open_stage(tmp_path / "second", "thing", Config(), {"dataset": first})
    make(tmp_path / "first", overwrite=True)  # equal: nothing to say
    make(tmp_path / "first", "y", overwrite=True)
    with pytest.raises(UserError, match=r"dataset .*first was made anew \(.* while this stage read it"):
        finish(stage)
    half = artifacts.open_stage(tmp_path / "first", "thing", Config("z"), {}, overwrite=True)
    with pytest.raises(UserError, match="first was begun anew"):
        finish(stage)
    half.release()
    shutil.rmtree(tmp_path / "first")  # on a disk that is gone, or moved
    finish(stage).verify()
