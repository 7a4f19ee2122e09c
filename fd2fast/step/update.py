"""The update of the pixels: Adam and a clamp; in fp16 with a loss scale for each segment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from fd2fast import ops
from fd2fast.settings.recipe import Recipe
from fd2fast.step.state import BY_ROW, State

_GROWTH_INTERVAL = 2000


class Update(Protocol):
    """What an iteration needs of an optimiser. The state is changed in place, nothing is asked of the host."""

    def scaled(self, total: Tensor, state: State, segments: Tensor) -> Tensor:
        """The losses [s] of some segments as they are run back."""

    def __call__(self, state: State, gradient: Tensor, rate: float | Tensor, number: int | Tensor) -> Tensor:
        """Take one step; rate: learning rate, number: of the step in its phase, from 1. The gradient without its scale."""


class PixelAdam:
    """Adam, then a clamp to the range of pixels."""

    def __init__(self, recipe: Recipe, low: Tensor, high: Tensor):
        """low, high: [3] on the device."""
        self._settings: dict[str, Any] = {"betas": recipe.betas, "eps": recipe.adam_eps, "low": low, "high": high}

    def scaled(self, total: Tensor, state: State, segments: Tensor) -> Tensor:
        return total

    def __call__(self, state: State, gradient: Tensor, rate: float | Tensor, number: int | Tensor) -> Tensor:
        ops.adam_clamp_(state.images, gradient, state.exp_avg, state.exp_avg_sq, number, lr=rate, **self._settings)
        return gradient


class ScaledPixelAdam(PixelAdam):
    """The same with a loss scale: a segment whose gradient overflowed keeps its images and moments and halves its scale."""

    def __init__(self, recipe: Recipe, low: Tensor, high: Tensor, offsets: Sequence[int]):
        """offsets: row offsets [segments + 1]."""
        super().__init__(recipe, low, high)
        lengths = torch.tensor([end - first for first, end in zip(offsets, offsets[1:], strict=False)])
        self._owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(low.device)

    def scaled(self, total: Tensor, state: State, segments: Tensor) -> Tensor:
        return total * state.scale.index_select(0, segments)

    def __call__(self, state: State, gradient: Tensor, rate: float | Tensor, number: int | Tensor) -> Tensor:
        good = self._all_of(gradient.isfinite().flatten(1).all(dim=1), state)
        kept = good.index_select(0, self._owner)[:, None, None, None]
        scale = state.scale.index_select(0, self._owner)[:, None, None, None]
        gradient = torch.where(kept, gradient / scale, 0.0)
        before = {name: getattr(state, name).clone() for name in BY_ROW}
        super().__call__(state, gradient, rate, number)
        for name, old in before.items():
            now = getattr(state, name)
            now.copy_(torch.where(kept, now, old))
        clean = torch.where(good, state.clean + 1, 0.0)
        grown = clean >= _GROWTH_INTERVAL
        state.scale.copy_(torch.where(good, torch.where(grown, state.scale * 2, state.scale), state.scale / 2))
        state.clean.copy_(torch.where(grown, 0.0, clean))
        return gradient

    def _all_of(self, rows: Tensor, state: State) -> Tensor:
        """[segments]: whether it holds for all rows of the segment."""
        bad = torch.zeros_like(state.clean).index_add_(0, self._owner, (~rows).float())
        return bad == 0


def make_update(recipe: Recipe, low: Tensor, high: Tensor, offsets: Sequence[int]) -> Update:
    """The one for the recipe's precision."""
    if recipe.precision == "fp16":
        return ScaledPixelAdam(recipe, low, high, offsets)
    return PixelAdam(recipe, low, high)
