"""Stand-in for FADRM's recover.py (FADRM and FADRM+): the same flags, folders and files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fd2fast.dropin.flags import RECOVER_FLAGS, Flag, Script, start
from fd2fast.dropin.recover_CVDD import COMMON

SCRIPT = Script(
    "recover_FADRM",
    "Recover images with FADRM or FADRM+, as recover.py of the FADRM code.",
    (
        *COMMON,
        Flag("--teacher-model-list", str, ["ResNet18"], several=True),
        Flag("--input-size-lis", int, several=True),
        Flag("--optimization-budgets", int, several=True),
        Flag("--alpha", float),
        Flag("--iteration", int, 1000, idle="--optimization-budgets counts the iterations"),
        Flag("--weight-temperature", int, 5, idle="no teacher is weighted"),
        Flag("--patch-diff", str, "medium"),
    ),
    RECOVER_FLAGS,
)


def work(options: argparse.Namespace) -> None:
    """Recover; UserError for whatever does not fit."""
    from fd2fast.dropin import general

    general.recover_fadrm(SCRIPT.name, options)


def main(arguments: Sequence[str] | None = None) -> int:
    """The script; its exit code."""
    return start(SCRIPT, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
