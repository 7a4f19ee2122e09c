"""Chooses the backend of each operation and says why; imports no triton and no kernel before it runs."""

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "reference")

_log = logging.getLogger("fd2fast.ops")
_HAS_TRITON = importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class Operation:
    """One operation: its name, the module of its kernels (None: there are none) and its own limits."""

    name: str
    kernel: str | None = None
    # called with the tensors that choose() got; returns the reason against the kernel, or None
    limits: Callable[[tuple[Tensor, ...]], str | None] | None = None


_operations: dict[str, Operation] = {}
_logged: set[tuple[str, str]] = set()


def register(
    name: str, kernel: str | None = None, limits: Callable[[tuple[Tensor, ...]], str | None] | None = None
) -> None:
    """Enter an operation; `kernel` names its module, such as "fd2fast.kernels.bn_matching"."""
    _operations[name] = Operation(name, kernel, limits)


def interpreting() -> bool:
    """Whether Triton runs kernels on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(op_name: str) -> str | None:
    """Why the operation's kernel cannot run in this process at all, or None."""
    operation = _operations[op_name]
    if operation.kernel is None:
        return f"{op_name} has no Triton kernel"
    if not _HAS_TRITON:
        return "triton is not installed"
    if not torch.cuda.is_available() and not interpreting():
        return "no NVIDIA GPU is visible and TRITON_INTERPRET is not 1"
    return None


def supports(op_name: str, tensors: tuple[Tensor, ...]) -> str | None:
    """Why the operation's kernel cannot take these tensors, or None if it can."""
    reason = unavailable(op_name)
    if reason is not None:
        return reason
    for tensor in tensors:
        if tensor.device.type == "cpu" and not interpreting():
            return "the tensors are on the CPU"
        if tensor.device.type not in ("cuda", "cpu"):
            return f"the tensors are on {tensor.device.type}"
        if tensor.device.type == "cuda" and tensor.dtype == torch.float64:
            return "float64 on a GPU is left to the reference"
    limits = _operations[op_name].limits
    return None if limits is None else limits(tensors)


def choose(op_name: str, tensors: tuple[Tensor, ...], backend: str) -> str:
    """ "triton" or "reference" for these tensors.

    "auto" takes the kernel for CUDA tensors that it supports, and logs once why not otherwise (the
    interpreter is never chosen by itself). "triton" raises ValueError with the reason where the kernel cannot
    run.
    """
    if backend not in BACKENDS:
        raise ValueError(f'backend must be "auto", "triton" or "reference", got {backend!r}')
    if backend == "reference":
        return "reference"
    on_gpu = any(t.device.type == "cuda" for t in tensors)
    if backend == "auto" and not on_gpu:
        return "reference"
    reason = supports(op_name, tensors)
    if reason is None:
        return "triton"
    if backend == "triton":
        raise ValueError(f"{op_name}: backend triton was asked for, but {reason}")
    if not torch.compiler.is_compiling() and (op_name, reason) not in _logged:
        _logged.add((op_name, reason))
        _log.info("%s runs on the reference backend: %s", op_name, reason)
    return "reference"


def kernels(op_name: str) -> ModuleType:
    """The operation's kernel module, imported on first use."""
    module = _operations[op_name].kernel
    if module is None:
        raise ValueError(f"{op_name} has no Triton kernel")
    return importlib.import_module(module)


def backends() -> dict[str, tuple[str, str]]:
    """For each operation: the backend that "auto" takes on this machine's best device, and why."""
    chosen = {}
    for name in sorted(_operations):
        reason = unavailable(name)
        if reason is None and not torch.cuda.is_available():
            reason = "no NVIDIA GPU is visible (the interpreter runs only where backend is triton)"
        chosen[name] = ("triton", "") if reason is None else ("reference", reason)
    return chosen
