"""What the command line offers of each stage, its options and help, known without loading the stage and torch with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fd2fast.artifacts import Artifact, Dataset, Images, Labels, Metrics, Patches, TeacherArtifact
from fd2fast.settings.config import (
    DataConfig,
    DistillConfig,
    EvaluateConfig,
    PatchesConfig,
    PretrainConfig,
    RelabelConfig,
)


@dataclass(frozen=True)
class Input:
    """A parameter of a stage: the type of artifact, whether several, whether it may be left out.

    option: its name on the command line where it is not the parameter's; note: what help says of it beside its maker.
    """

    name: str
    type: type[Artifact]
    several: bool = False
    optional: bool = False
    option: str = ""
    note: str = ""


@dataclass(frozen=True)
class Command:
    """A stage as a command: its settings, inputs and output; examples and, where there is a usual one, the output folder."""

    config: type[Any]
    inputs: Sequence[Input]
    output: type[Artifact]
    examples: Sequence[str] = ()
    out: Path | None = None


_DATASET = Input("dataset", Dataset)

# Of the stages that come with fd2fast; the others' are made from what they declare.
COMMANDS: dict[str, Command] = {
    "datasets": Command(
        DataConfig,
        (),
        Dataset,
        (
            "fd2fast datasets --dataset typefaces --classes 50 --size 96 --out runs/faces/dataset",
            "fd2fast datasets --dataset cub --root ~/CUB_200_2011 --size 224 --out runs/cub/dataset",
        ),
        out=Path("runs/dataset"),
    ),
    "pretrain": Command(
        PretrainConfig,
        (_DATASET,),
        TeacherArtifact,
        (
            "fd2fast pretrain --dataset runs/cub/dataset --model ResNet18 --weights resnet18.pth "
            "--out runs/cub/teachers/ResNet18",
        ),
    ),
    "patches": Command(
        PatchesConfig,
        (_DATASET, Input("teacher", TeacherArtifact)),
        Patches,
        (
            "fd2fast patches --dataset runs/cub/dataset --teacher runs/cub/teachers/ResNet18 --factor 2 --out runs/cub/patches/2",
        ),
    ),
    "distill": Command(
        DistillConfig,
        (
            _DATASET,
            Input("teachers", TeacherArtifact, several=True, note="in round-robin order"),
            Input("patches", Patches, optional=True, note="for methods that start from patches, and rded"),
        ),
        Images,
        (
            "{methods}",
            "fd2fast distill --dataset D --teachers T --patches P --method sre2l++_fd2 --ipc 5 --out runs/cub/images/sre2l++_fd2",
            "On several GPUs (or machines that share the folder), with the same bytes as on one:",
            "torchrun --nproc-per-node 8 -m fd2fast distill --dataset D --teachers T --patches P --ipc 5 --out I",
        ),
    ),
    "relabel": Command(
        RelabelConfig,
        (Input("images", Images), Input("teachers", TeacherArtifact, several=True, note="their logits are averaged")),
        Labels,
        (
            "fd2fast relabel --images runs/cub/images/sre2l++_fd2 --teachers runs/cub/teachers/ResNet18 --epochs 400 --out L",
        ),
    ),
    "evaluate": Command(
        EvaluateConfig,
        (
            _DATASET,
            Input("images", Images),
            Input("labels", Labels, optional=True, option="soft_labels", note="not needed with --labels hard"),
        ),
        Metrics,
        (
            "fd2fast evaluate --dataset D --images I --soft-labels L --model ResNet18 --seeds 0 1 2 "
            "--out runs/cub/metrics/ResNet18",
        ),
    ),
}
