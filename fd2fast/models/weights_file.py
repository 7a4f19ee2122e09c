"""Files that should hold weights, of every make: told apart by their content and read as tensors, nothing in them executed."""

from __future__ import annotations

import json
import math
import os
import re
import stat
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fd2fast.errors import UserError
from fd2fast.system import causes

WANTED = "wanted a .pth or .safetensors file with the state dict of a model"
_HEAD = 4096  # bytes looked at to tell the kind of a file
_AGAIN = "download it again"

# what a file begins with, and what it is
_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "is a pointer of git-lfs, not the weights: run git lfs pull in its repository"),
    (b"/annex/objects", "is a pointer of git-annex, not the weights: run git annex get in its repository"),
    (b"\x1f\x8b", "is compressed by gzip: unpack it (gunzip)"),
    (b"BZh", "is compressed by bzip2: unpack it (bunzip2)"),
    (b"\xfd7zXZ\x00", "is compressed by xz: unpack it (unxz)"),
    (b"\x28\xb5\x2f\xfd", "is compressed by zstd: unpack it (unzstd)"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive: unpack it"),
    (b"Rar!", "is a rar archive: unpack it"),
    (b"\x89HDF", "is an HDF5 file (Keras or TensorFlow), not weights of PyTorch"),
    (b"GGUF", "is a GGUF file of a language model, not weights of PyTorch"),
    (b"\x93NUMPY", "is a numpy array, not the state dict of a model"),
    (b"\x89PNG", "is an image"),
    (b"\xff\xd8\xff", "is an image"),
    (b"GIF8", "is an image"),
    (b"%PDF", "is a PDF document"),
    (b"\x7fELF", "is a program"),
    (b"MZ", "is a Windows program"),
    (b"SQLite format 3", "is a data base"),
    (b"caffe2", "is a Caffe2 file, not weights of PyTorch"),
)
_OF_MODULES = ("torch.nn.", "torchvision.models.", "timm.models.", "timm.layers.", "torch.fx.")
# modules whose names have no business in a checkpoint, whatever they would do
_HOSTILE = (
    "os", "posix", "nt", "sys", "subprocess", "io", "_io", "shutil", "socket", "importlib", "runpy", "pty", "ctypes",
    "webbrowser", "code", "codeop", "pickle", "_pickle", "marshal", "types", "inspect", "operator", "_operator", "builtins",
    "__builtin__", "commands", "platform", "multiprocessing", "threading", "asyncio", "urllib", "http", "requests",
    "tempfile", "pdb", "bdb", "timeit", "cProfile", "profile", "trace", "doctest", "torch.hub",
)  # fmt: skip
_HARMLESS_BUILTINS = (
    "object",
    "frozenset",
    "slice",
    "range",
    "int",
    "float",
    "str",
    "bytes",
    "list",
    "dict",
    "tuple",
    "bool",
)
_ATTEMPTS = 200


class Foreign:
    """Stands for an object of a class that was not loaded: `state` is what the file says about it, `name` its class."""

    name = ""
    state: Any = None

    def __new__(cls, *given: Any, **named: Any) -> Any:
        return super().__new__(cls)

    def __init__(self, *given: Any, **named: Any):
        self.state = given or None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_tensors(path: Path) -> dict[str, Any]:
    """The dict stored in a .safetensors or torch file, objects of foreign classes as `Foreign`; nothing in it is executed.

    The content decides, not the name's ending. Raises UserError that says what the file is and what to do if it is missing,
    unreadable, incomplete or something else.
    """
    path = Path(path)
    begin, size = _begin(path)
    if _is_safetensors(begin, size):
        return _safetensors(path, begin, size)
    if fault := _foreign_file(path, begin, size):
        raise UserError(f"weights {path}: it {fault}; {WANTED}")
    content = _torch(path)
    if isinstance(content, Foreign):
        raise UserError(f"weights {path}: {_whole(content)}")
    if not isinstance(content, dict):
        raise UserError(f"weights {path} holds a {type(content).__name__}; {WANTED}")
    return content


def whole_models(content: dict[str, Any]) -> list[tuple[str, Foreign]]:
    """Entries that are whole pickled models."""
    return [(str(key), value) for key, value in content.items() if isinstance(value, Foreign) and _is_module(value)]


def how_to_save(name: str, key: str | None = None) -> str:
    """What to run where the model's code is, to get its state dict."""
    loaded = f"torch.load(FILE, weights_only=False){'' if key is None else f'[{key!r}]'}"
    return (
        f"a whole pickled model ({name}), which cannot be read without running code; where its code is trusted, save its "
        f"state dict: torch.save({loaded}.state_dict(), 'weights.pth')"
    )


def _whole(content: Foreign) -> str:
    if _is_module(content):
        return f"it holds {how_to_save(content.name)}"
    return f"it holds a {content.name}; {WANTED}"


