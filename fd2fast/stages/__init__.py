"""The stages, in order: each is run(config, out, *artifacts) and declares itself as its file's SPEC; none imports another."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fd2fast.graph import StageSpec

# Command -> the file that declares the stage, and what it does in a line. Nothing is imported before it is asked for.
STAGES: dict[str, tuple[str, str]] = {
    "datasets": ("fd2fast.stages.datasets", "Check, resize and store a data set; every other stage reads the result."),
    "pretrain": ("fd2fast.stages.pretrain", "Train one teacher: backbone, CAL head and class prototypes."),
    "patches": ("fd2fast.stages.patches", "Cut the initial images: real crops that the teacher recognises best."),
    "distill": ("fd2fast.stages.distill", "Make the synthetic images, of all classes at once."),
    "relabel": (
        "fd2fast.stages.relabel",
        "Store the teachers' soft labels for every augmented view a student will see.",
    ),
    "evaluate": (
        "fd2fast.stages.evaluate",
        "Train students from scratch on the synthetic images and test them on the whole real test set.",
    ),
}


# Names of those that `register` added.
ADDED: list[str] = []


def register(name: str, module: str, about: str, *, after: str) -> None:
    """Add a stage, declared as the SPEC of a module, behind another one; ValueError for a name that is taken or unknown."""
    if name in STAGES or after not in STAGES:
        raise ValueError(f"stage {name!r} after {after!r}: the stages are {', '.join(STAGES)}")
    for known in list(STAGES):
        STAGES[known] = STAGES.pop(known)
        if known == after:
            STAGES[name] = (module, about)
    ADDED.append(name)


def spec(name: str) -> StageSpec:
    """What a stage declares."""
    declared: StageSpec = importlib.import_module(STAGES[name][0]).SPEC
    return declared


def specs() -> dict[str, StageSpec]:
    """What all stages declare, in order."""
    return {name: spec(name) for name in STAGES}
