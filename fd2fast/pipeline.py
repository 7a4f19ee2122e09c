"""A run: the jobs of all stages in order, looked at as a whole before the first, each kept and skipped when it is finished."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fd2fast import artifacts
from fd2fast.artifacts import Artifact, Dataset, Images, Metrics, TeacherArtifact
from fd2fast.data.outline import Outline, outline_of, outline_on_disk
from fd2fast.entries import Entry, folder_name, parse_entry
from fd2fast.errors import UserError, refuse
from fd2fast.graph import Planned, plan_jobs
from fd2fast.models.backbone import canonical_name
from fd2fast.settings.config import RunConfig, wrong_settings
from fd2fast.settings.ranges import damage, repeated
from fd2fast.stages import report, specs
from fd2fast.system import space
from fd2fast.system.lock import by_itself, own
from fd2fast.system.processes import current, is_first
from fd2fast.system.space import Space
from fd2fast.system.streams import say


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
    for stage in specs().values():
        found += stage.faults(stage.settings(config))
    return entries, _once(found)


def data_faults(
    config: RunConfig, entries: Sequence[Entry], data: Outline, *, overwrite: bool = False, hub: bool = False
) -> list[str]:
    """What is wrong with a run for this data set: counts of images, models and their weights, sizes; finished stages are left."""
    found: list[str] = []
    for one in jobs(config, entries):
        if overwrite or not artifacts.made(one.path):
            found += one.job.faults(data, hub)
    return _once(found)


def jobs(config: RunConfig, entries: Sequence[Entry]) -> list[Planned]:
    """Every artifact of the run, in the order in which they are made."""
    return plan_jobs(specs(), config, entries)


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
    found = wrong_settings(config, "run")
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


def _too_long(path: Path) -> bool:
    return len(path.name.encode("utf-8", "surrogateescape")) > space.LONGEST_NAME


def _work(config: RunConfig, entries: Sequence[Entry], data: Outline, overwrite: bool) -> list[Work]:
    """Every artifact of the run, in order, but those whose own faults leave their settings or sizes unknown."""
    work: list[Work] = []
    for one in jobs(config, entries):
        job, kind = one.job, one.stage.output.KIND
        try:
            settings = job.settled(data) if job.settled is not None else job.config
            size = job.space(data) if overwrite or not artifacts.made(one.path) else None
            work.append(Work(job.title, one.path, kind, settings, size))
        except UserError:  # the stage's own faults say why
            continue
    return work


def run(config: RunConfig, *, overwrite: bool = False, dry: bool = False) -> Path:
    """Run or resume everything below config.out; prints the table and returns the report's folder.

    In a torchrun job the processes share the distilling of each set of images, and of every other stage the artifacts.
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
    made: dict[Path, Artifact] = {}
    planned = jobs(config, entries)
    for name, stage in specs().items():
        todo = [one for one in planned if one.name == name]
        if not todo:
            continue
        _make(todo, made, overwrite)
        if stage.output is Dataset:
            _check_data(Dataset.of(made[todo[-1].path]), config, entries, overwrite)
    _say("report")
    out = Path(config.out)
    if is_first():
        artifacts.write_json(out / "run.json", _index(planned, out))
        _print(report_of(out))
    current().wait()
    return out / "report"


def _check_data(dataset: Dataset, config: RunConfig, entries: Sequence[Entry], overwrite: bool) -> None:
    """UserError for what is wrong now that it is known which images could be read."""
    refuse(current().told(lambda: data_faults(config, entries, outline_of(dataset), overwrite=overwrite)))


def _make(todo: Sequence[Planned], made: dict[Path, Artifact], overwrite: bool) -> None:
    """The artifacts of one stage, which do not depend on each other, into `made`.

    Each is made by one process of the job, unless the stage itself shares out its work.
    """
    stage, workers = todo[0].stage, current()
    calls = [(one.job.config, one.path, *_inputs(one, made)) for one in todo]
    if stage.shared:
        for one, call in zip(todo, calls, strict=True):
            _say(one.job.title)
            made[one.path] = stage.run(*call, overwrite=overwrite)
    elif stage.run_all is not None:
        _say(f"{todo[0].name}: {len(todo)} together")
        with by_itself():
            results = stage.run_all(calls[workers.rank :: workers.world], overwrite=overwrite)
        made.update(zip((one.path for one in todo[workers.rank :: workers.world]), results, strict=True))
    else:
        by = f" (process {workers.rank} of the job)" if workers.rank else ""
        with by_itself():
            # one alone is the first process's, whose progress people see
            for number in workers.share(len(todo)) if len(todo) > 1 else range(int(is_first())):
                say(f"\n== {todo[number].job.title}{by}")
                made[todo[number].path] = stage.run(*calls[number], overwrite=overwrite)
    workers.wait()
    for one in todo:
        if one.path not in made:
            made[one.path] = stage.output.load(one.path)
        if stage.say is not None:
            _print(stage.say(made[one.path]))


def _inputs(one: Planned, made: dict[Path, Artifact]) -> list[Any]:
    """The artifacts of a job's parameters."""

    def result(parent: Planned | list[Planned] | None) -> Any:
        if isinstance(parent, list):
            return [made[each.path] for each in parent]
        return None if parent is None else made[parent.path]

    return [result(parent) for parent in one.inputs]


def _index(planned: Sequence[Planned], out: Path) -> dict[str, Any]:
    """run.json: the folders that the report is drawn from, of images those that were tested."""

    def folders(jobs: Sequence[Planned]) -> list[str]:
        return list(dict.fromkeys(one.path.relative_to(out).as_posix() for one in jobs))

    def of(kind: type[Artifact]) -> list[Planned]:
        return [one for one in planned if one.stage.output is kind]

    parents = [parent for one in of(Metrics) for parent in one.inputs if isinstance(parent, Planned)]
    return {
        "dataset": folders(of(Dataset))[-1],
        "teachers": folders(of(TeacherArtifact)),
        "images": folders([parent for parent in parents if parent.stage.output is Images]),
        "metrics": folders(of(Metrics)),
    }


@dataclass
class _Index:
    dataset: str
    teachers: tuple[str, ...]
    images: tuple[str, ...]
    metrics: tuple[str, ...]


def report_of(out: Path | str) -> str:
    """Draw the report of a finished run from its manifests; returns the table as text."""
    out = Path(out)
    if not (out / "run.json").exists():
        raise UserError(f"{out} holds no finished run (run.json is missing): run the same fd2fast run again")
    again = "run the same fd2fast run again"
    index = artifacts.read_json(out / "run.json", "a run's index", again)
    if fault := damage(_Index, index):
        raise UserError(f"{out / 'run.json'} is damaged, it does not list the run's folders: {fault}; {again}")
    return report.run(
        out / "report",
        dataset=Dataset.load(out / index["dataset"]),
        teachers=[TeacherArtifact.load(out / p) for p in index["teachers"]],
        images=[Images.load(out / p) for p in index["images"]],
        metrics=[Metrics.load(out / p) for p in index["metrics"]],
    )


def _say(text: str) -> None:
    _print(f"\n== {text}")


def _print(text: str) -> None:
    """Once for all processes of a job."""
    if is_first():
        say(text)
