"""The views a student sees: per-image crops and flips and per-batch cutmix, drawn by counters, stored, replayed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fd2fast import ops
from fd2fast.artifacts import Labels
from fd2fast.data.crops import TRIES, random_resized_crops
from fd2fast.data.pixels import normalise
from fd2fast.errors import UserError, refuse
from fd2fast.seeding import numpy_generator
from fd2fast.settings.config import wrong_settings
from fd2fast.settings.ranges import AnySeed, Area, Positive, Share

# Images of one batch where the settings name none (the released protocol).
USUAL_BATCH = 20


@dataclass(frozen=True)
class ViewSettings:
    """How views are drawn; the fields of RelabelConfig with the same names."""

    min_crop: Area = 0.08
    flip: Share = 0.5
    mix: Literal["cutmix", "none"] = "cutmix"
    mix_alpha: Positive = 1.0
    seed: AnySeed = 42

    @classmethod
    def of(cls, config: object) -> ViewSettings:
        """Take the settings from a stage's config; UserError for values out of range."""
        settings = cls(**{f.name: getattr(config, f.name) for f in fields(cls)})
        refuse(wrong_settings(settings, "views"))
        return settings


@dataclass(frozen=True)
class Views:
    """The views of E epochs of N images in B batches; position n of an epoch shows image order[n]. All numpy arrays.

    order int32 [E,N]; crop int16 [E,N,4] = (top, left, height, width), pixels; flip bool [E,N]; mix_index int32 [E,N],
    the partner's row within the batch; lam float64 [E,B], the raw Beta draw; bbox int16 [E,B,4] = (row 0, row 1, column
    0, column 1) of the pasted box, ends exclusive; offsets int64 [B+1], where the batches begin and end.
    """

    order: np.ndarray
    crop: np.ndarray
    flip: np.ndarray
    mix_index: np.ndarray
    lam: np.ndarray
    bbox: np.ndarray
    offsets: np.ndarray

    @property
    def epochs(self) -> int:
        return self.order.shape[0]

    @property
    def images(self) -> int:
        return self.order.shape[1]

    def part(self, first: int, end: int) -> Views:
        """The epochs first..end-1."""
        rows = {name: getattr(self, name)[first:end] for name in PER_EPOCH}
        return Views(**rows, offsets=self.offsets)

    @property
    def batches(self) -> int:
        """Batches of one epoch."""
        return len(self.offsets) - 1

    def pasted_share(self, size: int) -> np.ndarray:
        """Area share of the pasted box, float64 [E,B]: the partner's true share, unlike 1 - lam where the box was cut."""
        box = np.asarray(self.bbox, np.float64)
        return (box[..., 1] - box[..., 0]) * (box[..., 3] - box[..., 2]) / size**2


PER_EPOCH = tuple(f.name for f in fields(Views) if f.name != "offsets")


def array_types(offsets: np.ndarray) -> dict[str, tuple[tuple[int, ...], type]]:
    """Shape for one epoch and dtype of every per-epoch array of Views."""
    images, batches = int(offsets[-1]), len(offsets) - 1
    return {
        "order": ((images,), np.int32),
        "crop": ((images, 4), np.int16),
        "flip": ((images,), np.bool_),
        "mix_index": ((images,), np.int32),
        "lam": ((batches,), np.float64),
        "bbox": ((batches, 4), np.int16),
    }


def usual_batch_size(images: int) -> int:
    """The batch size where the settings name none.

    20, or all images of a smaller set; and where that leaves a short last batch, the largest even size from 10 to 20 that
    divides the set, if any, so that every batch has two equal halves (196 images: 14, as in the released scripts).
    """
    if images > USUAL_BATCH:
        for size in range(USUAL_BATCH, 9, -2):
            if images % size == 0:
                return size
    return min(USUAL_BATCH, images)


def batch_offsets(images: int, batch_size: int | None) -> np.ndarray:
    """int64 [B+1]: batches of batch_size (None: usual_batch_size); the last may be smaller.

    A last batch of a single image joins the one before it: its halves would be empty and one image.
    Raises UserError for fewer than 2 images or a batch size below 2.
    """
    if images < 2:
        raise UserError(f"batches need at least 2 images, got {images}")
    size = usual_batch_size(images) if batch_size is None else batch_size
    if size < 2:
        raise UserError(f"batch_size must be at least 2, got {size}")
    offsets = [*range(0, images, size), images]
    if images % size == 1 and len(offsets) > 2:
        del offsets[-2]
    return np.array(offsets, np.int64)


