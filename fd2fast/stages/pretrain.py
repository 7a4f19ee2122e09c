"""Pretrain one teacher: backbone, CAL head and class prototypes on the real images (Eq. 4-8)."""

from __future__ import annotations

import functools
import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fd2fast import seeding
from fd2fast.artifacts import (
    STATE,
    Dataset,
    TeacherArtifact,
    TrainedTeacherFacts,
    made,
    open_stage,
    resumable,
    write_json,
)
from fd2fast.data.outline import Outline, outline_of
from fd2fast.data.pixels import normalise
from fd2fast.data.pretrain_views import crop_resize, pretrain_views
from fd2fast.data.store import ImageSet, load_split
from fd2fast.distillation.memory import beyond_memory, map_bytes
from fd2fast.entries import Entry, folder_name, short_name
from fd2fast.errors import UserError, refuse
from fd2fast.graph import Job, StageSpec
from fd2fast.models.attention_views import crop_and_drop
from fd2fast.models.backbone import build_backbone, canonical_name, hub_name, load_weights, native_size
from fd2fast.models.probe import check_weights, probe
from fd2fast.models.prototypes import Prototypes
from fd2fast.models.sight import must_see
from fd2fast.models.teacher import Teacher
from fd2fast.models.training import accelerate
from fd2fast.pictures import figure, picture, plotting, png
from fd2fast.schedules import half_cosine
from fd2fast.settings.config import PretrainConfig, RunConfig, replace, wrong_settings
from fd2fast.system import threads
from fd2fast.system.device import autocast, channels_last, device_faults, pick_device, repeatable, settle_precision
from fd2fast.system.lock import released_at_end
from fd2fast.system.progress import Progress
from fd2fast.system.sources import HUB, Source, of_file
from fd2fast.system.space import Space
from fd2fast.system.streams import plain

# (attention maps M, alpha) by data set and backbone: the paper's App. Table 3
PAPER_SETTINGS: dict[str, dict[str, tuple[int, float]]] = {
    "cub": {
        "ShuffleNetV2": (16, 0.1),
        "MobileNetV2": (16, 0.5),
        "DenseNet121": (16, 0.4),
        "ResNet18": (8, 0.5),
        "ResNet50": (8, 0.3),
    },
    "aircraft": {
        "ShuffleNetV2": (16, 0.1),
        "MobileNetV2": (16, 0.2),
        "DenseNet121": (16, 0.4),
        "ResNet18": (32, 0.3),
        "ResNet50": (32, 0.4),
    },
    "cars": {
        "ShuffleNetV2": (8, 0.1),
        "MobileNetV2": (16, 0.4),
        "DenseNet121": (32, 0.4),
        "ResNet18": (8, 0.3),
        "ResNet50": (32, 0.4),
    },
    "imagenette": {
        "ShuffleNetV2": (8, 0.3),
        "MobileNetV2": (16, 0.1),
        "DenseNet121": (32, 0.1),
        "ResNet18": (8, 0.3),
        "ResNet50": (32, 0.2),
    },
    "imagewoof": {
        "ShuffleNetV2": (16, 0.4),
        "MobileNetV2": (32, 0.1),
        "DenseNet121": (32, 0.1),
        "ResNet18": (8, 0.3),
        "ResNet50": (16, 0.2),
    },
}
OTHERWISE = (8, 0.5)
LOSSES = ("loss", "backbone", "cal", "effect", "views", "center")
_STATE = "epoch.pt"
_SHOW_EVERY = 10  # steps between readings of the losses: each waits for the device
_TEST_BATCH = 128
_PICTURES = 8


@dataclass(frozen=True)
class Resolved(PretrainConfig):
    """The settings with nothing left open."""

    attention_maps: int = OTHERWISE[0]
    alpha: float = OTHERWISE[1]


def resolve(config: PretrainConfig, dataset_name: str) -> Resolved:
    """`attention_maps` and `alpha` filled: the paper's for this data set and backbone, else 8 and 0.5."""
    name = canonical_name(config.model).removesuffix("_x0.5")
    maps, alpha = PAPER_SETTINGS.get(dataset_name, {}).get(name, OTHERWISE)
    given = {field.name: getattr(config, field.name) for field in fields(config)}
    given["attention_maps"] = maps if config.attention_maps is None else config.attention_maps
    given["alpha"] = alpha if config.alpha is None else config.alpha
    return Resolved(**given)


