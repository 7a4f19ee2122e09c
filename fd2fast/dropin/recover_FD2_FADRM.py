"""Stand-in for the FD2 code's recover_FD2_FADRM.py (FADRM+ with FD2): the same flags, folders and files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fd2fast.dropin.flags import RECOVER_FLAGS, Flag, Script, start
from fd2fast.dropin.recover_FD2 import COMMON

SCRIPT = Script(
    "recover_FD2_FADRM",
    "Recover images with FADRM+ and FD2, as recover_FD2_FADRM.py of the FD2 code.",
    (
        *COMMON,
        Flag("--optimization_budgets", int, several=True),
        Flag("--input_size_lis", int, [200, 224, 200, 224], several=True),
        Flag("--alpha", float, 0.5),
        Flag("--weight_temperature", int, 5, idle="no teacher is weighted"),
    ),
    RECOVER_FLAGS,
)


def work(options: argparse.Namespace) -> None:
    """Recover; UserError for whatever does not fit."""
    from fd2fast.dropin import fine_grained

    fine_grained.recover_fadrm(SCRIPT.name, options)


def main(arguments: Sequence[str] | None = None) -> int:
    """The script; its exit code."""
    return start(SCRIPT, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
