"""The first stage of a run, which makes the data set; fd2fast.data.prepare does the work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fd2fast.data import prepare
from fd2fast.entries import Entry
from fd2fast.graph import Job, StageSpec
from fd2fast.settings.config import RunConfig


def _jobs(run: RunConfig, entries: Sequence[Entry]) -> Iterator[Job]:
    yield Job("data set", "dataset", run.data, space=prepare.space)


SPEC = StageSpec(prepare.prepare, _jobs, prepare.faults, say=prepare.describe)
