"""The CAL head against formulas written out by hand, in fp64."""

import pytest
import torch

from fd2fast.models.attention_head import AttentionHead


def make(channels=5, classes=4, maps=3, dtype=torch.float64):
    head = AttentionHead(channels, classes, maps).to(dtype)
    bn = head.attentions.bn
    with torch.no_grad():
        head.attentions.conv.weight.normal_()
        for t in (bn.weight, bn.running_mean):
            t.normal_()
        bn.running_var.uniform_(0.5, 2)
    return head, torch.rand(6, channels, 2, 3, dtype=dtype)


def pool_by_hand(features, attention):
    n, c, h, w = features.shape
    m = attention.shape[1]
    z = torch.zeros(n, m * c, dtype=features.dtype)
    for i in range(n):
        for a in range(m):
            for b in range(c):
                g = (attention[i, a] * features[i, b]).sum() / (h * w)
                z[i, a * c + b] = g.sign() * (g.abs() + 1e-6).sqrt()
        z[i] = z[i] / max(z[i].norm().item(), 1e-12)
    return z


def test_state_dict_names_are_the_references():
    shapes = {key: tuple(value.shape) for key, value in AttentionHead(7, 4, 3).state_dict().items()}
    assert shapes == {
        "attentions.conv.weight": (3, 7, 1, 1),
        "attentions.bn.weight": (3,),
        "attentions.bn.bias": (3,),
        "attentions.bn.running_mean": (3,),
        "attentions.bn.running_var": (3,),
        "attentions.bn.num_batches_tracked": (),
        "fc.weight": (4, 21),
    }


def test_eval_forward_is_the_formula():
    head, features = make()
    head.eval()
    bn = head.attentions.bn
    mixed = torch.einsum("mc,nchw->nmhw", head.attentions.conv.weight[:, :, 0, 0], features)
    wide = (slice(None), None, None)
    scaled = (mixed - bn.running_mean[wide]) / (bn.running_var[wide] + 1e-3).sqrt() * bn.weight[wide] + bn.bias[wide]
    attention = scaled.clamp(min=0)
    out = head(features, counterfactual="ones")
    torch.testing.assert_close(out.attention, attention)
    assert (attention == 0).any()
    z = pool_by_hand(features, attention)
    torch.testing.assert_close(out.z, z)
    raw = 100 * z @ head.fc.weight.T
    torch.testing.assert_close(out.logits, raw)
    z_ones = pool_by_hand(features, torch.ones_like(attention))
    torch.testing.assert_close(out.effect_logits, raw - 100 * z_ones @ head.fc.weight.T)
    assert head(features).effect_logits is None


def test_train_forward_draws_other_attention_from_the_generator():
    head, features = make()
    head.train()
    out = head(features, "random", torch.Generator().manual_seed(3))
    other = torch.rand(out.attention.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * 2
    z_other = pool_by_hand(features, other)
    torch.testing.assert_close(out.effect_logits, out.logits - 100 * z_other @ head.fc.weight.T)
    assert 1.5 < other.max() < 2
    with pytest.raises(ValueError, match="counterfactual"):
        head(features, "zeros")


def test_gradient_flows_through_the_counterfactual_to_the_features():
    head, features = make()
    head.eval()
    features.requires_grad_()
    raw = torch.autograd.grad(head(features).logits.square().sum(), features)[0]
    effect = torch.autograd.grad(head(features, "ones").effect_logits.square().sum(), features)[0]
    assert not torch.allclose(raw, effect)
    assert torch.autograd.gradcheck(lambda f: head(f, "ones").effect_logits, features)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pooling_stays_in_fp32_under_autocast_and_with_low_precision_weights(dtype):
    head, features = make(dtype=torch.float32)
    head.eval()
    exact = head(features, "ones")
    with torch.autocast("cpu", dtype=dtype):
        cast = head(features, "ones")
    low = head.to(dtype)(features.to(dtype), "ones")
    for out in (cast, low):
        assert out.attention.dtype == dtype
        assert out.z.dtype == out.logits.dtype == out.effect_logits.dtype == torch.float32
        torch.testing.assert_close(out.z, exact.z, atol=2e-2, rtol=0)
        torch.testing.assert_close(out.z.norm(dim=1), torch.ones(6), atol=1e-5, rtol=0)
