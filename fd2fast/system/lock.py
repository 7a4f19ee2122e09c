"""One owner at a time for an output folder: a lock file inside it that says which process, where and since when.

The lock lies inside the folder, so that it is the same file by every path, link, mount or container that leads there, and can
be made wherever the results can. It is created by a hard link (or O_EXCL), which is atomic on network folders too. An owner on
this machine is judged by its process id and start time, and ended when the machine was started again; one on another machine or
in another container, whose processes cannot be seen from here, by the lock's modification time, which a living owner renews by
the clock of the file system.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import secrets
import shlex
import signal
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from fd2fast.errors import UserError
from fd2fast.system import causes

# Names that begin so are never part of a result.
OURS = ".fd2fast-"
LOCK = f"{OURS}lock"
TEMPORARY = f"{OURS}tmp-"

# Seconds between two signs of life of an owner, and without one until an owner that cannot be seen counts as ended.
BEAT, STALE = 15.0, 180.0
# Seconds for which a lock without readable content may be one that is being written.
_GRACE = 5.0
# Seconds that a taker waits for another one that is taking over the same lock.
_PATIENCE = 20.0
# Linux's number for the namespace of process ids that is no container's.
_FIRST_NAMESPACE = "pid:[4026531836]"
_LONGEST = 1 << 16
_SHOWN = 160


class InUse(UserError):
    """The folder belongs to another process that lives."""


@dataclass(frozen=True)
class Owner:
    """What a lock file says. Strings as their system gives them; `start` in clock ticks since boot, where it is known."""

    token: str
    host: str
    machine: str
    boot: str
    namespace: str
    pid: int
    start: int | None
    command: str
    since: str
    job: str

    def describe(self) -> str:
        """One line for people."""
        return f"process {self.pid} on {_plain(self.host)} since {_plain(self.since)} ({_plain(self.command)})"


def _plain(text: str) -> str:
    """Text of a file that anybody may have written, fit for one line of a terminal."""
    shown = "".join(c if c.isprintable() else "?" for c in text)
    return shown if len(shown) <= _SHOWN else f"{shown[: _SHOWN - 3]}..."


@dataclass(frozen=True)
class _Found:
    """A lock file as it lies there. `mark` is its token, or a fingerprint of what is none; `beat` its time of change."""

    owner: Owner | None
    mark: str
    beat: float
    readable: bool = True


@dataclass
class _Held:
    """A folder that this process owns."""

    folder: Path
    token: str
    thread: threading.Thread
    pid: int
    made: bool
    count: int = 1
    lost: bool = False

    @property
    def file(self) -> Path:
        return self.folder / LOCK


class Hold:
    """A claim on a folder, made by `take`. Of several in one process the last to be released gives the folder free."""

    def __init__(self, held: _Held | None, *, fresh: bool):
        """held: None for a process whose job owns the folder through another. fresh: no claim of this process before."""
        self._held, self.fresh = held, fresh

    def check(self) -> bool:
        """UserError where another process has the folder now; False where the lock was gone and had to be made again."""
        held = self._held
        if held is None or held.pid != os.getpid():
            return True
        found = _look(held.file)
        if found is not None and found.mark == held.token:
            return True
        if found is None and not held.lost:
            with _as_user_errors(held.folder), contextlib.suppress(FileNotFoundError):
                if _settle(held.file, _owner(held.token)) is None:
                    return False
            found = _look(held.file)
        held.lost = True
        raise _taken(held.folder, found)

    def release(self) -> None:
        """Give the claim back; calling it again does nothing."""
        held, self._held = self._held, None
        if held is None or held.pid != os.getpid():
            return
        with _table_lock:
            held.count -= 1
            if held.count:
                return
            if _table.get(held.folder) is held:
                del _table[held.folder]
        _give_free(held)
        if not _table:
            _default_signals()


# Folders that this process owns, by their real path.
_table: dict[Path, _Held] = {}
# an object that ends, and its claim with it, may do so within any statement
_table_lock = threading.RLock()
_taking = threading.Lock()
_scopes = threading.local()


def take(folder: Path | str, *, patience: float = 0.0) -> Hold:
    """Own `folder`, made where it is missing, until the claim is released or the process ends.

    In a torchrun job the first process owns it and the others join, but `by_itself`. The same thread may take a folder again.
    patience: seconds to wait for an owner that lives.
    Raises InUse where another process or thread that lives owns it, UserError where the folder cannot be written.
    """
    folder = Path(folder)
    if folder.is_symlink() and not folder.exists():
        raise UserError(
            f"{folder} is a symbolic link to {os.readlink(folder)}, which is missing: make that folder first"
        )
    real = Path(os.path.realpath(folder))
    if joins():
        found = _look(real / LOCK) if real.is_dir() else None
        if found is not None and found.owner is not None and found.owner.job != _job():
            if _lives(found, time.time() - found.beat):
                raise _in_use(folder, found)
        return Hold(None, fresh=False)
    began = time.monotonic()
    while True:
        try:
            with _taking, _as_user_errors(folder):
                hold = _again(folder, real) or _anew(folder, real)
            break
        except InUse:
            if time.monotonic() - began >= patience:
                raise
            time.sleep(0.1)
    scope = getattr(_scopes, "holds", None)
    if scope is not None:
        scope.append(hold)
    return hold


@functools.cache
def _random_name() -> str:
    return secrets.token_hex(4)


def process_name() -> str:
    """For names of temporary files: differs between processes, also between machines with equal process ids."""
    return f"{os.getpid()}-{_random_name()}"


@contextlib.contextmanager
def own(folder: Path | str, *, patience: float = 0.0) -> Iterator[Hold]:
    """`take`, released at the end of the block; temporary files that a killed process left directly in the folder are removed."""
    hold = take(folder, patience=patience)
    try:
        if hold.fresh:  # nobody else writes here: what a killed process left
            for stale in Path(folder).glob(f"{TEMPORARY}*"):
                with contextlib.suppress(OSError):
                    stale.unlink()
        yield hold
    finally:
        hold.release()


@contextlib.contextmanager
def released_at_end() -> Iterator[None]:
    """As a decorator: claims that a call makes end with it, also where somebody keeps its exception or objects."""
    before = getattr(_scopes, "holds", None)
    holds: list[Hold] = []
    _scopes.holds = holds
    try:
        yield
    finally:
        _scopes.holds = before
        for hold in holds:
            hold.release()


def in_use_by(folder: Path | str) -> str | None:
    """Which other process owns the folder, for a message, or None; takes and changes nothing."""
    found = None
    with contextlib.suppress(OSError, UserError):
        found = _look(Path(folder) / LOCK)
    if found is None or found.owner is None or found.mark in {held.token for held in list(_table.values())}:
        return None
    return found.owner.describe() if _lives(found, time.time() - found.beat) else None


def refuse_below_running(folder: Path | str) -> None:
    """InUse where a living process owns a folder above: what it has made there may not be removed under it."""
    real = Path(os.path.realpath(folder))
    for above in real.parents:
        found = None
        with contextlib.suppress(OSError, UserError):
            found = _look(above / LOCK)
        if found is None or found.owner is None or found.mark in {held.token for held in _table.values()}:
            continue
        if found.owner.job and found.owner.job == _job():  # which shares out its work below
            continue
        if _lives(found, time.time() - found.beat):
            raise _in_use(above, found)


def refuse_lost(path: Path) -> None:
    """UserError for a file in a folder that this process owned and another has taken over since."""
    lost = [held.folder for held in list(_table.values()) if held.lost]
    if lost:
        real = Path(os.path.realpath(path))
        for folder in lost:
            if folder in real.parents:
                raise _taken(folder, _look(folder / LOCK))


def _again(folder: Path, real: Path) -> Hold | None:
    """Another claim on a folder that this process owns already."""
    held = _table.get(real)
    if held is None:
        return None
    found = _look(held.file)
    if found is None or found.mark != held.token:  # removed, or taken over: a claim of before is no claim now
        held.lost = True
        with _table_lock:
            _table.pop(real, None)
        return None
    return _another(folder, held)


def _another(folder: Path, held: _Held) -> Hold:
    if held.thread is not threading.current_thread() and held.thread.is_alive():
        raise InUse(
            f"{folder} is in use by another thread of this process: wait until it ends, or choose another folder"
        )
    with _table_lock:
        held.thread = threading.current_thread()
        held.count += 1
    return Hold(held, fresh=False)


def _anew(folder: Path, real: Path) -> Hold:
    mine = _owner(secrets.token_hex(16))
    made = False
    for attempt in range(100):
        try:
            if not real.is_dir():
                real.mkdir(parents=True, exist_ok=True)
                made = True
            other = _settle(real / LOCK, mine)
            break
        except FileNotFoundError:  # an owner that ended took its empty folder away
            if attempt == 99:
                raise
            time.sleep(0.01)
    if other is not None:
        for held in _table.values():
            if held.token == other.mark:  # the same folder by a path that only mounts tell from the first
                return _another(folder, held)
        raise _in_use(folder, other)
    held = _Held(real, mine.token, threading.current_thread(), os.getpid(), made)
    with _table_lock:
        _table[real] = held
    _watch_signals()
    _start_beating()
    return Hold(held, fresh=True)


def _settle(file: Path, mine: Owner) -> _Found | None:
    """Make the lock `file` ours and give None, or give the one of an owner that lives.

    A stale lock is replaced under a claim: a lock of its own whose name holds the stale one's token. So of all that found the
    same stale lock one replaces it, and who comes late finds another token under its claim and looks again.
    """
    own = file.with_name(f"{TEMPORARY}{mine.token}")
    began = time.monotonic()
    try:
        while True:
            if _create(file, own, mine):
                return None
            found = _look(file)
            if found is None:
                continue
            if found.mark == mine.token:  # a network folder did it and said it had not
                return None
            if _lives(found, _age(own, mine, found)):
                if found.owner is None and found.readable and time.monotonic() - began < _PATIENCE:
                    time.sleep(0.05)
                    continue
                return found
            claim = file.with_name(f"{TEMPORARY}take-{found.mark}")
            other = _settle(claim, mine)
            if other is not None:
                if time.monotonic() - began >= _PATIENCE:
                    return other
                time.sleep(0.01)
                continue
            try:
                now = _look(file)
                if now is not None and now.mark == found.mark:
                    _write(own, mine)
                    os.replace(own, file)
                    return None
            finally:
                _remove(claim)
    finally:
        _remove(own)


def _create(file: Path, own: Path, mine: Owner) -> bool:
    """Whether `file` was missing and is ours now."""
    _write(own, mine)
    try:
        os.link(own, file)
        return True
    except FileExistsError:
        return False
    except FileNotFoundError:  # `own` was swept away as a left-over, or the folder is gone
        if not file.parent.is_dir():
            raise
        return False
    except OSError:  # no hard links here
        pass
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except FileExistsError:
        return False
    try:
        with open(descriptor, "wb") as handle:
            handle.write(_content(mine))
    except OSError:
        _remove(file)
        raise
    return True


def _write(own: Path, mine: Owner) -> None:
    """A file of its own with our content: new each time, as links to the last one may be locks."""
    _remove(own)
    descriptor = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    with open(descriptor, "wb") as handle:
        handle.write(_content(mine))


def _content(owner: Owner) -> bytes:
    return (json.dumps(asdict(owner), indent=1) + "\n").encode()


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _look(file: Path) -> _Found | None:
    """The lock that lies there, None if none does; UserError for a folder in its place."""
    data, readable = b"", True
    try:
        # neither waiting for a pipe's writer nor following a link
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        if error.errno == errno.ESTALE:
            return None
        try:
            status = os.lstat(file)
        except FileNotFoundError:
            return None
        readable = stat.S_ISLNK(status.st_mode)
    else:
        try:
            status = os.fstat(descriptor)
            if stat.S_ISDIR(status.st_mode):
                raise UserError(f"{file} is a folder where the lock of {file.parent} belongs: remove it and run again")
            if stat.S_ISREG(status.st_mode):
                data = os.read(descriptor, _LONGEST)
        except OSError:  # removed meanwhile on a network folder
            return None
        finally:
            os.close(descriptor)
    owner = _parse(data)
    if owner is not None:
        return _Found(owner, owner.token, status.st_mtime)
    print_of = hashlib.sha256(f"{status.st_ino}:{status.st_mtime_ns}:{status.st_size}:".encode() + data)
    return _Found(None, print_of.hexdigest()[:32], status.st_mtime, readable)


def _parse(data: bytes) -> Owner | None:
    """The owner that a lock names; None for everything but a whole lock."""
    try:
        value = json.loads(data)
        owner = Owner(**value)
    except (ValueError, TypeError, RecursionError):
        return None
    texts = (owner.host, owner.machine, owner.boot, owner.namespace, owner.command, owner.since, owner.job)
    good = (
        all(isinstance(text, str) for text in texts)
        and isinstance(owner.token, str)
        and re.fullmatch("[0-9a-f]{32}", owner.token)
        and type(owner.pid) is int
        and 0 < owner.pid < 1 << 31
        and (owner.start is None or type(owner.start) is int)
    )
    return owner if good else None


def _age(own: Path, mine: Owner, found: _Found) -> float:
    """Seconds since a lock was renewed, by the clock of its file system."""
    _write(own, mine)
    try:
        return os.stat(own).st_mtime - found.beat
    except FileNotFoundError:
        return time.time() - found.beat


def _lives(found: _Found, age: float) -> bool:
    """Whether the owner of a lock of this age lives, as far as can be seen from here."""
    running = None if found.owner is None else _running(found.owner)
    if running is not None:
        return running
    limit = _GRACE if found.owner is None and found.readable else STALE
    return abs(age) < limit


def _running(owner: Owner) -> bool | None:
    """Whether the owner's process runs; None where its processes cannot be seen from here."""
    host, machine, boot, namespace = _place()
    if machine and owner.machine == machine and owner.boot != boot:
        return False  # started again since
    if (owner.boot, owner.namespace) != (boot, namespace) or (not boot and owner.host != host):
        return None
    if owner.pid == os.getpid() and owner.start == _started(owner.pid):
        # ours, but not in the table: of a program that this process ran before it became this one
        return any(held.token == owner.token for held in _table.values())
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    start = _started(owner.pid)
    if start is None:
        # processes of others may be hidden; one that has no start time can only be asked for its number
        return True if owner.start is None else None
    return start == owner.start


