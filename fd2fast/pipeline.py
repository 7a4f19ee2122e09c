"""The one way through the house: every stage of a run in order, each kept and skipped when it is finished."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fd2fast import artifacts
from fd2fast.artifacts import Artifact
from fd2fast.config import RunConfig, replace
from fd2fast.data.prepare import describe, prepare
from fd2fast.errors import UserError
from fd2fast.methods import check_name, patch_factor, takes_committee
from fd2fast.stages import distill, evaluate, patches, pretrain, relabel, report
from fd2fast.streams import say
from fd2fast.workers import current, is_first

HARD = ("random", "herding", "kcenter")


@dataclass(frozen=True)
class Entry:
    """One row of the table: a method and how its images are labelled."""

    method: str
    labels: str

    @property
    def name(self) -> str:
        default = "hard" if self.method in HARD else "soft"
        return self.method if self.labels == default else f"{self.method}:{self.labels}"


def parse_entry(text: str) -> Entry:
    """`sre2l++_fd2`, `random`, `random:soft`; UserError for unknown names."""
    method, _, labels = text.partition(":")
    check_name(method)
    labels = labels or ("hard" if method in HARD else "soft")
    if labels not in ("hard", "soft"):
        raise UserError(f"{text!r}: labels are hard or soft, not {labels!r}")
    return Entry(method, labels)


def folder_name(name: str) -> str:
    """A model or method name as a folder name."""
    return "".join(c if c.isalnum() or c in "+-_." else "-" for c in name)


def check(config: RunConfig) -> list[Entry]:
    """Everything that can be refused before work begins; the rows of the table."""
    entries = [parse_entry(text) for text in config.methods]
    if not entries:
        raise UserError("no methods given; see fd2fast run --help")
    if not config.teachers:
        raise UserError("no teachers given; wanted at least one backbone name")
    if not config.ipc or min(config.ipc) < 1:
        raise UserError(f"images per class must be 1 or more, got {list(config.ipc)}")
    if not config.evaluate.seeds:
        raise UserError("no student seeds given; wanted at least one (evaluate.seeds)")
    return entries


def run(config: RunConfig, *, overwrite: bool = False) -> Path:
    """Run or resume everything below config.out; prints the table and returns the report's folder.

    In a torchrun job the processes share the distilling; all else is done by the first, and the others wait for it.
    """
    entries = check(config)
    out = Path(config.out)
    largest = max(config.ipc)
    workers = current()

    def by_one(stage: Callable[..., Artifact], *arguments: Any) -> Artifact:
        return workers.first(lambda: stage(*arguments, overwrite=overwrite and is_first()))

    _say("data set")
    dataset = by_one(prepare, config.data, out / "dataset")
    _print(describe(dataset))

    teachers: dict[str, Artifact] = {}
    for name in config.teachers:
        _say(f"teacher {name}")
        settings = replace(config.pretrain, model=name)
        teachers[name] = by_one(pretrain.run, settings, out / "teachers" / folder_name(name), dataset)
    first = teachers[config.teachers[0]]

    cut: dict[int, Artifact] = {}

    def patches_for(factor: int) -> Artifact:
        if factor not in cut:
            _say(f"patches {factor} x {factor}")
            settings = replace(config.patches, factor=factor, per_class=max(config.patches.per_class, largest))
            cut[factor] = by_one(patches.run, settings, out / "patches" / str(factor), dataset, first)
        return cut[factor]

    images: dict[str, Artifact] = {}
    rows: list[evaluate.Row] = []
    for entry in entries:
        method = entry.method
        if method not in images:
            _say(f"distill {method}")
            settings = replace(config.distill, method=method, ipc=largest)
            factor = patch_factor(method)
            images[method] = distill.run(
                settings,
                out / "images" / folder_name(method),
                dataset,
                _teachers_of(method, list(teachers.values())),
                patches_for(factor) if factor else None,
                overwrite=overwrite,
            )
        for ipc in config.ipc:
            labels = None
            if entry.labels == "soft":
                _say(f"labels {entry.name}, {ipc} per class")
                labels = by_one(
                    relabel.run,
                    replace(config.relabel, ipc=ipc),
                    out / "labels" / f"{folder_name(method)}-ipc{ipc}",
                    images[method],
                    _teachers_of(method, list(teachers.values())),
                )
            for student in config.students:
                settings_e = replace(config.evaluate, model=student, labels=entry.labels, ipc=ipc)
                if entry.labels == "hard" and settings_e.epochs is None:
                    settings_e = replace(settings_e, epochs=config.relabel.epochs)
                where = out / "metrics" / f"{folder_name(entry.name)}-ipc{ipc}-{folder_name(student)}"
                rows.append(evaluate.Row(settings_e, where, dataset, images[method], labels))

    _say(f"students: {len(rows) * len(config.evaluate.seeds)}, {len(config.evaluate.seeds)} for each row of the table")
    metrics = workers.first(lambda: evaluate.run_all(rows, overwrite=overwrite and is_first()))

    _say("report")
    index = {
        "dataset": "dataset",
        "teachers": [_relative(t, out) for t in teachers.values()],
        "images": [_relative(i, out) for i in images.values()],
        "metrics": [_relative(m, out) for m in metrics],
    }
    if is_first():
        artifacts.write_json(out / "run.json", index)
        _print(report_of(out))
    workers.wait()
    return out / "report"


def _teachers_of(method: str, teachers: Sequence[Artifact]) -> list[Artifact]:
    """Who makes the images and labels them: all teachers where the method is a committee's, else the first."""
    return list(teachers) if takes_committee(method) else list(teachers[:1])


def report_of(out: Path | str) -> str:
    """Draw the report of a finished run from its manifests; returns the table as text."""
    out = Path(out)
    if not (out / "run.json").exists():
        raise UserError(f"{out} holds no finished run (run.json is missing): run the same fd2fast run again")
    index = artifacts.read_json(out / "run.json", "a run's index", "run the same fd2fast run again")
    load = artifacts.load
    return report.run(
        out / "report",
        dataset=load(out / index["dataset"], "dataset"),
        teachers=[load(out / p, "teacher") for p in index["teachers"]],
        images=[load(out / p, "images") for p in index["images"]],
        metrics=[load(out / p, "metrics") for p in index["metrics"]],
    )


def _relative(artifact: Artifact, out: Path) -> str:
    return artifact.path.relative_to(out).as_posix()


def _say(text: str) -> None:
    _print(f"\n== {text}")


def _print(text: str) -> None:
    """Once for all processes of a job."""
    if is_first():
        say(text)
