"""Text for people: broken streams, encodings and names that are no text never change what a process does."""

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fd2fast.system import streams

# Prints in every way there is, then leaves a file: what a stage does.
SCRIPT = """
import contextlib, os, sys, warnings
from fd2fast.system.streams import say, steady
with steady():
    for number in range(3000):
        say(f"line {number} of a class \\udcff caf\\xe9 \\u0e01 \\U0001f426")
    print("straight \\udcff caf\\xe9 \\u2588")
    sys.stderr.write("straight \\udcff \\u2588\\n")
    warnings.warn("a library's \\u2588")
    with open(sys.argv[1], "w") as file:
        for number in (1, 2):
            with contextlib.suppress(OSError):
                os.write(number, b"of a C library")
        file.write("finished")
"""
NOISE = ("Traceback", "Exception ignored", "BrokenPipe", "Bad file")


def run(tmp_path: Path, redirection: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """SCRIPT under a shell's redirection; what reaches the end of it."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = f'"$0" "$1" "$2" {redirection}'
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONIOENCODING", "PYTHONUTF8", "LC_ALL")}
    root = str(Path(streams.__file__).parents[1])
    return subprocess.run(
        ["sh", "-c", command, sys.executable, script, tmp_path / "result"],
        env={**clean, "PYTHONPATH": root, **environment},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        timeout=60,
    )


@pytest.mark.parametrize(
    "redirection",
    [
        ">&-",
        "2>&-",
        "<&- >&- 2>&-",
        pytest.param(
            ">/dev/full", marks=pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
        ),
        pytest.param(
            ">/dev/full 2>/dev/full",
            marks=pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here"),
        ),
        "1<&0",  # open for reading only
    ],
)
def test_a_stream_that_takes_nothing_ends_nothing(tmp_path, redirection):
    found = run(tmp_path, redirection)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "result").read_text() == "finished"
    assert not any(noise in found.stderr for noise in NOISE)


@pytest.mark.parametrize("both", [False, True])
def test_a_reader_that_goes_away_ends_nothing(tmp_path, both):
    """As `| head -1`: the exit code is the work's, and nothing is said about the pipe."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    reading, writing = os.pipe()
    os.close(reading)
    root = str(Path(streams.__file__).parents[1])
    found = subprocess.run(
        [sys.executable, script, tmp_path / "result"],
        stdout=writing,
        stderr=writing if both else subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": root},
        timeout=60,
    )
    os.close(writing)
    assert found.returncode == 0
    assert (tmp_path / "result").read_text() == "finished"
    assert both or not any(noise in found.stderr.decode("utf-8", "replace") for noise in NOISE)


def test_a_reader_that_is_slow_gets_every_line(tmp_path):
    """Of a pipe that the reader's program made non-blocking."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    root = str(Path(streams.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, script, tmp_path / "result"],
        stdout=writing,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": root},
    )
    os.close(writing)
    time.sleep(0.3)  # the pipe is full by now, or not yet: the lines arrive in both cases
    with open(reading, encoding="utf-8", errors="replace") as file:
        text = file.read()
    assert process.wait(60) == 0
    assert [line.split()[1] for line in text.splitlines() if line.startswith("line")] == [str(n) for n in range(3000)]


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "cp1252"},
        {"PYTHONIOENCODING": "koi8-r:strict"},
        {"PYTHONIOENCODING": "utf-16"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_any_encoding_takes_any_name(tmp_path, environment):
    found = run(tmp_path, "", **environment)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "result").read_text() == "finished"
    assert "line 2999" in found.stdout.replace("\0", "")


def test_a_full_output_is_said_once_on_the_other_stream(monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    error = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Full())
    monkeypatch.setattr(sys, "stderr", error)
    with streams.steady():
        for _ in range(3):
            print("lost")
    assert error.getvalue().count("standard output cannot be written (No space left on device)") == 1
    assert isinstance(sys.stdout, Full)


@pytest.mark.parametrize("fault", [RuntimeError("reentrant call inside a writer"), OSError(5, "Input/output error")])
def test_a_fault_that_passes_leaves_the_stream(monkeypatch, fault):
    """A signal in the middle of a write, a network file that is gone for a moment."""

    class Sometimes(io.StringIO):
        fails = 2

        def write(self, text):
            self.fails -= 1
            if self.fails >= 0:
                raise fault
            return super().write(text)

    out = Sometimes()
    monkeypatch.setattr(sys, "stdout", out)
    with streams.steady():
        for number in range(4):
            streams.say(number)
    assert out.getvalue() == "2\n3\n"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("Rotkehlchen", "Rotkehlchen"),
        ("นกกระจอก 🐦 עפרוני", "นกกระจอก 🐦 עפרוני"),
        (b"fauvette \xe0 t\xeate".decode("utf-8", "surrogateescape"), r"fauvette \xe0 t\xeate"),
        ("\ud83d half a pair", r"\ud83d half a pair"),
        ("two\nlines\r", r"two\nlines\r"),
        ("\x1b]0;owned\x07\x1b[2J", r"\x1b]0;owned\x07\x1b[2J"),
        ("\x9b31m", r"\x9b31m"),
        ("gnp.\u202eexe", r"gnp.\u202eexe"),
        ("tab\tand \x00 nothing", r"tab\tand \x00 nothing"),
        ("a\u2028b", r"a\u2028b"),
    ],
)
def test_names_become_one_harmless_line(name, shown):
    assert streams.plain(name) == shown
    shown.encode()


def test_long_names_are_cut_and_lines_stay_lines(capsys):
    assert streams.plain("x" * 1000, 10) == "x" * 9 + "…"
    assert streams.plain("x" * 10, 10) == "x" * 10
    streams.say("a\n\tb \x1b[31m")
    streams.say("to the other", error=True)
    assert capsys.readouterr() == ("a\n\tb \\x1b[31m\n", "to the other\n")


def test_no_streams_at_all(monkeypatch):
    """As under pythonw or a daemon: sys.stdout and sys.stderr are None."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    streams.say("nobody reads this")
    with streams.steady():
        print("nor this", file=sys.stderr)
        sys.stdout.write("nor this")
    assert sys.stdout is None
