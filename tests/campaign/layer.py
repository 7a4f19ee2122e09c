"""A layer under Python's file functions: counts changes to files below a folder; fails, ends the process, or keeps a journal.

It is installed in a process that ends with the trial and never taken out; `failing.py` makes operations fail by it. Native code
(memory maps, torch's and safetensors' own writers) passes below it: maps are seen when they are flushed, the writers as one
operation each.
"""

from __future__ import annotations

import builtins
import functools
import hashlib
import importlib.util
import io
import itertools
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import CodeType
from typing import Any

_open, _io_open, _os_open, _os_write = builtins.open, io.open, os.open, os.write
_fsync, _replace, _unlink = os.fsync, os.replace, os.unlink

Action = Callable[[int, str, str], None]  # number of the operation from 0, its kind, its path


class Layer:
    """Calls `action` ahead of every operation below `root`; see `install`."""

    def __init__(self, root: Path, action: Action, journal: Path | None = None):
        """journal: folder that `power.cut` reads; None: none is kept."""
        self.root = os.path.realpath(root) + os.sep
        self.action, self.journal = action, journal
        self.count = 0
        self.paused = False  # operations pass unseen
        self._lock = threading.RLock()
        self._copies = itertools.count()
        if journal is not None:
            journal.mkdir(parents=True, exist_ok=True)
            self._log = _os_open(journal / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def path_of(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The real path (of a link: its own) where it lies below the root."""
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        path = os.fsdecode(path)
        if dir_fd is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
        head, name = os.path.split(os.path.abspath(path))
        path = os.path.join(os.path.realpath(head), name)
        return path if path.startswith(self.root) or path + os.sep == self.root else None

    def hit(self, kind: str, path: str) -> None:
        if self.paused:
            return
        with self._lock:
            number = self.count
            self.count += 1
        self.action(number, kind, path)  # not under the lock: it may wait for another thread

    def note(self, kind: str, *paths: str) -> None:
        """A line in the journal, after the operation."""
        if self.journal is None:
            return
        line: list[str] = [kind, *paths]
        with self._lock:
            if kind == "sync" and os.path.isfile(paths[0]):
                copy = f"{os.getpid()}-{next(self._copies)}"
                with _open(paths[0], "rb") as file, _open(self.journal / copy, "wb") as kept:
                    kept.write(file.read())
                line.append(copy)
            _os_write(self._log, (json.dumps(line) + "\n").encode())

    def install(self) -> None:
        """Put it under builtins, os, numpy's maps, torch's and safetensors' writers of this process."""
        layer = self

        class File(io.FileIO):
            def write(self, data: Any, /) -> int:
                layer.hit("write", layer._names[self.fileno()])
                return super().write(data)

            def truncate(self, size: int | None = None, /) -> int:
                layer.hit("truncate", layer._names[self.fileno()])
                return super().truncate(size)

        self._names: dict[int, str] = {}

        def opened(
            file: Any,
            mode: str = "r",
            buffering: int = -1,
            encoding: str | None = None,
            errors: str | None = None,
            newline: str | None = None,
            closefd: bool = True,
            opener: Any = None,
        ) -> Any:
            path = None
            if not isinstance(file, int) and set(mode) & set("wax+"):
                path = layer.path_of(file)
            if path is None:
                return _io_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
            new = not os.path.lexists(path)
            layer.hit("create" if new else "open", path)
            raw = File(path, mode.replace("b", "").replace("t", ""), closefd, opener)
            layer._names[raw.fileno()] = path
            if new:
                layer.note("create", path)
            if buffering == 0:
                return raw
            buffered: Any = (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

        builtins.open = io.open = opened  # type: ignore[assignment]

        def os_open(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
            found = layer.path_of(path, dir_fd) if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) else None
            new = found is not None and not os.path.lexists(found)
            if found is not None:
                layer.hit("create" if new else "open", found)
            opened = _os_open(path, flags, mode, dir_fd=dir_fd)
            if found is not None and new:
                layer.note("create", found)
            return opened

        def os_write(number: int, data: Any) -> int:
            found = layer.path_of(number)
            if found is not None:
                layer.hit("write", found)
            return _os_write(number, data)

        os.open, os.write = os_open, os_write

        def one(name: str, kind: str) -> None:
            original = getattr(os, name)

            def call(path: Any, *rest: Any, **named: Any) -> Any:
                found = layer.path_of(path, named.get("dir_fd"))
                if found is not None:
                    layer.hit(kind, found)
                done = original(path, *rest, **named)
                if found is not None:
                    layer.note(kind, found)
                return done

            setattr(os, name, call)

        for name, kind in (
            ("mkdir", "mkdir"),
            ("rmdir", "rmdir"),
            ("unlink", "unlink"),
            ("remove", "unlink"),
            ("fsync", "sync"),
            ("fdatasync", "sync"),
            ("ftruncate", "truncate"),
            ("posix_fallocate", "allocate"),
        ):
            if hasattr(os, name):
                one(name, kind)

        def two(name: str, kind: str) -> None:
            original = getattr(os, name)

            def call(source: Any, target: Any, **named: Any) -> Any:
                ends = layer.path_of(source, named.get("src_dir_fd")), layer.path_of(target, named.get("dst_dir_fd"))
                if ends[1] is not None:
                    layer.hit(kind, ends[1])
                done = original(source, target, **named)
                if None not in ends:
                    layer.note(kind, *(str(end) for end in ends))
                return done

            setattr(os, name, call)

        for name, kind in (("replace", "rename"), ("rename", "rename"), ("link", "link")):
            two(name, kind)
        self._install_native()

    def _install_native(self) -> None:
        """Of the libraries that are imported already."""
        layer = self
        numpy, torch, safetensors = (sys.modules.get(name) for name in ("numpy", "torch", "safetensors.torch"))
        if numpy is not None:
            flush = numpy.memmap.flush

            def flushed(array: Any) -> None:
                path = layer.path_of(array.filename) if array.filename is not None else None
                if path is not None:
                    layer.hit("sync", path)
                flush(array)
                if path is not None:
                    layer.note("sync", path)

            numpy.memmap.flush = flushed

        def native(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(value: Any, target: Any, *rest: Any, **named: Any) -> Any:
                path = layer.path_of(target) if isinstance(target, str | os.PathLike) else None
                if path is not None:
                    layer.hit("native", path)
                done = original(value, target, *rest, **named)
                if path is not None:
                    layer.note("create", path)
                return done

            return call

        if torch is not None:
            torch.save = native(torch.save)
        if safetensors is not None:
            safetensors.save_file = native(safetensors.save_file)


@functools.cache
def _home() -> str:
    """The folder of fd2fast's code, which need not be imported for that."""
    spec = importlib.util.find_spec("fd2fast")
    return os.path.dirname(spec.origin or "") + os.sep if spec is not None else os.sep


@functools.cache
def _line(code: CodeType, number: int) -> str:
    """A line by its function, which edits above do not move; empty outside of fd2fast."""
    file, home = code.co_filename, _home()
    if not file.startswith(home):
        return ""
    return f"{file.removeprefix(home)}:{code.co_qualname}+{number - code.co_firstlineno}"


def site() -> str:
    """Where in fd2fast the caller was asked from: the innermost line, and a hash of all lines on the way to it."""
    lines: list[str] = []
    frame = sys._getframe(1)
    while frame is not None:
        if line := _line(frame.f_code, frame.f_lineno):
            lines.append(line)
        frame = frame.f_back  # type: ignore[assignment]
    return f"{lines[0] if lines else '-'}#{hashlib.sha256(' '.join(lines).encode()).hexdigest()[:8]}"


def counter(root: Path, into: Path) -> Callable[[], None]:
    """For `forks.run(before=...)`: kind and `site` of all operations, one a line, in the file `into`."""

    def before() -> None:
        into.parent.mkdir(parents=True, exist_ok=True)
        log = _os_open(into, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        Layer(root, lambda number, kind, path: _os_write(log, f"{kind} {site()}\n".encode()) and None).install()

    return before


def ending(root: Path, at: int, number: int, journal: Path | None = None) -> Callable[[], None]:
    """For `forks.Job(before=...)`: signal `number` to the process ahead of operation `at`; a native writer is ended half way."""

    def action(count: int, kind: str, path: str) -> None:
        if count == at:
            if kind == "native":
                with _open(path, "wb") as file:
                    file.write(b"PK\3\4half of a file")
            os.kill(os.getpid(), number)

    return lambda: Layer(root, action, journal).install()
