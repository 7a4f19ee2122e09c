"""Weights wherever they lie in a checkpoint: wrappers, prefixes, EMA copies, heads, and what is refused."""

import argparse
import itertools

import pytest
import torch
from model_tools import TINY
from safetensors.torch import save_file

from fd2fast.errors import UserError
from fd2fast.models.backbone import build_backbone, load_weights
from fd2fast.models.matching import check_values, choose, find

WANTED = {
    "conv.weight": torch.Size([4, 3, 1, 1]),
    "bn.weight": torch.Size([4]),
    "bn.running_var": torch.Size([4]),
    "bn.num_batches_tracked": torch.Size([]),
    "fc.weight": torch.Size([5, 4]),
    "fc.bias": torch.Size([5]),
}
HEAD = ("fc.weight", "fc.bias")


def state(value=1.0, **changes):
    made = {key: torch.full(shape, value) for key, shape in WANTED.items()}
    return {**made, **{key.replace("__", "."): tensor for key, tensor in changes.items()}}


def under(prefix, tensors):
    return {prefix + key: value for key, value in tensors.items()}


def found(content, **how):
    candidates = find(content, WANTED, HEAD, **how)
    assert candidates[0].fits, candidates[0].faults()
    return choose(candidates, origin="file")


PREFIXES = (
    "module.",
    "model.",
    "_orig_mod.",
    "backbone.",
    "encoder.",
    "net.",
    "network.",
    "student.",
    "_forward_module.",
)


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
def test_prefixes_in_any_order(depth):
    for parts in itertools.islice(itertools.permutations(PREFIXES, depth), 60):
        chosen, notices = found({"state_dict": under("".join(parts), state())})
        assert chosen.tensors.keys() == WANTED.keys()
        assert notices == []


@pytest.mark.parametrize(
    "infix", ["_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "_fpw_module."]
)
def test_wrapped_modules_at_any_depth(infix):
    wrapped = {f"module.{key.replace('.', f'.{infix}', 1)}": value for key, value in state().items()}
    assert found(wrapped)[0].tensors.keys() == WANTED.keys()


@pytest.mark.parametrize(
    "path",
    [
        (), ("state_dict",), ("model_state_dict",), ("model",), ("net",), ("params",), ("module",), ("weights",), ("G",),
        ("state", "model"), ("ema", "module"), ("checkpoint", "model", "state_dict"), ("model_ema",), ("a", "b", "c", "d"),
    ],
)  # fmt: skip
def test_wrappers_of_any_name(path):
    content = state()
    for key in reversed(path):
        content = {key: content, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(4)}}}}
    chosen, notices = found(content)
    assert (chosen.tensors.keys(), chosen.entry, notices) == (WANTED.keys(), "/".join(path), [])


@pytest.mark.parametrize(
    ("plain", "ema"),
    [
        (("state_dict", ""), ("state_dict_ema", "")),
        (("model", "module."), ("model_ema", "module.")),
        (("model", ""), ("ema", "")),
        (("state_dict", "model."), ("state_dict", "ema_model.")),
        (("state_dict", "model."), ("state_dict", "model_ema.module.")),
        (("net", ""), ("net_ema", "")),
        (("model", ""), ("swa", "")),
    ],
)
def test_an_ema_copy_is_taken_and_said(plain, ema):
    content = {}
    for (entry, prefix), value in ((plain, 1.0), (ema, 2.0)):
        content.setdefault(entry, {}).update(under(prefix, state(value)))
    chosen, notices = found(content)
    assert chosen.tensors["bn.weight"][0] == 2
    assert "EMA" in notices[0]
    assert repr(ema[0]) in notices[0]
    assert "ema" not in notices[0].split("not ")[1]


def test_words_with_ema_inside_are_no_ema():
    chosen, notices = found({"schema": state(1.0), "cinema": state(1.0)})
    assert not chosen.ema
    assert notices == []


def test_equal_copies_are_one():
    assert found({"state_dict": state(), "model": state(), "best": state()})[1] == []


@pytest.mark.parametrize(
    "content",
    [
        {"student": state(1.0), "teacher": state(2.0)},
        {"state_dict": {**under("encoder_q.", state(1.0)), **under("encoder_k.", state(2.0))}},
        {"ema_0.999": state(1.0), "ema_0.9999": state(2.0), "model": state(3.0)},
        {"last": state(1.0), "best": state(2.0)},
    ],
)
def test_several_that_fit_are_listed(content):
    with pytest.raises(UserError, match=r"several sets of weights that fit: .*, .*; save the one you want") as error:
        found(content)
    names = list(content) if len(content) > 1 else ["encoder_q.", "encoder_k."]
    assert sum(name in str(error.value) for name in names) >= 2


def test_a_head_of_another_class_count_or_none():
    other = state(fc__weight=torch.zeros(1000, 4), fc__bias=torch.zeros(1000))
    none = {key: value for key, value in state().items() if not key.startswith("fc.")}
    assert found(other)[0].head == 1
    assert found(none)[0].head == 2
    assert found({"a": none, "b": other, "c": state(3.0)})[0].entry == "c"
    for content in (other, none):
        assert not find(content, WANTED, HEAD, new_head=False)[0].fits


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"bn__weight": torch.ones(8)}, r"other shape: bn.weight \(8,\) for \(4,\)"),
        ({"bn__extra": torch.ones(4)}, "unexpected: bn.extra"),
        ({"layer__weight": torch.ones(4), "other__weight": torch.ones(4)}, "unexpected: layer.weight, other.weight"),
        ({"fc__scale": torch.ones(4)}, "unexpected: fc.scale"),
    ],
)
def test_everything_else_is_strict(change, told):
    import re

    assert re.search(told, find(state(**change), WANTED, HEAD)[0].faults())
    gone = state()
    del gone["conv.weight"]
    assert find({"model": gone}, WANTED, HEAD)[0].faults() == "missing: conv.weight"


