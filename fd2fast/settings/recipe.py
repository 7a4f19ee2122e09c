"""The settings of one distillation with nothing left open: what the step and its inputs read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from fd2fast.settings.config import DistillConfig


@dataclass(frozen=True)
class Recipe:
    """The fields of DistillConfig after a method has filled them. Made by `fd2fast.methods.resolve`.

    None that is left is a meaning of its own: alpha, each teacher's; teachers_per_image, all; ls_threshold, never;
    segments_per_step, what fits; save_every, now and then; memory_limit, what is free.
    """

    method: str
    semantics: str
    ipc: int
    segment_size: int
    segments_per_step: int | None
    iterations: tuple[int, ...]
    sizes: tuple[int, ...]
    residual: float
    lr: float
    betas: tuple[float, float]
    adam_eps: float
    r_bn: float
    first_bn_multiplier: float
    teacher_schedule: Literal["all", "round_robin"]
    teachers_per_image: int | None
    teacher_weights: Literal["equal", "prior"]
    init: Literal["patches", "real", "noise"]
    augment: bool
    min_crop: float
    jitter: int
    fd2: bool
    prototypes: Literal["ema", "last"]
    alpha: float | None
    lam: float
    beta: float
    group_size: int
    eps: float
    keep_base_ce: bool
    ls_threshold: float | None
    prior_view: Literal["clean", "augmented"]
    patch_choice: Literal["id", "random"]
    save_format: Literal["png", "jpg"]
    quantize: Literal["round", "truncate"]
    precision: Literal["auto", "fp64", "fp32", "tf32", "bf16", "fp16"]
    seed: int
    save_every: int | None
    memory_limit: float | None
    device: str

    @property
    def total_iterations(self) -> int:
        """Over all phases."""
        return sum(self.iterations)

    def config(self) -> DistillConfig:
        """The same as open settings, which is what a manifest records."""
        return DistillConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(self)})


# Fields in which None is a meaning.
MAY_STAY_OPEN = tuple(name for name, hint in get_type_hints(Recipe).items() if type(None) in get_args(hint))


def recipe_of(config: DistillConfig) -> Recipe:
    """The recipe that these filled settings are. Raises ValueError for a field that is still open."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    still_open = [name for name, value in values.items() if value is None and name not in MAY_STAY_OPEN]
    if still_open:
        raise ValueError(f"method {config.method!r} leaves {', '.join(still_open)} open")
    return Recipe(**values)
