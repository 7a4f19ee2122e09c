"""The distill stage: a plan, then its steps one after the other; teachers and initial images in, distilled images out."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fd2fast.artifacts import (
    Artifact,
    Dataset,
    Images,
    ImagesFacts,
    Patches,
    Stage,
    TeacherArtifact,
    open_stage,
    read_json,
    write_json,
)
from fd2fast.data.outline import Outline, outline_of
from fd2fast.data.pixels import grid, quantize, save_image
from fd2fast.distillation.memory import StepMemory, beyond_memory, free_bytes, measure, too_small
from fd2fast.distillation.planner import Plan, make_plan
from fd2fast.distillation.runner import PlanRunner
from fd2fast.distillation.start import Draws, Inputs
from fd2fast.entries import Entry, folder_name, methods_of, teachers_of
from fd2fast.errors import UserError, refuse
from fd2fast.graph import Job, StageSpec
from fd2fast.methods import BASELINES, check_teachers, columns_of, filled, method_of, patch_factor
from fd2fast.methods import faults as check_settings
from fd2fast.models.convolution import Choices
from fd2fast.models.fused import FusedTeacher, fuse
from fd2fast.models.probe import probe
from fd2fast.models.sight import must_see
from fd2fast.models.teacher import load_teacher
from fd2fast.models.tune import memory_file, tune
from fd2fast.pictures import figure, picture, plotting, png
from fd2fast.settings.config import DistillConfig, RunConfig, replace
from fd2fast.settings.recipe import Recipe, recipe_of
from fd2fast.step import map_dtype
from fd2fast.system.device import device_faults, pick_device, repeatable, settle_precision
from fd2fast.system.lock import released_at_end
from fd2fast.system.processes import Workers, current, local_count
from fd2fast.system.space import Space

logger = logging.getLogger("fd2fast")

# Images of a step from which on more of them gain no speed; smaller steps resume and share out better.
_FAST_ROWS = {"cpu": 64, "cuda": 512}
_GRID_CLASSES, _GRID_IDS = 20, 10


@released_at_end()
def run(
    config: DistillConfig,
    out: Path | str,
    dataset: Dataset,
    teachers: Sequence[TeacherArtifact],
    patches: Patches | None = None,
    *,
    overwrite: bool = False,
    draws: Draws | None = None,
    prior_draws: Draws | None = None,
) -> Images:
    """Distil `config.ipc` images of every class; kind "images".

    teachers: in round-robin order. patches: initial images, where the method starts from them. draws[segment]: int [T, 7]
    crop, flip and roll of every iteration (columns of planner.COLUMNS, for images of the phase's side) in place of
    the counter-based ones; prior_draws[segment]: int [P, 7], one line per prior image, row by row of the segment, ids
    ascending (`prior_view` augmented). Both are recorded by their hash.

    Files: images/new000/class000_id000.png, grid.png, plan.json, losses.json, losses.png. Restarted after a kill it goes on
    from the last finished step and the last save of the unfinished one, and ends in the same bytes.
    Raises UserError for settings, teachers or patches that do not fit, for too little memory and for losses that diverge.
    """
    data = outline_of(dataset)
    refuse(faults(config, data, len(teachers)))
    config = settled(config, data)
    baseline = config.method in BASELINES
    teachers, patches = _fitting(config, dataset, teachers, patches)
    needed: dict[str, Artifact] = {"dataset": dataset, **{f"teacher{i}": t for i, t in enumerate(teachers)}}
    if patches is not None:
        needed["patches"] = patches
    device = pick_device(config.device)
    workers = current()
    stage = workers.first(lambda: open_stage(out, Images, config, needed, overwrite=overwrite and workers.rank == 0))
    given = {"draws": _draws_digest(draws), "prior_draws": _draws_digest(prior_draws)}
    if stage.finished is not None:
        _same_draws(given, stage.finished.facts.given_draws, stage.path)
        return stage.finished
    workers.first(lambda: _begin(stage, given))

    began = time.monotonic()
    if baseline:
        iterations = 0
        if workers.rank == 0:
            _select(config, stage, dataset, teachers[0] if teachers else None, patches, device)
        workers.wait()
    else:
        recipe = recipe_of(config)
        iterations = _optimise(recipe, stage, dataset, teachers, patches, device, draws, prior_draws, workers)

    def finish() -> Images:
        if workers.rank:
            return Images.load(stage.path)
        facts = ImagesFacts(
            method=config.method,
            semantics=config.semantics,
            ipc=config.ipc,
            teachers=[teacher.facts.model for teacher in teachers],
            given_draws=given,
        )
        measured = {
            "iterations_this_run": iterations,
            "seconds_this_run": round(time.monotonic() - began, 3),
            "processes": workers.world,
        }
        return stage.finish_like(dataset, facts, measured)

    return workers.first(finish)


def faults(
    config: DistillConfig, data: Outline | None = None, teachers: int | None = None, models: Sequence[str] = ()
) -> list[str]:
    """What is wrong with the settings by themselves, for this data set, and for so many teachers; one line each.

    models: the teachers' backbones, where they are known by name only; each must see every size of the method.
    """
    found = check_settings(config) + device_faults("distill", config.device)
    if found:
        return found
    if teachers is not None and config.method not in BASELINES:
        found += _said(check_teachers, config, teachers)
    if data is None:
        return found
    try:
        full = settled(config, data)
    except UserError as error:
        return [*found, _of(config, str(error))]
    if config.method in ("random", "herding", "kcenter"):
        return found + data.short(config.ipc, f"{config.method} at IPC {config.ipc}")
    if config.method in BASELINES:
        return found
    recipe = recipe_of(full)
    sides = dict.fromkeys(recipe.sizes)
    told = [fault for model in models for side in sides for fault in _said(probe, model, len(data.classes), side)]
    if told or not models:
        return found + told
    rows = recipe.segment_size
    kept = max(probe(model, len(data.classes), max(sides)).kept for model in models)
    # half of the maps of the narrowest type: what is surely kept, whatever a device shares or makes again
    needed = rows * kept * {"fp64": 8, "fp32": 4, "tf32": 4}.get(recipe.precision, 2) // 2
    return found + beyond_memory(f"distill {config.method}: a segment of {rows} images", needed, config.device)


def settled(config: DistillConfig, data: Outline) -> DistillConfig:
    """The settings as the artifact records them."""
    return filled(settle_precision(config), classes=len(data.classes), size=data.size, dataset=data.name)


def space(config: DistillConfig, data: Outline) -> Space:
    """Bytes on disk: one picture for each image, and for one step the saves of images and Adam's moments, twice for a while."""
    pixels = 3 * data.size**2
    count = len(data.classes) * config.ipc
    saves = 0 if config.method in BASELINES else min(count, max(_FAST_ROWS.values())) * pixels * 4 * 3 * 2
    return Space(0, count * (pixels + 4096) + saves)


def _said(call: Callable[..., Any], *arguments: Any) -> list[str]:
    """The message of the UserError that the call raises, if it does."""
    try:
        call(*arguments)
    except UserError as error:
        return [f"distill: {error}"]
    return []


def _of(config: DistillConfig, text: str) -> str:
    return text if text.startswith("distill") else f"distill {config.method}: {text}"


def _begin(stage: Stage[Images], given: dict[str, Any]) -> None:
    """Record the draws that the artifact is begun with, or refuse others than those."""
    begun = stage.state / "draws.json"
    if begun.is_file():
        _same_draws(given, read_json(begun), stage.path)
    write_json(begun, given)


def _optimise(
    recipe: Recipe,
    stage: Stage[Images],
    dataset: Dataset,
    teachers: Sequence[TeacherArtifact],
    patches: Patches | None,
    device: torch.device,
    draws: Draws | None,
    prior_draws: Draws | None,
    workers: Workers,
) -> int:
    """Plan, run the steps, draw the overviews; the iterations done by this process."""
    dtype = torch.float64 if recipe.precision == "fp64" else torch.float32
    loaded = [load_teacher(t, device, dtype) for t in teachers]
    for teacher in loaded:
        for side in sorted(set(recipe.sizes) - {dataset.size}):
            must_see(teacher.name, teacher.backbone, side, native=dataset.size, whose=f"{recipe.method} uses")

    choices = Choices()

    @functools.cache
    def fused() -> list[FusedTeacher]:
        made = [fuse(teacher, map_dtype(recipe.precision, dtype)) for teacher in loaded]
        for teacher in made:
            if teacher.fallbacks:
                logger.info("teacher %s: with ordinary autograd: %s", teacher.name, ", ".join(teacher.fallbacks))
            teacher.choose_by(choices)
        return made

    with repeatable(allow_tf32=recipe.precision == "tf32"):
        plan, memory = _plan(
            recipe,
            len(dataset.classes),
            device,
            stage.state / "plan.json",
            lambda: measure(recipe, fused(), device),
            workers,
        )
        choices.take(_convolutions(recipe, plan, stage.state / "convolutions.json", fused, workers))
        inputs = Inputs(
            recipe, plan, dataset, patches, loaded, stage.path, device, draws=draws, prior_draws=prior_draws
        )
        engine = PlanRunner(recipe, stage, inputs, fused, memory, workers)
        iterations = engine.run()
        if workers.rank == 0:
            _write_overviews(engine, stage.path, choices.chosen)
    return iterations


def _fitting(
    config: DistillConfig, dataset: Dataset, teachers: Sequence[TeacherArtifact], patches: Patches | None
) -> tuple[list[TeacherArtifact], Patches | None]:
    """The teachers, and the patches where the method takes any, checked against the data set."""
    teachers = [TeacherArtifact.of(teacher) for teacher in teachers]
    for teacher in teachers:
        teacher.must_be_of(dataset)
        if config.teacher_weights == "prior" and not np.isfinite(teacher.facts.backbone_accuracy or np.nan):
            raise UserError(f"teacher {teacher.path} has no accuracy, which teacher_weights 'prior' needs")
    wants_patches = config.method == "rded" or (config.method not in BASELINES and config.init == "patches")
    if not wants_patches:
        return teachers, None
    if patches is None:
        other = "" if config.method == "rded" else ', or init "real" or "noise"'
        raise UserError(f"method {config.method!r} starts from patches and none were given: make them first{other}")
    patches = Patches.of(patches)
    patches.must_be_of(dataset)
    available = patches.facts.per_class
    if config.patch_choice != "random" and available < config.ipc:
        raise UserError(
            f"{patches.path} holds {available} initial images of each class, IPC {config.ipc} needs {config.ipc}: "
            f"make patches with per_class {config.ipc}"
        )
    return teachers, patches


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
    config: DistillConfig,
    stage: Stage[Images],
    dataset: Dataset,
    teacher: TeacherArtifact | None,
    patches: Patches | None,
    device: torch.device,
) -> None:
    """Real images or crops picked by a baseline, written like distilled ones."""
    from fd2fast.students import baselines

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
            save_image(stage.path / Images.image_name(label, image_id, extension), chosen[label, image_id], extension)
    shown = chosen[:_GRID_CLASSES, :_GRID_IDS]
    titles = [str(c) for c in dataset.classes[: len(shown)]]
    picture(stage.path / Images.GRID, lambda: grid(shown.flatten(0, 1), shown.shape[1], titles=titles))


