"""Errors of the system and of other libraries in words: what happened, and what to do about it."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from fd2fast.errors import UserError
from fd2fast.system import limits

KEPT = "what was finished before is kept: run the same command again"

# what the system says, in words: the cause, and what can be done about it
_SYSTEM: dict[str, tuple[str, str]] = {
    "ENOSPC": ("no space left", "free some space"),
    "EDQUOT": ("no space left within the disk quota", "remove files, ask for more quota or write to another disk"),
    "EFBIG": (
        "the file is too large for a limit or the file system",
        "raise the limit of file sizes (ulimit -f) or write to a disk whose file system takes larger files",
    ),
    "EROFS": ("the disk is mounted read-only", "write to another folder, or mount it writable"),
    "EACCES": ("permission denied", "change the permissions of the folder or choose another one"),
    "EPERM": ("the system does not permit it", "change the owner or attributes of the folder or choose another one"),
    "EIO": ("the disk or network share reports an input/output error", "check the disk or the connection"),
    "ESTALE": ("the network share was lost (stale file handle)", "mount it again"),
    "ENOTCONN": ("the network share or FUSE mount is not connected", "mount it again"),
    "ETIMEDOUT": ("the network share does not answer", "check the connection"),
    "EHOSTDOWN": ("the host of the network share is down", "check the connection"),
    "EHOSTUNREACH": ("the host of the network share cannot be reached", "check the connection"),
    "EREMOTEIO": ("the disk or network share reports an input/output error", "check the disk or the connection"),
    "ENODEV": ("the device is gone", "connect and mount it again"),
    "ENXIO": ("the device is gone", "connect and mount it again"),
    "EMFILE": ("too many files are open in this process", "raise the limit (ulimit -n 4096)"),
    "ENFILE": ("too many files are open on this machine", "end other programs"),
    "ENAMETOOLONG": ("the name is too long for the file system", "choose a shorter folder name"),
    "ELOOP": ("symbolic links go round in a circle", "remove the link"),
    "ENOTDIR": ("a part of the path is a file, not a folder", "choose another folder"),
    "EISDIR": ("there is a folder of this name", "remove it or choose another one"),
    "EEXIST": ("a file of this name is in the way", "remove it or choose another folder"),
    "ENOTEMPTY": ("the folder is not empty", "see who else writes to it"),
    "ENOENT": ("the folder was removed meanwhile", "see who else works in it"),
    "EBUSY": ("it is in use", "end the program that uses it"),
    "EMLINK": ("the folder holds too many entries for the file system", "choose another disk"),
    "EINVAL": ("the file system does not take it", "write to another disk"),
    "EILSEQ": ("the file system does not take this name", "choose a plain name"),
    "EOPNOTSUPP": ("the file system does not support it", "write to another disk"),
    "ENOMEM": ("out of memory", "end other programs or ask for less at once"),
}
# a full disk in the words of libraries that keep the number to themselves
_FULL = re.compile(r"no space left on device|disk quota exceeded|file too large", re.IGNORECASE)
_CUT_SHORT = ("only a part of it was written", "free some space, or raise a quota or limit of file sizes (ulimit -f)")
_NUMBER = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")
# libraries' ways to say that a write failed for a reason they do not pass on
_FAILED_WRITE = re.compile(
    r"file write failed|failed writing file|unexpected pos|encoder error|requested and \d+ written|serializ",
    re.IGNORECASE,
)
_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "cannot allocate memory",
    "memoryerror",
)
# words of oneDNN where it has no memory or does not know a shape, and of libraries in Rust where Python gave them nothing
_PERHAPS_MEMORY = re.compile(
    r"could not (create|execute) an? [a-z ]*(primitive|memory|descriptor)|pyobject pointer is null", re.IGNORECASE
)
# With less than so many bytes left at the worst moment, the former is what they mean.
_SCARCE = 1 << 28


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and what it was raised from or while handling, nearest first."""
    seen: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and all(current is not known for known in seen):
        seen.append(current)
        yield current
        current = current.__cause__ or current.__context__


