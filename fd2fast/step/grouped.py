"""The grouped step: several segments of one wave optimised in one batch, each with its own loss, draws and statistics."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from fd2fast.methods import Term
from fd2fast.models.fused import FusedTeacher, fuse
from fd2fast.models.teacher import Teacher
from fd2fast.ops.cpu import native
from fd2fast.schedules import half_cosine
from fd2fast.settings.recipe import Recipe
from fd2fast.step.capture import Captures, CudaRecorder
from fd2fast.step.checks import check_images, check_priors, check_table, check_teachers
from fd2fast.step.iteration import Iteration
from fd2fast.step.losses import Losses
from fd2fast.step.phases import Phases
from fd2fast.step.schedule import Priors, ResizedPriors, Schedule
from fd2fast.step.state import BY_ROW, NewImages, State
from fd2fast.step.tables import DeviceTable, HostTable, Table
from fd2fast.step.update import Update, make_update


def map_dtype(precision: str, dtype: torch.dtype) -> torch.dtype:
    """The type of a fused teacher's maps: bf16 or fp16 where `precision` says so, else `dtype`, that of the images."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, dtype)


class GroupedStep:
    """Images [N, 3, S, S] of several segments with their Adam moments, advanced one iteration at a time.

    The loss is the sum of the segments' losses, and each of those is a mean over the segment's own rows and its own BN
    statistics: in exact arithmetic no segment feels what shares the step with it.
    """

    def __init__(
        self,
        recipe: Recipe,
        teachers: Sequence[Teacher | FusedTeacher],
        initial: Tensor,
        labels: Tensor,
        offsets: Sequence[int],
        *,
        low: Tensor,
        high: Tensor,
        committees: Sequence[Sequence[int]] | None = None,
        weights: Sequence[Mapping[int, float]] | None = None,
        priors: Sequence[Priors | None] | None = None,
        terms: Sequence[Term] | None = None,
        graphs: bool | None = None,
        table: Table | None = None,
        captures: Captures | None = None,
        update: Update | None = None,
    ):
        """teachers: frozen, eval mode, on the device and in the type of `initial`; plain or already fused.

        initial: normalised [N, 3, S, S] at full size; labels: int [N]; offsets: row offsets [segments + 1]; low, high: [3];
        committees[segment]: indices of its teachers in their order (None: all); weights[segment]: of those where all of them
        work in every iteration (None: by the recipe's rule); priors[teacher]: its attention of the finished images of the
        rows' classes and groups; terms: of the loss (None: the method's); graphs: replay iterations as CUDA graphs (None: on
        a GPU).
        table, captures, update: other parts than those for the device and precision.
        Raises ValueError for shapes, labels or teachers that do not fit, and for graphs without a GPU.
        """
        self.recipe, self.device, self.initial = recipe, initial.device, initial
        self.offsets = tuple(int(o) for o in offsets)
        self.labels = labels.to(initial.device)
        segments, on_gpu = len(self.offsets) - 1, self.device.type == "cuda"
        chosen = [tuple(c) for c in committees] if committees is not None else [tuple(range(len(teachers)))] * segments
        prior_maps = list(priors) if priors is not None else [None] * len(teachers)
        if not on_gpu:
            native.keep_memory()
        if graphs and not on_gpu:
            raise ValueError(f"graphs need a GPU, the images are on {self.device}")
        check_images(recipe, initial, self.labels, self.offsets)
        check_priors(teachers, prior_maps, len(initial))
        check_teachers(teachers, self.labels, chosen, segments)

        maps = map_dtype(recipe.precision, initial.dtype)
        fused = [t if isinstance(t, FusedTeacher) else fuse(t, maps) for t in teachers]
        dtype = torch.float64 if initial.dtype == torch.float64 else torch.float32
        accuracies = [teacher.accuracy for teacher in teachers]
        self.phases = Phases(recipe)
        self.schedule = Schedule(recipe, accuracies, chosen, self.offsets, self.labels, prior_maps, dtype, weights)
        self._resized = ResizedPriors()
        self.losses = Losses(recipe, fused, self._resized, dtype, terms)
        if update is None:
            update = make_update(recipe, low.to(initial), high.to(initial), self.offsets)
        self._iteration = Iteration(self.losses, update, self.offsets)
        if table is None:
            table = DeviceTable(segments, self.device) if on_gpu else HostTable()
        self._table = table
        self._captures = captures
        if captures is None and (graphs or (graphs is None and on_gpu)):
            self._captures = Captures(CudaRecorder(self.device))

        self.iteration = 0  # finished, over all phases
        self.phase = 0
        self._state = State(self.phases.first_images(initial), segments)

    def close(self) -> None:
        """Let go of the teachers, of recorded iterations and of what was prepared for them."""
        self._forget()
        self.losses.clear()
        self.schedule.clear()

    def __enter__(self) -> GroupedStep:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    @property
    def images(self) -> Tensor:
        """As they are, at the side of the last iteration's phase."""
        return self._state.images

    @property
    def gradient(self) -> Tensor | None:
        """Of the images, at the last iteration; None after one that a graph replayed."""
        return self._iteration.gradient

    @property
    def columns(self) -> tuple[str, ...]:
        """Of the losses that `iterate` returns."""
        return self.losses.columns

    @property
    def total_iterations(self) -> int:
        """Over all phases."""
        return self.recipe.total_iterations

    @property
    def finished(self) -> bool:
        return self.iteration >= self.total_iterations

    @property
    def size(self) -> int:
        """Side of the images in the coming iteration."""
        return self.phases.sizes[self.phases.of(self.iteration)]

    @property
    def phase_end(self) -> int:
        """First iteration after the phase of the coming iteration."""
        return self.phases.ends[self.phases.of(self.iteration)]

    def load_table(self, params: Tensor | NDArray[Any], rates: Tensor | NDArray[Any] | None, first: int) -> None:
        """The parameters of the iterations first .. first + T - 1, for `iterate` without draws; copied before it returns.

        params: int [T, segments, 7] on the host, columns as in `iterate`, crops inside images of their phase's side;
        rates: float64 [T], None: the cosine of the settings. Raises ValueError for shapes, types or values that do not fit.
        """
        draws = torch.as_tensor(params).cpu()
        count, total = len(draws) if draws.ndim else 0, self.total_iterations
        if rates is None:
            falling = [half_cosine(t, total) * self.recipe.lr for t in range(first, first + count)]
            rates = torch.tensor(falling, dtype=torch.float64)
        rates = torch.as_tensor(rates)
        check_table(draws, rates, first, self.phases, len(self.offsets) - 1)
        begins = [self.phases.begins[self.phases.of(t)] for t in range(first, first + count)]
        numbers = torch.arange(first + 1, first + count + 1) - torch.tensor(begins)
        if self._table.load(draws, rates, numbers, first) and self._captures is not None:
            self._captures.clear()

    def iterate(self, draws: Tensor | None = None) -> Tensor:
        """One iteration of every segment; returns the losses before it, [segments, columns] on the device, no graph.

        draws: int [segments, 7] on the host, (top, left, height, width, flip, roll_down, roll_right) for images of side
        `size`; None: the row of the table given to `load_table`. With several teachers in one iteration the losses are
        weighted sums over them. Does not wait for the device, but where a phase begins.
        If it raises (out of memory, say), images, moments, iteration and phase are as before the call.
        """
        if self.finished:
            raise ValueError(f"all {self.total_iterations} iterations are done")
        if draws is not None:
            self.load_table(draws[None], None, self.iteration)
        if not self._table.covers(self.iteration):
            raise ValueError(f"no table was loaded that has iteration {self.iteration}; give draws or call load_table")
        phase, begun = self.phases.of(self.iteration), None
        try:
            self._table.seek(self.iteration)
            if phase != self.phase:
                self._forget()
                begun = NewImages(self._state, self.phases.next_images(phase, self._state.images, self.initial))
            losses = self._run()
        except Exception as error:
            self._iteration.gradient = None
            if isinstance(error, torch.OutOfMemoryError):
                traceback.clear_frames(error.__traceback__)  # they hold the activations
            self._table.settle(False)
            if begun is not None:
                self._resized.clear()
                begun.undo()
            raise
        self._table.settle(True)
        self.iteration, self.phase = self.iteration + 1, phase
        return losses

    def _run(self) -> Tensor:
        """The coming iteration, replayed where it was recorded."""
        tasks = self.schedule.tasks(self.iteration)
        if self._captures is None:
            return self._iteration.run(self._state, tasks, self._table)
        kind = self.schedule.kind(self.iteration)
        losses = self._captures.run(kind, lambda: self._iteration.run(self._state, tasks, self._table))
        if self._captures.replayed:
            self._iteration.gradient = None
        return losses

    def _forget(self) -> None:
        """What a phase's images were prepared with."""
        if self._captures is not None:
            self._captures.clear()
        self._resized.clear()

    def counters(self) -> dict[str, int]:
        """The part of the state that lives on the host."""
        return {"iteration": self.iteration, "phase": self.phase}

    def tensors(self) -> dict[str, Tensor]:
        """The part of the state that lives on the device: images and moments by row, loss scales by segment."""
        return self._state.tensors()

    def state(self) -> dict[str, Any]:
        """What resuming needs, on the host."""
        return {**self.counters(), **{name: t.to("cpu", copy=True) for name, t in self.tensors().items()}}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` gave. Raises ValueError for images that are not of this step and phase."""
        phase = int(state["phase"])
        wanted = (len(self.initial), 3, self.phases.sizes[phase], self.phases.sizes[phase])
        for name in BY_ROW:
            if tuple(state[name].shape) != wanted:
                raise ValueError(f"{name} of the state must be {list(wanted)}, got {list(state[name].shape)}")
        self._forget()
        self.iteration, self.phase = int(state["iteration"]), phase
        self._table.settle(False)
        self._state.load(state)
