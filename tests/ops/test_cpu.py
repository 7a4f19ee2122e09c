"""The backends cpu and eager of the operations on maps against their specification, both gates."""

import pytest
import torch

from bench.numerics import check_kernel
from fd2fast import ops, reference
from fd2fast.ops import _dispatch
from fd2fast.ops.cpu import native
from fd2fast.reference.activation import ACTIVATIONS

LAST = torch.channels_last
SEGMENTS = (0, 1, 1, 4, 6)
BACKENDS = pytest.mark.parametrize("backend", ["cpu", "eager"])
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True)
def _built():
    if native.WHY_NOT:
        pytest.fail(f"{native.WHY_NOT}; install the package again")


def _constants(channels):
    """weight, bias, running_mean, running_var."""
    return torch.randn(channels), torch.randn(channels), torch.randn(channels), torch.rand(channels) + 0.2


def _maps(*shape, dtype=torch.float32):
    return (2 * torch.randn(shape) + 1).to(dtype).to(memory_format=LAST)


def _check(operation, specification, backend, inputs, dtype):
    """`operation` by the backend against `specification` in fp64 and in the inputs' type."""

    def either(*tensors, backend):
        return operation(*tensors, backend=chosen) if backend == "triton" else specification(*tensors)

    chosen = backend
    return check_kernel(either, inputs, dtype, grads=range(len(inputs)))


@BACKENDS
@TYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_bn_act_matching(with_residual, activation, dtype, backend):
    for channels in (1, 3, 8, 24, 58):
        constants = _constants(channels)
        inputs = [_maps(6, channels, 5, 7, dtype=dtype) for _ in range(1 + with_residual)]

        def call(function, x, residual=None, constants=constants, **settings):
            return function(x, *constants, SEGMENTS, residual=residual, activation=activation, eps=1e-3, **settings)

        _check(
            lambda *t, backend, call=call: call(ops.bn_act_matching, *t, backend=backend),
            lambda *t, call=call: call(reference.bn_act_matching, *t),
            backend,
            inputs,
            dtype,
        )


@BACKENDS
@TYPES
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bn_act_alone_and_joined(activation, dtype, backend):
    constants = _constants(36)
    settings = {"activation": activation, "eps": 1e-3}
    parts = [_maps(5, c, 4, 3, dtype=dtype) for c in (3, 24, 8, 1)]
    segments = (0, 2, 5)
    known = [tuple(reference.segment_statistics(x, segments)) for x in parts]

    def joined(function, given, **more):
        maps, statistics = given[:4], list(zip(given[4:8], given[8:], strict=True))
        return function(maps, statistics, *constants, segments, **settings, **more)

    def specification(maps, statistics, *given, **more):
        mean, var = (torch.cat(parts, dim=1) for parts in zip(*statistics, strict=True))
        loss = reference.match_statistics(mean, var, *(c.to(mean.dtype) for c in constants[2:]))
        return reference.bn_act(torch.cat(maps, dim=1), *constants, **settings), loss

    _check(
        lambda *given, backend: joined(ops.joined_bn_act_matching, given, backend=backend),
        lambda *given: joined(specification, given),
        backend,
        [*parts, *(mean for mean, _ in known), *(var for _, var in known)],
        dtype,
    )
    whole = [torch.cat(parts, dim=1)]
    _check(
        lambda x, backend: ops.bn_act(x, *constants, **settings, backend=backend),
        lambda x: reference.bn_act(x, *constants, **settings),
        backend,
        whole,
        dtype,
    )


@BACKENDS
@TYPES
def test_statistics_and_matching(dtype, backend):
    x = _maps(6, 27, 5, 3, dtype=dtype)
    _, _, mean, var = _constants(27)
    _check(
        lambda x, backend: ops.segment_statistics(x, SEGMENTS, backend=backend),
        lambda x: reference.segment_statistics(x, SEGMENTS),
        backend,
        [x],
        dtype,
    )
    _check(
        lambda x, backend: ops.bn_matching(x, mean, var, SEGMENTS, backend=backend),
        lambda x: reference.bn_matching(x, mean, var, SEGMENTS),
        backend,
        [x],
        dtype,
    )


@TYPES
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(name, dtype):
    x = 4 * _maps(3, 5, 4, 7, dtype=dtype)
    x[0, 0, 0, :3] = torch.tensor([0.0, 6.0, -0.0])  # the kinks
    for shape in ((3, 5, 4, 7), (3, 140)):
        _check(
            lambda x, backend: ops.activation(x, name, backend=backend),
            lambda x: reference.activation(x, name),
            "eager",
            [x.reshape(shape)],
            dtype,
        )
    with pytest.raises(ValueError, match="got 'gelu'"):
        ops.activation(x, "gelu")
    with pytest.raises(ValueError, match="x must be float16"):
        ops.activation(x.int(), "relu")


