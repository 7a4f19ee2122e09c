"""The one way through the house: every stage of a run in order, each kept and skipped when it is finished."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fd2fast import artifacts, space
from fd2fast.artifacts import Artifact, Dataset, Images, Metrics, Patches, TeacherArtifact
from fd2fast.config import (
    DistillConfig,
    EvaluateConfig,
    PatchesConfig,
    PretrainConfig,
    RelabelConfig,
    RunConfig,
    replace,
)
from fd2fast.data import prepare as prepare_stage
from fd2fast.data.outline import Outline, outline_of, outline_on_disk
from fd2fast.errors import UserError, refuse
from fd2fast.lock import own
from fd2fast.methods import check_name, patch_factor, takes_committee
from fd2fast.models.backbone import canonical_name
from fd2fast.ranges import out_of_range, repeated
from fd2fast.space import Space
from fd2fast.stages import distill, evaluate, patches, pretrain, relabel, report
from fd2fast.streams import say
from fd2fast.workers import current, is_first

T = TypeVar("T")
A = TypeVar("A", bound=Artifact)
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


@dataclass(frozen=True)
class Work:
    """One artifact of a run: what people call it, where it lies, its kind and the settings it records."""

    title: str
    path: Path
    kind: str
    config: Any
    # Bytes on disk; None for what is finished and stays.
    space: Space | None

    def obstacle(self, *, overwrite: bool) -> str | None:
        """Why it cannot be begun, resumed or found finished."""
        found = artifacts.obstacle(self.path, self.kind, self.config)
        # what was made with other settings is removed then, other people's files never are
        return None if found and overwrite and artifacts.started(self.path) else found

    @property
    def state(self) -> str:
        """finished, begun or new."""
        return "finished" if artifacts.made(self.path) else "begun" if artifacts.started(self.path) else "new"


@dataclass(frozen=True)
class Plan:
    """A run before it begins: its rows, its artifacts in order, what is wrong and what is worth a warning."""

    entries: list[Entry]
    work: list[Work]
    faults: list[str]
    warnings: list[str]


def check(config: RunConfig, *, overwrite: bool = False, hub: bool = False) -> Plan:
    """Look at all settings of all stages, the data set, models, weights, folders and disk, before anything is begun.

    hub: fetch weights by name, too. Nothing is written. The faults are all that can be known together: those of the settings
    alone hide those that need the data set.
    """
    entries, found = settings_faults(config)
    if found:
        return Plan(entries, [], found, [])
    data: Outline | None = None
    try:
        data = _outline(config, overwrite)
    except UserError as error:
        found.append(f"data: {error}")
    work = _work(config, entries, data, overwrite) if data is not None else []
    if data is not None:
        found += data_faults(config, entries, data, overwrite=overwrite, hub=hub)
    found += [fault for one in work if (fault := one.obstacle(overwrite=overwrite))]
    found += [
        f"{one.title}: the name of its folder is too long: {one.path.name}" for one in work if _too_long(one.path)
    ]
    out = Path(config.out)
    warnings: list[str] = []
    if artifacts.made(out):
        found.append(f"out {out} holds the result of one stage; wanted the folder of a run, or a new one")
    open_work = [one for one in work if overwrite or one.state != "finished"]
    if open_work or not work:
        found += space.folder_faults(out)
    if open_work and not found:
        faults, warnings = space.must_hold(out, needed(open_work), f"out {out}")
        found += faults
    return Plan(entries, work, _once(found), warnings)


def settings_faults(config: RunConfig) -> tuple[list[Entry], list[str]]:
    """The rows of the table, and what is wrong with the settings of all stages by themselves."""
    found = _own_faults(config)
    entries: list[Entry] = []
    for text in config.methods if isinstance(config.methods, list | tuple) else ():
        try:
            entries.append(parse_entry(str(text)))
        except UserError as error:
            found.append(str(error))
    found += [f"methods name {name} twice" for name in repeated(entry.name for entry in entries)]
    found += prepare_stage.faults(config.data)
    found += pretrain.faults(config.pretrain)
    found += patches.faults(config.patches)
    found += distill.faults(config.distill)
    found += relabel.faults(config.relabel)
    found += evaluate.faults(config.evaluate)
    return entries, _once(found)


def data_faults(
    config: RunConfig, entries: Sequence[Entry], data: Outline, *, overwrite: bool = False, hub: bool = False
) -> list[str]:
    """What is wrong with a run for this data set: counts of images, models and their weights, sizes; finished stages are left."""
    found: list[str] = []

    def is_open(path: Path) -> bool:
        return overwrite or not artifacts.made(path)

    for name in config.teachers:
        if is_open(_teacher_folder(config, name)):
            found += pretrain.faults(_pretrain(config, name), data, hub=hub)
    for factor in _factors(entries):
        if is_open(_patches_folder(config, factor)):
            found += patches.faults(_patches(config, factor), data)
    for method in dict.fromkeys(entry.method for entry in entries):
        teachers = _teachers_of(method, config.teachers)
        if is_open(_images_folder(config, method)):
            found += distill.faults(_distill(config, method), data, len(teachers), teachers)
    for entry, ipc in _rows(config, entries):
        teachers = _teachers_of(entry.method, config.teachers)
        soft = entry.labels == "soft"
        if soft and is_open(_labels_folder(config, entry.method, ipc)):
            found += relabel.faults(_relabel(config, ipc), data, ipc, teachers)
        for student in config.students:
            if is_open(_metrics_folder(config, entry, ipc, student)):
                found += evaluate.faults(
                    _evaluate(config, entry, ipc, student),
                    data,
                    ipc,
                    stored=config.relabel.epochs if soft else None,
                    batch_size=config.relabel.batch_size,
                )
    return _once(found)


def needed(work: Sequence[Work]) -> Space:
    """Bytes that these artifacts will still take, less what lies there already."""
    least = usual = 0
    for one in work:
        if one.space is not None:
            there = space.taken(one.path)
            least, usual = least + max(0, one.space.least - there), usual + max(0, one.space.usual - there)
    return Space(least, usual)


def describe_plan(config: RunConfig, plan: Plan, *, overwrite: bool = False) -> str:
    """The run as text: every artifact with its folder, whether it is finished, and the disk it takes; then the sums."""
    out = Path(config.out)
    rows = []
    for one in plan.work:
        state = "anew" if overwrite and one.state != "new" else one.state
        size = space.size_text(one.space.usual) if one.space is not None else ""
        rows.append((one.title, state, size, one.path.relative_to(out).as_posix()))
    widths = [max((len(row[column]) for row in rows), default=0) for column in range(3)]
    lines = [f"the run in {out}:"]
    for title, state, size, folder in rows:
        lines.append(f"  {title:{widths[0]}}  {state:{widths[1]}}  {size:>{widths[2]}}  {folder}")
    free = space.free_space(out)
    more = needed([one for one in plan.work if overwrite or one.state != "finished"])
    lines.append(
        f"disk: up to about {space.size_text(more.usual)} more"
        + (f", {space.size_text(free)} are free" if free is not None else "")
    )
    return "\n".join(lines)


def _own_faults(config: RunConfig) -> list[str]:
    bounds = (
        ("methods", lambda v: len(v) >= 1, "at least one method"),
        ("teachers", lambda v: len(v) >= 1, "at least one backbone"),
        ("students", lambda v: len(v) >= 1, "at least one backbone"),
        ("ipc", lambda v: len(v) >= 1 and min(v) >= 1, "one or several numbers of images per class, each 1 or more"),
    )
    found = out_of_range(config, "run", bounds)
    if found:
        return found
    for what, names in (("teachers", config.teachers), ("students", config.students)):
        found += [f"{what} name {name} twice" for name in repeated(canonical_name(name) for name in names)]
        folders: dict[str, str] = {}
        for name in names:
            other = folders.setdefault(folder_name(name).lower(), name)
            if canonical_name(other) != canonical_name(name):
                found.append(f"{what} {other} and {name} would share the folder {folder_name(name)}")
    return found + [f"ipc names {number} twice" for number in repeated(config.ipc)]


def _outline(config: RunConfig, overwrite: bool) -> Outline:
    """Of the prepared data set where these settings have made one, else as it lies on disk."""
    path = Path(config.out) / "dataset"
    if artifacts.made(path) and not overwrite and artifacts.obstacle(path, "dataset", config.data) is None:
        return outline_of(Dataset.load(path))
    return outline_on_disk(config.data)


def _once(faults: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(faults))


def _short(model: str) -> str:
    """A model's name without its settings."""
    return model.split(",")[0]


