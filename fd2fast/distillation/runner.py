"""The steps of a plan, run by as many processes as there are: resumed, split where memory ends, written behind the work."""

from __future__ import annotations

import dataclasses
import gc
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fd2fast.artifacts import read_json, write_json
from fd2fast.data.pixels import bounds, quantize, save_image
from fd2fast.distillation.memory import StepMemory, free_bytes, is_out_of_memory, too_small
from fd2fast.distillation.start import Inputs
from fd2fast.models.fused import FusedTeacher
from fd2fast.settings.recipe import Recipe
from fd2fast.step import GroupedStep, check_losses
from fd2fast.system import threads
from fd2fast.system.processes import Workers
from fd2fast.system.progress import Progress
from fd2fast.system.writer import Writer, to_host

logger = logging.getLogger("fd2fast")

_SAVE_SECONDS = 30.0  # between saves of an unfinished part, where no interval is given


@dataclass(frozen=True)
class Part:
    """Segments of one step that are run together: all of them, unless the step was split."""

    step: int
    segments: tuple[int, ...]
    state: dict[str, Any] | None = None  # what `_save` kept


class Store(Protocol):
    """Where what resuming needs lies: a Stage, or another keeper of a folder."""

    state: Path

    def checkpoint(self, name: str, value: Any) -> None:
        """Save tensors and plain values."""

    def restore(self, name: str) -> Any | None:
        """What was saved, or None."""


