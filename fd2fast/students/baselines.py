"""Selection baselines: real images or patches picked instead of distilled ones (random, herding, k-center, RDED)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from fd2fast.artifacts import Dataset, Patches, TeacherArtifact
from fd2fast.data.pixels import read_image
from fd2fast.data.store import ImageSet, load_split
from fd2fast.data.views import images_at_once
from fd2fast.errors import UserError, nearest
from fd2fast.models.teacher import load_teacher
from fd2fast.seeding import numpy_generator
from fd2fast.system.progress import track

Picker = Callable[[np.ndarray, int], np.ndarray]


def select(
    method: str,
    ipc: int,
    dataset: Dataset,
    teacher: TeacherArtifact | None,
    patches: Patches | None,
    seed: int,
    device: torch.device | str,
) -> np.ndarray:
    """`ipc` images of every class, uint8 [K, ipc, 3, S, S]; a smaller ipc gives the first images of a larger one.

    random: drawn without replacement, a function of (seed, class). herding and kcenter: see the functions of these names, on
    the final feature map of the teacher's backbone, averaged over its positions, of clean training images. rded: the
    patches with the ids 0..ipc-1. Only random depends on the seed.

    Raises UserError for classes with too few images, a missing or unfitting teacher or patches, features that are not finite.
    """
    if ipc < 1:
        raise UserError(f"ipc must be at least 1, got {ipc}")
    if method == "rded":
        return _from_patches(ipc, dataset, patches)
    pickers: dict[str, Picker] = {"herding": herding, "kcenter": kcenter}
    if method != "random" and method not in pickers:
        raise UserError(f"baseline {method!r} is unknown; {nearest(method, ['random', *pickers, 'rded'])}")
    train = load_split(dataset, "train")
    train.require(ipc, f"{method} at IPC {ipc}")
    if method == "random":
        chosen = [
            numpy_generator(seed, "random", label).permutation(train.of_class(label))[:ipc]
            for label in range(len(train.classes))
        ]
    else:
        chosen = _by_features(pickers[method], method, ipc, train, dataset, teacher, device)
    return np.stack([train.pixels(rows).numpy() for rows in chosen])


def herding(features: np.ndarray, count: int) -> np.ndarray:
    """Indices int64 [count] whose running mean stays nearest the mean of all features [n, C] (Welling 2009, greedy).

    Pick m is the image not yet picked that brings the mean of the first m picks nearest (Euclidean) to the mean of the
    class; of equals the first.
    """
    features = np.asarray(features, np.float64)
    mean = features.mean(0)
    total = np.zeros_like(mean)
    picked: list[int] = []
    for m in range(1, count + 1):
        distance = np.linalg.norm((total + features) / m - mean, axis=1)
        distance[picked] = np.inf
        picked.append(int(distance.argmin()))
        total += features[picked[-1]]
    return np.array(picked, np.int64)


def kcenter(features: np.ndarray, count: int) -> np.ndarray:
    """Indices int64 [count] by greedy k-center (Gonzalez 1985) over features [n, C], Euclidean.

    Starts at the image nearest the mean; then always the image farthest from all picked ones; of equals the first.
    """
    from sklearn.metrics.pairwise import euclidean_distances

    features = np.asarray(features, np.float64)
    # distances do not change, and near the origin they cancel less
    features = features - features.mean(0)
    picked = [int(np.linalg.norm(features, axis=1).argmin())]
    gap = np.full(len(features), np.inf)
    while len(picked) < count:
        last = picked[-1]
        gap = np.minimum(gap, euclidean_distances(features, features[last : last + 1])[:, 0])
        gap[picked] = -1  # equal images lie 0 apart, yet none is picked twice
        picked.append(int(gap.argmax()))
    return np.array(picked, np.int64)


def _by_features(
    pick: Picker,
    method: str,
    ipc: int,
    train: ImageSet,
    dataset: Dataset,
    teacher: TeacherArtifact | None,
    device: torch.device | str,
) -> list[np.ndarray]:
    if teacher is None:
        raise UserError(f"{method} compares features of a teacher and none was given: pretrain one first")
    teacher.must_fit(dataset)
    backbone = load_teacher(teacher, device).backbone
    chosen = []
    for label in track(range(len(train.classes)), method, unit="class"):
        rows = train.of_class(label)
        step = images_at_once(train.size)
        with torch.inference_mode():
            features = torch.cat(
                [
                    backbone.features(
                        train.tensor(rows[i : i + step], device=device).contiguous(memory_format=torch.channels_last)
                    ).mean((2, 3))
                    for i in range(0, len(rows), step)
                ]
            )
        if not bool(torch.isfinite(features).all()):
            raise UserError(f"teacher {teacher.path} gives features that are not finite for {train.classes[label]}")
        chosen.append(rows[pick(features.cpu().numpy(), ipc)])
    return chosen


def _from_patches(ipc: int, dataset: Dataset, patches: Patches | None) -> np.ndarray:
    if patches is None:
        raise UserError("rded takes its images from patches and none were given: make them first")
    patches = Patches.of(patches)
    patches.must_fit(dataset)
    held = patches.facts.per_class
    if held < ipc:
        raise UserError(
            f"{patches.path} holds {held} patches of each class, IPC {ipc} needs {ipc}: make patches with per_class {ipc}"
        )
    out = np.empty((len(dataset.classes), ipc, 3, dataset.size, dataset.size), np.uint8)
    for label in range(len(dataset.classes)):
        for image_id in range(ipc):
            path = patches.image(label, image_id)
            pixels = read_image(path).numpy()
            if pixels.shape != out.shape[2:]:
                raise UserError(f"{path} must be {list(out.shape[2:])}, got {list(pixels.shape)}")
            out[label, image_id] = pixels
    return out