def _plan(
    recipe: Recipe,
    classes: int,
    device: torch.device,
    recorded: Path,
    measured: Callable[[], StepMemory],
    workers: Workers,
) -> tuple[Plan, StepMemory | None]:
    """The plan that this artifact was begun with, or a new one that fits the memory; UserError if no segment does."""

    def settle() -> tuple[Plan, StepMemory | None]:
        known = recorded.with_name("memory.json")
        if recorded.is_file():
            memory = StepMemory(**read_json(known)) if known.is_file() else None
            return Plan.from_json(read_json(recorded)), memory
        memory = measured()
        limit = free_bytes(device) if recipe.memory_limit is None else int(recipe.memory_limit * 1e9)
        if device.type == "cpu":
            limit //= local_count()
        rows = recipe.segment_size
        if memory.of(rows) > limit:
            raise too_small(memory, rows, limit, recipe.precision)
        wanted = functools.partial(
            make_plan,
            classes,
            recipe.ipc,
            group_size=recipe.group_size if recipe.fd2 else 1,
            segment_size=recipe.segment_size,
            layout=method_of(recipe.method).layout,
            segments_per_step=recipe.segments_per_step or "max",
            max_rows_per_step=None if recipe.segments_per_step else max(rows, _FAST_ROWS[device.type]),
        )
        plan = wanted()
        most = max(int(plan.rows(step.segments)[-1]) for step in plan.steps())
        if memory.of(most) > limit:  # only then does the plan, and rounding, depend on the machine
            plan = wanted(memory_limit=limit, bytes_per_row=memory.row, bytes_fixed=memory.fixed)
            logger.info(
                "steps of %d images instead of %d, for %.2f GB of memory", plan.max_rows_per_step, most, limit / 1e9
            )
        write_json(known, dataclasses.asdict(memory))
        write_json(recorded, plan.to_json())
        return plan, memory

    return workers.first(settle)


