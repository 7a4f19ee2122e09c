"""What a stage reads from outside its artifacts: where it lies, the hash of its content, and whether that is still the same."""

from __future__ import annotations

import functools
import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fd2fast.errors import UserError

SHOWN = 3
# A file changed less than so many nanoseconds before it was hashed may change again under the same stamp: coarsest clocks of file
# systems tick every two seconds.
SETTLED = 2_000_000_000
_CHUNK = 1024

# Places that are no paths: weights fetched by name, the typefaces that come with matplotlib, and arrays in memory.
HUB, MATPLOTLIB, MEMORY = "hub", "matplotlib", "memory"
_NAMES = (HUB, MATPLOTLIB, MEMORY)

# size (bytes), time of the content's and of the entry's last change (ns), inode
Stamp = tuple[int, int, int, int]


@dataclass(frozen=True)
class Source:
    """One thing read from outside. The place is recorded, the digest of the content belongs to the identity.

    digest None: it cannot be read now, `gone` says why; only a finished result from the same place then counts as made from it.
    changes: how the content differs from what the recorded result was made from, where that is known. survives: a finished
    result stays good when the content changes later. resumes: unfinished work may go on with changed content. earlier: digest at
    the last look, for a result whose manifest does not tell (older versions).
    """

    place: str
    digest: str | None
    gone: str = ""
    changes: str = ""
    survives: bool = False
    resumes: bool = False
    earlier: str | None = None


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp(path: Path) -> Stamp | None:
    """What changes whenever the file does; None unless it is a regular file (links are followed)."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return (found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino) if stat.S_ISREG(found.st_mode) else None


@functools.lru_cache(maxsize=1 << 17)
def _digest(path: str, stamp: Stamp) -> str:
    return file_digest(Path(path))


def known_digest(path: Path) -> str:
    """`file_digest`, read once by this process as long as the file's stamp stays. Raises OSError, also for what is no file."""
    began, now = time.time_ns(), stamp(path)
    return _digest(os.path.abspath(path), now) if now is not None and _settled(now, began) else file_digest(path)


def _settled(stamp: Stamp, began: int) -> bool:
    """Whether a change after the time `began` (ns) must show in the stamp."""
    return stamp[2] < began - SETTLED


@dataclass(frozen=True)
class Seen:
    """A file as it was read: sha256 ("" if it could not be read), its stamp then, and whether that can be relied on later."""

    sha256: str
    stamp: Stamp | None
    settled: bool


def look(
    files: Sequence[Path], known: Sequence[tuple[Stamp, str] | None], tell: Callable[[int], None] = lambda count: None
) -> list[Seen]:
    """Every file hashed; where its stamp is the known one, the known hash is taken. What cannot be read gets "".

    tell: called with the number of files looked at since the last call.
    """

    def one(number: int) -> Seen:
        began, now, earlier = time.time_ns(), stamp(files[number]), known[number]
        if now is None:
            return Seen("", None, False)
        if earlier is not None and earlier[0] == now:
            return Seen(earlier[1], now, True)
        try:
            return Seen(file_digest(files[number]), now, _settled(now, began))
        except OSError:
            return Seen("", now, False)

    seen: list[Seen] = []
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        while len(seen) < len(files):
            chunk = list(pool.map(one, range(len(seen), min(len(seen) + _CHUNK, len(files)))))
            seen += chunk
            tell(len(chunk))
    return seen


def of_file(path: str, missing: str) -> Source:
    """One file as a source; `missing` is the error where there is no such file."""
    try:
        if not Path(path).is_file():
            return Source(path, None, gone=missing)
        return Source(path, known_digest(Path(path)))
    except (OSError, ValueError) as error:
        return Source(path, None, gone=f"{path} cannot be read: {getattr(error, 'strerror', None) or error}")


def recorded_place(place: str) -> str:
    """The place as the manifest keeps it: absolute; a name that is no path, such as hub, as it is."""
    if place in _NAMES:
        return place
    path = os.path.expanduser(place)
    # what lies above a link is not what is written before it
    return os.path.realpath(path) if ".." in Path(path).parts else os.path.abspath(path)


def same_place(one: str, other: str) -> bool:
    """Whether two places are one, however they are written (relative, absolute, through links)."""
    if one in _NAMES or other in _NAMES:
        return one == other
    return os.path.realpath(os.path.expanduser(one)) == os.path.realpath(os.path.expanduser(other))


def few(names: Iterable[str], verb: str) -> str:
    """'3 removed (a, b, c)', at most SHOWN of the names; "" for none."""
    names = list(names)
    if not names:
        return ""
    more = ", ..." if len(names) > SHOWN else ""
    return f"{len(names)} {verb} ({', '.join(names[:SHOWN])}{more})"


def compare(
    found: Mapping[str, Any], wanted: Mapping[str, Source], names: Iterable[str], *, finished: bool
) -> tuple[str, list[str]]:
    """Why what `found` (a manifest, or its beginning) was made from is not `wanted` ("" if it is), and what to tell.

    names: of all sources that there may be. `found` of an older version holds their places among its settings and no content, or
    the hash of their content among its settings or facts.
    Raises UserError for a source that cannot be read, unless a finished result was made from the same place.
    """
    notes: list[str] = []
    for name in names:
        settings, facts = found.get("config") or {}, found.get("facts") or {}
        place = (found.get("places") or {}).get(name) or settings.get(name)
        kept = (found.get("inputs") or {}).get(name)
        digest = kept or settings.get(f"{name}_sha256") or facts.get(f"{name}_sha256")
        if difference := _compare(name, place, digest, wanted.get(name), finished, notes):
            return difference, []
    return "", notes


def _compare(
    name: str, place: str | None, digest: str | None, source: Source | None, finished: bool, notes: list[str]
) -> str:
    if source is None:
        return f"{name} was {place}, now none" if place or digest else ""
    same = place is not None and same_place(place, source.place)
    digest = digest or source.earlier
    if source.digest is None:
        if finished and same:
            notes.append(f"{name} cannot be compared with what this was made from ({source.gone}): taken as it is")
            return ""
        raise UserError(source.gone)
    if digest == source.digest:
        return ""
    if digest is None and place is None:
        # typefaces' own fonts left no trace in older manifests
        return "" if source.survives else f"{name} was none, now {source.place}"
    if digest is None:
        if same:
            notes.append(f"{name} {source.place}: an earlier version did not record its content, only where it lies")
            return ""
        return f"{name} was {place}, now {source.place}, and an earlier version did not record its content"
    told = source.changes or f"its content is not what it was{'' if same or place is None else f' in {place}'}"
    if (finished and source.survives) or (not finished and source.resumes):
        kept = "this was made before and stays as it is" if finished else "what is still right is kept"
        notes.append(f"{name} {source.place} has changed: {told}; {kept}")
        return ""
    return f"{name} {source.place}: {told}"
