"""Disk space: what a stage will write, what of it is there already, what is free, and whether a folder can be written."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from fd2fast.errors import UserError

# Folder names longer than this no common file system takes, in bytes.
LONGEST_NAME = 255


class Space(NamedTuple):
    """Bytes that a stage leaves or holds: surely at least, and usually."""

    least: int
    usual: int


def size_text(size: float) -> str:
    """'3.2 GB', '45 MB', '12 kB'."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size / 1e3:.0f} kB"


def nearest_existing(path: Path) -> Path:
    """`path` or the first folder above it that is there."""
    path = Path(os.path.abspath(path))
    return next(one for one in (path, *path.parents) if os.path.lexists(one))


def free_space(path: Path) -> int | None:
    """Bytes free where `path` lies or would lie; None where the file system does not say."""
    try:
        usage = shutil.disk_usage(nearest_existing(path))
    except OSError:
        return None
    return usage.free if usage.total else None


def taken(folder: Path) -> int:
    """Bytes on disk of all files below `folder`; 0 where there is none."""
    total = 0
    for here, _, names in os.walk(folder):
        for name in names:
            try:
                stat = os.lstat(os.path.join(here, name))
            except OSError:
                continue
            total += getattr(stat, "st_blocks", 0) * 512
    return total


def folder_faults(path: Path) -> list[str]:
    """Why nothing could be written to the folder `path`, whether it is there or not; nothing is left behind."""
    there = nearest_existing(path)
    if not there.is_dir():
        link = " is a link to nothing" if there.is_symlink() and not there.exists() else " is a file"
        return [f"out {path}: {there}{link}; wanted a folder to write to"]
    if long := [part for part in path.parts if len(os.fsencode(part)) > LONGEST_NAME]:
        return [f"out {path}: {long[0][:20]!r}... is longer than {LONGEST_NAME} bytes; choose a shorter name"]
    try:
        # has no name, or loses it at once: a kill leaves nothing
        with tempfile.TemporaryFile(dir=there, prefix=".fd2fast-tmp-"):
            return []
    except OSError as error:
        return [f"out {path}: {there} cannot be written ({error.strerror or error}); choose another folder"]


def must_hold(path: Path, needed: Space, what: str) -> tuple[list[str], list[str]]:
    """Faults and warnings: surely too little space at `path` for `what`, or less than it usually takes."""
    free = free_space(path)
    if free is None or needed.usual <= free:
        return [], []
    where = f"{size_text(free)} are free at {nearest_existing(path)}"
    if needed.least > free:
        return [f"{what}: at least {size_text(needed.least)} more will be written, {where}"], []
    return [], [f"{what}: about {size_text(needed.usual)} more will be written, {where}"]


def refuse_folder(path: Path) -> None:
    """UserError unless the folder could be written."""
    for fault in folder_faults(path):
        raise UserError(fault)
