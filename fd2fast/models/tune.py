"""Measures, once before a run, which algorithm each convolution of fused teachers should use on this CPU."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Sequence

import torch

from fd2fast.models.convolution import Choices
from fd2fast.models.fused import FusedTeacher

log = logging.getLogger("fd2fast")

# Images that are measured with; the choice does not depend on more.
_ROWS = 8


def wanted() -> bool:
    """Whether to measure; FD2FAST_TUNE=0 keeps to the rule, so that independent runs round alike."""
    return os.environ.get("FD2FAST_TUNE", "1") != "0"


def tune(teachers: Sequence[FusedTeacher], rows: int, sides: Sequence[int]) -> Choices:
    """The choices for steps of `rows` images with these sides, which the teachers take over.

    Empty on a GPU and where `wanted` says no. Runs one forward and backward pass of each teacher and side on random images;
    what was packed for it is let go.
    """
    choices = Choices()
    for teacher in teachers:
        teacher.choose_by(choices)
    if not wanted() or any(teacher.classifier.device.type != "cpu" for teacher in teachers):
        return choices
    began = time.monotonic()
    with choices.measure():
        for teacher in teachers:
            for side in dict.fromkeys(sides):
                _pass(teacher, min(rows, _ROWS), side)
            teacher.forget_packed()
    used = ", ".join(f"{name} {count}" for name, count in Counter(choices.chosen.values()).most_common())
    log.info(
        "convolutions measured in %.1f s, kinds by algorithm: %s", time.monotonic() - began, used or "none to choose"
    )
    return choices


def _pass(teacher: FusedTeacher, rows: int, side: int) -> None:
    made = torch.Generator().manual_seed(0)
    images = torch.randn(rows, 3, side, side, generator=made).to(teacher.classifier.dtype).requires_grad_()
    out, bn = teacher(images, (0, rows))
    (out.logits.sum() + out.z.sum() + bn.sum()).backward()
