"""What lies in a folder that is not the data set that was wanted, and which folder or file would be right.

Every function returns the end of a message, '; ...', or '' when it has nothing to say. Little is read and nothing is raised.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import os
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

from fd2fast.data.walk import is_junk

IMAGES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
_ARCHIVES = (
    ".zip",
    ".tar",
    ".tgz",
    ".tbz2",
    ".txz",
    ".tar.gz",
    ".tar.bz2",
    ".tar.xz",
    ".tar.zst",
    ".7z",
    ".rar",
    ".gz",
)
_TABLES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".xlsx", ".parquet", ".mat", ".xml")
_NO_TABLE = ("readme", "license", "licence", "requirements", "citation", "checksum", "md5", "sha256")
_TRAIN = ("training", "trainset", "train_set", "train-set", "training_set", "trainingset", "trn", "tr", "train_images")
_TEST = (
    *("test", "testing", "testset", "test_set", "test-set", "tst", "te", "test_images", "val", "valid", "validation"),
    *("valset", "val_set", "validation_set", "val_images", "dev", "devel", "eval", "evaluation", "holdout", "hold-out"),
)
# Entries looked at in one folder, folders looked at in one search, and levels above and below the root.
_ENTRIES, _FOLDERS, _UP, _DOWN = 2000, 300, 3, 3


def peek(folder: Path) -> tuple[list[str], list[str]]:
    """Names of folders and of other entries directly in `folder`, sorted, of its first 2000; none where it cannot be read."""
    folders: list[str] = []
    files: list[str] = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in itertools.islice(entries, _ENTRIES):
            if not is_junk(entry.name) and not entry.name.startswith("."):
                (folders if os.path.isdir(entry.path) else files).append(entry.name)
    return sorted(folders), sorted(files)


def archives(folder: Path) -> str:
    """Archives that lie in `folder` and may hold what is missing."""
    found = [name for name in peek(folder)[1] if name.lower().endswith(_ARCHIVES)]
    return f"; not unpacked yet: {_few(found)} in {folder}" if found else ""


def is_archive(path: Path) -> bool:
    """Whether the name is that of an archive."""
    return path.name.lower().endswith(_ARCHIVES)


def neighbour(path: Path) -> str:
    """An entry beside the missing `path` whose name is like it but for capitals, signs or a letter; an archive of that name."""
    folders, files = peek(path.parent)
    packed = {_stem(name): name for name in files if is_archive(Path(name))}
    alike = {name.lower(): name for name in (*files, *folders) if Path(name).suffix.lower() == path.suffix.lower()}
    if close := difflib.get_close_matches(path.name.lower(), alike, n=1, cutoff=0.75):
        return f"; did you mean {path.parent / alike[close[0]]}?"
    if close := difflib.get_close_matches(path.name.lower(), packed, n=1, cutoff=0.75):
        return f"; not unpacked yet: {path.parent / packed[close[0]]}"
    return ""


def _stem(archive: str) -> str:
    """The name of an archive, in small letters, without its endings."""
    small = archive.lower()
    return next(small[: -len(ending)] for ending in sorted(_ARCHIVES, key=len, reverse=True) if small.endswith(ending))


def lies_in(root: Path, names: Iterable[str], place: Path) -> str:
    """The folders near `root` that hold any of the files `names`, which should lie in `place`."""
    found = _search(root, lambda folder: any((folder / name).exists() for name in names))
    return f"; {_few([str(p) for p in found])} holds some of them: move them to {place}" if found else ""


def elsewhere(root: Path, fits: Callable[[Path], bool], instead: Callable[[Path], bool] | None = None) -> str:
    """The folder near `root` that fits; else the one that is a tree of class folders (`instead`), for dataset 'folder'."""
    if found := _search(root, fits):
        right = "would be right: name it as the root" if len(found) == 1 else "would be right: name one as the root"
        return f"; {_few([str(p) for p in found])} {right}"
    if instead is not None and (found := [root] if instead(root) else _search(root, instead)):
        return f"; {found[0]} holds train/CLASS/* folders: dataset 'folder' with that root reads them"
    return ""


def _search(root: Path, fits: Callable[[Path], bool]) -> list[Path]:
    """Folders that fit: the nearest above the root, else those on the first level below it that has any."""

    def good(path: Path) -> bool:
        try:
            return fits(path)
        except OSError:
            return False

    above = Path(os.path.abspath(root))
    for parent in list(above.parents)[:_UP]:
        if parent != parent.parent and good(parent):
            return [parent]
    level, seen = [root], 0
    for _ in range(_DOWN):
        level = [path / name for path in level for name in peek(path)[0]][: _FOLDERS - seen]
        seen += len(level)
        if found := [path for path in level if good(path)]:
            return found
    return []


def misnamed_split(home: Path, training: bool) -> str:
    """A folder in `home` that is the training (else the test) images by another name."""
    known = _TRAIN if training else _TEST
    wanted, others = ("train", {"train"}) if training else ("val", {"test", "val"})
    names = [n for n in peek(home)[0] if n not in others and (n.lower() in known or n.lower() in others)]
    if not names:
        return ""
    found, verb = " and ".join(f"{name}/" for name in names), "looks" if len(names) == 1 else "look"
    return f"; {found} in {home} {verb} like it: the name must be {wanted}/ (rename it or make a link)"


def loose_images(folder: Path) -> str:
    """Images directly in `folder` instead of in class folders, and a table beside them that may know their classes."""
    files = peek(folder)[1]
    images = [name for name in files if name.lower().endswith(IMAGES)]
    if not images:
        return archives(folder)
    count = f"{len(images)} images" if len(images) < _ENTRIES else f"{_ENTRIES} images or more"
    lie = "1 image lies" if len(images) == 1 else f"{count} lie"
    tables = [folder / n for n in files if _is_table(n)] + [
        folder.parent / n for n in peek(folder.parent)[1] if _is_table(n)
    ]
    known = f" ({_few([str(t) for t in tables])} may say which class each belongs to)" if tables else ""
    return f"; {lie} directly in it, without labels: wanted {folder.name}/CLASS/*, a folder for each class{known}"


def _is_table(name: str) -> bool:
    small = name.lower()
    return small.endswith(_TABLES) and not small.startswith(_NO_TABLE)


def other_test(test: Path, classes: Iterable[str]) -> str:
    """val/ beside a test/ without the classes: where val/ has them, it would be right."""
    val = test.with_name("val")
    if test.name == "val" or not set(classes) <= set(peek(val)[0]):
        return ""
    return f"; {val} has the class folders of train/ and would be right: move or rename {test}, then val/ is taken"


def too_deep(folder: Path, classes: list[str]) -> str:
    """The one class folder that holds nothing but folders: the classes lie a level too deep."""
    if len(classes) != 1:
        return ""
    inner, files = peek(folder / classes[0])
    if not inner or files:
        return ""
    return f"; {folder / classes[0]} holds only folders ({_few(inner)}): if they are the classes, move them up into {folder}"


def look_alikes(names: Iterable[str]) -> list[tuple[str, str, str]]:
    """Pairs of names that a person cannot tell apart, or hardly, and what they differ in."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_plain(name), []).append(name)
    return [(g[0], other, _difference(g[0], other)) for g in groups.values() for other in g[1:]]


def say_look_alikes(pairs: list[tuple[str, str, str]]) -> str:
    """The pairs in words, with the characters that differ written out."""
    return ", ".join(f"{ascii(a)} and {ascii(b)} (differ only in {why})" for a, b, why in pairs[:5]) + (
        f" and {len(pairs) - 5} more pairs" if len(pairs) > 5 else ""
    )


def _plain(name: str) -> str:
    """What is left of a name without form, width, capitals, invisible characters and spaces at the ends."""
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    return " ".join("".join(c for c in text if not _invisible(c)).split())


def _invisible(c: str) -> bool:
    variation = 0xFE00 <= ord(c) <= 0xFE0F
    return variation or (unicodedata.category(c) in ("Cf", "Cc") and not c.isspace())


def _difference(a: str, b: str) -> str:
    if a == b:
        return "nothing"
    if unicodedata.normalize("NFC", a) == unicodedata.normalize("NFC", b):
        return "Unicode form: composed or decomposed characters"
    if unicodedata.normalize("NFKC", a) == unicodedata.normalize("NFKC", b):
        return "the width or form of characters"
    if unicodedata.normalize("NFKC", a).casefold() == unicodedata.normalize("NFKC", b).casefold():
        return "capitals"
    return "spaces or invisible characters"


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
