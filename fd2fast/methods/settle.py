"""From open settings to a recipe: what a method, its semantics and the data set put where the user left a field open."""

from __future__ import annotations

from typing import Any

from fd2fast.errors import UserError, nearest, refuse
from fd2fast.methods.registry import BASELINES, METHODS, known_names, method_of
from fd2fast.settings.config import DistillConfig, replace, wrong_settings
from fd2fast.settings.recipe import Recipe, recipe_of

# Where the paper and the published code differ; each difference is a field of its own.
_SEMANTIC_FIELDS: dict[str, dict[str, Any]] = {
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
SEMANTICS = tuple(_SEMANTIC_FIELDS)

# What a method that says nothing of them means.
_LAST_RESORT = {"fd2": False, "teacher_weights": "equal"}
# A selection's images are written, not optimised.
_SELECTED = {"fd2": False, "save_format": "png", "quantize": "round", "init": "real"}


def preset(method: str, semantics: str, dataset: str | None = None) -> dict[str, Any]:
    """The fields that a method and a semantics set, sizes for 224 pixels. Raises UserError for unknown names."""
    chosen = method_of(method)
    if semantics not in SEMANTICS:
        raise UserError(f"unknown semantics {semantics!r}: {nearest(semantics, SEMANTICS)}")
    return {**_LAST_RESORT, **_SEMANTIC_FIELDS[semantics], **chosen.settings(semantics, dataset)}


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


def resolve(config: DistillConfig, *, classes: int, size: int, dataset: str | None = None) -> Recipe:
    """The recipe of a method that optimises images, everything checked.

    classes: K; size: side of the data set's images, pixels; dataset: its name, for what the published code does there only.
    One number of iterations is shared out evenly over the method's phases.
    Raises UserError that names the field, what was wanted and what came.
    """
    refuse(faults(config))
    values = preset(config.method, config.semantics, dataset)
    values["sizes"] = tuple(scaled_size(side, size) for side in values["sizes"])
    if config.iterations is not None and config.sizes is None:
        values["iterations"] = _shared_out(config.iterations, len(values["sizes"]))
        config = replace(config, iterations=None)
    within = method_of(config.method).layout == "within"
    values["segment_size"] = config.ipc if within else min(100, classes)
    values["jitter"] = default_jitter(size)
    recipe = recipe_of(_with(config, values))
    _check_shapes(recipe, classes, size)
    return recipe


def filled(config: DistillConfig, *, classes: int, size: int, dataset: str | None = None) -> DistillConfig:
    """The settings as an artifact records them, of any method; arguments and errors as for `resolve`."""
    refuse(faults(config))
    if config.method in BASELINES:
        return _with(config, _SELECTED)
    return resolve(config, classes=classes, size=size, dataset=dataset).config()


def _with(config: DistillConfig, values: dict[str, Any]) -> DistillConfig:
    """The values put where a field is open."""
    complete: DistillConfig = replace(config, **{k: v for k, v in values.items() if getattr(config, k) is None})
    return complete


def _shared_out(iterations: tuple[int, ...], phases: int) -> tuple[int, ...]:
    """One number is the budget of all phases, floor(B / phases) each (FADRM); more numbers are taken as they are."""
    if len(iterations) != 1 or phases == 1:
        return iterations
    if iterations[0] < phases:
        raise UserError(f"iterations must be at least {phases}, one for each phase of the method, got {iterations[0]}")
    return (iterations[0] // phases,) * phases


def check_teachers(recipe: DistillConfig | Recipe, teachers: int) -> None:
    """UserError unless the method can work with so many teachers."""
    method = METHODS[recipe.method]
    if teachers < method.least:
        raise UserError(f"method {recipe.method!r} needs at least {method.least} teacher(s), got {teachers}")
    if method.most is not None and teachers > method.most:
        raise UserError(f"method {recipe.method!r} takes {method.most} teacher, got {teachers}")
    if recipe.teachers_per_image is not None and recipe.teachers_per_image > teachers:
        raise UserError(f"teachers_per_image is {recipe.teachers_per_image}, but only {teachers} teachers were given")


def faults(config: DistillConfig) -> list[str]:
    """What is wrong with the settings by themselves, one line each; None passes: the preset is in range."""
    found = wrong_settings(config, "distill")
    for known, value, what in (
        (known_names(), config.method, "method"),
        (list(SEMANTICS), config.semantics, "semantics"),
    ):
        if isinstance(value, str) and value.strip() and value not in known:
            found.append(f"distill: unknown {what} {value!r}: {nearest(value, known)}")
    return found


def _check_shapes(recipe: Recipe, classes: int, size: int) -> None:
    if len(recipe.sizes) != len(recipe.iterations):
        raise UserError(
            f"iterations and sizes must name the same number of phases, got {len(recipe.iterations)} iterations "
            f"{recipe.iterations} and {len(recipe.sizes)} sizes {recipe.sizes}"
        )
    if recipe.sizes[-1] != size:
        raise UserError(f"sizes must end with the side of the data set's images, {size}, got {recipe.sizes}")
    if method_of(recipe.method).layout == "within":
        if recipe.fd2:
            raise UserError(
                f"{recipe.method!r} optimises the images of a class together, which FD2's L_S cannot keep apart"
            )
        if recipe.segment_size > recipe.ipc:
            raise UserError(
                f"segment_size must be at most the {recipe.ipc} images of a class, got {recipe.segment_size}"
            )
    elif recipe.segment_size > classes:
        raise UserError(
            f"segment_size must be at most the {classes} classes of the data set, got {recipe.segment_size}"
        )
