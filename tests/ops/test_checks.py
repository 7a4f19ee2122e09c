"""Every wrong input is refused with a message that names it, what was wanted and what came."""

import pytest
import torch

from fd2fast import ops

X = torch.randn(4, 3, 5, 5)
C = torch.ones(3)


def _adam(**changes):
    arguments = {
        "image": X.clone(),
        "grad": X,
        "exp_avg": torch.zeros_like(X),
        "exp_avg_sq": torch.zeros_like(X),
        "step": 1,
        "lr": 0.1,
        "betas": (0.5, 0.9),
        "eps": 1e-8,
        "low": [-2.0] * 3,
        "high": [2.0] * 3,
    } | changes
    return ops.adam_clamp_(**arguments)


def _bn(**changes):
    arguments = {"x": X, "weight": C, "bias": C, "running_mean": C, "running_var": C, "segments": [0, 4]} | changes
    return ops.bn_act_matching(**arguments)


CASES = {
    "pool dimensions": (
        lambda: ops.bilinear_attention_pool(X[0], X),
        r"features must be \[N, C, H, W\], got \[3, 5, 5\]",
    ),
    "pool maps": (
        lambda: ops.bilinear_attention_pool(X, X[..., :4]),
        r"attention must be \[4, M, 5, 5\], got \[4, 3, 5, 4\]",
    ),
    "pool type": (lambda: ops.bilinear_attention_pool(X.int(), X), "features must be .*float32.*, got torch.int32"),
    "pool empty": (lambda: ops.bilinear_attention_pool(X[..., :0], X[..., :0]), "at least one pixel"),
    "l2 last": (lambda: ops.normalized_l2(X, X[..., :4]), r"D = 5 as u, got \[4, 3, 5, 4\]"),
    "l2 broadcast": (lambda: ops.normalized_l2(X, X[:3]), r"must broadcast, got \[4, 3, 5, 5\] and \[3, 3, 5, 5\]"),
    "prototypes width": (
        lambda: ops.prototype_loss(torch.ones(2, 4), torch.ones(3, 5), torch.zeros(2).long()),
        r"prototypes must be \[K, 4\], got \[3, 5\]",
    ),
    "prototypes none": (
        lambda: ops.prototype_loss(torch.ones(2, 4), torch.ones(0, 4), torch.zeros(2).long()),
        "K >= 1, got K = 0",
    ),
    "prototypes gradient": (
        lambda: ops.prototype_loss(torch.ones(2, 4), torch.ones(3, 4, requires_grad=True), torch.zeros(2).long()),
        "prototypes must not require a gradient",
    ),
    "labels range": (
        lambda: ops.prototype_loss(torch.ones(2, 4), torch.ones(3, 4), torch.tensor([0, 3])),
        r"labels must lie in \[0, 3\), got values from 0 to 3",
    ),
    "labels type": (
        lambda: ops.prototype_loss(torch.ones(2, 4), torch.ones(3, 4), torch.tensor([0.0, 1.0])),
        "labels must be int32 or int64, got torch.float32",
    ),
    "prior shape": (
        lambda: ops.attention_similarity_loss(X, X[:, :2], [0, 1, 2, 3, 4]),
        r"prior must be \[P, 3, 5, 5\], got \[4, 2, 5, 5\]",
    ),
    "offsets count": (lambda: ops.attention_similarity_loss(X, X, [0, 4]), r"offsets must be \[5\], got \[2\]"),
    "offsets start": (lambda: ops.attention_similarity_loss(X, X, [1, 1, 2, 3, 4]), "offsets must start at 0, got 1"),
    "offsets end": (
        lambda: ops.attention_similarity_loss(X, X, torch.tensor([0, 1, 2, 3, 3])),
        "offsets must end at the rows of prior = 4, got 3",
    ),
    "offsets fall": (
        lambda: ops.attention_similarity_loss(X, X, (0, 3, 2, 3, 4)),
        r"offsets must not fall, got offsets\[1\] = 3 > offsets\[2\] = 2",
    ),
    "offsets type": (
        lambda: ops.attention_similarity_loss(X, X, torch.tensor([0.0, 1, 2, 3, 4])),
        "offsets must be int32 or int64, got torch.float32",
    ),
    "offsets floats": (lambda: ops.bn_matching(X, C, C, [0, 2.5, 4]), "segments must be an int tensor"),
    "segments end": (lambda: ops.bn_matching(X, C, C, [0, 3]), "segments must end at the rows of x = 4, got 3"),
    "segments empty": (lambda: ops.bn_matching(X, C, C, []), "segments must be"),
    "running_mean": (lambda: _bn(running_mean=torch.ones(4)), r"running_mean must be \[3\], got \[4\]"),
    "weight gradient": (lambda: _bn(weight=torch.ones(3, requires_grad=True)), "weight must not require a gradient"),
    "activation": (lambda: _bn(activation="gelu"), "activation must be .*, got 'gelu'"),
    "residual": (lambda: _bn(residual=X[:2]), r"residual must be \[4, 3, 5, 5\], got \[2, 3, 5, 5\]"),
    "device": (lambda: _bn(bias=C.to("meta")), "bias must be on x's device cpu, got meta"),
    "size": (lambda: ops.crop_flip_roll(X, [[0, 0, 5, 5, 0, 0, 0]], [0, 4], 0), "size must be an int >= 1, got 0"),
    "params shape": (
        lambda: ops.crop_flip_roll(X, [[0, 0, 5, 5, 0]], [0, 4], 5),
        r"params must be \[1, 7\], got \[1, 5\]",
    ),
    "params outside": (
        lambda: ops.crop_flip_roll(X, [[1, 0, 5, 5, 0, 0, 0]], [0, 4], 5),
        r"params\[0\] must be a crop inside images of 5 x 5, got top 1",
    ),
    "params flip": (lambda: ops.crop_flip_roll(X, [[0, 0, 5, 5, 2, 0, 0]], [0, 4], 5), "flip 0 or 1, got 2"),
    "step": (lambda: _adam(step=0), "step must be >= 1 .*, got 0"),
    "grad": (lambda: _adam(grad=X[:2]), r"grad must be \[4, 3, 5, 5\], got \[2, 3, 5, 5\]"),
    "moments": (lambda: _adam(exp_avg_sq=torch.zeros_like(X).double()), "exp_avg_sq must be torch.float32 as exp_avg"),
    "step device": (
        lambda: _adam(step=torch.ones((), device="meta")),
        "step must be on image's device cpu, got meta",
    ),
    "rate device": (lambda: _adam(lr=torch.ones((), device="meta")), "lr must be on image's device cpu, got meta"),
    "rate values": (lambda: _adam(lr=torch.ones(2)), r"lr must be a number or hold one, got shape \[2\]"),
    "grad device": (lambda: _adam(grad=X.to("meta")), "grad must be on image's device cpu, got meta"),
    "pool device": (
        lambda: ops.bilinear_attention_pool(X, X.to("meta")),
        "attention must be on features's device cpu, got meta",
    ),
    "l2 device": (lambda: ops.normalized_l2(X, X.to("meta")), "v must be on u's device cpu, got meta"),
    "prototypes device": (
        lambda: ops.prototype_loss(torch.ones(2, 4), torch.ones(3, 4, device="meta"), torch.zeros(2).long()),
        "prototypes must be on z's device cpu, got meta",
    ),
    "prior device": (
        lambda: ops.attention_similarity_loss(X, X.to("meta"), [0, 1, 2, 3, 4]),
        "prior must be on attention's device cpu, got meta",
    ),
    "residual device": (lambda: _bn(residual=X.to("meta")), "residual must be on x's device cpu, got meta"),
    "statistics device": (
        lambda: ops.match_statistics(C[None], C[None].to("meta"), C, C),
        "var must be on mean's device cpu, got meta",
    ),
    "low": (lambda: _adam(low=[0.0]), r"low must be \[C\] = \[3\], got \[1\]"),
}


@pytest.mark.parametrize("case", CASES)
def test_refused(case):
    call, message = CASES[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_frozen_weights_under_no_grad_are_fine():
    with torch.no_grad():
        _bn(weight=torch.ones(3, requires_grad=True))


def test_autocast_does_not_lower_the_precision():
    with torch.autocast("cpu", torch.bfloat16):
        z = ops.bilinear_attention_pool(X, X)
    torch.testing.assert_close(z, ops.bilinear_attention_pool(X, X), rtol=0, atol=0)


@pytest.mark.gpu
def test_values_on_a_gpu_are_read_only_on_request(monkeypatch):
    x, bad = X.cuda(), torch.tensor([0, 3], device="cuda")
    ops.bn_matching(x, C.cuda(), C.cuda(), torch.tensor([0, 4], device="cuda"))
    monkeypatch.setenv("FD2FAST_CHECK_VALUES", "1")
    with pytest.raises(ValueError, match="must end at"):
        ops.bn_matching(x, C.cuda(), C.cuda(), bad)
