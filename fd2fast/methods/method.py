"""What a method is made of: teachers, loss terms, initial patches and the settings that it fills in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from fd2fast.methods.losses import BN_MATCHING, CROSS_ENTROPY, Term
from fd2fast.settings.config import DistillConfig
from fd2fast.settings.recipe import Recipe

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """A method that optimises images.

    Phases (`sizes`, `iterations`, `residual`), the teachers' schedule and every other setting are fields of DistillConfig, which
    the user's own values override. Sizes are written for 224 pixels and scaled to the data set's images.
    """

    # One line for lists of methods.
    summary: str
    # Settings for every semantics.
    fields: Settings
    # Settings of one semantics.
    paper: Settings
    released: Settings
    # Fewest teachers.
    least: int = 1
    # Most teachers; None: any number.
    most: int | None = 1
    # What a segment's loss is the sum of; FD2's terms follow where the recipe has them.
    losses: tuple[Term, ...] = (CROSS_ENTROPY, BN_MATCHING)
    # Cells along one side of the patches it starts from; None: it starts from none.
    patch_factor: int | None = 2
    # Smallest area share of the crop of an iteration; None: the recipe's `min_crop` in all of them.
    smallest_crop: Callable[[Recipe, int], float] | None = None
    # Which images share BN statistics: one of each class of a block, or the images of one class.
    layout: Literal["across", "within"] = "across"
    # Settings of the published code for one data set, by its name.
    released_on: Mapping[str, Settings] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = {one.name for one in dataclasses.fields(DistillConfig)}
        given = {
            *self.fields,
            *self.paper,
            *self.released,
            *(name for own in self.released_on.values() for name in own),
        }
        if given - known:
            raise ValueError(f"a method fills in settings that do not exist: {', '.join(sorted(given - known))}")

    def settings(self, semantics: str, dataset: str | None = None) -> dict[str, Any]:
        """What it fills in for one semantics and data set."""
        if semantics == "paper":
            return {**self.fields, **self.paper}
        return {**self.fields, **self.released, **self.released_on.get(dataset or "", {})}


@dataclass(frozen=True)
class Selection:
    """A baseline that picks real images or patches; `fd2fast.students.baselines` holds the rules."""

    # One line for lists of methods.
    summary: str
    # Cells along one side of the patches it picks from; None: it picks from the training images.
    patch_factor: int | None = None
