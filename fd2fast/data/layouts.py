"""Official on-disk layouts of the data sets, read into one listing of files, labels and class names."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fd2fast.data import hints
from fd2fast.data.walk import Found, LeftOut, class_folders, is_junk, trouble, walk
from fd2fast.errors import UserError, nearest
from fd2fast.settings.config import DATASETS

SHOWN = 20
# Entries of all class folders together; ImageNet-21k, the largest set in use, has 14 million images.
MOST_ENTRIES = 40_000_000
# FGVC-Aircraft's levels: the file of its names, and the word in the names of its image lists.
LEVELS = {"variant": "variants.txt", "family": "families.txt", "manufacturer": "manufacturers.txt"}

NETTE = {
    "n01440764": "tench",
    "n02102040": "English springer",
    "n02979186": "cassette player",
    "n03000684": "chain saw",
    "n03028079": "church",
    "n03394916": "French horn",
    "n03417042": "garbage truck",
    "n03425413": "gas pump",
    "n03445777": "golf ball",
    "n03888257": "parachute",
}
WOOF = {
    "n02086240": "Shih-Tzu",
    "n02087394": "Rhodesian ridgeback",
    "n02088364": "beagle",
    "n02089973": "English foxhound",
    "n02093754": "Border terrier",
    "n02096294": "Australian terrier",
    "n02099601": "golden retriever",
    "n02105641": "Old English sheepdog",
    "n02111889": "Samoyed",
    "n02115641": "dingo",
}

# Mean and standard deviation the reference code uses, by data set and image size.
STATISTICS: dict[tuple[str, int], tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    ("cub", 224): ((0.4857, 0.4994, 0.4326), (0.2260, 0.2215, 0.2595)),
    ("cub", 64): ((0.4857, 0.4994, 0.4326), (0.2150, 0.2107, 0.2483)),
    ("aircraft", 224): ((0.4865, 0.5177, 0.5425), (0.2124, 0.2051, 0.2375)),
    ("aircraft", 64): ((0.4865, 0.5178, 0.5425), (0.2012, 0.1947, 0.2280)),
    ("cars", 224): ((0.4708, 0.4601, 0.4551), (0.2885, 0.2879, 0.2962)),
    ("cars", 64): ((0.4706, 0.4601, 0.4549), (0.2750, 0.2754, 0.2837)),
    ("imagenette", 224): ((0.4625, 0.4580, 0.4297), (0.2846, 0.2809, 0.3036)),
    ("imagewoof", 224): ((0.4855, 0.4559, 0.3934), (0.2591, 0.2513, 0.2602)),
}


@dataclass(frozen=True)
class Split:
    """Files and labels of one split, in the order of the prepared arrays."""

    files: list[Path] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Listing:
    """A data set found on disk. `root`: the folder that holds it; label k means classes[k].

    faults: what the walk over class folders could not read or follow, each with one line. left_out: what it passed over.
    empty: lines on class folders without a file. followed: links in class folders to folders elsewhere, and their targets.
    remarks: what else a person should know.
    """

    root: Path
    classes: list[str]
    train: Split
    test: Split
    faults: list[tuple[Path, str]] = field(default_factory=list)
    left_out: LeftOut = field(default_factory=LeftOut)
    empty: list[str] = field(default_factory=list)
    followed: list[tuple[Path, str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        """Lines for a person: links that lead elsewhere, what was left out, class names that look alike."""
        lines = [f"{self.root}: {remark}" for remark in self.remarks]
        if self.followed:
            path, target = self.followed[0]
            count = f"{len(self.followed)} links" if len(self.followed) > 1 else "1 link"
            lines.append(
                f"{self.root}: followed {count} to folders elsewhere ({os.path.relpath(path, self.root)} to {target})"
            )
        if text := self.left_out.say(self.root):
            lines.append(f"{self.root}: left out {text}")
        if pairs := hints.look_alikes(self.classes):
            alike = hints.say_look_alikes(pairs)
            lines.append(f"{self.root}: class names that look alike are classes of their own: {alike}")
        return lines


def register_dataset(name: str, layout: Callable[[Path], Listing]) -> None:
    """Make a layout on disk known by its name, everywhere a data set's name is taken in this process.

    layout: takes the folder that the user names as the root and lists what lies there; it raises UserError for what is missing
    or wrong, and is called more than once. Images are decoded and resized as those of any other layout.
    Raises ValueError for a name that is taken or unusable, TypeError for a layout that cannot be called.
    """
    if not isinstance(name, str) or not name or name != name.strip() or set(name) & set(":, /\\"):
        raise ValueError(f"a data set's name must be one word without ':' and ',' and '/', got {name!r}")
    if name in known_datasets():
        raise ValueError(f"there is a data set {name!r} already")
    if not callable(layout):
        raise TypeError(f"the layout of {name!r} must be a function of a folder, got a {type(layout).__name__}")
    _registered[name] = layout


def known_datasets() -> tuple[str, ...]:
    """Names of all data sets, the registered ones last."""
    return (*DATASETS, *_registered)


def _own_listing(dataset: str, root: Path) -> Listing:
    """What a registered layout lists; UserError where it contradicts itself."""
    listing = _registered[dataset](root)
    wrong = f"the registered layout {dataset!r} of {root}"
    if not isinstance(listing, Listing):
        raise UserError(f"{wrong} must return a Listing, got a {type(listing).__name__}")
    if not all(isinstance(name, str) for name in listing.classes) or len({*listing.classes}) != len(listing.classes):
        raise UserError(f"{wrong} must list class names that are different strings, got {listing.classes[:SHOWN]!r}")
    for split, own in (("training", listing.train), ("test", listing.test)):
        if len(own.files) != len(own.labels):
            raise UserError(f"{wrong} lists {len(own.files)} {split} images with {len(own.labels)} labels")
        for file, label in zip(own.files, own.labels, strict=True):
            if not isinstance(file, Path):
                raise UserError(f"{wrong} must list images as paths, got {file!r}")
            if not isinstance(label, int | np.integer) or not 0 <= label < len(listing.classes):
                raise UserError(f"{wrong}: the label of {file} must be in [0, {len(listing.classes)}), got {label!r}")
    return listing


def read_layout(dataset: str, root: Path | str | None, *, level: str = "variant") -> Listing:
    """List a data set (cub, aircraft, cars, imagenette, imagewoof, folder or a registered one) in `root` or its parent.

    level: aircraft's labels, one of LEVELS. Only annotation files and folder names are read, no image. Raises UserError naming
    what is missing or wrong: a folder, an annotation file, a line of one, a label out of range, a class without images, splits
    of different classes; and, where it can be seen, which folder or file would be right.
    """
    if root is None:
        raise UserError(f"data set {dataset!r} needs a root: the folder that holds it in its official layout")
    root = Path(root).expanduser()
    try:
        _must_be_folder(root, dataset)
        if dataset in _registered:
            listing = _own_listing(dataset, root)
        else:
            listing = _aircraft(root, level) if dataset == "aircraft" else _READERS[dataset](root)
    except OSError as error:
        raise UserError(trouble(str(error.filename or root), error)) from error
    for name, split in (("training", listing.train), ("test", listing.test)):
        missing_images(listing.classes, split.labels, name, listing.root, _why_none(listing))
    return listing


def _must_be_folder(root: Path, dataset: str) -> None:
    if root.is_dir():
        return
    wanted = f"wanted the folder of the {dataset} data set"
    if not root.exists():
        raise UserError(f"{root} does not exist; {wanted}{hints.neighbour(root)}")
    if hints.is_archive(root):
        raise UserError(f"{root} is not a folder but an archive: unpack it and name the folder; {wanted}")
    raise UserError(f"{root} is not a folder; {wanted}")


def _why_none(listing: Listing) -> str:
    """What may be why a class has no images: faults of the walk, else what its folder holds."""
    reasons = [text for _, text in listing.faults] or listing.empty
    return "".join(f"; {text}" for text in reasons[:SHOWN])


def missing_images(classes: list[str], labels: Iterable[int], split: str, root: Path, why: str = "") -> None:
    """UserError that names the classes without any image in `labels`; `why` goes behind it."""
    counts = np.bincount(np.fromiter(labels, dtype=np.int64), minlength=len(classes))
    empty = [classes[k] for k in np.flatnonzero(counts == 0)]
    if empty:
        raise UserError(f"{root}: no {split} images in {some(empty, 'class', 'classes')}{why}")


def some(items: list[str], one: str, many: str) -> str:
    """'class a' or '30 classes: a, b, ... and 10 more', at most SHOWN of them."""
    if len(items) == 1:
        return f"{one} {items[0]!r}"
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return f"{len(items)} {many}: {', '.join(repr(i) for i in items[:SHOWN])}{more}"


def _home(root: Path, names: tuple[str, ...], markers: tuple[str, ...], what: str) -> Path:
    """`root` or the one folder in it that holds any of `markers`; well-known `names` go first."""

    def fits(folder: Path) -> bool:
        return any((folder / marker).exists() for marker in markers)

    for candidate in (root, *(root / name for name in names)):
        if fits(candidate):
            return candidate
    others = [p for p in sorted(root.iterdir()) if not is_junk(p.name) and p.is_dir() and fits(p)]
    if len(others) > 1:
        raise UserError(
            f"{root} holds several {what} folders ({', '.join(p.name for p in others)}): name one as the root"
        )
    if others:
        return others[0]
    inner = f"{names[0]}/" if names else "one folder of it"
    tree = markers == ("train",)
    hint = (hints.misnamed_split(root, training=True) if tree else "") or hints.elsewhere(
        root, _is_tree if tree else fits, None if tree else _is_tree
    )
    hint = hint or hints.archives(root) or (hints.loose_images(root) if tree else "")
    raise UserError(f"{root} does not hold {what}: wanted {' or '.join(markers)} in it or in {inner}{hint}")


def _is_tree(folder: Path) -> bool:
    """Whether it holds class folders of both splits."""
    return any(hints.peek(folder / "train")[0]) and any(hints.peek(folder / name)[0] for name in ("test", "val"))


def _need(path: Path, what: str) -> Path:
    if not path.exists():
        raise UserError(f"{path} is missing: {what}{hints.neighbour(path) or hints.archives(path.parent)}")
    return path


def _need_file(path: Path, what: str) -> None:
    """UserError unless it is a regular file: a pipe or a device would be waited for without end."""
    if not _need(path, what).is_file():
        raise UserError(f"{path} is not a regular file; wanted {what}")


def _lines(path: Path, what: str) -> list[tuple[int, str]]:
    """Lines that are not blank with their number, from 1."""
    _need_file(path, what)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = path.read_text(encoding="latin-1")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    lines = [(n, line.strip()) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    if not lines:
        raise UserError(f"{path} is empty; wanted {what}")
    return lines


def _numbered(path: Path, what: str) -> dict[int, tuple[int, str]]:
    """CUB's 'id value' files: id to (line number, value)."""
    found: dict[int, tuple[int, str]] = {}
    for number, line in _lines(path, what):
        key, _, value = line.partition(" ")
        if not key.isdigit() or not value.strip():
            raise UserError(f"{path}, line {number}: wanted a number and {what}, got {line!r}")
        if int(key) in found:
            raise UserError(f"{path}, line {number}: id {key} was on line {found[int(key)][0]} already")
        found[int(key)] = (number, value.strip())
    return found


