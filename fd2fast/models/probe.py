"""Whether a model can be built and sees images of a size, and what one image of it takes, before any work begins."""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fd2fast.models.backbone import Backbone, build_backbone, load_weights, native_size
from fd2fast.models.classifier import build_classifier
from fd2fast.models.sight import must_see


@dataclass(frozen=True)
class Probe:
    """What one image of a size meets in a model."""

    # Bytes of parameters and buffers, as saved.
    size: int
    # Elements of the inputs of all BatchNorm layers, which training and matching keep until the backward pass.
    kept: int
    # Fewest values per channel that any BatchNorm layer has for one image; more than one where there is no such layer.
    positions: int
    # Positions of the final map, which the CAL head of a teacher normalises; 0 for a student without such maps.
    map_positions: int


@functools.lru_cache(maxsize=64)
def probe(name: str, classes: int, side: int, *, student: bool = False) -> Probe:
    """A pass of one blank image of this side through the model; the global random generators stay as they are.

    student: any classifier; otherwise a backbone, as teachers have.
    Raises UserError for a model that cannot be built or cannot see such an image.
    """
    kept: list[int] = []
    positions: list[int] = []

    def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept.append(inputs[0].numel())
        positions.append(inputs[0].numel() // inputs[0].shape[1])

    with _undrawn():
        net = (build_classifier if student else build_backbone)(name, classes, side).eval()
        must_see(name, net, side, native=native_size(name))
        for layer in net.modules():
            if isinstance(layer, _BatchNorm):
                layer.register_forward_pre_hook(look)
        with torch.no_grad():
            image = torch.zeros(1, 3, side, side)
            if isinstance(net, Backbone):
                last = math.prod(net.features(image).shape[2:])
            else:
                net(image)
                last = 0
    values = [*net.parameters(), *net.buffers()]
    size = sum(value.numel() * value.element_size() for value in values)
    return Probe(size, sum(kept), min(positions, default=side**2), last)


def check_weights(name: str, classes: int, source: str) -> None:
    """UserError unless the weights file (or "hub") can be read and fits the model; a good file is read once in a process."""
    try:
        stat = os.stat(source)
        stamp = (stat.st_size, stat.st_mtime_ns)
    except (OSError, ValueError):
        stamp = (0, 0)
    _check_weights(name, classes, source, stamp)


@functools.lru_cache(maxsize=64)
def _check_weights(name: str, classes: int, source: str, stamp: tuple[int, int]) -> None:
    with _undrawn(), _silent():
        load_weights(build_backbone(name, classes), source)


@contextlib.contextmanager
def _undrawn() -> Iterator[None]:
    """What is drawn inside has not been drawn outside."""
    with torch.random.fork_rng(devices=[]):
        yield


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Notices are for the work itself."""
    logger = logging.getLogger("fd2fast")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
