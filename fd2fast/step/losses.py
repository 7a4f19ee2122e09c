"""The losses of an iteration: each teacher's outputs on the view, the method's terms of them, and their weighted sum."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fd2fast import ops
from fd2fast.methods import HEAD, Term, columns_of, losses_of
from fd2fast.models.fused import FusedTeacher
from fd2fast.settings.recipe import Recipe
from fd2fast.step.schedule import ResizedPriors, Task


class TeacherOutputs:
    """One teacher on the view of a task's rows; fd2fast.methods.losses.Outputs says what is in it."""

    attention: Tensor
    z: Tensor
    cal_logits: Tensor

    def __init__(
        self,
        recipe: Recipe,
        teacher: FusedTeacher,
        alpha: float,
        task: Task,
        images: Tensor,
        priors: ResizedPriors,
        *,
        with_head: bool,
        dtype: torch.dtype,
    ):
        self.recipe, self.teacher, self.task, self.images = recipe, teacher, task, images
        self.index = task.teacher
        self.labels, self.priors, self.dtype = task.part.labels, priors, dtype
        first, offsets = recipe.first_bn_multiplier, task.part.offsets
        if with_head:
            # the CAL head's own BN counts only when its branch does
            out, self.bn = teacher(images, offsets, first_bn_multiplier=first, cal_bn=alpha > 0)
            self.logits, self.cal_logits, self.z, self.attention = out.logits, out.cal_logits, out.z, out.attention
        else:
            self.logits, self.bn = teacher.backbone_logits(images, offsets, first_bn_multiplier=first)

    def mean(self, values: Tensor) -> Tensor:
        return (self.task.part.averaging * values.to(self.dtype)).sum(dim=1)

    def cross_entropy(self, scores: Tensor) -> Tensor:
        return self.mean(F.cross_entropy(scores.to(self.dtype), self.labels, reduction="none"))

    def characteristic_loss(self) -> Tensor:
        recipe, teacher = self.recipe, self.teacher
        prototypes = teacher.prototypes_ema if recipe.prototypes == "ema" else teacher.prototypes_last
        return self.mean(ops.prototype_loss(self.z, prototypes, self.labels, beta=recipe.beta, eps=recipe.eps))

    def similarity_loss(self) -> Tensor | None:
        prior = self.priors.at(self.task, tuple(self.attention.shape[-2:]))
        if prior is None:
            return None
        attention = self.attention.to(self.dtype)
        return self.mean(ops.attention_similarity_loss(attention, prior.maps, prior.offsets, eps=self.recipe.eps))

    def where_at_least(self, values: Tensor, threshold: float) -> Tensor:
        return torch.where(values >= threshold, values, torch.zeros_like(values))


class Losses:
    """The terms of a recipe's method, for tasks of its teachers."""

    def __init__(
        self,
        recipe: Recipe,
        teachers: Sequence[FusedTeacher],
        priors: ResizedPriors,
        dtype: torch.dtype,
        terms: Sequence[Term] | None = None,
    ):
        """dtype: of the losses, fp64 or fp32; terms: other ones than the method's."""
        self.teachers, self.dtype = list(teachers), dtype
        self._recipe, self._priors = recipe, priors
        self._alphas = [_alpha(recipe, teacher) for teacher in teachers]
        self._terms = tuple(terms) if terms is not None else losses_of(recipe)
        self._with_head = any(term.reads & HEAD for term in self._terms)
        self.columns = columns_of(recipe, self._terms)

    def of(self, task: Task, view: Tensor) -> Tensor:
        """[segments of the task, columns] with its graph; column 0 is the weighted total (Eq. 12). view: the task's rows.

        Not compiled: on a CPU torch.compile takes head and losses from 4.0 to 2.3 ms of an iteration's 388 (ResNet-18, 10
        images of 224 x 224, bf16, one thread), for half a minute of compilation.
        """
        alpha = self._alphas[task.teacher]
        out = TeacherOutputs(
            self._recipe,
            self.teachers[task.teacher],
            alpha,
            task,
            view,
            self._priors,
            with_head=self._with_head,
            dtype=self.dtype,
        )
        values: dict[str, Tensor] = {}
        total: Tensor | None = None
        for term in self._terms:
            value = values[term.name] if term.name in values else term.value(out)
            if value is None:
                continue
            values[term.name] = value
            counted = value if term.counted is None else term.counted(out, value)
            weighted = term.weight(self._recipe, alpha) * counted
            total = weighted if total is None else total + weighted
        zero = torch.zeros_like(out.bn)
        columns = [zero if total is None else total, *(values.get(name, zero) for name in self.columns[1:])]
        return torch.stack(columns, dim=1)

    def clear(self) -> None:
        """Let go of the teachers."""
        self.teachers.clear()


def _alpha(recipe: Recipe, teacher: FusedTeacher) -> float:
    """The teacher's share of the CAL branch."""
    if not recipe.fd2:
        return 0.0
    return float(teacher.alpha if recipe.alpha is None else recipe.alpha)
