"""Train students from scratch on distilled images, side by side, and test them on the whole real test set."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fd2fast.artifacts import Dataset, Images, Labels, Metrics, MetricsFacts, made, open_stage, read_json, write_json
from fd2fast.data.outline import Outline, outline_of
from fd2fast.data.store import load_split
from fd2fast.data.views import batch_offsets
from fd2fast.distillation.memory import beyond_memory, map_bytes
from fd2fast.entries import Entry, folder_name, short_name
from fd2fast.errors import UserError, refuse
from fd2fast.graph import Job, StageSpec
from fd2fast.models.classifier import check_classifier
from fd2fast.models.probe import probe
from fd2fast.pictures import figure, picture, plotting, png
from fd2fast.settings.config import EvaluateConfig, RunConfig, replace, wrong_settings
from fd2fast.students import student
from fd2fast.system import threads
from fd2fast.system.device import device_faults, pick_device, settle_precision
from fd2fast.system.lock import released_at_end
from fd2fast.system.progress import Progress
from fd2fast.system.space import Space
from fd2fast.system.streams import plain
from fd2fast.system.tasks import Task, side_by_side

# Students that the picture's legend names.
_NAMED = 12


@dataclass(frozen=True)
class Row:
    """What one call of `run` is given: students of one network on one set of images with its labels."""

    config: EvaluateConfig
    out: Path
    dataset: Dataset
    images: Images
    labels: Labels | None = None


def run(
    config: EvaluateConfig,
    out: Path | str,
    dataset: Dataset,
    images: Images,
    labels: Labels | None = None,
    *,
    overwrite: bool = False,
) -> Metrics:
    """Train one student for every seed and test it; returns the "metrics" artifact.

    labels="soft" replays the label store: KL(softmax(t/T) || softmax(s/T)), batch mean, no T^2 and no cross entropy.
    labels="hard" takes the class (cutmix: both classes by area); views come from the label store if one is given, else from
    the settings. Accuracies are of the whole test set: correct / images, in percent.

    On a CPU students run side by side, each in one thread, so that the bytes do not depend on the number of cores.

    Files: metrics.json (every seed's accuracies, losses and per-class accuracy of the last epoch), curves.png,
    students/SEED.safetensors. Facts: method, ipc, student, labels, epochs, seeds, last and best of every seed with
    mean and standard deviation over seeds (n - 1; None for one seed), top5_mean where there are 10 classes or more.
    A killed run goes on from its last save and ends in the same bytes.
    Raises UserError for artifacts that do not fit each other, settings out of range, and a loss that is not finite.
    """
    return run_all([Row(config, Path(out), dataset, images, labels)], overwrite=overwrite)[0]


@released_at_end()
def run_all(rows: Sequence[Row], *, overwrite: bool = False) -> list[Metrics]:
    """`run` for several rows, the students of all of them side by side; a row is finished when its last student is."""
    opened = [_Opened(row, overwrite) for row in rows]
    waiting = [(one, seed) for one in opened for seed in one.missing()]
    total = sum(one.epochs * len(one.config.seeds) for one in opened if not one.stage.finished)
    done = sum(one.epochs * one.finished_students() for one in opened if not one.stage.finished)
    tasks = [one.task(seed) for one, seed in waiting]
    by_cpu = all(pick_device(one.config.device).type == "cpu" for one in opened)
    running: dict[int, str] = {}
    said_busy = False
    for one in opened:
        one.finish_if_complete()
    if not tasks:
        return [one.result for one in opened]
    with Progress("students", total, done=done, unit="epoch") as bar:

        def show(index: int, state: dict[str, Any]) -> None:
            nonlocal said_busy
            if "lost" in state and not said_busy:
                threads.say_busy(state["lost"])
                said_busy = True
            one = waiting[index][0]
            test = state.get("test", math.nan)
            shown = "" if math.isnan(test) else f" {test:.1f}%"
            running[index] = f"{state['epoch']}/{one.epochs}{shown}"
            bar.step(
                state["epochs"], **{f"{waiting[i][0].name} seed {waiting[i][1]}": text for i, text in running.items()}
            )

        for index, _ in side_by_side(tasks, show, processes=None if by_cpu else 1):
            running.pop(index, None)
            waiting[index][0].finish_if_complete()
    return [one.result for one in opened]


class _Opened:
    """One row with its artifact begun: which students are missing, and the artifact once none is."""

    def __init__(self, row: Row, overwrite: bool):
        refuse(faults(row.config, None if made(row.out) and not overwrite else outline_of(row.dataset)))
        self.config = settled(row.config)
        self.dataset, self.images, self.labels = row.dataset, Images.of(row.images), row.labels
        row.dataset.must_fit(row.images)
        lessons, parents = student.prepare(self.config, row.dataset, row.images, row.labels)
        self.epochs, self.ipc = lessons.epochs, len(lessons.targets) // len(row.images.classes)
        if len(load_split(row.dataset, "test")) == 0:
            raise UserError(f"{row.dataset.path} holds no test images")
        self.stage = open_stage(row.out, Metrics, self.config, parents, overwrite=overwrite)
        self.name = f"{self.images.facts.method} ipc {self.ipc} {self.config.labels}"

    @property
    def result(self) -> Metrics:
        assert self.stage.finished is not None
        return self.stage.finished

    def missing(self) -> list[int]:
        """Seeds of the students that are not finished."""
        if self.stage.finished:
            return []
        return [seed for seed in self.config.seeds if not student.result_file(self.stage.path, seed).is_file()]

    def finished_students(self) -> int:
        return len(self.config.seeds) - len(self.missing())

    def task(self, seed: int) -> Task:
        given = student.arguments(self.config, self.stage.path, self.dataset, self.images, self.labels, seed)
        return Task(
            f"student {self.config.model}, seed {seed}, of {self.name}", "fd2fast.students.student:train", given
        )

    def finish_if_complete(self) -> None:
        """Write the artifact when its last student is there."""
        if self.stage.finished or self.missing():
            return
        path, config = self.stage.path, self.config
        found = {seed: read_json(student.result_file(path, seed)) for seed in config.seeds}
        results = {str(seed): record["result"] for seed, record in found.items()}
        write_json(path / Metrics.RESULTS, results)
        picture(path / Metrics.CURVES_PICTURE, lambda: _curves(results, config, len(self.dataset.classes)))
        students = list(results.values())
        last, best = ([one[which] for one in students] for which in ("last", "best"))
        top5 = [one["top5"] for one in students if one["top5"] is not None]
        facts = MetricsFacts(
            method=self.images.facts.method,
            ipc=self.ipc,
            student=config.model,
            labels=config.labels,
            epochs=self.epochs,
            seeds=list(config.seeds),
            last=last,
            last_mean=round(statistics.mean(last), 4),
            last_std=_deviation(last),
            best=best,
            best_mean=round(statistics.mean(best), 4),
            best_std=_deviation(best),
            top5_mean=round(statistics.mean(top5), 4) if top5 else None,
        )
        soft = self.labels if config.labels == "soft" else None
        seconds = {str(seed): record["seconds"] for seed, record in found.items()}
        measured = {
            "device": str(pick_device(config.device)),
            # of its students one after the other: they run beside those of other rows
            "seconds": round(sum(seconds.values()), 3),
            # apart from the results: times are not part of the identity
            "seconds_of_each_student": seconds,
            "seconds_of_the_labels": soft.seconds if soft else None,
        }
        self.stage.finished = self.stage.finish_like(self.dataset, facts, measured)


def _deviation(values: Sequence[float]) -> float | None:
    return round(statistics.stdev(values), 4) if len(values) > 1 else None


def faults(
    config: EvaluateConfig,
    data: Outline | None = None,
    ipc: int | None = None,
    *,
    stored: int | None = None,
    batch_size: int | None = None,
) -> list[str]:
    """What is wrong with the settings, and with the student for this data set at so many images per class; one line each.

    stored: epochs of the label store, and batch_size its setting, where there is one.
    """
    found = wrong_settings(config, "evaluate") + device_faults("evaluate", config.device)
    if found:
        return found
    if stored is not None and config.epochs is not None and config.epochs > stored:
        found.append(f"evaluate.epochs must be at most the {stored} epochs of the labels, got {config.epochs}")
    if data is None:
        return found
    try:
        seen = probe(config.model, len(data.classes), data.size, student=True)
    except UserError as error:
        return [*found, f"student {config.model}: {error}"]
    count = config.ipc or ipc
    if count is None:
        return found
    try:
        offsets = batch_offsets(len(data.classes) * count, batch_size if stored else config.batch_size)
        check_classifier(
            config.model, len(data.classes), data.size, min(student.part_sizes(offsets, config.accumulation))
        )
    except UserError as error:
        return [*found, f"evaluate: {error}"]
    most = max(student.part_sizes(offsets, config.accumulation))
    needed = most * seen.kept * map_bytes(config.precision)
    return found + beyond_memory(f"student {config.model} on {most} images at once", needed, config.device)


def settled(config: EvaluateConfig) -> EvaluateConfig:
    """The settings as the artifact records them."""
    return settle_precision(config)


def space(config: EvaluateConfig, data: Outline) -> Space:
    """Bytes on disk: every seed's student, and for those at work a save with AdamW's moments, twice for a while."""
    size = probe(config.model, len(data.classes), data.size, student=True).size
    return Space(size * len(config.seeds), size * (len(config.seeds) + 2 * 3))


@plotting()
def _curves(results: dict[str, Any], config: EvaluateConfig, classes: int) -> bytes:
    drawn = figure(9, 3.5, layout="constrained")
    left, right = drawn.subplots(1, 2)
    for number, (seed, result) in enumerate(results.items()):
        left.plot(range(1, len(result["losses"]) + 1), result["losses"], label=f"seed {seed}", linewidth=1)
        right.plot(
            [t["epoch"] for t in result["tests"]],
            [t["top1"] for t in result["tests"]],
            marker=".",
            label=f"seed {seed}" if number < _NAMED else None,
        )
    left.set(xlabel="epoch", ylabel="KL divergence" if config.labels == "soft" else "cross entropy", title="training")
    left.set_yscale("log")
    right.axhline(100 / classes, color="grey", linestyle=":", label="chance")
    right.set(xlabel="epoch", ylabel="test accuracy (%)", ylim=(0, None))
    right.set_title(f"student {plain(config.model, 60)}", parse_math=False)
    right.legend(fontsize=8)
    return png(drawn, 110)


def _jobs(run: RunConfig, entries: Sequence[Entry]) -> Iterator[Job]:
    for entry in entries:
        for ipc in run.ipc:
            for model in run.students:
                yield _job(replace(run.evaluate, model=model, labels=entry.labels, ipc=ipc), entry, ipc, run)


def _job(config: EvaluateConfig, entry: Entry, ipc: int, run: RunConfig) -> Job:
    soft = entry.labels == "soft"
    if not soft and config.epochs is None:
        config = replace(config, epochs=run.relabel.epochs)
    stored = run.relabel.epochs if soft else None
    return Job(
        f"students {short_name(config.model)} of {entry.name}, {ipc} per class",
        f"metrics/{folder_name(entry.name)}-ipc{ipc}-{folder_name(config.model)}",
        config,
        key=(entry.name, ipc, config.model),
        keys={"images": entry.method, "labels": (entry.method, ipc) if soft else None},
        faults=lambda data, hub: faults(config, data, ipc, stored=stored, batch_size=run.relabel.batch_size),
        settled=lambda data: settled(config),
        space=lambda data: space(config, data),
    )


SPEC = StageSpec(
    run,
    _jobs,
    faults,
    run_all=lambda calls, overwrite: run_all([Row(*call) for call in calls], overwrite=overwrite),
)