def _started(pid: int) -> int | None:
    """Start of a process in clock ticks since boot; -1 for one that ended and is still listed, None if unknown."""
    try:
        text = Path(f"/proc/{pid}/stat").read_bytes()
        fields = text[text.rindex(b")") + 2 :].split()
        return -1 if fields[0] in (b"Z", b"X", b"x") else int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


@functools.cache
def _place() -> tuple[str, str, str, str]:
    """(host, machine, boot, namespace of process ids): processes of equal boot and namespace have comparable ids.

    The machine is known outside containers only: those of different machines may have all names in common.
    """
    host, machine, boot, namespace = socket.gethostname(), "", "", ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    with contextlib.suppress(OSError):
        number = Path("/etc/machine-id").read_text().strip()
        if number and boot and namespace == _FIRST_NAMESPACE:
            machine = hashlib.sha256(f"fd2fast:{host}:{number}".encode()).hexdigest()[:32]
    return host, machine, boot, namespace


def _owner(token: str) -> Owner:
    """This process as an owner."""
    host, machine, boot, namespace = _place()
    name, *arguments = sys.argv or [""]
    program = Path(name).name
    command = shlex.join(["fd2fast" if program in ("__main__.py", "") else program, *arguments])
    since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    pid = os.getpid()
    return Owner(token, host, machine, boot, namespace, pid, _started(pid), command[:1000], since, _job())


