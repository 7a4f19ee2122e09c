"""The choice of a backend and its reasons, and what importing the operations loads."""

import subprocess
import sys

import pytest
import torch

from fd2fast import ops
from fd2fast.ops import _dispatch

NAMES = set(ops.__all__)


def test_import_loads_no_triton_and_no_kernels():
    code = (
        "import sys, fd2fast.ops; "
        "bad = [m for m in sys.modules if m.split('.')[0] == 'triton' or m.startswith('fd2fast.kernels')]; "
        "sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_operation_is_registered_and_says_why():
    table = _dispatch.backends()
    assert set(table) == NAMES
    for backend, reason in table.values():
        assert (backend, bool(reason)) in {("triton", False), ("reference", True)}


@pytest.fixture
def operation(monkeypatch):
    """A made-up operation whose kernel module is this one."""
    monkeypatch.setattr(_dispatch, "_operations", {})
    monkeypatch.setattr(_dispatch, "_HAS_TRITON", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    limits = lambda tensors: "it has three elements" if tensors[0].numel() == 3 else None  # noqa: E731
    _dispatch.register("made_up", "fd2fast.reference", limits)
    _dispatch.register("plain")
    return "made_up"


def test_choose(operation, monkeypatch):
    cpu = (torch.zeros(2),)
    assert _dispatch.choose(operation, cpu, "reference") == "reference"
    assert _dispatch.choose(operation, cpu, "triton") == "triton"
    # the interpreter is slow, so it is never chosen by itself
    assert _dispatch.choose(operation, cpu, "auto") == "reference"
    assert _dispatch.choose("plain", cpu, "auto") == "reference"
    assert _dispatch.kernels(operation).__name__ == "fd2fast.reference"


def test_triton_raises_the_reason(operation, monkeypatch):
    with pytest.raises(ValueError, match="made_up: .* three elements"):
        _dispatch.choose(operation, (torch.zeros(3),), "triton")
    with pytest.raises(ValueError, match="plain has no Triton kernel"):
        _dispatch.choose("plain", (torch.zeros(2),), "triton")
    with pytest.raises(ValueError, match="on meta"):
        _dispatch.choose(operation, (torch.zeros(2, device="meta"),), "triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="CPU|no NVIDIA GPU"):
        _dispatch.choose(operation, (torch.zeros(2),), "triton")
    monkeypatch.setattr(_dispatch, "_HAS_TRITON", False)
    with pytest.raises(ValueError, match="triton is not installed"):
        _dispatch.choose(operation, (torch.zeros(2),), "triton")


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="'cuda'"):
        ops.normalized_l2(torch.ones(2), torch.ones(2), backend="cuda")
