"""What a step begins with: initial images, committees, prior attention and iteration tables, functions of seed and plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fd2fast import ops
from fd2fast.artifacts import Dataset, Images, Patches
from fd2fast.data.pixels import normalise, read_image
from fd2fast.data.store import ImageSet, load_split
from fd2fast.distillation.planner import COLUMNS, Plan, TableStream, cosine_rates, iteration_table
from fd2fast.errors import UserError
from fd2fast.methods import method_of
from fd2fast.models.teacher import Teacher
from fd2fast.seeding import derive, generator, numpy_generator
from fd2fast.settings.recipe import Recipe
from fd2fast.step import Priors

Draws = Mapping[int, ArrayLike]

_CHUNK = 64  # iterations in one table
_PRIOR_BATCH = 64  # finished images in one forward pass
_READERS = 4  # threads that decode images


@dataclass(frozen=True)
class Table:
    """Parameters of the iterations first .. first + T - 1: int [T, segments, 7] (`COLUMNS`) and rates float64 [T] or None."""

    first: int
    params: Tensor
    rates: Tensor | None


class Inputs:
    """The inputs of every step of one distillation.

    folder: where the distilled images lie, that priors are read back from. draws, prior_draws: as
    fd2fast.stages.distill.run takes them. Raises UserError for draws and images that do not fit.
    """

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        dataset: Dataset,
        patches: Patches | None,
        teachers: Sequence[Teacher],
        folder: Path,
        device: torch.device,
        *,
        draws: Draws | None = None,
        prior_draws: Draws | None = None,
    ):
        self.recipe, self.plan, self.dataset, self.patches = recipe, plan, dataset, patches
        self.teachers, self.folder, self.device = list(teachers), folder, device
        self.dtype = torch.float64 if recipe.precision == "fp64" else torch.float32
        self.total = recipe.total_iterations
        self.extension = recipe.save_format
        self.draws, self.prior_draws = draws, prior_draws
        self.check_draws()
        self.train: ImageSet | None = load_split(dataset, "train") if recipe.init == "real" else None
        if self.train is not None:
            self.train.require(1, "init 'real'")

    def check_draws(self) -> None:
        """UserError unless the draws that were given are those of the plan's iterations."""
        wanted = (self.total, len(COLUMNS))
        for segment in range(self.plan.n_segments) if self.draws is not None else ():
            shape = np.shape(self.draws[segment]) if segment in self.draws else None  # type: ignore[index,operator]
            if shape != wanted:
                raise UserError(f"draws[{segment}] must be int {list(wanted)}, got {shape}")

    def classes_of(self, segment: int) -> range:
        """The segment's classes."""
        return range(int(self.plan.first_class[segment]), int(self.plan.end_class[segment]))

    def cells(self, segment: int) -> list[tuple[int, int]]:
        """Class and image id of each row of a segment."""
        labels, image_ids = self.plan.labels([segment]), self.plan.image_ids([segment])
        return [(int(label), int(image_id)) for label, image_id in zip(labels, image_ids, strict=True)]

    def files(self, segments: Sequence[int]) -> Iterator[Path]:
        """The distilled image of each row of these segments."""
        for segment in segments:
            for label, image_id in self.cells(segment):
                yield self.image_path(label, image_id)

    def image_path(self, label: int, image_id: int) -> Path:
        """Where a distilled image lies, once it is finished."""
        return self.folder / Images.image_name(label, image_id, self.extension)

    def committee(self, image_id: int) -> list[int]:
        """The teachers of an image id, a function of (seed, image id) only, in the order given."""
        count = self.recipe.teachers_per_image
        if count is None or count == len(self.teachers):
            return list(range(len(self.teachers)))
        drawn = numpy_generator(self.recipe.seed, "committee", image_id).permutation(len(self.teachers))[:count]
        return sorted(int(t) for t in drawn)

    def initial_images(self, segment: int) -> Tensor:
        """Normalised initial images [n, 3, S, S] of a segment on the host, a function of (seed, class, image id)."""
        cells = self.cells(segment)
        size, seed = self.dataset.size, self.recipe.seed
        if self.recipe.init == "noise":
            shape = (len(cells), 3, size, size)
            return torch.randn(shape, generator=generator(seed, "noise", segment)).to(self.dtype)
        if self.train is not None:
            picked = []
            for label, image_id in cells:
                indices = self.train.of_class(label)
                order = numpy_generator(seed, "real", label).permutation(len(indices))
                picked.append(int(indices[order[image_id % len(order)]]))
            pixels = self.train.pixels(picked)
        else:
            pixels = self.read([self._patch(label, image_id) for label, image_id in cells])
        return normalise(pixels, self.dataset.mean, self.dataset.std, self.dtype)

    def _patch(self, label: int, image_id: int) -> Path:
        """The file that an image starts from: its own id's, or one drawn at random (released)."""
        if self.patches is None:
            raise ValueError("initial images from patches need patches")
        if self.recipe.patch_choice == "random":
            count = self.patches.facts.per_class
            rng = numpy_generator(self.recipe.seed, "patch", image_id)
            image_id = int(rng.integers(count, size=len(self.dataset.classes))[label])
        return self.patches.image(label, image_id)

    def read(self, paths: Sequence[Path]) -> Tensor:
        """uint8 [n, 3, S, S]; UserError names a file that is damaged or of another size."""
        wanted = (3, self.dataset.size, self.dataset.size)
        with ThreadPoolExecutor(_READERS) as pool:
            found = list(pool.map(read_image, paths))
        for path, pixels in zip(paths, found, strict=True):
            if tuple(pixels.shape) != wanted:
                raise UserError(f"{path} must be {list(wanted)}, got {list(pixels.shape)}")
        return torch.stack(found)

    def tables(self, segments: Sequence[int], first: int, end: int, size: int) -> Iterator[Table]:
        """The tables of iterations first .. end - 1 for images of `size` pixels, made ahead on another thread.

        A table is valid until the next one is taken.
        """
        if self.draws is not None:
            given = np.stack([np.asarray(self.draws[s], dtype=np.int32)[first:end] for s in segments], axis=1)
            for begin in range(0, len(given), _CHUNK):
                yield Table(first + begin, torch.from_numpy(given[begin : begin + _CHUNK]), None)
            return
        if method_of(self.recipe.method).smallest_crop is not None:
            yield from self._tables_of_changing_crops(segments, first, end, size)
            return
        stream = TableStream(
            self.recipe.seed,
            segments,
            first,
            end - first,
            size,
            jitter=min(self.recipe.jitter, size - 1),
            augment=self.recipe.augment,
            scale=(self.recipe.min_crop, 1.0),
            lr=self.recipe.lr,
            total=self.total,
            chunk=_CHUNK,
        )
        with stream:
            for params, rates in stream:
                yield Table(first, torch.from_numpy(params), torch.from_numpy(rates))
                first += len(params)

    def _tables_of_changing_crops(self, segments: Sequence[int], first: int, end: int, size: int) -> Iterator[Table]:
        """`tables` where the method's smallest crop is a function of the iteration."""
        recipe, smallest_crop = self.recipe, method_of(self.recipe.method).smallest_crop
        jitter, total = min(recipe.jitter, size - 1), recipe.total_iterations
        for begin in range(first, end, _CHUNK):
            params = [
                iteration_table(
                    recipe.seed,
                    segments,
                    iteration,
                    1,
                    size,
                    jitter=jitter,
                    augment=recipe.augment,
                    scale=(recipe.min_crop if smallest_crop is None else smallest_crop(recipe, iteration), 1.0),
                )
                for iteration in range(begin, min(begin + _CHUNK, end))
            ]
            rates = cosine_rates(recipe.lr, begin, len(params), total)
            yield Table(begin, torch.from_numpy(np.concatenate(params)), torch.from_numpy(rates))

    def priors(self, segments: Sequence[int]) -> list[Priors | None]:
        """Per teacher: attention of the finished images of each row's class and group, read back from their files."""
        none: list[Priors | None] = [None] * len(self.teachers)
        earlier, bounds = self.plan.priors(segments)
        if not self.recipe.fd2 or not len(earlier):
            return none
        files: list[Path] = []
        lengths: list[int] = []
        draws: list[NDArray[np.int64]] = []
        for position, segment in enumerate(segments):
            ids = [int(self.plan.image_id[p]) for p in earlier[bounds[position] : bounds[position + 1]]]
            labels = self.classes_of(segment)
            files += [self.image_path(k, i) for k in labels for i in ids]
            lengths += [len(ids)] * len(labels)
            draws.append(self.view_draws(segment, labels, ids))
        images = normalise(self.read(files), self.dataset.mean, self.dataset.std, self.dtype).to(self.device)
        if self.recipe.prior_view == "augmented":
            one_each = list(range(len(files) + 1))
            images = ops.crop_flip_roll(images, torch.from_numpy(np.concatenate(draws)), one_each, self.dataset.size)
        offsets = (0, *(int(v) for v in np.cumsum(lengths)))
        with torch.no_grad():
            return [
                Priors(torch.cat([teacher(part).attention for part in images.split(_PRIOR_BATCH)]), offsets)
                for teacher in self.teachers
            ]

    def view_draws(self, segment: int, labels: range, ids: Sequence[int]) -> NDArray[np.int64]:
        """One crop and flip (no roll) for each prior image of a segment, int [classes * ids, 7] (released)."""
        if self.recipe.prior_view != "augmented" or not ids:
            return np.zeros((0, len(COLUMNS)), np.int64)
        if self.prior_draws is not None:
            wanted = (len(labels) * len(ids), len(COLUMNS))
            given = np.asarray(self.prior_draws.get(segment, ()), dtype=np.int64)
            if given.shape != wanted:
                raise UserError(f"prior_draws[{segment}] must be int {list(wanted)}, got {list(given.shape)}")
            return given
        table = iteration_table(
            derive(self.recipe.seed, "prior", segment),
            [i * len(self.dataset.classes) + k for k in labels for i in ids],  # free of IPC
            0,
            1,
            self.dataset.size,
            jitter=0,
            augment=self.recipe.augment,
            scale=(self.recipe.min_crop, 1.0),
        )
        return table[0].astype(np.int64)
