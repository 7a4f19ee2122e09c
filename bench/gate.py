"""Correctness before time: an implementation is compared with the plain loop in fp32 and refused where it disagrees."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case
from bench.ways import FusedStep, Plain

# Iterations of every teacher after which the images are compared, at a rate at which Adam does not yet amplify rounding.
ROUNDS, RATE = 3, 1e-3


class DisagreementError(AssertionError):
    """An implementation does not compute what the plain loop computes."""


@dataclass
class Errors:
    """Against the plain loop, over all teachers: the largest of each, relative."""

    gradient: float = 0.0  # of the first iteration, L2
    images: float = 0.0  # how far they moved in a few iterations, L2
    terms: dict[str, float] = field(default_factory=dict)  # of the first iteration

    @property
    def worst_term(self) -> float:
        """The largest over the loss terms."""
        return max(self.terms.values())

    def record(self, name: str) -> dict[str, float]:
        """For a row of results."""
        values = (("gradient", self.gradient), ("images", self.images), ("loss terms", self.worst_term))
        return {f"{name} {what} error": float(f"{value:.3g}") for what, value in values}


# Largest errors by precision. A ReLU that flips changes a gradient by more than rounding does; the first steps of Adam are
# nearly the gradient's signs, and those of small gradients flip.
LIMITS = {
    "fp32": Errors(gradient=5e-3, images=0.05, terms={"any": 1e-4}),
    "tf32": Errors(gradient=8e-2, images=0.4, terms={"any": 1e-2}),
    "bf16": Errors(gradient=0.6, images=0.8, terms={"any": 1e-2}),
    "fp16": Errors(gradient=0.2, images=0.4, terms={"any": 1e-2}),
}


# Rounding can widen a limit so many times at most: beyond, the case is no check.
_MOST_ROUNDING = 10


class Reference:
    """What the plain loop gives for a case: first gradient and loss terms of every teacher, and the images a little later."""

    def __init__(self, case: Case):
        config = dataclasses.replace(case.config, lr=RATE)
        self.case = dataclasses.replace(case, config=config)
        self.firsts: list[tuple[Tensor, dict[str, float]]] = []
        for turn in range(len(case.teachers)):
            plain = Plain(self.case)
            plain(turn, read=True)
            self.firsts.append((plain.gradient, plain.terms))
        self.moved = _moved(Plain(self.case), self.case)
        self._rounding: Errors | None = None

    def rounding(self) -> Errors:
        """What the plain loop's own fp32 arithmetic is off by, against float64: no fp32 implementation can be held to less."""
        if self._rounding is None:
            exact = _in_float64(self.case)
            found = Errors()
            for turn, (gradient, terms) in enumerate(self.firsts):
                plain = Plain(exact)
                plain(turn, read=True)
                found.gradient = max(found.gradient, _worst(gradient, plain.gradient))
                found.terms |= {
                    name: max(found.terms.get(name, 0.0), _apart(terms[name], value))
                    for name, value in plain.terms.items()
                }
            found.images = _worst(self.moved, _moved(Plain(exact), exact))
            self._rounding = found
        return self._rounding

    def errors_of(self, make: Callable[[Case], Any]) -> Errors:
        """make: the implementation for a case (this one, at a small learning rate)."""
        found = Errors()
        for turn, (gradient, terms) in enumerate(self.firsts):
            run = make(self.case)
            if isinstance(run, FusedStep):
                run.step.iteration = turn
            run(turn, read=True)
            found.gradient = max(found.gradient, _worst(run.gradient, gradient))
            for name, value in terms.items():
                found.terms[name] = max(found.terms.get(name, 0.0), _apart(run.terms[name], value))
        found.images = self.images_error_of(make)
        return found

    def images_error_of(self, make: Callable[[Case], Any]) -> float:
        """That of the images alone."""
        return _worst(_moved(make(self.case), self.case), self.moved)


def _in_float64(case: Case) -> Case:
    return dataclasses.replace(
        case,
        teachers=[copy.deepcopy(teacher).double() for teacher in case.teachers],
        initial=case.initial.double(),
        priors=[prior.double() for prior in case.priors],
        low=case.low.double(),
        high=case.high.double(),
    )


def _apart(value: float, expected: float) -> float:
    return abs(value - expected) / max(abs(expected), 1e-6)


def _moved(run: Any, case: Case) -> Tensor:
    for t in range(ROUNDS * len(case.teachers)):
        run(t)
    images = run.images.detach()
    return images - case.initial.repeat(len(images) // case.rows, 1, 1, 1)


def _worst(actual: Tensor, expected: Tensor) -> float:
    """Largest relative error (L2) over the segments of `actual`, which are all copies of the one expected."""
    apart = actual.unflatten(0, (-1, len(expected))) - expected
    return float(apart.flatten(1).norm(dim=1).max() / expected.norm())


def check(
    name: str, errors: Errors, precision: str, peer: Errors | None = None, rounding: Callable[[], Errors] | None = None
) -> None:
    """DisagreementError unless the errors are within the precision's limits, and not half as large again as a peer's in it.

    rounding: `Reference.rounding`, asked in fp32 where a limit is passed: three times as much is allowed, for two ways of
    rounding flip other ReLUs (measured: ResNet-18, 20 images of 64 x 64, 0.006 of the gradient on one of two processors).
    """
    limits = LIMITS[precision]
    for what in ("gradient", "images", "worst_term"):
        value, limit = getattr(errors, what), getattr(limits, what)
        if peer is not None:
            limit = min(limit, 1.5 * getattr(peer, what) + 0.02)
        if value > limit and precision == "fp32" and rounding is not None:
            limit = min(max(limit, 3 * getattr(rounding(), what)), _MOST_ROUNDING * limit)
        if not value <= limit:
            raise DisagreementError(
                f"{name} in {precision}: {what.replace('worst_term', 'loss terms')} off by {value:.2g} of the plain loop's, "
                f"allowed {limit:.2g}"
            )


def settle_reference_arithmetic() -> None:
    """Full fp32 in products and convolutions, for checks."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
