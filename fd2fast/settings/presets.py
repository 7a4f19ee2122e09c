"""Named settings of whole runs (`fd2fast run --preset NAME`) and reading settings from TOML files."""

from __future__ import annotations

import dataclasses
import re
import stat
import tomllib
from pathlib import Path
from typing import Any

from fd2fast.errors import UserError, nearest
from fd2fast.settings.config import (
    DataConfig,
    DistillConfig,
    EvaluateConfig,
    PatchesConfig,
    PretrainConfig,
    RelabelConfig,
    RunConfig,
)
from fd2fast.settings.ranges import fill
from fd2fast.system.causes import of_reading

_TEACHERS = ("ResNet18", "MobileNetV2", "ResNet50", "DenseNet121")


def _paper(dataset: str, *, ipc: tuple[int, ...], epochs: int, methods: tuple[str, ...]) -> RunConfig:
    """The paper's protocol for one of its data sets (input 224, students ResNet-18 and ResNet-50, T 20, eta 2)."""
    return RunConfig(
        out=Path("runs") / dataset,
        teachers=_TEACHERS,
        methods=methods,
        ipc=ipc,
        students=("ResNet18", "ResNet50"),
        data=DataConfig(dataset=dataset, size=224),
        pretrain=PretrainConfig(weights="hub"),
        patches=PatchesConfig(per_class=max(ipc)),
        distill=DistillConfig(),
        relabel=RelabelConfig(epochs=epochs),
        evaluate=EvaluateConfig(),
    )


_PAPER_METHODS = ("rded", "sre2l++", "sre2l++_fd2", "fadrm+", "fadrm+_fd2")

# A ResNet-10 of half width whose last map is 4 x 4 at 64 pixels: small enough to train from scratch on two cores.
# 31 million products an image of 64 x 64, of which the stem at 32 x 32 pixels takes 12 and the last stage 5
_SMALL = "timm:resnet10t,channels=32x64x128x128,output_stride=16,stem_width=16"


def _typefaces() -> RunConfig:
    """The main job: the whole way on the built-in set, from scratch, some minutes on two cores without a GPU."""
    return RunConfig(
        out=Path("runs/typefaces"),
        teachers=(_SMALL,),
        methods=("random", "random:soft", "rded", "sre2l++", "sre2l++_fd2"),
        ipc=(2,),
        students=(_SMALL,),
        data=DataConfig(dataset="typefaces", size=64, classes=20, train_per_class=200, test_per_class=50),
        pretrain=PretrainConfig(
            epochs=10,
            batch_size=32,
            # Eq. 6 as written: the released crop and drop views cost three times as much
            attention_views=False,
            optimizer="adamw",
            lr=4e-3,
            weight_decay=0.05,
            schedule="cosine",
            warmup=1.0,
            alpha=0.3,
            # the set itself varies colours, angle, size and place: with more of it so few epochs learn less
            flip=0.0,
            rotation=0.0,
            color_jitter=(0.0, 0.0, 0.0, 0.0),
            min_crop=1.0,
            eval_every=5,
        ),
        patches=PatchesConfig(per_class=2, crops=3, pool=60, min_crop=0.3),
        # few iterations need a smaller rate than the 0.25 of 4,000
        distill=DistillConfig(iterations=(300,), lr=0.1),
        relabel=RelabelConfig(epochs=120, batch_size=10),
        evaluate=EvaluateConfig(lr=3e-3, eta=1.0, batch_size=10, accumulation=1, eval_every=40),
    )


PRESETS: dict[str, RunConfig] = {
    "typefaces": _typefaces(),
    **{name: _paper(name, ipc=(1, 3, 5), epochs=400, methods=_PAPER_METHODS) for name in ("cub", "aircraft", "cars")},
    **{
        name: _paper(name, ipc=(1, 10, 50), epochs=300, methods=("rded", "fadrm+", "fadrm+_fd2"))
        for name in ("imagenette", "imagewoof")
    },
}


