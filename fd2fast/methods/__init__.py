"""The distillation methods, each an object in a file of its own; a new file here is a new method."""

import importlib
import pkgutil

from fd2fast.methods.method import Method, Selection
from fd2fast.methods.registry import (
    BASELINES,
    METHODS,
    check_name,
    known_names,
    method_of,
    patch_factor,
    register_method,
    takes_committee,
)
from fd2fast.methods.settle import (
    SEMANTICS,
    check_teachers,
    default_jitter,
    faults,
    filled,
    preset,
    resolve,
    scaled_size,
)
from fd2fast.recipe import MAY_STAY_OPEN, Recipe

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "BASELINES",
    "MAY_STAY_OPEN",
    "METHODS",
    "SEMANTICS",
    "Method",
    "Recipe",
    "Selection",
    "check_name",
    "check_teachers",
    "default_jitter",
    "faults",
    "filled",
    "known_names",
    "method_of",
    "patch_factor",
    "preset",
    "register_method",
    "resolve",
    "scaled_size",
    "takes_committee",
]
