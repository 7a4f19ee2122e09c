"""Progress bars for long work: rate, time left and the losses of now, quiet where no person looks."""

import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from fd2fast.system.streams import lines, plain

try:
    from tqdm import tqdm
except (TypeError, ValueError):  # a TQDM_ variable that it cannot read, which also torch's import would meet
    for _name in [name for name in os.environ if name.startswith("TQDM_")]:
        del os.environ[_name]
    from tqdm import tqdm

T = TypeVar("T")


class Progress:
    """A bar of `total` units; `done` units were finished by an earlier, interrupted run. What fails to draw it only ends it."""

    def __init__(self, description: str, total: int, *, done: int = 0, unit: str = "it"):
        self._bar: Any = None
        self._bar = self._safely(lambda: self._open(plain(description), total, done, unit))

    @staticmethod
    def _open(description: str, total: int, done: int, unit: str) -> Any:
        if sys.stderr is None:
            return None
        terminal = sys.stderr.isatty()
        return tqdm(
            total=total,
            initial=done,
            desc=description,
            unit=unit,
            file=sys.stderr,
            dynamic_ncols=terminal,
            ncols=None if terminal else 110,
            mininterval=0.2 if terminal else 15.0,
            # one bar for all processes of a torchrun job
            disable=os.environ.get("FD2FAST_PROGRESS", "1") == "0" or os.environ.get("RANK", "0") != "0",
            leave=True,
        )

    def _safely(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception:  # a terminal's or a stream's: the work goes on without a bar
            self._bar = None
            return None

    def step(self, units: int = 1, **values: float | str) -> None:
        """Advance; `values` (losses, accuracies) are shown behind the bar."""
        if self._bar is not None:
            self._safely(lambda: self._advance(units, values))

    def _advance(self, units: int, values: dict[str, float | str]) -> None:
        if values:
            shown = {plain(k): plain(v) if isinstance(v, str) else f"{v:.4g}" for k, v in values.items()}
            self._bar.set_postfix(shown, refresh=False)
        self._bar.update(units)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._bar is not None:
            self._safely(self._bar.close)


class NotesHandler(logging.Handler):
    """Writes what the package logs to stderr, above a running bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line, as it is; a stream that cannot take it is no error."""
        try:
            if sys.stderr is not None:
                tqdm.write(lines(self.format(record)), file=sys.stderr)
        except Exception:
            pass


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
