"""The distillation methods as data: what each one and each semantics puts into the settings that are left open."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from fd2fast.config import DistillConfig, replace
from fd2fast.errors import UserError, nearest, refuse
from fd2fast.ranges import Bound, out_of_range

BASELINES = ("random", "herding", "kcenter", "rded")
SEMANTICS = ("paper", "released")


@dataclass(frozen=True)
class Method:
    """What a method fixes besides its presets: how many teachers it takes and which patches it starts from."""

    # Fewest teachers.
    least: int
    # Most teachers; None: any number.
    most: int | None
    # Cells along one side of the patches it starts from.
    patch_factor: int
    # Fields for every semantics.
    fields: dict[str, Any]
    # Fields of one semantics.
    paper: dict[str, Any]
    released: dict[str, Any]


# Sizes are written for 224 pixels and scaled by `resolve`. "cub" in `released` iterations is the script's own longer run.
_SRE2L = {"init": "patches", "sizes": (224,), "residual": 1.0, "teacher_schedule": "all", "augment": True}
_FADRM = {**_SRE2L, "sizes": (200, 224, 200, 224), "residual": 0.5, "teacher_schedule": "round_robin"}
_SRE2L_PAPER = {"lr": 0.25, "r_bn": 0.01, "iterations": (4000,), "save_format": "png"}
_SRE2L_RELEASED = {"lr": 1e-3, "r_bn": 1e-3, "iterations": (4000,), "save_format": "jpg"}
_FADRM_PAPER = {"lr": 0.25, "r_bn": 0.01, "iterations": (500,) * 4, "save_format": "png"}
_FADRM_RELEASED = {"lr": 0.1, "r_bn": 1e-3, "iterations": (1500, 1500, 1500, 2000), "save_format": "jpg"}
_CVDD = {**_SRE2L, "teacher_weights": "prior", "teachers_per_image": 2}

# REFERENCE: SRe2L++ and CV-DD lr .25, r_bn .01, 4000; FADRM 4 x 500; the released FD2 scripts use the other column.
METHODS: dict[str, Method] = {
    "sre2l++": Method(1, 1, 2, _SRE2L, _SRE2L_PAPER, _SRE2L_RELEASED),
    "fadrm": Method(1, 1, 1, _FADRM, _FADRM_PAPER, _FADRM_RELEASED),
    "fadrm+": Method(2, None, 1, _FADRM, _FADRM_PAPER, _FADRM_RELEASED),
    "cvdd": Method(2, None, 2, _CVDD, _SRE2L_PAPER, _SRE2L_RELEASED),
}
METHODS |= {
    f"{name}_fd2": dataclasses.replace(method, fields={**method.fields, "fd2": True})
    for name, method in METHODS.items()
}

# Where the paper and the published code differ; each difference is a field of its own.
SEMANTIC_FIELDS: dict[str, dict[str, Any]] = {
    "paper": {
        "lam": 0.8,
        "prototypes": "ema",
        "prior_view": "clean",
        "patch_choice": "id",
        "quantize": "round",
    },
    "released": {
        "lam": 0.9,
        "prototypes": "last",
        "prior_view": "augmented",
        "patch_choice": "random",
        "quantize": "truncate",
        "ls_threshold": 0.0,
    },
}

_LAST_RESORT = {"fd2": False, "teacher_weights": "equal"}
# None stays None in these: "each teacher's own", "all teachers", "never", "what fits", "now and then", "what is free".
MAY_STAY_OPEN = (
    "alpha",
    "teachers_per_image",
    "ls_threshold",
    "segments_per_step",
    "save_every",
    "memory_limit",
)
_CUB_ITERATIONS = (10000,)


def check_name(method: str) -> None:
    """UserError, with the nearest known name, unless `method` is a method or a baseline."""
    if method not in METHODS and method not in BASELINES:
        raise UserError(f"unknown method {method!r}: {nearest(method, [*METHODS, *BASELINES])}")


def takes_committee(method: str) -> bool:
    """Whether the method works with several teachers; all others take one."""
    return method in METHODS and METHODS[method].most != 1


def patch_factor(method: str) -> int | None:
    """Cells along one side of the initial patches (paper: 2 x 2 for SRe2L++ and RDED, 1 x 1 for FADRM), None if it needs none."""
    if method in BASELINES:
        return 2 if method == "rded" else None
    return METHODS[method].patch_factor


def preset(method: str, semantics: str) -> dict[str, Any]:
    """The fields that a method and a semantics set, sizes for 224 pixels. Raises UserError for unknown names."""
    check_name(method)
    if semantics not in SEMANTIC_FIELDS:
        raise UserError(f"unknown semantics {semantics!r}: {nearest(semantics, SEMANTIC_FIELDS)}")
    chosen = METHODS[method]
    own = chosen.paper if semantics == "paper" else chosen.released
    return {**_LAST_RESORT, **SEMANTIC_FIELDS[semantics], **chosen.fields, **own}


def scaled_size(preset_size: int, size: int) -> int:
    """A phase's side for images of `size` pixels: in proportion to 224, a multiple of 8; all equal at 64 and below."""
    if size <= 64 or preset_size == 224:
        return size
    return max(8, 8 * round(preset_size / 224 * size / 8))


def default_jitter(size: int) -> int:
    """Largest roll in pixels: 4 up to 64 (or less than the side), 32 at 224, a straight line through both elsewhere."""
    if size <= 64:
        return min(4, size - 1)
    return round(4 + (size - 64) * 28 / 160)


