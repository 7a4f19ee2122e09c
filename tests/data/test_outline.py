"""Data sets from outside: counts before a picture is read, and classes that have too few."""

import pytest
from model_tools import make_dataset

from fd2fast.data.outline import Outline, outline_of, outline_on_disk
from fd2fast.errors import UserError
from fd2fast.settings.config import DataConfig


def test_a_folder_is_counted_without_reading_a_picture(tmp_path):
    for split, counts in (("train", (3, 1)), ("test", (1, 2))):
        for name, count in zip(("auk", "bee"), counts, strict=True):
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                (tmp_path / split / name / f"{number}.jpg").write_text("no picture")
    found = outline_on_disk(DataConfig(dataset="folder", root=tmp_path, size=48))
    assert found == Outline("folder", 48, ("auk", "bee"), (3, 1), (1, 2))
    assert found.least == 1
    assert found.short(1, "herding") == []
    assert found.short(2, "herding at IPC 2") == [
        "herding at IPC 2 needs 2 training images of each class; too few in: bee (1)"
    ]


def test_many_short_classes_are_counted():
    names = tuple(f"class {k}" for k in range(30))
    (fault,) = Outline("folder", 8, names, (2,) * 30, (1,) * 30).short(3, "random")
    assert "class 7 (2) and 22 more" in fault


def test_a_prepared_set_says_the_same(tmp_path):
    found = outline_of(make_dataset(tmp_path / "d", per_class=(4, 2, 5), test=3, size=16))
    assert found == Outline("folder", 16, ("class 0", "class 1", "class 2"), (4, 2, 5), (3, 3, 3))


def test_typefaces_are_settings(tmp_path):
    found = outline_on_disk(DataConfig(classes=3, train_per_class=7, test_per_class=2))
    assert (len(found.classes), found.train, found.test) == (3, (7, 7, 7), (2, 2, 2))
    with pytest.raises(UserError, match="data.fonts .* is no folder"):
        outline_on_disk(DataConfig(fonts=tmp_path / "none"))
