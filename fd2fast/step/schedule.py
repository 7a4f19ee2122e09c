"""Which teacher works on which segments in an iteration, with what weight and which finished images' attention."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fd2fast.settings.recipe import Recipe

# Turns of a round robin that are prepared; committees of many different lengths would take their product.
_MOST_TURNS = 1024

Kind = tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Priors:
    """Attention of finished images as a ragged list: row n has maps[offsets[n]:offsets[n + 1]], [P, M, h, w]."""

    maps: Tensor
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """The rows and segments of a step that one teacher works on in one iteration."""

    segments: tuple[int, ...]
    rows: Tensor | None  # int64; None: all rows
    offsets: tuple[int, ...]  # row offsets of the segments within the part
    labels: Tensor
    averaging: Tensor  # [segments, rows]: mean of each segment's rows
    index: Tensor  # int64: the segments, on the device


@dataclass(frozen=True)
class Task:
    """What one teacher does in one iteration."""

    teacher: int
    part: Part
    weights: Tensor | None  # [segments of the part]: the teacher's share of each; None: 1
    prior: Priors | None  # the part's, in the maps' own size


def segment_mean_matrix(offsets: Sequence[int], device: torch.device, dtype: torch.dtype) -> Tensor:
    """[S, N] with 1 / rows of segment s at its rows, so that its product with [N] gives the segment means."""
    matrix = torch.zeros(len(offsets) - 1, offsets[-1], dtype=dtype)
    for segment, (first, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        matrix[segment, first:end] = 1 / (end - first)
    return matrix.to(device)


def committee_weights(accuracies: Sequence[float], rule: str) -> list[float]:
    """Equal, or softmax(accuracy in percent / 5) (prior, CV-DD); they sum to 1."""
    if rule == "equal":
        return [1 / len(accuracies)] * len(accuracies)
    most = max(accuracies)
    powers = [math.exp((a - most) / 5) for a in accuracies]
    return [p / sum(powers) for p in powers]


class Schedule:
    """The tasks of each iteration of one period: iteration t has those at t modulo its length."""

    def __init__(
        self,
        recipe: Recipe,
        accuracies: Sequence[float],
        committees: Sequence[Sequence[int]],
        offsets: Sequence[int],
        labels: Tensor,
        priors: Sequence[Priors | None],
        dtype: torch.dtype,
        weights: Sequence[Mapping[int, float]] | None = None,
    ):
        """accuracies: of the teachers; labels: int64 [N] on the device; dtype: of the losses.

        weights[segment]: of its teachers by their index, in place of those that the recipe's rule gives.
        Raises ValueError for committees of so many different lengths that the turns do not repeat soon.
        """
        self._recipe, self._committees, self._offsets = recipe, committees, tuple(offsets)
        self._labels, self._priors, self._dtype = labels, priors, dtype
        self._weights: list[dict[int, float]] = [dict(own) for own in weights or ()] or [
            dict(zip(c, committee_weights([accuracies[i] for i in c], recipe.teacher_weights), strict=True))
            for c in committees
        ]
        self._parts: dict[tuple[int, ...], Part] = {}
        period = 1
        if recipe.teacher_schedule == "round_robin":
            period = math.lcm(*(len(c) for c in committees))
        if period > _MOST_TURNS:
            raise ValueError(f"committees must repeat within {_MOST_TURNS} iterations, theirs take {period}")
        self._turns = [self._tasks_of(t) for t in range(period)]

    def __len__(self) -> int:
        return len(self._turns)

    def tasks(self, iteration: int) -> tuple[Task, ...]:
        """What the teachers do in this iteration, one after the other."""
        return self._turns[iteration % len(self._turns)]

    def kind(self, iteration: int) -> Kind:
        """Which teachers work on which segments: iterations of one phase that agree in it differ in numbers only."""
        return tuple((task.teacher, task.part.segments) for task in self.tasks(iteration))

    def clear(self) -> None:
        """Let go of what was prepared."""
        self._turns.clear()
        self._parts.clear()

    def _turn(self, segment: int, iteration: int) -> dict[int, float]:
        """Teachers of a segment in an iteration with their weights."""
        committee = self._committees[segment]
        if self._recipe.teacher_schedule == "round_robin":
            return {committee[iteration % len(committee)]: 1.0}
        return self._weights[segment]

    def _tasks_of(self, iteration: int) -> tuple[Task, ...]:
        turns = [self._turn(segment, iteration) for segment in range(len(self._offsets) - 1)]
        tasks = []
        for index in sorted({teacher for turn in turns for teacher in turn}):
            part = self._part(tuple(s for s, turn in enumerate(turns) if index in turn))
            shares = [turns[s][index] for s in part.segments]
            weights = torch.tensor(shares, dtype=self._dtype).to(self._labels.device)
            alone = all(share == 1.0 for share in shares)
            tasks.append(Task(index, part, None if alone else weights, self._prior(index, part)))
        return tuple(tasks)

    def _part(self, segments: tuple[int, ...]) -> Part:
        if segments not in self._parts:
            device = self._labels.device
            bounds = [(self._offsets[s], self._offsets[s + 1]) for s in segments]
            offsets = [0]
            for first, end in bounds:
                offsets.append(offsets[-1] + end - first)
            whole = len(segments) == len(self._offsets) - 1
            index = torch.cat([torch.arange(first, end) for first, end in bounds]).to(device)
            self._parts[segments] = Part(
                segments,
                None if whole else index,
                tuple(offsets),
                self._labels[index],
                segment_mean_matrix(offsets, device, self._dtype),
                torch.tensor(segments).to(device),
            )
        return self._parts[segments]

    def _prior(self, teacher: int, part: Part) -> Priors | None:
        """The prior attention of the part's rows; None where none of them has any."""
        whole = self._priors[teacher]
        if whole is None or len(whole.maps) == 0 or not self._recipe.fd2:
            return None
        if part.rows is None:
            return whole
        rows = [r for s in part.segments for r in range(self._offsets[s], self._offsets[s + 1])]
        positions = [j for r in rows for j in range(whole.offsets[r], whole.offsets[r + 1])]
        offsets = [0]
        for r in rows:
            offsets.append(offsets[-1] + whole.offsets[r + 1] - whole.offsets[r])
        index = torch.tensor(positions, dtype=torch.long).to(whole.maps.device)
        return Priors(whole.maps.index_select(0, index), tuple(offsets)) if positions else None


class ResizedPriors:
    """Tasks' prior attention at the size of a phase's maps, resized once (bilinear)."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, tuple[int, ...], tuple[int, ...]], Priors] = {}

    def at(self, task: Task, size: tuple[int, ...]) -> Priors | None:
        """The task's prior attention for maps of this height and width."""
        prior = task.prior
        if prior is None or tuple(prior.maps.shape[-2:]) == size:
            return prior
        key = (task.teacher, task.part.segments, size)
        if key not in self._known:
            maps = F.interpolate(prior.maps, size=size, mode="bilinear", align_corners=False)
            self._known[key] = Priors(maps, prior.offsets)
        return self._known[key]

    def clear(self) -> None:
        """Forget them: the next phase has maps of another size."""
        self._known.clear()
