"""Official on-disk layouts of the data sets, read into one listing of files, labels and class names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fd2fast.errors import UserError

SHOWN = 20
_IGNORED = ("thumbs.db", "desktop.ini")

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
    """A data set found on disk. `root`: the folder that holds it; label k means classes[k]."""

    root: Path
    classes: list[str]
    train: Split
    test: Split


def read_layout(dataset: str, root: Path | str | None) -> Listing:
    """List a data set (cub, aircraft, cars, imagenette, imagewoof, folder) below `root`, its own folder or the parent.

    Only annotation files and folder names are read, no image. Raises UserError naming what is missing or wrong: a folder, an
    annotation file, a line of one, a label out of range, a class without images, splits of different classes.
    """
    if root is None:
        raise UserError(f"data set {dataset!r} needs a root: the folder that holds it in its official layout")
    root = Path(root).expanduser()
    if not root.is_dir():
        raise UserError(
            f"{root} {'is not a folder' if root.exists() else 'does not exist'}; wanted the {dataset} data set"
        )
    listing = _READERS[dataset](root)
    for name, split in (("training", listing.train), ("test", listing.test)):
        missing_images(listing.classes, split.labels, name, listing.root)
    return listing


def missing_images(classes: list[str], labels: Iterable[int], split: str, root: Path) -> None:
    """UserError that names the classes without any image in `labels`."""
    counts = np.bincount(np.fromiter(labels, dtype=np.int64), minlength=len(classes))
    empty = [classes[k] for k in np.flatnonzero(counts == 0)]
    if empty:
        raise UserError(f"{root}: no {split} images in {some(empty, 'class', 'classes')}")


def some(items: list[str], one: str, many: str) -> str:
    """'class a' or '30 classes: a, b, ... and 10 more', at most SHOWN of them."""
    if len(items) == 1:
        return f"{one} {items[0]!r}"
    more = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return f"{len(items)} {many}: {', '.join(repr(i) for i in items[:SHOWN])}{more}"


def _home(root: Path, names: tuple[str, ...], markers: tuple[str, ...], what: str) -> Path:
    """`root` or the one folder in it that holds any of `markers`; well-known `names` go first."""
    candidates = [root, *(root / name for name in names)]
    for candidate in candidates:
        if any((candidate / marker).exists() for marker in markers):
            return candidate
    others = [p for p in sorted(root.iterdir()) if p.is_dir() and any((p / marker).exists() for marker in markers)]
    if len(others) > 1:
        raise UserError(
            f"{root} holds several {what} folders ({', '.join(p.name for p in others)}): name one as the root"
        )
    if others:
        return others[0]
    inner = f"{names[0]}/" if names else "one folder of it"
    raise UserError(f"{root} does not hold {what}: wanted {' or '.join(markers)} in it or in {inner}")


def _need(path: Path, what: str) -> Path:
    if not path.exists():
        raise UserError(f"{path} is missing: {what}")
    return path


def _lines(path: Path, what: str) -> list[tuple[int, str]]:
    """Lines that are not blank with their number, from 1."""
    _need(path, what)
    try:
        text = path.read_text(encoding="utf-8")
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
    """folder / name; a name that leads outside is refused."""
    path = folder / name
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


def _aircraft(root: Path) -> Listing:
    markers = ("variants.txt", "images_variant_trainval.txt")
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
    variants = _lines(data / "variants.txt", "one variant a line")
    classes = [name for _, name in variants]
    index = {name: k for k, name in enumerate(classes)}
    if len(index) != len(classes):
        repeated = next((n, v) for k, (n, v) in enumerate(variants) if v in classes[:k])
        raise UserError(f"{data / 'variants.txt'}, line {repeated[0]}: variant {repeated[1]!r} appears twice")
    images = _need(data / "images", "the folder of the images")

    def read(name: str) -> Split:
        file, split = data / name, Split()
        for number, line in _lines(file, "an image id and a variant on each line"):
            image, _, variant = line.partition(" ")
            if variant.strip() not in index:
                raise UserError(
                    f"{file}, line {number}: variant {variant.strip()!r} is not one of the {len(classes)} in variants.txt"
                )
            split.files.append(_below(images, f"{image}.jpg", f"{file}, line {number}"))
            split.labels.append(index[variant.strip()])
        return split

    return Listing(data, classes, read("images_variant_trainval.txt"), read("images_variant_test.txt"))


def _mat(path: Path, what: str) -> dict[str, Any]:
    from scipy.io import loadmat

    _need(path, what)
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
    return [{f: row[f].item() if hasattr(row[f], "item") else row[f] for f in fields} for row in rows]


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
    if not isinstance(value, int | float | np.number) or value != int(value) or not 1 <= int(value) <= classes:
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


def _class_folders(folder: Path) -> list[str]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise UserError(f"{folder} holds no class folders")
    return names


def _files(folder: Path) -> list[Path]:
    """Every file below a class folder but hidden ones, sorted by path."""
    found = []
    for here, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        found += [Path(here) / n for n in names if not n.startswith(".") and n.lower() not in _IGNORED]
    return sorted(found)


def _split_folders(root: Path, names: tuple[str, ...], what: str) -> tuple[Path, Path, Path]:
    """Home, training and test folder: train/ and test/, or train/ and val/ where there is no test/."""
    home = _home(root, names, ("train",), what)
    test = next((home / n for n in ("test", "val") if (home / n).is_dir()), None)
    if test is None:
        raise UserError(f"{home} holds train/ but neither test/ nor val/")
    return home, _need(home / "train", "the folder of the training images"), test


def _tree(home: Path, train: Path, test: Path, folders: list[str], classes: list[str]) -> Listing:
    splits = []
    for folder in (train, test):
        split = Split()
        for label, name in enumerate(folders):
            files = _files(folder / name)
            split.files.extend(files)
            split.labels.extend([label] * len(files))
        splits.append(split)
    return Listing(home, classes, *splits)


def _folder(root: Path) -> Listing:
    home, train, test = _split_folders(root, (), "a folder data set (train/CLASS/*, test/CLASS/*)")
    ours, theirs = _class_folders(train), _class_folders(test)
    for there, here, names in ((train, test, set(ours) - set(theirs)), (test, train, set(theirs) - set(ours))):
        if names:
            classes = some(sorted(names), "class", "classes")
            raise UserError(f"{there} and {here} hold different classes: only {there.name}/ has {classes}")
    return _tree(home, train, test, ours, ours)


def _wordnet(name: str, known: dict[str, str]) -> Callable[[Path], Listing]:
    def read(root: Path) -> Listing:
        versions = (f"{name}2", f"{name}2-320", f"{name}2-160", name, f"{name}-320", f"{name}-160")
        present = [v for v in versions if (root / v / "train").is_dir()]
        if len(present) > 1 and not (root / "train").is_dir():
            raise UserError(f"{root} holds several {name} folders ({', '.join(present)}): name one as the root")
        home, train, test = _split_folders(root, versions, name)
        for folder in (train, test):
            found = _class_folders(folder)
            if strange := [f for f in found if f not in known]:
                folders = some(strange, "folder", "folders")
                raise UserError(
                    f"{folder}: {folders} do not belong to {name} (use dataset 'folder' for any other tree)"
                )
            if lacking := [f"{k} ({v})" for k, v in known.items() if k not in found]:
                raise UserError(f"{folder} lacks {some(lacking, 'class', 'classes')}")
        return _tree(home, train, test, sorted(known), [known[k] for k in sorted(known)])

    return read


_READERS: dict[str, Callable[[Path], Listing]] = {
    "cub": _cub,
    "aircraft": _aircraft,
    "cars": _cars,
    "imagenette": _wordnet("imagenette", NETTE),
    "imagewoof": _wordnet("imagewoof", WOOF),
    "folder": _folder,
}
