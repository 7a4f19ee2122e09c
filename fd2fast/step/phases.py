"""The phases of a recipe: which iterations they take, the side of their images, and how each begins."""

from __future__ import annotations

import itertools

import torch.nn.functional as F
from torch import Tensor

from fd2fast.settings.recipe import Recipe


class Phases:
    """Phase p has the iterations begins[p] .. ends[p] - 1 and images of sizes[p] pixels."""

    def __init__(self, recipe: Recipe):
        self.sizes = recipe.sizes
        self.ends = tuple(itertools.accumulate(recipe.iterations))
        self.begins = (0, *self.ends[:-1])
        self._kept = recipe.residual

    def of(self, iteration: int) -> int:
        """The phase of an iteration; the last one for those after the end."""
        return next((phase for phase, end in enumerate(self.ends) if iteration < end), len(self.ends) - 1)

    def first_images(self, initial: Tensor) -> Tensor:
        """Where the first phase begins, from the initial images at full size."""
        return resized(initial, self.sizes[0]).clone()

    def next_images(self, phase: int, images: Tensor, initial: Tensor) -> Tensor:
        """Where a later phase begins: resized, with the initial image mixed back in (FADRM's residual)."""
        images = resized(images, self.sizes[phase])
        if self._kept < 1:
            images = self._kept * images + (1 - self._kept) * resized(initial, self.sizes[phase])
        return images.clone()


def resized(images: Tensor, size: int) -> Tensor:
    """[N, 3, S, S] -> [N, 3, size, size], bilinear; itself where it has that side."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
