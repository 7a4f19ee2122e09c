"""Signals that ask a command to stop, as an exception that lets it clean up, and an end when it cannot come to that."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

# Signals that ask for an end, and what ends the sentence "stopped by ...".
SIGNALS = {"SIGTERM": "SIGTERM", "SIGHUP": "SIGHUP: its terminal was closed"}
# Seconds in which an interrupted command may clean up; a call into a library that does not return is then left.
PATIENCE = 10.0


class Stopped(KeyboardInterrupt):
    """A signal other than the keyboard's asked for an end; `signal` is its number."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.signal = number


def exit_code(error: KeyboardInterrupt) -> int:
    """128 + the signal's number: 130 for the keyboard, 143 for SIGTERM."""
    return 128 + (error.signal if isinstance(error, Stopped) else int(signal.SIGINT))


@functools.cache
def be_deaf_at_exit() -> None:
    """While the interpreter ends, when the work is done, another Ctrl-C is not answered with tracebacks of its clean-up."""
    if threading.current_thread() is threading.main_thread():
        atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


@contextlib.contextmanager
def raising(say: Callable[[int], None]) -> Iterator[None]:
    """Inside the block SIGTERM and SIGHUP raise `Stopped` in the main thread, unless somebody else handles or ignores them.

    A signal that has not ended the block after PATIENCE seconds (a library waits for another process, say) ends the process:
    `say` is given the signal's number first. Does nothing in other threads than the main one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {}
    for name in SIGNALS:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            before[number] = signal.signal(number, _raise)
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    ended = threading.Event()
    known = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    watching = (
        (*before, signal.SIGINT) if signal.getsignal(signal.SIGINT) == signal.default_int_handler else tuple(before)
    )
    threading.Thread(target=_watch, args=(reader, ended, watching, say), daemon=True, name="fd2fast-stopping").start()
    try:
        yield
    finally:
        ended.set()
        signal.set_wakeup_fd(known, warn_on_full_buffer=False)
        for number, handler in before.items():
            signal.signal(number, handler)
        writer.close()


def _raise(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


def _watch(
    reader: socket.socket, ended: threading.Event, watching: tuple[int, ...], say: Callable[[int], None]
) -> None:
    """Waits for the bytes that Python's own handler sends as soon as a signal comes, whatever the main thread does."""
    with reader:
        while numbers := reader.recv(64):
            asked = [number for number in numbers if number in watching]
            if asked and not ended.wait(PATIENCE):
                try:
                    say(asked[0])
                finally:
                    os._exit(128 + asked[0])
