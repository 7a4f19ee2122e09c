"""The distill stage: a plan, then its steps one after the other; teachers and initial images in, distilled images out."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from fd2fast import ops
from fd2fast.artifacts import Artifact, Stage, atomic_path, open_stage, write_json
from fd2fast.config import DistillConfig
from fd2fast.data.pixels import bounds, grid, normalise, quantize, read_image, save_image
from fd2fast.data.store import ImageSet, load_split
from fd2fast.device import pick_device, settle_precision
from fd2fast.errors import UserError
from fd2fast.methods import BASELINES, check_teachers, resolve
from fd2fast.models.fused import FusedTeacher, fuse
from fd2fast.models.teacher import Teacher, load_teacher
from fd2fast.planner import COLUMNS, Plan, iteration_table, make_plan
from fd2fast.progress import Progress
from fd2fast.seeding import derive, generator, numpy_generator
from fd2fast.step import TERMS, GroupedStep, Priors, check_losses, map_dtype

logger = logging.getLogger("fd2fast")

Draws = Mapping[int, ArrayLike]

_CHUNK = 64  # iterations whose draws are made at once
_PRIOR_BATCH = 64  # finished images in one forward pass
_GRID_CLASSES, _GRID_IDS = 20, 10


def image_name(label: int, image_id: int, extension: str) -> str:
    """Where a distilled image lies in its artifact."""
    return f"images/new{label:03d}/class{label:03d}_id{image_id:03d}.{extension}"


def run(
    config: DistillConfig,
    out: Path | str,
    dataset: Artifact,
    teachers: Sequence[Artifact],
    patches: Artifact | None = None,
    *,
    overwrite: bool = False,
    draws: Draws | None = None,
    prior_draws: Draws | None = None,
) -> Artifact:
    """Distil `config.ipc` images of every class; kind "images".

    teachers: in round-robin order. patches: initial images, where the method starts from them. draws[segment]: int [T, 7]
    crop, flip and roll of every iteration (columns of fd2fast.planner.COLUMNS, for images of the phase's side) in place of
    the counter-based ones; prior_draws[segment]: int [P, 7], one line per prior image, row by row of the segment, ids
    ascending (`prior_view` augmented). Both are recorded by their hash.

    Files: images/new000/class000_id000.png, grid.png, plan.json, losses.json, losses.png. Restarted after a kill it goes on
    from the last finished step and the last save of the unfinished one, and ends in the same bytes.
    Raises UserError for settings, teachers or patches that do not fit, for too little memory and for losses that diverge.
    """
    if dataset.kind != "dataset":
        raise UserError(f"{dataset.path} holds a {dataset.kind} artifact; wanted a dataset")
    name = str(dataset.facts.get("name", ""))
    config = settle_precision(config)
    config = resolve(config, classes=len(dataset.classes), size=dataset.size, dataset=name)
    baseline = config.method in BASELINES
    needed = {"dataset": dataset, **_fitting_parents(config, dataset, teachers, patches)}
    device = pick_device(config.device)
    stage = open_stage(out, "images", config, needed, overwrite=overwrite)
    given = {"draws": _draws_digest(draws), "prior_draws": _draws_digest(prior_draws)}
    if stage.finished is not None:
        _same_draws(given, stage.finished.facts["given_draws"], stage.path)
        return stage.finished
    begun = stage.state / "draws.json"
    if begun.is_file():
        _same_draws(given, json.loads(begun.read_text()), stage.path)
    write_json(begun, given)

    began = time.monotonic()
    if baseline:
        iterations = 0
        _select(config, stage, dataset, needed, device)
    else:
        work = _Work(config, stage, dataset, list(teachers), needed.get("patches"), device, draws, prior_draws)
        # equal bytes after a restart need equal algorithms; TF32 convolutions as in the reference
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True):
            iterations = work.run()
    return stage.finish(
        classes=dataset.classes,
        size=dataset.size,
        mean=dataset.mean,
        std=dataset.std,
        facts={
            "method": config.method,
            "semantics": config.semantics,
            "ipc": config.ipc,
            "teachers": [str(t.facts.get("model", t.path.name)) for k, t in needed.items() if k.startswith("teacher")],
            "given_draws": given,
        },
        measured={"iterations_this_run": iterations, "seconds_this_run": round(time.monotonic() - began, 3)},
    )


def _fitting_parents(
    config: DistillConfig, dataset: Artifact, teachers: Sequence[Artifact], patches: Artifact | None
) -> dict[str, Artifact]:
    """The artifacts the result depends on, checked against the data set."""
    if config.method not in BASELINES:
        check_teachers(config, len(teachers))
    parents: dict[str, Artifact] = {}
    for index, teacher in enumerate(teachers):
        if teacher.kind != "teacher":
            raise UserError(f"{teacher.path} holds a {teacher.kind} artifact; wanted a teacher")
        teacher.must_fit(dataset)
        _same_data(teacher, dataset)
        if config.teacher_weights == "prior" and not np.isfinite(teacher.facts.get("backbone_accuracy") or np.nan):
            raise UserError(f"teacher {teacher.path} has no accuracy, which teacher_weights 'prior' needs")
        parents[f"teacher{index}"] = teacher
    wants_patches = config.method == "rded" or (config.method not in BASELINES and config.init == "patches")
    if not wants_patches:
        return parents
    if patches is None:
        other = "" if config.method == "rded" else ', or init "real" or "noise"'
        raise UserError(f"method {config.method!r} starts from patches and none were given: make them first{other}")
    if patches.kind != "patches":
        raise UserError(f"{patches.path} holds a {patches.kind} artifact; wanted patches")
    patches.must_fit(dataset)
    _same_data(patches, dataset)
    held = int(patches.facts["per_class"])
    if config.patch_choice != "random" and held < config.ipc:
        raise UserError(
            f"{patches.path} holds {held} initial images of each class, IPC {config.ipc} needs {config.ipc}: "
            f"make patches with per_class {config.ipc}"
        )
    return {**parents, "patches": patches}


def _same_data(artifact: Artifact, dataset: Artifact) -> None:
    """Same class names are not enough: an artifact that knows its data set must name this one."""
    parent = artifact.manifest["parents"].get("dataset")
    if parent is not None and parent["id"] != dataset.id:
        raise UserError(
            f"{artifact.kind} artifact {artifact.path} was made from another data set ({parent['id'][:12]}) than "
            f"{dataset.path} ({dataset.id[:12]})"
        )


def _draws_digest(draws: Draws | None) -> str | None:
    if draws is None:
        return None
    sha = hashlib.sha256()
    for segment in sorted(draws):
        table = np.ascontiguousarray(draws[segment], dtype="<i8")
        sha.update(f"{segment}:{table.shape};".encode() + table.tobytes())
    return sha.hexdigest()


def _same_draws(given: dict[str, Any], found: dict[str, Any], path: Path) -> None:
    for name, value in given.items():
        if found.get(name) != value:
            raise UserError(f"{path} was begun with other {name}; choose another output folder, or overwrite it")


def _select(
    config: DistillConfig, stage: Stage, dataset: Artifact, parents: Mapping[str, Artifact], device: torch.device
) -> None:
    """Real images or crops picked by a baseline, written like distilled ones."""
    from fd2fast import baselines

    patches, teacher = parents.get("patches"), parents.get("teacher0")
    picked = baselines.select(config.method, config.ipc, dataset, teacher, patches, config.seed, device)
    chosen = torch.from_numpy(picked)
    wanted = (len(dataset.classes), config.ipc, 3, dataset.size, dataset.size)
    if tuple(chosen.shape) != wanted or chosen.dtype != torch.uint8:
        raise ValueError(
            f"baseline {config.method} gave {chosen.dtype} {list(chosen.shape)}, wanted uint8 {list(wanted)}"
        )
    extension = config.save_format or "png"
    for label in range(wanted[0]):
        for image_id in range(config.ipc):
            save_image(stage.path / image_name(label, image_id, extension), chosen[label, image_id], extension)
    shown = chosen[:_GRID_CLASSES, :_GRID_IDS]
    titles = [str(c) for c in dataset.classes[: len(shown)]]
    grid(shown.flatten(0, 1), shown.shape[1], titles=titles, path=stage.path / "grid.png")


@dataclass
class _Log:
    """Losses of one step: means over the iterations since the line before, kept on the device until a line is due."""

    segments: list[int]
    every: int
    lines: list[tuple[int, list[list[float]]]]
    total: Tensor
    count: int = 0

    def add(self, losses: Tensor, iteration: int, last: bool) -> list[float] | None:
        """Take one iteration's [segments, TERMS]; every so often read them and give their mean over the segments."""
        self.total += losses
        self.count += 1
        if iteration % self.every and not last:
            return None
        values = (self.total / self.count).tolist()
        for segment, row in zip(self.segments, values, strict=True):
            check_losses(row, segment, iteration)
        self.lines.append((iteration, [[float(f"{value:.6g}") for value in row] for row in values]))
        self.total.zero_()
        self.count = 0
        return [sum(column) / len(column) for column in zip(*values, strict=True)]

    def state(self) -> dict[str, Any]:
        return {"lines": self.lines, "total": self.total.cpu(), "count": self.count}

    def load_state(self, state: dict[str, Any]) -> None:
        self.lines = [(int(iteration), rows) for iteration, rows in state["lines"]]
        self.total.copy_(state["total"])
        self.count = int(state["count"])


class _Work:
    """One run of an optimising method."""

    def __init__(
        self,
        config: DistillConfig,
        stage: Stage,
        dataset: Artifact,
        teachers: Sequence[Artifact],
        patches: Artifact | None,
        device: torch.device,
        draws: Draws | None,
        prior_draws: Draws | None,
    ):
        assert config.iterations is not None
        assert config.sizes is not None
        self.config, self.stage, self.dataset, self.patches = config, stage, dataset, patches
        self.iterations, self.sizes = config.iterations, config.sizes
        self.total = sum(config.iterations)
        self.device = device
        self.dtype = torch.float64 if config.precision == "fp64" else torch.float32
        self.plan: Plan = make_plan(
            len(dataset.classes),
            config.ipc,
            group_size=config.group_size if config.fd2 else 1,
            segment_size=config.segment_size,
            segments_per_step=config.segments_per_step,
        )
        self.draws, self.prior_draws = draws, prior_draws
        self._check_draws()
        self.teachers: list[Teacher] = [load_teacher(t, self.device, self.dtype) for t in teachers]
        self.train: ImageSet | None = load_split(dataset, "train") if config.init == "real" else None
        if self.train is not None:
            self.train.require(1, "init 'real'")
        self.extension = config.save_format or "png"
        self.every = max(1, min(50, self.total // 20))

    @cached_property
    def fused(self) -> list[FusedTeacher]:
        """The teachers as the steps use them, made when the first step runs."""
        fused = [fuse(teacher, map_dtype(self.config.precision, self.dtype)) for teacher in self.teachers]
        for teacher in fused:
            if teacher.fallbacks:
                logger.info("teacher %s: with ordinary autograd: %s", teacher.name, ", ".join(teacher.fallbacks))
        return fused

    def _check_draws(self) -> None:
        wanted = (self.total, len(COLUMNS))
        for segment in range(self.plan.n_segments) if self.draws is not None else ():
            shape = np.shape(self.draws[segment]) if segment in self.draws else None  # type: ignore[index,operator]
            if shape != wanted:
                raise UserError(f"draws[{segment}] must be int {list(wanted)}, got {shape}")

    def run(self) -> int:
        """Every step that is not finished yet, then the overviews; the iterations done by this process."""
        unfinished = [step for step in self.plan.steps() if not self._is_finished(step.index, step.segments)]
        todo = len(unfinished) * self.total
        state = self.stage.restore("step.pt")
        done = 0
        if state is not None and unfinished and state["step"] == unfinished[0].index:
            done = int(state["optimiser"]["iteration"])
        else:
            state = None
        whole = self.plan.n_steps * self.total
        with Progress(self.config.method, whole, done=whole - todo + done) as bar:
            for step in unfinished:
                self._run_step(step.index, step.segments, state, bar)
                state = None
        self._write_overviews()
        return todo - done

    def _marker(self, index: int) -> Path:
        return self.stage.state / "steps" / f"{index:06d}.json"

    def _is_finished(self, index: int, segments: NDArray[np.int64]) -> bool:
        return self._marker(index).is_file() and all(path.is_file() for _, _, path in self._rows(segments))

    def _rows(self, segments: ArrayLike) -> Iterator[tuple[int, int, Path]]:
        """(class, image id, file) of each row of these segments."""
        for segment in np.asarray(segments):
            image_id = int(self.plan.image_id[segment])
            for label in range(int(self.plan.first_class[segment]), int(self.plan.end_class[segment])):
                yield label, image_id, self.stage.path / image_name(label, image_id, self.extension)

    def _run_step(self, index: int, segments: NDArray[np.int64], state: dict[str, Any] | None, bar: Progress) -> None:
        ids = [int(s) for s in segments]
        offsets = [int(o) for o in self.plan.rows(segments)]
        initial = torch.cat([self.initial_images(s) for s in ids]).to(self.device)
        low, high = bounds(self.dataset.mean, self.dataset.std, self.dtype)
        with _memory_errors(self.config, offsets[-1]):
            step = GroupedStep(
                self.config,
                self.fused,
                initial,
                torch.from_numpy(self.plan.labels(segments)),
                offsets,
                low=low,
                high=high,
                committees=[self.committee(int(self.plan.image_id[s])) for s in ids],
                priors=self._priors(segments),
            )
            with step:
                log = _Log(ids, self.every, [], torch.zeros(len(ids), len(TERMS), dtype=self.dtype, device=self.device))
                if state is not None:
                    step.load_state(state["optimiser"])
                    log.load_state(state["log"])
                self._iterate(index, step, log, bar)
        self._save_images(segments, step.images)
        write_json(self._marker(index), {"lines": log.lines})

    def _iterate(self, index: int, step: GroupedStep, log: _Log, bar: Progress) -> None:
        table: Tensor | None = None
        first, shown = step.iteration, step.iteration
        while not step.finished:
            now = step.iteration
            if table is None or now - first >= len(table):
                first, table = now, self._table(log.segments, now, min(_CHUNK, step.phase_end - now), step.size)
            losses = step.iterate(table[now - first])
            means = log.add(losses, now, step.finished)
            if means is not None:
                named = {n: v for n, v in zip(TERMS, means, strict=True) if v or n == "total"}
                bar.step(step.iteration - shown, **named)
                shown = step.iteration
            if step.iteration % self.config.save_every == 0 and not step.finished:
                self.stage.checkpoint("step.pt", {"step": index, "optimiser": step.state(), "log": log.state()})

    def _table(self, segments: list[int], first: int, count: int, size: int) -> Tensor:
        """Draws int [count, segments, 7] from iteration `first` on, on the host."""
        if self.draws is not None:
            given = [np.asarray(self.draws[s], dtype=np.int64)[first : first + count] for s in segments]
            return torch.from_numpy(np.stack(given, axis=1))
        assert self.config.jitter is not None
        table = iteration_table(
            self.config.seed,
            segments,
            first,
            count,
            size,
            jitter=min(self.config.jitter, size - 1),
            augment=bool(self.config.augment),
            scale=(self.config.min_crop, 1.0),
        )
        return torch.from_numpy(table)

    def committee(self, image_id: int) -> list[int]:
        """The teachers of an image id, a function of (seed, image id) only, in the order given."""
        count = self.config.teachers_per_image
        if count is None or count == len(self.teachers):
            return list(range(len(self.teachers)))
        drawn = numpy_generator(self.config.seed, "committee", image_id).permutation(len(self.teachers))[:count]
        return sorted(int(t) for t in drawn)

    def initial_images(self, segment: int) -> Tensor:
        """Normalised initial images [n, 3, S, S] of a segment on the host, a function of (seed, class, image id)."""
        image_id = int(self.plan.image_id[segment])
        labels = range(int(self.plan.first_class[segment]), int(self.plan.end_class[segment]))
        size, seed = self.dataset.size, self.config.seed
        if self.config.init == "noise":
            shape = (len(labels), 3, size, size)
            return torch.randn(shape, generator=generator(seed, "noise", segment)).to(self.dtype)
        if self.config.init == "real":
            assert self.train is not None
            picked = []
            for label in labels:
                indices = self.train.of_class(label)
                order = numpy_generator(seed, "real", label).permutation(len(indices))
                picked.append(int(indices[order[image_id % len(order)]]))
            pixels = self.train.pixels(picked)
        else:
            assert self.patches is not None
            chosen = np.full(len(self.dataset.classes), image_id)
            if self.config.patch_choice == "random":
                held = int(self.patches.facts["per_class"])
                chosen = numpy_generator(seed, "patch", image_id).integers(held, size=len(chosen))
            names = [f"images/{k:05d}/class{k:05d}_id{int(chosen[k]):05d}.png" for k in labels]
            pixels = torch.stack([self._read(self.patches.file(name)) for name in names])
        return normalise(pixels, self.dataset.mean, self.dataset.std, self.dtype)

    def _read(self, path: Path) -> Tensor:
        pixels = read_image(path)
        wanted = (3, self.dataset.size, self.dataset.size)
        if tuple(pixels.shape) != wanted:
            raise UserError(f"{path} must be {list(wanted)}, got {list(pixels.shape)}")
        return pixels

    def _priors(self, segments: NDArray[np.int64]) -> list[Priors | None]:
        """Per teacher: attention of the finished images of each row's class and group, read back from their files."""
        none: list[Priors | None] = [None] * len(self.teachers)
        earlier, bounds_ = self.plan.priors(segments)
        if not self.config.fd2 or not len(earlier):
            return none
        files: list[Path] = []
        lengths: list[int] = []
        draws: list[NDArray[np.int64]] = []
        for position, segment in enumerate(segments):
            ids = [int(self.plan.image_id[p]) for p in earlier[bounds_[position] : bounds_[position + 1]]]
            labels = range(int(self.plan.first_class[segment]), int(self.plan.end_class[segment]))
            files += [self.stage.path / image_name(k, i, self.extension) for k in labels for i in ids]
            lengths += [len(ids)] * len(labels)
            draws.append(self._view_draws(int(segment), labels, ids))
        pixels = torch.stack([self._read(path) for path in files])
        images = normalise(pixels, self.dataset.mean, self.dataset.std, self.dtype).to(self.device)
        if self.config.prior_view == "augmented":
            one_each = list(range(len(files) + 1))
            images = ops.crop_flip_roll(images, torch.from_numpy(np.concatenate(draws)), one_each, self.dataset.size)
        offsets = (0, *(int(v) for v in np.cumsum(lengths)))
        with torch.no_grad():
            return [
                Priors(torch.cat([teacher(part).attention for part in images.split(_PRIOR_BATCH)]), offsets)
                for teacher in self.teachers
            ]

    def _view_draws(self, segment: int, labels: range, ids: Sequence[int]) -> NDArray[np.int64]:
        """One crop and flip (no roll) for each prior image of a segment, int [classes * ids, 7] (released)."""
        if self.config.prior_view != "augmented" or not ids:
            return np.zeros((0, len(COLUMNS)), np.int64)
        if self.prior_draws is not None:
            wanted = (len(labels) * len(ids), len(COLUMNS))
            given = np.asarray(self.prior_draws.get(segment, ()), dtype=np.int64)
            if given.shape != wanted:
                raise UserError(f"prior_draws[{segment}] must be int {list(wanted)}, got {list(given.shape)}")
            return given
        table = iteration_table(
            derive(self.config.seed, "prior", segment),
            [i * len(self.dataset.classes) + k for k in labels for i in ids],  # free of IPC
            0,
            1,
            self.dataset.size,
            jitter=0,
            augment=bool(self.config.augment),
            scale=(self.config.min_crop, 1.0),
        )
        return table[0].astype(np.int64)

    def _save_images(self, segments: NDArray[np.int64], images: Tensor) -> None:
        assert self.config.quantize is not None
        pixels = quantize(images.detach(), self.dataset.mean, self.dataset.std, self.config.quantize).cpu()
        for (_, _, path), image in zip(self._rows(segments), pixels, strict=True):
            save_image(path, image, self.config.save_format)

    def _write_overviews(self) -> None:
        plan = self.plan
        steps = [[int(s) for s in step.segments] for step in plan.steps()]
        write_json(self.stage.path / "plan.json", {**plan.to_json(), "steps": steps})
        found: dict[int, dict[str, Any]] = {}
        for index, segments in enumerate(steps):
            lines = json.loads(self._marker(index).read_text())["lines"]
            for position, segment in enumerate(segments):
                found[segment] = {
                    "classes": [int(plan.first_class[segment]), int(plan.end_class[segment])],
                    "image_id": int(plan.image_id[segment]),
                    "slot": int(plan.slot[segment]),
                    "iterations": [iteration for iteration, _ in lines],
                    **{term: [rows[position][t] for _, rows in lines] for t, term in enumerate(TERMS)},
                }
        segments_in_order = {str(s): found[s] for s in sorted(found)}
        losses = {"mean_over_iterations_up_to": True, "terms": list(TERMS), "segments": segments_in_order}
        write_json(self.stage.path / "losses.json", losses)
        _plot_losses(self.stage.path / "losses.png", list(segments_in_order.values()), self.config)
        self._write_grid()

    def _write_grid(self) -> None:
        """One row per class: the initial image of id 0, then the distilled images."""
        classes = min(_GRID_CLASSES, len(self.dataset.classes))
        ids = min(_GRID_IDS, self.config.ipc)
        blocks = -(-classes // self.plan.segment_size)
        initial = torch.cat([self.initial_images(block) for block in range(blocks)])[:classes]
        first = quantize(initial, self.dataset.mean, self.dataset.std, "round")
        cells: list[Tensor] = []
        for label in range(classes):
            cells.append(first[label])
            cells += [self._read(self.stage.path / image_name(label, i, self.extension)) for i in range(ids)]
        titles = [str(c) for c in self.dataset.classes[:classes]]
        grid(torch.stack(cells), ids + 1, titles=titles, path=self.stage.path / "grid.png")


def _plot_losses(path: Path, segments: Sequence[dict[str, Any]], config: DistillConfig) -> None:
    """Each loss term over the iterations: mean of all segments and the range between them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [t for t in TERMS if any(any(s[t]) for s in segments)]
    figure = Figure(figsize=(3.2 * len(shown), 2.6), layout="constrained")
    FigureCanvasAgg(figure)
    for column, term in enumerate(shown):
        used = [s for s in segments if term != "l_s" or any(s[term])]
        values = np.array([s[term] for s in used])
        axes = figure.add_subplot(1, len(shown), column + 1)
        axes.fill_between(used[0]["iterations"], values.min(0), values.max(0), alpha=0.25, linewidth=0)
        axes.plot(used[0]["iterations"], values.mean(0))
        axes.set_title(term)
        axes.set_xlabel("iteration")
    figure.suptitle(f"{config.method}: {len(segments)} segments, mean and range")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=90, metadata={"Software": None})


@contextlib.contextmanager
def _memory_errors(config: DistillConfig, rows: int) -> Iterator[None]:
    """Out of memory, on a GPU or the host, as a UserError that says what to change."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            if "can't allocate memory" not in text and "not enough memory" not in text:
                raise
        raise UserError(
            f"a step of {rows} images does not fit the memory ({text.splitlines()[0] if text else 'out of memory'}): "
            f"lower segments_per_step (now {config.segments_per_step}), use precision bf16, or a smaller segment_size "
            f"(now {config.segment_size}; it is part of the method); what is finished is kept"
        ) from error
