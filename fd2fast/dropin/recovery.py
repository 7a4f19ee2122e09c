"""Recovery of the published scripts on this engine: their tasks as a plan, their teachers, draws, losses and files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fd2fast.artifacts import Dataset, read_json, read_torch, write_json, write_torch
from fd2fast.data.pixels import bounds, normalise
from fd2fast.distillation.memory import free_bytes, measure, too_small
from fd2fast.distillation.planner import Plan
from fd2fast.distillation.runner import Part, PlanRunner
from fd2fast.distillation.start import Inputs, Table
from fd2fast.dropin.draws import (
    Block,
    CounterSource,
    Drawn,
    Draws,
    FileSource,
    ReferenceSource,
    Scene,
    Source,
    Voting,
    patch_of_id,
)
from fd2fast.dropin.pool import Loaded, Member
from fd2fast.errors import UserError
from fd2fast.methods import Outputs, Term
from fd2fast.methods.losses import BN_MATCHING, CROSS_ENTROPY
from fd2fast.models.convolution import Choices
from fd2fast.models.fused import FusedTeacher, fuse
from fd2fast.models.teacher import Teacher
from fd2fast.models.tune import tune
from fd2fast.settings.recipe import Recipe
from fd2fast.step import GroupedStep, map_dtype
from fd2fast.system import lock
from fd2fast.system.device import pick_device, repeatable
from fd2fast.system.processes import Workers, current

log = logging.getLogger("fd2fast")

# Images of a step from which on more of them gain no speed.
_FAST_ROWS = {"cpu": 64, "cuda": 512}
_SETTINGS = "settings.json"


@dataclass(frozen=True)
class Target:
    """The data set that is distilled: `classes` K, side and normalisation of its images, largest roll in pixels."""

    name: str
    classes: int
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    jitter: int


@dataclass(frozen=True)
class Recovery:
    """One call of a script, nothing left open. Raises UserError for settings that cannot be right."""

    script: str
    target: Target
    folder: Path  # of the images
    first_id: int
    end_id: int
    block: int  # classes of a task
    first_class: int  # of the first id only
    members: tuple[Member, ...]
    voting: Voting
    schedule: str  # "all" or "round_robin"
    iterations: tuple[int, ...]
    sizes: tuple[int, ...]
    residual: float
    lr: float
    r_bn: float
    first_bn_multiplier: float
    augment: bool
    cal: bool  # the CAL branch takes part
    characteristic: float | None  # weight of L_F; None: none
    beta: float
    similarity: float | None  # weight of L_S; None: none
    threshold: float
    initial: str  # "noise", "patch of id" or "patch by chance"
    pool: Path | None
    patches: Path | None
    noise_sides: tuple[int, ...]
    keep: bool  # store the images
    extension: str
    precision: str
    device: str
    seed: int | None
    reference_rng: int | None
    draws: Path | None
    dump_draws: Path | None
    weights_by_task: bool = True

    def __post_init__(self) -> None:
        _check(self)

    @property
    def ids(self) -> range:
        return range(self.first_id, self.end_id)

    def image(self, label: int, image_id: int) -> Path:
        """Where a distilled image is stored."""
        return self.folder / f"new{label:03d}" / f"class{label:03d}_id{image_id:03d}.{self.extension}"

    def blocks(self) -> list[Block]:
        """The tasks in the script's order."""
        found = []
        for image_id in self.ids:
            begin = self.first_class if image_id == self.first_id else 0
            previous = tuple(range(self.first_id, image_id)) if self.similarity is not None else ()
            for first in range(begin, self.target.classes, self.block):
                found.append(Block(image_id, first, min(first + self.block, self.target.classes), previous))
        return found


class Onlooker(Protocol):
    """Is told what happens, for the script's own lines and pictures."""

    def begun(self, block: Block, drawn: Drawn) -> None:
        """A task's first iteration is next."""

    def due(self, iteration: int) -> bool:
        """Whether `lines` is wanted for this iteration."""

    def lines(self, block: Block, drawn: Drawn, iteration: int, losses: Mapping[str, float], seconds: float) -> None:
        """The losses of an iteration before its update; seconds: since the lines before."""

    def images(self, block: Block, images: Tensor) -> None:
        """After the iteration of which `lines` told: normalised images [n, 3, s, s]."""

    def phase(self, number: int, size: int, block: Block) -> None:
        """A phase after the first begins."""

    def ended(self, block: Block, seconds: float) -> None:
        """All iterations of a task are done; seconds: of one iteration of it."""

    def id_ended(self, image_id: int, seconds: float) -> None:
        """All tasks of an image id are done."""