def preset(name: str) -> RunConfig:
    """The settings called `name`; UserError with the nearest known name otherwise."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}: {nearest(name, PRESETS)}")
    return PRESETS[name]


# Most bytes of a file of settings.
_MOST_BYTES = 1 << 20

# Iterations of a quick run whose settings leave them to the method (2,000 to 6,000).
_QUICK_ITERATIONS = 600


def quick(config: RunConfig) -> RunConfig:
    """The same rows for a first look: half of the teachers' epochs, a third of all other work, one student a row.

    The third is of iterations and of the epochs of labels and students. Written to a folder of its own, the name of `out` with
    "-quick" behind it, so that it never meets the full run. Data set, methods, networks and images per class stay.
    """
    replace = dataclasses.replace
    pretrain, distill, evaluate = config.pretrain, config.distill, config.evaluate
    epochs = _part(pretrain.epochs, 2)
    given = distill.iterations or (3 * _QUICK_ITERATIONS,)
    return replace(
        config,
        out=config.out.with_name(f"{config.out.name}-quick"),
        pretrain=replace(
            pretrain,
            epochs=epochs,
            # lies within the epochs
            backbone_epochs=min(pretrain.backbone_epochs // 2, epochs - 1),
            warmup=pretrain.warmup / 2,
            duration=pretrain.duration / 2,
        ),
        # at least one for each phase of the method that has most
        distill=replace(distill, iterations=tuple(max(_part(n, 3), min(n, 4)) for n in given)),
        relabel=replace(config.relabel, epochs=_part(config.relabel.epochs, 3)),
        evaluate=replace(
            evaluate,
            seeds=evaluate.seeds[:1],
            epochs=None if evaluate.epochs is None else _part(evaluate.epochs, 3),
        ),
    )


def _part(count: int, parts: int) -> int:
    return max(1, count // parts)


def from_toml(path: Path, default: Any) -> Any:
    """`default` with the values of a TOML file; tables are nested settings. UserError names an unknown key or a wrong value."""
    text = _text(Path(path))
    try:
        values = tomllib.loads(text)
    except RecursionError as error:
        raise UserError(f"{path} is not TOML of settings: it is nested too deeply") from error
    except ValueError as error:  # also numbers and dates out of range
        told = str(error)
        if (found := re.search(r"at line (\d+)", told)) and int(found[1]) <= len(lines := text.splitlines()):
            told += f": {lines[int(found[1]) - 1].strip()[:80]!r}"
        if path.suffix.lower() in (".json", ".yaml", ".yml", ".ini", ".py"):
            told += f"; {path.suffix} files are not read, write the settings as TOML"
        raise UserError(f"{path} is not TOML: {told}") from error
    return fill(default, values, str(path))


def _text(path: Path) -> str:
    """The text of a file of settings in UTF-8 or, with a byte-order mark, UTF-16; UserError that says what it is instead."""
    try:
        kind = path.stat()
        if stat.S_ISDIR(kind.st_mode):
            raise UserError(f"{path} is a folder; wanted a TOML file of settings")
        # what a shell hands over (<(...), /dev/stdin) has an end; a pipe on disk may never have a writer
        handed_over = path.absolute().parts[:2] in (("/", "dev"), ("/", "proc"))
        if not stat.S_ISREG(kind.st_mode) and not (stat.S_ISFIFO(kind.st_mode) and handed_over):
            raise UserError(f"{path} is no regular file (a pipe or device); wanted a TOML file of settings")
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{path} is missing") from error
        raise UserError(f"{path} cannot be read: {of_reading(path, error)}") from error
    if len(content) > _MOST_BYTES:
        raise UserError(f"{path} has more than {_MOST_BYTES} bytes; wanted a TOML file of settings")
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line, byte = content[: error.start].count(b"\n") + 1, content[error.start]
        name = encoding.removesuffix("-sig")
        raise UserError(
            f"{path} is not TOML: line {line} has a byte (0x{byte:02x}) that is not {name}; save it as UTF-8"
        ) from error
    if "\0" in text:
        raise UserError(
            f"{path} is not TOML: it holds zero bytes (UTF-16 without its mark, or no text); save it as UTF-8"
        )
    return text
