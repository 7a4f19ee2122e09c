"""What runs here: versions, devices, and for each operation its backend and why not another."""

from __future__ import annotations

import importlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from fd2fast import __version__
from fd2fast.system import isa, threads

_EXTENSIONS = (
    ("_planner", "plans and iteration tables"),
    ("_crop", "crop_flip_roll on a CPU"),
    ("_adam", "adam_clamp_ on a CPU"),
    ("_frozen", "the frozen layers and prototype_loss on a CPU"),
)
_PACKAGES = ("torch", "triton", "torchvision", "timm", "numpy", "pillow", "safetensors", "nvidia-dali-cuda130")


def describe() -> str:
    """Text of `fd2fast info`."""
    lines = [f"fd2fast {__version__}, Python {platform.python_version()}, {platform.platform()}", "", "packages"]
    for name in _PACKAGES:
        try:
            lines.append(f"  {name:20} {version(name)}")
        except PackageNotFoundError:
            lines.append(f"  {name:20} not installed")
    free = f"{threads.free_cores()} of {os.cpu_count()} cores free to this process"
    lines += ["", "devices", f"  cpu: {free}, torch uses {torch.get_num_threads()} threads"]
    lines += [f"       {line}" for line in isa.describe()]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            lines.append(
                f"  cuda:{index}: {p.name}, {p.total_memory / 2**30:.0f} GiB, capability {p.major}.{p.minor}, "
                f"{p.multi_processor_count} multiprocessors"
            )
    else:
        lines.append(f"  cuda: none (torch built for CUDA {torch.version.cuda})")
    lines += ["", "C++ extensions", *(f"  {name:10} {use}: {_extension(name)}" for name, use in _EXTENSIONS)]
    lines += ["", "operations (the backend that auto takes first, and why none before it)"]
    from fd2fast.ops._dispatch import backends

    for name, (backend, reason) in backends().items():
        lines.append(f"  {name:28} {backend:10} {reason}")
    return "\n".join(lines)


def _extension(name: str) -> str:
    try:
        module = importlib.import_module(f"fd2fast.{name}")
    except ImportError as error:
        return f"missing ({error}); install again: pip install --no-build-isolation --no-deps -e ."
    return str(getattr(module, "__file__", ""))
