"""The folder of a result: the names in it that are fd2fast's own, and what state it is in."""

from __future__ import annotations

import shutil
from pathlib import Path

from fd2fast.artifacts.files import remove, write_bytes
from fd2fast.errors import UserError
from fd2fast.system import lock

MANIFEST = "manifest.json"
STATE = "state"
# Beside the manifest, not part of the result: when its source files were last changed, so that they need not be read again.
STAMPS = "stamps.json"
BEGUN = "begun.json"
# There while an --overwrite removes a result: what is left of it then is none.
CLEARING = f"{lock.OURS}clearing"


def made(path: Path | str) -> bool:
    """Whether a finished artifact lies at `path`, of whatever settings."""
    return (Path(path) / MANIFEST).is_file()


def started(path: Path | str) -> bool:
    """Whether an artifact, finished or not, was begun at `path`."""
    return mark_of(Path(path)) is not None


def mark_of(path: Path) -> Path | None:
    """The file that shows the folder to be fd2fast's."""
    for file in (path / MANIFEST, path / STATE / BEGUN, path / CLEARING):
        if file.is_file():
            return file
    return None


def refuse_foreign(path: Path, kind: str) -> None:
    """UserError for a folder that holds files which are none of fd2fast's."""
    if path.is_dir() and mark_of(path) is None and (fault := holds_foreign(path, kind)):
        raise UserError(fault)


def holds_foreign(path: Path, kind: str) -> str:
    """What is wrong with a folder that is none of fd2fast's; "" for an empty one."""
    if any(p.name not in (STATE, STAMPS) and not p.name.startswith(lock.OURS) for p in path.iterdir()):
        return f"{path} holds other files; wanted an empty or new folder for the {kind}"
    return ""


def clear(path: Path) -> None:
    """Remove a result but not the lock; killed meanwhile, the next owner goes on with it."""
    write_bytes(path / CLEARING, b"")
    for entry in sorted(path.iterdir(), key=lambda p: p.name != MANIFEST):
        if entry.name in (lock.LOCK, CLEARING):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)
    remove(path / CLEARING)
