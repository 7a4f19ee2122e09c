"""The BN kernels against the float64 reference: loss, output, gradients, layouts, segments, hard inputs."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.numerics import check_gradient, check_output
from fd2fast import ops
from fd2fast.ops.triton.bn_matching import _few_rows

_configs = pytest.importorskip("fd2fast.kernels._configs")

LAST, FIRST = torch.channels_last, torch.contiguous_format
LAYOUTS = pytest.mark.parametrize("layout", [LAST, FIRST], ids=["last", "first"])
SEGMENTS = [[0, 5], [0, 1, 2, 3, 4, 5], [0, 0, 2, 2, 5, 5], [0, 3, 5]]


@pytest.fixture
def _small_tiles(monkeypatch):
    """Several parts, blocks of channels and steps of a loop already for small tensors."""
    monkeypatch.setattr(_configs, "bn_tile", lambda channels, last: (4, 8, 4))
    monkeypatch.setattr(_configs, "BN_PROGRAMS", 8)
    monkeypatch.setattr(_configs, "BN_MERGE_PARTS", 2)
    monkeypatch.setattr(_configs, "BN_MERGE_CHANNELS", 16)


def _channels(c, dtype, device):
    weight, bias, mean = torch.randn(3, c, dtype=dtype, device=device).unbind()
    return weight, bias, mean, torch.rand(c, dtype=dtype, device=device) + 0.1


def _input(shape, dtype, device, layout, scale=1.0):
    return (scale * torch.randn(shape, device=device)).to(dtype).to(memory_format=layout)


def _gradients(function, inputs, seed=1):
    """Outputs and gradients for random output gradients; an input of None stays None."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    total = sum(
        (o * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o)).sum().double() for o in outputs
    )
    wanted = [leaf for leaf in leaves if leaf is not None]
    return outputs, torch.autograd.grad(total, wanted)


def _compare(function, inputs, dtype):
    """Both gates for function(backend, double) over `inputs`."""
    actual, actual_gradients = _gradients(lambda *t: function("triton", *t), inputs)
    plain, plain_gradients = _gradients(lambda *t: function("reference", *t), inputs)
    doubles = [None if t is None else t.double() for t in inputs]
    expected, expected_gradients = _gradients(lambda *t: function("reference", *t), doubles)
    for a, e, p in zip(actual, expected, plain, strict=True):
        assert a.dtype == p.dtype
        check_output(a, e, p, dtype)
    for a, e, p in zip(actual_gradients, expected_gradients, plain_gradients, strict=True):
        assert a.dtype == dtype
        check_gradient(a, e, p, dtype)


def _compare_matching(shape, segments, layout, device):
    x = _input(shape, torch.float32, device, layout, 3)
    _, _, mean, var = (t.double() for t in _channels(shape[1], torch.float32, device))

    def function(backend, x):
        return ops.bn_matching(x, mean.to(x.dtype), var.to(x.dtype), segments, backend=backend)

    _compare(function, [x], torch.float32)


@LAYOUTS
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.usefixtures("_small_tiles")
def test_segments(segments, layout, device):
    _compare_matching((5, 3, 4, 3), segments, layout, device)


@LAYOUTS
@pytest.mark.parametrize("shape", [(5, 24, 3, 1), (5, 65, 1, 1), (5, 8, 7, 1), (5, 1, 1, 1), (1, 2, 1, 1)])
@pytest.mark.usefixtures("_small_tiles")
def test_sizes(shape, layout, device):
    _compare_matching(shape, [0, min(2, shape[0]), shape[0]], layout, device)


@LAYOUTS
@pytest.mark.parametrize("channels", [3, 40, 100])
def test_committed_tiles(channels, layout, device):
    _compare_matching((5, channels, 7, 5) if layout is LAST else (5, 5, 23, 29), [0, 1, 5], layout, device)


def _compare_fused(shape, with_residual, activation, dtype, layout, device):
    x = _input(shape, dtype, device, layout, 3)
    residual = _input(shape, dtype, device, layout) if with_residual else None
    channels = _channels(shape[1], torch.float32, device)

    def function(backend, x, residual):
        return ops.bn_act_matching(
            x, *channels, [0, 1, 4], residual=residual, activation=activation, eps=1e-3, backend=backend
        )

    _compare(function, [x, residual], dtype)