def _integer(path: Path, number: int, text: str, low: int, high: int, what: str) -> int:
    if not text.lstrip("-").isdigit() or not low <= int(text) <= high:
        raise UserError(f"{path}, line {number}: {what} must be {low} to {high}, got {text!r}")
    return int(text)


def _below(folder: Path, name: str, where: str) -> Path:
    """folder / name; a name that leads outside, or that no file can have, is refused."""
    path = folder / name
    if "\0" in name:
        raise UserError(f"{where}: {name!r} holds a NUL character, which no file name can")
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise UserError(f"{where}: {name!r} leads out of {folder}")
    return path


def _cub(root: Path) -> Listing:
    home = _home(root, ("CUB_200_2011", "CUB-200-2011"), ("images.txt", "image_class_labels.txt"), "CUB-200-2011")
    paths = _numbered(home / "images.txt", "an image path")
    labels_file, split_file = home / "image_class_labels.txt", home / "train_test_split.txt"
    labels = _numbered(labels_file, "a class number")
    splits = _numbered(split_file, "1 (training) or 0 (test)")
    names = _numbered(home / "classes.txt", "a class name")
    if sorted(names) != list(range(1, len(names) + 1)):
        raise UserError(f"{home / 'classes.txt'}: classes must be numbered 1 to {len(names)} without gaps")
    images = _need(home / "images", "the folder of the images")
    classes = [names[k + 1][1] for k in range(len(names))]
    train, test = Split(), Split()
    for file, table in ((labels_file, labels), (split_file, splits)):
        for key in sorted(table.keys() ^ paths.keys()):
            lacks = f"{file} has no line for image {key} of images.txt"
            raise UserError(
                lacks if key in paths else f"{file}, line {table[key][0]}: image {key} is not in images.txt"
            )
    for key in sorted(paths):
        number, name = paths[key]
        label = _integer(labels_file, *labels[key], 1, len(classes), "class number") - 1
        training = _integer(split_file, *splits[key], 0, 1, "split")
        split = train if training else test
        split.files.append(_below(images, name, f"{home / 'images.txt'}, line {number}"))
        split.labels.append(label)
    return Listing(home, classes, train, test)


