"""The distillation methods, each an object in a file of its own; a new file here is a new method."""

import importlib
import pkgutil

from fd2fast.methods.fd2 import with_fd2
from fd2fast.methods.losses import HEAD, TERMS, Outputs, Term
from fd2fast.methods.method import Method, Selection
from fd2fast.methods.registry import (
    BASELINES,
    METHODS,
    check_name,
    columns_of,
    known_names,
    losses_of,
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
from fd2fast.settings.recipe import MAY_STAY_OPEN, Recipe

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = [
    "BASELINES",
    "HEAD",
    "MAY_STAY_OPEN",
    "METHODS",
    "SEMANTICS",
    "Method",
    "Outputs",
    "Recipe",
    "Selection",
    "TERMS",
    "Term",
    "check_name",
    "check_teachers",
    "columns_of",
    "default_jitter",
    "faults",
    "filled",
    "known_names",
    "losses_of",
    "method_of",
    "patch_factor",
    "preset",
    "register_method",
    "resolve",
    "scaled_size",
    "takes_committee",
    "with_fd2",
]
