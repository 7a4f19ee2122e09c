"""The last net of the command line: a log file with everything, one line for people, exit codes, signals."""

import errno
import os
import signal
import subprocess
import sys
import tempfile

import pytest

from fd2fast import cli
from fd2fast.errors import UserError
from fd2fast.system import failure, stopping


def raising(monkeypatch, error, command="pretrain"):
    def fail(arguments):
        raise error

    monkeypatch.setitem(cli.COMMANDS, command, fail)


@pytest.fixture
def room(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FD2FAST_DEBUG", raising=False)
    return tmp_path


class PanicException(BaseException):
    """As pyo3 raises it where code in Rust panics."""


def logs(folder):
    return sorted(folder.glob("fd2fast-error-*.log"))


def test_what_is_no_error_passes(room, monkeypatch):
    raising(monkeypatch, GeneratorExit())
    with pytest.raises(GeneratorExit):
        cli.main(["pretrain"])


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyError("classes"), 70, "unexpected KeyError: 'classes'"),
        (ZeroDivisionError("division by zero"), 70, "unexpected ZeroDivisionError: division by zero"),
        (RuntimeError("first\nsecond"), 70, "unexpected RuntimeError: first second"),
        (AssertionError(), 70, "unexpected AssertionError;"),
        (PanicException("PyObject pointer is null"), 70, "unexpected PanicException: PyObject pointer is null"),
        (MemoryError(), 1, "out of memory"),
        (OSError(errno.EIO, "Input/output error", "a.npy"), 1, "a.npy: the disk or network share"),
    ],
)
def test_an_unforeseen_error_is_one_line_and_a_log(room, monkeypatch, capsys, error, code, told):
    raising(monkeypatch, error)
    (room / "runs").mkdir()
    assert cli.main(["pretrain", "--out", str(room / "runs" / "teacher")]) == code
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert told in text
    assert "the same command goes on" in text
    assert len(text.strip().splitlines()) == 1
    (log,) = logs(room / "runs")
    assert str(log) in text
    content = log.read_text()
    for part in (
        "command: fd2fast pretrain --out",
        "Traceback (most recent call last)",
        "torch ",
        "python 3",
        "in fail",
    ):
        assert part in content


def test_the_log_goes_where_it_can_be_written(room, monkeypatch, capsys):
    raising(monkeypatch, KeyError("x"))
    (room / "file").write_text("")
    cli.main(["pretrain", f"--out={room / 'file' / 'teacher'}"])
    cli.main(["pretrain", "--out", str(room / "missing" / "teacher")])
    cli.main(["pretrain", "--out"])
    found = logs(room)
    assert len(found) >= 1
    gone, spare = room / "gone", room / "spare"
    gone.mkdir()
    spare.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(spare))
    os.chdir(gone)
    gone.rmdir()
    assert cli.main(["pretrain"]) == 70
    assert len(logs(spare)) == 1
    monkeypatch.setattr(failure, "_folders", lambda arguments: [room / "file", room / "missing"])
    capsys.readouterr()
    assert cli.main(["pretrain"]) == 70
    assert "no details could be written (FD2FAST_DEBUG=1 shows them)" in capsys.readouterr().err


def test_names_that_are_not_utf8_and_errors_that_cannot_be_printed_reach_the_log(room, monkeypatch):
    raising(monkeypatch, KeyError("caf\udce9"))
    assert cli.main(["pretrain", "caf\udce9"]) == 70
    assert "caf\\udce9" in logs(room)[0].read_text()

    class Unprintable(Exception):
        def __str__(self):
            raise ValueError

    logs(room)[0].unlink()
    path = failure.write_log(Unprintable(), [])
    assert "Unprintable" in path.read_text()


@pytest.mark.parametrize("error", [KeyError("x"), UserError("x must be even")])
def test_debug_shows_the_traceback(room, monkeypatch, capsys, error):
    raising(monkeypatch, error)
    monkeypatch.setenv("FD2FAST_DEBUG", "1")
    cli.main(["pretrain"])
    assert "Traceback (most recent call last)" in capsys.readouterr().err
    monkeypatch.setenv("FD2FAST_DEBUG", "0")
    cli.main(["pretrain"])
    assert "Traceback" not in capsys.readouterr().err


def test_each_process_of_a_job_says_which_it_is(room, monkeypatch, capsys):
    raising(monkeypatch, KeyError("x"), "distill")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    assert cli.main(["distill"]) == 70
    assert capsys.readouterr().err.startswith("error (process 2 of the job): ")
    assert "process: 2 of 4" in logs(room)[0].read_text()


def test_what_a_student_process_says_is_in_the_log(room, monkeypatch):
    error = RuntimeError("student 3: KeyError: 'x'")
    error.add_note("Traceback of the student's process")
    raising(monkeypatch, error)
    cli.main(["pretrain"])
    assert "Traceback of the student's process" in logs(room)[0].read_text()


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_signal_is_one_line_and_its_code(room, monkeypatch, capsys, name, code):
    number = getattr(signal, name)
    default = signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL
    before = signal.signal(number, default)
    cleaned = []

    def stop(arguments):
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        finally:
            cleaned.append(True)

    monkeypatch.setitem(cli.COMMANDS, "pretrain", stop)
    try:
        assert cli.main(["pretrain"]) == code
        assert signal.getsignal(number) == default
    finally:
        signal.signal(number, before)
    text = capsys.readouterr().err
    assert "the same command goes on" in text
    assert (name in text) is (name != "SIGINT")
    assert len(text.strip().splitlines()) == 1
    assert cleaned == [True]
    assert logs(room) == []


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.raising(print):
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_library_that_does_not_return_cannot_hold_up_the_end():
    code = """
import ctypes, os, signal, threading
from fd2fast.system import stopping
stopping.PATIENCE = 0.1
library = ctypes.CDLL(None)
mutex = ctypes.create_string_buffer(256)
library.pthread_mutex_init(mutex, None)
library.pthread_mutex_lock(mutex)
with stopping.raising(lambda number: print("stopped by", number, flush=True)):
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    library.pthread_mutex_lock(mutex)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (143, "stopped by 15")


def test_a_signal_while_the_interpreter_ends_says_nothing():
    code = (
        "import atexit, os, signal; from fd2fast.system import stopping\n"
        "atexit.register(os.kill, os.getpid(), signal.SIGINT); stopping.be_deaf_at_exit()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