def run(
    recovery: Recovery,
    load: Callable[[Member], Loaded],
    prepare: Callable[[tuple[int, ...], bool, Sequence[str]], None],
    onlooker: Onlooker,
) -> None:
    """Make the images.

    load: reads a teacher; prepare(models, new, sources): see ReferenceSource, with the architecture of each teacher. A run that
    is killed goes on where it was when the same command is given again; after one that ended, everything is made anew.
    Raises UserError for whatever does not fit, before the first iteration where it can be known.
    """
    device, workers = pick_device(recovery.device), current()
    recovery = dataclasses.replace(recovery, precision=_precision(recovery, device))
    dtype = torch.float64 if recovery.precision == "fp64" else torch.float32
    loaded = [load(member) for member in recovery.members]
    teachers = [one.teacher.to(device=device, dtype=dtype) for one in loaded]
    blocks, store = recovery.blocks(), Store(recovery)
    with lock.own(store.state):
        try:
            engine = _prepared(recovery, blocks, store, loaded, teachers, prepare, onlooker, device, workers)
            with repeatable(allow_tf32=recovery.precision == "tf32"):
                engine.run()
        except UserError:
            if workers.rank == 0:
                store.forget()
            raise
    workers.first(store.end)


def _prepared(
    recovery: Recovery,
    blocks: Sequence[Block],
    store: Store,
    loaded: Sequence[Loaded],
    teachers: Sequence[Teacher],
    prepare: Callable[[tuple[int, ...], bool, Sequence[str]], None],
    onlooker: Onlooker,
    device: torch.device,
    workers: Workers,
) -> RecoveryEngine:
    """The engine with the tasks that are left; UserError for whatever does not fit."""
    seed, scene = workers.told(lambda: store.begin(recovery)), _scene(recovery)
    draws = Draws(blocks, _source(recovery, scene, seed, [one.source for one in loaded], prepare))
    if recovery.initial != "noise":
        _check_patches(recovery, scene, blocks, draws)
    if recovery.dump_draws is not None and workers.rank == 0:
        draws.write(recovery.dump_draws, scene.names)
    recipe = _recipe(recovery, seed)
    with repeatable(allow_tf32=recovery.precision == "tf32"):
        fused = [fuse(teacher, map_dtype(recovery.precision, teacher.head.fc.weight.dtype)) for teacher in teachers]
        rows = workers.told(lambda: store.rows(lambda: _rows(recipe, fused, device)))
        choices = Choices()
        for one in fused:
            one.choose_by(choices)
        choices.take(workers.told(lambda: store.convolutions(lambda: dict(tune(fused, rows, recipe.sizes).chosen))))
    plan = plan_of(blocks, recovery, rows)
    inputs = RecoveryInputs(recovery, recipe, plan, blocks, draws, teachers, store, device)
    return RecoveryEngine(recovery, recipe, store, inputs, lambda: fused, workers, onlooker)


def _check(recovery: Recovery) -> None:
    for option, count in (("class block", recovery.block), ("image ids", len(recovery.ids))):
        if count < 1:
            raise UserError(f"{option} must be at least 1, got {count}")
    if not 0 <= recovery.first_class < recovery.target.classes:
        raise UserError(f"the first class must lie in [0, {recovery.target.classes}), got {recovery.first_class}")
    if not recovery.sizes or len(recovery.sizes) != len(recovery.iterations) or min(recovery.iterations) < 1:
        raise UserError(
            f"each phase needs a size and 1 or more iterations, got {list(recovery.sizes)} and {list(recovery.iterations)}"
        )
    if recovery.sizes[-1] != recovery.target.size:
        raise UserError(
            f"the last size must be {recovery.target.size}, the side of {recovery.target.name}, got {recovery.sizes[-1]}"
        )
    if recovery.similarity is not None and len(recovery.ids) > 1 and not recovery.keep:
        raise UserError("--SC compares with the stored images of earlier ids: it needs --store_best_images")
    if recovery.draws is not None and recovery.reference_rng is not None:
        raise UserError("--draws and --reference_rng exclude each other")


