"""What the stages tell those who read their results: typed facts for each kind, as its manifest records them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from fd2fast.errors import UserError


class Facts(Mapping[str, Any]):
    """Facts of a result of any kind: a mapping of what is recorded, and attributes where the kind is known.

    A fact that the manifest lacks, as those of other versions may, is a UserError when it is asked for.
    """

    _recorded: Mapping[str, Any]
    _whose: str

    @classmethod
    def read(cls, recorded: Mapping[str, Any], whose: str) -> Self:
        """The facts in a manifest; `whose` result it is, for the error."""
        facts = cls.__new__(cls)
        facts.__dict__.update(_recorded=recorded, _whose=whose)
        for name, declared in _declared(cls).items():
            if name in recorded:
                facts.__dict__[name] = recorded[name]
            elif declared.default_factory is not dataclasses.MISSING:
                facts.__dict__[name] = declared.default_factory()
        return facts

    if not TYPE_CHECKING:  # where it would make any name a fact

        def __getattr__(self, name: str) -> Any:
            if name not in _declared(type(self)):
                raise AttributeError(name)
            raise UserError(f"the manifest of {self._whose} does not say its {name}: make it again")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({dict(self)})"

    def recorded(self) -> Mapping[str, Any]:
        """As the manifest holds them; of those that may be missing, None is left out."""
        if "_recorded" in self.__dict__:
            return self._recorded
        declared = _declared(type(self)).items()
        values = {name: getattr(self, name) for name, _ in declared}
        return {
            name: values[name] for name, f in declared if values[name] is not None or not f.metadata.get("optional")
        }

    def __getitem__(self, name: str) -> Any:
        return self.recorded()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.recorded())

    def __len__(self) -> int:
        return len(self.recorded())


def _declared(kind: type[Facts]) -> dict[str, dataclasses.Field[Any]]:
    return getattr(kind, "__dataclass_fields__", {})


def _optional() -> Any:
    return field(default=None, metadata={"optional": True})


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class DatasetFacts(Facts):
    """Counts are of images; per_class: by split, one for each class. fonts: of typefaces, by class."""

    name: str = ""
    train: int
    test: int
    per_class: dict[str, list[int]] = field(default_factory=dict)
    # paths relative to the root
    skipped: list[str] = field(default_factory=list)
    converted: dict[str, int] = field(default_factory=dict)
    # of mean and std: given, reference or measured
    statistics: dict[str, str]
    fonts: dict[str, Any] | None = _optional()


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class TeacherFacts(Facts):
    """Accuracies: percent of the test set, None where unknown."""

    model: str
    attention_maps: int
    alpha: float
    channels: int
    backbone_accuracy: float | None = None
    cal_accuracy: float | None = None
    notices: list[str]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class TrainedTeacherFacts(TeacherFacts):
    """Of a teacher trained here: epoch, whose weights are kept; weights it started from: file, hub or None, and their hash."""

    epoch: int
    head_trained: bool
    weights: str | None
    weights_sha256: str | None


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class PatchesFacts(Facts):
    """mean_score: cross entropy of the crops used, one for each class."""

    factor: int
    per_class: int
    pool: int
    crops: int
    mean_score: list[float]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class ImagesFacts(Facts):
    """teachers: backbones. given_draws: hashes of the draws given in place of the counter-based ones."""

    method: str
    semantics: str = "paper"
    ipc: int
    teachers: list[str]
    given_draws: dict[str, str | None]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class LabelsFacts(Facts):
    """weights: of the teachers' logits. agreement: percent of the labels whose first class is one of the image's."""

    images: int
    ipc: int
    epochs: int
    batch_size: int
    teachers: list[str]
    weights: list[float]
    teacher_mode: str
    source: str
    agreement: float


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class MetricsFacts(Facts):
    """Accuracies in percent: last and best, one for each seed; mean and deviation over seeds (n - 1; None for one seed)."""

    method: str
    ipc: int
    student: str
    labels: str
    epochs: int
    seeds: list[int]
    last: list[float]
    last_mean: float
    last_std: float | None
    best: list[float]
    best_mean: float
    best_std: float | None
    top5_mean: float | None
