"""Loss terms: a name, a weight and what is computed from a teacher's outputs; the two that every method has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fd2fast.settings.recipe import Recipe

if TYPE_CHECKING:  # torch is heavy, and only the step needs it
    from torch import Tensor

# Outputs that need the CAL head.
HEAD = frozenset({"attention", "z", "cal_logits"})
# Columns of the losses of every method; a method's further terms follow.
TERMS = ("total", "ce_backbone", "ce_cal", "bn", "l_f", "l_s")


class Outputs(Protocol):
    """What one teacher says of the augmented images of some segments: N rows, S segments.

    attention, z and cal_logits are there if a term of the method reads them.
    """

    recipe: Recipe
    index: int  # of the teacher
    images: Tensor  # [N, 3, H, W], augmented, normalised
    labels: Tensor  # int64 [N]
    logits: Tensor  # [N, K] of the backbone
    bn: Tensor  # [S]: BN matching of all layers
    attention: Tensor  # [N, M, h, w]
    z: Tensor  # [N, M*C], unit norm
    cal_logits: Tensor  # [N, K] of the CAL branch

    def mean(self, values: Tensor) -> Tensor:
        """[N] -> [S]: the mean over each segment's rows."""

    def cross_entropy(self, scores: Tensor) -> Tensor:
        """[N, K] -> [S], against the labels."""

    def characteristic_loss(self) -> Tensor:
        """L_F (Eq. 9) [S] of z against the teacher's prototypes."""

    def similarity_loss(self) -> Tensor | None:
        """L_S (Eq. 10) [S] of the attention against the finished images'; None where no row has any."""

    def where_at_least(self, values: Tensor, threshold: float) -> Tensor:
        """The values, 0 where they are below the threshold."""


@dataclass(frozen=True)
class Term:
    """One term of a segment's loss: the loss is the sum of weight times value over the terms, in their order."""

    # Its column in the recorded losses. Terms of one name share one value.
    name: str
    # Of the recipe and the teacher's share of the CAL branch (0 without FD2).
    weight: Callable[[Recipe, float], float]
    # [S]; None: 0.
    value: Callable[[Outputs], Tensor | None]
    # What it reads beside logits and bn.
    reads: frozenset[str] = frozenset()
    # What of the value enters the sum; None: the value.
    counted: Callable[[Outputs, Tensor], Tensor] | None = None


CROSS_ENTROPY = Term("ce_backbone", lambda recipe, alpha: 1 - alpha, lambda out: out.cross_entropy(out.logits))
BN_MATCHING = Term("bn", lambda recipe, alpha: recipe.r_bn, lambda out: out.bn)
