"""An error that nobody foresaw: its details in a log file, one line for people, and the exit code."""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

from fd2fast.system import causes

SURROUNDINGS, INTERNAL = 1, 70
_PACKAGES = (
    "fd2fast",
    "torch",
    "torchvision",
    "timm",
    "triton",
    "numpy",
    "scipy",
    "safetensors",
    "pillow",
    "matplotlib",
    "tyro",
    "pydantic",
)


def wants_traceback() -> bool:
    """Whether FD2FAST_DEBUG asks for tracebacks."""
    return os.environ.get("FD2FAST_DEBUG", "0") not in ("", "0")


def line(error: BaseException, arguments: Sequence[str]) -> tuple[str, int]:
    """The line to show for an unforeseen error of a command, and its exit code; the details go to a file that it names.

    Exit code 1 for what lies outside the program (memory, disk, driver, packages), 70 for an error of the program itself.
    """
    reason = causes.explained(error)
    text = " ".join(str(error).split())
    log = write_log(error, arguments)
    told = reason or f"unexpected {type(error).__name__}" + (f": {text[:300]}" if text else "")
    where = f"details in {log}" if log else "no details could be written (FD2FAST_DEBUG=1 shows them)"
    kept = "what is finished is kept, the same command goes on from there"
    return f"{told}; {kept}; {where}", SURROUNDINGS if reason else INTERNAL


def write_log(error: BaseException, arguments: Sequence[str]) -> Path | None:
    """Write command, versions and traceback where it can be written; the file, or None if there is no such place."""
    name = f"fd2fast-error-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    content = "\n".join(_details(error, arguments)).encode("utf-8", "backslashreplace")
    for folder in _folders(arguments):
        path = folder / name
        try:
            with open(path, "xb") as file:
                file.write(content)
        except OSError:  # a full disk has written a part
            with contextlib.suppress(OSError):
                if path.stat().st_size < len(content):
                    path.unlink()
            continue
        return path
    return None


def _folders(arguments: Sequence[str]) -> Iterator[Path]:
    """Beside the output folder, the current folder, the folder for temporary files."""
    for at, argument in enumerate(arguments):
        value = argument[6:] if argument.startswith("--out=") else None
        if argument == "--out" and at + 1 < len(arguments):
            value = arguments[at + 1]
        if value:
            yield Path(value).expanduser().parent
    with contextlib.suppress(OSError):
        yield Path.cwd()
    with contextlib.suppress(OSError):
        yield Path(tempfile.gettempdir())


def _details(error: BaseException, arguments: Sequence[str]) -> Iterator[str]:
    yield f"command: fd2fast {shlex.join(arguments)}"
    yield f"time: {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}"
    with contextlib.suppress(OSError):
        yield f"folder: {os.getcwd()}"
    if "RANK" in os.environ:
        yield f"process: {os.environ['RANK']} of {os.environ.get('WORLD_SIZE', '?')}"
    found = [f"python {platform.python_version()}", platform.platform()]
    for name in _PACKAGES:
        with contextlib.suppress(Exception):
            found.append(f"{name} {version(name)}")
    yield f"versions: {', '.join(found)}"
    yield f"executable: {sys.executable}"
    yield ""
    try:
        yield "".join(traceback.format_exception(error))
    except Exception as unprintable:  # an error whose own text raises
        yield f"{type(error).__name__}, which cannot be printed: {type(unprintable).__name__}"
