"""Soft labels of every view a student will see: the teachers' logits, stored with the views themselves (FKD)."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fd2fast import seeding
from fd2fast.artifacts import (
    Images,
    Labels,
    LabelsFacts,
    Stage,
    TeacherArtifact,
    atomic_path,
    made,
    new_array,
    open_stage,
    write_npy,
    writing,
)
from fd2fast.data.distilled import load_images
from fd2fast.data.outline import Outline
from fd2fast.data.views import (
    PER_EPOCH,
    Source,
    Views,
    ViewSettings,
    array_types,
    batch_offsets,
    draw_views,
    grouped,
    images_at_once,
    replay,
    usual_batch_size,
)
from fd2fast.entries import Entry, folder_name, teachers_of
from fd2fast.errors import UserError, refuse
from fd2fast.graph import Job, StageSpec
from fd2fast.models.probe import probe
from fd2fast.models.teacher import Teacher, load_teacher
from fd2fast.models.training import accelerate
from fd2fast.settings.config import RelabelConfig, RunConfig, replace, wrong_settings
from fd2fast.system.device import device_faults, pick_device
from fd2fast.system.lock import released_at_end
from fd2fast.system.progress import Progress
from fd2fast.system.space import Space

# Seconds between saves of unfinished work.
SAVE_SECONDS = 10.0
# Epochs that the manifest's agreement is taken over: enough for a percentage, and never a long pass over the store.
AGREEMENT_EPOCHS = 10


@released_at_end()
def run(
    config: RelabelConfig,
    out: Path | str,
    images: Images,
    teachers: Sequence[TeacherArtifact],
    *,
    overwrite: bool = False,
) -> Labels:
    """Label `config.epochs` epochs of views of the distilled images; returns the "labels" artifact.

    Files: logits.npy float16 [E,N,K] (row n of epoch e belongs to the image order[e,n]; no softmax, no temperature) and
    views/*.npy (see data.views.Views). The teachers see the cut-mixed images. In teacher_mode "batch" they run in train
    mode on the two halves of each batch, split at B//2: BN takes the half's statistics, running statistics stay as they
    are, dropout is seeded. Several teachers: the weighted mean of their logits.

    Raises UserError for artifacts that do not fit each other and for settings out of range.
    """
    if not teachers:
        raise UserError("labels need at least one teacher")
    images, teachers = Images.of(images), [TeacherArtifact.of(teacher) for teacher in teachers]
    for teacher in teachers:
        images.must_fit(teacher)
    known = Outline("", images.size, tuple(images.classes), (), ())
    finished = made(out) and not overwrite
    models = [] if finished else [teacher.facts.model for teacher in teachers]
    refuse(faults(config, known, images.per_class(), models))
    settings = ViewSettings.of(config)
    weights = teacher_weights(config, teachers)
    parents = {"images": images, **{f"teacher_{i}": teacher for i, teacher in enumerate(teachers)}}
    stage = open_stage(out, Labels, config, parents, overwrite=overwrite)
    if stage.finished:
        return stage.finished

    device = pick_device(config.device)
    pixels, targets = load_images(images, config.ipc)
    offsets = batch_offsets(len(pixels), config.batch_size)
    loaded = [load_teacher(teacher, device) for teacher in teachers]
    for network in loaded:
        accelerate(network)
    store = _Store(stage, config.epochs, offsets, len(images.classes))
    source = Source(pixels, images.mean, images.std, device)
    limit = images_at_once(images.size)
    span = max(1, limit // len(pixels))
    described = f"labels ({config.teacher_mode} mode)"
    with (
        Progress(described, config.epochs, done=store.done, unit="epoch") as bar,
        _labelling(loaded, config.teacher_mode),
    ):
        # the grid of spans is fixed, so that a resumed run forms the same forward passes
        for first in range(store.done, config.epochs, span):
            end = min(first + span, config.epochs)
            views = draw_views(settings, offsets, images.size, first, end)
            rows = [(epoch, b) for epoch in range(end - first) for b in range(views.batches)]
            labels = [
                _label(config, loaded, weights, replay(views, source, group), views, group, first)
                for group in grouped(rows, offsets, limit)
            ]
            logits = torch.cat(labels).cpu().numpy().reshape(end - first, len(pixels), -1)
            store.put(first, end, views, logits)
            bar.step(end - first, agreement=100 * float(_agree(logits, views, targets).mean()))
    agreement = store.close(targets)
    facts = LabelsFacts(
        images=len(pixels),
        ipc=len(pixels) // len(images.classes),
        epochs=config.epochs,
        batch_size=min(config.batch_size or usual_batch_size(len(pixels)), len(pixels)),
        teachers=[teacher.facts.model for teacher in teachers],
        weights=weights,
        teacher_mode=config.teacher_mode,
        source=config.source,
        agreement=agreement,
    )
    return stage.finish_like(images, facts)


def faults(
    config: RelabelConfig, data: Outline | None = None, ipc: int | None = None, models: Sequence[str] = ()
) -> list[str]:
    """What is wrong with the settings, and for this data set at so many images per class; one line each.

    models: the teachers' backbones.
    """
    found = wrong_settings(config, "relabel") + device_faults("relabel", config.device)
    if found or data is None or (count := config.ipc or ipc) is None:
        return found
    if ipc is not None and count > ipc:
        return [f"relabel.ipc must be 1 to {ipc}, all that the images hold; got {count}"]
    images = len(data.classes) * count
    try:
        smallest = int(np.diff(batch_offsets(images, config.batch_size)).min())
    except UserError as error:
        return [f"relabel: {error}"]
    if config.teacher_mode != "batch" or smallest // 2 > 1:
        return found
    for model in models:
        seen = probe(model, len(data.classes), data.size)
        if seen.positions == 1 or (config.source == "cal" and seen.map_positions == 1):
            found.append(
                f"relabel.teacher_mode batch: half of a batch of {smallest} images leaves {model} one value per channel at "
                f"{data.size} x {data.size} pixels; take a larger batch_size, larger images or teacher_mode eval"
            )
    return found


def settled(config: RelabelConfig) -> RelabelConfig:
    """The settings as the artifact records them."""
    return config


def space(config: RelabelConfig, data: Outline, ipc: int) -> Space:
    """Bytes on disk: the logits and the views, whose space is taken when the stage begins."""
    offsets = batch_offsets(len(data.classes) * (config.ipc or ipc), config.batch_size)
    shapes = [((int(offsets[-1]), len(data.classes)), np.float16), *array_types(offsets).values()]
    size = config.epochs * sum(math.prod(shape) * np.dtype(kind).itemsize for shape, kind in shapes)
    return Space(size, size + (1 << 16))


def teacher_weights(config: RelabelConfig, teachers: Sequence[TeacherArtifact]) -> list[float]:
    """Weights of the teachers' logits: 1/n, or softmax(test accuracy in percent / 10)."""
    if config.teacher_weights == "equal":
        return [1 / len(teachers)] * len(teachers)
    backbone = config.source == "backbone"
    accuracies = [teacher.facts.backbone_accuracy if backbone else teacher.facts.cal_accuracy for teacher in teachers]
    if not all(accuracy is not None and math.isfinite(accuracy) for accuracy in accuracies):
        raise UserError(f"teacher_weights prior needs every teacher's accuracy, got {accuracies}")
    return torch.softmax(torch.tensor(accuracies, dtype=torch.float64) / 10, 0).tolist()


@contextlib.contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """Train mode in which BN normalises by the batch and neither reads nor writes its running statistics."""
    layers = [(layer, layer.track_running_stats) for layer in module.modules() if isinstance(layer, _BatchNorm)]
    training = {layer: layer.training for layer in module.modules()}
    try:
        for layer, _ in layers:
            layer.track_running_stats = False
        module.train()
        yield
    finally:
        for layer, tracked in layers:
            layer.track_running_stats = tracked
        for part, mode in training.items():
            part.training = mode


@contextlib.contextmanager
def _labelling(teachers: Sequence[Teacher], mode: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        for teacher in teachers:
            if mode == "batch":
                stack.enter_context(batch_statistics(teacher))
            else:
                teacher.eval()
        yield


def _label(
    config: RelabelConfig,
    teachers: Sequence[Teacher],
    weights: Sequence[float],
    x: Tensor,
    views: Views,
    group: Sequence[tuple[int, int]],
    first_epoch: int,
) -> Tensor:
    """fp16 logits [n,K] of the replayed batches x [n,3,S,S]."""
    x = x.contiguous(memory_format=torch.channels_last)
    total = None
    for index, (teacher, weight) in enumerate(zip(teachers, weights, strict=True)):
        if config.teacher_mode == "eval":
            # small passes stay in a CPU's cache: 1.4 to 2 times the speed of large ones
            step = max(1, images_at_once(x.shape[-1]) // 8) if x.device.type == "cpu" else len(x)
            logits = torch.cat([_logits(teacher, part, config.source) for part in x.split(step)])
        else:
            logits = _logits_by_halves(config, teacher, index, x, views, group, first_epoch)
        total = weight * logits if total is None else total + weight * logits
    assert total is not None
    half = total.half()
    if not bool(torch.isfinite(half).all()):
        raise UserError("a teacher gives labels that are not finite in 16 bits: train it again, or look at its curves")
    return half


def _logits(teacher: Teacher, x: Tensor, source: str) -> Tensor:
    return (teacher.backbone(x) if source == "backbone" else teacher(x).cal_logits).float()


def _logits_by_halves(
    config: RelabelConfig,
    teacher: Teacher,
    index: int,
    x: Tensor,
    views: Views,
    group: Sequence[tuple[int, int]],
    first_epoch: int,
) -> Tensor:
    parts, begin = [], 0
    for epoch, b in group:
        count = int(views.offsets[b + 1] - views.offsets[b])
        # dropout draws from the global generator
        torch.manual_seed(seeding.derive(config.seed, "dropout", index, first_epoch + epoch, b))
        for half in (x[begin : begin + count // 2], x[begin + count // 2 : begin + count]):
            try:
                parts.append(_logits(teacher, half, config.source))
            except ValueError as error:
                if "more than 1 value per channel" not in str(error):
                    raise
                raise UserError(
                    f"teacher_mode batch: a half batch of {len(half)} image leaves {teacher.name} one value per channel; "
                    "take a larger batch_size, larger images or teacher_mode eval"
                ) from error
        begin += count
    return torch.cat(parts)


def _agree(logits: np.ndarray, views: Views, targets: np.ndarray) -> np.ndarray:
    """bool [E,N]: the label's first class is the image's own or its pasted partner's."""
    own = targets[views.order]
    start = np.repeat(views.offsets[:-1], np.diff(views.offsets))
    partner = np.take_along_axis(own, views.mix_index + start, 1)
    said = logits.argmax(-1)
    return (said == own) | (said == partner)


class _Store:
    """The arrays being filled below the stage's state folder, epoch by epoch; `done` epochs are safe."""

    def __init__(self, stage: Stage[Labels], epochs: int, offsets: np.ndarray, classes: int):
        self._stage = stage
        self._offsets = offsets
        shapes: dict[str, tuple[tuple[int, ...], type]] = {Labels.LOGITS: ((int(offsets[-1]), classes), np.float16)}
        shapes |= {Labels.view_name(name): kind for name, kind in array_types(offsets).items()}
        self.epochs = epochs
        restored = stage.restore("progress.pt")
        self.done = int(restored["done"]) if restored else 0
        self._saved = time.monotonic()
        self._arrays: dict[str, np.memmap] = {}
        for name, (shape, dtype) in shapes.items():
            path = self._path(name)
            if not path.is_file():
                _reserve(path, (epochs, *shape), dtype)
            self._arrays[name] = np.lib.format.open_memmap(path, mode="r+")

    def _path(self, name: str) -> Path:
        # once all epochs are there the files move to their place one by one, and a kill may come between
        final = self._stage.path / name
        return final if self.done == self.epochs and final.is_file() else self._stage.state / "store" / name

    def put(self, first: int, end: int, views: Views, logits: np.ndarray) -> None:
        self._arrays[Labels.LOGITS][first:end] = logits
        for name in PER_EPOCH:
            self._arrays[Labels.view_name(name)][first:end] = getattr(views, name)
        self.done = end
        if end == self.epochs or time.monotonic() - self._saved >= SAVE_SECONDS:
            with writing(self._stage.state / "store"):
                for array in self._arrays.values():
                    array.flush()
            self._stage.checkpoint("progress.pt", {"done": end})
            self._saved = time.monotonic()

    def close(self, targets: np.ndarray) -> float:
        """Move the full arrays to their place; returns the agreement with the classes in percent."""
        few = min(self.epochs, AGREEMENT_EPOCHS)
        arrays = {name: np.asarray(self._arrays[Labels.view_name(name)][-few:]) for name in PER_EPOCH}
        views = Views(**arrays, offsets=self._offsets)
        agreement = 100 * float(_agree(np.asarray(self._arrays[Labels.LOGITS][-few:]), views, targets).mean())
        self._arrays.clear()
        write_npy(self._stage.path / Labels.view_name("offsets"), self._offsets)
        names = [Labels.LOGITS, *(Labels.view_name(name) for name in PER_EPOCH)]
        for name in names:
            held = self._stage.state / "store" / name
            if held.is_file():
                with writing(self._stage.path / name):
                    (self._stage.path / name).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(held, self._stage.path / name)
        return round(agreement, 3)


def _reserve(path: Path, shape: tuple[int, ...], dtype: type) -> None:
    """A .npy file of zeros whose space is really taken: a full disk shows now, not as a signal in the middle of the work."""
    with atomic_path(path) as temporary:
        new_array(temporary, shape, dtype)


def _jobs(run: RunConfig, entries: Sequence[Entry]) -> Iterator[Job]:
    for entry in entries:
        for ipc in run.ipc if entry.labels == "soft" else ():
            yield _job(replace(run.relabel, ipc=ipc), entry, ipc, teachers_of(entry.method, run.teachers))


def _job(config: RelabelConfig, entry: Entry, ipc: int, teachers: Sequence[str]) -> Job:
    return Job(
        f"labels {entry.name}, {ipc} per class",
        f"labels/{folder_name(entry.method)}-ipc{ipc}",
        config,
        key=(entry.method, ipc),
        keys={"images": entry.method, "teachers": teachers},
        faults=lambda data, hub: faults(config, data, ipc, teachers),
        settled=lambda data: settled(config),
        space=lambda data: space(config, data, ipc),
    )


SPEC = StageSpec(run, _jobs, faults)