def _is_module(value: Foreign) -> bool:
    return value.name.startswith(_OF_MODULES) or (isinstance(value.state, dict) and "_modules" in value.state)


def _begin(path: Path) -> tuple[bytes, int]:
    """The first bytes of a regular file, and its size; UserError for everything else."""
    try:
        kind = path.stat()
        if stat.S_ISDIR(kind.st_mode):
            raise UserError(f"weights {path}: it is a folder{_inside(path)}")
        if not stat.S_ISREG(kind.st_mode):
            raise UserError(f"weights {path}: it is no regular file (a pipe or device); {WANTED}")
        with open(path, "rb") as file:
            return file.read(_HEAD), kind.st_size
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        if isinstance(error, ValueError):  # a NUL in the name
            raise UserError(f"weights {str(path)!r}: no file can have this name") from error
        raise UserError(
            f"weights {path}: {causes.of_reading(path, error)}; wanted a .pth or .safetensors file, or 'hub'"
        ) from error


def _inside(folder: Path) -> str:
    """What a folder given for a file holds instead, as the end of a sentence."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        names = []
    if "manifest.json" in names:
        return " of fd2fast's own, whose result is used by its folder, not as starting weights; wanted a file"
    if ".metadata" in names and any(name.endswith(".distcp") for name in names):
        return " of torch.distributed.checkpoint: convert it (python -m torch.distributed.checkpoint.format_utils dcp_to_torch)"
    if "data.pkl" in names:
        return ", an unpacked torch file: give the file it was unpacked from"
    found = [name for name in names if name.endswith((".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar"))]
    return f": give the file in it ({', '.join(found[:5])})" if found else f"; {WANTED}"


def _is_safetensors(begin: bytes, size: int) -> bool:
    """Eight bytes with the length of a JSON header, and its first brace."""
    return len(begin) > 8 and begin[8:9] == b"{" and 2 <= int.from_bytes(begin[:8], "little") <= 100_000_000


def _safetensors(path: Path, begin: bytes, size: int) -> dict[str, Any]:
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except MemoryError:
        raise
    except Exception as error:  # the reader has its own errors for each fault
        raise UserError(f"weights {path}: {_safetensors_fault(path, size, error)}") from error


def _safetensors_fault(path: Path, size: int, error: Exception) -> str:
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if 8 + length > size:
                return f"it ends after {size} bytes, within its header: the download was not finished; {_AGAIN}"
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
        wanted = 8 + length + max(ends, default=0)
        if wanted > size:
            return f"it has {size} bytes of {wanted}: the download was not finished; {_AGAIN}"
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        pass
    return f"it is a damaged .safetensors file ({_first_line(error)}); {_AGAIN}"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def _foreign_file(path: Path, begin: bytes, size: int) -> str:
    """What a file is that cannot be a torch file; empty if it may be one."""
    if size == 0:
        return f"is empty; {_AGAIN}"
    if not begin.strip(b"\0"):
        return f"holds only zeros: it was not written to the end; {_AGAIN}"
    for magic, what in _MAGIC:
        if begin.startswith(magic):
            return what
    if begin[4:8] == b"TFL3":
        return "is a TensorFlow Lite model, not weights of PyTorch"
    if begin[257:262] == b"ustar":
        return "is a tar archive: unpack it"
    if begin.startswith(b"PK"):
        return _foreign_zip(path, size)
    if path.suffix.lower() == ".onnx":
        return "is an ONNX model, not weights of PyTorch"
    return _text(path, begin, size)


def _text(path: Path, begin: bytes, size: int) -> str:
    plain = begin.removeprefix(b"\xef\xbb\xbf").lstrip()
    low = plain[:200].lower()
    if low.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<body", b"<script", b"<!--")):
        title = re.search(rb"<title[^>]*>(.*?)</title>", begin, re.IGNORECASE | re.DOTALL)
        named = f" ({' '.join(title[1].decode('utf-8', 'replace').split())[:80]!r})" if title else ""
        return (
            f"is a web page{named}, not the weights: the server asked for a login or a click; download the file itself"
        )
    try:
        text = begin.decode("utf-8", "strict" if size <= len(begin) else "ignore")
    except UnicodeDecodeError:
        return ""
    if not text.isprintable() and any(not c.isprintable() and c not in "\r\n\t\f\ufeff" for c in text):
        return ""
    if plain[:1] in b"{[":
        if b'"weight_map"' in begin:
            return "is the index of weights in several files: join them into one (safetensors.torch.save_file)"
        return f"is JSON, not the weights: {' '.join(text.split())[:100]!r}"
    return f"is a text, not the weights: {' '.join(text.split())[:80]!r}"


def _foreign_zip(path: Path, size: int) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        return f"begins like a torch file but is incomplete or damaged ({_first_line(error)}; {size} bytes): {_AGAIN}"
    last = {name.rsplit("/", 1)[-1] for name in names}
    if "constants.pkl" in last:
        return (
            "is a TorchScript program, which would have to be run; save its state dict: "
            "torch.save(torch.jit.load(FILE, map_location='cpu').state_dict(), 'weights.pth')"
        )
    if "data.pkl" in last:
        return ""
    if "archive_format" in last or any(name.startswith("models/") and name.endswith(".json") for name in names):
        return "is a program of torch.export, which would have to be run; save the state dict of its model instead"
    if names and all(name.endswith(".npy") for name in names):
        return "is an archive of numpy arrays, not weights of PyTorch"
    if "config.json" in last and any(name.endswith(".h5") for name in last):
        return "is a Keras model, not weights of PyTorch"
    held = [name for name in names if name.endswith((".pth", ".pt", ".safetensors", ".bin", ".ckpt"))] or names
    return f"is a zip archive: unpack it (it holds {', '.join(held[:3]) or 'nothing'})"


def _torch(path: Path) -> Any:
    """The object in a torch file; classes that torch does not allow stand as `Foreign`, and nothing of theirs is run."""
    strange: dict[str, type] = {}
    for _ in range(_ATTEMPTS):
        try:
            stands: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
                (k, name) for name, k in strange.items()
            ]
            # an open file: torch would judge a path by its ending
            with torch.serialization.safe_globals(stands), open(path, "rb") as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        except MemoryError:
            raise
        except OSError as error:
            raise UserError(f"weights {path}: {causes.of_reading(path, error)}") from error
        except Exception as error:  # truncated zip, foreign pickle: every reader has its own type
            if not _add_stand(strange, str(error)):
                raise UserError(f"weights {path}: {_torch_fault(path, error)}") from error
    raise UserError(f"weights {path} names more than {_ATTEMPTS} classes that are no tensors; {WANTED}")


def _add_stand(strange: dict[str, type], told: str) -> bool:
    """Make the next attempt possible; False if the error is of another kind or the class is none for a checkpoint."""
    if found := re.search(r"Unsupported global: GLOBAL (\S+) was not", told):
        name = found[1] if "." in found[1] else f"builtins.{found[1]}"
        if name in strange or _hostile(name):
            return False
        strange[name] = _stand(name)
        return True
    if found := re.search(r"Can only (SETITEM|append|extend).* but got <class '([^']+)'>", told):
        # a class made from dict or list: its entries are kept
        for name, kind in strange.items():
            if f"{kind.__module__}.{kind.__qualname__}" == found[2] and not hasattr(kind, "holds"):
                strange[name] = _stand(name, OrderedDict if found[1] == "SETITEM" else list)
                return True
    return False


def _hostile(name: str) -> bool:
    module, _, last = name.rpartition(".")
    if module in ("builtins", "__builtin__"):
        return last not in _HARMLESS_BUILTINS
    return any(module == bad or module.startswith(f"{bad}.") for bad in _HOSTILE)


def _stand(name: str, holds: Callable[[], Any] | None = None) -> type:
    """A class of its own for each name, so that an error tells which was meant; with `holds` its objects are plain ones."""
    body: dict[str, Any] = {"name": name, "__module__": "foreign", "__qualname__": re.sub(r"\W", "_", name)}
    if holds is not None:
        body |= {"holds": holds, "__new__": lambda cls, *given, **named: holds()}
    return type(body["__qualname__"], (Foreign,), body)


def _torch_fault(path: Path, error: Exception) -> str:
    told = str(error)
    if found := re.search(r"(?:Unsupported global: GLOBAL|unsupported GLOBAL) (\S+)", told):
        return (
            f"it cannot be read as tensors only (nothing in it was executed): it asks for {found[1]}, which no state dict "
            "needs; do not trust the file"
        )
    if "Invalid magic number" in told or "not a valid torch file" in told:
        return f"it is a pickle that torch.save did not write, or no torch file; save the state dict with torch.save; {WANTED}"
    if (
        isinstance(error, EOFError)
        or "unexpected EOF" in told
        or "central directory" in told
        or "Ran out of input" in told
    ):
        return f"it cannot be read: it is incomplete ({math.ceil(path.stat().st_size)} bytes); {_AGAIN}"
    if "Only persistent_load of storage is allowed" in told:
        return f"it holds {how_to_save('in the format before torch 1.6')}"
    reason = _first_line(error)
    if len(reason) > 120 or reason.startswith("Weights only load failed"):
        more = re.search(r"WeightsUnpickler error:\s*(.+)", told)
        reason = more[1][:160] if more else reason[:120]
    return f"it cannot be read as tensors only (nothing in it was executed): {reason}"
