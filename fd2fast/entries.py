"""The rows of a run's table: which methods, how their images are labelled, and by which teachers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from fd2fast.errors import UserError
from fd2fast.methods import check_name, patch_factor, takes_committee

T = TypeVar("T")
HARD = ("random", "herding", "kcenter")


@dataclass(frozen=True)
class Entry:
    """One row of the table: a method and how its images are labelled."""

    method: str
    labels: str

    @property
    def name(self) -> str:
        default = "hard" if self.method in HARD else "soft"
        return self.method if self.labels == default else f"{self.method}:{self.labels}"


def parse_entry(text: str) -> Entry:
    """`sre2l++_fd2`, `random`, `random:soft`; UserError for unknown names."""
    method, _, labels = text.partition(":")
    check_name(method)
    labels = labels or ("hard" if method in HARD else "soft")
    if labels not in ("hard", "soft"):
        raise UserError(f"{text!r}: labels are hard or soft, not {labels!r}")
    return Entry(method, labels)


def methods_of(entries: Sequence[Entry]) -> list[str]:
    """The methods, each once, in order."""
    return list(dict.fromkeys(entry.method for entry in entries))


def patch_factors(entries: Sequence[Entry]) -> list[int]:
    """Of the patches that the methods start from, each once, in order."""
    return list(dict.fromkeys(factor for entry in entries if (factor := patch_factor(entry.method))))


def teachers_of(method: str, teachers: Sequence[T]) -> list[T]:
    """Who makes the images and labels them: all teachers where the method is a committee's, else the first."""
    return list(teachers) if takes_committee(method) else list(teachers[:1])


def folder_name(name: str) -> str:
    """A model or method name as a folder name."""
    return "".join(c if c.isalnum() or c in "+-_." else "-" for c in name)


def short_name(model: str) -> str:
    """A model's name without its settings."""
    return model.split(",")[0]
