"""One walk over a folder of files: every real file once, links that lead back and known junk counted, faults named.

Names are ordered by their bytes, so that neither the file system nor the locale decides the order of a listing.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import os
import re
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from fd2fast.errors import UserError

# Folders below the one that is walked; deeper ones are a fault, because nobody sorts images like that.
MAX_DEPTH = 64
# Entries of one walk: more are not a class of images but a link to something else.
MAX_ENTRIES = 4_000_000

# What is left out, by reason: the words of the log for one and for several.
REASONS = {
    "junk": ("entry of a NAS, system or archive program", "entries of NAS, system or archive programs"),
    "hidden": ("hidden entry", "hidden entries"),
    "leads_back": ("link that leads back to a folder above it", "links that lead back to a folder above them"),
    "again": ("further link to what is listed already", "further links to what is listed already"),
    "special": ("pipe, socket or device", "pipes, sockets or devices"),
    "beside": ("file beside the class folders", "files beside the class folders"),
}

# Names, in small letters, that NAS systems, operating systems, archive and picture programs leave behind.
_JUNK = frozenset(
    """
    @eadir @tmp @recycle @recycle.bin @recently-snapshot @sharebin @sharesnap @snapshot @appstore @database
    @autoupdate @s2s @cloudsync @transcode @quarantine @__thumb @longlink pax_global_header paxheader __pycache__
    #recycle #snapshot ~snapshot .@__thumb .@__qini .snapshot .snapshots .snap .zfs .streams .recycle .#recycle
    lost+found .lost+found __macosx .ds_store .appledouble .appledb .appledesktop .spotlight-v100 .fseventsd
    .temporaryitems .trashes .trash .documentrevisions-v100 .apdisk .localized thumbs.db thumbs.db:encryptable
    ehthumbs.db ehthumbs_vista.db desktop.ini $recycle.bin recycler dfsrprivate picasa.ini .picasa.ini
    .picasaoriginals .thumbnails .thumbs .comments .xvpics zbthumbnail.info pspbrwse.jbf .directory .dropbox
    .dropbox.cache .stfolder .stversions _gsdata_ .ipynb_checkpoints .git .svn .hg
    """.split()
) | {"system volume information", "network trash folder", "temporary items", "thevolumesettingsfolder", "icon\r"}
_JUNK_PATTERN = re.compile(
    r"\._.*|\.trash-.*|found\.\d{3}|\.nfs[0-9a-f]+|\.smbdelete.*|\.fuse_hidden.*|\.syncthing\..*|\.~lock\..*|~\$.*"
    r"|@?syno(logydrive|finder|photo_thumb|file_thumb|index_media|video_video).*|.*@syno(eastream|resource)|.*:?zone\.identifier|.*:com\.\w+\..*"
    r"|.*:afp_(afpinfo|resource)|.*:\$data|paxheaders\..*|rar\$.*|~syncthing~.*|\.?_?sync_[0-9a-f]+\.db.*|.*\.ffs_(tmp|db|lock)",
    re.DOTALL,
)


def is_junk(name: str) -> bool:
    """Whether an entry of this name is something that a NAS, an operating system or another program left behind."""
    small = name.lower()
    return small in _JUNK or _JUNK_PATTERN.fullmatch(small) is not None


def order(path: str | Path) -> list[bytes]:
    """Sort key of a path: the bytes of its parts, as a file system without an encoding holds them."""
    return os.fsencode(path).split(b"/")


@dataclass
class LeftOut:
    """How many entries were left out for each of REASONS, and the first of them by `order`."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, path: str, count: int = 1) -> None:
        """Count an entry; `path` may become the example."""
        self.counts[reason] = self.counts.get(reason, 0) + count
        known = self.first.get(reason)
        if known is None or order(path) < order(known):
            self.first[reason] = path

    def merge(self, other: LeftOut) -> None:
        """Add what another walk left out."""
        for reason, count in other.counts.items():
            self.add(reason, other.first[reason], count)

    def say(self, root: Path | None = None) -> str:
        """'3 hidden entries (a/.x), 1 pipe, socket or device (b/p)', paths relative to `root`; '' when nothing was left out."""
        parts = []
        for reason, words in REASONS.items():
            if count := self.counts.get(reason, 0):
                example = ""
                if reason in self.first:
                    path = os.path.relpath(self.first[reason], root) if root is not None else self.first[reason]
                    example = f" ({path})" if count == 1 else f" ({path}, ...)"
                parts.append(f"{count} {words[count > 1]}{example}")
        return ", ".join(parts)


