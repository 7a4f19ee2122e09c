"""Any data set to resized uint8 arrays on disk: listed, checked, decoded once by all cores, resumable."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fd2fast.artifacts import (
    Dataset,
    DatasetFacts,
    Stage,
    atomic_path,
    new_array,
    open_stage,
    write_json,
    write_npy,
    writing,
)
from fd2fast.data import typefaces
from fd2fast.data.content import look_at
from fd2fast.data.layouts import LEVELS, SHOWN, STATISTICS, Listing, known_datasets, missing_images, read_layout
from fd2fast.data.outline import Outline
from fd2fast.data.pixels import CONVERSIONS, ORIENTED, decode, grid, resized
from fd2fast.data.walk import LeftOut
from fd2fast.errors import UserError, nearest, refuse
from fd2fast.pictures import picture
from fd2fast.settings.config import DataConfig, wrong_settings
from fd2fast.system.lock import released_at_end
from fd2fast.system.progress import Progress
from fd2fast.system.space import Space
from fd2fast.system.streams import plain

_CHUNK = 256
_DONE = 1  # bit 0 of a row's status; _MARKS follow from bit 1
_MARKS = (*CONVERSIONS, ORIENTED)
_SPLITS = ("train", "test")

log = logging.getLogger("fd2fast")


@released_at_end()
def prepare(config: DataConfig, out: Path | str, *, overwrite: bool = False) -> Dataset:
    """Make the "dataset" artifact of `config` in the folder `out`.

    Files: {train,test}_images.npy uint8 [N, 3, S, S], {train,test}_labels.npy int64 [N], preview.png; for typefaces also
    images/{train,test}/CLASS/NNN.png. Facts: name, train and test (counts), per_class, skipped (paths relative to the root),
    converted (counts), statistics ("given", "reference" or "measured"), and what the layout adds. Measured, beside the usual:
    left_out (entries that the walk over class folders passed over, by reason), oriented (images with an EXIF orientation).

    The content of images and fonts is part of the identity, where they lie is not. Beside the result, stamps.json lets the next
    look at a finished data set read changed files only.

    Raises UserError for bad settings or input, before anything is decoded where that can be seen, else naming every unreadable
    file at once; for a finished data set whose images or fonts have changed, with what changed. A killed run, started again,
    keeps the decoded rows and ends in the same bytes.
    """
    refuse(faults(config))
    content = look_at(config, Path(out))
    stage = open_stage(out, Dataset, config, {}, sources={content.name: content.source}, overwrite=overwrite)
    if stage.finished:
        made_from = stage.finished.manifest.get("inputs", {}).get(content.name, content.source.digest)
        if content.source.digest == made_from:
            content.keep(stage.path)
        return stage.finished
    fonts: dict[str, Any] | None = None
    if content.listing is not None:
        listing, key = content.listing, content.key
        if listing.faults and config.bad_images == "error":
            with _forgotten_on_user_error(stage):
                raise UserError(_all_bad(listing.faults, "file or folder", "files or folders"))
    else:
        faces = content.faces or typefaces.choose(config.classes, config.fonts, skip=config.bad_images == "skip")
        fonts = typefaces.render_set(config, faces, stage.path / Dataset.RENDERED)
        listing, key = read_layout("folder", stage.path / Dataset.RENDERED), _key
    for note in listing.notes():
        log.warning("%s", note)
    content.keep(stage.state)
    rows = _Rows(stage.state, listing, config.size, config.exif, key)
    bad = [*listing.faults, *rows.decode_all(listing)]
    with _forgotten_on_user_error(stage):
        content.must_be_unmoved()
        if bad and config.bad_images == "error":
            raise UserError(_all_bad(bad))
    content.keep(stage.path)
    return _finish(stage, config, listing, rows, {path for path, _ in bad}, fonts)


def faults(config: DataConfig) -> list[str]:
    """What is wrong with the settings by themselves, one line each."""
    found = wrong_settings(config, "data")
    if config.dataset not in known_datasets():
        found.append(f"unknown data set {config.dataset!r}: {nearest(str(config.dataset), known_datasets())}")
    elif config.level in LEVELS and config.level != "variant" and config.dataset != "aircraft":
        found.append(f"level {config.level!r} is one of the data set aircraft; {config.dataset} has no levels")
    if config.dataset == "typefaces" and config.root is not None:
        found.append(
            f"typefaces are rendered and take no root ({config.root}); another folder of faces goes into fonts"
        )
    if config.dataset in known_datasets() and config.dataset != "typefaces" and config.root is None:
        found.append(f"data set {config.dataset!r} needs a root: the folder that holds it in its official layout")
    return found


def space(data: Outline) -> Space:
    """Bytes on disk: the arrays of both splits, and for typefaces their pictures."""
    pixels = 3 * data.size**2
    images = sum(data.train) + sum(data.test)
    pictures = images * (pixels + 4096) if data.name == "typefaces" else 0
    return Space(images * pixels, images * pixels + pictures)


@contextlib.contextmanager
def _forgotten_on_user_error(stage: Stage) -> Iterator[None]:
    """Bad input leaves no claim on the folder, so that the repaired command, with other settings too, may use it."""
    try:
        yield
    except UserError:
        stage.forget()
        raise


def _all_bad(bad: list[tuple[Path, str]], one: str = "image", many: str = "images") -> str:
    shown = "\n".join(f"  {reason}" for _, reason in bad[:SHOWN])
    more = f"\n  and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    count = f"one {one} cannot" if len(bad) == 1 else f"{len(bad)} {many} cannot"
    return f"{count} be read (repair or remove, or set bad_images to 'skip'):\n{shown}{more}"


class _Rows:
    """Decoded images of both splits as rows of arrays in the state folder, with one status byte each."""

    def __init__(self, state: Path, listing: Listing, size: int, exif: str, key: Callable[[Path], list[Any]]):
        """key: what the decoded image of a file depends on, as JSON takes it."""
        self._state, self._size, self._exif, self._key = state, size, exif, key
        self.files = {name: getattr(listing, name).files for name in _SPLITS}
        self.images: dict[str, np.ndarray] = {}
        self.status: dict[str, np.ndarray] = {}
        with writing(state):
            state.mkdir(parents=True, exist_ok=True)
        for split in _SPLITS:
            self._open(split)

    def _open(self, split: str) -> None:
        """Map the arrays; rows that an earlier run decoded from the same files (by their keys) are kept."""
        keys = [self._key(path) for path in self.files[split]]
        index, shape = self._state / f"{split}.json", (len(keys), 3, self._size, self._size)
        pixels, status = self._state / f"{split}.npy", self._state / f"{split}_status.npy"
        found = self._earlier(split)
        if found is not None and found[0] == keys:
            _, self.images[split], self.status[split] = found
            return
        with atomic_path(pixels) as fresh, atomic_path(status) as marks:
            with writing(pixels):
                images = new_array(fresh, shape)
            done = new_array(marks, shape[:1])
            if found is not None:
                places = {tuple(key): n for n, key in enumerate(found[0])}
                for row, key in enumerate(keys):
                    if (old := places.get(tuple(key))) is not None and found[2][old]:
                        images[row], done[row] = found[1][old], found[2][old]
            images.flush()
            done.flush()
            index.unlink(missing_ok=True)
        write_json(index, {"size": self._size, "exif": self._exif, "keys": keys})
        self.images[split] = np.load(pixels, mmap_mode="r+")
        self.status[split] = np.load(status, mmap_mode="r+")

    def _earlier(self, split: str) -> tuple[list[list[Any]], np.ndarray, np.ndarray] | None:
        pixels, final = self._state / f"{split}.npy", self._state.parent / Dataset.images_name(split)
        try:
            known = json.loads((self._state / f"{split}.json").read_text())
            if not pixels.exists() and final.exists():  # killed between moving the rows out and the manifest
                os.replace(final, pixels)
            images = np.lib.format.open_memmap(pixels, mode="r+")
            status = np.lib.format.open_memmap(self._state / f"{split}_status.npy", mode="r+")
            count = len(known["keys"])
            if (images.dtype, status.dtype) != (np.uint8, np.uint8) or status.shape != (count,):
                return None
            same = known["size"] == self._size and known.get("exif", "ignore") == self._exif
            if same and images.shape == (count, 3, self._size, self._size):
                return known["keys"], images, status
        except Exception:  # numpy and JSON raise many kinds for a damaged file: it is made anew
            pass
        return None

    def decode_all(self, listing: Listing) -> list[tuple[Path, str]]:
        """Decode every row not done yet; the files that cannot be, with the reason."""
        todo = [(split, row) for split in _SPLITS for row in np.flatnonzero(self.status[split] == 0).tolist()]
        total = sum(len(files) for files in self.files.values())
        bad: list[tuple[Path, str]] = []

        def one(job: tuple[str, int]) -> tuple[str, int, int] | tuple[Path, str]:
            split, row = job
            path = self.files[split][row]
            try:
                image, kinds = decode(path, turn=True) if self._exif == "apply" else decode(path)
            except UserError as error:
                return path, str(error)
            self.images[split][row] = resized(image, self._size)
            return split, row, _DONE | sum(2 << _MARKS.index(kind) for kind in kinds)

        with (
            ThreadPoolExecutor(
                len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            ) as pool,
            Progress("prepare", total, done=total - len(todo), unit="img") as bar,
        ):
            for start in range(0, len(todo), _CHUNK):
                done = []
                for result in pool.map(one, todo[start : start + _CHUNK]):
                    if len(result) == 2:
                        bad.append(result)
                    else:
                        done.append(result)
                    bar.step()
                with writing(self._state):
                    for split in _SPLITS:  # the pixels reach the disk before the marks that vouch for them
                        self.images[split].flush()  # type: ignore[attr-defined]
                    for split, row, mark in done:
                        self.status[split][row] = mark
                    for split in _SPLITS:
                        self.status[split].flush()  # type: ignore[attr-defined]
        return bad

    def converted(self) -> dict[str, int]:
        """How many images each conversion was applied to."""
        return {kind: self._count(kind) for kind in CONVERSIONS}

    def oriented(self) -> int:
        """How many images have an EXIF orientation other than the one they are stored in."""
        return self._count(ORIENTED)

    def _count(self, mark: str) -> int:
        marks = np.concatenate([self.status[split] for split in _SPLITS])
        return int(((marks >> (_MARKS.index(mark) + 1)) & 1).sum())

    def move(self, split: str, keep: np.ndarray, target: Path) -> None:
        """The kept rows as the final array: moved when they are all, copied otherwise."""
        source = self._state / f"{split}.npy"
        if keep.all():
            self.images.pop(split)
            with writing(target):
                os.replace(source, target)
            return
        rows = np.flatnonzero(keep)
        with atomic_path(target) as temporary:
            result = new_array(temporary, (len(rows), 3, self._size, self._size))
            for start in range(0, len(rows), _CHUNK):
                result[start : start + _CHUNK] = self.images[split][rows[start : start + _CHUNK]]
            result.flush()


def _key(path: Path) -> list[Any]:
    """Of a file that we made: path, length, time."""
    try:
        stat = path.stat()
        return [str(path), stat.st_size, stat.st_mtime_ns]
    except OSError:
        return [str(path), -1, -1]


def _finish(
    stage: Stage[Dataset],
    config: DataConfig,
    listing: Listing,
    rows: _Rows,
    skipped: set[Path],
    fonts: dict[str, Any] | None,
) -> Dataset:
    kept = {split: np.array([path not in skipped for path in rows.files[split]], dtype=bool) for split in _SPLITS}
    labels = {split: np.array(getattr(listing, split).labels, dtype=np.int64)[kept[split]] for split in _SPLITS}
    with _forgotten_on_user_error(stage):
        for split, name in (("train", "readable training"), ("test", "readable test")):
            missing_images(listing.classes, labels[split], name, listing.root)
    mean, std, source = _statistics(config, rows.images["train"], kept["train"])
    samples = preview_rows(labels["train"], len(listing.classes))
    shown = rows.images["train"][np.flatnonzero(kept["train"])[samples.reshape(-1)]]
    names = [listing.classes[k] for k in labels["train"][samples[:, 0]]]
    scale = max(1, 64 // config.size)
    picture(stage.path / Dataset.PREVIEW, lambda: grid(shown, samples.shape[1], titles=names, scale=scale))
    converted, oriented = rows.converted(), rows.oriented()
    for split in _SPLITS:
        write_npy(stage.path / Dataset.labels_name(split), labels[split])
        rows.move(split, kept[split], stage.path / Dataset.images_name(split))
    facts = DatasetFacts(
        name=config.dataset,
        train=len(labels["train"]),
        test=len(labels["test"]),
        per_class={s: np.bincount(labels[s], minlength=len(listing.classes)).tolist() for s in _SPLITS},
        skipped=sorted(os.path.relpath(path, listing.root) for path in skipped),
        converted=converted,
        statistics=source,
        fonts=fonts,
    )
    measured = {"left_out": listing.left_out.counts, "oriented": oriented}
    if oriented:
        log.warning("%s: %s", listing.root, _say_oriented(oriented, config.exif))
    return stage.finish(classes=listing.classes, size=config.size, mean=mean, std=std, facts=facts, measured=measured)


def _say_oriented(count: int, exif: str) -> str:
    images = "1 image has" if count == 1 else f"{count} images have"
    done = "it was applied" if exif == "apply" else "it is ignored, as torchvision does (exif 'apply' turns them)"
    return f"{images} an EXIF orientation: {done}"


def _statistics(config: DataConfig, images: np.ndarray, keep: np.ndarray) -> tuple[tuple, tuple, dict[str, str]]:
    """Mean, std and where each comes from: given, the reference's value, or measured on the training images."""
    known = STATISTICS.get((config.dataset, config.size))
    measured = None
    if (config.mean is None or config.std is None) and known is None:
        measured = measure(images, keep)
    result, source = [], {}
    for n, (name, given) in enumerate((("mean", config.mean), ("std", config.std))):
        value = given or (known[n] if known else measured[n] if measured else None)
        assert value is not None
        source[name] = "given" if given else "reference" if known else "measured"
        result.append(tuple(value))
    return result[0], result[1], source


