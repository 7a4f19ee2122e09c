"""The grouped step: several segments of one wave optimised in one batch, each with its own loss, draws and statistics."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fd2fast import ops
from fd2fast.capture import Captures, CudaRecorder
from fd2fast.config import DistillConfig
from fd2fast.errors import UserError
from fd2fast.models import cpu
from fd2fast.models.frozen import prototype_loss
from fd2fast.models.fused import FusedTeacher, fuse
from fd2fast.models.teacher import Teacher
from fd2fast.tables import COLUMNS, DeviceTable, HostTable

# Columns of the losses that `GroupedStep.iterate` returns.
TERMS = ("total", "ce_backbone", "ce_cal", "bn", "l_f", "l_s")

_FIRST_SCALE = 2.0**16
_GROWTH_INTERVAL = 2000
# Turns of a round robin that are prepared; committees of many different lengths would take their product.
_MOST_TURNS = 1024


@dataclass(frozen=True)
class Priors:
    """Attention of finished images as a ragged list: row n has maps[offsets[n]:offsets[n + 1]], [P, M, h, w]."""

    maps: Tensor
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class _Part:
    """The rows and segments of a step that one teacher works on in one iteration."""

    segments: tuple[int, ...]
    rows: Tensor | None  # int64; None: all rows
    offsets: tuple[int, ...]  # row offsets of the segments within the part
    labels: Tensor
    averaging: Tensor  # [segments, rows]: mean of each segment's rows
    index: Tensor  # int64: the segments, on the device


@dataclass(frozen=True)
class _Task:
    """What one teacher does in one iteration."""

    teacher: int
    part: _Part
    weights: Tensor | None  # [segments of the part]: the teacher's share of each; None: 1
    prior: Priors | None  # the part's, in the maps' own size


# The state that an iteration changes, in place.
_STATE = ("images", "exp_avg", "exp_avg_sq", "scale", "clean")


def map_dtype(precision: str, dtype: torch.dtype) -> torch.dtype:
    """The type of a fused teacher's maps: bf16 or fp16 where `precision` says so, else `dtype`, that of the images."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, dtype)


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