@LAYOUTS
@pytest.mark.parametrize("activation", ["relu", "relu6", "identity"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [(4, 16, 2, 3), (4, 3, 3, 2)])
@pytest.mark.usefixtures("_small_tiles")
def test_fused(shape, with_residual, activation, layout, device):
    _compare_fused(shape, with_residual, activation, torch.float32, layout, device)


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_residual", [False, True])
def test_fused_half(with_residual, dtype, layout, device):
    _compare_fused((4, 24, 3, 5), with_residual, "relu", dtype, layout, device)


@LAYOUTS
@pytest.mark.parametrize("with_residual", [False, True])
def test_without_the_loss(with_residual, layout, device):
    x = _input((4, 16, 3, 3), torch.float32, device, layout)
    residual = torch.randn_like(x) if with_residual else None
    channels = _channels(16, torch.float32, device)

    def function(backend, x, residual):
        return ops.bn_act(x, *channels, residual=residual, backend=backend)

    _compare(function, [x, residual], torch.float32)


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("_small_tiles")
def test_statistics(dtype, layout, device):
    x = _input((5, 16, 3, 2), dtype, device, layout, 3)
    _compare(lambda backend, x: ops.segment_statistics(x, [0, 2, 2, 5], backend=backend), [x], dtype)


@LAYOUTS
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_statistics_of_parts_match_as_the_whole(backend, layout, device):
    """As in a DenseNet: each map's statistics are taken once and compared in every layer that reads it."""
    x = _input((5, 12, 3, 3), torch.float32, device, layout).requires_grad_()
    _, _, mean, var = _channels(12, torch.float32, device)
    segments = [0, 2, 5]
    parts = [
        ops.segment_statistics(part.contiguous(memory_format=layout), segments, backend=backend)
        for part in x.split(4, dim=1)
    ]
    losses, expected = [], []
    for seen in (1, 2, 3):
        means, variances = (torch.cat(p, dim=1) for p in zip(*parts[:seen], strict=True))
        c = 4 * seen
        losses.append(ops.match_statistics(means, variances, mean[:c], var[:c]))
        expected.append(ops.bn_matching(x[:, :c], mean[:c], var[:c], segments, backend="reference"))
    weights = torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 0.25]], device=device)
    totals = [(torch.stack(one) * weights).sum() for one in (losses, expected)]
    torch.testing.assert_close(torch.stack(losses), torch.stack(expected))
    torch.testing.assert_close(*(torch.autograd.grad(total, x)[0] for total in totals))


