"""What a stage declares of itself, and how the jobs of a run find their inputs among what earlier stages make."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fd2fast.artifacts import Artifact
from fd2fast.commands import Command, Input
from fd2fast.data.outline import Outline
from fd2fast.entries import Entry
from fd2fast.settings.config import RunConfig
from fd2fast.system.space import Space


@dataclass(frozen=True)
class Job:
    """One artifact that a run makes.

    key: what it is of among the artifacts of its type (a backbone, a method ...); folder: below the run's. keys: of its inputs,
    by the name of the parameter, a list for several and None for one left out; an input that is not named has the key "".
    faults(data, hub): what is wrong for this data set; hub: fetch weights by name, too. settled(data): the settings as the
    artifact records them. space(data): bytes on disk. These may raise UserError where the settings' own faults say why.
    """

    title: str
    folder: str
    config: Any
    key: Hashable = ""
    keys: Mapping[str, Any] = field(default_factory=dict)
    faults: Callable[[Outline, bool], list[str]] = lambda data, hub: []
    settled: Callable[[Outline], Any] | None = None
    space: Callable[[Outline], Space] = lambda data: Space(0, 0)


@dataclass(frozen=True)
class StageSpec:
    """A stage: its function and what a run, its checks and the command line need to know.

    run(config, out, *inputs, overwrite=False) -> artifact: its annotations name the types of settings, inputs and output.
    jobs(run's settings, entries): the artifacts that a run makes. faults(settings): what is wrong with them by themselves.
    run_all([(config, out, *inputs), ...], overwrite=False): all jobs of a run at once, in place of `run`.
    shared: the stage itself uses all processes of a torchrun job. say: lines about a result, for people.
    offered: the stage as a command, where it says more than its parameters; those of fd2fast stand in fd2fast.commands.
    """

    run: Callable[..., Any]
    jobs: Callable[[RunConfig, Sequence[Entry]], Iterable[Job]]
    faults: Callable[[Any], list[str]] = lambda config: []
    run_all: Callable[..., list[Any]] | None = None
    shared: bool = False
    say: Callable[[Any], str] | None = None
    offered: Command | None = None

    @property
    def hints(self) -> dict[str, Any]:
        return typing.get_type_hints(inspect.unwrap(self.run))

    @property
    def config(self) -> type[Any]:
        """The class of the settings."""
        return self.hints["config"]

    @property
    def output(self) -> type[Artifact]:
        """What it makes."""
        return self.hints["return"]

    @property
    def inputs(self) -> list[Input]:
        """The artifacts it takes, in the order of `run`'s parameters."""
        hints = self.hints
        named = [p for p in inspect.signature(self.run).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][2:]
        return [_input(p.name, hints[p.name]) for p in named]

    def command(self) -> Command:
        """What the command line can offer of it."""
        return self.offered or Command(self.config, self.inputs, self.output)

    def settings(self, run: RunConfig) -> Any:
        """Of this stage, in those of a run; the defaults where these hold none of their class."""
        values = [getattr(run, f.name) for f in dataclasses.fields(run)]
        return next((value for value in values if type(value) is self.config), None) or self.config()


def _input(name: str, hint: Any) -> Input:
    several = optional = False
    if isinstance(hint, types.UnionType):
        hint = next(part for part in hint.__args__ if part is not type(None))
        optional = True
    if typing.get_origin(hint) is not None:
        hint = hint.__args__[0]
        several = True
    return Input(name, hint, several, optional)


@dataclass(frozen=True)
class Planned:
    """A job with its stage, its place, and the jobs that make its inputs, in the order of the stage's parameters."""

    name: str
    stage: StageSpec
    job: Job
    path: Path
    inputs: tuple[Planned | list[Planned] | None, ...]


def plan_jobs(stages: Mapping[str, StageSpec], run: RunConfig, entries: Sequence[Entry]) -> list[Planned]:
    """All jobs of a run, in order; an input is made by the last stage before that makes its type with its key.

    So a stage that takes and makes the same type, for the same keys, comes between those before and those after it.
    Raises ValueError for an input that no stage before makes.
    """
    makers: dict[tuple[str, Hashable], Planned] = {}
    planned: list[Planned] = []
    for name, stage in stages.items():
        inputs, output = stage.inputs, stage.output.KIND
        made: dict[tuple[str, Hashable], Planned] = {}
        for job in stage.jobs(run, entries):
            if (output, job.key) not in made:
                parents = tuple(
                    _makers(makers, one, job.keys.get(one.name, ""), f"{name} ({job.title})") for one in inputs
                )
                made[output, job.key] = Planned(name, stage, job, Path(run.out) / job.folder, parents)
        makers |= made
        planned += made.values()
    return planned


def _makers(
    makers: Mapping[tuple[str, Hashable], Planned], wanted: Input, key: Any, whose: str
) -> Planned | list[Planned] | None:
    if key is None:
        return None
    keys = list(key) if wanted.several else [key]
    for one in keys:
        if (wanted.type.KIND, one) not in makers:
            raise ValueError(f"{whose}: no stage before it makes {wanted.type.NOUN} of {one!r}")
    jobs = [makers[wanted.type.KIND, one] for one in keys]
    return jobs if wanted.several else jobs[0]


def with_settings(run: RunConfig, stages: Mapping[str, StageSpec]) -> RunConfig:
    """The settings of a run with fields for these stages, which RunConfig does not know, at their defaults."""
    added = [(name, stage.config, field(default=stage.config())) for name, stage in stages.items()]
    extended = dataclasses.make_dataclass("RunConfig", added, bases=(type(run),), frozen=True)
    return typing.cast(RunConfig, extended(**{f.name: getattr(run, f.name) for f in dataclasses.fields(run)}))