@released_at_end()
def run(config: PretrainConfig, out: Path | str, dataset: Dataset, *, overwrite: bool = False) -> TeacherArtifact:
    """Train a teacher on the dataset artifact's training images and measure it on its whole test set.

    Writes teacher.safetensors, attention.png (mean attention over test images, from the first epoch on), curves.json (losses
    and accuracies by epoch) and curves.png. Facts: model, attention_maps, alpha, channels, backbone_accuracy and
    cal_accuracy (percent), epoch (whose weights are kept), head_trained, weights (file, hub or None), weights_sha256 (of the
    file, or of the tensors that the hub gave), notices.
    A killed run continues after its last finished epoch and ends in the same bytes.

    Raises UserError for settings outside their range, weights or data that do not fit, and a loss that is not finite.
    """
    # what is finished needs neither its model nor its weights any more
    refuse(faults(config, None if made(out) and not overwrite else outline_of(dataset)))
    config = settled(config)
    device = pick_device(config.device)
    train, test = load_split(dataset, "train"), load_split(dataset, "test")
    for images, split in ((train, "training"), (test, "test")):
        if len(images.labels) == 0:
            raise UserError(f"{dataset.path} holds no {split} images")
    settings = resolve(config, dataset.facts.name)
    sources = _sources(config, Path(out))
    stage = open_stage(out, TeacherArtifact, config, {"dataset": dataset}, sources=sources, overwrite=overwrite)
    if stage.finished:
        return stage.finished
    with repeatable():
        trainer = _Trainer(settings, train, test, device)
        if {name: source.digest for name, source in _sources(config, stage.path).items()} != stage.inputs:
            raise UserError(f"weights {config.weights} changed while they were read: run the same command again")
        weights, weights_sha256 = _weights_facts(config, stage.inputs, trainer.teacher)
        begun = stage.restore(_STATE)
        if begun is not None:
            trainer.load_state(begun)
        steps, started = trainer.steps, time.monotonic()
        with Progress(
            f"pretrain {trainer.teacher.name.split(',')[0]}", settings.epochs * steps, done=trainer.epoch * steps
        ) as bar:
            first = trainer.epoch
            while trainer.epoch < settings.epochs:
                trainer.train_epoch(bar)
                stage.checkpoint(_STATE, trainer.state())
                if trainer.tested or trainer.epoch == 1:
                    picture(stage.path / TeacherArtifact.ATTENTION, trainer.attention_picture)
        trained = max((trainer.epoch - first) * len(train.labels), 1)
        seconds = time.monotonic() - started
        result = trainer.keep()
        trainer.teacher.save(stage.path / TeacherArtifact.WEIGHTS)
        picture(stage.path / TeacherArtifact.ATTENTION, trainer.attention_picture)
    write_json(stage.path / TeacherArtifact.CURVES, trainer.history)
    picture(stage.path / TeacherArtifact.CURVES_PICTURE, lambda: _curves(trainer.history, trainer.teacher.name))
    facts = TrainedTeacherFacts(
        model=trainer.teacher.name,
        attention_maps=trainer.teacher.attention_maps,
        alpha=trainer.alpha,
        channels=trainer.teacher.backbone.channels,
        backbone_accuracy=result["backbone_accuracy"],
        cal_accuracy=result["cal_accuracy"],
        epoch=int(result["epoch"]),
        head_trained=trainer.head_trained,
        weights=weights,
        weights_sha256=weights_sha256,
        notices=trainer.notices,
    )
    return stage.finish_like(
        dataset, facts, {"images_per_second": round(trained / max(seconds, 1e-9), 1), "device": str(device)}
    )


