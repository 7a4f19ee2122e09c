"""A user's own layout on disk: known by its name from Python and the command line, and checked."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fd2fast
from fd2fast import cli
from fd2fast.data import layouts
from fd2fast.data.prepare import faults
from fd2fast.errors import UserError


@pytest.fixture(autouse=True)
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layouts, "_registered", {})


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """One folder of files SPLIT-CLASS-N.png."""
    folder, random = tmp_path / "flat", np.random.default_rng(0)
    folder.mkdir()
    for name in ("train-ant-0", "train-ant-1", "train-bee-0", "test-ant-0", "test-bee-0"):
        Image.fromarray(random.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


def by_name(root: Path) -> fd2fast.Listing:
    splits = {"train": fd2fast.Split(), "test": fd2fast.Split()}
    for file in sorted(root.glob("*.png")):
        split, name, _ = file.stem.split("-")
        splits[split].files.append(file)
        splits[split].labels.append(("ant", "bee").index(name))
    return fd2fast.Listing(root, ["ant", "bee"], splits["train"], splits["test"])


def test_a_registered_layout_is_used(tmp_path: Path, flat: Path) -> None:
    fd2fast.register_dataset("flat", by_name)
    data = fd2fast.datasets(tmp_path / "a", dataset="flat", root=flat, size=9)
    assert (data.classes, data.facts.per_class) == (["ant", "bee"], {"train": [2, 1], "test": [1, 1]})
    assert (
        cli.main(["datasets", "--dataset", "flat", "--root", str(flat), "--size", "9", "--out", f"{tmp_path}/b"]) == 0
    )
    assert fd2fast.tensors(tmp_path / "b")[0].equal(fd2fast.tensors(data)[0])
    assert data.id == fd2fast.datasets(tmp_path / "b", dataset="flat", root=flat, size=9).id


def test_its_name_is_listed(flat: Path) -> None:
    fd2fast.register_dataset("flat", by_name)
    (fault,) = faults(fd2fast.api.settings_of.DataConfig(dataset="flut", root=flat))
    assert "did you mean 'flat'?" in fault
    assert fault.endswith("folder, flat")
    (fault,) = faults(fd2fast.api.settings_of.DataConfig(dataset="flat"))
    assert "needs a root" in fault


@pytest.mark.parametrize("name", ["", " a", "a/b", "a:b", None])
def test_names_that_cannot_be(name: object) -> None:
    with pytest.raises(ValueError, match="must be one word"):
        fd2fast.register_dataset(name, by_name)  # type: ignore[arg-type]


def test_names_that_are_taken() -> None:
    fd2fast.register_dataset("flat", by_name)
    for name in ("flat", "cub", "typefaces"):
        with pytest.raises(ValueError, match=f"there is a data set '{name}' already"):
            fd2fast.register_dataset(name, by_name)
    with pytest.raises(TypeError, match="must be a function of a folder, got a str"):
        fd2fast.register_dataset("other", "layout")  # type: ignore[arg-type]


def listing(root: Path, **changes: object) -> fd2fast.Listing:
    file = root / "train-ant-0.png"
    split = fd2fast.Split([file, file], [0, 1])
    return fd2fast.Listing(**({"root": root, "classes": ["a", "b"], "train": split, "test": split} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: {"train": []}, "must return a Listing, got a dict"),
        (lambda root: listing(root, classes=["a", "a"]), "class names that are different strings"),
        (lambda root: listing(root, train=fd2fast.Split([root], [])), "lists 1 training images with 0 labels"),
        (lambda root: listing(root, test=fd2fast.Split(["x.png"], [0])), "must list images as paths, got 'x.png'"),
        (lambda root: listing(root, test=fd2fast.Split([root / "x"], [2])), r"must be in \[0, 2\), got 2"),
        (lambda root: listing(root, test=fd2fast.Split([root / "x"], [0])), "no test images in class 'b'"),
    ],
)
def test_layouts_that_contradict_themselves(tmp_path: Path, flat: Path, make: object, message: str) -> None:
    fd2fast.register_dataset("broken", make)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        fd2fast.datasets(tmp_path / "d", dataset="broken", root=flat, size=9)
