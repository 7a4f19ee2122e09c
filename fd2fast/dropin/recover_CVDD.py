"""Stand-in for CV-DD's recover.py (SRe2L++ and its committees): the same flags, folders and files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fd2fast.dropin.flags import RECOVER_FLAGS, Flag, Script, start

# Flags of CV-DD's and FADRM's recover scripts.
COMMON = (
    Flag("--dataset-name", required=True),
    Flag("--exp-name", required=True),
    Flag("--apply-data-augmentation", bool),
    Flag("--start-index", int, 0),
    Flag("--pretrained-model-type", required=True, choices=("offline", "online")),
    Flag("--verifier", bool),
    Flag("--verifier-arch", str, "MobileNetV2"),
    Flag("--verifier-weight-path", idle="the verifier's weights are those of the pool, as in the published script"),
    Flag("--syn-data-path", required=True),
    Flag("--model-pool-dir"),
    Flag("--patch-dir"),
    Flag("--initialisation-dir"),
    Flag("--store-best-images", bool),
    Flag("--store-initialised-images", bool),
    Flag("--batch-size", int, 100),
    Flag("--lr", float, 0.1),
    Flag("--jitter", int, 4, idle="the data set decides, as in the published script"),
    Flag("--r-bn", float, 0.05),
    Flag("--first-bn-multiplier", float, 10.0),
    Flag("--initialisation-method", str, "Guassian", choices=("Guassian", "Patches")),
    Flag("--ipc-start", int, 0),
    Flag("--ipc-end", int, 50),
)
SCRIPT = Script(
    "recover_CVDD",
    "Recover images with SRe2L++ or CV-DD, as recover.py of the CV-DD code.",
    (
        *COMMON,
        Flag("--sre2l-model", str, "ResNet18"),
        Flag("--model-setting", int, 0),
        Flag("--selected-size", int, 2),
        Flag("--voter-type", str, "prior", choices=("equal", "random", "prior")),
        Flag("--iteration", int, 1000),
        Flag("--weight-temperature", int, 5),
        Flag("--patch-diff", str, "medium", choices=("easy", "medium", "hard")),
    ),
    RECOVER_FLAGS,
)


def work(options: argparse.Namespace) -> None:
    """Recover; UserError for whatever does not fit."""
    from fd2fast.dropin import general

    general.recover_cvdd(SCRIPT.name, options)


def main(arguments: Sequence[str] | None = None) -> int:
    """The script; its exit code."""
    return start(SCRIPT, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