def _aircraft(root: Path, level: str) -> Listing:
    if level not in LEVELS:
        raise UserError(f"unknown level {level!r} of aircraft: {nearest(level, LEVELS)}")
    names = LEVELS[level]
    lists = {split: f"images_{level}_{split}.txt" for split in ("trainval", "test")}
    markers = (names, lists["trainval"])
    if any((root / m).exists() for m in markers):
        data = root
    else:
        home = _home(
            root,
            ("fgvc-aircraft-2013b", "fgvc_aircraft_2013b"),
            tuple(f"data/{m}" for m in markers),
            "FGVC-Aircraft (fgvc-aircraft-2013b)",
        )
        data = home / "data"
    lines = _lines(data / names, f"one {level} a line")
    classes = [name for _, name in lines]
    index = {name: k for k, name in enumerate(classes)}
    if len(index) != len(classes):
        repeated = next((n, v) for k, (n, v) in enumerate(lines) if v in classes[:k])
        raise UserError(f"{data / names}, line {repeated[0]}: {level} {repeated[1]!r} appears twice")
    images = _need(data / "images", "the folder of the images")

    def read(name: str) -> Split:
        file, split = data / name, Split()
        for number, line in _lines(file, f"an image id and a {level} on each line"):
            image, _, label = line.partition(" ")
            if label.strip() not in index:
                raise UserError(
                    f"{file}, line {number}: {level} {label.strip()!r} is not one of the {len(classes)} in {names}"
                )
            split.files.append(_below(images, f"{image}.jpg", f"{file}, line {number}"))
            split.labels.append(index[label.strip()])
        return split

    return Listing(data, classes, read(lists["trainval"]), read(lists["test"]))


