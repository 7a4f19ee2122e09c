"""The instruction set in force: the lowest of ours, oneDNN's and torch's, named, with what caps it."""

import json
import os
import subprocess
import sys

import pytest

from fd2fast.system import isa

SHOW = """
import json, torch
from fd2fast.system import isa
from fd2fast.system.device import fast_bf16
found = isa.detect()
print(json.dumps([found.processor, found.own, found.onednn, found.torch, found.level, fast_bf16(torch.device("cpu"))]))
print("\\n".join(isa.describe()))
"""


def run(**variables):
    environment = {k: v for k, v in os.environ.items() if not k.endswith(("_CPU_CAPABILITY", "_MAX_CPU_ISA"))}
    return subprocess.run([sys.executable, "-c", SHOW], env=environment | variables, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("variables", "own", "onednn", "torch"),
    [
        ({}, 5, 5, 5),
        ({"FD2FAST_CPU_CAPABILITY": "avx2"}, 3, 5, 5),
        ({"ATEN_CPU_CAPABILITY": "avx2"}, 3, 5, 3),
        ({"ATEN_CPU_CAPABILITY": "avx2", "FD2FAST_CPU_CAPABILITY": "avx512_bf16"}, 5, 5, 3),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "FD2FAST_CPU_CAPABILITY": "avx512"}, 4, 4, 5),
        ({"DNNL_MAX_CPU_ISA": "avx2"}, 5, 3, 5),
        ({"FD2FAST_CPU_CAPABILITY": "default"}, 1, 5, 5),
    ],
)
def test_caps(variables, own, onednn, torch):
    """Whatever this processor has, each library runs with the lower of it and its cap."""
    done = run(**variables)
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    processor, *found, level, bf16 = json.loads(first)
    ceiling = 5 if processor == 5 else processor
    assert found[:2] == [min(processor, own), min(processor, onednn)]
    assert found[2] <= min(ceiling, torch)
    assert level == min(found)
    assert bf16 is (level == 5)
    assert lines[0] == f"instruction set: {isa.NAMES[level]} (the processor has {isa.NAMES[processor]})"
    for name, cap in (("FD2FAST_CPU_CAPABILITY", own), ("ONEDNN_MAX_CPU_ISA", onednn)):
        if name in variables and cap < processor:
            assert any(f"{name}={variables[name]}" in line for line in lines)


def test_an_unknown_cap_of_ours_is_refused_and_one_of_torch_is_torchs_affair():
    done = run(FD2FAST_CPU_CAPABILITY="sse9")
    assert done.returncode == 1
    assert "FD2FAST_CPU_CAPABILITY must be default, avx2, avx512 or avx512_bf16, got sse9" in done.stderr
    assert run(ATEN_CPU_CAPABILITY="vsx").returncode == 0


def test_without_the_extension(monkeypatch):
    import fd2fast

    monkeypatch.setitem(sys.modules, "fd2fast._frozen", None)
    monkeypatch.delattr(fd2fast, "_frozen", raising=False)
    assert isa.detect().level in isa.NAMES
