"""Students' networks: any torchvision or timm classifier, made for images of one size, whose forward gives logits."""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from fd2fast.errors import UserError, nearest
from fd2fast.models.backbone import build_backbone, canonical_name, native_size, settings_of, timm_net, timm_sizes
from fd2fast.models.sight import first_tensor, fitted, must_see, reason

_PREFIX = "torchvision:"
# torchvision's nets with a second head for training: without it.
_WITHOUT_AUXILIARY = {"aux_logits": False, "init_weights": True}


class Classifier(nn.Module):
    """A stock classifier `net` (stock state-dict names below "net.") of `classes` outputs. Made by `build_classifier`."""

    def __init__(self, name: str, net: nn.Module, classes: int):
        super().__init__()
        self.name = name
        self.classes = classes
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, S, S] -> logits [N, K]; of several outputs the first."""
        logits = first_tensor(self.net(x))
        if logits is None or logits.shape != (len(x), self.classes):
            given = "no tensor" if logits is None else list(logits.shape)
            raise ValueError(f"{self.name} gives {given}, wanted logits [{len(x)}, {self.classes}]")
        return logits


def build_classifier(name: str, classes: int, size: int) -> nn.Module:
    """A randomly initialised classifier (global torch generator) with `classes` outputs for images of size x size.

    `name`: as for `build_backbone`, or `torchvision:NAME[,key=value...]` for torchvision.models.get_model; none needs
    BatchNorm or feature maps. A network of fixed size is made for `size` where its family has a setting for that.
    Raises UserError for an unknown name or setting. Whether it sees the images is said by `check_classifier`.
    """
    lower = name.lower()
    if lower.startswith("timm:"):
        net = fitted(functools.partial(timm_net, name, classes), size, timm_sizes(name))
        return Classifier(canonical_name(name), net, classes)
    if lower.startswith(_PREFIX):
        return Classifier(_PREFIX + name[len(_PREFIX) :], _torchvision_net(name, classes, size), classes)
    return build_backbone(name, classes)


def _torchvision_net(name: str, classes: int, size: int) -> nn.Module:
    architecture, options = settings_of(name)
    known = torchvision.models.list_models(module=torchvision.models)
    if architecture not in known:
        raise UserError(f"unknown torchvision model {architecture!r}; {nearest(architecture, known)}")
    if architecture in ("inception_v3", "googlenet"):
        options = {**_WITHOUT_AUXILIARY, **options}

    def build(**more: Any) -> nn.Module:
        sizes = {key: (value, value) if key == "input_size" else value for key, value in more.items()}
        try:
            return torchvision.models.get_model(architecture, weights=None, num_classes=classes, **options, **sizes)
        except (TypeError, ValueError, AssertionError, KeyError) as error:
            raise UserError(f"torchvision cannot build model {name!r}: {reason(error)}") from error

    return fitted(build, size, tuple(o for o in ("image_size", "input_size") if o not in options))


@functools.lru_cache(maxsize=64)
def check_classifier(name: str, classes: int, size: int, smallest_batch: int = 2) -> None:
    """UserError unless the student `name` can be built, see images of size x size and train on so few of them at once.

    Takes a fraction of a second to seconds, once for equal arguments; the random streams are as before.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = build_classifier(name, classes, size)
        must_see(name, net, size, native=native_size(name), training=min(2, smallest_batch))
