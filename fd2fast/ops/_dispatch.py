"""The registry of each operation's backends: chooses one and says why not another; imports no triton and no kernel itself."""

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# By rank: each backend with the type of device on whose tensors "auto" takes it, None for any. Each but the reference is a folder
# beside this file. Triton's interpreter runs kernels on a CPU too; it is slow, so it has to be asked for by name.
RANKED: dict[str, str | None] = {"triton": "cuda", "cpu": "cpu", "eager": None, "reference": None}

_log = logging.getLogger("fd2fast.ops")
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def _nothing(*arguments: Any, **settings: Any) -> None:
    """No reason against it."""


@dataclass(frozen=True)
class Implementation:
    """An operation's implementation by one backend; reasons are texts, None where there is nothing against it."""

    run: Callable[..., Any]
    # called with the arguments of `run`: why it cannot take them
    why_not: Callable[..., str | None]
    # why it cannot run in this process at all
    missing: Callable[[], str | None]


_operations: dict[str, dict[str, Implementation]] = {}
_logged: set[tuple[str, str]] = set()


def register(
    op_name: str,
    backend: str,
    run: Callable[..., Any],
    why_not: Callable[..., str | None] = _nothing,
    missing: Callable[[], str | None] = _nothing,
) -> None:
    """Enter an operation's implementation; its first argument is a tensor of the device it runs on, or several of them.

    Raises ValueError for a backend that RANKED does not list and for a second implementation by the same backend.
    """
    if backend not in RANKED:
        raise ValueError(f"backend of {op_name} must be one of {', '.join(RANKED)}, got {backend!r}")
    implementations = _operations.setdefault(op_name, {})
    if backend in implementations:
        raise ValueError(f"{op_name} is registered for {backend} already")
    implementations[backend] = Implementation(run, why_not, missing)


def register_triton(
    op_name: str, run: Callable[..., Any], *, tensors: int = 1, limits: Callable[..., str | None] = _nothing
) -> None:
    """Enter a Triton implementation whose first arguments are `tensors` tensors or None; limits: its own reasons."""

    def why_not(*arguments: Any, **settings: Any) -> str | None:
        first = arguments[:tensors] if isinstance(arguments[0], Tensor) else arguments[0]
        return _off_gpu(first) or limits(*arguments, **settings)

    register(op_name, "triton", run, why_not, triton_missing)


def interpreting() -> bool:
    """Whether Triton runs kernels on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_missing() -> str | None:
    """Why no Triton kernel can run in this process, or None."""
    if not _HAS_TRITON:
        return "triton is not installed"
    if not torch.cuda.is_available() and not interpreting():
        return "no NVIDIA GPU is visible and TRITON_INTERPRET is not 1"
    return None


def _off_gpu(tensors: Sequence[Tensor | None]) -> str | None:
    """Why Triton kernels cannot take these, or None."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type == "cpu" and not interpreting():
            return "the tensors are on the CPU"
        if tensor.device.type not in ("cuda", "cpu"):
            return f"the tensors are on {tensor.device.type}"
        if tensor.device.type == "cuda" and tensor.dtype == torch.float64:
            return "float64 on a GPU is left to the reference"
    return None


def off_cpu(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> str | None:
    """Why C++ kernels for these types cannot take the tensors' memory, or None."""
    if torch.compiler.is_compiling():
        return "torch.compile does not trace C++ kernels"
    for tensor in tensors:
        if type(tensor) is not Tensor:
            return f"one is a {type(tensor).__name__}, not a plain tensor"
        if tensor.device.type != "cpu":
            return f"the tensors are on {tensor.device.type}"
        if tensor.dtype not in dtypes:
            return f"one is {tensor.dtype}"
    return None


def device_type(first: Tensor | Sequence[Tensor]) -> str:
    """The type of device of a tensor, or of the first of several."""
    return (first if isinstance(first, Tensor) else first[0]).device.type


def choose(op_name: str, arguments: Sequence[Any], backend: str, **settings: Any) -> str:
    """The backend that runs these arguments (those of the operation's `run`).

    "auto" takes the first by rank that is for the tensor's device and has nothing against the arguments, and logs once
    what others had. A backend by name raises ValueError with the reason where it cannot run.
    """
    implementations = _operations[op_name]
    if backend == "auto":
        device = device_type(arguments[0])
        for name, its_device in RANKED.items():
            if its_device not in (device, None) or name not in implementations or name == "reference":
                continue
            implementation = implementations[name]
            reason = implementation.missing() or implementation.why_not(*arguments, **settings)
            if reason is None:
                return name
            if not torch.compiler.is_compiling() and (op_name, reason) not in _logged:
                _logged.add((op_name, reason))
                _log.info("%s does not run on the %s backend: %s", op_name, name, reason)
        return "reference"
    if backend not in RANKED:
        raise ValueError(f"backend must be one of auto, {', '.join(RANKED)}, got {backend!r}")
    reason = unavailable(op_name, backend) or implementations[backend].why_not(*arguments, **settings)
    if reason is not None:
        raise ValueError(f"{op_name}: backend {backend} was asked for, but {reason}")
    return backend


def run(op_name: str, backend: str, *arguments: Any, **settings: Any) -> Any:
    """The operation by the backend that `choose` names."""
    chosen = choose(op_name, arguments, backend, **settings)
    return _operations[op_name][chosen].run(*arguments, **settings)


def unavailable(op_name: str, backend: str) -> str | None:
    """Why the operation's implementation by the backend cannot run in this process at all, or None."""
    implementation = _operations[op_name].get(backend)
    return "none is registered" if implementation is None else implementation.missing()


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a tensor, or several, and more, free of any autocast around."""

    def called(first: Tensor | Sequence[Tensor], *arguments: Any, **settings: Any) -> Any:
        with torch.autocast(device_type(first), enabled=False):
            return function(first, *arguments, **settings)

    return called


def only_once() -> None:
    """To begin a backward pass that has no derivative itself; torch's once_differentiable says so too, at 10 us a call."""
    if torch.is_grad_enabled():
        raise RuntimeError("the C++ kernels have no second derivative; take backend='reference'")


def kernels(name: str) -> ModuleType:
    """The module fd2fast.kernels.<name>, imported on first use."""
    return importlib.import_module(f"fd2fast.kernels.{name}")


def backends() -> dict[str, tuple[str, str]]:
    """For each operation: the backend that "auto" takes on this machine's best device, and why not a better-ranked one."""
    listing = {}
    for op_name in sorted(_operations):
        reasons: list[str] = []
        for backend, device in RANKED.items():
            reason = unavailable(op_name, backend)
            if reason is None and device == "cuda" and not torch.cuda.is_available():
                reason = "no NVIDIA GPU is visible (the interpreter runs only where it is asked for by name)"
            if reason is None:
                listing[op_name] = backend, "; ".join(reasons)
                break
            reasons.append(f"{backend}: {reason}")
    return listing
