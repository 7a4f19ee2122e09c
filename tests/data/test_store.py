"""The prepared arrays as batches, and refusal of arrays that contradict their manifest."""

import numpy as np
import pytest
import torch

from fd2fast.artifacts import Artifact, open_stage, write_npy
from fd2fast.data.pixels import normalise
from fd2fast.data.store import load_split
from fd2fast.errors import UserError
from fd2fast.settings.config import DataConfig

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


@pytest.fixture
def dataset(tmp_path) -> Artifact:
    stage = open_stage(tmp_path / "set", "dataset", DataConfig(), {})
    random = np.random.default_rng(0)
    for split, labels in (("train", [0, 2, 2, 1, 0]), ("test", [2, 1, 0])):
        write_npy(stage.path / f"{split}_images.npy", random.integers(0, 256, (len(labels), 3, 8, 8), dtype=np.uint8))
        write_npy(stage.path / f"{split}_labels.npy", np.array(labels))
    return stage.finish(classes=["a", "b", "c"], size=8, mean=MEAN, std=STD, facts={"train": 5, "test": 3})


def test_batches(dataset: Artifact) -> None:
    train = load_split(dataset, "train")
    assert (len(train), train.size, train.mean, train.std, train.name) == (5, 8, MEAN, STD, "train")
    assert isinstance(train.images, np.memmap)
    assert not train.images.flags.writeable
    raw = torch.from_numpy(np.load(dataset.file("train_images.npy")))
    for indices in ([3, 0, 3], np.array([3, 0, 3]), torch.tensor([3, 0, 3])):
        batch = train.pixels(indices)
        assert torch.equal(batch, raw[[3, 0, 3]])
        batch.zero_()  # a copy: the file is not touched
        assert torch.equal(train.tensor(indices), normalise(raw[[3, 0, 3]], MEAN, STD))
        assert train.targets(indices).tolist() == [1, 0, 1]
    assert train.tensor([1], dtype=torch.float64).dtype == torch.float64
    assert train.unit([0, 1]).max() <= 1
    assert train.pixels([]).shape == (0, 3, 8, 8)


def test_classes_and_counts(dataset: Artifact) -> None:
    train = load_split(dataset, "train")
    assert [train.of_class(k).tolist() for k in range(3)] == [[0, 4], [3], [1, 2]]
    assert train.counts().tolist() == [2, 1, 2]
    train.require(1, "this")
    with pytest.raises(UserError, match=r"3 x 3 mosaics needs 2 train images of each class; too few in: b \(1\)"):
        train.require(2, "3 x 3 mosaics")
    with pytest.raises(ValueError, match=r"\[0, 3\), got 3"):
        train.of_class(3)


def test_contradictions_are_refused(dataset: Artifact) -> None:
    with pytest.raises(ValueError, match="split"):
        load_split(dataset, "validation")  # type: ignore[arg-type]
    labels = dataset.path / "test_labels.npy"
    for wrong, message in (
        (np.array([0, 1]), r"int64 \[3\], got int64 \[2\]"),
        (np.array([0.0, 1, 2]), "got float64"),
        (np.array([0, 1, 3]), r"outside \[0, 3\): 0 to 3"),
    ):
        write_npy(labels, wrong)
        with pytest.raises(UserError, match=message):
            load_split(dataset, "test")
    labels.write_bytes(b"junk")
    with pytest.raises(UserError, match="not a readable array"):
        load_split(dataset, "test")
    labels.unlink()
    with pytest.raises(UserError, match="missing"):
        load_split(dataset, "test")
    write_npy(dataset.path / "train_images.npy", np.zeros((5, 3, 8, 9), np.uint8))
    with pytest.raises(UserError, match=r"uint8 \[5, 3, 8, 8\], got uint8 \[5, 3, 8, 9\]"):
        load_split(dataset, "train")
    with pytest.raises(UserError, match="wanted a dataset"):
        load_split(Artifact(dataset.path, {**dataset.manifest, "kind": "teacher"}), "train")