def system_number(error: BaseException) -> int | None:
    """The system's error number (errno) that an OSError carries or a library tells in its text; None without one."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    text = str(error)
    if found := _NUMBER.search(text):
        return int(found[1] or found[2])
    if found := _FULL.search(text):
        words = found[0].lower()
        return errno.ENOSPC if "space" in words else errno.EDQUOT if "quota" in words else errno.EFBIG
    return None


def system_words(number: int) -> tuple[str, str]:
    """Cause and advice for an error number of the system; the advice may be empty."""
    name = errno.errorcode.get(number, "")
    return _SYSTEM.get(name, (f"{os.strerror(number)} ({name or number})", ""))


def of_writing(path: Path, error: BaseException) -> UserError | None:
    """The error of a failed write, rename or removal of `path` as one line; None if it is not the system's.

    Knows OSError, Rust's "(os error N)" (safetensors), and libraries that hide the system's error behind one of their own.
    """
    if isinstance(error, UserError):
        return None
    number, source = _cause_of_write(path, error)
    if number is None:
        return None
    cause, advice = system_words(number) if number else _CUT_SHORT
    if number in (errno.ENOSPC, errno.EDQUOT) and (free := _free(path)) is not None:
        cause = f"{cause} while writing {path} ({free / 1e6:.1f} MB free there)"
    else:
        about = source if source is not None else path
        cause = f"cannot write {path}: {cause}" + (f" ({about})" if Path(about) != Path(path) else "")
    return UserError(f"{cause}; " + (f"{advice}; " if advice else "") + KEPT)


def _cause_of_write(path: Path, error: BaseException) -> tuple[int | None, str | None]:
    """The number of the system's error (0: not told), and the file it names if that is neither `path` nor on the way to it.

    None if it is no error of the system.
    """
    failed = _FAILED_WRITE.search(str(error))
    for part in _chain(error) if failed else (error,):
        if (number := system_number(part)) is not None:
            return number, _other_file(path, part)
    if isinstance(error, OSError) or failed:
        free = _free(path)
        full = free is not None and free < 1 << 20
        if full or isinstance(error, OSError):
            return (errno.ENOSPC if full else 0), None
    return None, None


def _other_file(path: Path, error: BaseException) -> str | None:
    name = getattr(error, "filename", None)
    if not isinstance(name, str | bytes | os.PathLike):
        return None
    other = Path(os.fsdecode(name))
    near = (path, *path.parents)
    return None if other in near or other.parent == path.parent else str(other)


def _free(path: Path) -> int | None:
    """Bytes free to this user where `path` lies or would lie; None if the system does not tell."""
    for folder in (path, *path.absolute().parents):
        try:
            return shutil.disk_usage(folder).free
        except OSError:
            continue
    return None


def of_reading(path: Path, error: OSError) -> str:
    """Why a file cannot be read, as the end of a sentence."""
    if error.errno in (errno.EACCES, errno.EPERM):
        return "permission denied: make it readable"
    if error.errno in (None, errno.ENOENT):
        return "there is no such file"
    cause, advice = system_words(error.errno or errno.EIO)
    return f"{cause}: {advice}" if advice and error.errno not in (errno.ENOTDIR, errno.ENAMETOOLONG) else cause


def out_of_memory(error: BaseException) -> str:
    """'out of memory' where an error says that the host's or the GPU's is full, 'probably ...' where little was left; else ''."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or any(words in text for words in _MEMORY):
        return "out of memory"
    left = limits.spare(least=True) if _PERHAPS_MEMORY.search(text) else None
    return "probably out of memory" if left is not None and left < _SCARCE else ""


def explained(error: BaseException) -> str | None:
    """Cause and advice for an error that no stage foresaw but whose reason lies outside the program; None for others."""
    text = str(error)
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    if isinstance(error, RecursionError):
        return "a file or setting is nested too deeply to be read"
    low = text.lower()
    if full := out_of_memory(error):
        if "cuda" in low or "hip" in low:
            return f"the GPU's memory is full ({first[:160]}); end other programs on it or ask for less at once"
        return (
            f"{full} ({first[:160]}); end other programs, raise the limits (ulimit -v, the container's), "
            "or ask for less at once: a smaller size, batch or memory_limit"
        )
    if "can't start new thread" in low:
        return "the system starts no more threads; end other programs or raise the limit (ulimit -u)"
    if isinstance(error, ImportError):
        return f"a package is missing or damaged ({first[:200]}); install fd2fast again in a fresh environment"
    if type(error).__name__ in ("DistNetworkError", "DistStoreError") or "connection closed by peer" in low:
        return f"another process of this job cannot be reached ({first[:160]}); see what it reported"
    if "cuda error" in low or "nvidia driver" in low:
        return f"the GPU or its driver reports an error ({first[:160]}); see nvidia-smi, or run with --device cpu"
    if isinstance(error, UnicodeError):
        return f"a name or text has characters that cannot be encoded here ({first[:160]}); rename it or set LC_ALL=C.UTF-8"
    if (number := system_number(error)) is not None:
        cause, advice = system_words(number)
        name = getattr(error, "filename", None)
        about = f"{os.fsdecode(name)}: " if isinstance(name, str | bytes | os.PathLike) else ""
        return f"{about}{cause}" + (f"; {advice}" if advice else "")
    return None