def _too_long(path: Path) -> bool:
    return len(path.name.encode("utf-8", "surrogateescape")) > space.LONGEST_NAME


def _factors(entries: Sequence[Entry]) -> list[int]:
    """Of the patches that the methods start from, in order."""
    return list(dict.fromkeys(factor for entry in entries if (factor := patch_factor(entry.method))))


def _rows(config: RunConfig, entries: Sequence[Entry]) -> list[tuple[Entry, int]]:
    return [(entry, ipc) for entry in entries for ipc in config.ipc]


def _pretrain(config: RunConfig, name: str) -> PretrainConfig:
    return replace(config.pretrain, model=name)


def _patches(config: RunConfig, factor: int) -> PatchesConfig:
    return replace(config.patches, factor=factor, per_class=max(config.patches.per_class, *config.ipc))


def _distill(config: RunConfig, method: str) -> DistillConfig:
    return replace(config.distill, method=method, ipc=max(config.ipc))


def _relabel(config: RunConfig, ipc: int) -> RelabelConfig:
    return replace(config.relabel, ipc=ipc)


def _evaluate(config: RunConfig, entry: Entry, ipc: int, student: str) -> EvaluateConfig:
    settings = replace(config.evaluate, model=student, labels=entry.labels, ipc=ipc)
    if entry.labels == "hard" and settings.epochs is None:
        return replace(settings, epochs=config.relabel.epochs)
    return settings


