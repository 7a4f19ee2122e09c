"""The way in from Python: every stage as a function, data in memory in and out, and a user's own network fused."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from torch import Tensor, from_numpy

from fd2fast import pipeline, stages
from fd2fast.artifacts import Artifact, Dataset, Images, Labels, Metrics, Patches, TeacherArtifact, load
from fd2fast.data.arrays import from_arrays as dataset_from_arrays
from fd2fast.data.distilled import load_images
from fd2fast.data.layouts import Listing, Split, register_dataset
from fd2fast.data.pixels import normalise
from fd2fast.data.store import load_split
from fd2fast.errors import UserError, nearest
from fd2fast.methods import register_method
from fd2fast.models.network import FusedNetwork, fuse
from fd2fast.settings import config as settings_of
from fd2fast.settings.paths import expand, expanded
from fd2fast.stages import register as register_stage

Folder = Path | str
A = TypeVar("A", bound=Artifact)

__all__ = [
    "FusedNetwork",
    "Listing",
    "Split",
    "dataset_from_arrays",
    "datasets",
    "distill",
    "evaluate",
    "fuse",
    "patches",
    "pretrain",
    "register_dataset",
    "register_method",
    "register_stage",
    "relabel",
    "run",
    "tensors",
]


def datasets(out: Folder, *, overwrite: bool = False, **settings: Any) -> Dataset:
    """Check, resize and store a data set in the folder `out`. settings: fields of fd2fast.settings.config.DataConfig.

    These functions have the commands' names, settings and results: a finished result of the same settings is taken as it is,
    one that was begun is resumed. Raises UserError where the command would end with an error.
    """
    return _stage("datasets", settings, out, [], overwrite)


def pretrain(out: Folder, dataset: Dataset | Folder, *, overwrite: bool = False, **settings: Any) -> TeacherArtifact:
    """Train one teacher. settings: fields of PretrainConfig."""
    return _stage("pretrain", settings, out, [_load(dataset, Dataset)], overwrite)


def patches(
    out: Folder,
    dataset: Dataset | Folder,
    teacher: TeacherArtifact | Folder,
    *,
    overwrite: bool = False,
    **settings: Any,
) -> Patches:
    """Cut the initial images. settings: fields of PatchesConfig."""
    inputs = [_load(dataset, Dataset), _load(teacher, TeacherArtifact)]
    return _stage("patches", settings, out, inputs, overwrite)


def distill(
    out: Folder,
    dataset: Dataset | Folder,
    teachers: Sequence[TeacherArtifact | Folder] = (),
    patches: Patches | Folder | None = None,
    *,
    overwrite: bool = False,
    **settings: Any,
) -> Images:
    """Make the synthetic images. teachers: in round-robin order; settings: fields of DistillConfig."""
    loaded = [_load(teacher, TeacherArtifact) for teacher in teachers]
    inputs = [_load(dataset, Dataset), loaded, None if patches is None else _load(patches, Patches)]
    return _stage("distill", settings, out, inputs, overwrite)


def relabel(
    out: Folder,
    images: Images | Folder,
    teachers: Sequence[TeacherArtifact | Folder],
    *,
    overwrite: bool = False,
    **settings: Any,
) -> Labels:
    """Store the teachers' soft labels. settings: fields of RelabelConfig."""
    inputs = [_load(images, Images), [_load(teacher, TeacherArtifact) for teacher in teachers]]
    return _stage("relabel", settings, out, inputs, overwrite)


def evaluate(
    out: Folder,
    dataset: Dataset | Folder,
    images: Images | Folder,
    labels: Labels | Folder | None = None,
    *,
    overwrite: bool = False,
    **settings: Any,
) -> Metrics:
    """Train students from scratch and test them. settings: fields of EvaluateConfig; labels: not for labels="hard"."""
    inputs = [_load(dataset, Dataset), _load(images, Images), None if labels is None else _load(labels, Labels)]
    return _stage("evaluate", settings, out, inputs, overwrite)


def run(*, overwrite: bool = False, **settings: Any) -> Path:
    """The whole way, from the data set to the report; its folder. settings: fields of RunConfig."""
    return pipeline.run(_filled(settings_of.RunConfig, settings), overwrite=overwrite)


def tensors(
    result: Dataset | Images | Folder,
    split: Literal["train", "test"] = "train",
    *,
    ipc: int | None = None,
    normalised: bool = False,
) -> tuple[Tensor, Tensor]:
    """The images and labels of a data set, or of distilled images, in memory.

    split: of a data set; distilled images have none. ipc: of distilled images, the ids 0 .. ipc-1 of each class, None: all.
    Images are uint8 [N, 3, S, S], or float32 with the result's mean subtracted and divided by its std where `normalised`; labels
    int64 [N], indices into `result.classes`. Distilled images come class by class. Raises UserError for another kind of result,
    more images than there are, or files that contradict the manifest.
    """
    loaded = result if isinstance(result, Artifact) else load(Path(result))
    if loaded.kind == Images.KIND:
        if split != "train":
            raise UserError(f"{loaded.path} holds distilled images, which have no {split} split")
        pixels, labels = (from_numpy(array) for array in load_images(Images.of(loaded), ipc))
    else:
        if ipc is not None:
            raise UserError(f"{loaded.path} holds a {loaded.kind} artifact; ipc is a number of distilled images")
        images = load_split(Dataset.of(loaded), split)
        rows = range(len(images))
        pixels, labels = images.pixels(rows), images.targets(rows)
    return normalise(pixels, loaded.mean, loaded.std) if normalised else pixels, labels


def _stage(name: str, settings: dict[str, Any], out: Folder, inputs: list[Any], overwrite: bool) -> Any:
    stage = stages.spec(name)
    return stage.run(_filled(stage.config, settings), expand(str(out), "out"), *inputs, overwrite=overwrite)


def _filled(kind: type[Any], settings: dict[str, Any]) -> Any:
    """The settings of this kind; TypeError for a name that is none of its fields."""
    names = [field.name for field in dataclasses.fields(kind)]
    for name in settings:
        if name not in names:
            raise TypeError(f"{kind.__name__} has no setting {name!r}: {nearest(name, names)}")
    return expanded(kind(**settings))


def _load(given: Artifact | Folder, kind: type[A]) -> A:
    return given if isinstance(given, kind) else kind.load(given.path if isinstance(given, Artifact) else Path(given))
