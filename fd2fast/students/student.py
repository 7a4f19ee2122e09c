"""One student: built, trained from scratch on the distilled images, tested on the whole real test set, saved."""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fd2fast import seeding
from fd2fast.artifacts import (
    STATE,
    Artifact,
    Dataset,
    Images,
    Labels,
    Metrics,
    config_dict,
    read_torch,
    resumable,
    sync_folder,
    write_json,
    write_safetensors,
    write_torch,
)
from fd2fast.data.distilled import load_images
from fd2fast.data.store import ImageSet, load_split
from fd2fast.data.views import (
    Source,
    Views,
    ViewSettings,
    batch_offsets,
    check_views,
    draw_views,
    grouped,
    images_at_once,
    open_array,
    open_views,
    replay,
)
from fd2fast.errors import UserError
from fd2fast.models.classifier import build_classifier
from fd2fast.models.training import accelerate
from fd2fast.schedules import half_cosine
from fd2fast.settings.config import EvaluateConfig
from fd2fast.system import threads
from fd2fast.system.device import autocast, channels_last, pick_device, repeatable

# Epochs of a student without a label store to say otherwise (CV-DD).
USUAL_EPOCHS = 300
# Seconds between saves of the student in training.
SAVE_SECONDS = 15.0

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Lessons:
    """What students learn from: views of E epochs, and for each the soft labels or the classes."""

    source: Source
    targets: np.ndarray  # int64 [N], class of every distilled image
    settings: ViewSettings
    offsets: np.ndarray
    size: int
    epochs: int
    views: Views | None  # stored views; None: drawn from the settings
    logits: np.ndarray | None  # fp16 [E, N, K]; None: hard labels

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor | tuple[Tensor, Tensor, float]]]:
        """Batches of one epoch: images [n,3,S,S] and either logits [n,K] or (own class, partner's class, its area share)."""
        views = (
            draw_views(self.settings, self.offsets, self.size, epoch, epoch + 1)
            if self.views is None
            else self.views.part(epoch, epoch + 1)
        )
        device = self.source.pixels.device
        pasted = views.pasted_share(self.size)
        for group in grouped([(0, b) for b in range(views.batches)], views.offsets, images_at_once(self.size)):
            seen = replay(views, self.source, group).contiguous(memory_format=torch.channels_last)
            begin = 0
            for _, b in group:
                low, high = int(views.offsets[b]), int(views.offsets[b + 1])
                x = seen[begin : begin + high - low]
                begin += high - low
                if self.logits is not None:
                    yield x, torch.from_numpy(np.array(self.logits[epoch, low:high])).to(device).float()
                    continue
                own = self.targets[views.order[0, low:high]]
                partner = own[views.mix_index[0, low:high]]
                yield x, (torch.from_numpy(own).to(device), torch.from_numpy(partner).to(device), float(pasted[0, b]))


def prepare(
    config: EvaluateConfig, dataset: Dataset, images: Images, labels: Labels | None
) -> tuple[Lessons, dict[str, Artifact]]:
    """The views and labels of the students, checked, and the parents of the result."""
    device = pick_device(config.device)
    parents: dict[str, Artifact] = {"dataset": dataset, "images": images}
    if labels is None:
        if config.labels == "soft":
            raise UserError(
                "soft labels were asked for, but no labels artifact was given; make one with fd2fast relabel"
            )
        pixels, targets = load_images(images, config.ipc)
        source = Source(pixels, images.mean, images.std, device)
        offsets = batch_offsets(len(pixels), config.batch_size)
        epochs = config.epochs or USUAL_EPOCHS
        return Lessons(source, targets, ViewSettings.of(config), offsets, images.size, epochs, None, None), parents
    labels = Labels.of(labels)
    if labels.parent_id("images") != images.id:
        raise UserError(f"{labels.path} labels other images than {images.path}: make the labels of these images")
    ipc, stored = labels.facts.ipc, labels.facts.epochs
    if config.ipc not in (None, ipc):
        raise UserError(f"{labels.path} labels {ipc} images per class, but {config.ipc} were asked for")
    if config.epochs is not None and config.epochs > stored:
        raise UserError(f"{labels.path} holds labels of {stored} epochs, but {config.epochs} were asked for")
    pixels, targets = load_images(images, ipc)
    views = open_views(labels.path)
    check_views(views, stored, len(pixels), images.size, labels.path)
    logits = None
    if config.labels == "soft":
        logits, wanted = open_array(labels.file(labels.LOGITS)), (stored, len(pixels), len(images.classes))
        if logits.dtype != np.float16 or logits.shape != wanted:
            raise UserError(
                f"{labels.path / labels.LOGITS} must be float16 {list(wanted)}, got {logits.dtype} {list(logits.shape)}"
            )
    lessons = Lessons(
        Source(pixels, images.mean, images.std, device),
        targets,
        ViewSettings.of(config),
        np.asarray(views.offsets),
        images.size,
        config.epochs or stored,
        views,
        logits,
    )
    return lessons, {**parents, "labels": labels}


