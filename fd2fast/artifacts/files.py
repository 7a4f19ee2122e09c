"""Whole files of a result, written atomically and read back, with the system's errors put as causes and what to do."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fd2fast.errors import UserError
from fd2fast.system import causes, lock

# how a damaged file of an unfinished stage is repaired
AGAIN = "remove it, and the same command does that part again"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the system while `path` is made, moved or removed come out as a UserError with the cause and what to do."""
    try:
        yield
    except Exception as error:
        if (told := causes.of_writing(Path(path), error)) is not None:
            raise told from error
        raise


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed onto it when the block ends well and removed when it does not.

    Raises UserError with the cause when the system refuses: a full disk (with the space left), a quota, a lost share ...
    """
    path = Path(path)
    lock.refuse_lost(path)
    temporary = path.with_name(f"{lock.TEMPORARY}{lock.process_name()}-{path.name}")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            remove(temporary)
            raise


def sync_folder(path: Path) -> None:
    """Let the names in a folder reach the disk, so that a record written later cannot outlive what it vouches for.

    Nothing where the file system cannot sync folders.
    """
    with writing(path):
        try:
            folder = os.open(path, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM, errno.ENOSYS):
                raise


def remove(path: Path) -> None:
    """Remove a file, if it can be."""
    with contextlib.suppress(OSError):
        path.unlink()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys in the order given."""
    write_bytes(path, (json.dumps(value, indent=1, default=plain) + "\n").encode())


def write_npy(path: Path, array: np.ndarray) -> None:
    """Write a .npy file atomically."""
    array = np.asarray(array, order="C")
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        # not np.save: its tofile reports a full disk as an OSError without errno
        file.write(array.reshape(-1).view(np.uint8).data)


def new_array(path: Path, shape: tuple[int, ...], dtype: Any = np.uint8) -> np.memmap:
    """A mapped .npy file of zeros whose disk space is taken at once: a full disk is an error here, not a signal later."""
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "rb+") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return array


def write_torch(path: Path, value: Any) -> None:
    """Write tensors and plain values (readable with weights_only=True) atomically."""
    import torch

    # through a file of Python's: torch's own hides why a write failed
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        torch.save(value, file)


def write_safetensors(path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as a .safetensors file atomically; equal tensors, equal bytes."""
    from safetensors.torch import save

    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    write_bytes(path, save(plain, metadata=metadata))


@contextlib.contextmanager
def resumable(what: str) -> Iterator[None]:
    """Errors of taking up a saved state (`what`) that is not what this version saves come out as a UserError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if causes.explained(error) is not None:  # no memory to take it up, say
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{what} does not fit ({type(error).__name__}: {reason}): it was saved by another version or is damaged; "
            "--overwrite begins it anew"
        ) from error


def read_torch(path: Path) -> Any:
    """Read what write_torch wrote; a pickle with anything but tensors and plain values is refused."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {causes.of_reading(path, error)}") from error
    except MemoryError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} is not a file of tensors ({reason[:200]}); {AGAIN}") from error


def read_json(path: Path, what: str = "a record", repair: str = AGAIN) -> Any:
    """The value in a JSON file that fd2fast wrote; a UserError says that it is not `what`, and how to repair that."""
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {causes.of_reading(path, error)}") from error
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"{path} is not {what} of fd2fast ({reason}); {repair}") from error


def plain(value: Any) -> Any:
    """What JSON can hold of a value that it does not know; TypeError if that is nothing."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, tuple | set):
        return list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} cannot be stored in a manifest")
