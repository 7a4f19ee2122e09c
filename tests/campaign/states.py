"""What a folder holds at one moment: read, compared by all that the next command can see, and put back under a process."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

_LOCK = ".fd2fast-lock"
_TEMPORARY = re.compile(r"(\.fd2fast-tmp-)(?:take-)?[0-9a-f]+(?:-[0-9a-f]+)?")


@dataclass(frozen=True)
class Entry:
    """A file, folder or link. content: bytes, of a link its target."""

    kind: int
    content: bytes
    inode: int
    modified: int


def read(root: Path) -> dict[str, Entry]:
    """Everything below a folder by its path there, folders before what they hold."""
    found: dict[str, Entry] = {}
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in [*folders, *sorted(files)]:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            kind = stat.S_IFMT(status.st_mode)
            content = b""
            if stat.S_ISREG(status.st_mode):
                content = Path(path).read_bytes()
            elif stat.S_ISLNK(status.st_mode):
                content = os.fsencode(os.readlink(path))
            found[os.path.relpath(path, root)] = Entry(kind, content, status.st_ino, status.st_mtime_ns)
    return found


def digest(state: dict[str, Entry]) -> str:
    """16 hex digits, equal where the same command must do the same: names and bytes, without what differs from run to run.

    Left out: times of files (the command compares those of its sources, which lie elsewhere), who held a lock (its process
    has ended) and process ids in temporary names, times in manifests and records, logs of unexpected errors.
    """
    found = sorted((_name(name), entry.kind, _content(name, entry)) for name, entry in state.items())
    return hashlib.sha256(repr(found).encode()).hexdigest()[:16]


def _name(name: str) -> str:
    name = re.sub(r"fd2fast-error-[^/]*\.log", "fd2fast-error.log", name)
    return _TEMPORARY.sub(r"\1", name)


def _content(name: str, entry: Entry) -> bytes:
    base = os.path.basename(name)
    if _name(base) == "fd2fast-error.log":
        return b""
    with contextlib.suppress(ValueError):
        value = json.loads(entry.content)
        if isinstance(value, dict) and "token" in value:  # a lock, or one in the making
            return b"lock"
        if base.endswith("manifest.json"):
            return json.dumps({k: v for k, v in value.items() if k not in ("measured", "places")}).encode()
        if base.endswith("stamps.json"):
            return re.sub(rb"\d{6,}", b"0", entry.content)
        if base.endswith("seconds.json"):
            return b"0"
    return entry.content


def copy(state: dict[str, Entry], into: Path) -> None:
    """Make the state in a new folder, with its files' times; locks begin to age now."""
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir(parents=True)
    for name, entry in state.items():
        path = into / name
        if stat.S_ISDIR(entry.kind):
            path.mkdir()
        elif stat.S_ISLNK(entry.kind):
            os.symlink(os.fsdecode(entry.content), path)
        else:
            path.write_bytes(entry.content)
            os.utime(path, ns=(entry.modified, entry.modified))


class Kept:
    """A folder's state that can be put back for the process that works there: the same files, also those it has open."""

    def __init__(self, root: Path, links: Path):
        """links: a folder of the same file system, where a link to each file keeps it."""
        self.root, self.links = root, links
        self.state = read(root)
        shutil.rmtree(links, ignore_errors=True)
        links.mkdir(parents=True)
        for number, (name, entry) in enumerate(self.state.items()):
            if stat.S_ISREG(entry.kind):
                os.link(root / name, links / str(number))
        self._offsets = _offsets(root)

    def put_back(self) -> None:
        """Names, bytes, times of change, and how far open files were read or written, which forks share."""
        now = read(self.root)
        for name in reversed(list(now)):
            entry = self.state.get(name)
            same = entry is not None and entry.kind == now[name].kind
            if not same or (stat.S_ISREG(now[name].kind) and entry is not None and entry.inode != now[name].inode):
                path = self.root / name
                path.rmdir() if stat.S_ISDIR(now[name].kind) else path.unlink()
                now.pop(name)
        for number, (name, entry) in enumerate(self.state.items()):
            path = self.root / name
            if stat.S_ISDIR(entry.kind):
                path.mkdir(exist_ok=True)
            elif stat.S_ISLNK(entry.kind):
                if name not in now:
                    os.symlink(os.fsdecode(entry.content), path)
            else:
                if name not in now:
                    os.link(self.links / str(number), path)
                self._content_back(path, entry)
        for descriptor, offset in self._offsets.items():
            os.lseek(descriptor, offset, os.SEEK_SET)

    def drop(self) -> None:
        """Its links, when it is not put back any more."""
        shutil.rmtree(self.links)

    @staticmethod
    def _content_back(path: Path, entry: Entry) -> None:
        if path.read_bytes() != entry.content:
            with open(path, "r+b") as file:
                file.write(entry.content)
                file.truncate()
        if path.stat().st_mtime_ns != entry.modified:
            os.utime(path, ns=(entry.modified, entry.modified))


def _offsets(root: Path) -> dict[int, int]:
    """Of this process's open files below the folder, where each reads or writes next."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith(f"{root}{os.sep}"):
                found[int(name)] = os.lseek(int(name), 0, os.SEEK_CUR)
    return found