def _crashes(call: Callable[[], object]) -> bool:
    """Whether a call ends its process, tried in a forked one where the system has forks; its exceptions do not count."""
    if not hasattr(os, "fork"):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of other threads: the call needs none of their locks
        child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) < 0
    try:
        import faulthandler
        import resource

        faulthandler.disable()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        call()
    finally:
        os._exit(0)


def _mat(path: Path, what: str) -> dict[str, Any]:
    from scipy.io import loadmat

    _need_file(path, what)
    if _crashes(lambda: loadmat(path, squeeze_me=True)):
        raise UserError(
            f"{path} is not a readable MATLAB file of {what}: it is damaged so that it crashes SciPy's reader"
        )
    try:
        return loadmat(path, squeeze_me=True)
    except Exception as error:  # scipy raises many kinds for a damaged file
        raise UserError(f"{path} is not a readable MATLAB file of {what}: {error}") from error


def _annotations(path: Path, fields: tuple[str, ...]) -> list[dict[str, Any]]:
    content = _mat(path, "annotations").get("annotations")
    rows = None if content is None else np.atleast_1d(content)
    names = () if rows is None or rows.dtype.names is None else rows.dtype.names
    lacking = [f for f in fields if f not in names]
    if rows is None or lacking:
        hint = (
            "; the test set's file with labels is cars_test_annos_withlabels.mat"
            if path.name == "cars_test_annos.mat"
            else ""
        )
        raise UserError(f"{path}: no field {', '.join(lacking) or 'annotations'} in its annotations{hint}")
    return [{f: _single(path, position, row[f]) for f in fields} for position, row in enumerate(rows, 1)]


def _single(path: Path, position: int, value: Any) -> Any:
    """The one value in a field, which MATLAB keeps in arrays."""
    if isinstance(value, np.ndarray | np.generic):
        if value.size != 1:
            raise UserError(f"{path}, entry {position}: wanted one value in each field, got {value.size}")
        return value.item()
    return value


def _class_names(content: Any, path: Path) -> list[str]:
    if content is None:
        raise UserError(f"{path}: no variable class_names")
    return [str(name) for name in np.atleast_1d(content)]


def _cars(root: Path) -> Listing:
    markers = ("cars_annos.mat", "devkit", "cars_train_annos.mat", "cars_train")
    home = _home(root, ("stanford_cars", "stanford-cars", "cars"), markers, "Stanford Cars")
    single = home / "cars_annos.mat"
    if single.exists() and not ((home / "cars_train").is_dir() and not (home / "car_ims").is_dir()):
        return _cars_single(home, single)
    return _cars_devkit(home)