def measure(images: np.ndarray, keep: np.ndarray | None = None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel over all pixels of uint8 [N, 3, H, W], as fractions of 255.

    The sums are exact integers, so that neither order nor chunks matter. A constant channel gets 1/255 instead of 0.
    """
    rows = np.flatnonzero(keep) if keep is not None else np.arange(len(images))
    counts = np.zeros((3, 256), dtype=np.int64)
    for start in range(0, len(rows), _CHUNK):
        block = np.asarray(images[rows[start : start + _CHUNK]])
        for channel in range(3):
            counts[channel] += np.bincount(block[:, channel].reshape(-1), minlength=256)
    values, pixels = np.arange(256), int(counts[0].sum())
    mean, std = [], []
    for channel in range(3):
        first, second = int(counts[channel] @ values), int(counts[channel] @ values**2)
        mean.append(round(first / pixels / 255, 6))
        variance = (second * pixels - first * first) / pixels**2
        std.append(round(max(math.sqrt(variance), 1.0) / 255, 6))
    return tuple(mean), tuple(std)


def preview_rows(labels: np.ndarray, classes: int) -> np.ndarray:
    """For a preview: row numbers [R, C] of up to ten classes, spread evenly, and up to eight first images of each."""
    chosen = np.unique(np.linspace(0, classes - 1, min(classes, 10)).round().astype(int))
    groups = [np.flatnonzero(labels == k) for k in chosen]
    columns = min(8, max(len(g) for g in groups))
    return np.stack([np.resize(g[:columns], columns) for g in groups])


def describe(dataset: Dataset) -> str:
    """A few lines on a prepared data set: counts, classes, size, normalisation, what was skipped and converted."""
    facts, classes = dataset.facts, dataset.classes

    def spread(split: str) -> str:
        counts = facts.per_class[split]
        each = f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        return f"{sum(counts)} ({each} of each class)"

    def numbers(values: tuple[float, ...], name: str) -> str:
        return f"{', '.join(f'{v:.4f}' for v in values)} ({facts.statistics[name]})"

    short = [plain(name, 60) for name in (*classes[:6], classes[-1])]
    names = ", ".join(short[: len(classes)][:6]) + (f", ... {short[-1]}" if len(classes) > 6 else "")
    lines = [
        f"{facts.name} at {dataset.size} x {dataset.size} in {plain(dataset.path)}",
        f"  classes   {len(classes)}: {names}",
        f"  training  {spread('train')}",
        f"  test      {spread('test')}",
        f"  mean      {numbers(dataset.mean, 'mean')}",
        f"  std       {numbers(dataset.std, 'std')}",
    ]
    if converted := [f"{count} {kind}" for kind, count in facts.converted.items() if count]:
        lines.append(f"  converted {', '.join(converted)}")
    if skipped := facts.skipped:
        lines.append(
            f"  skipped   {len(skipped)}: {', '.join(map(plain, skipped[:SHOWN]))}{' ...' if len(skipped) > SHOWN else ''}"
        )
    if oriented := dataset.measured.get("oriented"):
        lines.append(f"  turned    {_say_oriented(oriented, dataset.config.get('exif', 'ignore'))}")
    if left_out := LeftOut(dataset.measured.get("left_out", {})).say():
        lines.append(f"  left out  {left_out}")
    return "\n".join(lines)