@dataclass
class Found:
    """What a walk found. files: by `order`. faults, dangling: paths and one line on each; dangling: links without a target.

    followed: links to folders elsewhere that were entered, and their targets. entries: how many it looked at.
    """

    files: list[Path] = field(default_factory=list)
    faults: list[tuple[Path, str]] = field(default_factory=list)
    dangling: list[tuple[Path, str]] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)
    followed: list[tuple[Path, str]] = field(default_factory=list)
    entries: int = 0


def walk(
    folder: Path | str,
    *,
    root: Path | str | None = None,
    hidden: bool = False,
    wanted: Callable[[str], bool] | None = None,
) -> Found:
    """Every file below `folder`, links followed, each real file once: the name that is no link, else the first by `order`.

    Left out and counted: junk (`is_junk`), hidden entries unless `hidden`, links to a folder above them (or above `folder` or
    `root`), further names of a file or folder, pipes, sockets and devices, which are never opened. What cannot be read is a
    fault, nothing is raised for it. wanted: only files of such names. Raises UserError above MAX_ENTRIES entries.
    """
    return _Walk(os.fspath(folder), os.fspath(root) if root is not None else None, hidden, wanted).run()


def class_folders(folder: Path, root: Path) -> tuple[list[str], Found]:
    """Names of the folders directly in `folder`, by `order`, links followed; and what is wrong or left out there (no files)."""
    scan = _Walk(os.fspath(folder), os.fspath(root), False, None)
    return scan.folders(), scan.found


def linked_above(target: str, places: Iterable[str]) -> bool:
    """Whether the real path `target` is one of the real paths `places` or a folder above one."""
    stem = target.rstrip("/") + "/"
    return any(place == target or place.startswith(stem) for place in places)


def trouble(path: str, error: OSError) -> str:
    """One line on why an entry cannot be read."""
    if error.errno == errno.ENAMETOOLONG:
        return f"{path[:200]}...: the path is too long"
    return f"{path}: {error.strerror or error}"


# Device and inode.
_Mark = tuple[int, int]


class _Link(NamedTuple):
    order: list[bytes]
    path: str
    folder: str  # real path of the folder that it lies in
    depth: int
    above: tuple[_Mark, ...]


class _File(NamedTuple):
    path: str
    linked: bool
    inode: int


