"""The published code's networks: state-dict names, first and last BN, the map that attention is taken of, fused and plain."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fd2fast import ops
from fd2fast.dropin.networks import NAMES, SMALL, STOCKED, small_backbone, stock_backbone, stocked
from fd2fast.dropin.pool import Loaded, Member, consume_initial_weights, load_pooled
from fd2fast.errors import UserError
from fd2fast.models.attention_head import AttentionHead
from fd2fast.models.fused import fuse
from fd2fast.models.released_checkpoints import CENTERS, HEAD

# Channels of the last map, BN layers, first and last of them, some tensors and their shapes.
SMALL_ONES = {
    "ResNet18": (512, 20, "bn1", "layer4.1.bn2", {"layer2.0.shortcut.0.weight": (128, 64, 1, 1), "linear.bias": (7,)}),
    "ResNet50": (2048, 53, "bn1", "layer4.2.bn3", {"layer1.0.shortcut.1.running_var": (256,)}),
    "ResNet101": (2048, 104, "bn1", "layer4.2.bn3", {"layer3.22.conv2.weight": (256, 256, 3, 3)}),
    "Densenet121": (1024, 120, "dense1.0.bn1", "bn", {"trans3.conv.weight": (512, 1024, 1, 1)}),
    "Densenet161": (2208, 160, "dense1.0.bn1", "bn", {"conv1.weight": (96, 3, 3, 3)}),
    "Densenet169": (1664, 168, "dense1.0.bn1", "bn", {"dense4.31.conv2.weight": (32, 128, 3, 3)}),
    "Densenet201": (1920, 200, "dense1.0.bn1", "bn", {"dense3.47.conv1.weight": (128, 1760, 1, 1)}),
    "MobileNetV2": (1280, 57, "bn1", "bn2", {"layers.1.shortcut.0.weight": (24, 16, 1, 1)}),
    "ShuffleNetV2": (1024, 56, "bn1", "bn2", {"layer2.7.conv3.weight": (48, 48, 1, 1), "linear.weight": (7, 1024)}),
}
STOCK_ONES = {
    "ResNet101": (2048, 104, "fc"),
    "Densenet161": (2208, 161, "classifier"),
    "Densenet169": (1664, 169, "classifier"),
    "Densenet201": (1920, 201, "classifier"),
}


def test_every_name_has_both_networks() -> None:
    assert set(NAMES) == set(SMALL_ONES)
    assert all(stocked(name, half_shuffle=True).channels for name in NAMES)


@pytest.mark.parametrize("name", SMALL_ONES)
def test_small_networks(name: str) -> None:
    channels, layers, first, last, shapes = SMALL_ONES[name]
    with torch.device("meta"):
        made = small_backbone(name, 7)
    names = [layer for layer, _ in made.bn_layers()]
    assert (made.channels, len(names), names[0], names[-1]) == (channels, layers, first, last)
    state = made.net.state_dict()
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


@pytest.mark.parametrize("name", STOCK_ONES)
def test_further_networks_of_torchvision(name: str) -> None:
    channels, layers, head = STOCK_ONES[name]
    with torch.device("meta"):
        made = stock_backbone(name, 7, half_shuffle=True)
    assert (made.channels, len(made.bn_layers()), made.head) == (channels, layers, head)
    assert made.net.state_dict()[f"{head}.weight"].shape == (7, channels)


def settled(network: nn.Module) -> nn.Module:
    """In eval mode, with the statistics of some random images."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
    network.train()
    with torch.no_grad():
        network(torch.randn(8, 3, 32, 32))
    return network.eval()


@pytest.mark.parametrize("name", ["ResNet18", "ResNet50", "Densenet121", "MobileNetV2", "ShuffleNetV2"])
def test_small_networks_are_fused(name: str) -> None:
    """Outputs and gradients in fp64; the map that attention is taken of is the one before the last activation."""
    from fd2fast.models.teacher import Teacher

    backbone = settled(small_backbone(name, 5))
    teacher = Teacher(backbone, 3, alpha=0.5, size=32).double().eval().requires_grad_(False)  # type: ignore[arg-type]
    fused = fuse(teacher)
    assert not fused.fallbacks
    images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    results = []
    for run in (lambda x: teacher(x), lambda x: fused(x, (0, 3))[0]):
        leaf = images.clone().requires_grad_()
        out = run(leaf)
        (out.logits.sum() + out.attention.square().sum() + out.features.square().sum()).backward()
        assert leaf.grad is not None
        results.append((out.features.detach(), out.logits.detach(), leaf.grad))
    for plain, fast in zip(*results, strict=True):
        assert float((plain - fast).norm() / plain.norm()) < 1e-10
    features, logits, _ = results[0]
    assert float(features.min()) < 0
    linear = teacher.backbone.net.linear
    pooled = F.relu(features).mean(dim=(2, 3))
    torch.testing.assert_close(F.linear(pooled, linear.weight, linear.bias), logits)  # type: ignore[union-attr,arg-type]


