"""What a step refuses: shapes, labels, committees and draws that do not fit, and losses that are not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from fd2fast.errors import UserError
from fd2fast.models.fused import FusedTeacher
from fd2fast.models.teacher import Teacher
from fd2fast.settings.recipe import Recipe
from fd2fast.step.phases import Phases
from fd2fast.step.schedule import Priors
from fd2fast.step.tables import COLUMNS


def check_images(recipe: Recipe, initial: Tensor, labels: Tensor, offsets: Sequence[int]) -> None:
    """ValueError unless initial is [N, 3, S, S], labels [N], and the offsets rise from 0 to N."""
    rows, size = initial.shape[0], recipe.sizes[-1]
    if initial.ndim != 4 or initial.shape != (rows, 3, size, size):
        raise ValueError(f"initial must be [N, 3, {size}, {size}], got {list(initial.shape)}")
    lengths = [end - first for first, end in zip(offsets, offsets[1:], strict=False)]
    if not lengths or offsets[0] != 0 or offsets[-1] != rows or min(lengths) < 1:
        raise ValueError(f"offsets must rise from 0 to the {rows} rows, got {tuple(offsets)}")
    if tuple(labels.shape) != (rows,):
        raise ValueError(f"labels must be [{rows}], got {list(labels.shape)}")


def check_teachers(
    teachers: Sequence[Teacher | FusedTeacher], labels: Tensor, committees: Sequence[Sequence[int]], segments: int
) -> None:
    """ValueError unless the teachers can work on these labels, and each segment has some of them."""
    if len(committees) != segments or any(not c for c in committees):
        raise ValueError(
            f"committees must name at least one teacher for each of {segments} segments, got {list(committees)}"
        )
    for teacher in teachers:
        training = [name for name, layer in teacher.bn_layers() if layer.training]
        if training:
            raise ValueError(f"teacher {teacher.name} must be in eval mode, but {training[0]} is in train mode")
    sides = {teacher.name: teacher.size for teacher in teachers}
    if len(set(sides.values())) > 1:
        raise ValueError(f"teachers must all be made for images of one side, got {sides}")
    classes = min(teacher.classes for teacher in teachers)
    least, most = int(labels.min()), int(labels.max())
    if not 0 <= least <= most < classes:
        raise ValueError(f"labels must lie in [0, {classes}), got {least} to {most}")
    strangers = [i for c in committees for i in c if not 0 <= i < len(teachers)]
    if strangers:
        raise ValueError(f"committees must name teachers in [0, {len(teachers)}), got {strangers[0]}")


def check_priors(teachers: Sequence[Teacher | FusedTeacher], priors: Sequence[Priors | None], rows: int) -> None:
    """ValueError unless each teacher has prior attention of its own maps for the rows, or none."""
    if len(priors) != len(teachers):
        raise ValueError(f"priors must be given for each of {len(teachers)} teachers, got {len(priors)}")
    for teacher, prior in zip(teachers, priors, strict=True):
        if prior is None:
            continue
        if prior.maps.ndim != 4 or prior.maps.shape[1] != teacher.attention_maps:
            wanted = f"[P, {teacher.attention_maps}, h, w]"
            raise ValueError(f"priors of {teacher.name} must be {wanted}, got {list(prior.maps.shape)}")
        if len(prior.offsets) != rows + 1 or prior.offsets[-1] != len(prior.maps):
            raise ValueError(f"prior offsets must be [{rows + 1}] ending with {len(prior.maps)}, got {prior.offsets}")


def check_table(draws: Tensor, rates: Tensor, first: int, phases: Phases, segments: int) -> None:
    """ValueError unless draws are int [T, segments, 7] crops inside images of their phase's side, rates float64 [T]."""
    count = len(draws) if draws.ndim else 0
    if draws.is_floating_point() or count < 1 or draws.shape != (count, segments, COLUMNS):
        raise ValueError(f"params must be int [T, {segments}, {COLUMNS}], got {draws.dtype} {list(draws.shape)}")
    if first < 0 or first + count > phases.ends[-1]:
        raise ValueError(f"a table of {count} rows from iteration {first} leaves the {phases.ends[-1]} iterations")
    if rates.shape != (count,) or rates.dtype != torch.float64:
        raise ValueError(f"rates must be float64 [{count}], got {rates.dtype} {list(rates.shape)}")
    lines = draws.numpy().astype(np.int64)
    sizes = np.array([phases.sizes[phases.of(t)] for t in range(first, first + count)])[:, None]
    top, left, height, width, flip = (lines[:, :, c] for c in range(5))
    outside = (top < 0) | (left < 0) | (height < 1) | (width < 1) | (top + height > sizes) | (left + width > sizes)
    bad = np.argwhere(outside | (flip < 0) | (flip > 1))
    if len(bad):
        t, segment = (int(v) for v in bad[0])
        raise ValueError(
            f"params of iteration {first + t}, segment {segment} must be a crop inside {int(sizes[t, 0])} pixels and a "
            f"flip of 0 or 1, got {lines[t, segment].tolist()}"
        )


def check_losses(losses: Iterable[float], segment: int, iteration: int) -> None:
    """UserError when a loss that was read back is not finite."""
    if not all(math.isfinite(value) for value in losses):
        raise UserError(
            f"the losses of segment {segment} are not finite at iteration {iteration}: lower lr or r_bn, or use fp32"
        )