def faults(config: PretrainConfig, data: Outline | None = None, *, hub: bool = False) -> list[str]:
    """What is wrong with the settings, and with the model and its weights for this data set; one line each.

    hub: fetch weights by name, too (they are kept, and training finds them).
    """
    found = wrong_settings(config, "pretrain") + device_faults("pretrain", config.device)
    if found or data is None:
        return found
    rows = min(config.batch_size, sum(data.train))
    try:
        seen = probe(config.model, len(data.classes), data.size)
        if config.weights and (hub or config.weights != "hub"):
            check_weights(config.model, len(data.classes), config.weights)
        with_head = resolve(config, data.name).alpha != 0
        check_teacher(config.model, len(data.classes), data.size, rows, with_head=with_head)
    except UserError as error:
        return [f"pretrain of {config.model}: {error}"]
    needed = rows * seen.kept * map_bytes(config.precision)
    return found + beyond_memory(f"pretrain.batch_size {config.batch_size} with {config.model}", needed, config.device)


def settled(config: PretrainConfig) -> PretrainConfig:
    """The settings as the artifact records them."""
    return settle_precision(config)


def space(config: PretrainConfig, data: Outline) -> Space:
    """Bytes on disk: the teacher, at most beside two saves of it with its optimiser and its best epoch."""
    size = probe(config.model, len(data.classes), data.size).size
    return Space(size, size * (1 + 2 * (4 if config.optimizer != "sgd" else 3)))


@functools.lru_cache(maxsize=64)
def check_teacher(name: str, classes: int, size: int, smallest_batch: int = 2, *, with_head: bool = True) -> None:
    """UserError unless the teacher `name` can be built, see images of size x size and train on so few of them at once.

    Takes a fraction of a second to seconds, once for equal arguments; the random streams are as before.
    """
    with torch.random.fork_rng(devices=[]):
        backbone = build_backbone(name, classes, size)
        net = Teacher(backbone, 1, alpha=0, size=size) if with_head else backbone
        must_see(name, net, size, native=native_size(name), training=1 if smallest_batch == 1 else 0)


def learning_rate(config: PretrainConfig, epoch: int, step: int, steps: int) -> float:
    """The rate of a step: lr * rate^(epoch / duration), or a half cosine to 0 after a linear warm-up (per step)."""
    if config.schedule == "step":
        return config.lr * config.rate ** (epoch / config.duration)
    done = epoch + step / steps
    if done < config.warmup:
        return config.lr * min(1.0, (done + 1 / steps) / config.warmup)
    share = (done - config.warmup) / max(config.epochs - config.warmup, 1e-9)
    return config.lr * half_cosine(min(share, 1.0), 1.0)


def batches(count: int, batch_size: int, order: Tensor) -> list[Tensor]:
    """`order` cut into batches; a last single image joins the batch before, as batch statistics of one image are none."""
    parts = list(order[:count].split(batch_size))
    if len(parts) > 1 and len(parts[-1]) == 1 and batch_size > 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts


