"""FD2 on top of any method: the CAL branch's share of the classification loss, L_F and L_S (Eq. 8 to 12)."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from fd2fast.methods.losses import CROSS_ENTROPY, Outputs, Term
from fd2fast.methods.method import Method
from fd2fast.settings.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor


def with_fd2(method: Method) -> Method:
    """The same method with FD2 on top."""
    return dataclasses.replace(method, summary=f"{method.summary}, with FD2", fields={**method.fields, "fd2": True})


def terms_of(recipe: Recipe) -> tuple[Term, ...]:
    """What FD2 adds to the method's own terms."""
    if not recipe.fd2:
        return ()
    return (_CAL_CROSS_ENTROPY, _CHARACTERISTIC, _SIMILARITY, *((_BASE,) if recipe.keep_base_ce else ()))


def _above_threshold(out: Outputs, value: Tensor) -> Tensor:
    threshold = out.recipe.ls_threshold
    return value if threshold is None else out.where_at_least(value, threshold)


_CAL_CROSS_ENTROPY = Term(
    "ce_cal", lambda recipe, alpha: alpha, lambda out: out.cross_entropy(out.cal_logits), frozenset({"cal_logits"})
)
_CHARACTERISTIC = Term("l_f", lambda recipe, alpha: recipe.lam, lambda out: out.characteristic_loss(), frozenset({"z"}))
_SIMILARITY = Term(
    "l_s",
    lambda recipe, alpha: 1 - recipe.lam,
    lambda out: out.similarity_loss(),
    frozenset({"attention"}),
    counted=_above_threshold,
)
# Eq. 12 read literally
_BASE = dataclasses.replace(CROSS_ENTROPY, weight=lambda recipe, alpha: 1.0)