def _cars_label(path: Path, position: int, value: Any, classes: int) -> int:
    # not a number and infinity are beyond every bound
    if not isinstance(value, int | float | np.number) or not 1 <= value <= classes or value != int(value):
        raise UserError(f"{path}, entry {position}: class must be 1 to {classes}, got {value!r}")
    return int(value) - 1


def _cars_single(home: Path, file: Path) -> Listing:
    classes = _class_names(_mat(file, "annotations").get("class_names"), file)
    _need(home / "car_ims", "the folder of the images")
    train, test = Split(), Split()
    for position, row in enumerate(_annotations(file, ("relative_im_path", "class", "test")), 1):
        split = test if row["test"] else train
        split.files.append(_below(home, str(row["relative_im_path"]), f"{file}, entry {position}"))
        split.labels.append(_cars_label(file, position, row["class"], len(classes)))
    return Listing(home, classes, train, test)


def _cars_devkit(home: Path) -> Listing:
    def find(name: str) -> Path | None:
        return next((p for p in (home / "devkit" / name, home / name) if p.exists()), None)

    def need(name: str) -> Path:
        return find(name) or _need(home / "devkit" / name, "an annotation file of the devkit (in devkit/ or beside it)")

    wanted = ("cars_meta.mat", "cars_train_annos.mat", "cars_test_annos_withlabels.mat")
    if not any(find(name) for name in (*wanted, "cars_test_annos.mat")):
        single = "; cars_annos.mat belongs to car_ims/, which is missing" if (home / "cars_annos.mat").exists() else ""
        hint = (
            hints.lies_in(home, wanted, home / "devkit")
            or hints.archives(home)
            or hints.elsewhere(home, lambda p: (p / "cars_annos.mat").exists(), _is_tree)
        )
        raise UserError(
            f"{home} holds no annotations of Stanford Cars' images: wanted cars_annos.mat for car_ims/, or in devkit/ "
            f"{', '.join(wanted)} for cars_train/ and cars_test/{single}{hint}"
        )
    meta = need("cars_meta.mat")
    classes = _class_names(_mat(meta, "class names").get("class_names"), meta)

    def read(file: Path, folder: str) -> Split:
        images = _need(home / folder, "a folder of images")
        if (images / folder).is_dir():  # some archives unpack one level deeper
            images = images / folder
        split = Split()
        for position, row in enumerate(_annotations(file, ("fname", "class")), 1):
            split.files.append(_below(images, str(row["fname"]), f"{file}, entry {position}"))
            split.labels.append(_cars_label(file, position, row["class"], len(classes)))
        return split

    labelled = find("cars_test_annos_withlabels.mat")
    if labelled is None:
        unlabelled = find("cars_test_annos.mat")
        if unlabelled is not None:
            return Listing(home, classes, Split(), read(unlabelled, "cars_test"))  # raises: it has no classes
        labelled = need("cars_test_annos_withlabels.mat")
    return Listing(home, classes, read(need("cars_train_annos.mat"), "cars_train"), read(labelled, "cars_test"))


def _class_folders(folder: Path, home: Path) -> tuple[list[str], Found]:
    names, found = class_folders(folder, home)
    if not names:
        found.left_out.counts.pop("beside", None)
        left_out = found.left_out.say(home)
        reasons = [*_lines_on(found), f"left out: {left_out}"] if left_out else _lines_on(found)
        others = hints.other_test(folder, hints.peek(home / "train")[0]) if folder.name != "train" else ""
        said = "".join(f"; {reason}" for reason in reasons)
        raise UserError(f"{folder} holds no class folders{said}{hints.loose_images(folder)}{others}")
    return names, found


def _lines_on(*found: Found) -> list[str]:
    """The lines on everything that could not be read or followed."""
    return [text for one in found for _, text in (*one.faults, *one.dangling)]


def _split_folders(root: Path, names: tuple[str, ...], what: str) -> tuple[Path, Path, Path]:
    """Home, training and test folder: train/ and test/, or train/ and val/ where there is no test/."""
    home = _home(root, names, ("train",), what)
    test = next((home / n for n in ("test", "val") if (home / n).is_dir()), None)
    if test is None:
        hint = hints.misnamed_split(home, training=False) or hints.archives(home)
        raise UserError(f"{home} holds train/ but neither test/ nor val/{hint}")
    train = _need(home / "train", "the folder of the training images")
    if not train.is_dir():
        raise UserError(f"{train} is not a folder; wanted the folder of the training images{hints.archives(home)}")
    return home, train, test


