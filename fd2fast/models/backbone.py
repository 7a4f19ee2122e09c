"""torchvision and timm CNNs behind one face: final feature map, logits of it, BN layers in registration order."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from fd2fast.errors import UserError, nearest
from fd2fast.models.matching import Candidate, check_values, choose, find, refuse
from fd2fast.models.sight import REFUSALS, USUAL, fitted, must_see, reason, refusal
from fd2fast.models.weights_file import Foreign, read_tensors

log = logging.getLogger("fd2fast")


class _Stock(NamedTuple):
    """How a torchvision module is cut in two: its weights, channels, head module, and the two halves of its forward."""

    builder: Callable[..., nn.Module]
    channels: int
    head: str
    features: Callable[[Any, Tensor], Tensor]
    logits: Callable[[Any, Tensor], Tensor]


def _resnet_features(net: Any, x: Tensor) -> Tensor:
    x = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    return net.layer4(net.layer3(net.layer2(net.layer1(x))))


def _resnet_logits(net: Any, features: Tensor) -> Tensor:
    return net.fc(torch.flatten(net.avgpool(features), 1))


def _densenet_features(net: Any, x: Tensor) -> Tensor:
    return F.relu(net.features(x), inplace=True)


def _densenet_logits(net: Any, features: Tensor) -> Tensor:
    return net.classifier(torch.flatten(F.adaptive_avg_pool2d(features, (1, 1)), 1))


def _mobilenet_features(net: Any, x: Tensor) -> Tensor:
    return net.features(x)


def _mobilenet_logits(net: Any, features: Tensor) -> Tensor:
    return net.classifier(torch.flatten(F.adaptive_avg_pool2d(features, (1, 1)), 1))


def _shufflenet_features(net: Any, x: Tensor) -> Tensor:
    x = net.maxpool(net.conv1(x))
    return net.conv5(net.stage4(net.stage3(net.stage2(x))))


def _shufflenet_logits(net: Any, features: Tensor) -> Tensor:
    return net.fc(features.mean([2, 3]))


_models = torchvision.models
STOCK: dict[str, _Stock] = {
    "ResNet18": _Stock(_models.resnet18, 512, "fc", _resnet_features, _resnet_logits),
    "ResNet50": _Stock(_models.resnet50, 2048, "fc", _resnet_features, _resnet_logits),
    "DenseNet121": _Stock(_models.densenet121, 1024, "classifier", _densenet_features, _densenet_logits),
    "MobileNetV2": _Stock(_models.mobilenet_v2, 1280, "classifier.1", _mobilenet_features, _mobilenet_logits),
    "ShuffleNetV2": _Stock(_models.shufflenet_v2_x1_0, 1024, "fc", _shufflenet_features, _shufflenet_logits),
    "ShuffleNetV2_x0.5": _Stock(_models.shufflenet_v2_x0_5, 1024, "fc", _shufflenet_features, _shufflenet_logits),
}
_BY_LOWER_NAME = {name.lower(): name for name in STOCK}


class Backbone(nn.Module):
    """A stock classifier cut at its final feature map. Made by `build_backbone`.

    `name` is the canonical name, `channels` C of the map, `classes` K, `net` the stock module (stock state-dict names),
    `head` the name of the last linear layer inside it.
    """

    def __init__(
        self,
        name: str,
        net: nn.Module,
        *,
        channels: int,
        classes: int,
        head: str,
        features: Callable[[Any, Tensor], Tensor],
        logits: Callable[[Any, Tensor], Tensor],
    ):
        super().__init__()
        self.name = name
        self.channels = channels
        self.classes = classes
        self.head = head
        self.net = net
        self._features = features
        self._logits = logits
        if not self.bn_layers():
            raise UserError(_without_batchnorm(name))

    def features(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> the final map [N, C, h, w] after its last activation."""
        return self._features(self.net, x)

    def logits(self, features: Tensor) -> Tensor:
        """[N, C, h, w] -> [N, K]; `logits(features(x))` is the stock module's forward."""
        return self._logits(self.net, features)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> logits [N, K]."""
        return self.logits(self.features(x))

    def bn_layers(self) -> list[tuple[str, nn.BatchNorm2d]]:
        """Every BatchNorm2d (subclasses too) with its stock name, in the registration order of the stock module."""
        return [(name, layer) for name, layer in self.net.named_modules() if isinstance(layer, nn.BatchNorm2d)]


def _without_batchnorm(name: str) -> str:
    return (
        f"model {name!r} has no BatchNorm2d layer, whose statistics the method matches: it works as a student, "
        "not as a teacher; choose another teacher"
    )


def build_backbone(name: str, classes: int, size: int | None = None) -> Backbone:
    """A randomly initialised backbone (global torch generator) with a head of `classes` outputs.

    `name`: ResNet18, ResNet50, DenseNet121, MobileNetV2, ShuffleNetV2 (x1.0), ShuffleNetV2_x0.5, whatever the case, or
    `timm:NAME[,key=value...]`, whose settings go to timm.create_model (numbers, True/False, text, 32x64 for a tuple).
    size: side of the images it is for, pixels; a timm model of fixed size is made for that size where its family can be.
    Raises UserError for an unknown name or setting, a model without BatchNorm2d, without a 4-d feature map, or which cannot
    see images of that size (torchvision's: see `must_see`).
    """
    if classes < 1:
        raise UserError(f"a backbone needs at least 1 class, got {classes}")
    if name.lower().startswith("timm:"):
        return _timm_backbone(name, classes, size)
    if name.lower().startswith("torchvision:"):
        raise UserError(f"{name} works as a student; a teacher is one of {', '.join(STOCK)} or timm:NAME")
    canonical = _BY_LOWER_NAME.get(name.lower())
    if canonical is None:
        raise UserError(f"unknown model {name!r}; {nearest(name, [*STOCK, 'timm:NAME'])}")
    stock = STOCK[canonical]
    net = stock.builder(weights=None, num_classes=classes)
    return Backbone(
        canonical,
        net,
        channels=stock.channels,
        classes=classes,
        head=stock.head,
        features=stock.features,
        logits=stock.logits,
    )


def native_size(name: str) -> int:
    """Side of the images that the model of this name was made for, pixels."""
    if name.lower().startswith("timm:"):
        known = timm.get_pretrained_cfg(parse_timm(name)[0])
        return int(known.input_size[-1]) if known else USUAL
    return 299 if "inception" in name.lower() else USUAL


def canonical_name(name: str) -> str:
    """The spelling used in manifests: the table's for torchvision nets, `timm:` + the rest as given otherwise."""
    if name.lower().startswith("timm:"):
        return "timm:" + name[5:].replace(" ", "")
    return _BY_LOWER_NAME.get(name.lower(), name)


def _value(text: str) -> Any:
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            continue
    if text in ("True", "False", "None"):
        return {"True": True, "False": False, "None": None}[text]
    if re.fullmatch(r"\d+(x\d+)+", text):
        return tuple(int(part) for part in text.split("x"))
    return text


def settings_of(name: str) -> tuple[str, dict[str, Any]]:
    """The architecture and the settings of `PREFIX:NAME[,key=value...]`; UserError for a setting that cannot be given."""
    architecture, *settings = (part.strip() for part in name.partition(":")[2].split(","))
    options: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key or not text:
            raise UserError(f"model {name!r}: wanted key=value after the comma, got {setting!r}")
        if key in ("pretrained", "num_classes", "checkpoint_path", "in_chans", "features_only", "weights"):
            raise UserError(f"model {name!r}: {key!r} is set by fd2fast and cannot be given here")
        options[key] = _value(text)
    return architecture, options


def parse_timm(name: str) -> tuple[str, dict[str, Any]]:
    """As `settings_of`; UserError, too, for an architecture that timm does not know."""
    architecture, options = settings_of(name)
    if not timm.is_model(architecture):
        raise UserError(f"unknown timm model {architecture!r}; {_nearest_timm(architecture)}")
    return architecture, options


def _nearest_timm(name: str) -> str:
    import difflib

    close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else "timm.list_models() lists them"


def timm_net(name: str, classes: int, *, pretrained: bool = False, **more: Any) -> nn.Module:
    """The stock module of `timm:NAME[,key=value...]`; more: further settings. UserError where timm cannot make it."""
    architecture, options = parse_timm(name)
    try:
        return timm.create_model(architecture, pretrained=pretrained, num_classes=classes, **options, **more)
    except REFUSALS as error:
        raise UserError(f"timm cannot build model {name!r}: {reason(error)}") from error


def timm_sizes(name: str) -> tuple[str, ...]:
    """timm's setting for the side of the images, unless the name gives it."""
    return () if "img_size" in settings_of(name)[1] else ("img_size",)


def _timm_backbone(name: str, classes: int, size: int | None) -> Backbone:
    net: Any = fitted(functools.partial(timm_net, name, classes), size, timm_sizes(name))
    if not any(isinstance(layer, nn.BatchNorm2d) for layer in net.modules()):
        raise UserError(_without_batchnorm(name))
    if not (hasattr(net, "forward_features") and hasattr(net, "forward_head")):
        raise UserError(
            f"model {name!r} has no forward_features/forward_head: it works as a student, not as a teacher; "
            "choose another timm CNN"
        )
    channels = _map_channels(name, net, size)
    classifier = net.get_classifier()
    heads = [key for key, module in net.named_modules() if module is classifier]
    return Backbone(
        canonical_name(name),
        net,
        channels=channels,
        classes=classes,
        head=heads[0] if heads else "",
        features=lambda net, x: net.forward_features(x),
        logits=lambda net, features: net.forward_head(features),
    )


class _Features(nn.Module):
    """The first half of a timm network as a network; `seen` is what it gave last."""

    def __init__(self, net: Any):
        super().__init__()
        self.net = net
        self.seen: Any = None

    def forward(self, x: Tensor) -> Any:
        self.seen = self.net.forward_features(x)
        return self.seen


def _map_channels(name: str, net: Any, size: int | None) -> int:
    """C of the final map, from a pass over a blank image; UserError unless it sees `size` and the map is [N, C, h, w].

    Without a size, one that it takes is looked for: only the channels are asked for.
    """
    known = net.default_cfg or {}
    native = int((known.get("input_size") or (3, USUAL, USUAL))[-1])
    half = _Features(net)
    if size is not None:
        must_see(name, net, size, native=native)
        refusal(half, size)
    else:
        refused = None
        for side in (native,) if known.get("fixed_input_size") else (64, native):
            if (refused := refusal(half, side)) is None:
                break
        if refused is not None:
            raise UserError(f"model {name!r} cannot see a {native} x {native} image: {refused}")
    features = half.seen
    if not isinstance(features, Tensor) or features.ndim != 4 or features.shape[1] != net.num_features:
        shape = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        raise UserError(
            f"teacher {name!r} must give a feature map [N, C, h, w], got {shape}: it may work as a student; "
            "choose a CNN as the teacher"
        )
    return int(features.shape[1])


def load_weights(backbone: Backbone, source: str | Path, *, allow_new_head: bool = True) -> list[str]:
    """Load weights of the stock module into `backbone`; returns notices (also logged).

    `source` is a .safetensors or torch file, read without executing anything in it, or "hub": ImageNet weights fetched by
    name. The state dict may lie at any depth of the file, its names behind any prefix (Lightning, DataParallel, FSDP,
    torch.compile); of an EMA copy and others the EMA copy is taken, as timm does, with a notice. With `allow_new_head` a head
    of another class count, or none, leaves the model's as initialised, with a notice; every other mismatch is a UserError that
    names the first keys, and so are several sets that fit, quantised weights, NaN and infinite values.
    """
    content = _hub_state(backbone) if str(source) == "hub" else read_tensors(Path(source))
    return load_state(backbone, content, origin=f"weights {source}", allow_new_head=allow_new_head)


_OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")


def load_state(
    backbone: Backbone, content: Mapping[str, Any], *, origin: str, allow_new_head: bool = True
) -> list[str]:
    """Load the state dict that `content` holds (stock names, also DenseNet's old ones); see `load_weights`."""
    net = backbone.net
    own = net.state_dict()
    head = [f"{backbone.head}.{part}" for part in ("weight", "bias")] if backbone.head else []
    candidates = _candidates(content, {key: value.shape for key, value in own.items()}, head, allow_new_head)
    if not candidates or not candidates[0].fits:
        hint = _made_for(content, backbone.name)
        raise refuse(content, candidates, origin=origin, model=backbone.name, hint=hint)
    chosen, notices = choose(candidates, origin=origin)
    state = chosen.tensors
    if chosen.head:
        given = tuple(state[head[0]].shape) if head[0] in state else "missing"
        wanted = tuple(own[head[0]].shape)
        notices.append(
            f"head {backbone.head} is {given} in the weights, this model needs {wanted}: it starts untrained"
        )
        state = {key: value for key, value in state.items() if key not in head}
    check_values(state, origin=origin)
    try:
        net.load_state_dict(state, strict=False)
    except RuntimeError as error:  # a tensor of right shape that cannot be copied: sparse, without data
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{origin} cannot be loaded into {backbone.name}: {reason}") from error
    for notice in notices:
        log.warning("%s: %s", origin, notice)
    return notices


def hub_name(name: str) -> str:
    """Name of the ImageNet weights that "hub" stands for: torchvision's file (its hash in it), or timm's model and tag."""
    canonical = canonical_name(name)
    if canonical in STOCK:
        weights = torchvision.models.get_model_weights(STOCK[canonical].builder)
        return weights["IMAGENET1K_V1"].url.rsplit("/", 1)[-1]
    architecture = canonical.removeprefix("timm:").split(",")[0]
    known = timm.get_pretrained_cfg(architecture) if timm.is_model(architecture) else None
    return f"timm/{architecture if known is None or not known.tag else f'{known.architecture}.{known.tag}'}"


def _candidates(
    content: Mapping[str, Any], shapes: Mapping[str, torch.Size], head: Sequence[str], new_head: bool
) -> list[Candidate]:
    return find(content, shapes, head, new_head=new_head, rename=lambda key: _OLD_DENSENET.sub(r"\1\2", key))


@functools.cache
def _stock_shapes(name: str) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {key: value.shape for key, value in STOCK[name].builder(weights=None).state_dict().items()}


def _made_for(content: Mapping[str, Any], model: str) -> str:
    """Which model the weights are of, if their names and shapes or an entry of the file tell; else empty."""
    for name, stock in STOCK.items():
        head = [f"{stock.head}.{part}" for part in ("weight", "bias")]
        if name != model and any(one.fits for one in _candidates(content, _stock_shapes(name), head, True)[:1]):
            return f"they are weights of {name}"
    settings: list[Mapping[str, Any]] = [content]
    settings += [v.state for v in content.values() if isinstance(v, Foreign) and isinstance(v.state, dict)]
    settings += [v for v in content.values() if isinstance(v, dict)]
    for entries in settings:
        for key in ("arch", "architecture", "model_name", "model"):
            if isinstance(told := entries.get(key), str) and told != model:
                return f"the file calls its model {told[:60]!r}"
    return ""


def _hub_state(backbone: Backbone) -> dict[str, Tensor]:
    try:
        if backbone.name.startswith("timm:"):
            # the checkpoint's own class count: timm would drop the head of another one without a word
            architecture, _ = parse_timm(backbone.name)
            known = timm.get_pretrained_cfg(architecture)
            return timm_net(backbone.name, known.num_classes if known else 1000, pretrained=True).state_dict()
        weights = torchvision.models.get_model_weights(STOCK[backbone.name].builder)
        return dict(weights["IMAGENET1K_V1"].get_state_dict(progress=False, check_hash=True))
    except UserError:
        raise
    except Exception as error:  # urllib, huggingface_hub and requests each raise their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"ImageNet weights of {backbone.name} cannot be fetched from the hub ({reason}); "
            "give a local .pth or .safetensors file instead"
        ) from error
