"""Frozen settings of every stage, from which the command line is made; None means: from the method, data set or teacher.

The comment above a field is its help text: unit, meaning, source. Its type says which values it may have; `wrong_settings`
checks them. Fields marked `_runtime` do not change the result and are not part of an artifact's identity; of those marked
`_place`, the content of what lies there is.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Interval, MinLen

from fd2fast.settings.ranges import (
    AnySeed,
    Area,
    Below1,
    Count,
    Counts,
    Name,
    Names,
    NotNegative,
    Place,
    Positive,
    Seed,
    Seeds,
    Share,
    Weight,
    misfits,
)

# Pixels. Crops are kept as 16-bit numbers.
SMALLEST_SIDE, LARGEST_SIDE = 8, 2**15 - 1
Side = Annotated[int, Interval(ge=SMALLEST_SIDE, le=LARGEST_SIDE), "a whole number of pixels within [8, 32767]"]
_Pixels = Annotated[NotNegative, "a whole number of pixels, at least 0"]
# Of pixels in [0, 1].
_Deviation = Annotated[float, Interval(ge=1e-6, le=1), "a number within [1e-06, 1]"]
_Jitter = Annotated[
    tuple[Weight, Weight, Weight, Annotated[float, Interval(ge=0, le=0.5)]],
    "4 finite numbers of at least 0, the last (hue) at most 0.5",
]
_Rotation = Annotated[float, Interval(ge=0, le=180), "a number of degrees within [0, 180]"]
_PerClass = Annotated[Count, "a whole number of images per class, at least 1"]
# Of images of a batch that can be mixed or normalised, and of classes.
Two = Annotated[Count, Ge(2), "a whole number of at least 2"]

DATASETS = ("typefaces", "cub", "aircraft", "cars", "imagenette", "imagewoof", "folder")


def _runtime(default: Any) -> Any:
    return field(default=default, metadata={"result": False})


def _added(default: Any) -> Any:
    """An option that came later: not part of the identity at its default, so that earlier results keep theirs."""
    return field(default=default, metadata={"added": True})


def _place() -> Any:
    return field(default=None, metadata={"place": True})


@dataclass(frozen=True)
class DataConfig:
    """Which images, at which size."""

    # Data set: typefaces (built in), cub, aircraft, cars, imagenette, imagewoof or folder (train/CLASS/*, test/CLASS/*).
    dataset: Name = "typefaces"
    # Folder that holds the data set in its official layout; typefaces need none.
    root: Place | None = _place()
    # Side of the square every image is resized to, pixels (squashed, bilinear with antialiasing).
    size: Side = 64
    # A file that is no readable image: stop and name it, or skip it and list it in the manifest.
    bad_images: Literal["error", "skip"] = "error"
    # EXIF orientation of photos: ignore it, as torchvision does (the data set is then trained on as stored), or apply it.
    exif: Literal["ignore", "apply"] = _added("ignore")
    # aircraft: which of its three levels is the class: variant (100), family (70) or manufacturer (30).
    level: Literal["variant", "family", "manufacturer"] = _added("variant")
    # Channel means in [0, 1]; None: the known value of the data set, else measured on the training images.
    mean: tuple[Share, Share, Share] | None = None
    # Channel standard deviations; None: as for the mean.
    std: tuple[_Deviation, _Deviation, _Deviation] | None = None
    # typefaces: number of faces.
    classes: Two = 20
    # typefaces: training images of each class.
    train_per_class: Count = 60
    # typefaces: test images of each class (other words than in training).
    test_per_class: Count = 30
    # typefaces: folder searched for .ttf, .otf and .woff2 files; None: the faces that come with matplotlib.
    fonts: Place | None = _place()
    # typefaces: seed of the generator.
    seed: AnySeed = 0


@dataclass(frozen=True)
class PretrainConfig:
    """Train one teacher: backbone + CAL head + class prototypes (Eq. 4-8)."""

    # Backbone: ResNet18, ResNet50, DenseNet121, MobileNetV2, ShuffleNetV2 or timm:NAME[,key=value...] (any CNN with BatchNorm).
    model: Name = "ResNet18"
    # Starting weights: a local .pth or .safetensors file, "hub" to fetch ImageNet weights by name, None: from scratch.
    weights: Annotated[Name, "a file or hub"] | None = _place()
    # Attention maps M; None: the paper's value for this data set and backbone (App. Table 3), else 8.
    attention_maps: Count | None = None
    # Share of the CAL branch in the losses, alpha of Eq. 8 and 11; None: as attention_maps, else 0.5.
    alpha: Share | None = None
    # Prototype momentum mu of Eq. 5.
    mu: Area = 0.05
    # Prototypes of the centre loss; both are kept. ema: c <- (1-mu) c + mu Norm(z), started at the class's first Norm(z) (paper).
    # last: c <- c + mu (z - Norm(c)), started at 0 (released code; equals mu times the class's last z).
    prototype_rule: Literal["ema", "last"] = "ema"
    # Weight eta of the centre loss in Eq. 6.
    center_weight: Weight = 1.0
    # Passes over the training images.
    epochs: Count = 51
    # Of these, epochs at the start that train the backbone branch alone: from scratch it learns faster without the CAL branch.
    backbone_epochs: NotNegative = 0
    # Images of one step (the attention crop and drop add twice as many).
    batch_size: Count = 4
    # Attention crop and drop views (CAL); off makes a step three times cheaper.
    attention_views: bool = True
    # Optimiser over backbone and head.
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    # Learning rate at the start.
    lr: Positive = 1e-3
    # SGD momentum.
    momentum: Below1 = 0.9
    # Weight decay.
    weight_decay: Weight = 1e-5
    # step: lr * rate^(epoch/duration) (released). cosine: half a cosine down to 0 with a linear warm-up.
    schedule: Literal["step", "cosine"] = "step"
    # Factor of the step schedule.
    rate: Positive = 0.9
    # Epochs over which the factor acts.
    duration: Positive = 2.0
    # Epochs of linear warm-up (cosine schedule).
    warmup: Weight = 0.0
    # Label smoothing of the cross entropies.
    label_smoothing: Below1 = 0.0
    # Probability of a horizontal flip.
    flip: Share = 0.5
    # Colour jitter: brightness, contrast, saturation, hue.
    color_jitter: _Jitter = (0.2, 0.2, 0.2, 0.1)
    # Largest rotation to either side, degrees.
    rotation: _Rotation = 15.0
    # Smallest area share of a random resized crop; 1 takes the whole image (released).
    min_crop: Area = 1.0
    # Epochs between evaluations on the test images; the last epoch is always evaluated.
    eval_every: Count = 10
    # Which weights are kept: the last epoch's or the best evaluated epoch's.
    keep: Literal["last", "best"] = "last"
    # Arithmetic: fp32, or autocast to bf16 or fp16 (norms and losses stay in fp32); auto: bf16 where it is fast.
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    # Seed of initialisation, order and augmentation.
    seed: AnySeed = 0
    # Device, e.g. cpu or cuda:0; auto takes a GPU when there is one.
    device: Name = _runtime("auto")


@dataclass(frozen=True)
class PatchesConfig:
    """Cut real crops and let the teacher pick: the initial images (RDED)."""

    # Cells along one side: 1 keeps the best single crop, 2 makes a 2 x 2 mosaic.
    factor: Literal[1, 2] = 2
    # Initial images of each class.
    per_class: _PerClass = 5
    # Random crops tried on each training image.
    crops: Count = 5
    # Training images of each class that are searched; None: as many as the smallest class has.
    pool: Count | None = None
    # Smallest area share of a crop.
    min_crop: Area = 0.08
    # Seed of the crops.
    seed: AnySeed = 0
    # Device.
    device: Name = _runtime("auto")


@dataclass(frozen=True)
class DistillConfig:
    """Optimise the synthetic images. `method` and `semantics` fill every field that is None (see fd2fast/methods)."""

    # How the images are made: one of the methods listed above.
    method: Name = "sre2l++_fd2"
    # paper: as the paper describes FD2. released: as the published code computes it.
    semantics: Name = "paper"
    # Images per class.
    ipc: _PerClass = 1
    # Classes optimised as one batch, whose BN statistics are matched together; None: 100, or all when there are fewer. Of methods
    # that match within a class: images of that class; None: all.
    segment_size: Count | None = None
    # Most segments in one step; None: what memory and speed allow. The plan is recorded, because rounding depends on it.
    segments_per_step: Count | None = None
    # Iterations of each phase; one number for a method of several phases is shared out evenly.
    iterations: Counts | None = None
    # Image side of each phase, pixels.
    sizes: Annotated[tuple[Side, ...], MinLen(1), "a list of at least one side, each 8 to 32767 pixels"] | None = None
    # Share of the image kept at the start of every later phase; the rest is the initial image again (FADRM's residual); 1: none.
    residual: Share | None = None
    # Learning rate of Adam on the pixels; falls as half a cosine over all phases.
    lr: Positive | None = None
    # Adam's betas.
    betas: tuple[Below1, Below1] = (0.5, 0.9)
    # Adam's epsilon.
    adam_eps: Positive = 1e-8
    # Weight of the BN-statistic loss.
    r_bn: Weight | None = None
    # Extra factor on the first BN layer.
    first_bn_multiplier: Weight = 10.0
    # all: weighted sum over teachers in every iteration. round_robin: one teacher per iteration.
    teacher_schedule: Literal["all", "round_robin"] | None = None
    # Teachers drawn for each image id; None: 2 for cvdd, else all.
    teachers_per_image: Count | None = None
    # Committee weights: equal, or prior = softmax(accuracy in percent / 5) (CV-DD); None: prior for cvdd, else equal.
    teacher_weights: Literal["equal", "prior"] | None = None
    # Start from patches, real images or Gaussian noise.
    init: Literal["patches", "real", "noise"] | None = None
    # One random resized crop and flip per segment and iteration.
    augment: bool | None = None
    # Smallest area share of that crop.
    min_crop: Area = 0.08
    # Largest roll along both axes, pixels; None: 32 at 224, 4 at 64 and below, in proportion between.
    jitter: _Pixels | None = None
    # FD2: constraints L_F and L_S, and L_cls in place of the cross entropy.
    fd2: bool | None = None
    # Prototypes of L_F: ema, used as they are (paper), or last (released); see PretrainConfig.prototype_rule.
    prototypes: Literal["ema", "last"] | None = None
    # Share of the CAL branch in L_cls; None: each teacher's own.
    alpha: Share | None = None
    # lambda of Eq. 12: weight of L_F, and 1 - lambda of L_S.
    lam: Share | None = None
    # beta of Eq. 9: share of the own prototype.
    beta: Share = 0.5
    # Images of a class that repel each other's attention, N_S.
    group_size: Annotated[Count, "a whole number of images (N_S), at least 1"] = 4
    # epsilon of the normalised distance.
    eps: Positive = 1e-6
    # Keep the base method's cross entropy beside L_cls (Eq. 12 read literally).
    keep_base_ce: bool = False
    # L_S is dropped in iterations in which it is below this value (released); None: never.
    ls_threshold: float | None = None
    # View of the finished images whose attention is the prior: clean, or cropped and flipped once (released).
    prior_view: Literal["clean", "augmented"] | None = None
    # Which patch starts an image: its own id's, or one drawn at random (released).
    patch_choice: Literal["id", "random"] | None = None
    # File format of the distilled images; the prior is read back from these files.
    save_format: Literal["png", "jpg"] | None = None
    # To 8 bits by rounding or by truncation (released).
    quantize: Literal["round", "truncate"] | None = None
    # Arithmetic of the teacher: fp64 for parity, fp32, tf32 (fp32 with a GPU's TF32 convolutions, which is what the reference
    # computes there), bf16, fp16; auto: bf16 where it is fast, else fp32.
    precision: Literal["auto", "fp64", "fp32", "tf32", "bf16", "fp16"] = "auto"
    # Seed of initial images, crops, flips and rolls.
    seed: Seed = 0
    # Iterations between saves of unfinished steps; None: about every 30 seconds.
    save_every: Annotated[Count, "a whole number of iterations, at least 1"] | None = _runtime(None)
    # Most memory that a step may take, GB; None: what is free.
    memory_limit: Annotated[Positive, "a finite number of GB above 0"] | None = _runtime(None)
    # Device.
    device: Name = _runtime("auto")


@dataclass(frozen=True)
class RelabelConfig:
    """Soft labels for every augmented view a student will see (FKD)."""

    # Images per class: the first ids of the distilled set; None: all of them.
    ipc: _PerClass | None = None
    # Epochs of labels; the student trains as many.
    epochs: Count = 300
    # Images of one batch (batch-specific labels depend on it); None: 20 or all of fewer, or the next even divisor of the set.
    batch_size: Two | None = None
    # batch: teacher in train mode on half batches ("batch-specific soft labels"). eval: teacher in eval mode.
    teacher_mode: Literal["batch", "eval"] = "batch"
    # Branch that labels: backbone (paper) or cal.
    source: Literal["backbone", "cal"] = "backbone"
    # Smallest area share of the per-image crop.
    min_crop: Area = 0.08
    # Mix pairs of images: cutmix or none.
    mix: Literal["cutmix", "none"] = "cutmix"
    # Beta(a, a) of the mixing share.
    mix_alpha: Positive = 1.0
    # Probability of a horizontal flip.
    flip: Share = 0.5
    # Weights of the teachers' logits: equal, or prior = softmax(accuracy in percent / 10).
    teacher_weights: Literal["equal", "prior"] = "equal"
    # Seed of order, crops and mixing.
    seed: AnySeed = 42
    # Device.
    device: Name = _runtime("auto")


@dataclass(frozen=True)
class EvaluateConfig:
    """Train students from scratch on the distilled images and test them on the real test images."""

    # Student: any of the teacher's model names (without CAL head), any other timm classifier (timm:NAME[,key=value...]: ViT,
    # Swin, ConvNeXt, Mixer ...; no BatchNorm is needed) or torchvision classifier (torchvision:NAME[,key=value...]).
    model: Name = "ResNet18"
    # soft: the stored labels (KL divergence). hard: the class (cross entropy), as for the selection baselines.
    labels: Literal["soft", "hard"] = "soft"
    # Images per class: the first ids of the distilled set; None: as many as were labelled, or all.
    ipc: _PerClass | None = None
    # Epochs; None: as many as were labelled, or 300 for hard labels.
    epochs: Count | None = None
    # Hard labels without a label store: images of one batch, as in RelabelConfig.
    batch_size: Two | None = None
    # Hard labels without a label store: smallest area share of the per-image crop.
    min_crop: Area = 0.08
    # Hard labels without a label store: mix pairs of images, cutmix or none; the classes are mixed by area.
    mix: Literal["cutmix", "none"] = "cutmix"
    # Hard labels without a label store: Beta(a, a) of the mixing share.
    mix_alpha: Positive = 1.0
    # Hard labels without a label store: probability of a horizontal flip.
    flip: Share = 0.5
    # Hard labels without a label store: seed of order, crops and mixing.
    seed: AnySeed = 42
    # One student per seed of initialisation.
    seeds: Seeds = (0, 1, 2)
    # Temperature of the KL divergence.
    temperature: Positive = 20.0
    # AdamW learning rate; transformers often need a lower one.
    lr: Positive = 1e-3
    # AdamW weight decay, on tensors of two or more dimensions.
    weight_decay: Weight = 1e-5
    # lr(e) = (1 + cos(pi e / (E eta))) / 2 * lr.
    eta: Positive = 2.0
    # Each batch is split into so many optimiser-step parts whose gradients are added.
    accumulation: Count = 2
    # Epochs between tests; the last epoch is always tested.
    eval_every: Count = 10
    # Images of one test batch.
    test_batch: Count = 64
    # Arithmetic of the student: fp32, or autocast to bf16 or fp16; auto: bf16 where it is fast.
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    # Device.
    device: Name = _runtime("auto")


@dataclass(frozen=True)
class RunConfig:
    """The whole way: data set, teachers, patches, then every method distilled, labelled and evaluated, and a report."""

    # Output folder; run the same command again to resume.
    out: Place = Path("runs/typefaces")
    # Teachers' backbones; methods with one teacher take the first.
    teachers: Names = ("ResNet18",)
    # Methods, in the order of the table. Random, herding and kcenter are labelled by their classes, all others by the teachers;
    # NAME:soft or NAME:hard says otherwise.
    methods: Names = ("random", "rded", "sre2l++", "sre2l++_fd2")
    # Images per class: one or several; smaller sets are the first ids of the largest.
    ipc: Annotated[Counts, "a list of at least one number of images per class, each at least 1"] = (1,)
    # Students' backbones.
    students: Names = ("ResNet18",)
    # The data set.
    data: DataConfig = DataConfig()
    # How teachers are trained (model is taken from --teachers).
    pretrain: PretrainConfig = PretrainConfig()
    # How initial images are cut (factor is the method's own).
    patches: PatchesConfig = PatchesConfig()
    # How images are distilled (method and ipc are taken from --methods and --ipc).
    distill: DistillConfig = DistillConfig()
    # How soft labels are made.
    relabel: RelabelConfig = RelabelConfig()
    # How students are trained (model is taken from --students).
    evaluate: EvaluateConfig = EvaluateConfig()


def replace(config: Any, **changes: Any) -> Any:
    """dataclasses.replace, here so that callers need one import."""
    return dataclasses.replace(config, **changes)


# What must hold between fields: the one that is wrong, the one that its limit comes from, the limit, the test, in words.
_BETWEEN: dict[type, tuple[tuple[str, str, Callable[[Any], Any], Callable[[Any, Any], bool], str], ...]] = {
    PretrainConfig: (
        ("backbone_epochs", "epochs", lambda epochs: epochs, operator.lt, "below epochs"),
        ("warmup", "epochs", lambda epochs: epochs, operator.le, "at most epochs"),
    ),
    PatchesConfig: (("pool", "factor", lambda factor: factor**2, operator.ge, "at least factor^2"),),
}


def wrong_settings(config: Any, stage: str) -> list[str]:
    """What is wrong with settings by themselves, a line for each field: "STAGE.FIELD must be WANTED, got VALUE"."""
    wrong = misfits(config)
    for name, by, limit_of, holds, wanted in _BETWEEN.get(type(config), ()):
        value = getattr(config, name)
        if not {name, by} & wrong.keys() and value is not None:
            limit = limit_of(getattr(config, by))
            if not holds(value, limit):
                wrong[name] = f"must be {wanted} = {limit}, got {value!r}"
    return [f"{stage}.{one.name} {wrong[one.name]}" for one in dataclasses.fields(config) if one.name in wrong]