def _teacher_folder(config: RunConfig, name: str) -> Path:
    return Path(config.out) / "teachers" / folder_name(name)


def _patches_folder(config: RunConfig, factor: int) -> Path:
    return Path(config.out) / "patches" / str(factor)


def _images_folder(config: RunConfig, method: str) -> Path:
    return Path(config.out) / "images" / folder_name(method)


def _labels_folder(config: RunConfig, method: str, ipc: int) -> Path:
    return Path(config.out) / "labels" / f"{folder_name(method)}-ipc{ipc}"


def _metrics_folder(config: RunConfig, entry: Entry, ipc: int, student: str) -> Path:
    return Path(config.out) / "metrics" / f"{folder_name(entry.name)}-ipc{ipc}-{folder_name(student)}"


def _work(config: RunConfig, entries: Sequence[Entry], data: Outline, overwrite: bool) -> list[Work]:
    """Every artifact of the run, in order, but those whose own faults leave their settings or sizes unknown."""
    work: list[Work] = []

    def add(title: str, path: Path, kind: str, settled: Callable[[], Any], sized: Callable[[], Space]) -> None:
        if any(one.path == path for one in work):
            return
        try:
            work.append(Work(title, path, kind, settled(), sized() if overwrite or not artifacts.made(path) else None))
        except UserError:  # the stage's own faults say why
            return

    add("data set", Path(config.out) / "dataset", "dataset", lambda: config.data, lambda: prepare_stage.space(data))
    for name in config.teachers:
        settings = _pretrain(config, name)
        add(
            f"teacher {_short(name)}",
            _teacher_folder(config, name),
            "teacher",
            partial(pretrain.settled, settings),
            partial(pretrain.space, settings, data),
        )
    for factor in _factors(entries):
        cut = _patches(config, factor)
        add(
            f"patches {factor} x {factor}",
            _patches_folder(config, factor),
            "patches",
            partial(patches.settled, cut),
            partial(patches.space, cut, data),
        )
    for entry in entries:
        made = _distill(config, entry.method)
        add(
            f"distill {entry.method}",
            _images_folder(config, entry.method),
            "images",
            partial(distill.settled, made, data),
            partial(distill.space, made, data),
        )
    for entry, ipc in _rows(config, entries):
        if entry.labels == "soft":
            labels = _relabel(config, ipc)
            add(
                f"labels {entry.name}, {ipc} per class",
                _labels_folder(config, entry.method, ipc),
                "labels",
                partial(relabel.settled, labels),
                partial(relabel.space, labels, data, ipc),
            )
    for entry, ipc in _rows(config, entries):
        for student in config.students:
            row = _evaluate(config, entry, ipc, student)
            add(
                f"students {_short(student)} of {entry.name}, {ipc} per class",
                _metrics_folder(config, entry, ipc, student),
                "metrics",
                partial(evaluate.settled, row),
                partial(evaluate.space, row, data),
            )
    return work