def _precision(recovery: Recovery, device: torch.device) -> str:
    """What "auto" is: the published code's arithmetic on this kind of device."""
    if recovery.precision != "auto":
        return recovery.precision
    if device.type == "cpu":
        return "fp32"
    return "fp16" if recovery.schedule == "round_robin" else "tf32"


def _scene(recovery: Recovery) -> Scene:
    return Scene(
        recovery.target.size,
        tuple(zip(recovery.iterations, recovery.sizes, strict=True)),
        recovery.target.jitter,
        recovery.augment,
        recovery.voting,
        recovery.initial,
        recovery.patches,
        recovery.noise_sides,
        tuple(member.model for member in recovery.members),
    )


def _source(
    recovery: Recovery,
    scene: Scene,
    seed: int,
    sources: Sequence[str],
    prepare: Callable[[tuple[int, ...], bool, Sequence[str]], None],
) -> Source:
    if recovery.draws is not None:
        return FileSource(recovery.draws, scene)
    if recovery.reference_rng is not None:
        return ReferenceSource(
            recovery.reference_rng,
            scene,
            lambda models, new: prepare(models, new, sources),
            weights_by_task=recovery.weights_by_task,
        )
    return CounterSource(seed, scene)


def _check_patches(recovery: Recovery, scene: Scene, blocks: Sequence[Block], draws: Draws) -> None:
    """UserError for a patch that is missing, before any work."""
    assert recovery.patches is not None
    if recovery.draws is None and recovery.initial == "patch by chance":
        for label in sorted({label for block in blocks for label in block.classes}):
            scene.patches_of(label)
        return
    for task, block in enumerate(blocks):
        names: Sequence[str] = [patch_of_id(label, block.image_id) for label in block.classes]
        if recovery.draws is not None:
            names = draws[task].patches or ()
        for name, label in zip(names, block.classes, strict=True):
            if not (recovery.patches / name).is_file():
                raise UserError(
                    f"{recovery.patches / name} is missing: class {label}, id {block.image_id} has no initial image"
                )


def _recipe(recovery: Recovery, seed: int) -> Recipe:
    similar = recovery.similarity is not None
    return Recipe(
        method="fadrm+_fd2" if recovery.schedule == "round_robin" else "sre2l++_fd2",
        semantics="released",
        ipc=recovery.end_id,
        segment_size=min(recovery.block, recovery.target.classes),
        segments_per_step=None,
        iterations=recovery.iterations,
        sizes=recovery.sizes,
        residual=recovery.residual,
        lr=recovery.lr,
        betas=(0.5, 0.9),
        adam_eps=1e-8,
        r_bn=recovery.r_bn,
        first_bn_multiplier=recovery.first_bn_multiplier,
        teacher_schedule="round_robin" if recovery.schedule == "round_robin" else "all",
        teachers_per_image=None,
        teacher_weights="equal",
        init="noise" if recovery.initial == "noise" else "patches",
        augment=recovery.augment,
        min_crop=0.08,
        jitter=recovery.target.jitter,
        fd2=recovery.cal,
        prototypes="last",
        alpha=None,
        lam=0.9,
        beta=recovery.beta,
        group_size=len(recovery.ids) if similar else 1,
        eps=1e-6,
        keep_base_ce=False,
        ls_threshold=recovery.threshold,
        prior_view="augmented",
        patch_choice="random",
        save_format="jpg" if recovery.extension == "jpg" else "png",
        quantize="truncate",
        precision=cast(Any, recovery.precision),
        seed=seed,
        save_every=None,
        memory_limit=None,
        device=recovery.device,
    )


_CAL = Term(
    "ce_cal", lambda recipe, alpha: alpha, lambda out: out.cross_entropy(out.cal_logits), frozenset({"cal_logits"})
)


