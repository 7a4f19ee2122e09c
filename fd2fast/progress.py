"""Progress bars for long work: rate, time left and the losses of now, quiet where no person looks."""

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


class Progress:
    """A bar of `total` units; `done` units were finished by an earlier, interrupted run."""

    def __init__(self, description: str, total: int, *, done: int = 0, unit: str = "it"):
        terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=done,
            desc=description,
            unit=unit,
            dynamic_ncols=terminal,
            ncols=None if terminal else 110,
            mininterval=0.2 if terminal else 15.0,
            # one bar for all processes of a torchrun job
            disable=os.environ.get("FD2FAST_PROGRESS", "1") == "0" or os.environ.get("RANK", "0") != "0",
            leave=True,
        )

    def step(self, units: int = 1, **values: float | str) -> None:
        """Advance; `values` (losses, accuracies) are shown behind the bar."""
        if values:
            shown = {k: v if isinstance(v, str) else f"{v:.4g}" for k, v in values.items()}
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update(units)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: Any) -> None:
        self._bar.close()


class NotesHandler(logging.Handler):
    """Writes what the package logs to stderr, above a running bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line, as it is."""
        tqdm.write(self.format(record), file=sys.stderr)


def show_notes() -> None:
    """Let people see what the package logs: steps that were split, layers left as they are, why there are no graphs …"""
    logger = logging.getLogger("fd2fast")
    if not logger.hasHandlers():
        logger.addHandler(NotesHandler())
        # notes once for all processes of a torchrun job, warnings from each
        logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
        # each operation's backend is what `fd2fast info` is for
        logging.getLogger("fd2fast.ops").setLevel(logging.WARNING)


def track(items: Iterable[T], description: str, total: int | None = None, unit: str = "it") -> Iterator[T]:
    """Iterate with a bar."""
    items = list(items) if total is None else items
    count = len(items) if total is None else total  # type: ignore[arg-type]
    with Progress(description, count, unit=unit) as bar:
        for item in items:
            yield item
            bar.step()