def test_tensors_of_other_parts_are_left():
    assert (
        found({**under("model.", state()), "loss.weight": torch.ones(3), "metric.count": torch.ones(1)})[0].prefix
        == "model."
    )


def test_counters_may_be_absent_or_of_the_old_shape():
    gone = state()
    del gone["bn.num_batches_tracked"]
    found(gone)
    assert found(state(bn__num_batches_tracked=torch.ones(1)))[0].tensors["bn.num_batches_tracked"].shape == ()


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (torch.tensor([1.0, float("nan"), 2.0]), r"a.b \(1 of 3\)"),
        (torch.tensor([float("inf"), float("-inf")]), r"a.b \(2 of 2\)"),
        (torch.tensor([float("nan")]).half(), "NaN or infinite"),
        (torch.full((2,), float("nan")).to(torch.float8_e5m2), "NaN or infinite"),
        (torch.ones(3, dtype=torch.int8), "quantised"),
        (torch.ones(3, dtype=torch.complex64), "no plain values"),
        (torch.empty(3, device="meta"), "no plain values"),
        (torch.eye(3).to_sparse(), "no plain values"),
    ],
)
def test_values_that_are_no_weights_are_named(value, told):
    with pytest.raises(UserError, match=told):
        check_values({"good": torch.ones(2), "a.b": value}, origin="file")


@pytest.fixture(scope="module")
def source():
    torch.manual_seed(3)
    return build_backbone(TINY, 4)


@pytest.mark.parametrize(
    ("wrap", "suffix"),
    [
        (lambda s: {"state_dict": under("model.", s), "hyper_parameters": argparse.Namespace(lr=0.1)}, ".ckpt"),
        (lambda s: {"model": under("module._orig_mod.", s), "args": argparse.Namespace(arch="r")}, ".pth"),
        (lambda s: under("_orig_mod.module.backbone.", s), ".safetensors"),
        (lambda s: {"ema": {"module": s}, "model": under("module.", {k: v * 0 for k, v in s.items()})}, ".pt"),
        (lambda s: {k: torch.nn.Parameter(v) if v.is_floating_point() else v for k, v in s.items()}, ".bin"),
    ],
)
def test_checkpoints_of_trainers_load(tmp_path, source, wrap, suffix):
    path = tmp_path / f"weights{suffix}"
    content = wrap(source.net.state_dict())
    save_file(content, path) if suffix == ".safetensors" else torch.save(content, path)
    backbone = build_backbone(TINY, 4)
    load_weights(backbone, path)
    for key, value in source.net.state_dict().items():
        assert torch.equal(backbone.net.state_dict()[key], value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_other_float_types_are_converted(tmp_path, source, dtype):
    content = {k: v.to(dtype) if v.is_floating_point() else v for k, v in source.net.state_dict().items()}
    torch.save(content, tmp_path / "w.pth")
    backbone = build_backbone(TINY, 4)
    load_weights(backbone, tmp_path / "w.pth")
    weight = backbone.net.state_dict()["fc.weight"]
    assert weight.dtype == torch.float32
    torch.testing.assert_close(weight, content["fc.weight"].float())


def test_a_headless_checkpoint_keeps_the_models_head(tmp_path, source):
    torch.save({k: v for k, v in source.net.state_dict().items() if not k.startswith("fc.")}, tmp_path / "w.pth")
    backbone = build_backbone(TINY, 4)
    head = backbone.net.fc.weight.clone()
    assert "head fc is missing" in load_weights(backbone, tmp_path / "w.pth")[0]
    assert torch.equal(backbone.net.fc.weight, head)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (
            {"model": torch.nn.BatchNorm2d(2), "epoch": 1},
            r"'model' holds a whole pickled model .*\['model'\]\.state_dict",
        ),
        ({"arch": "resnet50", "state_dict": {"a.weight": torch.ones(2)}}, "calls its model 'resnet50'"),
        ({"args": argparse.Namespace(model="vit_b"), "m": {"a.weight": torch.ones(2)}}, "calls its model 'vit_b'"),
        ({"epoch": 3, "loss": 0.1}, "'epoch' is a int, wanted a tensor"),
        ({"state_dict": {}}, "'state_dict' is a dict, wanted a tensor"),
    ],
)
def test_what_cannot_be_the_model_is_refused_with_a_hint(tmp_path, source, content, told):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=told):
        load_weights(source, tmp_path / "w.pth")


def test_weights_of_another_known_model_are_told(tmp_path, source):
    other = build_backbone("ShuffleNetV2_x0.5", 7)
    torch.save(under("module.", other.net.state_dict()), tmp_path / "w.pth")
    with pytest.raises(UserError, match="they are weights of ShuffleNetV2_x0.5"):
        load_weights(source, tmp_path / "w.pth")


def test_nan_weights_change_nothing(tmp_path, source):
    content = {k: v.clone() for k, v in source.net.state_dict().items()}
    content["layer1.0.bn1.running_var"][1] = float("nan")
    torch.save(content, tmp_path / "w.pth")
    backbone = build_backbone(TINY, 4)
    before = {k: v.clone() for k, v in backbone.net.state_dict().items()}
    with pytest.raises(UserError, match=r"layer1\.0\.bn1\.running_var \(1 of 8\)"):
        load_weights(backbone, tmp_path / "w.pth")
    assert all(torch.equal(v, before[k]) for k, v in backbone.net.state_dict().items())
