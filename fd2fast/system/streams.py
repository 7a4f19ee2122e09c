"""Text for people: standard output and error whose faults never end the work, and names made safe to show."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, TextIO, cast

# What moves a terminal's cursor, begins its commands, ends a line, turns its direction, or is no character at all.
_UNSAFE = r"\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_IN_LINES = re.compile(f"[{_UNSAFE}]")
_IN_NAMES = re.compile(f"[{_UNSAFE}\\t\\n]")
# What writing raises; RuntimeError: a signal's handler writes in the middle of another write.
_FAULTS = (OSError, ValueError, RuntimeError)
# Faults after which a stream never works again.
_GONE = (errno.EPIPE, errno.EBADF, errno.ESHUTDOWN, errno.ECONNRESET)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return found[0].encode("unicode_escape").decode("ascii")


def plain(text: object, most: int | None = None) -> str:
    """`text` (a name, a path) as one line that any stream and picture takes: what is not to be shown becomes an escape.

    most: characters after which the rest becomes an ellipsis.
    """
    line = _IN_NAMES.sub(_escaped, str(text))
    return line if most is None or len(line) <= most else f"{line[: most - 1]}…"


def lines(text: object) -> str:
    """As `plain`, but line ends and tabs stay."""
    return _IN_LINES.sub(_escaped, str(text).replace("\r\n", "\n"))


def say(text: object = "", *, error: bool = False) -> None:
    """Print `text` and a line end to standard output, or standard error; a stream that cannot take it is no error."""
    stream = sys.stderr if error else sys.stdout
    if stream is not None:
        _write(stream, lines(text) + "\n")
        with contextlib.suppress(*_FAULTS):
            stream.flush()


def _write(stream: TextIO, text: str) -> None:
    with contextlib.suppress(*_FAULTS):
        try:
            stream.write(text)
        except UnicodeEncodeError:
            encoding = stream.encoding or "ascii"
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))


class _Steady:
    """A text stream that takes everything: what the one behind it cannot write is dropped."""

    def __init__(self, stream: TextIO, other: str | None):
        """other: what the stream is called in the note on standard error when it fails; None: no note."""
        self._stream, self._called = stream, other
        self._gone = False
        with contextlib.suppress(Exception):  # another class than TextIOWrapper
            cast(Any, stream).reconfigure(errors="backslashreplace")
        with contextlib.suppress(OSError, ValueError):
            # another program that shares a pipe or terminal may have set it so; writes would fail when it is full
            if stream.fileno() in (1, 2) and not os.get_blocking(stream.fileno()):
                os.set_blocking(stream.fileno(), True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if not self._gone:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                _write(self._stream, text)
            except _FAULTS as error:
                self._failed(error)
        return len(text)

    def writelines(self, texts: Any) -> None:
        for text in texts:
            self.write(text)

    def flush(self) -> None:
        if not self._gone:
            try:
                self._stream.flush()
            except _FAULTS as error:
                self._failed(error)

    def isatty(self) -> bool:
        try:
            return not self._gone and self._stream.isatty()
        except (OSError, ValueError):
            return False

    def end(self) -> None:
        """Write what is left; what cannot be written is taken by the null device, also at the interpreter's exit."""
        self.flush()
        try:
            self._stream.flush()
        except _FAULTS:
            self._drop()

    def _failed(self, error: Exception) -> None:
        if isinstance(error, ValueError) or getattr(error, "errno", None) in _GONE:  # ValueError: the stream is closed
            self._gone = True
            self._drop()
        elif self._called and isinstance(error, OSError):
            say(f"{self._called} cannot be written ({error.strerror}); the work goes on", error=True)
            self._called = None

    def _drop(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            number = self._stream.fileno()
            if number in (1, 2):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, number)
                os.close(null)


def open_closed() -> None:
    """Give standard input, output and error the null device where they are closed: data files would take their numbers."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null == number:
                os.set_inheritable(null, True)
            else:
                os.dup2(null, number)
                os.close(null)


@contextlib.contextmanager
def steady() -> Iterator[None]:
    """Within the block, and at the interpreter's exit, standard output and error may be closed, full, gone or of any encoding."""
    open_closed()
    before = sys.stdout, sys.stderr
    null = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (streams that are None: closed from the beginning)
    out = _Steady(before[0] or null, "standard output")
    err = _Steady(before[1] or null, None)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, err)
    try:
        yield
    finally:
        out.end()
        err.end()
        sys.stdout, sys.stderr = before
        null.close()
