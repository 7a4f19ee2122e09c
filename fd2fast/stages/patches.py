"""Cut random crops out of the real images and keep those the teacher finds easiest: the initial images (RDED)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fd2fast import ops, seeding
from fd2fast.artifacts import Dataset, Patches, PatchesFacts, Stage, TeacherArtifact, open_stage, sync_folder
from fd2fast.data.crops import random_resized_crops
from fd2fast.data.outline import Outline, outline_of
from fd2fast.data.pixels import grid, normalise, read_image, save_image
from fd2fast.data.store import ImageSet, load_split
from fd2fast.entries import Entry, patch_factors
from fd2fast.errors import refuse
from fd2fast.graph import Job, StageSpec
from fd2fast.models.teacher import Teacher, load_teacher
from fd2fast.pictures import picture
from fd2fast.settings.config import PatchesConfig, RunConfig, replace, wrong_settings
from fd2fast.system.device import device_faults, pick_device
from fd2fast.system.lock import released_at_end
from fd2fast.system.progress import Progress
from fd2fast.system.space import Space

_STATE = "classes.pt"
_PIXELS_PER_PASS = 1 << 22  # of one colour channel: bounds the memory of a scoring pass
_PREVIEW = 16  # classes shown


class Ranked(NamedTuple):
    """The best crop of each image, easiest image first."""

    crops: Tensor  # [n, 3, t, t] in [0, 1]
    scores: Tensor  # [n], cross entropy of the teacher, ascending
    sources: Tensor  # int64 [n], position of the image among those searched


@released_at_end()
def run(
    config: PatchesConfig, out: Path | str, dataset: Dataset, teacher: TeacherArtifact, *, overwrite: bool = False
) -> Patches:
    """Make `per_class` initial images of each class from the training images of `dataset`.

    Of each of the first `pool` images of a class, `crops` random resized crops (square, side size // factor) are scored by
    -log softmax[class] of the teacher's backbone branch, zero-padded to the full size; the best of each image is kept and
    the images are ranked. Image j of P is crop j (factor 1) or the mosaic of crops j, P+j, 2P+j, 3P+j in row-major 2 x 2
    cells (factor 2). A pool too small for all P at once is searched again with fresh crops, each time for as many images as
    it fills (the released code does so for each image).

    Writes images/{c:05d}/class{c:05d}_id{j:05d}.png (8 bits, rounded) and preview.png. Facts: factor, per_class, pool, crops,
    mean_score (cross entropy of the crops used, by class). A killed run continues with the class it was at.
    Raises UserError for settings out of range, a class with too few images, and a teacher that does not fit.
    """
    data = outline_of(dataset)
    TeacherArtifact.of(teacher).must_be_of(dataset)
    refuse(faults(config, data))
    device = pick_device(config.device)
    train = load_split(dataset, "train")
    pool = config.pool or data.least
    stage = open_stage(out, Patches, config, {"dataset": dataset, "teacher": teacher}, overwrite=overwrite)
    if stage.finished:
        return stage.finished
    loaded = load_teacher(teacher, device)
    scores: list[float] = (stage.restore(_STATE) or {"scores": []})["scores"]
    classes = len(train.classes)
    with Progress("patches", classes, done=len(scores), unit="class") as bar:
        while len(scores) < classes:
            scores.append(_class_images(config, stage, train, loaded, len(scores), pool, device))
            sync_folder((stage.path / Patches.image_name(len(scores) - 1, 0)).parent)
            stage.checkpoint(_STATE, {"scores": scores})
            bar.step(1, cross_entropy=scores[-1])
    picture(stage.path / Patches.PREVIEW, lambda: _preview(config, stage, train))
    facts = PatchesFacts(
        factor=config.factor, per_class=config.per_class, pool=pool, crops=config.crops, mean_score=scores
    )
    return stage.finish_like(dataset, facts, {"device": str(device)})


def faults(config: PatchesConfig, data: Outline | None = None) -> list[str]:
    """What is wrong with the settings, by themselves and for this data set; one line each."""
    found = wrong_settings(config, "patches") + device_faults("patches", config.device)
    if found or data is None:
        return found
    if data.size % config.factor:
        found.append(f"patches: images of side {data.size} cannot be cut into {config.factor} x {config.factor} cells")
    pool = f" and pool {config.pool}" if config.pool else ""
    return found + data.short(max(config.factor**2, config.pool or 1), f"patches with factor {config.factor}{pool}")


def settled(config: PatchesConfig) -> PatchesConfig:
    """The settings as the artifact records them."""
    return config


def space(config: PatchesConfig, data: Outline) -> Space:
    """Bytes on disk: one PNG for each initial image."""
    count = len(data.classes) * config.per_class
    return Space(0, count * (3 * data.size**2 + 4096))


def _class_images(
    config: PatchesConfig,
    stage: Stage[Patches],
    train: ImageSet,
    teacher: Teacher,
    label: int,
    pool: int,
    device: torch.device,
) -> float:
    """Write the images of one class; the mean cross entropy of the crops in them."""
    cells, made, used = config.factor**2, 0, []
    searched = train.of_class(label)[:pool]
    images = train.unit(searched, device=device)
    for repetition in range(config.per_class):
        count = min(pool // cells, config.per_class - made)
        draws = seeding.generator(config.seed, "patches", label, repetition)
        ranked = rank_crops(config, images, label, teacher, train, draws)
        used.append(ranked.scores[: count * cells])
        for j, image in enumerate(compose(ranked.crops, count, config.factor)):
            pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8)
            save_image(stage.path / Patches.image_name(label, made + j), pixels)
        made += count
        if made == config.per_class:
            break
    return float(torch.cat(used).double().mean())


@torch.no_grad()
def rank_crops(
    config: PatchesConfig, images: Tensor, label: int, teacher: Teacher, train: ImageSet, draws: torch.Generator
) -> Ranked:
    """Random crops of images [n, 3, S, S] in [0, 1], of each image the one the teacher finds easiest, easiest image first."""
    count, size = len(images), images.shape[-1]
    side = size // config.factor
    uniform = torch.rand(count * config.crops, 22, generator=draws, dtype=torch.float64)
    boxes = random_resized_crops(
        uniform[:, :20].unflatten(1, (-1, 2)), uniform[:, 20:], (size, size), (config.min_crop, 1.0), (1.0, 1.0)
    )
    params = F.pad(boxes, (0, 3)).int()  # no flip, no roll
    owner = torch.arange(count).repeat_interleave(config.crops)
    before = (size - side) // 2
    after = size - side - before
    cut, scores = [], []
    for rows in torch.arange(len(owner)).split(max(1, _PIXELS_PER_PASS // size**2)):
        offsets = torch.arange(len(rows) + 1, dtype=torch.int32)
        crops = ops.crop_flip_roll(images[owner[rows].to(images.device)], params[rows], offsets, side)
        padded = F.pad(normalise(crops, train.mean, train.std), (before, after, before, after))
        logits = teacher.backbone(padded.contiguous(memory_format=torch.channels_last))
        targets = torch.full((len(rows),), label, device=logits.device)
        scores.append(F.cross_entropy(logits.float(), targets, reduction="none"))
        cut.append(crops)
    by_image = torch.cat(scores).view(count, config.crops)
    best = by_image.argmin(1)
    score = by_image.gather(1, best[:, None])[:, 0]
    order = score.argsort(stable=True)
    rows = torch.arange(count, device=best.device) * config.crops + best
    return Ranked(torch.cat(cut)[rows[order]], score[order].cpu(), order.cpu())


def compose(crops: Tensor, count: int, factor: int) -> Tensor:
    """Ranked crops [n, 3, t, t] -> [count, 3, factor t, factor t]: cell q (row-major) of image j is crop q count + j."""
    side = crops.shape[-1]
    cells = crops[: factor**2 * count].view(factor, factor, count, 3, side, side)
    return cells.permute(2, 3, 0, 4, 1, 5).reshape(count, 3, factor * side, factor * side)


def _preview(config: PatchesConfig, stage: Stage[Patches], train: ImageSet) -> bytes:
    shown = torch.linspace(0, len(train.classes) - 1, min(_PREVIEW, len(train.classes))).long().tolist()
    columns = min(config.per_class, 8)
    pictures: list[Any] = [read_image(stage.path / Patches.image_name(k, j)) for k in shown for j in range(columns)]
    titles = [train.classes[k][:24] for k in shown]
    return grid(torch.stack(pictures), columns, titles=titles)


def _jobs(run: RunConfig, entries: Sequence[Entry]) -> Iterator[Job]:
    for factor in patch_factors(entries):
        settings = replace(run.patches, factor=factor, per_class=max(run.patches.per_class, *run.ipc))
        yield _job(settings, run.teachers[0])


def _job(config: PatchesConfig, teacher: str) -> Job:
    return Job(
        f"patches {config.factor} x {config.factor}",
        f"patches/{config.factor}",
        config,
        key=config.factor,
        keys={"teacher": teacher},
        faults=lambda data, hub: faults(config, data),
        settled=lambda data: settled(config),
        space=lambda data: space(config, data),
    )


SPEC = StageSpec(run, _jobs, faults)
