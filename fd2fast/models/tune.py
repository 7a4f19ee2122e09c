"""Measures which algorithm each convolution of fused teachers should use on this CPU, and remembers it for the machine."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fd2fast.artifacts import atomic_path
from fd2fast.errors import UserError
from fd2fast.models.convolution import Choices
from fd2fast.models.fused import FusedTeacher
from fd2fast.system import isa

log = logging.getLogger("fd2fast")

# Images that are measured with; the choice does not depend on more.
_ROWS = 8


def wanted() -> bool:
    """Whether to measure; FD2FAST_TUNE=0 keeps to the rule, so that independent runs round alike."""
    return os.environ.get("FD2FAST_TUNE", "1") != "0"


def memory_file() -> Path | None:
    """Where choices are remembered: FD2FAST_CACHE (empty: nowhere), else fd2fast in the user's folder for caches."""
    given = os.environ.get("FD2FAST_CACHE")
    if given == "":
        return None
    base = given or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = Path(base).expanduser()
    return (folder if given else folder / "fd2fast") / "convolutions.json"


def tune(
    teachers: Sequence[FusedTeacher], rows: int, sides: Sequence[int], *, remembered: Path | None = None
) -> Choices:
    """The choices for steps of `rows` images with these sides, which the teachers take over.

    Empty on a GPU and where `wanted` says no. Runs one forward and backward pass of each teacher and side on random images;
    what was packed for it is let go. remembered: a file of earlier choices, which are taken as they are, so that the same
    command twice on one machine rounds alike (two algorithms of nearly the same speed would be settled by noise); new ones
    are added to it. A file that cannot be read or written is no reason to stop.
    """
    choices = Choices()
    for teacher in teachers:
        teacher.choose_by(choices)
    if not wanted() or any(teacher.classifier.device.type != "cpu" for teacher in teachers):
        return choices
    began = time.monotonic()
    machine = _machine()
    known = {} if remembered is None else _choices_of(machine, _contents(remembered))
    with choices.measure(known):
        for teacher in teachers:
            for side in dict.fromkeys(sides):
                _pass(teacher, min(rows, _ROWS), side)
            teacher.forget_packed()
    fresh = {kind: name for kind, name in choices.chosen.items() if known.get(kind) != name}
    if fresh and remembered is not None:
        _remember(remembered, machine, fresh)
    used = ", ".join(f"{name} {count}" for name, count in Counter(choices.chosen.values()).most_common())
    log.info(
        "convolutions measured in %.1f s, kinds by algorithm: %s%s",
        time.monotonic() - began,
        used or "none to choose",
        f" (of earlier runs: {remembered})" if len(fresh) < len(choices.chosen) else "",
    )
    return choices


def _machine() -> str:
    """What the fastest algorithm depends on beside the kind of convolution."""
    sets = isa.detect()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    levels = f"torch {sets.torch}, oneDNN {sets.onednn}, own {sets.own}"
    return f"{name}; instruction sets {levels}; {torch.get_num_threads()} threads; torch {torch.__version__}"


def _choices_of(machine: str, contents: Mapping[str, object]) -> dict[str, str]:
    known = contents.get(machine)
    if not isinstance(known, Mapping):
        return {}
    return {kind: name for kind, name in known.items() if isinstance(name, str)}


def _contents(file: Path) -> dict[str, object]:
    try:
        contents = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("remembered convolutions are measured again: %s cannot be read (%s)", file, error)
        return {}
    return contents if isinstance(contents, dict) else {}


def _remember(file: Path, machine: str, fresh: Mapping[str, str]) -> None:
    contents = _contents(file)  # again: another run may have added to it
    contents[machine] = _choices_of(machine, contents) | dict(fresh)
    try:
        with atomic_path(file) as temporary:
            temporary.write_text(json.dumps(contents, indent=1, sort_keys=True))
    except (UserError, OSError) as error:
        log.info("convolutions are not remembered for later runs: %s", error)


def _pass(teacher: FusedTeacher, rows: int, side: int) -> None:
    made = torch.Generator().manual_seed(0)
    images = torch.randn(rows, 3, side, side, generator=made).to(teacher.classifier.dtype).requires_grad_()
    out, bn = teacher(images, (0, rows))
    (out.logits.sum() + out.z.sum() + bn.sum()).backward()