def resolve(config: DistillConfig, *, classes: int, size: int, dataset: str | None = None) -> DistillConfig:
    """The settings with every None filled and everything checked.

    classes: K; size: side of the data set's images, pixels; dataset: its name, for the published code's longer run on
    CUB. One number of iterations is shared out evenly over the method's phases. `alpha`, `teachers_per_image` and
    `ls_threshold` may stay None (each teacher's own, all, never).
    Raises UserError that names the field, what was wanted and what came.
    """
    refuse(faults(config))
    if config.method in BASELINES:
        filled = {"fd2": False, "save_format": "png", "quantize": "round", "init": "real"}
        return replace(config, **{k: v for k, v in filled.items() if getattr(config, k) is None})
    values = preset(config.method, config.semantics)
    if config.semantics == "released" and dataset == "cub" and values["iterations"] == (4000,):
        values["iterations"] = _CUB_ITERATIONS
    values["sizes"] = tuple(scaled_size(side, size) for side in values["sizes"])
    if config.iterations is not None and config.sizes is None:
        values["iterations"] = _shared_out(config.iterations, len(values["sizes"]))
        config = replace(config, iterations=None)
    values["segment_size"] = min(100, classes)
    values["jitter"] = default_jitter(size)
    resolved: DistillConfig = replace(config, **{k: v for k, v in values.items() if getattr(config, k) is None})
    still_open = [
        f.name
        for f in dataclasses.fields(resolved)
        if getattr(resolved, f.name) is None and f.name not in MAY_STAY_OPEN
    ]
    assert not still_open, f"no preset for {still_open}"
    _check_shapes(resolved, classes, size)
    return resolved


def _shared_out(iterations: tuple[int, ...], phases: int) -> tuple[int, ...]:
    """One number is the budget of all phases, floor(B / phases) each (FADRM); more numbers are taken as they are."""
    if len(iterations) != 1 or phases == 1:
        return iterations
    if iterations[0] < phases:
        raise UserError(f"iterations must be at least {phases}, one for each phase of the method, got {iterations[0]}")
    return (iterations[0] // phases,) * phases


def check_teachers(config: DistillConfig, teachers: int) -> None:
    """UserError unless the method can work with so many teachers."""
    method = METHODS[config.method]
    if teachers < method.least:
        raise UserError(f"method {config.method!r} needs at least {method.least} teacher(s), got {teachers}")
    if method.most is not None and teachers > method.most:
        raise UserError(f"method {config.method!r} takes {method.most} teacher, got {teachers}")
    if config.teachers_per_image is not None and config.teachers_per_image > teachers:
        raise UserError(f"teachers_per_image is {config.teachers_per_image}, but only {teachers} teachers were given")


def faults(config: DistillConfig) -> list[str]:
    """What is wrong with the settings by themselves, one line each; None passes: the preset is in range."""
    found = out_of_range(config, "distill", _BOUNDS)
    for known, value, what in (
        ([*METHODS, *BASELINES], config.method, "method"),
        (list(SEMANTICS), config.semantics, "semantics"),
    ):
        if isinstance(value, str) and value.strip() and value not in known:
            found.append(f"distill: unknown {what} {value!r}: {nearest(value, known)}")
    return found


_BOUNDS: tuple[Bound, ...] = (
    ("ipc", lambda v: v >= 1, "at least 1 image per class"),
    ("segment_size", lambda v: v >= 1, "at least 1 class"),
    ("segments_per_step", lambda v: v >= 1, "at least 1"),
    ("iterations", lambda v: v and all(i >= 1 for i in v), "at least one phase, each of 1 or more"),
    ("sizes", lambda v: v and all(s >= 8 for s in v), "at least one side, each of 8 pixels or more"),
    ("residual", lambda v: 0 <= v <= 1, "within [0, 1]"),
    ("lr", lambda v: v > 0, "a positive number"),
    ("betas", lambda v: len(v) == 2 and all(0 <= b < 1 for b in v), "two numbers within [0, 1)"),
    ("adam_eps", lambda v: v > 0, "a positive number"),
    ("r_bn", lambda v: v >= 0, "0 or more"),
    ("first_bn_multiplier", lambda v: v >= 0, "0 or more"),
    ("teachers_per_image", lambda v: v >= 1, "at least 1"),
    ("min_crop", lambda v: 0 < v <= 1, "within (0, 1]"),
    ("jitter", lambda v: v >= 0, "0 or more pixels"),
    ("alpha", lambda v: 0 <= v <= 1, "within [0, 1]"),
    ("lam", lambda v: 0 <= v <= 1, "within [0, 1]"),
    ("beta", lambda v: 0 <= v <= 1, "within [0, 1]"),
    ("group_size", lambda v: v >= 1, "at least 1 image (N_S)"),
    ("eps", lambda v: v > 0, "a positive number"),
    ("save_every", lambda v: v >= 1, "at least 1 iteration"),
    ("memory_limit", lambda v: v > 0, "a positive number of GB"),
    ("seed", lambda v: v >= 0, "0 or more"),
)


def _check_shapes(config: DistillConfig, classes: int, size: int) -> None:
    assert config.sizes is not None
    assert config.iterations is not None
    assert config.segment_size is not None
    if len(config.sizes) != len(config.iterations):
        raise UserError(
            f"iterations and sizes must name the same number of phases, got {len(config.iterations)} iterations "
            f"{config.iterations} and {len(config.sizes)} sizes {config.sizes}"
        )
    if config.sizes[-1] != size:
        raise UserError(f"sizes must end with the side of the data set's images, {size}, got {config.sizes}")
    if config.segment_size > classes:
        raise UserError(
            f"segment_size must be at most the {classes} classes of the data set, got {config.segment_size}"
        )
