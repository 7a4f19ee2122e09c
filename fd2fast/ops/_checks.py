"""Checks of operation inputs; every message names the tensor, what was wanted and what was given."""

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from fd2fast.reference._offsets import Offsets, host_offsets

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.int32, torch.int64)


def shape(name: str, tensor: Tensor, wanted: tuple[int | str, ...]) -> None:
    """Demand a shape; a string stands for any size and names the dimension in the message."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    given = tuple(tensor.shape)
    fits = len(given) == len(wanted) and all(isinstance(w, str) or w == g for w, g in zip(wanted, given, strict=True))
    if not fits:
        raise ValueError(f"{name} must be [{', '.join(str(w) for w in wanted)}], got {list(given)}")


def floating(name: str, tensor: Tensor) -> None:
    """Demand float16, bfloat16, float32 or float64."""
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")


def same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Demand the device of the other tensor."""
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on {other_name}'s device {other.device}, got {tensor.device}")


def constant(name: str, tensor: Tensor | None) -> None:
    """Refuse a tensor that asks for a gradient the operation does not have."""
    if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} must not require a gradient, the operation has none; pass it detached")


def reads_values(tensor: Tensor) -> bool:
    """Whether values may be checked: on the CPU always, on a GPU (waits) only if FD2FAST_CHECK_VALUES=1."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or os.environ.get("FD2FAST_CHECK_VALUES") == "1"


def labels(name: str, tensor: Tensor, count: int, classes: int) -> None:
    """Demand int [count] labels in [0, classes); the range where values may be read."""
    shape(name, tensor, (count,))
    if tensor.dtype not in INTEGERS:
        raise ValueError(f"{name} must be int32 or int64, got {tensor.dtype}")
    if count and reads_values(tensor):
        lowest, highest = (int(v) for v in torch.aminmax(tensor))
        if lowest < 0 or highest >= classes:
            raise ValueError(f"{name} must lie in [0, {classes}), got values from {lowest} to {highest}")


def offsets(name: str, value: Offsets, total: int, of: str, entries: int | None = None) -> Offsets:
    """Demand int offsets from 0 to `total` that never fall; returns host ints where known, else the tensor.

    entries: the wanted number of offsets, or None for any number >= 1. Values on a GPU are read only with
    FD2FAST_CHECK_VALUES=1, because that waits for the device.
    """
    wanted = "[S+1]" if entries is None else f"[{entries}]"
    if isinstance(value, Tensor):
        if value.ndim != 1 or (value.numel() != entries if entries is not None else value.numel() < 1):
            raise ValueError(f"{name} must be {wanted}, got {list(value.shape)}")
        if value.dtype not in INTEGERS:
            raise ValueError(f"{name} must be int32 or int64, got {value.dtype}")
        host = host_offsets(value)
        if host is None and reads_values(value):
            _offset_values(name, tuple(value.tolist()), total, of)
    else:
        if not isinstance(value, Sequence) or any(int(v) != v for v in value):
            raise ValueError(f"{name} must be an int tensor, list or tuple, got {value!r}")
        host = tuple(int(v) for v in value)
        if len(host) != entries if entries is not None else not host:
            raise ValueError(f"{name} must be {wanted}, got [{len(host)}]")
    if host is None:
        return value
    _offset_values(name, host, total, of)
    return host


def _offset_values(name: str, host: tuple[int, ...], total: int, of: str) -> None:
    if host[0] != 0:
        raise ValueError(f"{name} must start at 0, got {host[0]}")
    if host[-1] != total:
        raise ValueError(f"{name} must end at {of} = {total}, got {host[-1]}")
    for i, (a, b) in enumerate(zip(host, host[1:], strict=False)):
        if b < a:
            raise ValueError(f"{name} must not fall, got {name}[{i}] = {a} > {name}[{i + 1}] = {b}")
