"""The errors a user can cause, with messages that name the thing, what was wanted and what came."""

import difflib
from collections.abc import Collection, Iterable


class UserError(ValueError):
    """Bad input, settings or surroundings; the command line prints it without a traceback."""


def nearest(name: str, known: Iterable[str]) -> str:
    """A half sentence that suggests the known name closest to `name` and lists them all."""
    known = list(known)
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(known)}"


def refuse(faults: Collection[str]) -> None:
    """UserError with all of `faults`, one line each, unless there are none."""
    if len(faults) == 1:
        raise UserError(*faults)
    if faults:
        raise UserError("\n  ".join([f"{len(faults)} things are wrong, nothing was begun:", *faults]))
