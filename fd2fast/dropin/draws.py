"""Every random number of a recovery, by task: from a file, from the published code's own streams, or from a seed and counters.

A task is a block of classes with one image id, as the published code hands it to one process. A file of draws has one JSON
object a line: {"format": "fd2fast draws 1"}, then one for each task with "ipc_id", "first_class", "end_class", "models",
"weights", "patches" (files below the patch folder, one a class), "views" (crop and flip of each finished image that the
task compares with, class by class, ids ascending) and "draws" (one line an iteration); both are lists of
[top, left, height, width, flip, roll_down, roll_right] in pixels of the image they are taken from.
"""

from __future__ import annotations

import contextlib
import glob
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import RandomResizedCrop

from fd2fast.artifacts import atomic_path
from fd2fast.distillation.planner import COLUMNS, iteration_table
from fd2fast.errors import UserError
from fd2fast.seeding import derive, generator, numpy_generator

FORMAT = "fd2fast draws 1"
_AREA, _RATIO = (0.08, 1.0), (3 / 4, 4 / 3)

Noise = Callable[[], list[Tensor]]


@dataclass(frozen=True)
class Block:
    """The classes first .. end - 1 with one image id; `previous` ids of the same classes are compared with."""

    image_id: int
    first: int
    end: int
    previous: tuple[int, ...] = ()

    @property
    def classes(self) -> range:
        return range(self.first, self.end)


@dataclass(frozen=True)
class Drawn:
    """What one task draws. models: indices of its teachers in their order; weights: of their losses."""

    models: tuple[int, ...]
    weights: tuple[float, ...]
    patches: tuple[str, ...] | None  # below the patch folder, one a class
    views: NDArray[np.int32]  # [classes * previous, 7]
    draws: NDArray[np.int32]  # [iterations, 7]
    noise: Noise | None = None  # initial images, and what later phases mix in


@dataclass(frozen=True)
class Voting:
    """Which teachers a task takes, and their weights.

    each: the teachers of one image id, drawn from all in a new order; None: all, in theirs. sequence[image id]: fixed
    teachers. rule: equal, random, or prior with `scores` in percent over `temperature`, in a softmax.
    """

    count: int
    each: int | None = None
    sequence: tuple[tuple[int, ...], ...] | None = None
    rule: str = "equal"
    scores: tuple[float | None, ...] = ()
    temperature: float = 5.0

    def weights(self, models: Sequence[int], uniform: Callable[[int], NDArray[np.float64]]) -> tuple[float, ...]:
        """Of these teachers; uniform(n) draws n numbers in [0, 1)."""
        if self.rule == "equal":
            return (1 / len(models),) * len(models)
        if self.rule == "random":
            drawn = uniform(len(models))
            return tuple(float(w) for w in drawn / drawn.sum())
        if len(models) == 1:
            return (1.0,)
        powers = np.exp(np.array([self.scores[i] for i in models], np.float64) / self.temperature)
        return tuple(float(w) for w in powers / powers.sum())


@dataclass(frozen=True)
class Scene:
    """What the draws are a function of besides their source."""

    size: int
    phases: tuple[tuple[int, int], ...]  # iterations and side of each
    jitter: int
    augment: bool
    voting: Voting
    initial: str  # "noise", "patch of id" or "patch by chance"
    patch_folder: Path | None
    noise_sides: tuple[int, ...]  # of the initial images, then of what later phases mix in
    names: tuple[str, ...]  # of the models

    @property
    def iterations(self) -> int:
        return sum(count for count, _ in self.phases)

    def patches_of(self, label: int) -> list[str]:
        """A class's patches below the patch folder, in the order in which the file system lists them; UserError for none."""
        assert self.patch_folder is not None
        for name in (f"{label:05d}", str(label)):
            files = glob.glob(f"{glob.escape(str(self.patch_folder / name))}/*.jpg")
            if files:
                return [f"{name}/{Path(file).name}" for file in files]
        raise UserError(
            f"{self.patch_folder / f'{label:05d}'} holds no patch *.jpg: class {label} has no initial image "
            "(--patch_dir and --patch_diff name the folder)"
        )


