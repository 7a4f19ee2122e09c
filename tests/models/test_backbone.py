"""Backbones: the two halves equal the stock forward, BN layers in order, weights from files."""

import logging
import pickle

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from fd2fast.errors import UserError
from fd2fast.models.backbone import STOCK, build_backbone, load_weights

FIVE = ("ResNet18", "ResNet50", "DenseNet121", "MobileNetV2", "ShuffleNetV2")
TIMM = ("timm:resnet10t,output_stride=16", "timm:test_efficientnet", "timm:mobilenetv3_small_050")


def images(n=2, side=64):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [*FIVE, *TIMM])
@pytest.mark.parametrize("training", [False, True])
def test_halves_equal_the_stock_forward(name, training):
    backbone = build_backbone(name, 5).train(training)
    torch.manual_seed(1)  # MobileNets drop out in training
    features = backbone.features(images())
    logits = backbone.logits(features.clone())
    again = build_backbone(name, 5).train(training)
    again.load_state_dict(backbone.state_dict())
    if training:  # the first pass moved the running statistics; they do not enter a train-mode forward
        torch.manual_seed(1)
    assert torch.equal(again.net(images()), logits)
    assert features.shape[:2] == (2, backbone.channels)
    assert logits.shape == (2, 5)
    assert torch.equal(backbone.eval()(images()), backbone.net.eval()(images()))


@pytest.mark.parametrize("name", FIVE)
def test_features_are_the_final_post_relu_map(name):
    """Against the modules the reference hooks, followed by what the stock forward does to them."""
    backbone = build_backbone(name, 5).eval()
    hooked = {
        "ResNet18": "layer4",
        "ResNet50": "layer4",
        "DenseNet121": "features",
        "MobileNetV2": "features",
        "ShuffleNetV2": "conv5",
    }[name]
    seen = {}
    handle = backbone.net.get_submodule(hooked).register_forward_hook(lambda m, i, o: seen.update(out=o))
    backbone.net(images())
    handle.remove()
    features = backbone.features(images())
    assert torch.equal(features, F.relu(seen["out"]))
    assert features.min() == 0


@pytest.mark.parametrize("name", [*FIVE, *TIMM])
def test_bn_layers_are_in_registration_order_and_their_inputs_stay_valid(name):
    backbone = build_backbone(name, 5).eval()
    layers = backbone.bn_layers()
    stock = [m for m in backbone.net.modules() if isinstance(m, nn.BatchNorm2d)]
    assert [layer for _, layer in layers] == stock
    assert all(backbone.net.get_submodule(n) is layer for n, layer in layers)
    kept, copies = {}, {}
    handles = [
        layer.register_forward_pre_hook(
            lambda m, args, n=n: (kept.update({n: args[0]}), copies.update({n: args[0].detach().clone()})) and None
        )
        for n, layer in layers
    ]
    x = images().requires_grad_()
    backbone(x)
    for handle in handles:
        handle.remove()
    assert len(kept) == len(layers)
    for n in kept:
        assert torch.equal(kept[n], copies[n]), f"the input of {n} was overwritten after its hook"
    sum(t.square().mean() for t in kept.values()).backward()
    assert torch.isfinite(x.grad).all()


def test_the_reference_counts_and_ends():
    expected = {
        "ResNet18": (20, "bn1", "layer4.1.bn2"),
        "ResNet50": (53, "bn1", "layer4.2.bn3"),
        "DenseNet121": (121, "features.norm0", "features.norm5"),
        "MobileNetV2": (52, "features.0.1", "features.18.1"),
        "ShuffleNetV2": (56, "conv1.1", "conv5.1"),
    }
    for name, (count, first, last) in expected.items():
        layers = build_backbone(name.upper(), 3).bn_layers()
        assert (len(layers), layers[0][0], layers[-1][0]) == (count, first, last)


def test_timm_settings_reach_the_model():
    assert build_backbone("timm:resnet10t", 3).features(images()).shape[-1] == 2
    assert build_backbone("timm:resnet10t,output_stride=16", 3).features(images()).shape[-1] == 4
    wide = build_backbone("timm:resnet10t,channels=16x32x48x64,replace_stem_pool=True", 3)
    assert wide.channels == 64
    assert wide(images()).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ResNet81", "ResNet18"),
        ("timm:resnet10x", "resnet10t"),
        ("timm:resnet10t,output_stride", "key=value"),
        ("timm:resnet10t,pretrained=True", "pretrained"),
        ("timm:resnet10t,no_such_setting=1", "no_such_setting"),
        ("timm:test_convnext", "BatchNorm2d"),
        ("timm:test_vit", "BatchNorm2d"),
        ("timm:levit_128s", r"feature map \[N, C, h, w\]"),
        ("timm:hf-hub:someone/model", "unknown timm model"),
    ],
)
def test_unusable_names_are_refused(name, told):
    with pytest.raises(UserError, match=told):
        build_backbone(name, 3)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("name", ["ResNet18", "timm:resnet10t"])
