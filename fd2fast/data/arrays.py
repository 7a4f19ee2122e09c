"""A data set from arrays in memory: checked, resized, stored as the artifact that the stages read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fd2fast.artifacts import Dataset, DatasetFacts, digest, open_stage, write_npy
from fd2fast.data.pixels import CONVERSIONS, grid, resized
from fd2fast.data.prepare import measure, preview_rows
from fd2fast.errors import UserError
from fd2fast.pictures import picture
from fd2fast.seeding import numpy_generator
from fd2fast.settings.config import LARGEST_SIDE, SMALLEST_SIDE
from fd2fast.system.lock import released_at_end
from fd2fast.system.sources import MEMORY, Source

Array = np.ndarray | torch.Tensor
Labels = Array | Sequence[int]
Split = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class ArraysConfig:
    """What, beside the pixels and labels, such a data set is a function of."""

    dataset: str
    name: str
    size: int
    mean: tuple[float, float, float] | None
    std: tuple[float, float, float] | None


@released_at_end()
def from_arrays(
    out: Path | str,
    images: Array,
    labels: Labels,
    *,
    test: tuple[Array, Labels] | float,
    classes: Sequence[str] | None = None,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    name: str = "arrays",
    seed: int = 0,
    overwrite: bool = False,
) -> Dataset:
    """Make the "dataset" artifact of images in memory, in the folder `out`.

    images: training images [N, 3, H, W] or [N, H, W, 3], uint8, or floats in [0, 1], which are rounded to the nearest 255th (not
    normalised; a GPU's are copied). labels: integers [N] in [0, K). test: images and labels of the same kinds, or the share of
    each class's training images, in (0, 1), that is drawn for testing by `seed` instead of training.
    classes: K names, in the order of the labels; None: "0", "1" ... up to the largest training label. size: side to squash to,
    pixels (bilinear with antialiasing); None: as they are, which must then be square. mean, std: of each channel of images in
    [0, 1]; None: measured on the training images. name: for reports.

    Pixels, labels, names and settings are the identity. Raises UserError for anything else than the above, for a class without
    training or test images, NaN and infinity; and, as all stages do, for a folder that holds another result.
    """
    train = _checked(images, labels, "training")
    if isinstance(test, tuple):
        if len(test) != 2:
            raise UserError(f"test must be a pair (images, labels) or a share, got {len(test)} values")
        tested = _checked(*test, "test")
    else:
        train, tested = _divided(train, test, seed)
    names = _class_names(classes, train[1])
    for what, (_, one) in (("training", train), ("test", tested)):
        _must_be_labels(one, names, what)
    side = _side(size, train[0], tested[0])
    splits = {"train": (_squashed(train[0], side), train[1]), "test": (_squashed(tested[0], side), tested[1])}
    given = [_three(values, what, low) for values, what, low in ((mean, "mean", 0.0), (std, "std", 1e-6))]
    config = ArraysConfig("arrays", str(name), side, *given)
    source = Source(MEMORY, _digest(splits, names), resumes=True)
    stage = open_stage(out, Dataset, config, {}, sources={"arrays": source}, overwrite=overwrite)
    if stage.finished:
        return stage.finished
    pixels, marks = splits["train"]
    measured = measure(pixels)
    rows = preview_rows(marks, len(names))
    titles = [names[k] for k in marks[rows[:, 0]]]
    preview = stage.path / Dataset.PREVIEW
    picture(preview, lambda: grid(pixels[rows.reshape(-1)], rows.shape[1], titles=titles, scale=max(1, 64 // side)))
    for split, (array, own) in splits.items():
        write_npy(stage.path / Dataset.labels_name(split), own)
        write_npy(stage.path / Dataset.images_name(split), array)
    facts = DatasetFacts(
        name=config.name,
        train=len(splits["train"][1]),
        test=len(splits["test"][1]),
        per_class={split: np.bincount(own, minlength=len(names)).tolist() for split, (_, own) in splits.items()},
        skipped=[],
        converted=dict.fromkeys(CONVERSIONS, 0),
        statistics={what: "given" if one else "measured" for what, one in zip(("mean", "std"), given, strict=True)},
        fonts=None,
    )
    return stage.finish(
        classes=names, size=side, mean=given[0] or measured[0], std=given[1] or measured[1], facts=facts
    )


def _plain(values: Any, what: str) -> np.ndarray:
    """A tensor, array or list as an array on the host."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    try:
        return np.asarray(values)
    except ValueError as error:
        raise UserError(f"{what} must be one array, got parts of different shapes") from error


def _checked(images: Array, labels: Labels, what: str) -> Split:
    """uint8 [N, 3, H, W] and int64 [N]."""
    pixels, marks = _plain(images, f"{what} images"), _plain(labels, f"{what} labels")
    if pixels.ndim != 4 or 3 not in (pixels.shape[1], pixels.shape[3]):
        raise UserError(f"{what} images must be [N, 3, H, W] or [N, H, W, 3], got {list(pixels.shape)}")
    if len(pixels) == 0:
        raise UserError(f"{what} images are none: got {list(pixels.shape)}")
    if pixels.shape[1] != 3:
        pixels = pixels.transpose(0, 3, 1, 2)
    if min(pixels.shape[2:]) < SMALLEST_SIDE:
        raise UserError(
            f"{what} images must be at least {SMALLEST_SIDE} pixels high and wide, got {list(pixels.shape[2:])}"
        )
    if np.issubdtype(pixels.dtype, np.floating):
        low, high = float(pixels.min()), float(pixels.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            bad = np.flatnonzero(~np.isfinite(pixels).all(axis=(1, 2, 3)))
            raise UserError(f"{what} images hold NaN or infinity, first in image {bad[0]} ({len(bad)} images)")
        if low < 0 or high > 1:
            raise UserError(
                f"{what} images of type {pixels.dtype} must lie in [0, 1], got {low:.4g} to {high:.4g}: "
                "undo their normalisation, or give uint8"
            )
        pixels = (pixels * 255).round().astype(np.uint8)
    elif pixels.dtype != np.uint8:
        raise UserError(f"{what} images must be uint8, or floats in [0, 1], got {pixels.dtype}")
    if marks.ndim != 1 or not np.issubdtype(marks.dtype, np.integer):
        raise UserError(f"{what} labels must be integers [N], got {marks.dtype} {list(marks.shape)}")
    if len(marks) != len(pixels):
        raise UserError(f"{what} labels must be one for each of {len(pixels)} images, got {len(marks)}")
    return np.ascontiguousarray(pixels), marks.astype(np.int64)


def _divided(train: Split, share: Any, seed: int) -> tuple[Split, Split]:
    """Training and test split; of each class at least one image in each."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
        raise UserError(f"test must be a pair (images, labels) or a share in (0, 1), got {share!r}")
    images, labels = train
    drawn = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            raise UserError(f"class {label} has one training image, which cannot be divided into training and test")
        count = min(max(1, round(share * len(members))), len(members) - 1)
        drawn[numpy_generator(seed, "test split", int(label)).permutation(members)[:count]] = True
    return (images[~drawn], labels[~drawn]), (images[drawn], labels[drawn])


def _class_names(classes: Sequence[str] | None, labels: np.ndarray) -> list[str]:
    if classes is None:
        if labels.max() >= len(labels):
            raise UserError(
                f"training labels must be 0 to K - 1 without gaps, got {labels.max()} among {len(labels)} images"
            )
        names = [str(k) for k in range(int(labels.max()) + 1)]
    else:
        names = list(classes)
        if not all(isinstance(name, str) for name in names) or isinstance(classes, str):
            raise UserError(f"classes must be a list of names, got {classes!r}")
        if repeated := next((name for k, name in enumerate(names) if name in names[:k]), None):
            raise UserError(f"classes must differ, got {repeated!r} twice")
    if len(names) < 2:
        raise UserError(f"a data set needs at least two classes, got {len(names)}")
    return names


def _must_be_labels(labels: np.ndarray, names: list[str], what: str) -> None:
    outside = np.flatnonzero((labels < 0) | (labels >= len(names)))
    if len(outside):
        raise UserError(
            f"{what} labels must be in [0, {len(names)}), got {labels[outside[0]]} at index {outside[0]}"
            f" ({len(outside)} outside)"
        )
    counts = np.bincount(labels, minlength=len(names))
    if empty := [names[k] for k in np.flatnonzero(counts == 0)]:
        more = f" and {len(empty) - 8} more" if len(empty) > 8 else ""
        raise UserError(f"no {what} images of {len(empty)} of {len(names)} classes: {', '.join(empty[:8])}{more}")


def _side(size: int | None, *splits: np.ndarray) -> int:
    if size is None:
        shapes = sorted({one.shape[2:] for one in splits})
        if len(shapes) > 1 or shapes[0][0] != shapes[0][1]:
            shown = " and ".join(f"{height} x {width}" for height, width in shapes)
            raise UserError(f"images must all be square and of one size, got {shown}: give the size to squash them to")
        size = int(shapes[0][0])
    if isinstance(size, bool) or not isinstance(size, int) or not SMALLEST_SIDE <= size <= LARGEST_SIDE:
        raise UserError(f"size must be {SMALLEST_SIDE} to {LARGEST_SIDE} pixels, got {size!r}")
    return size


def _squashed(images: np.ndarray, size: int) -> np.ndarray:
    if images.shape[2:] == (size, size):
        return images
    squashed = np.empty((len(images), 3, size, size), np.uint8)
    for row, image in enumerate(images):
        squashed[row] = resized(Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))), size)
    return squashed


def _three(values: Sequence[float] | None, what: str, low: float) -> tuple[float, float, float] | None:
    if values is None:
        return None
    numbers = [float(value) for value in values]
    if len(numbers) != 3 or not all(low <= value <= 1 for value in numbers):
        raise UserError(f"{what} must be three numbers in [{low:g}, 1] (of images in [0, 1]), got {numbers}")
    return numbers[0], numbers[1], numbers[2]


def _digest(splits: dict[str, Split], names: list[str]) -> str:
    hashes = {}
    for split, arrays in splits.items():
        for what, array in zip(("images", "labels"), arrays, strict=True):
            hashes[f"{split} {what}"] = [list(array.shape), hashlib.sha256(array.data).hexdigest()]
    return digest({"classes": names, "arrays": hashes})
