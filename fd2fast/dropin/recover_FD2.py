"""Stand-in for the FD2 code's recover_FD2.py (SRe2L++ with FD2): the same flags, folders and files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fd2fast.dropin.flags import RECOVER_FLAGS, Flag, Script, start

# Flags of both FD2 scripts.
COMMON = (
    Flag("--matplotlib", bool),
    Flag("--dataset_name", required=True),
    Flag("--exp_name", required=True),
    Flag("--apply_data_augmentation", bool),
    Flag("--start_index", int, 0),
    Flag("--pretrained_model_type", required=True, choices=("offline", "online")),
    Flag("--model_choice", several=True),
    Flag("--M", int, several=True),
    Flag("--cal_ratio", float, several=True),
    Flag("--syn_data_path", required=True),
    Flag("--model_pool_dir"),
    Flag("--patch_dir"),
    Flag("--initialisation_dir"),
    Flag("--store_best_images", bool),
    Flag("--store_initialised_images", bool),
    Flag("--class_num", int, 1),
    Flag("--subprocess_num", int, 10, idle="tasks share steps of one process"),
    Flag("--lr", float, 0.1),
    Flag("--jitter", int, 4, idle="the data set decides, as in the published script"),
    Flag("--r_bn", float, 0.05),
    Flag("--first_bn_multiplier", float, 10.0),
    Flag("--FC", bool),
    Flag("--FC_ratio", float, 0.8),
    Flag("--IntraFC_ratio", float, 0.5),
    Flag("--SC", bool),
    Flag("--SC_ratio", float, 0.2),
    Flag("--SC_loss_threshold", float, 0.6),
    Flag("--initialisation_method", str, "Guassian", choices=("Guassian", "Patches")),
    Flag("--patch_diff", str, "medium", choices=("1", "2")),
    Flag("--ipc_start", int, 0),
    Flag("--ipc_end", int, 50),
)
SCRIPT = Script(
    "recover_FD2",
    "Recover images with SRe2L++ and FD2, as recover_FD2.py of the FD2 code.",
    (
        *COMMON,
        Flag("--selected_size", int, 2),
        Flag("--voter_type", str, "prior", choices=("equal", "random", "prior")),
        Flag("--iteration", int, 1000),
        Flag("--weight_temperature", int, 5),
    ),
    RECOVER_FLAGS,
)


def work(options: argparse.Namespace) -> None:
    """Recover; UserError for whatever does not fit."""
    from fd2fast.dropin import fine_grained

    fine_grained.recover_sre2l(SCRIPT.name, options)


def main(arguments: Sequence[str] | None = None) -> int:
    """The script; its exit code."""
    return start(SCRIPT, work, arguments)


if __name__ == "__main__":
    sys.exit(main())