def patch_of_id(label: int, image_id: int) -> str:
    """The file of one class's initial image with one id, below the patch folder."""
    return f"{label:05d}/class{label:05d}_id{image_id:05d}.jpg"


class Source(Protocol):
    """Gives the draws of each task; asked for them in the order of the tasks."""

    def drawn(self, block: Block) -> Drawn:
        """Of the next task."""


class Draws:
    """The tasks' draws, made in the tasks' order when they are first asked for; optionally kept in a file."""

    def __init__(self, blocks: Sequence[Block], source: Source):
        self._blocks, self._source = list(blocks), source
        self._known: list[Drawn] = []

    def __getitem__(self, task: int) -> Drawn:
        while len(self._known) <= task:
            self._known.append(self._source.drawn(self._blocks[len(self._known)]))
        return self._known[task]

    def write(self, path: Path, names: Sequence[str]) -> None:
        """All tasks as a file of draws; names: of the models."""
        with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
            file.write(json.dumps({"format": FORMAT}) + "\n")
            for task, block in enumerate(self._blocks):
                file.write(json.dumps(_line(block, self[task], names)) + "\n")


def _line(block: Block, drawn: Drawn, names: Sequence[str]) -> dict[str, Any]:
    return {
        "ipc_id": block.image_id,
        "first_class": block.first,
        "end_class": block.end,
        "models": [names[i] for i in drawn.models],
        "weights": list(drawn.weights),
        "patches": None if drawn.patches is None else list(drawn.patches),
        "views": drawn.views.tolist(),
        "draws": drawn.draws.tolist(),
    }


class FileSource:
    """Draws from a file; UserError names the line and what is wrong with it."""

    def __init__(self, path: Path, scene: Scene):
        self._path, self._scene = path, scene
        if scene.initial == "noise":
            raise UserError(f"--draws {path}: a file of draws holds no noise; wanted --initialisation_method Patches")
        self._lines: dict[tuple[int, int, int], tuple[int, dict[str, Any]]] = {}
        try:
            with open(path, encoding="utf-8") as file:
                lines = [(number, json.loads(text)) for number, text in enumerate(file, 1) if text.strip()]
        except OSError as error:
            raise UserError(f"--draws {path} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"--draws {path} is no file of draws: {error}") from error
        if not lines or not isinstance(lines[0][1], dict) or lines[0][1].get("format") != FORMAT:
            raise UserError(f'--draws {path}: the first line must be {{"format": "{FORMAT}"}}')
        for number, line in lines[1:]:
            try:
                key = (int(line["ipc_id"]), int(line["first_class"]), int(line["end_class"]))
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"--draws {path}, line {number}: no task ({error})") from error
            self._lines[key] = (number, line)

    def drawn(self, block: Block) -> Drawn:
        key = (block.image_id, block.first, block.end)
        if key not in self._lines:
            raise UserError(
                f"--draws {self._path} has no task of image id {block.image_id}, classes {block.first} to {block.end - 1}"
            )
        number, line = self._lines[key]
        return Drawn(
            *self._voters(number, line),
            self._patches(number, line, block),
            self._table(number, line, "views", [self._scene.size] * len(block.previous) * len(block.classes)),
            self._table(number, line, "draws", [side for count, side in self._scene.phases for _ in range(count)]),
        )

    def _fault(self, number: int, told: str) -> UserError:
        return UserError(f"--draws {self._path}, line {number}: {told}")

    def _voters(self, number: int, line: dict[str, Any]) -> tuple[tuple[int, ...], tuple[float, ...]]:
        names = self._scene.names
        told = line.get("models", list(names))
        if not isinstance(told, list) or not told or any(name not in names for name in told):
            raise self._fault(number, f"models must be some of {list(names)}, got {told}")
        free = {name: [i for i, own in enumerate(names) if own == name] for name in told}
        if any(told.count(name) > len(free[name]) for name in told):
            raise self._fault(number, f"models must be some of {list(names)}, got {told}")
        models = tuple(free[name].pop(0) for name in told)
        weights = line.get("weights", [1 / len(models)] * len(models))
        if not isinstance(weights, list) or len(weights) != len(models):
            raise self._fault(number, f"weights must be {len(models)} numbers, got {weights}")
        return models, tuple(float(w) for w in weights)

    def _patches(self, number: int, line: dict[str, Any], block: Block) -> tuple[str, ...]:
        if self._scene.initial == "patch of id" and line.get("patches") is None:
            return tuple(patch_of_id(label, block.image_id) for label in block.classes)
        told = line.get("patches")
        if not isinstance(told, list) or len(told) != len(block.classes) or not all(isinstance(p, str) for p in told):
            raise self._fault(number, f"patches must be {len(block.classes)} files, one for each class")
        for name in told:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise self._fault(number, f"patch {name!r} must lie below the patch folder")
        return tuple(told)

    def _table(self, number: int, line: dict[str, Any], name: str, sides: Sequence[int]) -> NDArray[np.int32]:
        wanted = (len(sides), len(COLUMNS))
        try:
            table = np.array(line.get(name, []), dtype=np.int64).reshape(-1, len(COLUMNS))
        except (TypeError, ValueError, OverflowError) as error:
            raise self._fault(number, f"{name} must be int {list(wanted)} ({error})") from error
        if table.shape != wanted:
            raise self._fault(number, f"{name} must be int {list(wanted)}, got {list(table.shape)}")
        limit = np.asarray(sides, dtype=np.int64)
        top, left, height, width, flip = table.T[:5]
        good = (top >= 0) & (left >= 0) & (height >= 1) & (width >= 1) & (top + height <= limit)
        good &= (left + width <= limit) & (flip >= 0) & (flip <= 1)
        if not good.all():
            row = int(np.flatnonzero(~good)[0])
            raise self._fault(
                number, f"{name}[{row}] must be a crop inside {limit[row]} pixels, got {table[row].tolist()}"
            )
        return table.astype(np.int32)