def draw_crops(uniform: np.ndarray, size: int, min_crop: float) -> np.ndarray:
    """Random resized crops of a size x size image from uniforms [N, TRIES, 4] in [0,1): int16 [N,4] (top, left, h, w).

    Area share uniform in [min_crop, 1]; see `random_resized_crops`.
    """
    draws = torch.from_numpy(uniform)
    boxes = random_resized_crops(draws[..., :2], draws[..., 2:], (size, size), (min_crop, 1.0))
    return boxes.numpy().astype(np.int16)


def cut_box(lam: np.ndarray, centre: np.ndarray, size: int) -> np.ndarray:
    """Cutmix boxes int16 [B,4] (row 0, row 1, column 0, column 1) for lam [B] and integer centres [B,2] (row, column).

    Side int(size * sqrt(1 - lam)), reaching side // 2 to both sides of the centre, cut at the border.
    """
    half = np.floor(size * np.sqrt(1 - lam)).astype(np.int64) // 2
    low = np.clip(centre - half[:, None], 0, size)
    high = np.clip(centre + half[:, None], 0, size)
    return np.stack([low[:, 0], high[:, 0], low[:, 1], high[:, 1]], 1).astype(np.int16)


def draw_views(settings: ViewSettings, offsets: np.ndarray, size: int, first: int, end: int) -> Views:
    """The views of the epochs first..end-1: functions of (seed, epoch, position) only, whatever was drawn before."""
    images, batches = int(offsets[-1]), len(offsets) - 1
    out: dict[str, np.ndarray]
    out = {name: np.zeros((end - first, *shape), dtype) for name, (shape, dtype) in array_types(offsets).items()}
    owner = np.repeat(np.arange(batches), np.diff(offsets))
    for row, epoch in enumerate(range(first, end)):
        rng = numpy_generator(settings.seed, "views", epoch)
        out["order"][row] = rng.permutation(images)
        out["crop"][row] = draw_crops(rng.random((images, TRIES, 4)), size, settings.min_crop)
        out["flip"][row] = rng.random(images) < settings.flip
        # sorting uniforms within each batch gives every batch its own uniform permutation, all at once
        out["mix_index"][row] = np.lexsort((rng.random(images), owner)) - offsets[owner]
        centre = np.floor(rng.random((batches, 2)) * size).astype(np.int64)
        lam = rng.beta(settings.mix_alpha, settings.mix_alpha, batches)
        if settings.mix == "none":
            lam = np.ones(batches)
            out["mix_index"][row] = np.arange(images) - offsets[owner]
        out["lam"][row] = lam
        out["bbox"][row] = cut_box(lam, centre, size)
    return Views(**out, offsets=offsets)


