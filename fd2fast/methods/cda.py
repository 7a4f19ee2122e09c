"""CDA: SRe2L whose random crops go from easy to hard (Yin and Shen, Dataset Distillation in Large Data Era, 2023)."""

from fd2fast.methods.method import Method
from fd2fast.methods.registry import register_method
from fd2fast.schedules import half_cosine
from fd2fast.settings.recipe import Recipe


def smallest_crop(recipe: Recipe, iteration: int) -> float:
    """Smallest area share of an iteration's crop: from the whole image down to min_crop, half a cosine over all iterations.

    The published code's "cosine" mode with milestone 1.
    """
    share = half_cosine(iteration, recipe.total_iterations)
    return recipe.min_crop + (1 - recipe.min_crop) * share


CDA = Method(
    "SRe2L from noise, its crops from easy to hard",
    fields={"init": "noise", "sizes": (224,), "residual": 1.0, "teacher_schedule": "all", "augment": True},
    paper={"lr": 0.25, "r_bn": 0.01, "iterations": (4000,), "save_format": "png"},
    released={"lr": 0.25, "r_bn": 0.01, "iterations": (4000,), "save_format": "jpg"},
    patch_factor=None,
    smallest_crop=smallest_crop,
)

register_method("cda", CDA)