class _Walk:
    """One walk: real folders first and each once, then links to folders by `order`."""

    def __init__(self, folder: str, root: str | None, hidden: bool, wanted: Callable[[str], bool] | None):
        self.found = Found()
        self._folder, self._hidden, self._wanted = folder, hidden, wanted
        self._real = os.path.realpath(folder)
        self._bases = [self._real] + ([os.path.realpath(root)] if root is not None else [])
        self._visited: set[str] = set()
        self._files: list[_File] = []
        self._links: list[_Link] = []  # a heap: the first by `order` goes first

    def run(self) -> Found:
        self._tree(self._folder, self._real, 0, self._marks_above())
        while self._links:
            # one at a time: the tree behind a link may hold the target of the next
            _, path, here, depth, above = heapq.heappop(self._links)
            target = os.path.realpath(path)
            if linked_above(target, [here, *self._bases]):
                self.found.left_out.add("leads_back", path)
            elif target in self._visited:
                self.found.left_out.add("again", path)
            elif self._tree(path, target, depth, above):
                self.found.followed.append((Path(path), target))
        paths = sorted(self._once(), key=order)
        self.found.files = [Path(path) for path in paths]
        self.found.faults.sort(key=lambda fault: order(fault[0]))
        self.found.dangling.sort(key=lambda fault: order(fault[0]))
        return self.found

    def folders(self) -> list[str]:
        """Names of the folders directly in the folder."""
        names = []
        for entry in self._scan(self._folder):
            kind, _ = self._kind(entry)
            if kind == "file":
                self.found.left_out.add("beside", entry.path)
            elif kind and entry.is_symlink() and linked_above(os.path.realpath(entry.path), self._bases):
                self.found.left_out.add("leads_back", entry.path)
            elif kind:
                names.append(entry.name)
        return sorted(names, key=os.fsencode)

    def _marks_above(self) -> tuple[_Mark, ...]:
        """Device and inode of the folders from the root to the folder that the walk begins in, that one left out."""
        marks = []
        for base in self._bases[1:]:
            place = self._real
            while place not in (base, "/") and place.startswith(base):
                place = os.path.dirname(place)
                with contextlib.suppress(OSError):
                    status = os.stat(place)
                    marks.append((status.st_dev, status.st_ino))
        return tuple(marks)

    def _tree(self, path: str, real: str, depth: int, above: tuple[_Mark, ...]) -> bool:
        """All real folders from `path` on; links to folders are kept for later. False where `path` leads back to `above`."""
        start, pending = path, [(path, real, depth, above)]
        while pending:
            path, real, depth, above = pending.pop()
            if real in self._visited:
                self.found.left_out.add("again", path)
                continue
            self._visited.add(real)
            if depth > MAX_DEPTH:
                self._fault(path, f"{path[:200]}: lies more than {MAX_DEPTH} folders deep")
                continue
            try:
                status = os.stat(path)
            except OSError as error:
                self._fault(path, trouble(path, error))
                continue
            mark = (status.st_dev, status.st_ino)
            # not only links do that: mounts, damaged file systems, and names in other letters where they mean the same
            if status.st_ino and mark in above:
                self.found.left_out.add("leads_back", path)
                if path == start:
                    return False
                continue
            for entry in self._scan(path):
                kind, inode = self._kind(entry)
                if kind == "file" and (self._wanted is None or self._wanted(entry.name)):
                    self._files.append(_File(entry.path, entry.is_symlink(), inode))
                elif kind == "folder" and entry.is_symlink():
                    link = _Link(order(entry.path), entry.path, real, depth + 1, (*above, mark))
                    heapq.heappush(self._links, link)
                elif kind == "folder":
                    pending.append((entry.path, os.path.join(real, entry.name), depth + 1, (*above, mark)))
        return True

    def _scan(self, path: str) -> list[os.DirEntry[str]]:
        """The entries of a folder without junk and hidden ones; none where it cannot be read, which is a fault."""
        kept: list[os.DirEntry[str]] = []
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    self.found.entries += 1
                    if self.found.entries > MAX_ENTRIES:
                        raise UserError(
                            f"{self._folder} holds more than {MAX_ENTRIES} entries (reached in {path}): "
                            "is a link in it one to something else? remove it"
                        )
                    if is_junk(entry.name):
                        self.found.left_out.add("junk", entry.path)
                    elif entry.name.startswith(".") and not self._hidden:
                        self.found.left_out.add("hidden", entry.path)
                    else:
                        kept.append(entry)
        except OSError as error:
            self._fault(path, trouble(path, error))
            return []
        return kept

    def _kind(self, entry: os.DirEntry[str]) -> tuple[str, int]:
        """'file' or 'folder', links followed, and its inode; '' for anything else, which is counted or a fault. Opens nothing."""
        try:
            if entry.is_symlink():
                return self._target_kind(entry.path)
            if entry.is_dir(follow_symlinks=False):
                return "folder", entry.inode()
            if entry.is_file(follow_symlinks=False):
                return "file", entry.inode()
        except OSError as error:
            self._fault(entry.path, trouble(entry.path, error))
            return "", 0
        self.found.left_out.add("special", entry.path)
        return "", 0

    def _target_kind(self, path: str) -> tuple[str, int]:
        try:
            status = os.stat(path)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            ends = "which leads back to itself" if error.errno == errno.ELOOP else "which does not exist"
            self.found.dangling.append((Path(path), f"{path}: a link to {os.readlink(path)}, {ends}"))
            return "", 0
        if stat.S_ISDIR(status.st_mode):
            return "folder", status.st_ino
        if stat.S_ISREG(status.st_mode):
            return "file", status.st_ino
        self.found.left_out.add("special", path)
        return "", 0

    def _fault(self, path: str, text: str) -> None:
        self.found.faults.append((Path(path), text))

    def _once(self) -> list[str]:
        """The paths without further names of the same file: links to it, and hard links."""
        groups: dict[int, list[_File]] = {}
        relisted = any(file.linked for file in self._files)
        for file in self._files:
            inode = file.inode
            if relisted and not file.linked:
                # a folder's listing may give another number than the file has, which a link's target is compared by
                if (status := self._status(file.path)) is None:
                    continue
                inode = status.st_ino
            groups.setdefault(inode, []).append(file)
        kept = []
        for group in groups.values():
            kept += [group[0].path] if len(group) == 1 else self._different(group)
        return kept

    def _different(self, group: list[_File]) -> list[str]:
        """The paths of a group of equal inode numbers without further names of the same file."""
        kept: list[str] = []
        places: set[str] = set()
        marks: set[tuple[int, int]] = set()
        for file in sorted(group, key=lambda f: (f.linked, order(f.path))):
            status, place = self._status(file.path), os.path.realpath(file.path)
            if status is None:
                continue
            mark = (status.st_dev, status.st_ino)
            # the number alone is no proof: some network and user-space file systems give it twice
            if place in places or (status.st_nlink > 1 and mark in marks):
                self.found.left_out.add("again", file.path)
                continue
            places.add(place)
            marks.add(mark)
            kept.append(file.path)
        return kept

    def _status(self, path: str) -> os.stat_result | None:
        """A file's status; None where it is gone or cannot be asked, which is a fault."""
        try:
            return os.stat(path)
        except OSError as error:
            self._fault(path, trouble(path, error))
            return None