class Source:
    """Distilled images on a device, handed out normalised; kept as 8 bits, a quarter of the memory."""

    def __init__(
        self,
        pixels: np.ndarray,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.pixels = torch.from_numpy(pixels).to(device)
        self.mean, self.std, self.dtype = mean, std, dtype

    def take(self, rows: np.ndarray) -> Tensor:
        """Images [n,3,S,S] of these rows."""
        index = torch.from_numpy(np.asarray(rows, np.int64)).to(self.pixels.device)
        return normalise(self.pixels.index_select(0, index), self.mean, self.std, self.dtype)


def replay(views: Views, source: Source, batches: Sequence[tuple[int, int]]) -> Tensor:
    """These batches, each (row of the epoch in `views`, batch), as a student sees them: [n,3,S,S], batch after batch.

    Crops and flips of all are one crop_flip_roll call with one segment per image; then the box of each batch is pasted
    from the partner's crop, rows by the first pair of bbox and columns by the second.
    """
    spans = [(epoch, int(views.offsets[b]), int(views.offsets[b + 1])) for epoch, b in batches]
    params = np.zeros((sum(high - low for _, low, high in spans), 7), np.int32)
    params[:, :4] = np.concatenate([views.crop[e, low:high] for e, low, high in spans])
    params[:, 4] = np.concatenate([views.flip[e, low:high] for e, low, high in spans])
    out = source.take(np.concatenate([views.order[e, low:high] for e, low, high in spans]))
    out = ops.crop_flip_roll(out, torch.from_numpy(params).to(out.device), list(range(len(params) + 1)), out.shape[-1])
    begin = 0
    for (epoch, b), (_, low, high) in zip(batches, spans, strict=True):
        x0, x1, y0, y1 = (int(v) for v in views.bbox[epoch, b])
        if x0 < x1 and y0 < y1:
            partner = torch.from_numpy(np.asarray(views.mix_index[epoch, low:high], np.int64)).to(out.device)
            box = out[begin : begin + high - low, :, x0:x1, y0:y1]
            box.copy_(box.index_select(0, partner))
        begin += high - low
    return out


def grouped(batches: Sequence[tuple[int, int]], offsets: np.ndarray, limit: int) -> Iterator[list[tuple[int, int]]]:
    """Consecutive (epoch, batch) pairs in groups of at most `limit` images (or a single larger batch)."""
    group: list[tuple[int, int]] = []
    held = 0
    for epoch, b in batches:
        count = int(offsets[b + 1] - offsets[b])
        if group and held + count > limit:
            yield group
            group, held = [], 0
        group.append((epoch, b))
        held += count
    if group:
        yield group


def images_at_once(size: int) -> int:
    """How many images of this side one forward pass takes: 128 at 224 pixels, 512 at 112 and below."""
    return max(1, min(512, 128 * 224 * 224 // size**2))


def open_array(path: Path) -> np.ndarray:
    """A plain .npy array, memory-mapped and read-only; UserError for pickles, archives and damaged files."""
    try:
        # not np.load, which also opens archives and pickles
        return np.lib.format.open_memmap(path, mode="r")
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: make the labels again") from error
    except Exception as error:  # numpy raises many kinds for a damaged header
        raise UserError(f"{path} is not a plain array ({str(error)[:200]}): make the labels again") from error


def open_views(folder: Path) -> Views:
    """Views from the .npy files below `folder`, memory-mapped and read-only; plain arrays only, pickles are refused."""
    arrays = {}
    for name in (*PER_EPOCH, "offsets"):
        arrays[name] = open_array(folder / Labels.view_name(name))
    return Views(**arrays)


def check_views(views: Views, epochs: int, images: int, size: int, folder: Path) -> None:
    """UserError that names the first array of the label store in `folder` that cannot be replayed on `images` of side `size`."""

    def must(name: str, fits: bool, wanted: str) -> None:
        if not fits:
            raise UserError(f"{folder / Labels.view_name(name)} must hold {wanted}: make the labels again")

    offsets = np.asarray(views.offsets)
    good = offsets.dtype == np.int64 and offsets.ndim == 1 and len(offsets) > 1
    good = good and offsets[0] == 0 and offsets[-1] == images and bool((np.diff(offsets) > 0).all())
    must("offsets", good, f"rising int64 from 0 to the {images} images")
    for name, (shape, dtype) in array_types(offsets).items():
        found: np.ndarray = getattr(views, name)
        wanted = (epochs, *shape)
        told = f"{np.dtype(dtype)} {list(wanted)}, got {found.dtype} {list(found.shape)}"
        must(name, found.dtype == dtype and found.shape == wanted, told)
    must("order", bool((np.sort(views.order, 1) == np.arange(images)).all()), "every image once in each epoch")
    crop = np.asarray(views.crop, np.int32)
    inside = (crop[..., :2] >= 0) & (crop[..., 2:] >= 1) & (crop[..., :2] + crop[..., 2:] <= size)
    must("crop", bool(inside.all()), f"crops inside {size} x {size} pixels")
    counts = np.repeat(np.diff(offsets), np.diff(offsets))
    must("mix_index", bool(((views.mix_index >= 0) & (views.mix_index < counts)).all()), "rows of their own batch")
    box = np.asarray(views.bbox)
    must("bbox", bool(((box >= 0) & (box <= size)).all()), f"boxes inside {size} x {size} pixels")
