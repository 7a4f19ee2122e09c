"""Backbones of the published code: torchvision's, and the small-image ones whose stem keeps the side of the image.

The small ones are the usual CIFAR variants; their state-dict names, and the order in which their layers are made (on which
the random numbers of their initial weights depend), are those of the published pools. What the published code takes as their
final map is the one before the last activation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from fd2fast.errors import UserError, nearest
from fd2fast.models.backbone import STOCK, Backbone

# Names on the command lines and in the pools.
NAMES = (
    "ResNet18",
    "ResNet50",
    "ResNet101",
    "Densenet121",
    "Densenet161",
    "Densenet169",
    "Densenet201",
    "MobileNetV2",
    "ShuffleNetV2",
)
SMALL, STOCKED = "CVDD", "torchvision"


def _conv(inputs: int, outputs: int, side: int, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, side, stride=stride, padding=side // 2, groups=groups, bias=False)


def _pooled(features: Tensor) -> Tensor:
    return torch.flatten(F.adaptive_avg_pool2d(F.relu(features), (1, 1)), 1)


class _Residual(nn.Module):
    """Two 3x3 convolutions, or 1x1, 3x3, 1x1 of four times the channels; `before` is its sum before the activation."""

    def __init__(self, inputs: int, width: int, stride: int, *, deep: bool):
        super().__init__()
        self.deep = deep
        outputs = 4 * width if deep else width
        if deep:
            shapes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        else:
            shapes = [(inputs, width, 3, stride), (width, width, 3, 1)]
        for number, (before, after, side, step) in enumerate(shapes, 1):
            self.add_module(f"conv{number}", _conv(before, after, side, stride=step))
            self.add_module(f"bn{number}", nn.BatchNorm2d(after))
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(_conv(inputs, outputs, 1, stride=stride), nn.BatchNorm2d(outputs))

    def before(self, x: Tensor) -> Tensor:
        own: Any = self
        y = F.relu(own.bn1(own.conv1(x)))
        y = own.bn2(own.conv2(y))
        if self.deep:
            y = own.bn3(own.conv3(F.relu(y)))
        return y + self.shortcut(x)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.before(x))


class SmallResNet(nn.Module):
    """3x3 stem without pooling, four stages of strides 1, 2, 2, 2."""

    def __init__(self, blocks: Sequence[int], classes: int, *, deep: bool):
        super().__init__()
        self.conv1 = _conv(3, 64, 3)
        self.bn1 = nn.BatchNorm2d(64)
        channels = 64
        for stage, count in enumerate(blocks):
            width = 64 << stage
            layers = []
            for position in range(count):
                stride = 2 if stage and not position else 1
                layers.append(_Residual(channels, width, stride, deep=deep))
                channels = 4 * width if deep else width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.linear = nn.Linear(channels, classes)

    def features(self, x: Tensor) -> Tensor:
        own: Any = self
        x = own.layer3(own.layer2(own.layer1(F.relu(self.bn1(self.conv1(x))))))
        blocks = list(own.layer4)
        for block in blocks[:-1]:
            x = block(x)
        return blocks[-1].before(x)


class _Dense(nn.Module):
    def __init__(self, inputs: int, growth: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = _conv(inputs, 4 * growth, 1)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = _conv(4 * growth, growth, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.bn1(x)))
        return torch.cat([self.conv2(F.relu(self.bn2(y))), x], 1)


class _Transition(nn.Module):
    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.bn = nn.BatchNorm2d(inputs)
        self.conv = _conv(inputs, outputs, 1)
        self.halved = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.halved(self.conv(F.relu(self.bn(x))))


class SmallDenseNet(nn.Module):
    """3x3 stem, four dense stages with halving transitions between."""

    def __init__(self, blocks: Sequence[int], growth: int, classes: int):
        super().__init__()
        channels = 2 * growth
        self.conv1 = _conv(3, channels, 3)
        for stage, count in enumerate(blocks, 1):
            layers = [_Dense(channels + position * growth, growth) for position in range(count)]
            self.add_module(f"dense{stage}", nn.Sequential(*layers))
            channels += count * growth
            if stage < len(blocks):
                self.add_module(f"trans{stage}", _Transition(channels, channels // 2))
                channels //= 2
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, classes)

    def features(self, x: Tensor) -> Tensor:
        own: Any = self
        x = self.conv1(x)
        for stage in (1, 2, 3):
            x = getattr(own, f"trans{stage}")(getattr(own, f"dense{stage}")(x))
        return self.bn(own.dense4(x))


class _Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int):
        super().__init__()
        self.stride, width = stride, expansion * inputs
        self.conv1 = _conv(inputs, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride=stride, groups=width)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, outputs, 1)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride == 1 and inputs != outputs:
            self.shortcut = nn.Sequential(_conv(inputs, outputs, 1), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return y + self.shortcut(x) if self.stride == 1 else y


class SmallMobileNet(nn.Module):
    """MobileNetV2 with ReLU for ReLU6, a shortcut wherever the stride is 1, and two of its strides taken out."""

    # expansion, channels, blocks, stride
    STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, classes: int):
        super().__init__()
        self.conv1 = _conv(3, 32, 3)
        self.bn1 = nn.BatchNorm2d(32)
        channels, layers = 32, []
        for expansion, outputs, count, stride in self.STAGES:
            for position in range(count):
                layers.append(_Inverted(channels, outputs, expansion, 1 if position else stride))
                channels = outputs
        self.layers = nn.Sequential(*layers)
        self.conv2 = _conv(320, 1280, 1)
        self.bn2 = nn.BatchNorm2d(1280)
        self.linear = nn.Linear(1280, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.layers(F.relu(self.bn1(self.conv1(x))))))


def _shuffled(x: Tensor) -> Tensor:
    count, channels, height, width = x.shape
    return x.view(count, 2, channels // 2, height, width).transpose(1, 2).reshape(count, channels, height, width)


class _Shuffle(nn.Module):
    """Keeps half of the channels, changes the other half."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.conv1 = _conv(half, half, 1)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = _conv(half, half, 3, groups=half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = _conv(half, half, 1)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        kept, y = x.chunk(2, dim=1)
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(y)))))
        return _shuffled(torch.cat([kept, F.relu(self.bn3(self.conv3(y)))], 1))