class CounterSource:
    """Draws that are a function of (seed, image id, first class, iteration) only."""

    def __init__(self, seed: int, scene: Scene):
        self._seed, self._scene = seed, scene

    def drawn(self, block: Block) -> Drawn:
        seed, scene, at = self._seed, self._scene, (block.image_id, block.first)
        voting = scene.voting
        models = tuple(range(voting.count))
        if voting.sequence is not None:
            models = voting.sequence[block.image_id]
        elif voting.each is not None:
            order = numpy_generator(seed, "committee", block.image_id).permutation(voting.count)
            models = tuple(int(i) for i in order[: voting.each])
        weights = voting.weights(models, lambda n: numpy_generator(seed, "voter", *at).random(n))
        patches: tuple[str, ...] | None = None
        if scene.initial == "patch of id":
            patches = tuple(patch_of_id(label, block.image_id) for label in block.classes)
        elif scene.initial == "patch by chance":
            rng = [numpy_generator(seed, "patch", block.image_id, label) for label in block.classes]
            files = [sorted(scene.patches_of(label)) for label in block.classes]
            patches = tuple(own[int(r.integers(len(own)))] for own, r in zip(files, rng, strict=True))
        keys = [image_id << 32 | label for label in block.classes for image_id in block.previous]
        views = np.zeros((0, len(COLUMNS)), np.int32)
        if keys:
            key = derive(seed, "prior", *at)
            views = iteration_table(key, keys, 0, 1, scene.size, jitter=0, augment=scene.augment)[0]
        tables, first = [], 0
        for count, side in scene.phases:
            jitter = min(scene.jitter, side - 1)
            task = [block.image_id << 32 | block.first]
            tables.append(iteration_table(seed, task, first, count, side, jitter=jitter, augment=scene.augment)[:, 0])
            first += count
        return Drawn(models, weights, patches, views, np.concatenate(tables), self._noise(block))

    def _noise(self, block: Block) -> Noise | None:
        if self._scene.initial != "noise":
            return None
        shapes = noise_shapes(block, self._scene)

        def make() -> list[Tensor]:
            own = generator(self._seed, "noise", block.image_id, block.first)
            return [torch.randn(shape, generator=own) for shape in shapes]

        return make