class PlanRunner:
    """Runs what is unfinished of a plan. Made for one call of `run`.

    All results lie in the stage's folder: images, and below `state` one record for each finished part and one file for each
    unfinished one that was saved. So any number of processes, killed at any time, go on from there.
    """

    def __init__(
        self,
        recipe: Recipe,
        stage: Store,
        inputs: Inputs,
        teachers: Callable[[], Sequence[FusedTeacher]],
        memory: StepMemory | None,
        workers: Workers,
    ):
        """teachers: gives the fused teachers when the first step runs. memory: of a step, if known."""
        self.recipe, self.stage, self.inputs, self.plan = recipe, stage, inputs, inputs.plan
        self.teachers, self.memory, self.workers = teachers, memory, workers
        self.device = inputs.device
        self.total = recipe.total_iterations
        self.every = max(1, min(50, self.total // 20))
        self.done = 0  # iterations by this process
        self._too_many: float = float("inf")  # images that did not fit the memory
        self._shown = 0  # iterations of the running part that the bar has

    def run(self) -> int:
        """Every step that is not finished; returns when all processes are through. The iterations done by this one."""
        steps: list[list[int]] = [[] for _ in range(self.plan.n_waves)]
        for step in self.plan.steps():
            steps[step.wave].append(step.index)
        whole = self.plan.n_segments * self.total
        with Progress(self.recipe.method, whole, unit="segment-it") as bar, Writer() as writer:
            self.bar, self.writer = bar, writer
            for wave in steps:
                shown = 0
                for position in self.workers.share(len(wave)):
                    self._pass_over(wave[shown:position])  # others took them
                    self._run_step(wave[position])
                    shown = position + 1
                writer.flush()
                self.workers.wait()  # the next wave reads this one's images
                self._pass_over(wave[shown:])
        return self.done

    def _pass_over(self, steps: Sequence[int]) -> None:
        self.bar.step(self.total * sum(len(self.plan.step(index).segments) for index in steps))

    def records(self) -> Iterator[dict[str, Any]]:
        """Of each finished part in the plan's order: its segments and the lines of its losses."""
        for step in self.plan.steps():
            for path in sorted(self._folder("steps").glob(f"{step.index:06d}-*.json")):
                yield read_json(path)

    def _folder(self, name: str) -> Path:
        return self.stage.state / name

    def _record(self, part: Part) -> Path:
        return self._folder("steps") / f"{part.step:06d}-{part.segments[0]:09d}.json"

    def _state_file(self, part: Part) -> str:
        return f"unfinished/{part.step:06d}-{part.segments[0]:09d}.pt"

    def _unfinished(self, index: int) -> list[Part]:
        """What is left of a step, with the states that were saved."""
        left = [int(s) for s in self.plan.step(index).segments]
        for path in sorted(self._folder("steps").glob(f"{index:06d}-*.json")):
            finished = read_json(path)["segments"]
            if all(file.is_file() for file in self.inputs.files(finished)):
                left = [s for s in left if s not in finished]
            else:  # an image was lost: made again
                path.unlink()
        parts = []
        for path in sorted(self._folder("unfinished").glob(f"{index:06d}-*.pt")):
            state = self.stage.restore(f"unfinished/{path.name}")
            assert state is not None
            if set(state["segments"]) <= set(left):
                parts.append(Part(index, tuple(state["segments"]), state))
                left = [s for s in left if s not in state["segments"]]
        return [*parts, *([Part(index, tuple(left))] if left else [])]

    def _run_step(self, index: int) -> None:
        todo = self._unfinished(index)
        left = sum(len(part.segments) for part in todo)
        self.bar.step(self.total * (len(self.plan.step(index).segments) - left))
        while todo:
            todo[:0] = self._run_part(todo.pop(0))

    def _run_part(self, part: Part) -> list[Part]:
        """Run it to its end; where the memory ends, give its two halves, which go on from the same iteration."""
        rows = len(list(self.inputs.files(part.segments)))
        if rows >= self._too_many and len(part.segments) > 1:
            return self._split(part, part.state)
        step, log, failure, self._shown = None, None, "", 0
        try:
            step = self.begin(part)
            shape = (len(part.segments), len(step.columns))
            log = _Log(part.segments, self.every, torch.zeros(shape, dtype=self.inputs.dtype, device=self.device))
            if part.state is not None:
                step.load_state(part.state["optimiser"])
                log.load_state(part.state["log"])
                part = dataclasses.replace(part, state=None)  # the step holds it now
            self._show(part, step.iteration, since=0)
            self._iterate(part, step, log)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            failure = str(error).strip().split("\n")[0] or type(error).__name__
        if not failure:
            assert step is not None
            assert log is not None
            self._finish(part, step, log)
            return []
        # only out here has the failed call let go of its tensors
        began = step is not None and log is not None and step.iteration > 0
        state = {"segments": list(part.segments), **_state_of(step, log)()} if began else part.state
        if step is not None:
            step.close()
        del step, log
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(part.segments) == 1:
            raise too_small(self.memory, rows, free_bytes(self.device), self.recipe.precision) from None
        self._too_many = rows
        halves = self._split(part, state)
        iteration = state["optimiser"]["iteration"] if state else 0
        logger.warning(
            "a step of %d images does not fit the memory (%s): going on at iteration %d with %s segments",
            rows,
            failure,
            iteration,
            " and ".join(str(len(half.segments)) for half in halves),
        )
        self._show(part, 0, since=self._shown)  # the halves show it again
        return halves

    def _show(self, part: Part, iteration: int, since: int, **losses: float) -> None:
        """Move the bar from `since` finished iterations of this part to `iteration`."""
        self._shown = iteration
        self.bar.step((iteration - since) * len(part.segments), **losses)

    def begin(self, part: Part) -> GroupedStep:
        """The step of these segments at its first iteration."""
        ids = list(part.segments)
        low, high = bounds(self.inputs.dataset.mean, self.inputs.dataset.std, self.inputs.dtype)
        return GroupedStep(
            self.recipe,
            list(self.teachers()),
            torch.cat([self.inputs.initial_images(s) for s in ids]).to(self.device),
            torch.from_numpy(self.plan.labels(ids)),
            [int(o) for o in self.plan.rows(ids)],
            low=low,
            high=high,
            committees=[self.inputs.committee(int(self.plan.image_id[s])) for s in ids],
            priors=self.inputs.priors(ids),
        )

    def seen(self, part: Part, step: GroupedStep, losses: Tensor) -> None:
        """Told of each iteration after it; losses [segments, columns] before its update, on the device. Does nothing."""

    def written(self, part: Part) -> None:
        """Told on the writer's thread when all images of the part are files. Does nothing."""

    def _iterate(self, part: Part, step: GroupedStep, log: _Log) -> None:
        saved = time.monotonic()
        watch = threads.Watch(torch.get_num_threads()) if self.device.type == "cpu" else None
        while not step.finished:
            for table in self.inputs.tables(part.segments, step.iteration, step.phase_end, step.size):
                step.load_table(table.params, table.rates, table.first)
                for iteration in range(table.first, table.first + len(table.params)):
                    losses = step.iterate()
                    self.seen(part, step, losses)
                    means = log.add(losses, iteration, step.finished)
                    self.done += 1
                    if means is not None:
                        named = {n: v for n, v in zip(step.columns, means, strict=True) if v or n == "total"}
                        self._show(part, iteration + 1, since=self._shown, **named)
                    if watch is not None:
                        watch.look()
                    if self._save_is_due(iteration + 1, saved) and not step.finished:
                        saved = time.monotonic()
                        self.writer.submit(self._save, part, _state_of(step, log))

    def _save_is_due(self, iteration: int, saved: float) -> bool:
        if self.writer.busy:  # the work never waits for a save
            return False
        if self.recipe.save_every is not None:
            return iteration % self.recipe.save_every == 0
        return time.monotonic() - saved > _SAVE_SECONDS

    def _save(self, part: Part, state: Callable[[], dict[str, Any]]) -> None:
        self.stage.checkpoint(self._state_file(part), {"segments": list(part.segments), **state()})

    def _finish(self, part: Part, step: GroupedStep, log: _Log) -> None:
        """Let the images go to their files; the part counts as finished when the last is written."""
        dataset = self.inputs.dataset
        pixels = to_host({"images": quantize(step.images.detach(), dataset.mean, dataset.std, self.recipe.quantize)})
        step.close()
        log.read()

        def write() -> None:
            for path, image in zip(self.inputs.files(part.segments), pixels()["images"], strict=True):
                save_image(path, image, self.inputs.extension)
            write_json(self._record(part), {"segments": list(part.segments), "lines": log.lines})
            (self.stage.state / self._state_file(part)).unlink(missing_ok=True)
            self.written(part)

        self.writer.submit(write)

    def _split(self, part: Part, state: dict[str, Any] | None) -> list[Part]:
        """Two halves with their shares of the state; saved before the whole's is replaced, the first half's last."""
        at = len(part.segments) // 2
        pieces = (part.segments[:at], part.segments[at:])
        if state is None:
            return [Part(part.step, piece) for piece in pieces]
        rows = [int(o) for o in self.plan.rows(part.segments)]
        cut = {rows[-1]: rows[at], len(part.segments): at}
        halves = [
            Part(part.step, piece, {"segments": list(piece), **_half(state, cut, index)})
            for index, piece in enumerate(pieces)
        ]
        self.writer.flush()
        for half in reversed(halves):
            self.stage.checkpoint(self._state_file(half), half.state)
        return halves


def _half(value: Any, cut: dict[int, int], index: int) -> Any:
    """The first or second half of a state: tensors by rows or segments (`cut`: their count -> where to cut), logs by segment."""
    if isinstance(value, Tensor):
        if value.dim() == 0 or len(value) not in cut:
            return value
        at = cut[len(value)]
        return (value[:at] if index == 0 else value[at:]).clone()
    if isinstance(value, dict):
        return {name: _half(item, cut, index) for name, item in value.items() if name != "segments"}
    if isinstance(value, list):  # the log's lines: (iteration, one row for each segment)
        at = cut[len(value[0][1])] if value else 0
        return [(iteration, rows[:at] if index == 0 else rows[at:]) for iteration, rows in value]
    return value


def _state_of(step: GroupedStep | None, log: _Log | None) -> Callable[[], dict[str, Any]]:
    """Begin to copy what resuming needs to the host; the function returned gives it."""
    assert step is not None
    assert log is not None
    tensors, rest = step.tensors(), step.counters()
    lines = log.state()
    copies = to_host({**tensors, "log total": lines.pop("total")})

    def state() -> dict[str, Any]:
        found = dict(copies())
        total = found.pop("log total")
        return {"optimiser": {**rest, **found}, "log": {**lines, "total": total}}

    return state


class _Log:
    """Losses of one part: means over the iterations since the line before, read from the device when they are there."""

    def __init__(self, segments: Sequence[int], every: int, zeros: Tensor):
        """zeros: [segments, columns of the losses] on the device."""
        self.segments, self.every, self.total = list(segments), every, zeros
        self.count = 0
        self._lines: list[tuple[int, list[list[float]]]] = []
        self._due: deque[tuple[int, Callable[[], dict[str, Tensor]]]] = deque()

    @property
    def lines(self) -> list[tuple[int, list[list[float]]]]:
        return self._lines

    def add(self, losses: Tensor, iteration: int, last: bool) -> list[float] | None:
        """Take one iteration's losses; gives the mean over the segments of the line before, when this one is complete.

        Raises UserError for losses that are not finite.
        """
        self.total += losses
        self.count += 1
        if iteration % self.every and not last:
            return None
        self._due.append((iteration, to_host({"means": self.total / self.count})))
        self.total.zero_()
        self.count = 0
        # one line stays on its way, so that the host need not wait for the device
        return self.read(0 if losses.device.type == "cpu" else 1)

    def read(self, left: int = 0) -> list[float] | None:
        """Read all lines but the newest `left`; the means of the last one read."""
        means = None
        while len(self._due) > left:
            iteration, copies = self._due.popleft()
            values = copies()["means"].tolist()
            for segment, row in zip(self.segments, values, strict=True):
                check_losses(row, segment, iteration)
            self._lines.append((iteration, [[float(f"{value:.6g}") for value in row] for row in values]))
            means = [sum(column) / len(column) for column in zip(*values, strict=True)]
        return means

    def state(self) -> dict[str, Any]:
        """Lines so far, and what is added up for the next: on the device."""
        self.read()
        return {"lines": list(self._lines), "total": self.total, "count": self.count}

    def load_state(self, state: dict[str, Any]) -> None:
        self._lines = [(int(iteration), rows) for iteration, rows in state["lines"]]
        self.total.copy_(state["total"])
        self.count = int(state["count"])
