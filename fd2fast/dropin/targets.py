"""The data sets that the published recover scripts know by name, and those that a user describes in a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fd2fast.dropin.recovery import Target
from fd2fast.errors import UserError, nearest

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Known:
    """A data set with the accuracies (percent) of the teachers that vote by them."""

    target: Target
    accuracies: Mapping[str, float]


def _known(
    name: str,
    classes: int,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    accuracies: Mapping[str, float] | None = None,
) -> Known:
    return Known(Target(name, classes, size, mean, std, 32 if size == 224 else 4), accuracies or {})


def _five(r18: float, r50: float, snv2: float, mbv2: float, dn121: float) -> dict[str, float]:
    return {"ResNet18": r18, "ResNet50": r50, "ShuffleNetV2": snv2, "MobileNetV2": mbv2, "Densenet121": dn121}


# Of the FD2 code.
FINE_GRAINED = {
    one.target.name: one
    for one in (
        _known("SC_imsize64", 196, 64, (0.4706, 0.4601, 0.4549), (0.2750, 0.2754, 0.2837)),
        _known("CUB_imsize64", 200, 64, (0.4857, 0.4994, 0.4326), (0.2150, 0.2107, 0.2483)),
        _known("A_imsize64", 100, 64, (0.4865, 0.5178, 0.5425), (0.2012, 0.1947, 0.2280)),
        _known("SC_imsize224", 196, 224, (0.4708, 0.4601, 0.4551), (0.2885, 0.2879, 0.2962)),
        _known(
            "CUB_imsize224",
            200,
            224,
            (0.4857, 0.4994, 0.4326),
            (0.2260, 0.2215, 0.2595),
            {"ResNet18": 70.2, "ResNet50": 73.4, "MobileNetV2": 69.6, "Densenet121": 76.6},
        ),
        _known("A_imsize224", 100, 224, (0.4865, 0.5177, 0.5425), (0.2124, 0.2051, 0.2375)),
    )
}
# Of the CV-DD code; FADRM's has the same but cifar10, and imagewoof.
GENERAL = {
    one.target.name: one
    for one in (
        _known(
            "cifar100", 100, 32, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), _five(64, 60.6, 51.6, 59.4, 56.4)
        ),
        _known(
            "cifar10", 10, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), _five(63, 65.3, 68.5, 67.6, 67.4)
        ),
        _known("imagenet1k", 1000, 224, *_IMAGENET, _five(56.4, 42.3, 52.5, 44.2, 40.6)),
        _known("imagenet-nette", 10, 224, *_IMAGENET, _five(62.4, 52, 57.2, 54, 60.8)),
        _known("imagewoof", 10, 224, *_IMAGENET),
        _known("tiny_imagenet", 200, 64, *_IMAGENET, _five(46.5, 28.3, 43.6, 44.8, 41.5)),
    )
}


def target_of(name: str, known: Mapping[str, Known], described: str | None) -> Known:
    """The data set of this name, or as described in a JSON file; UserError for a name that is not known and a faulty file."""
    if described is not None:
        return _described(name, Path(described).expanduser())
    if name not in known:
        raise UserError(
            f"dataset not supported: {name!r}; {nearest(name, known)}, or --fd2fast_dataset FILE for one of your own"
        )
    return known[name]


def _described(name: str, path: Path) -> Known:
    told: Any
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        kept = Target(
            name,
            int(told["classes"]),
            int(told["size"]),
            tuple(float(v) for v in told["mean"]),
            tuple(float(v) for v in told["std"]),
            int(told["jitter"]) if "jitter" in told else (32 if int(told["size"]) == 224 else 4),
        )
        accuracies = {str(k): float(v) for k, v in told.get("accuracies", {}).items()}
    except OSError as error:
        raise UserError(f"--fd2fast_dataset {path} cannot be read: {error.strerror}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"--fd2fast_dataset {path} must hold classes, size, mean, std and may hold jitter and accuracies: {error}"
        ) from error
    if kept.classes < 1 or kept.size < 8 or len(kept.mean) != 3 or len(kept.std) != 3 or min(kept.std) <= 0:
        raise UserError(f"--fd2fast_dataset {path}: wanted 1 class or more, 8 pixels or more, 3 means, 3 positive stds")
    if not 0 <= kept.jitter:
        raise UserError(f"--fd2fast_dataset {path}: jitter must be 0 or more, got {kept.jitter}")
    return Known(kept, accuracies)
