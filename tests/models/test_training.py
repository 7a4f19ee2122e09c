"""Training with Winograd's convolutions: values and all gradients against plain sums, autocast, threads, what stays as it was."""

import copy

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import nn

from fd2fast.models import training
from fd2fast.ops.cpu import native

# channels in, out, rows, side, padding, with a bias
CASES = [
    (24, 32, 4, (16, 16), (1, 1), True),
    (16, 64, 3, (13, 18), (1, 1), False),
    (19, 21, 5, (9, 11), (1, 1), True),
    (64, 48, 9, (8, 8), (0, 2), False),
    (8, 8, 24, (4, 4), (1, 1), True),
]


@pytest.fixture(autouse=True)
def _built():
    if native.WHY_NOT:
        pytest.fail(f"{native.WHY_NOT}; install the package again")


def relative(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


def run(layer, x, grad):
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(grad)
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]


@pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_sums(case, order):
    c, o, rows, side, padding, bias = case
    torch.manual_seed(c)
    layer = nn.Conv2d(c, o, 3, padding=padding, bias=bias).to(memory_format=order)
    exact = copy.deepcopy(layer).double()
    assert training.accelerate(layer) == 1
    x = torch.randn(rows, c, *side).to(memory_format=torch.channels_last)
    grad = torch.randn(exact(x.double()).shape)
    found = run(layer, x, grad)
    wanted = run(exact, x.double(), grad.double())
    assert len(found) == len(wanted) == (4 if bias else 3)
    for value, right in zip(found, wanted, strict=True):
        assert value.dtype == torch.float32
        assert value.shape == right.shape
        assert relative(value, right) < 5e-6


@pytest.mark.parametrize("case", CASES[:3])
def test_autocast_gives_its_type_and_gradients_in_fp32(case, monkeypatch):
    monkeypatch.setattr(training, "_bf16_products", lambda: False)
    c, o, rows, side, padding, bias = case
    torch.manual_seed(c)
    layer = nn.Conv2d(c, o, 3, padding=padding, bias=bias)
    exact = copy.deepcopy(layer).double()
    training.accelerate(layer)
    x = torch.randn(rows, c, *side).bfloat16().float().to(memory_format=torch.channels_last)
    grad = torch.randn(exact(x.double()).shape).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(layer, x, grad)
    wanted = run(exact, x.double(), grad.double())
    assert [v.dtype for v in found] == [torch.bfloat16, *[torch.float32] * (len(found) - 1)]
    for value, right in zip(found, wanted, strict=True):
        assert relative(value, right) < 4e-3


def test_gradients_are_asked_for_one_by_one():
    layer = nn.Conv2d(8, 8, 3, padding=1)
    training.accelerate(layer)
    x = torch.randn(4, 8, 12, 12).to(memory_format=torch.channels_last)
    layer(x).sum().backward()
    assert layer.weight.grad is not None
    layer.zero_grad()
    layer.requires_grad_(False)
    x.requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None
    with torch.inference_mode():
        assert layer(x).shape == x.shape


@pytest.mark.parametrize("rows", [2, 40])
def test_the_results_do_not_depend_on_threads(rows):
    torch.manual_seed(0)
    layer = nn.Conv2d(32, 40, 3, padding=1, bias=False)
    training.accelerate(layer)
    x = torch.randn(rows, 32, 16, 16).to(memory_format=torch.channels_last)
    grad = torch.randn(rows, 40, 16, 16).to(memory_format=torch.channels_last)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(run(layer, x, grad))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_bf16_maps_are_left_to_a_processor_that_multiplies_them(monkeypatch):
    taken = []
    real = training._Winograd.apply
    monkeypatch.setattr(training._Winograd, "apply", lambda *given: taken.append(given[0].dtype) or real(*given))
    layer = nn.Conv2d(16, 16, 3, padding=1)
    training.accelerate(layer)
    x = torch.randn(4, 16, 16, 16).to(memory_format=torch.channels_last)
    for products in (False, True):
        monkeypatch.setattr(training, "_bf16_products", lambda products=products: products)
        layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    assert taken == [torch.float32, torch.bfloat16, torch.float32]


def test_what_does_not_pay_or_fit_runs_as_it_was(monkeypatch):
    monkeypatch.setattr(training._Winograd, "apply", None)
    layer = nn.Conv2d(16, 16, 3, padding=1)
    plain = copy.deepcopy(layer)
    assert training.accelerate(layer) == 1
    for x in (torch.randn(2, 16, 4, 4), torch.randn(16, 8, 8)):  # few tiles; no batch
        assert torch.equal(layer(x), plain(x))
    layer.double()
    x = torch.randn(8, 16, 16, 16, dtype=torch.float64)
    assert torch.equal(layer(x), plain.double()(x))


def test_only_convolutions_of_its_kind_are_taken_and_names_stay():
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(16, 16, 3, padding="same"),
        nn.Conv2d(16, 16, 3, stride=2),
        nn.Conv2d(16, 16, 3, groups=2),
        nn.Conv2d(16, 16, 1),
        Conv2dSame(16, 16, 3),
        nn.Conv2d(16, 16, 3, padding=1),
    )
    names = list(network.state_dict())
    assert training.accelerate(network) == 1
    assert isinstance(network[-1], training.WinogradConv2d)
    assert training.accelerate(network) == 0
    assert list(network.state_dict()) == names


def test_a_network_learns_the_same():
    """Losses of some steps agree with torch's convolutions."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(4),
    )
    x, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 4
    network(x)
    losses = []
    for fast in (False, True):
        own = copy.deepcopy(network)
        if fast:
            training.accelerate(own)
        optimizer, seen = torch.optim.SGD(own.parameters(), 0.05), []
        for _ in range(5):
            loss = F.cross_entropy(own(x), labels)
            seen.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(seen)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][-1] < losses[0][0]
