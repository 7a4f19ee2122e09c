"""Good input made bad: bytes, text, JSON values, arrays, tensors and pickles, each as a function of a random generator."""

from __future__ import annotations

import io
import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch

# Values that no field expects, and some that it may.
STRANGE: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**30,
    -(10**9),
    0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../../../outside",
    "/etc/passwd",
    "a\0b",
    "\ud800",
    "e\u0301\u202e",
    "x" * 5000,
    "$HOME ~ %s {0} \x1b[31m",
    [],
    {},
    [[]],
    [1, "two", None],
    {"": {}},
    [0] * 3000,
)


def damaged(content: bytes, rng: random.Random, other: bytes = b"") -> bytes:
    """Bytes flipped, cut, moved, repeated, zeroed, or joined with another file's; one to four times."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        size = len(data)
        at, span = rng.randint(0, size), rng.choice((1, 2, 4, 8, 64, 1024))
        # the first bytes say what a file is
        at = rng.randint(0, min(size, 200)) if rng.random() < 0.4 else at
        kind = rng.randrange(10)
        if kind == 0 and size:
            for _ in range(rng.choice((1, 3, 20))):
                data[rng.randrange(size)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + span]
        elif kind == 3:
            data[at:at] = rng.randbytes(span)
        elif kind == 4:
            data[at : at + span] = bytes(len(data[at : at + span]))
        elif kind == 5:
            data[at:at] = data[at : at + span] * rng.choice((1, 2, 50))
        elif kind == 6:
            data[at : at + 4] = struct.pack(rng.choice("<>") + "I", rng.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF)))
        elif kind == 7:
            data[at : at + 2] = struct.pack(rng.choice("<>") + "H", rng.choice((0, 1, 0x7FFF, 0xFFFF)))
        elif kind == 8:
            data = data[:at] + bytearray(other[rng.randint(0, len(other)) :])
        else:
            data = bytearray(rng.choice((b"", b"\0" * 512, b"<!DOCTYPE html><html>", bytes(other), rng.randbytes(300))))
    return bytes(data)


def text(content: str, rng: random.Random) -> str:
    """Lines lost, repeated, swapped, joined, and words replaced."""
    lines = content.splitlines()
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(lines)) if lines else 0
        kind = rng.randrange(8)
        if not lines or kind == 0:
            lines.insert(at, rng.choice(("", "  ", "#", "x", "1 2 3 4", "\ufeff", "\0", "=" * 3000)))
        elif kind == 1:
            del lines[at]
        elif kind == 2:
            lines.insert(rng.randint(0, len(lines)), lines[at])
        elif kind == 3:
            other = rng.randrange(len(lines))
            lines[at], lines[other] = lines[other], lines[at]
        elif kind == 4:
            lines = lines[:at]
        else:
            words = lines[at].split(" ")
            strange = rng.choice(STRANGE)
            words[rng.randrange(len(words))] = strange if isinstance(strange, str) else json.dumps(strange)
            lines[at] = " ".join(words)
    return rng.choice(("\n", "\n", "\r\n", "\r")).join(lines) + rng.choice(("\n", ""))


def value(content: Any, rng: random.Random, depth: int = 0) -> Any:
    """A JSON value with one to three places changed."""
    for _ in range(rng.choice((1, 1, 1, 2, 3)) if depth == 0 else 1):
        content = _one_place(content, rng)
    return content


def _one_place(content: Any, rng: random.Random) -> Any:
    if isinstance(content, dict | list) and content and rng.random() < 0.85:
        if isinstance(content, dict):
            fresh = dict(content)
            key = rng.choice(list(fresh))
            kind = rng.random()
            if kind < 0.1:
                del fresh[key]
            elif kind < 0.2:
                fresh[rng.choice(("x", "../x", "", key + " ", key.upper()))] = fresh.pop(key)
            else:
                fresh[key] = _one_place(fresh[key], rng)
            return fresh
        items = list(content)
        at, kind = rng.randrange(len(items)), rng.random()
        if kind < 0.15:
            del items[at]
        elif kind < 0.3:
            items.insert(at, items[at])
        elif kind < 0.35:
            rng.shuffle(items)
        else:
            items[at] = _one_place(items[at], rng)
        return items
    if rng.random() < 0.08:
        nested: Any = content
        for _ in range(rng.choice((30, 400))):
            nested = [nested]
        return nested
    return rng.choice(STRANGE)


def as_json(content: Any, rng: random.Random) -> bytes:
    """A changed value as JSON, now and then as JSON that is none, deeper than any reader goes, or in another encoding."""
    kind = rng.random()
    if kind < 0.03:
        return b"[" * rng.choice((2_000, 200_000))
    if kind < 0.06:
        return rng.choice((b"", b"null", b"[]", b"3", b'"x"', b"{}", b"NaN", b"1" * 10_000))
    good = json.dumps(content, indent=1)
    if kind < 0.25:
        return damaged(good.encode(), rng)
    if kind < 0.28:
        return good.encode("utf-16")
    return json.dumps(value(content, rng), indent=1).encode("utf-8", "surrogatepass")


class Evil:
    """What touches a file when it is unpickled."""

    def __init__(self, canary: Path, way: int):
        self.canary, self.way = str(canary), way

    def __reduce__(self) -> tuple[Any, ...]:
        if self.way == 0:
            return os.system, (f"touch '{self.canary}'",)
        if self.way == 1:
            return exec, (f"open({self.canary!r}, 'w').close()",)
        if self.way == 2:
            return open, (self.canary, "w")
        if self.way == 3:
            return eval, (f"__import__('pathlib').Path({self.canary!r}).touch()",)
        return Path.touch, (Path(self.canary),)


def pickled(rng: random.Random, canary: Path) -> bytes:
    """A hostile pickle: bare, in torch's old and new formats, inside a state dict, in a .npy file or an .npz."""
    import pickle

    evil: Any = Evil(canary, rng.randrange(5))
    content = rng.choice((evil, {"state_dict": evil}, {"conv.weight": torch.zeros(2), "x": evil}, [evil] * 3))
    buffer = io.BytesIO()
    kind = rng.randrange(5)
    if kind == 0:
        return pickle.dumps(content, protocol=rng.choice((0, 2, 4)))
    if kind == 1:
        torch.save(content, buffer)
    elif kind == 2:
        torch.save(content, buffer, _use_new_zipfile_serialization=False)
    else:
        array = np.empty(1, object)
        array[0] = content
        (np.save if kind == 3 else np.savez)(buffer, array)
    return buffer.getvalue()


