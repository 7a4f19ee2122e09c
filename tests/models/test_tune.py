"""The measurement before a run: what it chooses is complete, kept, obeyed, remembered, and left alone where it is not wanted."""

import json
from pathlib import Path

import pytest
import torch
from distill_tools import tiny_teacher

from fd2fast.models import convolution
from fd2fast.models.fused import fuse
from fd2fast.models.tune import memory_file, tune
from fd2fast.ops.cpu import native


@pytest.fixture
def teacher():
    if native.WHY_NOT:
        pytest.fail(f"{native.WHY_NOT}; install the package again")
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


def by_order(reverse):
    """Measured seconds by which the first, or the last, candidate is the fastest."""

    def seconds(candidates):
        return {name: 1.0 + place for place, name in enumerate(list(candidates)[:: -1 if reverse else 1])}

    return seconds


def test_the_next_run_takes_what_this_machine_took_before(teacher, monkeypatch, tmp_path):
    monkeypatch.setenv("FD2FAST_TUNE", "1")
    file = tmp_path / "cache" / "convolutions.json"
    monkeypatch.setattr(convolution, "_measured", by_order(False))
    first = dict(tune([teacher], 4, (32,), remembered=file).chosen)
    monkeypatch.setattr(convolution, "_measured", by_order(True))  # as noise would have it
    assert dict(tune([teacher], 4, (32,), remembered=file).chosen) == first
    other_size = dict(tune([teacher], 4, (48,), remembered=file).chosen)
    assert {kind for kind in other_size if "48x48" in kind}  # measured, and added to what is known
    # of what is known only the kinds that are met: a run's record hangs on no other run
    assert not {kind for kind in other_size if "32x32" in kind}
    assert dict(tune([teacher], 4, (32,), remembered=file).chosen) == first
    assert dict(tune([teacher], 4, (32, 48), remembered=file).chosen) == first | other_size
    assert set(dict(tune([teacher], 4, (32,)).chosen).values()) != set(first.values())  # without the file
    torch.set_num_threads(2)
    try:  # with other threads other algorithms may be the fastest
        assert dict(tune([teacher], 4, (32,), remembered=file).chosen) != first
    finally:
        torch.set_num_threads(1)
    assert len(json.loads(file.read_text())) == 2


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"here": 3}'])
def test_a_broken_memory_is_measured_again(teacher, monkeypatch, tmp_path, content):
    monkeypatch.setenv("FD2FAST_TUNE", "1")
    file = tmp_path / "convolutions.json"
    file.write_bytes(content)
    chosen = dict(tune([teacher], 4, (32,), remembered=file).chosen)
    assert chosen
    assert chosen in json.loads(file.read_text()).values()


def test_a_memory_that_cannot_be_written_is_no_reason_to_stop(teacher, monkeypatch, tmp_path):
    monkeypatch.setenv("FD2FAST_TUNE", "1")
    (tmp_path / "file").write_text("in the way")
    assert tune([teacher], 4, (32,), remembered=tmp_path / "file" / "convolutions.json").chosen


def test_where_it_is_remembered(monkeypatch):
    monkeypatch.setenv("FD2FAST_CACHE", "")
    assert memory_file() is None
    monkeypatch.setenv("FD2FAST_CACHE", "/some/where")
    assert memory_file() == Path("/some/where/convolutions.json")
    monkeypatch.delenv("FD2FAST_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert memory_file() == Path("/caches/fd2fast/convolutions.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert memory_file() == Path("~/.cache/fd2fast/convolutions.json").expanduser()
