"""Which device the work runs on, and in which arithmetic."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch

from fd2fast.errors import UserError, nearest
from fd2fast.system import isa, limits

Config = TypeVar("Config")

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def channels_last(network: torch.nn.Module) -> None:
    """Lay out the network's tensors [O, I, h, w] channels last, in place; those of other ranks (of Conv3d, say) stay."""
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.to(memory_format=torch.channels_last)


def pick_device(name: str = "auto") -> torch.device:
    """The torch device called `name`, made the current one; "auto" is a GPU when there is one, else the CPU.

    "auto" and "cuda" are the first GPU, or in a torchrun job the one of this process's local rank. Triton launches on the
    current GPU whatever its tensors are on, and so do events and streams without a device.
    Raises UserError for a name torch does not know and for a GPU that is not there.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("cpu")
        name = "cuda"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"device {name!r} is unknown; wanted auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is not supported; wanted auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(
                f"device {name!r} was asked for, but torch {torch.__version__} finds no GPU here; use cpu or auto"
            )
        own = int(os.environ.get("LOCAL_RANK", "0"))
        count, index = torch.cuda.device_count(), own if device.index is None else device.index
        if index >= count:
            raise UserError(
                f"device 'cuda:{index}' was asked for, but this machine has {count} GPU(s): cuda:0 to cuda:{count - 1}"
            )
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    return torch.device("cpu")


def device_faults(stage: str, name: str) -> list[str]:
    """The fault of a stage's device setting, or of the CPU's memory for any work, if there is one."""
    try:
        device = pick_device(name)
    except UserError as error:
        return [f"{stage}.device: {error}"]
    left = limits.spare()
    if device.type == "cpu" and left is not None and left < limits.LEAST:
        return [
            f"{stage}: out of memory: the limit on address space leaves {left / 1e6:.1f} MB, wanted at least "
            f"{limits.LEAST / 1e6:.0f} MB; raise it (ulimit -v)"
        ]
    return []


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The context of a forward pass in `precision`: torch.autocast for bf16 and fp16, nothing for fp32 and fp64.

    Raises UserError for a precision that is not fp64, fp32, bf16 or fp16.
    """
    if precision not in DTYPES:
        raise UserError(f"precision {precision!r} is unknown: {nearest(precision, DTYPES)}")
    if precision in ("fp32", "fp64"):
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def repeatable(*, allow_tf32: bool = True) -> AbstractContextManager[object]:
    """The context of a stage's work on a GPU: the same convolution algorithms in every run, for equal bytes after a restart.

    TF32 convolutions are allowed as in the reference, which leaves torch's default as it is.
    """
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=allow_tf32)


def fast_bf16(device: torch.device) -> bool:
    """Whether bf16 products are faster than fp32 ones on this device (a CPU without such instructions emulates them)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return isa.detect().level == 5


def settle_precision(config: Config) -> Config:
    """The settings with precision "auto" replaced by what it means on their device: bf16 where it is fast, else fp32.

    Stages call it before they open their artifact, so that the manifest records the arithmetic that was used.
    """
    settings: Any = config
    if settings.precision != "auto":
        return config
    precision = "bf16" if fast_bf16(pick_device(settings.device)) else "fp32"
    return dataclasses.replace(settings, precision=precision)
