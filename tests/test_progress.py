"""Progress bars: whatever the terminal, its width and the stream are, the work goes on."""

import io
import logging
import os
import subprocess
import sys

import pytest

from fd2fast.system.progress import NotesHandler, Progress, track


class Stream(io.StringIO):
    """A stream with a fault that begins after some writes."""

    encoding = "ascii"

    def __init__(self, fault: Exception, after: int = 0, terminal: bool = True):
        super().__init__()
        self.fault, self.after, self.terminal = fault, after, terminal

    def write(self, text):
        self.after -= 1
        if self.after < 0:
            raise self.fault
        return super().write(text)

    def isatty(self):
        return self.terminal


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize(
    "fault",
    [
        BrokenPipeError(32, "Broken pipe"),
        OSError(5, "Input/output error"),
        OSError(28, "No space left on device"),
        BlockingIOError(11, "Resource temporarily unavailable"),
        ValueError("I/O operation on closed file."),
        UnicodeEncodeError("ascii", "é", 0, 1, "ordinal not in range(128)"),
    ],
)
def test_a_faulty_stream_only_ends_the_bar(monkeypatch, fault, after):
    monkeypatch.setenv("FD2FAST_PROGRESS", "1")
    monkeypatch.setattr(sys, "stderr", Stream(fault, after))
    assert list(track(range(50), "classes \udcff é")) == list(range(50))
    with Progress("steps", 3, done=1) as bar:
        bar.step(1, loss=0.5, name="\x1b[31m\udcff")
        bar.step(1)


@pytest.mark.parametrize(
    "environment",
    [
        {"COLUMNS": "0", "LINES": "0"},
        {"COLUMNS": "-7"},
        {"COLUMNS": "wide", "TERM": "dumb"},
        {"TERM": "no-such-terminal"},
    ],
)
def test_a_strange_terminal_is_no_matter(monkeypatch, environment):
    monkeypatch.setenv("FD2FAST_PROGRESS", "1")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stderr", Stream(OSError(), 10**9))
    assert list(track(range(20), "steps")) == list(range(20))


def test_without_a_stream_there_is_no_bar(monkeypatch):
    monkeypatch.setenv("FD2FAST_PROGRESS", "1")
    monkeypatch.setattr(sys, "stderr", None)
    assert list(track(range(3), "steps")) == [0, 1, 2]
    NotesHandler().emit(logging.LogRecord("fd2fast", logging.INFO, "", 0, "a note", None, None))


def test_a_note_that_cannot_be_shown_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Stream(BrokenPipeError(32, "Broken pipe")))
    NotesHandler().emit(logging.LogRecord("fd2fast", logging.INFO, "", 0, "%d", ("no number",), None))
    NotesHandler().emit(logging.LogRecord("fd2fast", logging.INFO, "", 0, "a note", None, None))


def test_notes_cannot_steer_the_terminal(capsys):
    NotesHandler().emit(logging.LogRecord("fd2fast", logging.INFO, "", 0, "class \x1b[2J\udcff", None, None))
    assert capsys.readouterr().err == "class \\x1b[2J\\xff\n"


def test_errors_of_the_work_itself_pass():
    def broken():
        yield 1
        raise RuntimeError("of the work")

    with pytest.raises(RuntimeError, match="of the work"):
        list(track(broken(), "steps", 2))


@pytest.mark.parametrize("variable", ["TQDM_MININTERVAL", "TQDM_NCOLS", "TQDM_SMOOTHING"])
def test_variables_of_the_bar_that_are_no_numbers(variable):
    code = "from fd2fast.system.progress import track; print(list(track(range(3), 'steps')))"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, variable: "often", "FD2FAST_PROGRESS": "1"},
        capture_output=True,
        text=True,
    )
    assert found.stdout == "[0, 1, 2]\n", found.stderr