@BACKENDS
@TYPES
def test_max_pool(dtype, backend):
    window = (3, 2), (2, 1), (1, 0), (1, 2), True
    x = _maps(2, 19, 11, 8, dtype=dtype).relu()  # ties at 0
    _check(
        lambda x, backend: ops.max_pool(x, *window, backend=backend),
        lambda x: reference.max_pool(x, *window)[0],
        backend,
        [x],
        dtype,
    )


@BACKENDS
@pytest.mark.parametrize("with_residual", [False, True])
def test_one_result_without_a_gradient(with_residual, backend):
    """What is left out counts as zeros."""
    x = _maps(4, 8, 3, 3).requires_grad_()
    residual = _maps(4, 8, 3, 3).requires_grad_() if with_residual else None
    constants, leaves = _constants(8), [x] if residual is None else [x, residual]
    for index in (0, 1):
        outputs = [
            ops.bn_act_matching(x, *constants, [0, 1, 4], residual=residual, backend=backend)[index],
            reference.bn_act_matching(x, *constants, [0, 1, 4], residual=residual)[index],
        ]
        own, exact = (torch.autograd.grad(out.sum(), leaves, allow_unused=True) for out in outputs)
        for a, e, leaf in zip(own, exact, leaves, strict=True):
            torch.testing.assert_close(a, torch.zeros_like(leaf) if e is None else e, rtol=1e-4, atol=1e-5)


@BACKENDS
def test_an_empty_segment_matches_with_0(backend):
    _, _, mean, var = _constants(5)
    assert ops.bn_matching(_maps(6, 5, 2, 2), mean, var, SEGMENTS, backend=backend)[1] == 0


@BACKENDS
@TYPES
def test_bilinear_attention_pool(dtype, backend):
    """Also where G is 0: in one row of a sample, and in all of another."""
    for maps, channels in ((1, 1), (2, 7), (8, 130)):
        features, attention = _maps(4, channels, 3, 5, dtype=dtype), _maps(4, maps, 3, 5, dtype=dtype).relu()
        attention[0] = 0
        features[1, 0] = 0
        _check(
            lambda f, a, backend: ops.bilinear_attention_pool(f, a, backend=backend),
            reference.bilinear_attention_pool,
            backend,
            [features, attention],
            dtype,
        )


def test_the_kernels_have_no_second_derivative():
    x, constants = _maps(4, 8, 3, 3).requires_grad_(), _constants(8)
    y, _ = ops.bn_act_matching(x, *constants, [0, 4], backend="cpu")
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


REASONS = {
    "the maps are in torch.float64": lambda x: (x.double(), SEGMENTS),
    "a map has strides .*, not channels_last": lambda x: (x.contiguous(), SEGMENTS),
    "a map is .0, 8, 2, 2.": lambda x: (x[:0].contiguous(memory_format=LAST), (0, 0)),
    "not all tensors are on the CPU": lambda x: (x, torch.tensor(SEGMENTS, device="meta")),
    "the maps are on meta": lambda x: (x.to("meta"), SEGMENTS),
}


@pytest.mark.parametrize("reason", REASONS)
def test_what_cpp_does_not_take_has_its_reason(reason):
    x, segments = REASONS[reason](_maps(6, 8, 2, 2))
    with pytest.raises(ValueError, match=f"segment_statistics: backend cpu was asked for, but {reason}"):
        _dispatch.run("segment_statistics", "cpu", x, segments)
    if x.numel() and segments is SEGMENTS:
        assert _dispatch.choose("segment_statistics", (x, segments), "auto") == "eager"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"maps": []}, "at least one, got 0 and 2"),
        ({"maps": [torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 4)]}, r"maps\[1\] must be \[1, c, 3, 3\]"),
        ({"maps": [torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3).double()]}, "of one type, got torch.float32"),
        ({"statistics": [(torch.zeros(1, 2), torch.zeros(1, 3))] * 2}, r"statistics\[0\] .var. must be \[1, 2\]"),
        ({"weight": torch.ones(3)}, r"weight must be \[4\], got \[3\]"),
        ({"activation": "gelu"}, "got 'gelu'"),
    ],
)
def test_bad_input_of_joined_bn_act_matching(arguments, message):
    names = ("weight", "bias", "running_mean", "running_var")
    given = {"maps": [torch.zeros(1, 2, 3, 3)] * 2, "statistics": [(torch.zeros(1, 2), torch.ones(1, 2))] * 2}
    given |= {**dict.fromkeys(names, torch.ones(4)), "segments": (0, 1), **arguments}
    with pytest.raises(ValueError, match=message):
        ops.joined_bn_act_matching(**given)
