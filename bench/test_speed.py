"""Speed by pytest-benchmark: each operation's kernel (where there is a GPU) or CPU path beside its reference, and the planner.

pytest bench/test_speed.py                                       # a table for each group, quickest first
pytest bench/test_speed.py --benchmark-autosave                  # kept under .benchmarks
pytest bench/test_speed.py --benchmark-compare                   # against what was kept last

The normal test run does not collect this file. Every implementation is compared with its reference before it is timed.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.registry import REGISTRY, Problem
from bench.shapes import PAPER
from fd2fast import ops
from fd2fast.distillation.planner import iteration_table, make_plan
from fd2fast.models import frozen_layers as frozen
from fd2fast.ops import _dispatch
from fd2fast.reference import planner as reference

CPU = torch.device("cpu")
# a tenth of the paper's batch at a quarter of its pixels, so that each call takes milliseconds
SIZES = {
    "bilinear_attention_pool": {"n": 10, "c": 512, "m": 8, "size": 7},
    "prototype_loss": {"n": 10, "k": 200, "d": 4096},
    "attention_similarity_loss": {"n": 10, "m": 32, "size": 7, "priors": 3},
    "bn_matching": {"n": 10, "c": 64, "size": 28, "segments": 2},
    "bn_act_matching": {"n": 10, "c": 64, "size": 28, "segments": 2, "residual": 1},
    "crop_flip_roll": {"n": 10, "size": 112, "out": 112, "segments": 2},
    "adam_clamp_": {"n": 10, "size": 112},
    "max_pool": {"n": 10, "c": 64, "size": 56, "kernel": 3, "stride": 2},
}
WAYS = [
    (name, way)
    for name in SIZES
    for way in ("cpu", "reference")
    if way == "reference" or not _dispatch.unavailable(name, "cpu")
]


def _close(actual: Sequence[Tensor], expected: Sequence[Tensor], rtol: float) -> None:
    for a, e in zip(actual, expected, strict=True):
        error = (a.double() - e.double()).norm() / e.double().norm().clamp_min(1e-30)
        assert error <= rtol, f"relative error {error:.1e} > {rtol:.0e}: nothing is timed"


def _work(problem: Problem, call: Callable[..., Tensor], backend: str) -> Callable[[], list[Tensor]]:
    """Forward and backward of the call, as results; an operation in place works on its own copies."""
    given = [t.detach().clone() for t in problem.inputs]
    leaves = [given[i].requires_grad_() for i in problem.grads]

    def work() -> list[Tensor]:
        outputs = call(*given, backend=backend)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not leaves:
            return list(outputs)
        return [*outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(o) for o in outputs])]

    return work


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_operation(name: str, way: str, benchmark: Callable[..., object]) -> None:
    torch.manual_seed(0)
    problem = REGISTRY[name](CPU, **SIZES[name])
    benchmark.group = f"{name} {SIZES[name]}"  # type: ignore[attr-defined]
    work = _work(problem, problem.call, "auto" if way == "cpu" else "reference")
    wanted = _work(problem, problem.call, "reference")
    _close([t.detach().clone() for t in work()], wanted(), 1e-5 if problem.dtype == torch.float32 else 2e-2)
    benchmark(work)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU is visible")
@pytest.mark.parametrize("way", ["triton", "reference"])
@pytest.mark.parametrize("name", REGISTRY)
def test_kernel(name: str, way: str, benchmark: Callable[..., object]) -> None:
    """At the first of the paper's sizes, with its launches; bench/kernels.py takes them out by CUDA graphs."""
    torch.manual_seed(0)
    problem = REGISTRY[name](torch.device("cuda"), **PAPER[name][0])
    problem.check()
    benchmark.group = f"{name} {PAPER[name][0]}"  # type: ignore[attr-defined]
    work = _work(problem, problem.call, way)

    def finished() -> None:
        work()
        torch.cuda.synchronize()

    benchmark(finished)


@pytest.mark.parametrize("way", ["cpu", "reference"])
@pytest.mark.parametrize("residual", [False, True])
def test_frozen_batch_norm(residual: bool, way: str, benchmark: Callable[..., object]) -> None:
    """The C++ kernels that a fused teacher runs on a CPU, in fp32 and channels_last."""
    torch.manual_seed(0)
    layer = torch.nn.BatchNorm2d(64).eval().requires_grad_(False)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2.0)
    fused = frozen.FrozenBatchNorm(layer, "relu", 0, torch.float32)
    x, other = (torch.randn(10, 64, 28, 28).to(memory_format=torch.channels_last) for _ in range(2))
    x.requires_grad_()
    benchmark.group = f"frozen batch norm, residual {residual}"  # type: ignore[attr-defined]

    def run(way: str) -> list[Tensor]:
        added = other if residual else None
        if way == "cpu":
            y, loss = fused(x, (0, 5, 10), added)
        else:
            constants = layer.weight, layer.bias, layer.running_mean, layer.running_var
            y, loss = ops.bn_act_matching(x, *constants, (0, 5, 10), residual=added, backend="reference")
        return [y, loss, *torch.autograd.grad([y, loss], x, [torch.ones_like(y), torch.ones_like(loss)])]

    _close(run(way), run("reference"), 1e-5)
    benchmark(run, way)


@pytest.mark.parametrize("way", ["C++", "python"])
def test_make_plan(way: str, benchmark: Callable[..., object]) -> None:
    request = {"classes": 1000, "ipc": 50, "segments_per_step": 8}
    benchmark.group = f"make_plan {request}"  # type: ignore[attr-defined]
    found, wanted = make_plan(**request), reference.make_plan(**request)
    assert found.step_segments.tolist() == wanted.step_segments
    assert found.prior_offsets.tolist() == wanted.prior_offsets
    benchmark(make_plan if way == "C++" else reference.make_plan, **request)


@pytest.mark.parametrize("way", ["C++", "numpy"])
def test_iteration_table(way: str, benchmark: Callable[..., object]) -> None:
    segments, count = np.arange(100), 200
    benchmark.group = f"iteration_table, {len(segments)} segments, {count} iterations"  # type: ignore[attr-defined]
    fill = {"C++": iteration_table, "numpy": reference.iteration_array}[way]
    wanted = reference.iteration_array(0, segments, 0, count, 224, jitter=32)
    assert np.array_equal(np.asarray(fill(0, segments, 0, count, 224, jitter=32)), wanted)
    benchmark(fill, 0, segments, 0, count, 224, jitter=32)
