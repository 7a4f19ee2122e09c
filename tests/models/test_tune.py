"""The measurement before a run: what it chooses is complete, kept, obeyed, and left alone where it is not wanted."""

import pytest
import torch
from distill_tools import tiny_teacher

from fd2fast.models import convolution, cpu
from fd2fast.models.fused import fuse
from fd2fast.models.tune import tune


@pytest.fixture
def teacher():
    if cpu.WHY_NOT:
        pytest.fail(f"{cpu.WHY_NOT}; install the package again")
    return fuse(tiny_teacher(dtype=torch.float32), torch.float32)


def run(teacher, rows=4, side=32):
    x = torch.randn(rows, 3, side, side, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out, bn = teacher(x, (0, rows))
    (out.logits.sum() + out.z.sum() + bn.sum()).backward()
    return out.logits.detach(), x.grad


def test_every_kind_is_measured_for_every_side(teacher, monkeypatch):
    monkeypatch.setenv("FD2FAST_TUNE", "1")
    choices = tune([teacher], 4, (32, 48, 32))
    assert {kind.rsplit(", ", 1)[1] for kind in choices.chosen} >= {"32x32 pixels", "48x48 pixels"}
    assert set(choices.chosen.values()) <= {"winograd", "phases", "taps", "packed", "plain"}
    monkeypatch.setattr(convolution, "_measured", None)
    with choices.measure():  # nothing is left to measure
        for side in (32, 48):
            run(teacher, side=side)


def test_nothing_is_packed_afterwards(teacher, monkeypatch):
    monkeypatch.setenv("FD2FAST_TUNE", "1")
    tune([teacher], 4, (32,))
    assert sum(layer.packed_bytes for layer in teacher._convolutions()) == 0


def test_the_same_choices_give_the_same_bytes(teacher):
    choices = convolution.Choices()
    teacher.choose_by(choices)
    first = run(teacher)
    with choices.measure():
        run(teacher)
    other = fuse(tiny_teacher(dtype=torch.float32), torch.float32)
    teacher.choose_by(convolution.Choices(dict.fromkeys(choices.chosen, "plain")))
    other.choose_by(convolution.Choices(dict.fromkeys(choices.chosen, "plain")))
    plain = run(teacher)
    assert all(torch.equal(a, b) for a, b in zip(plain, run(other), strict=True))
    # the algorithms agree within rounding
    for a, b in zip(first, plain, strict=True):
        assert ((a - b).norm() / b.norm()).item() < 1e-4


def test_off_by_the_environment(teacher, monkeypatch):
    monkeypatch.setenv("FD2FAST_TUNE", "0")
    monkeypatch.setattr(convolution, "_measured", None)
    assert tune([teacher], 4, (32,)).chosen == {}