def noise_shapes(block: Block, scene: Scene) -> list[tuple[int, ...]]:
    """Of the images that a task begins with, then of what later phases mix in."""
    return [(len(block.classes), 3, side, side) for side in scene.noise_sides]


class ReferenceSource:
    """The published code's own draws, as if Python's, numpy's and torch's CPU generator were seeded at its very beginning.

    Its tasks run one after the other in the process that was seeded. What it draws without using it (initial weights of
    networks before their own are loaded) is drawn, too.
    """

    def __init__(
        self,
        seed: int,
        scene: Scene,
        prepare: Callable[[tuple[int, ...], bool], None],
        *,
        weights_by_task: bool,
    ):
        """prepare(models, new): draws the initial weights that are made before a task; new: the task's image id is new.

        weights_by_task: random weights are drawn for each task, not for each image id.
        """
        self._scene, self._prepare = scene, prepare
        self._python, self._numpy = random.Random(seed), np.random.RandomState(seed)
        self._torch = torch.Generator().manual_seed(seed).get_state()
        self._image_id: int | None = None
        self._models: tuple[int, ...] = ()
        self._weights: tuple[float, ...] = ()
        self._weights_by_task = weights_by_task

    @contextlib.contextmanager
    def _own_torch(self) -> Iterator[None]:
        before = torch.get_rng_state()
        torch.set_rng_state(self._torch)
        try:
            yield
        finally:
            self._torch = torch.get_rng_state()
            torch.set_rng_state(before)

    def drawn(self, block: Block) -> Drawn:
        scene, voting = self._scene, self._scene.voting
        new = block.image_id != self._image_id
        if new:
            self._image_id = block.image_id
            self._models = tuple(range(voting.count))
            if voting.sequence is not None:
                self._models = voting.sequence[block.image_id]
            elif voting.each is not None:
                self._models = tuple(self._python.sample(range(voting.count), voting.each))
        with self._own_torch():
            self._prepare(self._models, new)
            if new or self._weights_by_task:
                self._weights = voting.weights(self._models, self._numpy.rand)
            views = [self._crop(scene.size) for _ in block.classes for _ in block.previous]
            noise = self._noise(block)
        patches: tuple[str, ...] | None = None
        if scene.initial == "patch of id":
            patches = tuple(patch_of_id(label, block.image_id) for label in block.classes)
        elif scene.initial == "patch by chance":
            patches = tuple(self._python.sample(scene.patches_of(label), 1)[0] for label in block.classes)
        rows = []
        with self._own_torch():
            for count, side in scene.phases:
                for _ in range(count):
                    crop = self._crop(side)
                    rolls = [self._python.randint(0, scene.jitter) for _ in range(2)]
                    rows.append([*crop[:5], *(roll % side for roll in rolls)])
        table = np.array(views, np.int32).reshape(-1, len(COLUMNS))
        return Drawn(self._models, self._weights, patches, table, np.array(rows, np.int32), noise)

    def _crop(self, side: int) -> list[int]:
        """One random crop and flip of torchvision's transforms, from torch's global generator."""
        if not self._scene.augment:
            return [0, 0, side, side, 0, 0, 0]
        like = torch.zeros(1).expand(3, side, side)
        crop = RandomResizedCrop.get_params(like, list(_AREA), list(_RATIO))
        flip = bool(torch.rand(1) < 0.5)
        return [*(int(v) for v in crop), int(flip), 0, 0]

    def _noise(self, block: Block) -> Noise | None:
        if self._scene.initial != "noise":
            return None
        shapes, state = noise_shapes(block, self._scene), torch.get_rng_state()
        for shape in shapes:
            torch.randn(shape)

        def make() -> list[Tensor]:
            own = torch.Generator()
            own.set_state(state)
            return [torch.randn(shape, generator=own) for shape in shapes]

        return make
