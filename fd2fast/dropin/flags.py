"""Flags of the published scripts as tables, the parser made of them, and how a stand-in begins and ends.

The published scripts use argparse, and so does this: abbreviations, `--flag value` and `--flag=value` are read alike.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fd2fast.errors import UserError
from fd2fast.system import failure, stopping, threads
from fd2fast.system.progress import show_notes
from fd2fast.system.streams import say


@dataclass(frozen=True)
class Flag:
    """One flag as the published script has it. kind: str, int, float, or bool for a flag without a value."""

    names: str  # "--epochs", or "-j --workers"
    kind: type = str
    default: Any = None
    required: bool = False
    several: bool = False
    choices: tuple[str, ...] | None = None
    # why it has no effect here, where it has none
    idle: str = ""

    @property
    def key(self) -> str:
        """Its name in what the parser gives."""
        long = next(name for name in self.names.split() if name.startswith("--"))
        return long[2:].replace("-", "_")


@dataclass(frozen=True)
class Script:
    """A published script: its name, one line on what it does, its flags."""

    name: str
    about: str
    flags: tuple[Flag, ...]
    own: tuple[Flag, ...] = ()


# What every recover stand-in takes beside the script's own flags.
RECOVER_FLAGS = (
    Flag("--draws"),
    Flag("--dump_draws --dump-draws"),
    Flag("--reference_rng --reference-rng", int),
    Flag("--fd2fast_dataset --fd2fast-dataset"),
    Flag(
        "--fd2fast_precision --fd2fast-precision", str, "auto", choices=("auto", "fp64", "fp32", "tf32", "bf16", "fp16")
    ),
    Flag("--fd2fast_device --fd2fast-device", str, "auto"),
    Flag("--fd2fast_seed --fd2fast-seed", int),
)
_HELP = {
    "draws": "crops, flips, rolls, patches and teachers from this file (JSON lines) instead of drawn ones",
    "dump_draws": "write those of this run to this file",
    "reference_rng": "draw what the published script draws when random, numpy.random and torch are seeded with this number at "
    "its beginning and its tasks run in that process",
    "fd2fast_dataset": "JSON file on a data set of your own: classes, size, mean, std, jitter, and accuracies for --voter prior",
    "fd2fast_precision": "auto: as the published script, TF32 (its FADRM: fp16) on a GPU, fp32 on a CPU",
    "fd2fast_device": "auto: a GPU where there is one",
    "fd2fast_seed": "of this run's own draws; without it every run draws anew, as the published script does",
}


def parser_of(script: Script) -> argparse.ArgumentParser:
    """The parser of a script's flags and of fd2fast's own."""
    parser = argparse.ArgumentParser(prog=f"python -m fd2fast.dropin.{script.name}", description=script.about)
    for title, flags in (("the script's own flags", script.flags), ("flags of fd2fast", script.own)):
        group = parser.add_argument_group(title)
        for flag in flags:
            names = flag.names.split()
            told = f"without effect here: {flag.idle}" if flag.idle else _HELP.get(flag.key, "")
            if flag.kind is bool:
                group.add_argument(*names, dest=flag.key, action="store_true", help=told)
                continue
            group.add_argument(
                *names,
                dest=flag.key,
                type=flag.kind,
                default=flag.default,
                required=flag.required,
                nargs="+" if flag.several else None,
                choices=flag.choices,
                help=told or None,
            )
    return parser


def parse(script: Script, arguments: Sequence[str]) -> argparse.Namespace:
    """The flags' values; those that have no effect here are named once on standard error."""
    found = parser_of(script).parse_args(list(arguments))
    idle = {flag: flag.idle for flag in script.flags if flag.idle and getattr(found, flag.key) != _default(flag)}
    if idle:
        told = "; ".join(f"{flag.names.split()[-1]} ({why})" for flag, why in idle.items())
        say(f"{script.name}: without effect here: {told}", error=True)
    return found


def _default(flag: Flag) -> Any:
    return False if flag.kind is bool else flag.default


def folder(value: str | None, flag: str, what: str) -> Path:
    """The folder that a flag names; UserError where it is not given or not there."""
    if value is None:
        raise UserError(f"{flag} is missing: wanted {what}")
    path = Path(value).expanduser()
    if not path.is_dir():
        raise UserError(f"{flag} {path} is no folder: wanted {what}")
    return path


def start(script: Script, work: Callable[[argparse.Namespace], None], arguments: Sequence[str] | None) -> int:
    """Run a stand-in; 0 on success, 2 for a user's error, 1 and 70 as `fd2fast`, 130 or 143 when it was stopped."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(script, arguments)
    stopping.be_deaf_at_exit()
    try:
        with stopping.raising(lambda number: say("\nstopped; the same command goes on from there", error=True)):
            show_notes()
            threads.settle()
            work(options)
    except UserError as error:
        return _complained(error, str(error), 2)
    except KeyboardInterrupt as error:
        say("\nstopped; the same command goes on from there", error=True)
        return stopping.exit_code(error)
    except Exception as error:
        told, code = failure.line(error, [script.name, *arguments])
        return _complained(error, told, code)
    return 0


def _complained(error: Exception, told: str, code: int) -> int:
    if failure.wants_traceback():
        traceback.print_exception(error)
    say(f"error: {told}", error=True)
    return code
