"""A data set from arrays in memory: the artifact, its identity, and an error for everything that is none."""

from pathlib import Path

import numpy as np
import pytest
import torch

import fd2fast
from fd2fast.data.prepare import measure
from fd2fast.errors import UserError

SIDE = 8


def pictures(count: int, seed: int = 0, side: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, 3, S, S] and labels of three classes."""
    images = np.random.default_rng(seed).integers(0, 256, (count, 3, side, side), dtype=np.uint8)
    return images, np.arange(count) % 3


TRAIN, TEST = pictures(12), pictures(6, 1)


def test_arrays_come_back(tmp_path: Path) -> None:
    data = fd2fast.dataset_from_arrays(tmp_path / "d", *TRAIN, test=TEST, classes=["ant", "bee", "cat"], name="insects")
    assert (data.classes, data.size, data.facts.name) == (["ant", "bee", "cat"], SIDE, "insects")
    assert data.facts.per_class == {"train": [4, 4, 4], "test": [2, 2, 2]}
    assert (data.mean, data.std) == measure(TRAIN[0])
    for split, given in (("train", TRAIN), ("test", TEST)):
        images, labels = fd2fast.tensors(tmp_path / "d", split)
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        np.testing.assert_array_equal(images, given[0])
        np.testing.assert_array_equal(labels, given[1])
    normalised, _ = fd2fast.tensors(data, normalised=True)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (data.mean, data.std))
    torch.testing.assert_close(normalised, (torch.from_numpy(TRAIN[0]) / 255 - mean) / std)
    data.verify()


@pytest.mark.parametrize(
    "given",
    [
        TRAIN[0].transpose(0, 2, 3, 1),
        torch.from_numpy(TRAIN[0]),
        torch.from_numpy(TRAIN[0]) / 255,
        TRAIN[0].astype(np.float64) / 255,
        torch.from_numpy(TRAIN[0]).permute(0, 2, 3, 1).double() / 255,
    ],
    ids=["channels last", "tensor", "float tensor", "float64 array", "float64 tensor, channels last"],
)
def test_every_kind_of_array_is_the_same_data_set(tmp_path: Path, given: object) -> None:
    first = fd2fast.dataset_from_arrays(tmp_path / "a", *TRAIN, test=TEST)
    other = fd2fast.dataset_from_arrays(tmp_path / "b", given, TRAIN[1].tolist(), test=TEST)
    assert first.id == other.id
    again = fd2fast.dataset_from_arrays(tmp_path / "a", given, torch.from_numpy(TRAIN[1]), test=TEST)
    assert (again.id, again.manifest["measured"]) == (first.id, first.manifest["measured"])  # taken as it is


def test_other_content_is_refused(tmp_path: Path) -> None:
    first = fd2fast.dataset_from_arrays(tmp_path / "d", *TRAIN, test=TEST)
    changed = TRAIN[0].copy()
    changed[5, 1, 2, 3] ^= 1
    with pytest.raises(UserError, match="made from something else: arrays memory"):
        fd2fast.dataset_from_arrays(tmp_path / "d", changed, TRAIN[1], test=TEST)
    with pytest.raises(UserError, match="other settings: config.name was 'arrays', now 'mine'"):
        fd2fast.dataset_from_arrays(tmp_path / "d", *TRAIN, test=TEST, name="mine")
    second = fd2fast.dataset_from_arrays(tmp_path / "d", changed, TRAIN[1], test=TEST, overwrite=True)
    assert second.id != first.id


def test_images_are_squashed_like_those_of_files(tmp_path: Path) -> None:
    from PIL import Image

    large = np.random.default_rng(0).integers(0, 256, (12, 20, 14, 3), dtype=np.uint8)
    for number, label in enumerate(TRAIN[1]):
        for split in ("train", "test"):
            folder = tmp_path / "files" / split / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(large[number]).save(folder / f"{number:02d}.png")
    from_memory = fd2fast.dataset_from_arrays(tmp_path / "a", large, TRAIN[1], test=(large, TRAIN[1]), size=10)
    from_files = fd2fast.datasets(tmp_path / "b", dataset="folder", root=tmp_path / "files", size=10)
    order = np.argsort(TRAIN[1], kind="stable")
    assert torch.equal(fd2fast.tensors(from_memory)[0][order], fd2fast.tensors(from_files)[0])
    assert (from_memory.mean, from_memory.std) == (from_files.mean, from_files.std)


def test_a_share_is_held_out(tmp_path: Path) -> None:
    data = fd2fast.dataset_from_arrays(tmp_path / "a", *TRAIN, test=0.25)
    assert data.facts.per_class == {"train": [3, 3, 3], "test": [1, 1, 1]}
    together = torch.cat([fd2fast.tensors(data, split)[0] for split in ("train", "test")]).flatten(1)
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, TRAIN[0].reshape(12, -1).tolist()))
    assert fd2fast.dataset_from_arrays(tmp_path / "b", *TRAIN, test=0.25).id == data.id
    assert fd2fast.dataset_from_arrays(tmp_path / "c", *TRAIN, test=0.25, seed=1).id != data.id
    few = fd2fast.dataset_from_arrays(tmp_path / "d", *TRAIN, test=0.99)
    assert few.facts.per_class == {"train": [1, 1, 1], "test": [3, 3, 3]}


UNIT = TRAIN[0].astype(np.float32) / 255
NAN = UNIT.copy()
NAN[7, 0, 0, 0] = np.nan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": TRAIN[0][:, 0]}, r"training images must be \[N, 3, H, W\] or \[N, H, W, 3\], got \[12, 8, 8\]"),
        ({"images": TRAIN[0][:, :1]}, r"got \[12, 1, 8, 8\]"),
        ({"images": TRAIN[0][:0], "labels": []}, "training images are none"),
        ({"images": TRAIN[0][..., :5]}, r"at least 8 pixels high and wide, got \[8, 5\]"),
        ({"images": TRAIN[0].astype(np.int64)}, "must be uint8, or floats in .0, 1., got int64"),
        ({"images": UNIT * 2 - 1}, r"must lie in \[0, 1\], got -1 to 1: undo their normalisation"),
        ({"images": NAN}, r"hold NaN or infinity, first in image 7 \(1 images\)"),
        ({"images": [[[1]], [[1, 2]]]}, "one array, got parts of different shapes"),
        ({"images": pictures(12, side=9)[0]}, "of one size, got 8 x 8 and 9 x 9: give the size"),
        ({"labels": TRAIN[1][:-1]}, "one for each of 12 images, got 11"),
        ({"labels": TRAIN[1] / 2}, r"labels must be integers \[N\], got float64 \[12\]"),
        ({"labels": TRAIN[1][:, None]}, r"got int64 \[12, 1\]"),
        ({"labels": TRAIN[1] - 1}, r"training labels must be in \[0, 2\), got -1 at index 0 \(4 outside\)"),
        ({"labels": TRAIN[1], "classes": ["a", "b"]}, r"must be in \[0, 2\), got 2 at index 2"),
        ({"labels": TRAIN[1] * 2}, "no training images of 2 of 5 classes: 1, 3"),
        ({"labels": TRAIN[1] + 10**9}, "without gaps, got 1000000002 among 12 images"),
        ({"labels": TRAIN[1] * 0}, "at least two classes, got 1"),
        ({"classes": ["a", "b", "a"]}, "must differ, got 'a' twice"),
        ({"classes": "abc"}, "must be a list of names"),
        ({"test": (TEST[0], TEST[1] * 0)}, "no test images of 2 of 3 classes: 1, 2"),
        ({"test": (TEST[0], TEST[1] + 1)}, r"test labels must be in \[0, 3\), got 3 at index 2"),
        ({"test": TEST[0][:3].tolist()}, r"pair \(images, labels\) or a share in \(0, 1\)"),
        ({"test": 1.0}, r"share in \(0, 1\), got 1.0"),
        ({"images": TRAIN[0][:4], "labels": TRAIN[1][:4], "test": 0.5}, "class 1 has one training image"),
        ({"size": 4}, "size must be 8 to 32767 pixels, got 4"),
        ({"mean": (0.5, 0.5)}, "mean must be three numbers"),
        ({"std": (0.5, 0.0, 0.5)}, "std must be three numbers"),
    ],
)
def test_what_is_no_data_set(tmp_path: Path, changes: dict, message: str) -> None:
    given = {"images": TRAIN[0], "labels": TRAIN[1], "test": TEST} | changes
    with pytest.raises(UserError, match=message):
        fd2fast.dataset_from_arrays(tmp_path / "d", **given)
    assert not (tmp_path / "d").exists()


def test_tensors_of_other_results(tmp_path: Path) -> None:
    data = fd2fast.dataset_from_arrays(tmp_path / "d", *TRAIN, test=TEST)
    with pytest.raises(UserError, match="ipc is a number of distilled images"):
        fd2fast.tensors(data, ipc=1)
    with pytest.raises(ValueError, match="split must be 'train' or 'test'"):
        fd2fast.tensors(data, "validation")
    with pytest.raises(UserError, match="does not exist"):
        fd2fast.tensors(tmp_path / "none")