def _convolutions(
    recipe: Recipe,
    plan: Plan,
    recorded: Path,
    fused: Callable[[], Sequence[FusedTeacher]],
    workers: Workers,
) -> dict[str, str]:
    """The algorithm of each kind of convolution: those that this artifact was begun with, or the fastest here."""

    def settle() -> dict[str, str]:
        if recorded.is_file():
            known = read_json(recorded)
            return {str(kind): str(name) for kind, name in known.items()}
        rows = max(int(plan.rows(step.segments)[-1]) for step in plan.steps())
        chosen = dict(tune(fused(), rows, recipe.sizes, remembered=memory_file()).chosen)
        write_json(recorded, chosen)
        return chosen

    return workers.first(settle)


def _write_overviews(engine: PlanRunner, path: Path, convolutions: Mapping[str, str]) -> None:
    """plan.json with the steps and algorithms as they were run, the losses with their picture, and the picture of the images."""
    plan, columns = engine.plan, columns_of(engine.recipe)
    found: dict[int, dict[str, Any]] = {}
    steps: list[list[int]] = []
    for record in engine.records():
        segments, lines = record["segments"], record["lines"]
        steps.append(segments)
        for position, segment in enumerate(segments):
            found[segment] = {
                "classes": [int(plan.first_class[segment]), int(plan.end_class[segment])],
                **_images_of(plan, segment),
                "slot": int(plan.slot[segment]),
                "iterations": [iteration for iteration, _ in lines],
                **{term: [rows[position][t] for _, rows in lines] for t, term in enumerate(columns)},
            }
    write_json(path / Images.PLAN, {**plan.to_json(), "steps": steps, "convolutions": dict(convolutions)})
    segments_in_order = {str(s): found[s] for s in sorted(found)}
    losses = {"mean_over_iterations_up_to": True, "terms": list(columns), "segments": segments_in_order}
    write_json(path / Images.LOSSES, losses)
    picture(path / Images.LOSSES_PICTURE, lambda: _losses(list(segments_in_order.values()), engine.recipe))
    picture(path / Images.GRID, lambda: _grid(engine.inputs))