class _Trainer:
    """The teacher in training: everything an epoch changes is in `state()`."""

    def __init__(self, config: Resolved, train: ImageSet, test: ImageSet, device: torch.device):
        self.config, self.train, self.test, self.device = config, train, test, device
        self.alpha = config.alpha
        self.head_trained = config.alpha > 0
        seeding.seed_all(config.seed, "pretrain", "init")
        backbone = build_backbone(config.model, len(train.classes), train.size)
        self.notices = load_weights(backbone, config.weights) if config.weights else []
        if not self.head_trained:
            self.notices.append("alpha is 0: the CAL head and the prototypes are as initialised")
        self.teacher = Teacher(backbone, config.attention_maps, alpha=config.alpha, size=train.size)
        channels_last(self.teacher.to(device))
        accelerate(self.teacher)
        seen = torch.zeros(len(train.classes), dtype=torch.bool, device=device)
        self.prototypes = Prototypes(self.teacher.prototypes_ema, self.teacher.prototypes_last, seen, config.mu)
        # groups of their own: the head's momentum may begin later than the backbone's
        parts: list[torch.nn.Module] = [backbone, self.teacher.head] if self.head_trained else [backbone]
        self.optimizer = _optimizer(config, [{"params": list(part.parameters())} for part in parts])
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.steps = len(batches(len(train.labels), config.batch_size, torch.arange(len(train.labels))))
        self.labels = torch.from_numpy(train.labels).to(device)
        self.watch = threads.Watch(torch.get_num_threads()) if device.type == "cpu" else None
        self.epoch = 0
        self.history: list[dict[str, float | int]] = []
        self.best: dict[str, Any] | None = None

    @property
    def tested(self) -> bool:
        """Whether the last finished epoch was tested."""
        return bool(self.history) and "backbone_accuracy" in self.history[-1]

    def state(self) -> dict[str, Any]:
        """What the next epochs depend on."""
        return {
            "epoch": self.epoch,
            "teacher": self.teacher.state_dict(),
            "seen": self.prototypes.seen,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": self.history,
            "best": self.best,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state()` gave; UserError if it is of another model or version."""
        with resumable(f"the saved state of teacher {self.teacher.name}"):
            self.epoch = state["epoch"]
            self.teacher.load_state_dict(state["teacher"])
            self.prototypes.seen.copy_(state["seen"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.history, self.best = state["history"], state["best"]

    def train_epoch(self, bar: Progress) -> None:
        """One pass over the training images, and a test where one is due."""
        config, epoch = self.config, self.epoch
        self.teacher.train()
        order = torch.randperm(
            len(self.train.labels), generator=seeding.generator(config.seed, "pretrain", "order", epoch)
        )
        sums = torch.zeros(len(LOSSES) + 1, device=self.device, dtype=torch.float64)
        lr = config.lr
        for step, chosen in enumerate(batches(len(order), config.batch_size, order)):
            lr = learning_rate(config, epoch, step, self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            values = self._step(chosen, epoch, step)
            sums += values * len(chosen)
            shown: dict[str, float | str] = {}
            if self.device.type == "cpu" or step % _SHOW_EVERY == 0:
                now = values.tolist()
                self._must_be_finite(now[0], lr)
                names = [n for n in LOSSES if self._applies(n, epoch)]
                shown = {"epoch": f"{epoch + 1}/{config.epochs}", **{n: now[LOSSES.index(n)] for n in names}}
                shown |= self._accuracies()
            bar.step(1, **shown)
            if self.watch is not None:
                self.watch.look()
        means = (sums / len(order)).tolist()
        self._must_be_finite(means[0], lr)
        self.epoch += 1
        record: dict[str, float | int] = {"epoch": self.epoch, "lr": lr}
        record |= {name: means[i] for i, name in enumerate(LOSSES) if self._applies(name, epoch)}
        record["train_accuracy"] = 100 * means[-1]
        if self.epoch % config.eval_every == 0 or self.epoch == config.epochs:
            record["backbone_accuracy"], record["cal_accuracy"] = self.accuracy()
        self.history.append(record)
        if config.keep == "best" and self.tested:
            score = max(record["backbone_accuracy"], record["cal_accuracy"] if self.head_trained else 0.0)
            if self.best is None or score > self.best["score"]:
                weights = {key: value.detach().clone() for key, value in self.teacher.state_dict().items()}
                self.best = {"score": score, "epoch": self.epoch, "teacher": weights}

    def _cal_trains(self, epoch: int) -> bool:
        return self.head_trained and epoch >= self.config.backbone_epochs

    def _applies(self, loss: str, epoch: int) -> bool:
        if loss in ("loss", "backbone"):
            return True
        return self._cal_trains(epoch) and (loss != "views" or self.config.attention_views)

    def _accuracies(self) -> dict[str, str]:
        tested = [record for record in self.history if "backbone_accuracy" in record]
        if not tested:
            return {}
        return {"test": f"{tested[-1]['backbone_accuracy']:.1f}/{tested[-1]['cal_accuracy']:.1f}%"}

    def _must_be_finite(self, loss: float, lr: float) -> None:
        if not math.isfinite(loss):
            raise UserError(
                f"pretrain {self.teacher.name}: the loss became {loss} in epoch {self.epoch + 1} at learning rate {lr:.3g}; "
                "choose a lower --lr, a longer --warmup or --precision fp32 (and --overwrite, or another folder)"
            )

    def _step(self, chosen: Tensor, epoch: int, step: int) -> Tensor:
        """One optimiser step on the images `chosen`; the values of LOSSES and the accuracy, fp64, on the device."""
        config = self.config
        seeding.seed_all(config.seed, "pretrain", "step", epoch, step)  # dropout and the counterfactual attention
        views = seeding.generator(config.seed, "pretrain", "views", epoch, step)
        images = pretrain_views(self.train.unit(chosen, device=self.device), config, views)
        x = normalise(images, self.train.mean, self.train.std).contiguous(memory_format=torch.channels_last)
        labels = self.labels[chosen.to(self.device)]
        self.optimizer.zero_grad(set_to_none=True)
        loss, parts, logits = self._losses(x, labels, epoch, step)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        hit = (logits.detach().argmax(1) == labels).double().mean()
        zero = torch.zeros((), device=self.device)
        values = [loss, *(parts.get(name, zero) for name in LOSSES[1:]), hit]
        return torch.stack([value.detach().double() for value in values])

    def _losses(self, x: Tensor, labels: Tensor, epoch: int, step: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Eq. 8 on normalised images x [B, 3, S, S]: the loss, its terms by name, the backbone's logits."""
        config, teacher = self.config, self.teacher

        def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(logits.float(), targets, label_smoothing=config.label_smoothing)

        with autocast(self.device, config.precision):
            features = teacher.backbone.features(x)
            logits = teacher.backbone.logits(features)
        parts = {"backbone": cross_entropy(logits, labels)}
        if not self._cal_trains(epoch):
            return parts["backbone"], parts, logits
        with autocast(self.device, config.precision):
            raw = teacher.head(features, "random")
        assert raw.effect_logits is not None
        target = self.prototypes.center_target(raw.z, labels, config.prototype_rule)
        parts["cal"] = cross_entropy(raw.logits, labels)
        parts["center"] = (raw.z - target).square().sum(1).mean()
        self.prototypes.update(raw.z, labels)
        effect, effect_labels = raw.effect_logits, labels
        if config.attention_views:
            draws = torch.rand(
                len(x), 4, generator=seeding.generator(config.seed, "pretrain", "attention", epoch, step)
            )
            boxes, kept = crop_and_drop(raw.attention.detach(), draws, (x.shape[2], x.shape[3]))
            views = torch.cat([crop_resize(x, boxes), x * kept]).contiguous(memory_format=torch.channels_last)
            with autocast(self.device, config.precision):
                seen = teacher.head(teacher.backbone.features(views), "random")
            assert seen.effect_logits is not None
            twice = labels.repeat(2)
            parts["views"] = cross_entropy(seen.logits, twice)
            effect, effect_labels = torch.cat([effect, seen.effect_logits]), labels.repeat(3)
        parts["effect"] = cross_entropy(effect, effect_labels)
        if config.attention_views:  # the released weights of raw, and of crop and drop together
            cal = parts["cal"] / 3 + parts["effect"] + parts["views"] * 2 / 3
        else:
            cal = parts["cal"] + parts["effect"]
        cal = cal + config.center_weight * parts["center"]
        return (1 - self.alpha) * parts["backbone"] + self.alpha * cal, parts, logits

    @torch.no_grad()
    def accuracy(self) -> tuple[float, float]:
        """Top-1 of the backbone branch and of the CAL branch (p_raw, raw view) on the whole test set, percent, fp32."""
        self.teacher.eval()
        hits = torch.zeros(2, device=self.device, dtype=torch.float64)
        count = len(self.test.labels)
        for chosen in torch.arange(count).split(_TEST_BATCH):
            x = self.test.tensor(chosen, device=self.device).contiguous(memory_format=torch.channels_last)
            labels = torch.from_numpy(self.test.labels[chosen.numpy()]).to(self.device)
            out = self.teacher(x)
            hits += torch.stack([(p.argmax(1) == labels).sum() for p in (out.logits, out.cal_logits)])
        self.teacher.train()
        backbone, cal = (100 * hits / count).tolist()
        return backbone, cal

    def keep(self) -> dict[str, float | int]:
        """Put the weights to keep into the teacher; the record of their epoch."""
        epoch = self.epoch
        if self.best is not None:
            self.teacher.load_state_dict(self.best["teacher"])
            epoch = self.best["epoch"]
        record = self.history[epoch - 1]
        self.teacher.accuracy = float(record["backbone_accuracy"])
        return record

    @torch.no_grad()
    @plotting()
    def attention_picture(self) -> bytes:
        """PNG: test images of different classes, and over them their mean attention."""
        labels = torch.from_numpy(self.test.labels)
        firsts = [int((labels == k).nonzero()[0]) for k in labels.unique().tolist()]
        chosen = torch.tensor(firsts)[torch.linspace(0, len(firsts) - 1, min(_PICTURES, len(firsts))).long()]
        self.teacher.eval()
        x = self.test.tensor(chosen, device=self.device)
        attention = self.teacher(x.contiguous(memory_format=torch.channels_last)).attention.mean(1, keepdim=True)
        self.teacher.train()
        large = (
            F.interpolate(attention.float(), size=x.shape[2:], mode="bilinear", align_corners=False)[:, 0].cpu().numpy()
        )
        pixels = self.test.unit(chosen).permute(0, 2, 3, 1).numpy()
        drawn = figure(1.5 * len(chosen), 3.4)
        for column, index in enumerate(chosen.tolist()):
            top = drawn.add_subplot(2, len(chosen), column + 1)
            top.imshow(pixels[column])
            top.set_title(plain(self.test.classes[int(labels[index])], 16), fontsize=8, parse_math=False)
            low = drawn.add_subplot(2, len(chosen), len(chosen) + column + 1)
            low.imshow(pixels[column])
            low.imshow(large[column], cmap="jet", alpha=0.5)
            for axes in (top, low):
                axes.set_axis_off()
        drawn.subplots_adjust(left=0.01, right=0.99, top=0.9, bottom=0.01, wspace=0.05, hspace=0.05)
        return png(drawn, 100)


def _optimizer(config: PretrainConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if config.optimizer == "sgd":
        return torch.optim.SGD(
            groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
        )
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr, weight_decay=config.weight_decay, fused=True)


def _sources(config: PretrainConfig, out: Path) -> dict[str, Source]:
    """The starting weights: a file by its hash, the hub's by their name there; until an epoch is done they may be others."""
    if not config.weights:
        return {}
    if config.weights == HUB:
        source = Source(HUB, f"hub:{hub_name(config.model)}")
    else:
        missing = f"weights {config.weights}: there is no such file; wanted a .pth or .safetensors file, or 'hub'"
        source = of_file(str(config.weights), missing)
    return {"weights": replace(source, resumes=not (out / STATE / _STATE).is_file())}


def _weights_facts(
    config: PretrainConfig, inputs: Mapping[str, str], teacher: Teacher
) -> tuple[str | None, str | None]:
    """What the weights were, wherever they lie, and their hash; of the hub's, by the tensors as they were loaded."""
    if not config.weights:
        return None, None
    if config.weights != HUB:
        return "file", inputs["weights"]
    sha = hashlib.sha256()
    for name, value in sorted(teacher.backbone.net.state_dict().items()):
        if not name.startswith(f"{teacher.backbone.head}."):
            sha.update(name.encode() + value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return HUB, sha.hexdigest()


@plotting()
def _curves(history: list[dict[str, float | int]], name: str) -> bytes:
    drawn = figure(9, 3.4)
    losses, accuracies = drawn.subplots(1, 2)
    for loss in LOSSES:
        if rows := [r for r in history if loss in r]:
            losses.plot([r["epoch"] for r in rows], [r[loss] for r in rows], label=loss)
    for key, label in (
        ("train_accuracy", "train, backbone"),
        ("backbone_accuracy", "test, backbone"),
        ("cal_accuracy", "test, CAL"),
    ):
        rows = [r for r in history if key in r]
        accuracies.plot(
            [r["epoch"] for r in rows], [r[key] for r in rows], label=label, marker="." if len(rows) < 30 else ""
        )
    for axes, title in ((losses, f"{plain(name, 60)}: losses"), (accuracies, "accuracy, %")):
        axes.set_title(title, fontsize=9, parse_math=False)
        axes.set_xlabel("epoch")
        axes.legend(fontsize=7)
    drawn.tight_layout()
    return png(drawn, 100)


def _jobs(run: RunConfig, entries: Sequence[Entry]) -> Iterator[Job]:
    for name in run.teachers:
        yield _job(replace(run.pretrain, model=name))


def _job(config: PretrainConfig) -> Job:
    return Job(
        f"teacher {short_name(config.model)}",
        f"teachers/{folder_name(config.model)}",
        config,
        key=config.model,
        faults=lambda data, hub: faults(config, data, hub=hub),
        settled=lambda data: settled(config),
        space=lambda data: space(config, data),
    )


SPEC = StageSpec(run, _jobs, faults)