def _job() -> str:
    """What the processes of one torchrun job have in common, on all machines; empty for a process of its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return ""
    names = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    return "/".join(os.environ.get(name, "") for name in names)


def joins() -> bool:
    """Whether this is a process of a job whose first process owns and speaks for it."""
    return bool(_job()) and os.environ.get("RANK", "0") != "0" and not getattr(_scopes, "by_itself", False)


@contextlib.contextmanager
def by_itself() -> Iterator[None]:
    """What this thread takes meanwhile it owns itself, in any process of a job: work that no other process of it shares."""
    before = getattr(_scopes, "by_itself", False)
    _scopes.by_itself = True
    try:
        yield
    finally:
        _scopes.by_itself = before


def _in_use(folder: Path, found: _Found) -> InUse:
    if found.owner is None:
        return InUse(
            f"{folder} is in use by a process that its lock does not name ({LOCK} in it cannot be read): "
            "wait until that process ends, or remove the lock if none is at work there"
        )
    hint = "wait until it ends, stop it, or choose another output folder"
    if _running(found.owner) is None:
        hint += f" (on another machine or in another container: it counts as ended {STALE:.0f} s after its last sign of life)"
    return InUse(f"{folder} is in use by {found.owner.describe()}: {hint}")


def _taken(folder: Path, found: _Found | None) -> UserError:
    if found is None:
        return UserError(f"{folder} was removed or emptied while this process wrote to it; run the same command again")
    who = found.owner.describe() if found.owner is not None else "another process"
    return UserError(f"{folder} was taken over by {who} while this process wrote to it; nothing more is written to it")


@contextlib.contextmanager
def _as_user_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise causes.of_writing(folder, error) or error from error


def _give_free(held: _Held) -> None:
    with contextlib.suppress(OSError, UserError):
        found = _look(held.file)
        if found is not None and found.mark == held.token:
            held.file.unlink()
    if held.made:  # and left empty
        with contextlib.suppress(OSError):
            held.folder.rmdir()


_beating: threading.Thread | None = None


def _start_beating() -> None:
    global _beating
    with _table_lock:
        if _beating is not None and _beating.is_alive():
            return
        _beating = threading.Thread(target=_beat, name="fd2fast-lock", daemon=True)
        _beating.start()


def _beat() -> None:
    """Renew the locks as long as there are any, and notice those that others have taken."""
    global _beating
    while True:
        time.sleep(BEAT)
        with _table_lock:
            held_now = list(_table.values())
            if not held_now:
                _beating = None
                return
        for held in held_now:
            with contextlib.suppress(OSError, UserError):
                found = _look(held.file)
                if found is not None and found.mark == held.token:
                    os.utime(held.file)
                elif found is not None:
                    held.lost = True


@atexit.register
def _release_all() -> None:
    """Of this process, at its end."""
    for held in list(_table.values()):
        if held.pid == os.getpid():
            _give_free(held)
    _table.clear()


_ENDS = (signal.SIGTERM, signal.SIGHUP) if hasattr(signal, "SIGHUP") else (signal.SIGTERM,)


def _watch_signals() -> None:
    """Release the locks where a signal would end the process without its exit functions.

    Not in a torchrun job: its processes wait for each other for hours, in calls that Python's handlers do not interrupt.
    """
    if threading.current_thread() is not threading.main_thread() or _job():
        return
    for number in _ENDS:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _ended_by)


def _ended_by(number: int, frame: FrameType | None) -> None:
    _release_all()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def _default_signals() -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    for number in _ENDS:
        if signal.getsignal(number) is _ended_by:
            signal.signal(number, signal.SIG_DFL)


def _forget() -> None:
    """In a forked child: the folders are its parent's."""
    global _beating, _table_lock, _taking
    _table.clear()
    _place.cache_clear()
    _beating = None
    _table_lock, _taking = threading.RLock(), threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