def npy(array: np.ndarray, rng: random.Random, canary: Path) -> bytes:
    """A .npy file with another header than its data, other data than its header, or an array of other type or shape."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    good = buffer.getvalue()
    kind = rng.randrange(6)
    if kind == 0:
        return pickled(rng, canary)
    if kind == 1:
        return damaged(good, rng)
    if kind == 2:
        shape = rng.choice(((), (0,), (2**40,), (2**62, 4), (-1,), array.shape[::-1], (1, *array.shape)))
        header = {"descr": array.dtype.str, "fortran_order": rng.random() < 0.3, "shape": shape}
    elif kind == 3:
        descr = rng.choice(("|O", "<f8", "|S4", "<U9", ">i2", "|V8", "<M8[s]", [("a", "<i4")], "nonsense", "<c16"))
        header = {"descr": descr, "fortran_order": False, "shape": array.shape}
    else:
        other: Any = rng.choice(
            (
                array.astype(np.float64) * np.nan,
                array.astype(np.int64) - 7,
                np.full(array.shape, 10**9),
                array[:0],
                array.reshape(-1),
                array[..., None],
                array.astype(np.complex64),
                np.asfortranarray(array),
                np.roll(array, 1),
            )
        )
        buffer = io.BytesIO()
        np.save(buffer, other.astype(array.dtype, casting="unsafe") if kind == 5 else other)
        return buffer.getvalue()
    line = repr(header).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(line)) + line + good[128:]


def safetensors(good: bytes, rng: random.Random) -> bytes:
    """A .safetensors file with a changed header, kept in step with its length or not, or changed bytes."""
    if rng.random() < 0.35:
        return damaged(good, rng)
    (length,) = struct.unpack("<Q", good[:8])
    header = json.loads(good[8 : 8 + length])
    settings = header.get("__metadata__", {}).get("fd2fast")
    if settings is not None and rng.random() < 0.6:
        header["__metadata__"]["fd2fast"] = as_json(json.loads(settings), rng).decode("utf-8", "replace")
        line = json.dumps(header).encode()
    else:
        line = as_json(header, rng)
    stated = len(line) if rng.random() < 0.9 else rng.choice((0, 2**63, 10**9, len(line) + 1))
    return struct.pack("<Q", stated) + line + good[8 + length :]


def state(content: Any, rng: random.Random, canary: Path) -> bytes:
    """A checkpoint with tensors of other shapes, types and values, other keys and wrappers, or a pickle of something else."""
    kind = rng.random()
    if kind < 0.2:
        return pickled(rng, canary)
    buffer = io.BytesIO()
    if kind < 0.45:
        torch.save(content, buffer)
        return damaged(buffer.getvalue(), rng)
    torch.save(_other_state(content, rng), buffer, _use_new_zipfile_serialization=rng.random() < 0.8)
    return buffer.getvalue()


def _other_state(content: Any, rng: random.Random) -> Any:
    if isinstance(content, torch.Tensor):
        return rng.choice(
            (
                content.double() * float("nan"),
                content.to(torch.int8),
                content.half() if content.is_floating_point() else content,
                content.reshape(-1)[:0],
                content[None],
                content.to(torch.complex64),
                content.to_sparse() if content.ndim else content,
                torch.zeros(3, 1, 7),
                torch.zeros(()),
                content.to("meta"),
                torch.nn.Parameter(content.float()),
                rng.choice(STRANGE[:12]),
            )
        )
    if not isinstance(content, dict | list | tuple) or not content or rng.random() < 0.05:
        return rng.choice(STRANGE)
    if isinstance(content, list | tuple):
        items = list(content)
        at = rng.randrange(len(items))
        items[at] = _other_state(items[at], rng)
        return items
    fresh, key = dict(content), rng.choice(list(content))
    kind = rng.randrange(7)
    if kind == 0:
        del fresh[key]
    elif kind == 1:
        fresh[rng.choice(("x", 7, None, f"{key}.x", f"module.{key}"))] = fresh.pop(key)
    elif kind == 2:
        return {rng.choice(("state_dict", "model", "ema", 3)): fresh}
    elif kind == 3:
        return {f"{rng.choice(('module.', 'model.', '_orig_mod.'))}{name}": item for name, item in fresh.items()}
    else:
        fresh[key] = _other_state(fresh[key], rng)
    return fresh