class Training:
    """One student: built, trained, tested, saved."""

    def __init__(self, config: EvaluateConfig, path: Path, lessons: Lessons, test: ImageSet, seed: int):
        """path: folder of the "metrics" artifact that the student belongs to."""
        self.config, self.path, self.lessons, self.test, self.seed = config, path, lessons, test, seed
        self.device = pick_device(config.device)
        seeding.seed_all(seed, "student")
        self.student: nn.Module = build_classifier(config.model, len(test.classes), test.size)
        channels_last(self.student.to(self.device))
        accelerate(self.student)
        decayed = [p for p in self.student.parameters() if p.ndim >= 2]
        plain = [p for p in self.student.parameters() if p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}],
            lr=config.lr,
            fused=True,
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.precision == "fp16")
        self.epoch = 0
        self.seconds = 0.0  # spent on this student, over all runs
        self.losses: list[float] = []
        self.tests: list[dict[str, Any]] = []

    def run(self, report: Report) -> dict[str, Any]:
        """Train to the end (or on from a save); returns the seed's entry of metrics.json.

        report is told of finished epochs: {"epochs": how many since the last report, "epoch", "loss", "test"}, and now and
        then "lost", the share of the time in which other programs held the core.
        """
        save = save_file(self.path, self.seed)
        if save.is_file():
            self._load(read_torch(save))
            report({"epochs": self.epoch, "epoch": self.epoch})
        saved = began = time.monotonic()
        spent = self.seconds
        watch = threads.Watch(torch.get_num_threads())
        while self.epoch < self.lessons.epochs:
            self._train_epoch()
            if self.epoch % self.config.eval_every == 0 or self.epoch == self.lessons.epochs:
                self.tests.append({"epoch": self.epoch, **self._test()})
            accuracy = self.tests[-1]["top1"] if self.tests else math.nan
            told = {"epochs": 1, "epoch": self.epoch, "loss": self.losses[-1], "test": accuracy}
            if self.device.type == "cpu" and (lost := watch.lost()) is not None:
                told["lost"] = lost
            report(told)
            self.seconds = spent + time.monotonic() - began
            if time.monotonic() - saved > SAVE_SECONDS and self.epoch < self.lessons.epochs:
                write_torch(save, self._state())
                saved = time.monotonic()
        write_safetensors(self.path / Metrics.student_name(self.seed), self.student.state_dict())
        best = max(self.tests, key=lambda test: test["top1"])
        last = self.tests[-1]
        return {
            "last": last["top1"],
            "best": best["top1"],
            "best_epoch": best["epoch"],
            "top5": last["top5"],
            "per_class": last["per_class"],
            "losses": [round(loss, 6) for loss in self.losses],
            "tests": [{k: t[k] for k in ("epoch", "top1", "top5")} for t in self.tests],
        }

    def _state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "seconds": self.seconds,
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "losses": self.losses,
            "tests": self.tests,
        }

    def _load(self, state: dict[str, Any]) -> None:
        with resumable(f"the saved state of student {self.seed}"):
            self.epoch, self.losses, self.tests = int(state["epoch"]), list(state["losses"]), list(state["tests"])
            self.seconds = float(state["seconds"])
            self.student.load_state_dict(state["student"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])

    def _train_epoch(self) -> None:
        config, epochs = self.config, self.lessons.epochs
        rate = learning_rate(config.lr, self.epoch, epochs, config.eta)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        seeding.seed_all(self.seed, "student epoch", self.epoch)  # dropout draws from the global generator
        self.student.train()
        usual = int(np.diff(self.lessons.offsets).max())
        seen = torch.zeros((), device=self.device)
        for x, labels in self.lessons.epoch(self.epoch):
            for low, high in parts(len(x), usual, config.accumulation):
                scores = self._scores(x[low:high])
                loss = self._loss(scores.float(), labels, low, high) / config.accumulation
                self.scaler.scale(loss).backward()
                seen += loss.detach() * ((high - low) * config.accumulation)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
        self.epoch += 1
        self.losses.append(float(seen) / int(self.lessons.offsets[-1]))
        if not math.isfinite(self.losses[-1]):
            raise UserError(
                f"the loss of student {self.seed} is not finite in epoch {self.epoch} at learning rate {rate:.3g}: lower lr"
            )

    def _scores(self, x: Tensor) -> Tensor:
        try:
            with autocast(self.device, self.config.precision):
                return self.student(x)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"a part of {len(x)} image leaves student {self.config.model} one value per channel for its BatchNorm; "
                f"take accumulation below {self.config.accumulation}, larger batches or more images per class"
            ) from error

    def _loss(self, scores: Tensor, labels: Tensor | tuple[Tensor, Tensor, float], low: int, high: int) -> Tensor:
        if isinstance(labels, Tensor):
            return soft_loss(scores, labels[low:high], self.config.temperature)
        own, partner, share = labels
        loss = F.cross_entropy(scores, own[low:high])
        return loss if share == 0 else (1 - share) * loss + share * F.cross_entropy(scores, partner[low:high])

    @torch.inference_mode()
    def _test(self) -> dict[str, Any]:
        """Accuracies in percent over the whole test set: top1, top5 (None below 10 classes), per_class."""
        self.student.eval()
        classes = len(self.test.classes)
        five = 5 if classes >= 10 else 1
        hits = torch.zeros(classes, dtype=torch.int64, device=self.device)
        near = torch.zeros((), dtype=torch.int64, device=self.device)
        for first in range(0, len(self.test), self.config.test_batch):
            rows = np.arange(first, min(first + self.config.test_batch, len(self.test)))
            x = self.test.tensor(rows, device=self.device).contiguous(memory_format=torch.channels_last)
            targets = self.test.targets(rows, device=self.device)
            with autocast(self.device, self.config.precision):
                scores = self.student(x)
            ranked = scores.float().topk(five, dim=1).indices == targets[:, None]
            hits += torch.bincount(targets[ranked[:, 0]], minlength=classes)
            near += ranked.any(dim=1).sum()
        counts = self.test.counts()
        correct = hits.cpu().numpy()
        return {
            "top1": round(100 * int(correct.sum()) / len(self.test), 4),
            "top5": round(100 * int(near) / len(self.test), 4) if five == 5 else None,
            "per_class": [round(100 * int(h) / int(n), 4) if n else None for h, n in zip(correct, counts, strict=True)],
        }