def saved(folder: Path, name: str, source: str, *, maps: int = 3, alpha: float = 0.3, classes: int = 5) -> Member:
    """A teacher's file in a pool."""
    backbone = small_backbone(name, classes) if source == SMALL else stock_backbone(name, classes, half_shuffle=True)
    head = AttentionHead(backbone.channels, classes, maps)
    member = Member(name, maps, alpha)
    centers = torch.rand(classes, maps * backbone.channels)
    torch.save({name: backbone.net.state_dict(), HEAD: head.state_dict(), CENTERS: centers}, folder / member.file)
    return member


@pytest.mark.parametrize(("name", "source"), [("ShuffleNetV2", SMALL), ("ShuffleNetV2", STOCKED), ("ResNet18", SMALL)])
def test_the_weights_tell_the_architecture(tmp_path: Path, name: str, source: str) -> None:
    member = saved(tmp_path, name, source)
    assert member.file == f"{name}_M3_3e-1cal.pth"
    found = load_pooled(member, tmp_path, classes=5, size=32)
    assert found.source == source
    content = torch.load(tmp_path / member.file, weights_only=True)
    for key, value in found.teacher.backbone.net.state_dict().items():
        assert torch.equal(value, content[name][key]), key
    assert torch.equal(found.teacher.prototypes_last, content[CENTERS])
    assert found.teacher.alpha == 0.3
    assert not any(layer.training for layer in found.teacher.modules())


def test_plain_weights(tmp_path: Path) -> None:
    torch.save(small_backbone("ShuffleNetV2", 4).net.state_dict(), tmp_path / "ShuffleNetV2.pth")
    found = load_pooled(Member("ShuffleNetV2"), tmp_path, classes=4, size=32)
    assert isinstance(found, Loaded)
    assert (found.source, found.teacher.alpha) == (SMALL, 0.0)
    with pytest.raises(UserError, match="linear.weight is \\[4, 1024\\], wanted \\[9, 1024\\]"):
        load_pooled(Member("ShuffleNetV2"), tmp_path, classes=9, size=32)


def test_loading_leaves_the_generator(tmp_path: Path) -> None:
    member = saved(tmp_path, "ShuffleNetV2", STOCKED)
    torch.manual_seed(1)
    before = torch.rand(3)
    torch.manual_seed(1)
    backbone_draws = load_pooled(member, tmp_path, classes=5, size=32)
    assert backbone_draws.source == STOCKED
    torch.manual_seed(1)
    consume_initial_weights(member, STOCKED, classes=5)
    assert not torch.equal(torch.rand(3), before)


def test_networks_without_statistics_are_named() -> None:
    with pytest.raises(UserError, match="AlexNet has no BatchNorm2d"):
        stocked("AlexNet", half_shuffle=False)
    with pytest.raises(UserError, match="Densenet121"):
        stocked("DenseNet121", half_shuffle=False)


def test_matching_of_small_networks_counts_every_layer() -> None:
    from fd2fast.models.teacher import Teacher

    backbone = settled(small_backbone("ShuffleNetV2", 5))
    teacher = Teacher(backbone, 2, alpha=0.0, size=32).double().eval().requires_grad_(False)  # type: ignore[arg-type]
    images = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    wanted = torch.zeros(2, dtype=torch.float64)

    def measured(index: int, layer: nn.BatchNorm2d, x: torch.Tensor) -> None:
        loss = ops.bn_matching(x, layer.running_mean, layer.running_var, (0, 1, 4))  # type: ignore[arg-type]
        wanted.add_(loss * (10 if index == 0 else 1))

    fused = fuse(teacher)
    for index, (_, layer) in enumerate(teacher.backbone.bn_layers()):
        layer.register_forward_pre_hook(lambda module, inputs, index=index: measured(index, module, inputs[0]))
    logits = teacher.backbone(images)
    found, losses = fused.backbone_logits(images, (0, 1, 4), first_bn_multiplier=10.0)
    torch.testing.assert_close(found, logits)
    torch.testing.assert_close(losses, wanted)
