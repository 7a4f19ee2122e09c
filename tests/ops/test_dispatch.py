"""The choice of a backend and its reasons, and what importing the operations loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fd2fast import ops
from fd2fast.info import describe
from fd2fast.ops import _dispatch

NAMES = set(ops.__all__)
IN_CPP = (
    "adam_clamp_",
    "bilinear_attention_pool",
    "bn_act",
    "bn_act_matching",
    "bn_matching",
    "crop_flip_roll",
    "joined_bn_act_matching",
    "max_pool",
    "prototype_loss",
    "segment_statistics",
)
OPS = Path(ops.__file__).parent


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
        assert backend in _dispatch.RANKED
        assert bool(reason) == (backend != "triton")


def _calls(path, start):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [call for call in calls if ast.unparse(call.func).startswith(start)]


def test_a_backend_is_one_folder():
    """Each but the reference is entered in its own folder only; the reference beside each operation's checks."""
    folders = {path.name for path in OPS.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(_dispatch.RANKED) - {"reference"}
    for path in OPS.rglob("*.py"):
        own = path.parent.name if path.parent != OPS else "reference"
        for call in _calls(path, "_dispatch.register"):
            named = "triton" if call.func.attr == "register_triton" else call.args[1].value
            assert named == own, path


def test_models_choose_no_backend():
    for path in (OPS.parent / "models").glob("*.py"):
        assert not _calls(path, "_dispatch.choose"), path
        for call in _calls(path, "_dispatch.run"):
            assert call.args[1].value == "auto", path


@pytest.mark.skipif(torch.cuda.is_available(), reason="an NVIDIA GPU is the best device")
def test_info_lists_what_runs_here():
    table = _dispatch.backends()
    for name in IN_CPP:
        assert table[name][0] == "cpu"
        assert table[name][1].startswith("triton: ")
        line = next(line for line in describe().splitlines() if line.split()[:1] == [name])
        assert line.split()[1] == "cpu"
    assert table["normalized_l2"][0] == "reference"
    assert table["normalized_l2"][1] == "triton: none is registered; cpu: none is registered; eager: none is registered"


def test_extensions_that_are_not_built_are_the_reason(monkeypatch):
    monkeypatch.setattr(sys.modules["fd2fast.ops.cpu.crop_flip_roll"], "WHY_NOT", "the C++ kernels are not built: gone")
    images, rows = torch.randn(1, 3, 4, 4), [[0, 0, 4, 4, 0, 0, 0]]
    with pytest.raises(ValueError, match="backend cpu was asked for, but the C.. kernels are not built: gone"):
        ops.crop_flip_roll(images, rows, [0, 1], 4, backend="cpu")
    out = ops.crop_flip_roll(images, rows, [0, 1], 4)
    assert torch.equal(out, ops.crop_flip_roll(images, rows, [0, 1], 4, backend="reference"))
    if not torch.cuda.is_available():
        assert _dispatch.backends()["crop_flip_roll"][0] == "reference"


@pytest.fixture
def operation(monkeypatch):
    """A made-up operation with all backends, and one with the reference alone."""
    monkeypatch.setattr(_dispatch, "_operations", {})
    monkeypatch.setattr(_dispatch, "_logged", set())
    monkeypatch.setattr(_dispatch, "_HAS_TRITON", True)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    limits = lambda x: "it has three elements" if x.numel() == 3 else None  # noqa: E731
    _dispatch.register_triton("made_up", lambda x: 3 * x, limits=limits)
    _dispatch.register("made_up", "cpu", lambda x: 2 * x, lambda x: _dispatch.off_cpu((x,), (torch.float32,)))
    _dispatch.register("made_up", "reference", lambda x: x)
    _dispatch.register("plain", "reference", lambda x: x)
    return "made_up"


def test_choose(operation, monkeypatch):
    cpu = (torch.zeros(2),)
    assert _dispatch.choose(operation, cpu, "reference") == "reference"
    assert _dispatch.choose(operation, cpu, "triton") == "triton"
    # the interpreter is slow, so it is never chosen by itself
    assert _dispatch.choose(operation, cpu, "auto") == "cpu"
    assert _dispatch.choose("plain", cpu, "auto") == "reference"
    assert _dispatch.choose(operation, (torch.zeros(2, device="meta"),), "auto") == "reference"


def test_each_backend_runs_its_own(operation, caplog):
    x = torch.ones(2)
    for backend, factor in (("reference", 1), ("cpu", 2), ("auto", 2), ("triton", 3)):
        assert torch.equal(_dispatch.run(operation, backend, x), factor * x)
    assert not caplog.records
    with caplog.at_level("INFO", logger="fd2fast.ops"):
        for _ in range(2):
            assert _dispatch.run(operation, "auto", x.double()).dtype == torch.float64
    assert [r.getMessage() for r in caplog.records] == ["made_up does not run on the cpu backend: one is torch.float64"]
    with pytest.raises(ValueError, match="made_up: backend cpu was asked for, but one is torch.float64"):
        _dispatch.run(operation, "cpu", x.double())


def test_compiled_code_leaves_out_cpp(operation):
    compiled = torch.compile(lambda x: _dispatch.run(operation, "auto", x), fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2)), torch.ones(2))


def test_registering_twice_or_for_an_unknown_backend_is_refused(operation):
    with pytest.raises(ValueError, match="made_up is registered for cpu already"):
        _dispatch.register(operation, "cpu", lambda x: x)
    with pytest.raises(ValueError, match="must be one of triton, cpu, eager, reference, got 'tpu'"):
        _dispatch.register(operation, "tpu", lambda x: x)


def test_triton_raises_the_reason(operation, monkeypatch):
    with pytest.raises(ValueError, match="made_up: .* three elements"):
        _dispatch.choose(operation, (torch.zeros(3),), "triton")
    with pytest.raises(ValueError, match="plain: backend triton was asked for, but none is registered"):
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