def learning_rate(lr: float, epoch: int, epochs: int, eta: float) -> float:
    """lr(e) = (1 + cos(pi e / (E eta))) / 2 * lr: eta 1 ends at 0, eta 2 at half of lr."""
    return half_cosine(epoch, epochs * eta) * lr


def soft_loss(scores: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """KL(softmax(t/T) || softmax(s/T)), mean over the batch; scores and labels are logits [n, K]."""
    student = F.log_softmax(scores / temperature, dim=1)
    return F.kl_div(student, F.softmax(labels / temperature, dim=1), reduction="batchmean")


def parts(count: int, usual: int, accumulation: int) -> list[tuple[int, int]]:
    """Row ranges of a batch of `count`: slices of ceil(usual / accumulation); a single left-over row joins the one before.

    The released loop: each slice is one forward pass (with its own BN statistics), a short last batch has fewer slices.
    """
    size = max(1, -(-usual // accumulation))
    bounds = [*range(0, count, size), count]
    if len(bounds) > 2 and bounds[-1] - bounds[-2] == 1 and size > 1:
        del bounds[-2]
    return list(zip(bounds, bounds[1:], strict=False))


def part_sizes(offsets: np.ndarray, accumulation: int) -> set[int]:
    """Images in the parts of all batches."""
    counts = [int(count) for count in np.diff(offsets)]
    return {high - low for count in set(counts) for low, high in parts(count, max(counts), accumulation)}


def result_file(path: Path, seed: int) -> Path:
    """Where a finished student of the artifact at `path` leaves {"result": its entry of metrics.json, "seconds"}."""
    return path / STATE / f"student-{seed}.json"


def save_file(path: Path, seed: int) -> Path:
    """Where an unfinished student of the artifact at `path` saves what resuming needs."""
    return path / STATE / f"student-{seed}.pt"


def arguments(
    config: EvaluateConfig, path: Path, dataset: Dataset, images: Images, labels: Labels | None, seed: int
) -> dict[str, Any]:
    """What `train` needs, as JSON takes it."""
    return {
        "config": config_dict(config) | {"device": config.device},
        "path": str(path),
        "dataset": str(dataset.path),
        "images": str(images.path),
        "labels": None if labels is None else str(labels.path),
        "seed": seed,
    }


def train(given: Mapping[str, Any], report: Report) -> dict[str, Any]:
    """Train the student that `arguments` describes, and leave its result in `result_file`, which is returned.

    Raises UserError as stages.evaluate does.
    """
    config, path, seed = _config(given["config"]), Path(given["path"]), int(given["seed"])
    lessons, test = _material(json.dumps({k: given[k] for k in ("config", "dataset", "images", "labels")}))
    with repeatable():
        training = Training(config, path, lessons, test, seed)
        found = {"result": training.run(report), "seconds": round(training.seconds, 3)}
    sync_folder(path / Metrics.STUDENTS)
    write_json(result_file(path, seed), found)
    save_file(path, seed).unlink(missing_ok=True)
    return found


def _config(values: Mapping[str, Any]) -> EvaluateConfig:
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return EvaluateConfig(**given)


@functools.lru_cache(maxsize=1)
def _material(given: str) -> tuple[Lessons, ImageSet]:
    """Lessons and test images, which the seeds of one row share."""
    wanted = json.loads(given)
    dataset, images = Dataset.load(wanted["dataset"]), Images.load(wanted["images"])
    labels = Labels.load(wanted["labels"]) if wanted["labels"] else None
    lessons, _ = prepare(_config(wanted["config"]), dataset, images, labels)
    return lessons, load_split(dataset, "test")