class GroupedStep:
    """Images [N, 3, S, S] of several segments with their Adam moments, advanced one iteration at a time.

    The loss is the sum of the segments' losses, and each of those is a mean over the segment's own rows and its own BN
    statistics: in exact arithmetic no segment feels what shares the step with it.
    """

    def __init__(
        self,
        config: DistillConfig,
        teachers: Sequence[Teacher | FusedTeacher],
        initial: Tensor,
        labels: Tensor,
        offsets: Sequence[int],
        *,
        low: Tensor,
        high: Tensor,
        committees: Sequence[Sequence[int]] | None = None,
        priors: Sequence[Priors | None] | None = None,
        graphs: bool | None = None,
    ):
        """config: resolved. teachers: frozen, eval mode, on the device and in the type of `initial`; plain or already fused.

        initial: normalised [N, 3, S, S] at full size; labels: int [N]; offsets: row offsets [segments + 1]; low, high: [3];
        committees[segment]: indices of its teachers in their order (None: all); priors[teacher]: its attention of the
        finished images of the rows' classes and groups; graphs: replay iterations as CUDA graphs (None: on a GPU).
        Raises ValueError for shapes, labels or teachers that do not fit, and for graphs without a GPU.
        """
        assert config.iterations is not None
        assert config.sizes is not None
        self.config = config
        self.teachers = list(teachers)
        self.offsets = tuple(int(o) for o in offsets)
        self.labels = labels.to(initial.device)
        self.initial = initial
        self.device = initial.device
        self.low, self.high = low.to(initial), high.to(initial)
        self.total_iterations = sum(config.iterations)
        segments = len(self.offsets) - 1
        everyone = tuple(range(len(self.teachers)))
        self.committees = [tuple(c) for c in committees] if committees is not None else [everyone] * segments
        self._priors = list(priors) if priors is not None else [None] * len(self.teachers)
        on_gpu = self.device.type == "cuda"
        if not on_gpu:
            cpu.keep_memory()
        if graphs and not on_gpu:
            raise ValueError(f"graphs need a GPU, the images are on {self.device}")
        self._check()
        self._weights = [
            dict(
                zip(
                    c,
                    committee_weights([teachers[i].accuracy for i in c], config.teacher_weights or "equal"),
                    strict=True,
                )
            )
            for c in self.committees
        ]
        self._alphas = [self._alpha(teacher) for teacher in self.teachers]
        maps = map_dtype(config.precision, initial.dtype)
        self._fused = [t if isinstance(t, FusedTeacher) else fuse(t, maps) for t in self.teachers]
        self._parts: dict[tuple[int, ...], _Part] = {}
        self._resized_priors: dict[tuple[int, tuple[int, ...], tuple[int, ...]], Priors] = {}
        self._loss_dtype = torch.float64 if initial.dtype == torch.float64 else torch.float32
        self._owner = torch.repeat_interleave(torch.arange(segments), torch.tensor(_lengths(self.offsets)))
        self._owner = self._owner.to(self.device)
        self._schedule = self._make_schedule()
        self._table: HostTable | DeviceTable = DeviceTable(segments, self.device) if on_gpu else HostTable()
        self._captures = Captures(CudaRecorder(self.device)) if graphs or (graphs is None and on_gpu) else None

        self.iteration = 0  # finished, over all phases
        self.phase = 0
        self.images = self._resize(initial, config.sizes[0]).clone()
        self.exp_avg = torch.zeros_like(self.images)
        self.exp_avg_sq = torch.zeros_like(self.images)
        # fp16 only: loss scale of each segment and its iterations without overflow
        self.scale = torch.full((segments,), _FIRST_SCALE, device=self.device)
        self.clean = torch.zeros(segments, device=self.device)
        # of the images, at the last iteration; None after one that a graph replayed
        self.gradient: Tensor | None = None

    def _check(self) -> None:
        rows, segments = self.initial.shape[0], len(self.offsets) - 1
        size = self.config.sizes[-1] if self.config.sizes else 0
        if self.initial.ndim != 4 or self.initial.shape != (rows, 3, size, size):
            raise ValueError(f"initial must be [N, 3, {size}, {size}], got {list(self.initial.shape)}")
        if segments < 1 or self.offsets[0] != 0 or self.offsets[-1] != rows or min(_lengths(self.offsets)) < 1:
            raise ValueError(f"offsets must rise from 0 to the {rows} rows, got {self.offsets}")
        if tuple(self.labels.shape) != (rows,):
            raise ValueError(f"labels must be [{rows}], got {list(self.labels.shape)}")
        if len(self.committees) != segments or any(not c for c in self.committees):
            raise ValueError(
                f"committees must name at least one teacher for each of {segments} segments, got {self.committees}"
            )
        if len(self._priors) != len(self.teachers):
            raise ValueError(f"priors must be given for each of {len(self.teachers)} teachers, got {len(self._priors)}")
        for teacher in self.teachers:
            training = [name for name, layer in teacher.bn_layers() if layer.training]
            if training:
                raise ValueError(f"teacher {teacher.name} must be in eval mode, but {training[0]} is in train mode")
        sides = {teacher.name: teacher.size for teacher in self.teachers}
        if len(set(sides.values())) > 1:
            raise ValueError(f"teachers must all be made for images of one side, got {sides}")
        classes = min(teacher.classes for teacher in self.teachers)
        if not 0 <= int(self.labels.min()) <= int(self.labels.max()) < classes:
            raise ValueError(
                f"labels must lie in [0, {classes}), got {int(self.labels.min())} to {int(self.labels.max())}"
            )
        strangers = [i for c in self.committees for i in c if not 0 <= i < len(self.teachers)]
        if strangers:
            raise ValueError(f"committees must name teachers in [0, {len(self.teachers)}), got {strangers[0]}")
        for teacher, prior in zip(self.teachers, self._priors, strict=True):
            if prior is None:
                continue
            if prior.maps.ndim != 4 or prior.maps.shape[1] != teacher.attention_maps:
                wanted = f"[P, {teacher.attention_maps}, h, w]"
                raise ValueError(f"priors of {teacher.name} must be {wanted}, got {list(prior.maps.shape)}")
            if len(prior.offsets) != rows + 1 or prior.offsets[-1] != len(prior.maps):
                raise ValueError(
                    f"prior offsets must be [{rows + 1}] ending with {len(prior.maps)}, got {prior.offsets}"
                )

    def _alpha(self, teacher: Any) -> float:
        if not self.config.fd2:
            return 0.0
        return float(teacher.alpha if self.config.alpha is None else self.config.alpha)

    def close(self) -> None:
        """Let go of the teachers, of recorded iterations and of what was prepared for them."""
        if self._captures is not None:
            self._captures.clear()
        self._fused.clear()
        self._parts.clear()
        self._schedule.clear()
        self._resized_priors.clear()

    def __enter__(self) -> GroupedStep:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()

    @property
    def finished(self) -> bool:
        return self.iteration >= self.total_iterations

    @property
    def size(self) -> int:
        """Side of the images in the coming iteration."""
        assert self.config.sizes is not None
        return self.config.sizes[self._phase_of(self.iteration)]

    @property
    def phase_end(self) -> int:
        """First iteration after the phase of the coming iteration."""
        assert self.config.iterations is not None
        return sum(self.config.iterations[: self._phase_of(self.iteration) + 1])

    def _phase_of(self, iteration: int) -> int:
        assert self.config.iterations is not None
        end = 0
        for phase, budget in enumerate(self.config.iterations):
            end += budget
            if iteration < end:
                return phase
        return len(self.config.iterations) - 1

    def _resize(self, images: Tensor, size: int) -> Tensor:
        if images.shape[-1] == size:
            return images
        return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)

    def _enter_phase(self, phase: int) -> dict[str, Tensor]:
        """Resize, mix the initial image back in (FADRM's residual), start Adam anew; what was there before."""
        assert self.config.sizes is not None
        assert self.config.residual is not None
        if self._captures is not None:
            self._captures.clear()
        self._resized_priors.clear()
        share, size = self.config.residual, self.config.sizes[phase]
        images = self._resize(self.images, size)
        if share < 1:
            images = share * images + (1 - share) * self._resize(self.initial, size)
        images = images.clone()
        moments = [torch.zeros_like(images) for _ in range(2)]
        # kept until the first iteration of the phase has succeeded; on the host, where a GPU's memory is the limit
        before = {name: getattr(self, name).to("cpu") for name in _STATE[:3]}
        self.images, (self.exp_avg, self.exp_avg_sq) = images, moments
        self.phase = phase
        return before

    def _leave_phase(self, phase: int, before: dict[str, Tensor]) -> None:
        """Undo `_enter_phase`."""
        self._resized_priors.clear()
        self.phase = phase
        for name in before:
            setattr(self, name, None)
        for name, tensor in before.items():
            setattr(self, name, tensor.to(self.device))

    def _turn(self, segment: int, iteration: int) -> dict[int, float]:
        """Teachers of a segment in an iteration with their weights."""
        committee = self.committees[segment]
        if self.config.teacher_schedule == "round_robin":
            return {committee[iteration % len(committee)]: 1.0}
        return self._weights[segment]

    def _make_schedule(self) -> list[tuple[_Task, ...]]:
        """The tasks of each iteration of one period: iteration t has those at t modulo the length."""
        period = 1
        if self.config.teacher_schedule == "round_robin":
            period = math.lcm(*(len(c) for c in self.committees))
        if period > _MOST_TURNS:
            raise ValueError(f"committees must repeat within {_MOST_TURNS} iterations, theirs take {period}")
        schedule = []
        for t in range(period):
            turns = [self._turn(segment, t) for segment in range(len(self.offsets) - 1)]
            tasks = []
            for index in sorted({teacher for turn in turns for teacher in turn}):
                part = self._part(tuple(s for s, turn in enumerate(turns) if index in turn))
                weights = [turns[s][index] for s in part.segments]
                given = torch.tensor(weights, dtype=self._loss_dtype).to(self.device)
                only = all(w == 1.0 for w in weights)
                tasks.append(_Task(index, part, None if only else given, self._part_prior(index, part)))
            schedule.append(tuple(tasks))
        return schedule

    def _part(self, segments: tuple[int, ...]) -> _Part:
        if segments not in self._parts:
            bounds = [(self.offsets[s], self.offsets[s + 1]) for s in segments]
            offsets = [0]
            for first, end in bounds:
                offsets.append(offsets[-1] + end - first)
            whole = len(segments) == len(self.offsets) - 1
            index = torch.cat([torch.arange(first, end) for first, end in bounds]).to(self.device)
            self._parts[segments] = _Part(
                segments,
                None if whole else index,
                tuple(offsets),
                self.labels[index],
                segment_mean_matrix(offsets, self.device, self._loss_dtype),
                torch.tensor(segments).to(self.device),
            )
        return self._parts[segments]

    def _part_prior(self, teacher: int, part: _Part) -> Priors | None:
        """The prior attention of the part's rows; None where none of them has any."""
        whole = self._priors[teacher]
        if whole is None or len(whole.maps) == 0 or not self.config.fd2:
            return None
        if part.rows is None:
            return whole
        rows = [r for s in part.segments for r in range(self.offsets[s], self.offsets[s + 1])]
        wanted = [j for r in rows for j in range(whole.offsets[r], whole.offsets[r + 1])]
        offsets = [0]
        for r in rows:
            offsets.append(offsets[-1] + whole.offsets[r + 1] - whole.offsets[r])
        index = torch.tensor(wanted, dtype=torch.long).to(whole.maps.device)
        return Priors(whole.maps.index_select(0, index), tuple(offsets)) if wanted else None

    def _prior(self, task: _Task, size: tuple[int, ...]) -> Priors | None:
        """The task's prior attention at the maps' size of this phase; resized once per phase (bilinear)."""
        prior = task.prior
        if prior is None or tuple(prior.maps.shape[-2:]) == size:
            return prior
        key = (task.teacher, task.part.segments, size)
        if key not in self._resized_priors:
            maps = F.interpolate(prior.maps, size=size, mode="bilinear", align_corners=False)
            self._resized_priors[key] = Priors(maps, prior.offsets)
        return self._resized_priors[key]

    def _teacher_losses(self, task: _Task, view: Tensor) -> Tensor:
        """[segments of the part, TERMS] of one teacher, with its graph; column 0 is the weighted total (Eq. 12).

        Not compiled: on a CPU torch.compile takes head and losses from 4.0 to 2.3 ms of an iteration's 388 (ResNet-18, 10
        images of 224 x 224, bf16, one thread), for half a minute of compilation.
        """
        config, part = self.config, task.part
        teacher, alpha = self._fused[task.teacher], self._alphas[task.teacher]
        assert config.r_bn is not None
        assert config.lam is not None
        first = config.first_bn_multiplier
        if config.fd2:
            # the CAL head's own BN counts only when its branch does
            out, bn = teacher(view, part.offsets, first_bn_multiplier=first, cal_bn=alpha > 0)
            logits = out.logits
        else:
            logits, bn = teacher.backbone_logits(view, part.offsets, first_bn_multiplier=first)
        zero = torch.zeros_like(bn)

        def mean(values: Tensor) -> Tensor:
            return (part.averaging * values.to(self._loss_dtype)).sum(dim=1)

        def cross_entropy(scores: Tensor) -> Tensor:
            return mean(F.cross_entropy(scores.to(self._loss_dtype), part.labels, reduction="none"))

        ce_backbone = cross_entropy(logits)
        ce_cal, l_f, l_s = zero, zero, zero
        total = (1 - alpha) * ce_backbone + config.r_bn * bn
        if config.fd2:
            ce_cal = cross_entropy(out.cal_logits)
            prototypes = teacher.prototypes_ema if config.prototypes == "ema" else teacher.prototypes_last
            l_f = mean(prototype_loss(out.z, prototypes, part.labels, beta=config.beta, eps=config.eps))
            total = total + alpha * ce_cal + config.lam * l_f
            prior = self._prior(task, tuple(out.attention.shape[-2:]))
            if prior is not None:
                attention = out.attention.to(self._loss_dtype)
                l_s = mean(ops.attention_similarity_loss(attention, prior.maps, prior.offsets, eps=config.eps))
                kept = l_s if config.ls_threshold is None else torch.where(l_s >= config.ls_threshold, l_s, zero)
                total = total + (1 - config.lam) * kept
            if config.keep_base_ce:
                total = total + ce_backbone
        return torch.stack([total, ce_backbone, ce_cal, bn, l_f, l_s], dim=1)

    def load_table(self, params: Tensor | NDArray[Any], rates: Tensor | NDArray[Any] | None, first: int) -> None:
        """The parameters of the iterations first .. first + T - 1, for `iterate` without draws; copied before it returns.

        params: int [T, segments, 7] on the host, columns as in `iterate`, crops inside images of their phase's side;
        rates: float64 [T], None: the cosine of the settings. Raises ValueError for shapes, types or values that do not fit.
        """
        assert self.config.lr is not None
        draws = torch.as_tensor(params)
        segments, count = len(self.offsets) - 1, len(draws) if draws.ndim else 0
        if draws.is_floating_point() or count < 1 or draws.shape != (count, segments, COLUMNS):
            raise ValueError(f"params must be int [T, {segments}, {COLUMNS}], got {draws.dtype} {list(draws.shape)}")
        if first < 0 or first + count > self.total_iterations:
            raise ValueError(
                f"a table of {count} rows from iteration {first} leaves the {self.total_iterations} iterations"
            )
        if rates is None:
            angles = [math.pi * t / self.total_iterations for t in range(first, first + count)]
            rates = torch.tensor([0.5 * (1 + math.cos(a)) * self.config.lr for a in angles], dtype=torch.float64)
        rates = torch.as_tensor(rates)
        if rates.shape != (count,) or rates.dtype != torch.float64:
            raise ValueError(f"rates must be float64 [{count}], got {rates.dtype} {list(rates.shape)}")
        draws = draws.cpu()
        self._check_draws(draws, first)
        begins = [self._begin(self._phase_of(t)) for t in range(first, first + count)]
        numbers = torch.arange(first + 1, first + count + 1) - torch.tensor(begins)
        if self._table.load(draws, rates, numbers, first) and self._captures is not None:
            self._captures.clear()

    def _check_draws(self, draws: Tensor, first: int) -> None:
        assert self.config.sizes is not None
        lines = draws.numpy().astype(np.int64)
        sizes = np.array([self.config.sizes[self._phase_of(t)] for t in range(first, first + len(lines))])[:, None]
        top, left, height, width, flip = (lines[:, :, c] for c in range(5))
        outside = (top < 0) | (left < 0) | (height < 1) | (width < 1) | (top + height > sizes) | (left + width > sizes)
        bad = np.argwhere(outside | (flip < 0) | (flip > 1))
        if len(bad):
            t, segment = (int(v) for v in bad[0])
            raise ValueError(
                f"params of iteration {first + t}, segment {segment} must be a crop inside {int(sizes[t, 0])} pixels and a "
                f"flip of 0 or 1, got {lines[t, segment].tolist()}"
            )

    def _begin(self, phase: int) -> int:
        """First iteration of a phase."""
        assert self.config.iterations is not None
        return sum(self.config.iterations[:phase])

    def iterate(self, draws: Tensor | None = None) -> Tensor:
        """One iteration of every segment; returns the losses before it, [segments, TERMS] on the device, no graph.

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
        phase, begun = self.phase, None
        try:
            self._table.seek(self.iteration)
            if self._phase_of(self.iteration) != phase:
                begun = self._enter_phase(self._phase_of(self.iteration))
            turn = self.iteration % len(self._schedule)
            if self._captures is None:
                losses = self._work(turn)
            else:
                losses = self._captures.run(self._kind(turn), lambda: self._work(turn))
                if self._captures.replayed:
                    self.gradient = None
        except Exception as error:
            self.gradient = None
            if isinstance(error, torch.OutOfMemoryError):
                traceback.clear_frames(error.__traceback__)  # they hold the activations
            self._table.settle(False)
            if begun is not None:
                self._leave_phase(phase, begun)
            raise
        self._table.settle(True)
        self.iteration += 1
        return losses

    def _kind(self, turn: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
        """Which teachers work on which segments: iterations of one phase that agree in it differ in numbers only."""
        return tuple((task.teacher, task.part.segments) for task in self._schedule[turn])

    def _work(self, turn: int) -> Tensor:
        """The iteration itself: reads the table's current row, changes the state in place, asks nothing of the host."""
        self.gradient = None  # not beside the activations
        row = self._table.row()
        images = self.images.detach().requires_grad_(True)
        tasks = self._schedule[turn]
        # as the one teacher reads it; several teachers' gradients are summed in the images' own type
        dtype = self._fused[tasks[0].teacher].dtype if len(tasks) == 1 else images.dtype
        view = ops.crop_flip_roll(
            images, row.draws, self.offsets, images.shape[-1], dtype=dtype, memory_format=torch.channels_last
        )
        seen = view.detach().requires_grad_(True)  # teachers run back one by one, the adjoint of the view runs once
        losses = torch.zeros(len(self.offsets) - 1, len(TERMS), dtype=self._loss_dtype, device=self.device)
        for task in tasks:
            part = task.part
            rows = seen if part.rows is None else seen.index_select(0, part.rows)
            found = self._teacher_losses(task, rows)
            if task.weights is not None:
                found = found * task.weights[:, None]
            total = found[:, 0]
            if self.config.precision == "fp16":
                total = total * self.scale.index_select(0, part.index)
            total.sum().backward()
            losses.index_add_(0, part.index, found.detach())
        (gradient,) = torch.autograd.grad(view, images, seen.grad)
        del view, seen
        self._update(gradient, row.rate, row.number)
        self._table.advance()
        return losses

    def _update(self, gradient: Tensor, rate: float | Tensor, number: int | Tensor) -> None:
        settings: dict[str, Any] = {
            "lr": rate,
            "betas": self.config.betas,
            "eps": self.config.adam_eps,
            "low": self.low,
            "high": self.high,
        }
        if self.config.precision != "fp16":
            self.gradient = gradient
            ops.adam_clamp_(self.images, gradient, self.exp_avg, self.exp_avg_sq, number, **settings)
            return
        # a segment whose gradient overflowed keeps its images and moments and halves its scale
        good = self._segment_all(gradient.isfinite().flatten(1).all(dim=1))
        kept = good.index_select(0, self._owner)[:, None, None, None]
        scale = self.scale.index_select(0, self._owner)[:, None, None, None]
        gradient = torch.where(kept, gradient / scale, 0.0)
        before = [t.clone() for t in (self.images, self.exp_avg, self.exp_avg_sq)]
        self.gradient = gradient
        ops.adam_clamp_(self.images, gradient, self.exp_avg, self.exp_avg_sq, number, **settings)
        for now, old in zip((self.images, self.exp_avg, self.exp_avg_sq), before, strict=True):
            now.copy_(torch.where(kept, now, old))
        clean = torch.where(good, self.clean + 1, 0.0)
        grown = clean >= _GROWTH_INTERVAL
        self.scale.copy_(torch.where(good, torch.where(grown, self.scale * 2, self.scale), self.scale / 2))
        self.clean.copy_(torch.where(grown, 0.0, clean))

    def _segment_all(self, rows: Tensor) -> Tensor:
        bad = torch.zeros(len(self.offsets) - 1, device=self.device).index_add_(0, self._owner, (~rows).float())
        return bad == 0

    def counters(self) -> dict[str, int]:
        """The part of the state that lives on the host."""
        return {"iteration": self.iteration, "phase": self.phase}

    def tensors(self) -> dict[str, Tensor]:
        """The part of the state that lives on the device: images and moments by row, loss scales by segment."""
        return {name: getattr(self, name).detach() for name in _STATE}

    def state(self) -> dict[str, Any]:
        """What resuming needs, on the host."""
        return {**self.counters(), **{name: t.to("cpu", copy=True) for name, t in self.tensors().items()}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` gave. Raises ValueError for images that are not of this step and phase."""
        assert self.config.sizes is not None
        phase = int(state["phase"])
        wanted = (len(self.initial), 3, self.config.sizes[phase], self.config.sizes[phase])
        for name in _STATE[:3]:
            if tuple(state[name].shape) != wanted:
                raise ValueError(f"{name} of the state must be {list(wanted)}, got {list(state[name].shape)}")
        if self._captures is not None:
            self._captures.clear()
        self._resized_priors.clear()
        self.iteration, self.phase = int(state["iteration"]), phase
        self._table.settle(False)
        for name in _STATE:
            setattr(self, name, state[name].to(self.device, copy=True))


def _lengths(offsets: Sequence[int]) -> list[int]:
    return [end - first for first, end in zip(offsets, offsets[1:], strict=False)]


def check_losses(losses: Iterable[float], segment: int, iteration: int) -> None:
    """UserError when a loss that was read back is not finite."""
    if not all(math.isfinite(value) for value in losses):
        raise UserError(
            f"the losses of segment {segment} are not finite at iteration {iteration}: lower lr or r_bn, or use fp32"
        )
