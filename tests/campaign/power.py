"""What a disk may hold after the power went: synced files, and of all else as much as chance had brought there."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(eq=False)
class _File:
    """One file's bytes that are safe; None where none were ever synced."""

    safe: bytes | None = None


def keep(folder: Path) -> dict[str, bytes]:
    """The files below a folder, all of them safe: what `cut` begins with."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def cut(folder: Path, before: dict[str, bytes], folders: set[str], journal: Path, rng: random.Random) -> dict[str, int]:
    """Replace what lies below `folder` by what a disk may hold; call it when no process writes there any more.

    before, folders: files (`keep`) and folders at the begin of the journal. Each folder has its changes of names in order, and
    loses some of the last since it was synced; a change of one folder may be lost where a later one of another is kept. A move
    between folders is one change: either folder's sync brings it, and what came before it where it went. A file not synced since
    it was written may be empty, cut short, hold zeros, or be whole. Returns counts of what was lost.
    """
    names = {path: _File(content) for path, content in before.items()}  # as programs see them
    disk, there = dict(names), set(folders)  # as they are on the disk
    waiting: dict[str, list[tuple[str, ...]]] = {}
    files: dict[tuple[str, ...], _File] = {}

    def apply(change: tuple[str, ...]) -> None:
        kind, path = change[0], change[1]
        if kind == "mkdir":
            there.add(path)
        elif kind == "rmdir":
            there.discard(path)
        elif kind == "unlink":
            disk.pop(path, None)
        else:
            if kind == "rename":
                disk.pop(change[2], None)
            disk[path] = files[change]

    def sync_folder(path: str) -> None:
        reached = waiting.pop(path, [])
        for changes in waiting.values():
            moved = [n for n, c in enumerate(changes) if c[0] == "rename" and str(Path(c[2]).parent) == path]
            if moved:
                reached += changes[: moved[-1] + 1]
                del changes[: moved[-1] + 1]
        for change in sorted(reached, key=_order):
            apply(change)
        for parent in Path(path).parents:  # a folder that is safe has its own name there
            for change in [
                c for c in waiting.get(str(parent), []) if c[0] == "mkdir" and Path(path).is_relative_to(c[1])
            ]:
                waiting[str(parent)].remove(change)
                apply(change)

    log = (journal / "log").read_bytes().decode()
    lines = [json.loads(line) for line in log.splitlines(keepends=True) if line.endswith("\n")]
    for number, (kind, *paths) in enumerate(lines):
        path = paths[0]
        if kind == "sync":
            if len(paths) > 1:
                names.setdefault(path, _File()).safe = (journal / paths[1]).read_bytes()
            else:
                sync_folder(path)
            continue
        if kind in ("allocate", "truncate"):
            continue
        change: tuple[str, ...] = (kind, path, str(number))
        if kind == "create":
            names[path] = files[change] = _File()
        elif kind == "unlink":
            names.pop(path, None)
        elif kind in ("rename", "link"):
            source, path = paths
            if source not in names:  # a folder
                raise ValueError(f"the model of the disk knows no renamed folders: {source}")
            change = (kind, path, source, str(number))
            names[path] = files[change] = names[source]
            if kind == "rename":
                del names[source]
        waiting.setdefault(str(Path(path).parent), []).append(change)

    counts = {"names lost": 0, "contents lost": 0}
    arrived = []
    for changes in waiting.values():
        kept = rng.randint(0, len(changes))
        counts["names lost"] += len(changes) - kept
        arrived += changes[:kept]
    for change in sorted(arrived, key=_order):
        apply(change)
    now = {id(file): Path(path) for path, file in names.items()}
    written: dict[str, bytes] = {}
    for path, file in disk.items():
        seen = now.get(id(file))
        content = seen.read_bytes() if seen is not None and seen.is_file() else file.safe or b""
        if content != file.safe:
            lost = _partly(content, file.safe, rng)
            counts["contents lost"] += lost != content
            content = lost
        written[path] = content
    for entry in list(folder.iterdir()):
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    for path in sorted(there):
        if all(
            str(parent) in there or parent == folder or not parent.is_relative_to(folder)
            for parent in Path(path).parents
        ):
            Path(path).mkdir(exist_ok=True)
    for path, content in written.items():
        if Path(path).parent.is_dir():
            Path(path).write_bytes(content)
    return counts


def _order(change: tuple[str, ...]) -> int:
    return int(change[-1])


def _partly(content: bytes, safe: bytes | None, rng: random.Random) -> bytes:
    """Bytes that were written and not synced."""
    if safe is not None and len(safe) == len(content):  # pages of a map
        page = 4096
        return b"".join(rng.choice((safe, content))[at : at + page] for at in range(0, len(content), page))
    return rng.choice((b"", content[: rng.randint(0, len(content))], bytes(len(content)), content))
