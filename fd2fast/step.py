"""The grouped step: several segments of one wave optimised in one batch, each with its own loss, draws and statistics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fd2fast import ops
from fd2fast.config import DistillConfig
from fd2fast.errors import UserError
from fd2fast.models.fused import FusedTeacher, fuse
from fd2fast.models.teacher import Teacher

# Columns of the losses that `GroupedStep.iterate` returns.
TERMS = ("total", "ce_backbone", "ce_cal", "bn", "l_f", "l_s")

_FIRST_SCALE = 2.0**16
_GROWTH_INTERVAL = 2000


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
    ):
        """config: resolved. teachers: frozen, eval mode, on the device and in the type of `initial`; plain or already fused.

        initial: normalised [N, 3, S, S] at full size; labels: int [N]; offsets: row offsets [segments + 1]; low, high: [3];
        committees[segment]: indices of its teachers in their order (None: all); priors[teacher]: its attention of the
        finished images of the rows' classes and groups. Raises ValueError for shapes or teachers that do not fit.
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
        self._constants: dict[tuple[float, ...], Tensor] = {}
        self._resized_priors: dict[tuple[int, tuple[int, ...], tuple[int, ...]], Priors] = {}
        self._loss_dtype = torch.float64 if initial.dtype == torch.float64 else torch.float32

        self.iteration = 0  # finished, over all phases
        self.phase = 0
        self.images = self._resize(initial, config.sizes[0]).clone()
        self.exp_avg = torch.zeros_like(self.images)
        self.exp_avg_sq = torch.zeros_like(self.images)
        # fp16 only: loss scale of each segment and its iterations without overflow
        self.scale = torch.full((segments,), _FIRST_SCALE, device=self.device)
        self.clean = torch.zeros(segments, device=self.device)
        self.gradient: Tensor | None = None  # of the images, at the last iteration

    def _check(self) -> None:
        rows, segments = self.initial.shape[0], len(self.offsets) - 1
        size = self.config.sizes[-1] if self.config.sizes else 0
        if self.initial.shape != (rows, 3, size, size):
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
        for prior in self._priors:
            if prior is not None and (len(prior.offsets) != rows + 1 or prior.offsets[-1] != len(prior.maps)):
                raise ValueError(
                    f"prior offsets must be [{rows + 1}] ending with {len(prior.maps)}, got {prior.offsets}"
                )

    def _alpha(self, teacher: Any) -> float:
        if not self.config.fd2:
            return 0.0
        return float(teacher.alpha if self.config.alpha is None else self.config.alpha)

    def close(self) -> None:
        """Let go of the teachers and what was prepared for them."""
        self._fused.clear()
        self._parts.clear()
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

    def _enter_phase(self, phase: int) -> None:
        """Resize, mix the initial image back in (FADRM's residual), start Adam anew."""
        assert self.config.sizes is not None
        assert self.config.residual is not None
        share, size = self.config.residual, self.config.sizes[phase]
        images = self._resize(self.images, size)
        if share < 1:
            images = share * images + (1 - share) * self._resize(self.initial, size)
        self.images = images.clone()
        self.exp_avg = torch.zeros_like(self.images)
        self.exp_avg_sq = torch.zeros_like(self.images)
        self.phase = phase
        self._resized_priors.clear()

    def _turn(self, segment: int) -> dict[int, float]:
        """Teachers of a segment in the coming iteration with their weights."""
        committee = self.committees[segment]
        if self.config.teacher_schedule == "round_robin":
            return {committee[self.iteration % len(committee)]: 1.0}
        return self._weights[segment]

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
                torch.tensor(segments, device=self.device),
            )
        return self._parts[segments]

    def _prior(self, teacher: int, part: _Part, size: tuple[int, ...]) -> Priors | None:
        """The part's prior attention at the maps' size of this phase; resized once per phase (bilinear)."""
        whole = self._priors[teacher]
        if whole is None or len(whole.maps) == 0:
            return None
        key = (teacher, part.segments, size)
        if key not in self._resized_priors:
            maps, offsets = whole.maps, whole.offsets
            if part.rows is not None:
                rows = [r for s in part.segments for r in range(self.offsets[s], self.offsets[s + 1])]
                wanted = [j for r in rows for j in range(offsets[r], offsets[r + 1])]
                lengths = [offsets[r + 1] - offsets[r] for r in rows]
                offsets = tuple(sum(lengths[:i]) for i in range(len(lengths) + 1))
                maps = maps[torch.tensor(wanted, dtype=torch.long, device=maps.device)]
            if len(maps) and maps.shape[-2:] != size:
                maps = F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
            self._resized_priors[key] = Priors(maps, offsets)
        found = self._resized_priors[key]
        return found if len(found.maps) else None

    def _teacher_losses(self, index: int, view: Tensor, part: _Part) -> Tensor:
        """[segments of the part, TERMS] of one teacher, with its graph; column 0 is the weighted total (Eq. 12)."""
        config, teacher, alpha = self.config, self._fused[index], self._alphas[index]
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
            l_f = mean(ops.prototype_loss(out.z, prototypes, part.labels, beta=config.beta, eps=config.eps))
            total = total + alpha * ce_cal + config.lam * l_f
            prior = self._prior(index, part, tuple(out.attention.shape[-2:]))
            if prior is not None:
                attention = out.attention.to(self._loss_dtype)
                l_s = mean(ops.attention_similarity_loss(attention, prior.maps, prior.offsets, eps=config.eps))
                kept = l_s if config.ls_threshold is None else torch.where(l_s >= config.ls_threshold, l_s, zero)
                total = total + (1 - config.lam) * kept
            if config.keep_base_ce:
                total = total + ce_backbone
        return torch.stack([total, ce_backbone, ce_cal, bn, l_f, l_s], dim=1)

    def iterate(self, draws: Tensor) -> Tensor:
        """One iteration of every segment; returns the losses before it, [segments, TERMS] on the device, no graph.

        draws: int [segments, 7] on the host, (top, left, height, width, flip, roll_down, roll_right) for images of
        side `size`. With several teachers in one iteration the losses are weighted sums over them.
        """
        config = self.config
        if self.finished:
            raise ValueError(f"all {self.total_iterations} iterations are done")
        phase = self._phase_of(self.iteration)
        if phase != self.phase:
            self._enter_phase(phase)
        images = self.images.detach().requires_grad_(True)
        view = ops.crop_flip_roll(images, draws, self.offsets, self.images.shape[-1])
        seen = view.detach().requires_grad_(True)  # teachers run back one by one, the adjoint of the view runs once

        turns = [self._turn(segment) for segment in range(len(self.offsets) - 1)]
        losses = torch.zeros(len(turns), len(TERMS), dtype=self._loss_dtype, device=self.device)
        for index in sorted({teacher for turn in turns for teacher in turn}):
            part = self._part(tuple(s for s, turn in enumerate(turns) if index in turn))
            weights = [turns[s][index] for s in part.segments]
            rows = seen if part.rows is None else seen.index_select(0, part.rows)
            found = self._teacher_losses(index, rows, part)
            if any(w != 1.0 for w in weights):
                found = found * self._constant(weights)[:, None]
            total = found[:, 0]
            if config.precision == "fp16":
                total = total * (self.scale.index_select(0, part.index))
            total.sum().backward()
            losses.index_add_(0, part.index, found.detach())
        (gradient,) = torch.autograd.grad(view, images, seen.grad)
        self._update(gradient)
        self.iteration += 1
        return losses

    def _constant(self, values: Sequence[float]) -> Tensor:
        """[len] on the device; each list is copied there once."""
        key = tuple(values)
        if key not in self._constants:
            self._constants[key] = torch.tensor(key, dtype=self._loss_dtype, device=self.device)
        return self._constants[key]

    def _update(self, gradient: Tensor) -> None:
        assert self.config.lr is not None
        assert self.config.iterations is not None
        lr = 0.5 * (1 + math.cos(math.pi * self.iteration / self.total_iterations)) * self.config.lr
        step = self.iteration - sum(self.config.iterations[: self.phase]) + 1
        settings: dict[str, Any] = {
            "lr": lr,
            "betas": self.config.betas,
            "eps": self.config.adam_eps,
            "low": self.low,
            "high": self.high,
        }
        if self.config.precision != "fp16":
            self.gradient = gradient
            ops.adam_clamp_(self.images, gradient, self.exp_avg, self.exp_avg_sq, step, **settings)
            return
        owner = torch.repeat_interleave(
            torch.arange(len(self.offsets) - 1, device=self.device),
            torch.tensor(_lengths(self.offsets), device=self.device),
            output_size=self.offsets[-1],
        )
        # a segment whose gradient overflowed keeps its images and moments and halves its scale
        good = self._segment_all(gradient.isfinite().flatten(1).all(dim=1), owner)
        kept = good[owner][:, None, None, None]
        gradient = torch.where(kept, gradient / self.scale[owner][:, None, None, None], 0.0)
        before = [t.clone() for t in (self.images, self.exp_avg, self.exp_avg_sq)]
        self.gradient = gradient
        ops.adam_clamp_(self.images, gradient, self.exp_avg, self.exp_avg_sq, step, **settings)
        for now, old in zip((self.images, self.exp_avg, self.exp_avg_sq), before, strict=True):
            now.copy_(torch.where(kept, now, old))
        self.clean = torch.where(good, self.clean + 1, 0.0)
        grown = self.clean >= _GROWTH_INTERVAL
        self.scale = torch.where(good, torch.where(grown, self.scale * 2, self.scale), self.scale / 2)
        self.clean = torch.where(grown, 0.0, self.clean)

    def _segment_all(self, rows: Tensor, owner: Tensor) -> Tensor:
        bad = torch.zeros(len(self.offsets) - 1, device=self.device).index_add_(0, owner, (~rows).float())
        return bad == 0

    def state(self) -> dict[str, Any]:
        """What resuming needs: iteration, phase, images, moments (and loss scales), on the host."""
        tensors = {name: getattr(self, name).detach().to("cpu", copy=True) for name in _STATE}
        return {"iteration": self.iteration, "phase": self.phase, **tensors}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` gave."""
        self.iteration, self.phase = int(state["iteration"]), int(state["phase"])
        for name in _STATE:
            setattr(self, name, state[name].to(self.device))


_STATE = ("images", "exp_avg", "exp_avg_sq", "scale", "clean")


def _lengths(offsets: Sequence[int]) -> list[int]:
    return [end - first for first, end in zip(offsets, offsets[1:], strict=False)]


def check_losses(losses: Iterable[float], segment: int, iteration: int) -> None:
    """UserError when a loss that was read back is not finite."""
    if not all(math.isfinite(value) for value in losses):
        raise UserError(
            f"the losses of segment {segment} are not finite at iteration {iteration}: lower lr or r_bn, or use fp32"
        )