class _ShuffleDown(nn.Module):
    """Halves the side: two branches over all channels."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        half = outputs // 2
        self.conv1 = _conv(inputs, inputs, 3, stride=2, groups=inputs)
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv2 = _conv(inputs, half, 1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = _conv(inputs, half, 1)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = _conv(half, half, 3, stride=2, groups=half)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = _conv(half, half, 1)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = F.relu(self.bn2(self.conv2(self.bn1(self.conv1(x)))))
        right = self.bn4(self.conv4(F.relu(self.bn3(self.conv3(x)))))
        return _shuffled(torch.cat([left, F.relu(self.bn5(self.conv5(right)))], 1))


class SmallShuffleNet(nn.Module):
    """ShuffleNetV2 x0.5 with a 3x3 stem of stride 1 and no pooling; one block more a stage than the usual one."""

    def __init__(self, classes: int):
        super().__init__()
        self.conv1 = _conv(3, 24, 3)
        self.bn1 = nn.BatchNorm2d(24)
        channels = 24
        for stage, (outputs, count) in enumerate(((48, 3), (96, 7), (192, 3)), 1):
            layers = [_ShuffleDown(channels, outputs), *(_Shuffle(outputs) for _ in range(count))]
            self.add_module(f"layer{stage}", nn.Sequential(*layers))
            channels = outputs
        self.conv2 = _conv(192, 1024, 1)
        self.bn2 = nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, classes)

    def features(self, x: Tensor) -> Tensor:
        own: Any = self
        x = own.layer3(own.layer2(own.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.bn2(self.conv2(x))


_SMALL: dict[str, Callable[[int], nn.Module]] = {
    "ResNet18": lambda classes: SmallResNet((2, 2, 2, 2), classes, deep=False),
    "ResNet50": lambda classes: SmallResNet((3, 4, 6, 3), classes, deep=True),
    "ResNet101": lambda classes: SmallResNet((3, 4, 23, 3), classes, deep=True),
    "Densenet121": lambda classes: SmallDenseNet((6, 12, 24, 16), 32, classes),
    "Densenet161": lambda classes: SmallDenseNet((6, 12, 36, 24), 48, classes),
    "Densenet169": lambda classes: SmallDenseNet((6, 12, 32, 32), 32, classes),
    "Densenet201": lambda classes: SmallDenseNet((6, 12, 48, 32), 32, classes),
    "MobileNetV2": SmallMobileNet,
    "ShuffleNetV2": SmallShuffleNet,
}


class Stocked(NamedTuple):
    """A torchvision network: its builder, the stock one that it is cut in two like, its channels C."""

    builder: Callable[..., nn.Module]
    like: str
    channels: int


_models = torchvision.models
_STOCKED: dict[str, Stocked] = {
    "ResNet18": Stocked(_models.resnet18, "ResNet18", 512),
    "ResNet50": Stocked(_models.resnet50, "ResNet50", 2048),
    "ResNet101": Stocked(_models.resnet101, "ResNet50", 2048),
    "Densenet121": Stocked(_models.densenet121, "DenseNet121", 1024),
    "Densenet161": Stocked(_models.densenet161, "DenseNet121", 2208),
    "Densenet169": Stocked(_models.densenet169, "DenseNet121", 1664),
    "Densenet201": Stocked(_models.densenet201, "DenseNet121", 1920),
    "MobileNetV2": Stocked(_models.mobilenet_v2, "MobileNetV2", 1280),
    "ShuffleNetV2": Stocked(_models.shufflenet_v2_x1_0, "ShuffleNetV2", 1024),
    "EfficientNet": Stocked(_models.efficientnet_b0, "MobileNetV2", 1280),
}


def stocked(name: str, *, half_shuffle: bool) -> Stocked:
    """torchvision's network of this name; half_shuffle: ShuffleNetV2 is the x0.5 one. UserError for an unknown name."""
    if name == "AlexNet":
        raise UserError(
            "AlexNet has no BatchNorm2d layer, whose statistics recovery matches: leave it out of the teachers"
        )
    if name not in _STOCKED:
        raise UserError(f"model {name!r} is not one of the published code's; {nearest(name, NAMES)}")
    if name == "ShuffleNetV2" and half_shuffle:
        return Stocked(_models.shufflenet_v2_x0_5, name, 1024)
    return _STOCKED[name]


