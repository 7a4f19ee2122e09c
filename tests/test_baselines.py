"""The selection baselines: greedy rules against plain loops, prefixes, classes, seeds and refusals."""

import types
from pathlib import Path

import numpy as np
import pytest
import torch
from distill_tools import make_dataset, make_patches, make_teacher
from hypothesis import given, settings
from hypothesis import strategies as st

from fd2fast.artifacts import load
from fd2fast.data.store import load_split
from fd2fast.errors import UserError
from fd2fast.models.teacher import load_teacher
from fd2fast.students.baselines import herding, kcenter, select

CLASSES, HELD = 3, 6
METHODS = ("random", "herding", "kcenter", "rded")
PICKERS = {"herding": herding, "kcenter": kcenter}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> types.SimpleNamespace:
    root = tmp_path_factory.mktemp("room")
    dataset = make_dataset(root / "dataset", CLASSES, 32, per_class=HELD)
    return types.SimpleNamespace(
        root=root,
        dataset=dataset,
        teacher=make_teacher(root / "teacher", dataset),
        patches=make_patches(root / "patches", dataset, per_class=HELD),
    )


def pick(room: types.SimpleNamespace, method: str, ipc: int, seed: int = 0) -> np.ndarray:
    return select(method, ipc, room.dataset, room.teacher, room.patches, seed, torch.device("cpu"))


def herding_by_loop(features: list[list[float]], count: int) -> list[int]:
    """Every candidate's mean written out."""
    axes = range(len(features[0]))
    mean = [sum(f[a] for f in features) / len(features) for a in axes]
    picked: list[int] = []
    while len(picked) < count:
        best, least = -1, float("inf")
        for i in range(len(features)):
            if i in picked:
                continue
            chosen = [features[j] for j in (*picked, i)]
            gap = sum((sum(f[a] for f in chosen) / len(chosen) - mean[a]) ** 2 for a in axes)
            if gap < least:
                best, least = i, gap
        picked.append(best)
    return picked


def kcenter_by_loop(features: list[list[float]], count: int) -> list[int]:
    """Every candidate's nearest centre written out."""
    axes = range(len(features[0]))
    mean = [sum(f[a] for f in features) / len(features) for a in axes]

    def gap(a: list[float], b: list[float]) -> float:
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))

    picked = [min(range(len(features)), key=lambda i: gap(features[i], mean))]
    while len(picked) < count:
        rest = [i for i in range(len(features)) if i not in picked]
        picked.append(max(rest, key=lambda i: min(gap(features[i], features[j]) for j in picked)))
    return picked


def test_herding_by_hand() -> None:
    """Mean 3: 4 is nearest; then (4+1)/2 and (4+0)/2 and (4+7)/2: 1; then (5+7)/3 = 4, (5+0)/3: 7 is nearer."""
    assert herding(np.array([[0.0], [1.0], [4.0], [7.0]]), 3).tolist() == [2, 1, 3]


def test_kcenter_by_hand() -> None:
    """Mean 3: starts at 4; farthest 0 (gap 4); then 7 (gap 3 against 1 of the 1)."""
    assert kcenter(np.array([[1.0], [0.0], [4.0], [7.0]]), 4).tolist() == [2, 1, 3, 0]


@pytest.mark.parametrize(("picker", "loop"), [(herding, herding_by_loop), (kcenter, kcenter_by_loop)])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), images=st.sampled_from([1, 3, 4, 6, 9]), channels=st.integers(1, 4))
def test_greedy_rules_equal_plain_loops(picker, loop, seed: int, images: int, channels: int) -> None:
    # not 2 images: both lie equally far from their mean, and rounding would decide
    features = np.random.default_rng(seed).normal(size=(images, channels)) + 3
    assert picker(features, images).tolist() == loop(features.tolist(), images)


