"""The building blocks against plain formulas, sample by sample, values and gradients in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fd2fast import dropin
from fd2fast.errors import UserError

B, C, H, M, K = 3, 5, 4, 2, 4


def maps(*shape: int, positive: bool = False, seed: int = 0) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.abs() if positive else made


def same(found: Callable[[Tensor], Tensor], wanted: Callable[[Tensor], Tensor], at: Tensor) -> None:
    """Value and gradient, with random weights on the outputs."""
    results = []
    for run in (found, wanted):
        leaf = at.clone().requires_grad_()
        value = run(leaf)
        weights = torch.linspace(0.5, 1.5, value.numel(), dtype=torch.float64).reshape(value.shape)
        (value * weights).sum().backward()
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


def pooled(features: Tensor, attention: Tensor) -> Tensor:
    rows = []
    for f, a in zip(features, attention, strict=True):
        values = torch.stack([(a[m] * f[c]).mean() for m in range(len(a)) for c in range(len(f))])
        root = values.sign() * (values.abs() + 1e-6).sqrt()
        rows.append(root / root.norm())
    return torch.stack(rows)


@pytest.mark.parametrize("positive", [True, False])
def test_bap(positive: bool) -> None:
    attention, bap = maps(B, M, H, H, positive=True, seed=1), dropin.BAP().eval()
    features = maps(B, C, H, H, positive=positive)
    same(lambda x: bap(x, attention)[0], lambda x: pooled(x, attention), features)
    same(lambda x: bap(x, attention)[1], lambda x: pooled(x, torch.ones_like(attention)), features)
    same(lambda x: bap(features, x)[0], lambda x: pooled(features, x), attention)


def test_bap_of_maps_of_another_size_and_by_maximum() -> None:
    features, attention = maps(B, C, H, H), maps(B, M, 2, 2, positive=True)
    larger = nn.functional.interpolate(attention, size=(H, H), mode="bilinear", align_corners=True)
    torch.testing.assert_close(dropin.BAP()(features, attention)[0], pooled(features, larger))
    most = torch.stack([(features * larger[:, m : m + 1]).amax(dim=(2, 3)) for m in range(M)], dim=1).flatten(1)
    root = most.sign() * (most.abs() + 1e-6).sqrt()
    torch.testing.assert_close(dropin.BAP("GMP")(features, attention)[0], root / root.norm(dim=1, keepdim=True))
    with pytest.raises(ValueError, match="GAP or GMP"):
        dropin.BAP("MAX")


def test_counterfactual_of_training_is_drawn_from_torch() -> None:
    features, attention, bap = maps(B, C, H, H), maps(B, M, H, H, positive=True), dropin.BAP().train()
    torch.manual_seed(2)
    found = bap(features, attention)[1]
    torch.manual_seed(2)
    torch.testing.assert_close(found, pooled(features, torch.zeros_like(attention).uniform_(0, 2)))


def test_cal() -> None:
    torch.manual_seed(0)
    head = dropin.CAL(K, M, "ShuffleNetV2").double().eval()
    assert (head.num_features, head.shape_features, head.M, head.num_classes) == (1024, (1024, 7, 7), M, K)
    assert dropin.CAL(K, M, "ResNet50", "CVDD").shape_features == (2048, 28, 28)
    assert [*head.state_dict()] == [
        "attentions.conv.weight",
        *(f"attentions.bn.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
        "fc.weight",
    ]
    features = maps(B, 1024, 2, 2, positive=True)
    raw, effect, z, mean, attention = head(features)
    conv, norm = head.attentions.conv, head.attentions.bn
    wanted = torch.relu(norm(conv(features)))
    torch.testing.assert_close(attention, wanted)
    torch.testing.assert_close(mean, wanted.mean(1, keepdim=True))
    torch.testing.assert_close(z, pooled(features, wanted))
    torch.testing.assert_close(raw, 100 * z @ head.fc.weight.T)
    torch.testing.assert_close(effect, raw - 100 * pooled(features, torch.ones_like(wanted)) @ head.fc.weight.T)
    logits, maps_shown = head.visualize(features)
    torch.testing.assert_close(logits, raw)
    torch.testing.assert_close(maps_shown, attention)


def test_cal_in_training_draws_maps_from_numpy() -> None:
    head = dropin.CAL(K, 3, "ShuffleNetV2").double().train()
    features = maps(B, 1024, 2, 2, positive=True)
    np.random.seed(4)
    *_, chosen, attention = head(features)
    np.random.seed(4)
    for own, pair in zip(attention.detach(), chosen, strict=True):
        weights = (own.sum(dim=(1, 2)) + 1e-6).sqrt()
        index = np.random.choice(3, 2, p=(weights / weights.sum()).numpy())
        torch.testing.assert_close(pair, own[index])


def test_cal_refuses_weights_of_another_shape() -> None:
    state = dropin.CAL(K, 4, "ShuffleNetV2").state_dict()
    dropin.CAL(K, 4, "ShuffleNetV2").load_state_dict(state)
    with pytest.raises(UserError, match=r"\[4, 1024, 1, 1\], wanted \[8, 1024, 1, 1\]"):
        dropin.CAL(K, 8, "ShuffleNetV2").load_state_dict(state, strict=False)
    with pytest.raises(ValueError, match="Unsupported net"):
        dropin.CAL(K, 4, "ResNet34")


def test_bn_hook() -> None:
    layer = nn.BatchNorm2d(C).double().eval()
    layer.running_mean, layer.running_var = maps(C), maps(C, positive=True, seed=1)
    hook = dropin.BNFeatureHook(layer)
    at = maps(B, C, H, H, seed=2)

    def plain(x: Tensor) -> Tensor:
        flat = x.transpose(0, 1).flatten(1)
        mean = flat.mean(1)
        var = ((flat - mean[:, None]) ** 2).mean(1)
        return (layer.running_var - var).norm() + (layer.running_mean - mean).norm()  # type: ignore[operator]

    def hooked(x: Tensor) -> Tensor:
        layer(x)
        assert hook.r_feature is not None
        return hook.r_feature

    same(hooked, plain, at)
    torch.testing.assert_close(hook.mean, at.mean((0, 2, 3)))
    torch.testing.assert_close(hook.var, at.var((0, 2, 3), unbiased=False))
    hook.close()
    before = hook.r_feature
    layer(at + 1)
    assert hook.r_feature is before


def apart(u: Tensor, v: Tensor, method: str, eps: float = 1e-6) -> Tensor:
    if method == "cos":
        return (1 - u @ v / (u.norm() * v.norm())) / 2
    order = {"l2": 2, "l1": 1}[method]
    return (u - v).norm(p=order) / (u.norm(p=order) + v.norm(p=order) + eps)


@pytest.mark.parametrize("target", ["up", "down"])
@pytest.mark.parametrize("method", ["l2", "l1", "cos"])
def test_distances(method: str, target: str) -> None:
    labels, centers, z = torch.tensor([0, 3, 2]), maps(K, 7, seed=3), maps(B, 7)

    def told(mean: Tensor) -> Tensor:
        return 1 - mean if target == "up" else mean

    def own(x: Tensor) -> Tensor:
        return told(torch.stack([apart(x[i], centers[labels[i]], method) for i in range(B)]).mean())

    def others(x: Tensor) -> Tensor:
        rows = [
            torch.stack([apart(x[i], centers[k], method) for k in range(K) if k != labels[i]]).mean() for i in range(B)
        ]
        return told(torch.stack(rows).mean())

    same(lambda x: dropin.intra_feature_center_dist(x, labels, centers, method, target), own, z)
    same(lambda x: dropin.inter_feature_center_dist(x, labels, centers, method, target), others, z)
    priors, source = maps(2, M, H, H, positive=True, seed=5), maps(1, M, H, H, positive=True)

    def similar(x: Tensor) -> Tensor:
        return told(torch.stack([apart(prior.flatten(), x.flatten(), method) for prior in priors]).mean())

    same(lambda x: dropin.features_dist(priors, x, method, target), similar, source)


def test_similarity_of_maps_of_another_size() -> None:
    priors, source = maps(2, M, 6, 6, positive=True), maps(1, M, H, H, positive=True)
    smaller = nn.functional.interpolate(priors, size=(H, H), mode="bilinear", align_corners=False)
    found, wanted = (dropin.features_dist(p, source, "l2", "up") for p in (priors, smaller))
    assert float(found) == pytest.approx(float(wanted))
    assert math.isfinite(float(found))


@pytest.mark.parametrize("given", [("l3", "up"), ("l2", "sideways")])
def test_unknown_distances(given: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="must be one of"):
        dropin.features_dist(maps(1, M, H, H), maps(1, M, H, H), *given)