def test_weights_of_a_file_are_loaded(tmp_path, name, suffix):
    source = build_backbone(name, 4)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": source.net.state_dict(), "epoch": 3}, path)
    else:
        save_file(source.net.state_dict(), path)
    backbone = build_backbone(name, 4)
    assert load_weights(backbone, path) == []
    assert torch.equal(backbone.eval()(images()), source.eval()(images()))


def test_another_class_count_gets_a_new_head_with_a_notice(tmp_path, caplog):
    source, path = build_backbone("ShuffleNetV2", 7), tmp_path / "weights.pth"
    torch.save(source.net.state_dict(), path)
    backbone = build_backbone("ShuffleNetV2", 4)
    head = backbone.net.fc.weight.clone()
    with caplog.at_level(logging.WARNING, logger="fd2fast"):
        notices = load_weights(backbone, path)
    assert len(notices) == 1
    assert "(7, 1024)" in caplog.text
    assert torch.equal(backbone.net.fc.weight, head)
    assert torch.equal(backbone.eval().features(images()), source.eval().features(images()))
    with pytest.raises(UserError, match=r"fc.weight \(7, 1024\) for \(4, 1024\)"):
        load_weights(build_backbone("ShuffleNetV2", 4), path, allow_new_head=False)


def test_old_densenet_names_and_a_missing_counter_are_understood(tmp_path):
    source, path = build_backbone("DenseNet121", 3), tmp_path / "weights.pth"
    old = {}
    for key, value in source.net.state_dict().items():
        if "num_batches_tracked" in key:
            continue
        for kind in ("norm", "conv"):
            for number in "12":
                key = key.replace(f".{kind}{number}.", f".{kind}.{number}.") if "denselayer" in key else key
        old[key] = value
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    torch.save(old, path)
    backbone = build_backbone("DenseNet121", 3)
    load_weights(backbone, path)
    assert torch.equal(backbone.eval()(images()), source.eval()(images()))


def test_weights_of_another_model_name_the_first_keys(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(build_backbone("MobileNetV2", 3).net.state_dict(), path)
    with pytest.raises(
        UserError, match=r"missing: conv1.weight, bn1.weight, bn1.bias and \d+ more; unexpected: features"
    ):
        load_weights(build_backbone("ResNet18", 3), path)


class Malicious:
    """A pickle that would write a file when it is executed."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path):
    backbone, target = build_backbone("ResNet18", 3), tmp_path / "executed"
    for name, write in (("a.pth", torch.save), ("b.pth", lambda v, p: p.write_bytes(pickle.dumps(v)))):
        write({"conv1.weight": Malicious(target)}, tmp_path / name)
        with pytest.raises(UserError, match="cannot be read as tensors only"):
            load_weights(backbone, tmp_path / name)
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (b"hello", "is a text"),
        ([torch.zeros(1)], "holds a list"),
        ({"conv1.weight": 3}, "'conv1.weight' is a int"),
        ({}, "no tensors"),
    ],
)
def test_files_that_are_no_weights_are_named(tmp_path, content, told):
    for suffix in (".pth", ".safetensors") if isinstance(content, bytes) else (".pth",):
        path = tmp_path / f"weights{suffix}"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(UserError, match=told) as error:
            load_weights(build_backbone("ResNet18", 3), path)
        assert str(path) in str(error.value)
    with pytest.raises(UserError, match="no such file"):
        load_weights(build_backbone("ResNet18", 3), tmp_path / "none.pth")


def test_hub_without_a_network_is_a_clear_error(monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_network)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", no_network)
    with pytest.raises(UserError, match="ResNet18 cannot be fetched.*Network is unreachable.*local"):
        load_weights(build_backbone("ResNet18", 3), "hub")
    monkeypatch.setattr(timm, "create_model", no_network)
    backbone = build_backbone("ResNet18", 3)
    backbone.name = "timm:resnet10t"
    with pytest.raises(UserError, match="resnet10t cannot be fetched"):
        load_weights(backbone, "hub")


def test_every_stock_name_builds():
    for name in STOCK:
        assert build_backbone(name.lower(), 3).name == name