@pytest.mark.skipif(torch.cuda.is_available(), reason="float64 kernels run in the interpreter only")
@LAYOUTS
@pytest.mark.parametrize("segments", [[0, 3], [0, 0, 1, 3]])
@pytest.mark.usefixtures("_small_tiles")
def test_gradcheck(segments, layout):
    x = torch.randn(3, 2, 1, 2, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    weight, bias, mean, var = _channels(2, torch.float64, "cpu")
    check = torch.autograd.gradcheck
    assert check(lambda x: ops.bn_matching(x, mean, var, segments, backend="triton"), (x,))
    assert check(lambda x: ops.segment_statistics(x, segments, backend="triton"), (x,))
    residual = torch.randn_like(x).requires_grad_()

    def fused(x, residual):
        return ops.bn_act_matching(
            x, weight, bias, mean, var, segments, residual=residual, activation="relu6", backend="triton"
        )

    assert check(fused, ((4 * x.detach()).requires_grad_(), residual))
    assert check(lambda x: ops.bn_act_matching(x, weight, bias, mean, var, segments, backend="triton"), (x,))


@LAYOUTS
def test_zero_norms_have_zero_gradient(layout, device):
    x = torch.full((4, 8, 3, 3), 3.0, device=device).to(memory_format=layout).requires_grad_()
    loss = ops.bn_matching(
        x, torch.full((8,), 3.0, device=device), torch.zeros(8, device=device), [0, 1, 4], backend="triton"
    )
    assert loss.tolist() == [0, 0]
    loss.sum().backward()
    assert x.grad.count_nonzero() == 0


@LAYOUTS
@pytest.mark.usefixtures("_small_tiles")
def test_large_mean_keeps_its_digits(layout, device):
    x = (1000 + 0.1 * torch.randn(4, 8, 5, 4, dtype=torch.float64)).float().to(device).to(memory_format=layout)
    mean, var = torch.zeros(8, device=device), torch.zeros(8, device=device)
    wide, narrow = (
        ops.segment_statistics(t, [0, 1, 4], backend=b) for t, b in ((x.double(), "reference"), (x, "triton"))
    )
    torch.testing.assert_close(narrow[0].double(), wide[0], rtol=2e-7, atol=0)
    torch.testing.assert_close(narrow[1].double(), wide[1], rtol=2e-4, atol=0)
    # the running mean nearby or far away changes nothing
    for nearby in (mean, mean + 1000):
        exact = ops.bn_matching(x.double(), nearby.double(), var.double(), [0, 1, 4], backend="reference")
        loss = ops.bn_matching(x, nearby, var, [0, 1, 4], backend="triton")
        torch.testing.assert_close(loss.double(), exact, rtol=2e-4, atol=0)


@pytest.mark.usefixtures("_small_tiles")
def test_a_segment_does_not_depend_on_the_others(device):
    x = _input((6, 8, 3, 3), torch.float32, device, LAST)
    _, _, mean, var = _channels(8, torch.float32, device)
    whole = ops.bn_matching(x, mean, var, [0, 2, 6], backend="triton")
    for s, part in enumerate((x[:2], x[2:])):
        alone = ops.bn_matching(part, mean, var, [0, len(part)], backend="triton")
        torch.testing.assert_close(alone[0], whole[s])


def test_same_bytes_every_time(device):
    x = _input((6, 40, 9, 9), torch.float32, device, LAST)
    _, _, mean, var = _channels(40, torch.float32, device)
    first, second = (ops.bn_matching(x, mean, var, [0, 2, 6], backend="triton") for _ in range(2))
    assert torch.equal(first, second)


def test_input_with_gaps_and_mixed_layouts(device):
    wide = torch.randn(4, 16, 5, 10, device=device, requires_grad=True)
    channels = _channels(16, torch.float32, device)
    residual = torch.randn(4, 16, 5, 5, device=device).to(memory_format=LAST)
    results = []
    for backend in ("triton", "reference"):
        y, loss = ops.bn_act_matching(wide[..., ::2], *channels, [0, 4], residual=residual, backend=backend)
        # a gradient in a layout of its own
        g = torch.ones(16, 4, 5, 5, device=device).transpose(0, 1)
        results.append((y, loss, *torch.autograd.grad([y, loss], wide, [g, torch.full_like(loss, 2.0)])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@LAYOUTS
@pytest.mark.parametrize("with_residual", [False, True])
def test_only_one_result_used(with_residual, layout, device):
    x = _input((4, 8, 3, 3), torch.float32, device, layout).requires_grad_()
    residual = torch.randn_like(x).requires_grad_() if with_residual else None
    channels = _channels(8, torch.float32, device)
    for index in (0, 1):
        gradients = []
        for backend in ("triton", "reference"):
            result = ops.bn_act_matching(x, *channels, [0, 4], residual=residual, backend=backend)[index]
            wanted = (x, residual) if with_residual else (x,)
            gradients.append(torch.autograd.grad(result.sum(), wanted, allow_unused=True))
        for actual, expected in zip(*gradients, strict=True):
            assert (actual is None) == (expected is None)
            if actual is not None:
                torch.testing.assert_close(actual, expected)


@LAYOUTS
def test_the_backward_fills_nothing_with_zeros(layout, device):
    """Autograd would make zeros for each output without a gradient, such as the mask of every element."""

    class NoZeros(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten.zeros.default
            return func(*args, **(kwargs or {}))

    x, residual = (_input((4, 8, 3, 3), torch.float32, device, layout).requires_grad_() for _ in range(2))
    channels = _channels(8, torch.float32, device)
    y, loss = ops.bn_act_matching(x, *channels, [0, 4], residual=residual, backend="triton")
    alone = ops.bn_matching(x, *channels[2:], [0, 4], backend="triton")
    ones = [torch.ones_like(t) for t in (y, loss, alone)]
    with NoZeros():
        torch.autograd.grad([y, loss, alone], (x, residual), ones)


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("_small_tiles")
def test_hard_inputs(dtype, layout, device):
    """Channels of variance 0, one of them at its running mean; an image of zeros; a segment of one image of one value."""
    x = _input((4, 16, 3, 1), dtype, device, layout, 3)
    x[:, 3], x[:, 4], x[1], x[3] = 2.0, -1.5, 0.0, 0.5
    weight, bias, mean, var = _channels(16, torch.float32, device)
    mean[3], var[5] = 2.0, 0.0

    def function(backend, x, residual):
        return ops.bn_act_matching(
            x, weight, bias, mean, var, [0, 1, 3, 4], residual=residual, eps=1e-3, backend=backend
        )

    _compare(function, [x, _input((4, 16, 3, 1), dtype, device, layout)], dtype)


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["relu", "relu6"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_ties_at_the_bounds_of_the_activation(with_residual, activation, dtype, layout, device):
    values = torch.tensor([0.0, -0.0, 6.0, 3.0, -1.0, 7.0], device=device).to(dtype)
    x = values.view(1, 1, 6, 1).repeat(2, 8, 1, 1).to(memory_format=layout)
    ones, zeros = torch.ones(8, device=device), torch.zeros(8, device=device)
    results = []
    for backend in ("triton", "reference"):
        leaf = x.detach().requires_grad_()
        residual = torch.zeros_like(x).requires_grad_() if with_residual else None
        y = ops.bn_act(
            leaf, ones, zeros, zeros, ones, residual=residual, activation=activation, eps=0.0, backend=backend
        )
        wanted = (leaf, residual) if with_residual else (leaf,)
        results.append((y, *torch.autograd.grad(y, wanted, 2.5 * torch.ones_like(y))))
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual, expected)


def test_nan_is_not_hidden_by_the_activation(device):
    x = torch.zeros(1, 8, 2, 2, device=device)
    x[0, 3, 1, 1] = float("nan")
    for activation in ("relu", "relu6", "identity"):
        y = ops.bn_act(x, *_channels(8, torch.float32, device), activation=activation, backend="triton")
        assert y.isnan().sum() == 1


def test_no_rows(device):
    x = torch.zeros(0, 8, 2, 2, device=device, requires_grad=True)
    y, loss = ops.bn_act_matching(x, *_channels(8, torch.float32, device), [0, 0, 0], backend="triton")
    assert y.shape == (0, 8, 2, 2)
    assert loss.tolist() == [0, 0]
    (y.sum() + loss.sum()).backward()
    assert x.grad.shape == x.shape


def test_input_without_gradient(device):
    x = _input((2, 8, 2, 2), torch.float32, device, LAST)
    y, loss = ops.bn_act_matching(x, *_channels(8, torch.float32, device), [0, 2], backend="triton")
    assert not y.requires_grad
    assert not loss.requires_grad


def test_too_many_rows_are_left_to_the_reference():
    x = torch.empty(1 << 16, 1, 1 << 8, 1 << 8, device="meta")
    assert "2^31" in _few_rows(x)
    assert _few_rows(x[:100]) is None


@LAYOUTS
def test_torch_compile_takes_the_kernels_whole(layout, device):
    torch._dynamo.reset()
    channels = _channels(8, torch.float32, device)
    segments = torch.tensor([0, 1, 4], device=device)

    def function(x, residual):
        y, loss = ops.bn_act_matching(x, *channels, segments, residual=residual, backend="triton")
        z = ops.bn_act(y * 2, *channels, backend="triton")
        return z, loss + ops.bn_matching(z, *channels[2:], segments, backend="triton")

    inputs = [_input((4, 8, 3, 3), torch.float32, device, layout) for _ in range(2)]
    eager, eager_gradients = _gradients(function, inputs)
    compiled, compiled_gradients = _gradients(torch.compile(function, fullgraph=True, backend="aot_eager"), inputs)
    for a, b in zip((*eager, *eager_gradients), (*compiled, *compiled_gradients), strict=True):
        torch.testing.assert_close(a, b)


@LAYOUTS
def test_operators_pass_torch_library_checks(layout, device):
    x = _input((4, 8, 3, 3), torch.float32, device, layout).requires_grad_()
    weight, bias, mean, var = _channels(8, torch.float32, device)
    segments = torch.tensor([0, 1, 4], device=device)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    for arguments, name in [
        ((x, mean, var, segments), "bn_matching"),
        ((x, segments), "segment_statistics"),
        ((x, weight, bias, mean, var, segments, torch.randn_like(x), "relu", 1e-5, True), "bn_act"),
        ((x, weight, bias, mean, var, segments, None, "relu6", 1e-5, False), "bn_act"),
    ]:
        torch.library.opcheck(getattr(torch.ops.fd2fast, name).default, arguments, test_utils=tests)