def small_backbone(name: str, classes: int) -> Backbone:
    """The small-image network of this name, initialised by the global generator; UserError for a name that has none."""
    if name not in _SMALL:
        raise UserError(f"model {name!r} has no small-image network; {nearest(name, _SMALL)}")
    net = _SMALL[name](classes)
    channels = int(net.linear.in_features)  # type: ignore[arg-type,union-attr]
    return Backbone(
        f"{SMALL} {name}",
        net,
        channels=channels,
        classes=classes,
        head="linear",
        features=lambda net, x: net.features(x),
        logits=lambda net, features: net.linear(_pooled(features)),
    )


def stock_backbone(name: str, classes: int, *, half_shuffle: bool, new_head: bool = True) -> Backbone:
    """torchvision's network, initialised by the global generator.

    new_head: made with 1000 outputs whose layer is then replaced, as the published code does; else with its own `classes`
    outputs (which are the same draws where there are 1000).
    """
    chosen = stocked(name, half_shuffle=half_shuffle)
    like = STOCK[chosen.like]
    if new_head:
        net = chosen.builder(weights=None)
        parent, _, last = like.head.rpartition(".")
        holder: Any = net.get_submodule(parent)
        linear = nn.Linear(net.get_submodule(like.head).in_features, classes)  # type: ignore[arg-type]
        if last.isdigit():
            holder[int(last)] = linear
        else:
            setattr(holder, last, linear)
    else:
        net = chosen.builder(weights=None, num_classes=classes)
    return Backbone(
        name,
        net,
        channels=chosen.channels,
        classes=classes,
        head=like.head,
        features=like.features,
        logits=like.logits,
    )
