"""Loads a C++ extension, or says why it cannot be."""

import importlib
from types import ModuleType

import torch  # noqa: F401 - before every extension, so that both share one OpenMP runtime


def load(name: str) -> tuple[ModuleType | None, str | None]:
    """The module fd2fast.<name>, and None; or None and the reason."""
    try:
        return importlib.import_module(f"fd2fast.{name}"), None
    except ImportError as error:
        return None, f"the C++ kernels are not built: {error}"
