"""fd2fast: fast fine-grained dataset distillation. Importing it loads no GPU code and compiles nothing."""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fd2fast.api import (
        Listing,
        Split,
        dataset_from_arrays,
        datasets,
        distill,
        evaluate,
        fuse,
        patches,
        pretrain,
        register_dataset,
        register_method,
        register_stage,
        relabel,
        run,
        tensors,
    )

try:
    __version__ = version("fd2fast")
except PackageNotFoundError:  # a checkout on the path without an installation
    __version__ = "0+unknown"

__all__ = [
    "__version__",
    "Listing",
    "Split",
    "dataset_from_arrays",
    "datasets",
    "distill",
    "evaluate",
    "fuse",
    "patches",
    "pretrain",
    "register_dataset",
    "register_method",
    "register_stage",
    "relabel",
    "run",
    "tensors",
]


def __getattr__(name: str) -> Any:
    """The functions of fd2fast.api, imported with the first that is asked for."""
    if name in __all__:
        return getattr(importlib.import_module("fd2fast.api"), name)
    raise AttributeError(f"module 'fd2fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
