"""What a data set on disk consists of, by hash: equal content is equal wherever it lies, and what changed since is told."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fd2fast.artifacts import STAMPS, STATE, digest, write_bytes
from fd2fast.data import typefaces
from fd2fast.data.layouts import Listing, read_layout
from fd2fast.data.typefaces import Face
from fd2fast.errors import UserError
from fd2fast.settings.config import DataConfig
from fd2fast.system.progress import Progress
from fd2fast.system.sources import MATPLOTLIB, Seen, Source, Stamp, few, known_digest, look, stamp

_SPLITS = ("train", "test")
# Files from which on the look has a bar: it takes seconds.
_SHOWN_ABOVE = 2000


@dataclass(frozen=True)
class Content:
    """What a data set is made from, as it lies there now.

    `name` is the setting that says where. `listing`: of images; `faces`: of fonts, None where the last choice holds. `record` is
    what the next look compares with: rows [path below the home, split and class ("" for fonts), sha256, stamp or None], and the
    digest that is part of the identity.
    """

    name: str
    source: Source
    listing: Listing | None = None
    faces: list[Face] | None = None
    seen: Mapping[Path, Seen] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)

    def key(self, path: Path) -> list[Any]:
        """What the decoded image of a file depends on: its path below the home and its hash."""
        assert self.listing is not None
        return [_below(self.listing.root, path), self.seen[path].sha256]

    def must_be_unmoved(self) -> None:
        """UserError that names the files that changed since they were hashed."""
        moved = [path for path, seen in self.seen.items() if stamp(path) != seen.stamp]
        # a backup or a new name for the file moves the stamp, too
        again = zip(moved, look(moved, [None] * len(moved)), strict=True)
        changed = [str(path) for path, now in again if now.sha256 != self.seen[path].sha256]
        if changed:
            raise UserError(
                f"{few(changed, 'changed')} while the data set was prepared: run the same command again when nothing writes there"
            )

    def keep(self, folder: Path) -> None:
        """Write the record for the next look into `folder`, where it is not there already; that it cannot be is no error."""
        if not self.record or _recorded(folder) == self.record:
            return
        rows = ",\n".join(json.dumps(row) for row in self.record["rows"])
        rest = json.dumps({key: value for key, value in self.record.items() if key != "rows"})
        with contextlib.suppress(UserError, OSError):
            write_bytes(folder / STAMPS, f'{rest[:-1]}, "rows": [\n{rows}]}}\n'.encode())


def look_at(config: DataConfig, out: Path) -> Content:
    """Read what `config` names; files whose stamp is the one recorded in `out` are not read again.

    Raises UserError as `read_layout` and `typefaces.choose` do, but not where all is gone that `out` was made from.
    """
    earlier = _recorded(out) or _recorded(out / STATE) or {}
    return _fonts(config, earlier) if config.dataset == "typefaces" else _images(config, earlier)


def _recorded(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / STAMPS).read_text())
        for path, where, sha256, known in record["rows"]:
            if not all(isinstance(text, str) for text in (path, where, sha256)) or not (
                known is None or len(known) == 4
            ):
                return None
        return record if isinstance(record["home"], str) and isinstance(record["digest"], str) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _below(home: Path, path: Path) -> str:
    return Path(os.path.relpath(path, home)).as_posix()


def _images(config: DataConfig, earlier: Mapping[str, Any]) -> Content:
    root = Path(config.root).expanduser() if config.root is not None else Path()
    try:
        listing = read_layout(config.dataset, config.root, level=config.level)
    except (UserError, OSError) as error:
        return _unreadable("root", root, earlier, error)
    splits = [(split, getattr(listing, split)) for split in _SPLITS]
    files = [path for _, split in splits for path in split.files]
    places = [f"{name} {listing.classes[label]}" for name, split in splits for label in split.labels]
    seen = _look(listing.root, files, earlier)
    if earlier and not any(one.sha256 for one in seen):
        reason = f"none of the {len(files)} images below {listing.root} can be read"
        return Content("root", Source(str(root), None, gone=reason))
    rows = _rows(listing.root, files, places, seen)
    content = {"classes": listing.classes, "files": [row[:3] for row in rows]}
    record: dict[str, Any] = {"home": os.path.realpath(listing.root), "digest": digest(content), "rows": rows}
    source = Source(
        str(root), record["digest"], changes=_changes(earlier, record), resumes=True, earlier=earlier.get("digest")
    )
    return Content("root", source, listing, seen=dict(zip(files, seen, strict=True)), record=record)


def _fonts(config: DataConfig, earlier: Mapping[str, Any]) -> Content:
    folder = Path(config.fonts).expanduser() if config.fonts is not None else typefaces.builtin_folder()
    place = str(folder) if config.fonts is not None else MATPLOTLIB
    faces: list[Face] | None = None
    try:
        skip = config.bad_images == "skip"
        files = typefaces.font_files(folder, skip=skip)
        seen = _look(folder, files, earlier)
        rows = _rows(folder, files, [""] * len(files), seen)
        record: dict[str, Any] = {"home": os.path.realpath(folder), "classes": config.classes, "rows": rows}
        if earlier.get("classes") == config.classes and _plain_rows(earlier) == _plain_rows(record):
            record["digest"] = earlier["digest"]
        else:
            faces = typefaces.choose(config.classes, config.fonts, skip=skip)
            # of the chosen faces only: fonts that no class is made from do not count
            record["digest"] = digest([[face.name, face.source, known_digest(face.path)] for face in faces])
    except (UserError, OSError) as error:
        return _unreadable("fonts", folder, earlier, error)
    source = Source(
        place,
        record["digest"],
        changes=_changes(earlier, record),
        survives=config.fonts is None,
        earlier=earlier.get("digest"),
    )
    return Content("fonts", source, None, faces, dict(zip(files, seen, strict=True)), record)


def _unreadable(name: str, folder: Path, earlier: Mapping[str, Any], error: UserError | OSError) -> Content:
    """A source that is gone, where nothing of what was read earlier is there; else the error, with what is missing now."""
    reason = str(error) if isinstance(error, UserError) else f"{folder} cannot be read: {error.strerror or error}"
    if _gone(folder, earlier):
        return Content(name, Source(str(folder), None, gone=reason))
    if earlier and (missing := few((row[0] for row in earlier["rows"] if not _there(earlier, row)), "removed")):
        reason += f"; since the earlier run of this command: {missing}"
    raise UserError(reason) from error


def _look(home: Path, files: Sequence[Path], earlier: Mapping[str, Any]) -> list[Seen]:
    stamps = {path: (known, sha256) for path, _, sha256, known in earlier.get("rows", []) if known is not None}
    known: list[tuple[Stamp, str] | None] = []
    for path in files:
        found = stamps.get(_below(home, path))
        known.append(None if found is None else ((found[0][0], found[0][1], found[0][2], found[0][3]), found[1]))
    if len(files) <= _SHOWN_ABOVE:
        return look(files, known)
    with Progress("read", len(files), unit="file") as bar:
        return look(files, known, bar.step)


def _rows(home: Path, files: Sequence[Path], places: Sequence[str], seen: Sequence[Seen]) -> list[list[Any]]:
    return [
        [_below(home, path), place, one.sha256, list(one.stamp) if one.settled and one.stamp is not None else None]
        for path, place, one in zip(files, places, seen, strict=True)
    ]


def _plain_rows(record: Mapping[str, Any]) -> list[list[Any]]:
    return [row[:3] for row in record.get("rows", [])]


def _gone(folder: Path, earlier: Mapping[str, Any]) -> bool:
    """Whether nothing of what was read earlier is there; without a record of that, whether the folder is missing or empty."""
    if earlier and _holds(folder, earlier["home"]):
        return not any(_there(earlier, row) for row in earlier["rows"])
    try:
        with os.scandir(folder) as entries:
            return not any(entries)
    except OSError:
        return True


def _there(earlier: Mapping[str, Any], row: Sequence[Any]) -> bool:
    return stamp(Path(earlier["home"], row[0])) is not None


def _holds(folder: Path, home: str) -> bool:
    """Whether `home` is the folder or lies in it."""
    inner = Path(os.path.realpath(home))
    return Path(os.path.realpath(folder)) in (inner, *inner.parents)


def _changes(earlier: Mapping[str, Any], record: Mapping[str, Any]) -> str:
    """What was removed, added, changed or moved since the earlier look, in words; "" where there was none."""
    if not earlier or not _plain_rows(earlier):
        return ""
    before = {path: (place, sha256) for path, place, sha256, _ in earlier["rows"]}
    now = {path: (place, sha256) for path, place, sha256, _ in record["rows"]}
    both = [path for path in now if path in before]
    return ", ".join(
        told
        for told in (
            few((p for p in both if before[p][1] != now[p][1] and now[p][1]), "changed"),
            few((p for p in both if before[p][1] != now[p][1] and not now[p][1]), "cannot be read any more"),
            few((p for p in now if p not in before), "added"),
            few((p for p in before if p not in now), "removed"),
            few(
                (f"{p}: {before[p][0]}, now {now[p][0]}" for p in both if before[p][0] != now[p][0]), "of another class"
            ),
        )
        if told
    )