def _tree(
    home: Path, train: Path, test: Path, folders: list[str], classes: list[str], scans: tuple[Found, ...]
) -> Listing:
    """Every file of every class folder; `scans`: what was found of the folders that hold them."""
    splits, found, empty = [], list(scans), []
    for folder in (train, test):
        split = Split()
        for label, name in enumerate(folders):
            below = walk(folder / name, root=home)
            split.files.extend(below.files)
            split.labels.extend([label] * len(below.files))
            found.append(below)
            if (entries := sum(one.entries for one in found)) > MOST_ENTRIES:
                raise UserError(
                    f"{home} holds more than {entries} entries: is a link in it one to something else? remove it"
                )
            if not below.files:
                empty.append(f"{folder / name} holds only {below.left_out.say(home) or 'folders or nothing'}")
        splits.append(split)
    left_out = LeftOut()
    for one in found:
        left_out.merge(one.left_out)
    faults = [fault for one in found for fault in (*one.faults, *one.dangling)]
    followed = [link for one in found for link in one.followed]
    return Listing(home, classes, splits[0], splits[1], faults, left_out, empty, followed)


def _class_name(folder: str) -> str:
    """A folder's name as it reads in UTF-8, whatever the locale is."""
    return os.fsencode(folder).decode("utf-8", "surrogateescape")


def _folder(root: Path) -> Listing:
    home, train, test = _split_folders(root, (), "a folder data set (train/CLASS/*, test/CLASS/*)")
    (ours, scan_train), (theirs, scan_test) = _class_folders(train, home), _class_folders(test, home)
    if hint := hints.too_deep(train, ours):
        raise UserError(f"{train} holds one class{hint}")
    for there, here, names in ((train, test, set(ours) - set(theirs)), (test, train, set(theirs) - set(ours))):
        if names:
            pairs = [p for p in hints.look_alikes([*ours, *sorted(set(theirs) - set(ours))]) if names & set(p[:2])]
            hint = (
                f"; {hints.say_look_alikes(pairs)}: rename the folders alike" if pairs else hints.other_test(test, ours)
            )
            hint += "".join(f"; {line}" for line in _lines_on(scan_train, scan_test))
            classes = some(sorted(names), "class", "classes")
            raise UserError(f"{there} and {here} hold different classes: only {there.name}/ has {classes}{hint}")
    listing = _tree(home, train, test, ours, [_class_name(name) for name in ours], (scan_train, scan_test))
    if test.name == "val":
        listing.remarks.append("the test images are those of val/ (there is no test/)")
    elif hints.peek(home / "val")[0]:
        listing.remarks.append("val/ is not used: the test images are those of test/")
    return listing


def _wordnet(name: str, known: dict[str, str]) -> Callable[[Path], Listing]:
    def read(root: Path) -> Listing:
        versions = (f"{name}2", f"{name}2-320", f"{name}2-160", name, f"{name}-320", f"{name}-160")
        present = [v for v in versions if (root / v / "train").is_dir()]
        if len(present) > 1 and not (root / "train").is_dir():
            raise UserError(f"{root} holds several {name} folders ({', '.join(present)}): name one as the root")
        home, train, test = _split_folders(root, versions, name)
        scans = []
        for folder in (train, test):
            found, scan = _class_folders(folder, home)
            scans.append(scan)
            if strange := [f for f in found if f not in known]:
                folders = some(strange, "folder", "folders")
                raise UserError(
                    f"{folder}: {folders} do not belong to {name} (use dataset 'folder' for any other tree)"
                )
            if lacking := [f"{k} ({v})" for k, v in known.items() if k not in found]:
                said = "".join(f"; {line}" for line in _lines_on(scan))
                raise UserError(f"{folder} lacks {some(lacking, 'class', 'classes')}{said}")
        return _tree(home, train, test, sorted(known), [known[k] for k in sorted(known)], tuple(scans))

    return read


_READERS: dict[str, Callable[[Path], Listing]] = {
    "cub": _cub,
    "cars": _cars,
    "imagenette": _wordnet("imagenette", NETTE),
    "imagewoof": _wordnet("imagewoof", WOOF),
    "folder": _folder,
}
# Layouts that users registered.
_registered: dict[str, Callable[[Path], Listing]] = {}
