"""The algorithms of a frozen convolution: each gives the same values, and choices are measured once, kept and obeyed."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fd2fast.models import convolution
from fd2fast.models import frozen_layers as frozen
from fd2fast.models.convolution import Choices
from fd2fast.ops.cpu import native

LAYERS = {
    "3x3": nn.Conv2d(16, 24, 3, padding=1),
    "strided": nn.Conv2d(16, 24, 3, stride=2, padding=1),
    "first": nn.Conv2d(3, 16, 7, stride=2, padding=3),
    "depthwise": nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16),
    "1x1": nn.Conv2d(16, 24, 1),
}
NAMES = ("winograd", "phases", "taps", "packed", "plain")


class Only(Choices):
    """The named algorithm wherever it is a candidate; remembers which were asked for."""

    def __init__(self, name):
        super().__init__()
        self.name, self.seen = name, {}

    def pick(self, kind, candidates):
        self.seen[kind] = tuple(candidates)
        return self.name if self.name in candidates else next(iter(candidates))


@pytest.fixture(autouse=True)
def _built():
    if native.WHY_NOT:
        pytest.fail(f"{native.WHY_NOT}; install the package again")


def both(layer, choices, dtype=torch.float32, rows=3, side=12):
    own = frozen.FrozenConv(layer.requires_grad_(False), dtype)
    own.choose_by(choices)
    made = torch.Generator().manual_seed(0)
    x = torch.randn(rows, layer.in_channels, side, side, generator=made).to(dtype)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    y = own(x)
    grad = torch.randn(y.shape, generator=made).to(dtype)
    return own, x.detach(), grad, y.detach(), torch.autograd.grad(y, x, grad)[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_algorithm_gives_the_same_values(kind, name, dtype):
    layer, choices = LAYERS[kind], Only(name)
    own, x, grad, y, found = both(layer, choices, dtype)
    exact = x.double().requires_grad_()
    settings = own.stride, own.padding, own.dilation, own.groups
    wanted = F.conv2d(exact, own.weight.double(), own.bias.double(), *settings)
    wanted.backward(grad.double())
    limit = 2e-6 if dtype == torch.float32 else 6e-3
    for value, right in ((y, wanted.detach()), (found, exact.grad)):
        assert value.dtype == dtype
        assert ((value.double() - right).norm() / right.norm()).item() < limit


def test_candidates_by_layer():
    """Each algorithm is a candidate where it was made for, the plain one everywhere."""
    expected = {
        "3x3": ({"winograd", "plain"}, {"winograd", "plain"}),
        "strided": ({"plain"}, {"plain"}),
        "first": ({"plain"}, {"phases", "plain"}),
        "depthwise": ({"plain"}, {"taps", "plain"}),
        "1x1": ({"plain"}, {"plain"}),
    }
    for kind, layer in LAYERS.items():
        choices = Only("plain")
        both(layer, choices)
        forward, gradient = (set(names) - {"packed"} for names in choices.seen.values())
        assert (forward, gradient) == expected[kind]


def test_nothing_is_measured_unless_asked(monkeypatch):
    monkeypatch.setattr(convolution, "_measured", None)
    choices = Choices()
    both(LAYERS["3x3"], choices)
    assert choices.chosen == {}


def slowed(monkeypatch, slow):
    """Make some candidates take long on a clock of their own, and count how often each is run."""
    counts, now = dict.fromkeys(NAMES, 0), [0.0]
    real = convolution._measured
    monkeypatch.setattr(convolution, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def measured(candidates):
        def run(name):
            counts[name] += 1
            now[0] += 0.01 if name in slow else 0.001

        return real({name: (lambda name=name: run(name)) for name in candidates})

    monkeypatch.setattr(convolution, "_measured", measured)
    return counts


def test_the_fastest_is_chosen_and_kept(monkeypatch):
    choices = Choices()
    counts = slowed(monkeypatch, {"winograd", "packed"})
    with choices.measure():
        both(LAYERS["3x3"], choices)
    assert list(choices.chosen.values()) == ["plain", "plain"]
    assert all(kind.startswith(way) for kind, way in zip(choices.chosen, ("forward", "gradient"), strict=True))
    before = dict(counts)
    with choices.measure():
        both(LAYERS["3x3"], choices, rows=5)  # the number of images does not matter
    assert counts == before
    with choices.measure():
        both(LAYERS["3x3"], choices, side=9)
    assert len(choices.chosen) == 4


def test_a_near_tie_is_left_to_the_rule(monkeypatch):
    monkeypatch.setattr(
        convolution, "_measured", lambda candidates: {n: 1.0 - 0.01 * i for i, n in enumerate(candidates)}
    )
    choices = Choices()
    with choices.measure():
        both(LAYERS["3x3"], choices)
    assert list(choices.chosen.values()) == ["winograd", "winograd"]


def test_recorded_choices_are_obeyed_and_unknown_names_are_not(monkeypatch):
    monkeypatch.setattr(convolution, "_measured", None)
    seen = Only("plain")
    plain = both(LAYERS["3x3"], seen)
    recorded = Choices(dict.fromkeys(seen.seen, "plain"))
    again = both(LAYERS["3x3"], recorded)
    assert all(torch.equal(a, b) for a, b in zip(plain[3:], again[3:], strict=True))
    stranger = Choices(dict.fromkeys(seen.seen, "of another version"))
    both(LAYERS["3x3"], stranger)  # falls back to the rule


def test_types_without_kernels_are_left_to_torch():
    choices = Only("plain")
    for dtype in (torch.float64, torch.float16):
        own = frozen.FrozenConv(LAYERS["1x1"].requires_grad_(False), dtype)
        own.choose_by(choices)
        own(torch.randn(2, 16, 4, 4).to(dtype).to(memory_format=torch.channels_last))
    assert choices.seen == {}
