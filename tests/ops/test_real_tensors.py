"""The kernels on tensors of a real, tiny run: what the iterations of an FD2 step pass to each operation."""

import pytest
import torch
from distill_tools import MEAN, OTHER, STD, tiny_config, tiny_teacher

from bench.numerics import check_gradient, check_output
from fd2fast.distillation.planner import iteration_table
from fd2fast.models.fused import fuse
from fd2fast.ops import _dispatch
from fd2fast.ops._batch_norm import BatchNorm
from fd2fast.step import GroupedStep, Priors

pytest.importorskip("triton")
OFFSETS, SIZE = (0, 3, 5), 24
CALLED = {
    "adam_clamp_",
    "attention_similarity_loss",
    "bilinear_attention_pool",
    "bn_act_matching",
    "crop_flip_roll",
    "joined_bn_act_matching",
    "prototype_loss",
    "segment_statistics",
}
if not _dispatch.interpreting():
    CALLED.remove("joined_bn_act_matching")  # a step on the CPU would launch its backward there


class _Recorder:
    """Runs the references and keeps the arguments of every call."""

    def __init__(self, patch):
        self.calls, self.keeping = [], False
        original = _dispatch.run

        def run(name, backend, *args, **kwargs):
            if self.keeping and name in CALLED:
                self.calls.append((name, *(_map(kept, lambda t: t.detach().clone()) for kept in (args, kwargs))))
            return original(name, "reference", *args, **kwargs)

        patch.setattr(_dispatch, "run", run)


def _map(value, change):
    """The value with `change` made to its tensors."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {k: _map(v, change) for k, v in value.items()}
    if isinstance(value, BatchNorm):
        return BatchNorm(*(_map(v, change) for v in value))
    if isinstance(value, list):
        return [_map(v, change) for v in value]
    return tuple(_map(v, change) for v in value) if isinstance(value, tuple) else value


@pytest.fixture(scope="module")
def calls():
    """(operation, arguments, keyword arguments) of two iterations in fp64, after one; on a CPU fp32 has paths of its own."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        recorder = _Recorder(patch)
        config = tiny_config("fadrm+_fd2", size=SIZE, iterations=(4,), sizes=(SIZE,), lam=0.3)
        names = (f"{OTHER},output_stride=8", "timm:densenet121,growth_rate=8,block_config=2x1")
        teachers = [fuse(tiny_teacher(name, size=SIZE, seed=i)) for i, name in enumerate(names)]
        low = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)], dtype=torch.float64)
        high = torch.tensor([(1 - m) / s for m, s in zip(MEAN, STD, strict=True)], dtype=torch.float64)
        initial = low.view(3, 1, 1) + torch.rand(5, 3, SIZE, SIZE) * (high - low).view(3, 1, 1)
        with torch.no_grad():
            maps = [t(initial.flip(0), OFFSETS)[0].attention for t in teachers]
        priors = [Priors(m[:4], (0, 0, 1, 3, 4, 4)) for m in maps]
        labels = torch.tensor([0, 1, 2, 3, 4])
        draws = torch.from_numpy(iteration_table(3, [0, 1], 0, 3, SIZE, jitter=config.jitter))
        with GroupedStep(config, teachers, initial, labels, OFFSETS, low=low, high=high, priors=priors) as step:
            for iteration in range(3):
                recorder.keeping = iteration > 0  # the teachers take turns
                step.iterate(draws[iteration])
    return recorder.calls


def test_every_operation_of_the_step_was_called(calls):
    assert {name for name, *_ in calls} == CALLED


def _leaves(name, args):
    """The tensors that the operation has gradients to, made to ask for them."""
    if name == "joined_bn_act_matching":
        leaves = [*args[0], *args[1]]
    else:
        leaves = [args[0], *(args[1:2] if name in ("bilinear_attention_pool", "bn_act_matching") else ())]
    return [leaf.requires_grad_() for leaf in leaves if leaf is not None]


def _elements(first):
    return first.numel() if isinstance(first, torch.Tensor) else sum(t.numel() for t in first)


def _run(name, args, kwargs, backend, double):
    """Outputs, and gradients of the tensors that the operation has gradients to; for Adam what it wrote."""

    def change(tensor):
        return tensor.to(torch.float64 if double else torch.float32) if tensor.is_floating_point() else tensor.clone()

    args, kwargs = _map(args, change), _map(kwargs, change)
    if name == "adam_clamp_":
        _dispatch.run(name, backend, *args, **kwargs)
        return [args[0], args[2], args[3]], []
    leaves = _leaves(name, args)
    outputs = _dispatch.run(name, backend, *args, **kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    return list(outputs), list(torch.autograd.grad(outputs, leaves, weights))


@pytest.mark.parametrize("name", sorted(CALLED))
def test_both_gates(name, calls, device):
    """The first, the last and the largest call; the last layers have the smallest maps."""
    of_this = [(args, kwargs) for called, args, kwargs in calls if called == name]
    largest = max(range(len(of_this)), key=lambda i: _elements(of_this[i][0][0]))
    for index in sorted({0, largest, len(of_this) - 1}):
        args, kwargs = of_this[index]
        if name == "crop_flip_roll":  # rows of images are slow in the interpreter: one image of each segment
            args = (args[0][2:4], args[1], (0, 1, 2), *args[3:])
        # float32 values, so that the float64 reference sees the same
        args, kwargs = (
            _map(kept, lambda t: (t.float() if t.is_floating_point() else t).to(device)) for kept in (args, kwargs)
        )
        runs = [
            _run(name, args, kwargs, *way) for way in (("triton", False), ("reference", True), ("reference", False))
        ]
        for check, results in zip((check_output, check_gradient), zip(*runs, strict=True), strict=True):
            for actual, expected, plain in zip(*results, strict=True):
                check(actual, expected, plain, torch.float32, name=f"{name}, call {index}")


@pytest.mark.parametrize("name", sorted(CALLED - {"adam_clamp_", "crop_flip_roll"}))
def test_input_without_gradient(name, calls, device):
    args, kwargs = next((args, kwargs) for called, args, kwargs in reversed(calls) if called == name)
    args, kwargs = (
        _map(kept, lambda t: (t.float() if t.is_floating_point() else t).to(device)) for kept in (args, kwargs)
    )
    outputs = _dispatch.run(name, "triton", *args, **kwargs)
    for output in outputs if isinstance(outputs, tuple) else (outputs,):
        assert not output.requires_grad