def run(config: RunConfig, *, overwrite: bool = False, dry: bool = False) -> Path:
    """Run or resume everything below config.out; prints the table and returns the report's folder.

    In a torchrun job the processes share the distilling; all else is done by the first, and the others wait for it.
    dry: stop after the checks and print what would be done. Raises UserError with all that `check` finds, before any work.
    """
    entries, wrong = settings_faults(config)
    refuse(wrong)

    def look() -> list[str]:
        plan = check(config, overwrite=overwrite, hub=not dry)
        if dry and plan.work:
            _print(describe_plan(config, plan, overwrite=overwrite))
        for warning in plan.warnings:
            _print(f"warning: {warning}")
        return plan.faults

    refuse(current().told(look))
    if dry:
        return Path(config.out) / "report"
    with own(config.out):
        if artifacts.started(config.out):
            raise UserError(f"{config.out} holds the result of one stage; wanted the folder of a run, or a new one")
        return _run(config, entries, overwrite)


def _run(config: RunConfig, entries: Sequence[Entry], overwrite: bool) -> Path:
    """`run` after its checks, in a folder that this job owns."""
    out = Path(config.out)
    workers = current()

    def by_one(stage: Callable[..., A], *arguments: Any) -> A:
        return workers.first(lambda: stage(*arguments, overwrite=overwrite and is_first()))

    _say("data set")
    dataset = by_one(prepare_stage.prepare, config.data, out / "dataset")
    _print(prepare_stage.describe(dataset))
    # images that could not be read are known now
    refuse(workers.told(lambda: data_faults(config, entries, outline_of(dataset), overwrite=overwrite)))

    teachers: dict[str, TeacherArtifact] = {}
    for name in config.teachers:
        _say(f"teacher {name}")
        teachers[name] = by_one(pretrain.run, _pretrain(config, name), _teacher_folder(config, name), dataset)
    first = teachers[config.teachers[0]]

    cut: dict[int, Patches] = {}

    def patches_for(factor: int) -> Patches:
        if factor not in cut:
            _say(f"patches {factor} x {factor}")
            cut[factor] = by_one(patches.run, _patches(config, factor), _patches_folder(config, factor), dataset, first)
        return cut[factor]

    images: dict[str, Images] = {}
    rows: list[evaluate.Row] = []
    for entry in entries:
        method = entry.method
        if method not in images:
            _say(f"distill {method}")
            factor = patch_factor(method)
            images[method] = distill.run(
                _distill(config, method),
                _images_folder(config, method),
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
                    _relabel(config, ipc),
                    _labels_folder(config, method, ipc),
                    images[method],
                    _teachers_of(method, list(teachers.values())),
                )
            for student in config.students:
                where = _metrics_folder(config, entry, ipc, student)
                rows.append(
                    evaluate.Row(_evaluate(config, entry, ipc, student), where, dataset, images[method], labels)
                )

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


def _teachers_of(method: str, teachers: Sequence[T]) -> list[T]:
    """Who makes the images and labels them: all teachers where the method is a committee's, else the first."""
    return list(teachers) if takes_committee(method) else list(teachers[:1])


def report_of(out: Path | str) -> str:
    """Draw the report of a finished run from its manifests; returns the table as text."""
    out = Path(out)
    if not (out / "run.json").exists():
        raise UserError(f"{out} holds no finished run (run.json is missing): run the same fd2fast run again")
    again = "run the same fd2fast run again"
    index = artifacts.read_json(out / "run.json", "a run's index", again)
    named: Any = index if isinstance(index, dict) else {}
    folders = [named.get("dataset")]
    for name in ("teachers", "images", "metrics"):
        folders += named[name] if isinstance(named.get(name), list) else [None]
    if not all(isinstance(folder, str) for folder in folders):
        raise UserError(f"{out / 'run.json'} is damaged: it does not list the run's folders; {again}")
    return report.run(
        out / "report",
        dataset=Dataset.load(out / index["dataset"]),
        teachers=[TeacherArtifact.load(out / p) for p in index["teachers"]],
        images=[Images.load(out / p) for p in index["images"]],
        metrics=[Metrics.load(out / p) for p in index["metrics"]],
    )


def _relative(artifact: Artifact, out: Path) -> str:
    return artifact.path.relative_to(out).as_posix()


def _say(text: str) -> None:
    _print(f"\n== {text}")


def _print(text: str) -> None:
    """Once for all processes of a job."""
    if is_first():
        say(text)