def terms_of(recovery: Recovery) -> tuple[Term, ...]:
    """What a task's loss is the sum of; with several teachers at once, each one's parts follow by "name:teacher", unweighted."""
    terms = [CROSS_ENTROPY, BN_MATCHING]
    if recovery.cal:
        terms.append(_CAL)
    if (weight := recovery.characteristic) is not None:
        terms.append(Term("l_f", lambda recipe, alpha: weight, lambda out: out.characteristic_loss(), frozenset({"z"})))
    if (share := recovery.similarity) is not None:
        terms.append(
            Term(
                "l_s",
                lambda recipe, alpha: share,
                lambda out: out.similarity_loss(),
                frozenset({"attention"}),
                counted=lambda out, value: out.where_at_least(value, recovery.threshold),
            )
        )
    several = recovery.schedule == "all" and len(recovery.members) > 1
    own = [_of_one(term, teacher) for teacher in range(len(recovery.members)) for term in terms] if several else []
    return (*terms, *own)


def _of_one(term: Term, teacher: int) -> Term:
    """The value of a term for one teacher alone; it adds nothing to the loss."""

    def value(out: Outputs) -> Tensor | None:
        if out.index != teacher:
            return None
        with torch.no_grad():
            return term.value(out)

    return Term(
        f"{term.name}:{teacher}",
        lambda recipe, alpha: 0.0,
        value,
        term.reads,
        counted=lambda out, v: torch.zeros_like(v),
    )


