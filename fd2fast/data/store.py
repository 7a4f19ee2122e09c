"""Prepared data sets: read-only arrays on disk, handed out as normalised batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from fd2fast.artifacts import Dataset
from fd2fast.data.pixels import normalise, to_unit
from fd2fast.errors import UserError

Indices = Sequence[int] | np.ndarray | torch.Tensor


@dataclass(frozen=True, eq=False)
class ImageSet:
    """One split of a data set. images: read-only memmap uint8 [N, 3, S, S]; labels: int64 [N], index into `classes`."""

    images: np.ndarray
    labels: np.ndarray
    classes: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size: int
    name: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, indices: Indices, *, device: torch.device | str = "cpu") -> torch.Tensor:
        """uint8 [n, 3, S, S] of these images, in the order given."""
        rows = indices.cpu().numpy() if isinstance(indices, torch.Tensor) else np.asarray(indices, dtype=np.int64)
        return torch.from_numpy(np.array(self.images[rows])).to(device)

    def unit(
        self, indices: Indices, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Floats in [0, 1] [n, 3, S, S], not normalised: the input of augmentation."""
        return to_unit(self.pixels(indices, device=device), dtype)

    def tensor(
        self, indices: Indices, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """Normalised images [n, 3, S, S]."""
        return normalise(self.pixels(indices, device=device), self.mean, self.std, dtype)

    def targets(self, indices: Indices, *, device: torch.device | str = "cpu") -> torch.Tensor:
        """Labels int64 [n]."""
        rows = indices.cpu().numpy() if isinstance(indices, torch.Tensor) else np.asarray(indices, dtype=np.int64)
        return torch.from_numpy(self.labels[rows]).to(device)

    def of_class(self, label: int) -> np.ndarray:
        """Indices int64 of all images of one class, ascending."""
        if not 0 <= label < len(self.classes):
            raise ValueError(f"label must be in [0, {len(self.classes)}), got {label}")
        return np.flatnonzero(self.labels == label)

    def counts(self) -> np.ndarray:
        """Images of each class, int64 [K]."""
        return np.bincount(self.labels, minlength=len(self.classes))

    def require(self, per_class: int, what: str) -> None:
        """UserError that names the classes with fewer than `per_class` images, which `what` (a phrase) needs."""
        counts = self.counts()
        short = [f"{self.classes[k]} ({counts[k]})" for k in np.flatnonzero(counts < per_class)]
        if short:
            more = f" and {len(short) - 8} more" if len(short) > 8 else ""
            raise UserError(
                f"{what} needs {per_class} {self.name} images of each class; too few in: {', '.join(short[:8])}{more}"
            )


def load_split(dataset: Dataset, split: Literal["train", "test"]) -> ImageSet:
    """One split of a prepared data set; nothing is read into memory but the labels.

    Raises UserError for another kind of artifact, a missing file, or arrays that contradict the manifest.
    """
    dataset = Dataset.of(dataset)
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    images_file, labels_file = dataset.file(dataset.images_name(split)), dataset.file(dataset.labels_name(split))
    images, labels = _array(images_file), np.array(_array(labels_file))
    count = dataset.facts.train if split == "train" else dataset.facts.test
    wanted = (count, 3, dataset.size, dataset.size)
    if images.dtype != np.uint8 or images.shape != wanted:
        raise UserError(f"{images_file} must be uint8 {list(wanted)}, got {images.dtype} {list(images.shape)}")
    if labels.dtype != np.int64 or labels.shape != wanted[:1]:
        raise UserError(f"{labels_file} must be int64 [{wanted[0]}], got {labels.dtype} {list(labels.shape)}")
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(dataset.classes):
        raise UserError(
            f"{labels_file} holds labels outside [0, {len(dataset.classes)}): {labels.min()} to {labels.max()}"
        )
    return ImageSet(images, labels, list(dataset.classes), dataset.mean, dataset.std, dataset.size, split)


def _array(path: Path) -> np.ndarray:
    """Mapped, so that a header that promises more than the file holds takes no memory."""
    try:
        # not np.load, which also opens archives and pickles
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # numpy raises many kinds for a damaged header
        raise UserError(f"{path} is not a readable array ({str(error)[:200]}): prepare the data set again") from error
