"""Stand-ins for the published scripts: the same flags, folders, files and lines, on this engine.

`python -m fd2fast.dropin.recover_FD2` and its neighbours, each in a file with the table of its flags. The names below are
those of the published code's building blocks, for a recover script of one's own.
"""

import importlib
from typing import Any

__all__ = [
    "BAP",
    "CAL",
    "BNFeatureHook",
    "features_dist",
    "inter_feature_center_dist",
    "intra_feature_center_dist",
]


def __getattr__(name: str) -> Any:
    """The building blocks, imported with the first that is asked for."""
    if name in __all__:
        return getattr(importlib.import_module("fd2fast.dropin.pieces"), name)
    raise AttributeError(f"module 'fd2fast.dropin' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