def _rows(recipe: Recipe, fused: Sequence[FusedTeacher], device: torch.device) -> int:
    """Most images of a step: what is fast and fits the memory; UserError where one task does not."""
    memory, limit = measure(recipe, fused, device), free_bytes(device)
    if memory.of(recipe.segment_size) > limit:
        raise too_small(memory, recipe.segment_size, limit, recipe.precision)
    most = max(recipe.segment_size, _FAST_ROWS[device.type])
    return min(most, max(recipe.segment_size, (limit - memory.fixed) // memory.row))


def plan_of(blocks: Sequence[Block], recovery: Recovery, rows: int) -> Plan:
    """The tasks as segments: those that compare with finished images in a wave after them; steps of at most `rows` images."""
    by_id = {image_id: task for task, image_id in reversed([(t, b.image_id) for t, b in enumerate(blocks)])}
    waves = [len(block.previous) for block in blocks]
    steps: list[tuple[int, list[int]]] = []
    for wave in sorted(set(waves)):
        members = [task for task, own in enumerate(waves) if own == wave]
        members.sort(key=lambda task: blocks[task].first - blocks[task].end)  # full ones first
        for task in members:
            held = sum(len(blocks[t].classes) for t in steps[-1][1]) if steps and steps[-1][0] == wave else rows
            if held + len(blocks[task].classes) > rows:
                steps.append((wave, []))
            steps[-1][1].append(task)
    previous = [[by_id[image_id] for image_id in block.previous] for block in blocks]

    def ints(values: Sequence[int], dtype: Any = np.int32) -> NDArray[Any]:
        return np.array(values, dtype=dtype)

    return Plan(
        classes=recovery.target.classes,
        ipc=recovery.end_id,
        group_size=len(recovery.ids) if recovery.similarity is not None else 1,
        segment_size=recovery.block,
        segments_per_step=max(len(tasks) for _, tasks in steps),
        max_rows_per_step=rows,
        bucket_sizes=(),
        first_class=ints([b.first for b in blocks]),
        end_class=ints([b.end for b in blocks]),
        block=ints([b.first // recovery.block for b in blocks]),
        image_id=ints([b.image_id for b in blocks]),
        group=ints([0 for _ in blocks]),
        slot=ints(waves),
        step_segments=ints([task for _, tasks in steps for task in tasks], np.int64),
        step_offsets=ints(np.cumsum([0, *(len(tasks) for _, tasks in steps)]).tolist(), np.int64),
        step_wave=ints([wave for wave, _ in steps]),
        prior_segments=ints([task for tasks in previous for task in tasks], np.int64),
        prior_offsets=ints(np.cumsum([0, *(len(tasks) for tasks in previous)]).tolist(), np.int64),
    )


class Store:
    """What resuming needs, beside the folder of the images: theirs holds nothing else, as the published code reads it."""

    def __init__(self, recovery: Recovery):
        read = [recovery.draws] if recovery.draws is not None else []
        if recovery.pool is not None:
            read += [recovery.pool / member.file for member in recovery.members]
        told = dataclasses.asdict(recovery) | {"files": [_stamp(path) for path in read]}
        for name in ("dump_draws", "device"):
            told.pop(name)
        self._digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
        self.state = recovery.folder.parent / ".fd2fast" / f"{recovery.folder.name}-{self._digest[:12]}"

    def begin(self, recovery: Recovery) -> int:
        """The seed of a run that was killed, or of a new one."""
        path = self.state / _SETTINGS
        if path.is_file():
            return int(read_json(path)["seed"])
        seed = recovery.seed if recovery.seed is not None else secrets.randbits(32)
        write_json(path, {"seed": seed})
        return seed

    def rows(self, made: Callable[[], int]) -> int:
        """Most images of a step: as the run was begun with."""
        return int(self._kept("rows.json", made))

    def convolutions(self, made: Callable[[], dict[str, str]]) -> dict[str, str]:
        """Algorithms of the convolutions: as the run was begun with."""
        return {str(kind): str(name) for kind, name in self._kept("convolutions.json", made).items()}

    def _kept(self, name: str, made: Callable[[], Any]) -> Any:
        path = self.state / name
        if not path.is_file():
            write_json(path, made())
        return read_json(path)

    def checkpoint(self, name: str, value: Any) -> None:
        write_torch(self.state / name, value)

    def restore(self, name: str) -> Any | None:
        path = self.state / name
        return read_torch(path) if path.is_file() else None

    def forget(self) -> None:
        """`end`, unless there is work to go on from."""
        if not any((self.state / name).is_dir() for name in ("steps", "unfinished")):
            self.end()

    def end(self) -> None:
        """Nothing is left to go on from."""
        shutil.rmtree(self.state, ignore_errors=True)
        try:
            self.state.parent.rmdir()
        except OSError:
            pass  # another run's is there


def _stamp(path: Path) -> list[int]:
    try:
        found = os.stat(path)
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns]


class RecoveryInputs(Inputs):
    """What the published code's tasks begin with."""

    def __init__(
        self,
        recovery: Recovery,
        recipe: Recipe,
        plan: Plan,
        blocks: Sequence[Block],
        given: Draws,
        teachers: Sequence[Teacher],
        store: Store,
        device: torch.device,
    ):
        self.recovery, self.blocks, self.given, self._state = recovery, list(blocks), given, store.state
        dataset = cast(Dataset, _Look(recovery.target))
        super().__init__(recipe, plan, dataset, None, teachers, recovery.folder, device)

    def image_path(self, label: int, image_id: int) -> Path:
        if not self.recovery.keep:
            return self._state / "unkept" / f"class{label:03d}_id{image_id:03d}.{self.extension}"
        return self.recovery.image(label, image_id)

    def committee(self, image_id: int) -> list[int]:
        raise ValueError("committees are drawn for tasks")

    def initial_images(self, segment: int) -> Tensor:
        drawn = self.given[segment]
        if drawn.noise is not None:
            return drawn.noise()[-1].to(self.dtype)
        assert drawn.patches is not None
        assert self.recovery.patches is not None
        pixels = self.read([self.recovery.patches / name for name in drawn.patches])
        return self._normalised(pixels)

    def first_phase(self, segment: int) -> Tensor | None:
        """Images of the first phase's side that are not made from the initial ones: noise of their own."""
        drawn = self.given[segment]
        if drawn.noise is None or len(self.recovery.noise_sides) < 2:
            return None
        return drawn.noise()[0].to(self.dtype)

    def _normalised(self, pixels: Tensor) -> Tensor:
        mean, std = self.recovery.target.mean, self.recovery.target.std
        if self.dtype == torch.float64:
            return normalise(pixels, mean, std, torch.float64)
        unit = (pixels.float() / 255).double()  # the published code's roundings
        centre, scale = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (mean, std))
        return ((unit - centre) / scale).to(self.dtype)

    def tables(self, segments: Sequence[int], first: int, end: int, size: int) -> Any:
        table = np.stack([self.given[segment].draws[first:end] for segment in segments], axis=1)
        yield Table(first, torch.from_numpy(np.ascontiguousarray(table)), None)

    def view_draws(self, segment: int, labels: range, ids: Sequence[int]) -> NDArray[np.int64]:
        return self.given[segment].views.astype(np.int64)


class _Look:
    """What inputs and engine ask of a data set."""

    def __init__(self, target: Target):
        self.name, self.size, self.mean, self.std = target.name, target.size, target.mean, target.std
        self.classes = [str(label) for label in range(target.classes)]


class RecoveryEngine(PlanRunner):
    """The engine with the scripts' losses and teachers, which tells an onlooker."""

    inputs: RecoveryInputs

    def __init__(
        self,
        recovery: Recovery,
        recipe: Recipe,
        store: Store,
        inputs: RecoveryInputs,
        teachers: Callable[[], Sequence[FusedTeacher]],
        workers: Workers,
        onlooker: Onlooker,
    ):
        super().__init__(recipe, store, inputs, teachers, None, workers)
        self.recovery, self.onlooker = recovery, onlooker
        self.terms = terms_of(recovery)
        self._began = self._told = time.monotonic()
        self._step_began = (0, 0.0)
        self._left = {i: sum(block.image_id == i for block in inputs.blocks) for i in recovery.ids}

    def begin(self, part: Part) -> GroupedStep:
        ids, inputs = list(part.segments), self.inputs
        target = self.recovery.target
        low, high = bounds(target.mean, target.std, inputs.dtype)
        drawn = [inputs.given[segment] for segment in ids]
        step = GroupedStep(
            self.recipe,
            list(self.teachers()),
            torch.cat([inputs.initial_images(s) for s in ids]).to(self.device),
            torch.from_numpy(self.plan.labels(ids)),
            [int(o) for o in self.plan.rows(ids)],
            low=low,
            high=high,
            committees=[one.models for one in drawn],
            weights=[dict(zip(one.models, one.weights, strict=True)) for one in drawn],
            priors=inputs.priors(ids),
            terms=self.terms,
        )
        first = [inputs.first_phase(segment) for segment in ids]
        if first[0] is not None:
            step.load_state({**step.state(), "images": torch.cat([one for one in first if one is not None])})
        for segment, one in zip(ids, drawn, strict=True):
            self.onlooker.begun(inputs.blocks[segment], one)
        self._told = time.monotonic()
        self._step_began = (-1, 0.0)
        return step

    def seen(self, part: Part, step: GroupedStep, losses: Tensor) -> None:
        iteration = step.iteration - 1
        blocks = [self.inputs.blocks[segment] for segment in part.segments]
        if self._step_began[0] < 0:  # the first iteration compiles and chooses
            self._step_began = (step.iteration, time.monotonic())
        if self.onlooker.due(iteration):
            now = time.monotonic()
            values, offsets = losses.tolist(), step.offsets
            for position, block in enumerate(blocks):
                drawn = self.inputs.given[part.segments[position]]
                named = dict(zip(step.columns, values[position], strict=True))
                for name in [name for name in named if ":" in name]:
                    teacher = int(name.rpartition(":")[2])
                    share = dict(zip(drawn.models, drawn.weights, strict=True)).get(teacher, 0.0)
                    named[name] = named[name] / share if share else 0.0
                self.onlooker.lines(block, drawn, iteration, named, now - self._told)
                self.onlooker.images(block, step.images[offsets[position] : offsets[position + 1]])
            self._told = time.monotonic()
        if step.finished:
            first, began = self._step_began
            seconds = (time.monotonic() - began) / max(1, step.iteration - first) / len(blocks)
            for block in blocks:
                self.onlooker.ended(block, seconds)
        elif step.iteration in step.phases.begins:
            for block in blocks:
                self.onlooker.phase(step.phases.of(step.iteration), step.size, block)

    def written(self, part: Part) -> None:
        for segment in part.segments:
            image_id = self.inputs.blocks[segment].image_id
            self._left[image_id] -= 1
            if not self._left[image_id]:
                self.onlooker.id_ended(image_id, time.monotonic() - self._began)