@pytest.mark.parametrize("picker", PICKERS.values())
def test_equal_images_are_not_picked_twice(picker) -> None:
    features = np.ones((5, 3), np.float32) * 1e3
    assert sorted(picker(features, 5)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("method", METHODS)
def test_shape_class_and_prefix(room, method: str) -> None:
    """Each class gets different images of its own, and a smaller ipc is the beginning of a larger one."""
    all_of_them = pick(room, method, HELD)
    assert all_of_them.dtype == np.uint8
    assert all_of_them.shape == (CLASSES, HELD, 3, 32, 32)
    for ipc in (1, 2, 4):
        np.testing.assert_array_equal(pick(room, method, ipc), all_of_them[:, :ipc])
    train = load_split(room.dataset, "train")
    for label in range(CLASSES):
        own = {image.tobytes() for image in train.pixels(train.of_class(label)).numpy()}
        assert {image.tobytes() for image in all_of_them[label]} == own


@pytest.mark.parametrize("method", PICKERS)
def test_features_are_the_pooled_map_of_clean_images(room, method: str) -> None:
    train = load_split(room.dataset, "train")
    teacher = load_teacher(room.teacher, "cpu", torch.float64)
    found = pick(room, method, 3)
    for label in range(CLASSES):
        rows = train.of_class(label)
        features = [
            teacher(train.tensor([row], dtype=torch.float64)).features[0].flatten(1).mean(1).tolist() for row in rows
        ]
        loop = {"herding": herding_by_loop, "kcenter": kcenter_by_loop}[method]
        np.testing.assert_array_equal(found[label], train.pixels(rows[loop(features, 3)]).numpy())


def test_only_random_depends_on_the_seed(room) -> None:
    np.testing.assert_array_equal(pick(room, "random", 3, seed=5), pick(room, "random", 3, seed=5))
    assert not np.array_equal(pick(room, "random", 3, seed=5), pick(room, "random", 3, seed=6))
    for method in METHODS[1:]:
        np.testing.assert_array_equal(pick(room, method, 2, seed=5), pick(room, method, 2, seed=6))


def test_rded_takes_the_patches_in_order(room) -> None:
    train = load_split(room.dataset, "train")  # make_patches stores the first training images
    for label, found in enumerate(pick(room, "rded", 2)):
        np.testing.assert_array_equal(found, train.pixels(train.of_class(label)[:2]).numpy())


@pytest.mark.parametrize("method", ["random", "herding", "kcenter"])
def test_small_classes_are_named(room, method: str) -> None:
    with pytest.raises(UserError, match=r"IPC 7 needs 7 .*class 0 \(6\), class 1 \(6\)"):
        pick(room, method, HELD + 1)


def test_missing_parents_are_refused(room) -> None:
    for method in PICKERS:
        with pytest.raises(UserError, match=f"{method}.*teacher.*none was given"):
            select(method, 1, room.dataset, None, None, 0, "cpu")
    with pytest.raises(UserError, match="none were given"):
        select("rded", 1, room.dataset, room.teacher, None, 0, "cpu")
    with pytest.raises(UserError, match="holds 6 patches of each class, IPC 7 needs 7"):
        pick(room, "rded", 7)
    with pytest.raises(UserError, match="wanted patches"):
        select("rded", 1, room.dataset, None, room.teacher, 0, "cpu")
    with pytest.raises(UserError, match="at least 1, got 0"):
        pick(room, "random", 0)
    with pytest.raises(UserError, match="did you mean 'herding'"):
        pick(room, "herdin", 1)


def test_parents_of_other_classes_are_refused(room, tmp_path: Path) -> None:
    other = make_dataset(tmp_path / "other", CLASSES + 1, 32)
    with pytest.raises(UserError, match="4 against 3 entries|3 against 4 entries"):
        select("herding", 1, other, room.teacher, None, 0, "cpu")
    with pytest.raises(UserError, match="classes"):
        select("rded", 1, other, None, room.patches, 0, "cpu")


def test_features_that_are_not_finite_are_refused(room, tmp_path: Path) -> None:
    broken = make_teacher(tmp_path / "broken", room.dataset)
    teacher = load_teacher(broken)
    teacher.backbone.bn_layers()[-1][1].bias.fill_(torch.nan)
    teacher.save(broken.path / "teacher.safetensors")
    with pytest.raises(UserError, match="not finite for class 0"):
        select("kcenter", 1, room.dataset, load(broken.path), None, 0, "cpu")