def _images_of(plan: Plan, segment: int) -> dict[str, Any]:
    """The segment's image id, or its first and the one after its last."""
    first = int(plan.image_id[segment])
    return {"image_id": first} if plan.layout == "across" else {"image_ids": [first, int(plan.end_image[segment])]}


def _grid(inputs: Inputs) -> bytes:
    """One row per class: the initial image of id 0, then the distilled images."""
    dataset = inputs.dataset
    classes = min(_GRID_CLASSES, len(dataset.classes))
    ids = min(_GRID_IDS, inputs.recipe.ipc)
    initial: dict[int, Tensor] = {}
    shown = (inputs.plan.image_id == 0) & (inputs.plan.first_class < classes)
    for segment in np.flatnonzero(shown).tolist():
        for (label, image_id), image in zip(inputs.cells(segment), inputs.initial_images(segment), strict=True):
            if image_id == 0:
                initial[label] = image
    first = quantize(torch.stack([initial[k] for k in range(classes)]), dataset.mean, dataset.std, "round")
    cells: list[Tensor] = []
    for label in range(classes):
        cells.append(first[label])
        cells += inputs.read([inputs.folder / Images.image_name(label, i, inputs.extension) for i in range(ids)])
    titles = [str(c) for c in dataset.classes[:classes]]
    return grid(torch.stack(cells), ids + 1, titles=titles)


@plotting()
def _losses(segments: Sequence[dict[str, Any]], recipe: Recipe) -> bytes:
    """Each loss term over the iterations: mean of all segments and the range between them."""
    shown = [t for t in columns_of(recipe) if any(any(s[t]) for s in segments)]
    drawn = figure(3.2 * max(1, len(shown)), 2.6, layout="constrained")
    for column, term in enumerate(shown):
        used = [s for s in segments if term != "l_s" or any(s[term])]
        values = np.array([s[term] for s in used])
        axes = drawn.add_subplot(1, len(shown), column + 1)
        axes.fill_between(used[0]["iterations"], values.min(0), values.max(0), alpha=0.25, linewidth=0)
        axes.plot(used[0]["iterations"], values.mean(0))
        axes.set_title(term)
        axes.set_xlabel("iteration")
    drawn.suptitle(f"{recipe.method}: {len(segments)} segments, mean and range")
    return png(drawn, 90)


def _jobs(run: RunConfig, entries: Sequence[Entry]) -> Iterator[Job]:
    for method in methods_of(entries):
        yield _job(replace(run.distill, method=method, ipc=max(run.ipc)), teachers_of(method, run.teachers))


def _job(config: DistillConfig, teachers: Sequence[str]) -> Job:
    return Job(
        f"distill {config.method}",
        f"images/{folder_name(config.method)}",
        config,
        key=config.method,
        keys={"teachers": teachers, "patches": patch_factor(config.method)},
        faults=lambda data, hub: faults(config, data, len(teachers), teachers),
        settled=lambda data: settled(config, data),
        space=lambda data: space(config, data),
    )


SPEC = StageSpec(run, _jobs, faults, shared=True)
