"""What is known of a data set before its images are decoded: classes, size, images of each class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fd2fast.artifacts import Dataset
from fd2fast.data.layouts import read_layout
from fd2fast.data.store import load_split
from fd2fast.errors import UserError
from fd2fast.settings.config import DataConfig

_SHOWN = 8


@dataclass(frozen=True)
class Outline:
    """A data set from outside. train and test: images of each class, in the order of `classes`."""

    name: str
    size: int
    classes: tuple[str, ...]
    train: tuple[int, ...]
    test: tuple[int, ...]

    @property
    def least(self) -> int:
        """Training images of the class that has fewest."""
        return min(self.train)

    def short(self, per_class: int, what: str) -> list[str]:
        """The fault that `what` needs more training images than some classes have, which are named; none where all have."""
        few = [f"{name} ({count})" for name, count in zip(self.classes, self.train, strict=True) if count < per_class]
        if not few:
            return []
        more = f" and {len(few) - _SHOWN} more" if len(few) > _SHOWN else ""
        return [f"{what} needs {per_class} training images of each class; too few in: {', '.join(few[:_SHOWN])}{more}"]


def outline_of(dataset: Dataset) -> Outline:
    """Of a prepared data set; UserError as `load_split` raises it."""
    dataset = Dataset.of(dataset)
    sets = [load_split(dataset, "train"), load_split(dataset, "test")]
    train, test = (tuple(int(count) for count in one.counts()) for one in sets)
    return Outline(dataset.facts.name, dataset.size, tuple(dataset.classes), train, test)


def outline_on_disk(config: DataConfig) -> Outline:
    """Of a data set that is not prepared yet, from its folders and annotation files; unreadable images are not known yet.

    UserError as `read_layout` raises it. Typefaces are not looked at: their numbers are settings.
    """
    if config.dataset == "typefaces":
        if config.fonts is not None and not Path(config.fonts).expanduser().is_dir():
            raise UserError(f"data.fonts {config.fonts} is no folder; wanted one with .ttf, .otf or .woff2 files")
        names = tuple(f"typeface {k}" for k in range(config.classes))
        train, test = ((each,) * config.classes for each in (config.train_per_class, config.test_per_class))
        return Outline(config.dataset, config.size, names, train, test)
    listing = read_layout(config.dataset, config.root, level=config.level)
    train, test = (
        tuple(int(count) for count in np.bincount(np.asarray(split.labels, np.int64), minlength=len(listing.classes)))
        for split in (listing.train, listing.test)
    )
    return Outline(config.dataset, config.size, tuple(listing.classes), train, test)
