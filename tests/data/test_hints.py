"""A folder that is not the data set that was wanted: the message says which folder or file would be right."""

import unicodedata
from pathlib import Path

import pytest

from fd2fast.data import hints
from fd2fast.data.layouts import read_layout
from fd2fast.errors import UserError


def put(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def tree(root: Path, *splits: str, classes: tuple[str, ...] = ("ant", "bee")) -> Path:
    return put(root, *(f"{split}/{name}/1.jpg" for split in splits for name in classes))


def complaint(root: Path, dataset: str = "folder") -> str:
    with pytest.raises(UserError) as caught:
        read_layout(dataset, root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


CUB = ("images.txt", "image_class_labels.txt", "classes.txt", "train_test_split.txt", "images/1/1.jpg")


@pytest.mark.parametrize("above", ["", "train", "test", "train/ant"])
@pytest.mark.parametrize("below", ["a/b", "a/b/c"])
def test_a_root_too_deep_or_too_high_gets_the_right_one(tmp_path: Path, above: str, below: str) -> None:
    home = tree(tmp_path / "mine" / below, "train", "test")
    if above:
        assert f"; {home} would be right: name it as the root" in complaint(home / above)
    else:
        assert f"; {home} would be right: name it as the root" in complaint(tmp_path / "mine")


def test_several_right_folders_are_all_named(tmp_path: Path) -> None:
    for name in ("x", "y"):
        tree(tmp_path / "mine" / "sets" / name, "train", "val")
    message = complaint(tmp_path / "mine")
    assert f"{tmp_path / 'mine/sets/x'}, {tmp_path / 'mine/sets/y'} would be right: name one as the root" in message


def test_official_layouts_are_found_above_and_below(tmp_path: Path) -> None:
    home = put(tmp_path / "mine" / "2011" / "official" / "CUB_200_2011", *CUB)
    assert f"; {home} would be right" in complaint(home / "images", "cub")
    assert f"; {home} would be right" in complaint(tmp_path / "mine", "cub")
    data = put(tmp_path / "planes" / "v" / "w" / "data", "variants.txt", "images/1.jpg")
    assert f"; {data.parent} would be right" in complaint(tmp_path / "planes", "aircraft")


@pytest.mark.parametrize("dataset", ["cub", "aircraft", "cars"])
def test_class_folders_where_annotations_were_wanted_name_the_other_data_set(tmp_path: Path, dataset: str) -> None:
    home = tree(tmp_path / "car_data" / "car_data", "train", "test")
    for root in (home, home.parent, tmp_path, home / "test"):
        assert f"; {home} holds train/CLASS/* folders: dataset 'folder' with that root" in complaint(root, dataset)


@pytest.mark.parametrize("archive", ["CUB_200_2011.tgz", "archive.zip", "images.TAR.GZ", "set.7z", "train.tar"])
@pytest.mark.parametrize("dataset", ["cub", "cars", "folder", "imagewoof"])
def test_archives_that_nobody_unpacked_are_named(tmp_path: Path, archive: str, dataset: str) -> None:
    root = put(tmp_path / "mine", archive, "README.txt")
    assert f"; not unpacked yet: {archive} in {root}" in complaint(root, dataset)
    assert f"{archive} is not a folder but an archive: unpack it" in complaint(root / archive, dataset)


def test_archives_beside_what_is_missing_are_named(tmp_path: Path) -> None:
    home = put(tmp_path / "a", *CUB[:4], "images.tgz")
    for name, text in (("images.txt", "1 1/1.jpg"), ("image_class_labels.txt", "1 1"), ("classes.txt", "1 x")):
        (home / name).write_text(text)
    (home / "train_test_split.txt").write_text("1 1")
    assert f"images is missing: the folder of the images; not unpacked yet: {home / 'images.tgz'}" in complaint(
        home, "cub"
    )
    assert "neither test/ nor val/; not unpacked yet: val.zip" in complaint(
        put(tree(tmp_path / "b", "train"), "val.zip")
    )
    cars = put(tmp_path / "c", "cars_train/1.jpg", "cars_test/1.jpg", "car_devkit.tgz")
    assert "not unpacked yet: car_devkit.tgz" in complaint(cars, "cars")
    put(tmp_path / "d", "train/ant.tar", "train/bee.tar", "test/ant/1.jpg")
    assert "train holds no class folders; not unpacked yet: ant.tar, bee.tar" in complaint(tmp_path / "d")


@pytest.mark.parametrize("name", ["valid", "validation", "Val", "TEST", "testing", "dev", "eval", "test_set"])
def test_other_names_of_the_test_folder_are_pointed_out(tmp_path: Path, name: str) -> None:
    root = tree(tmp_path / "mine", "train", name)
    assert f"neither test/ nor val/; {name}/ in {root} looks like it: the name must be val/" in complaint(root)


@pytest.mark.parametrize("name", ["Train", "TRAIN", "training", "Training_Set", "trn"])
def test_other_names_of_the_training_folder_are_pointed_out(tmp_path: Path, name: str) -> None:
    root = tree(tmp_path / "mine", name, "test")
    assert f"; {name}/ in {root} looks like it: the name must be train/" in complaint(root)


@pytest.mark.parametrize("table", ["train.csv", "train/labels.json", "annotations.xlsx"])
def test_images_directly_in_the_training_folder_and_the_table_that_may_know(tmp_path: Path, table: str) -> None:
    root = put(tmp_path / "mine", "train/1.jpg", "train/2.PNG", "test/1.jpg", table, "README.txt", "requirements.txt")
    message = complaint(root)
    assert f"{root / 'train'} holds no class folders; 2 images lie directly in it, without labels" in message
    assert (
        f"wanted train/CLASS/*, a folder for each class ({root / table} may say which class each belongs to)" in message
    )


@pytest.mark.parametrize("unlabelled", ["test/1.jpg", "test/images/1.jpg", "test/unknown/1.jpg", "test/Thumbs.db"])
def test_val_is_named_where_test_has_no_labels(tmp_path: Path, unlabelled: str) -> None:
    root = put(tree(tmp_path / "mine", "train", "val"), unlabelled)
    expected = f"{root / 'val'} has the class folders of train/ and would be right: move or rename {root / 'test'}"
    assert expected in complaint(root)
    (root / "test").rename(root / "test-without-labels")
    assert len(read_layout("folder", root).test.files) == 2


def test_val_is_not_named_where_it_would_not_do(tmp_path: Path) -> None:
    root = put(tree(tmp_path / "mine", "train"), "val/images/1.jpg", "test/images/1.jpg", "val/val_annotations.txt")
    assert "would be right" not in complaint(root)


def test_a_level_too_much_inside_the_splits_is_seen(tmp_path: Path) -> None:
    root = tree(tmp_path / "mine", "train/images", "test/images")
    assert f"{root / 'train/images'} holds only folders (ant, bee): if they are the classes, move them up" in complaint(
        root
    )
    nested = tree(tmp_path / "one", "train", "test", classes=("ant/a", "ant/b", "bee"))
    assert read_layout("folder", nested).classes == ["ant", "bee"]


def test_a_misspelt_root_or_file_is_answered_with_its_neighbour(tmp_path: Path) -> None:
    home = put(tmp_path / "CUB_200_2011", *CUB)
    assert f"did you mean {home}?" in complaint(tmp_path / "cub_200_2011", "cub")
    assert f"did you mean {home}?" in complaint(tmp_path / "CUB-200-2011", "cub")
    assert "did you mean" not in complaint(tmp_path / "elephants", "cub")
    put(tmp_path, "elephants-v2.tar.gz")
    assert f"not unpacked yet: {tmp_path / 'elephants-v2.tar.gz'}" in complaint(tmp_path / "elephants_v2", "cub")
    (home / "images.txt").write_text("1 1/1.jpg")
    (home / "train_test_split.txt").rename(home / "train_test_split.TXT")
    (home / "image_class_labels.txt").write_text("1 1")
    assert "train_test_split.txt is missing: 1 (training) or 0 (test); did you mean" in complaint(home, "cub")


ALIKE = (
    ("café", "cafe\u0301", "Unicode form"),
    ("가", "\u1100\u1161", "Unicode form"),
    ("Å", "\u212b", "Unicode form"),
    ("Ａnt", "Ant", "width or form"),
    ("ﬁnch", "finch", "width or form"),
    ("ant", "Ant", "capitals"),
    ("straße", "STRASSE", "capitals"),
    ("bee", "bee ", "spaces or invisible"),
    ("bee", "bee\u200b", "spaces or invisible"),
    ("red ant", "red\u00a0ant", "width or form"),
)


@pytest.mark.parametrize(("one", "other", "why"), ALIKE)
def test_class_names_that_look_alike_are_said(tmp_path: Path, one: str, other: str, why: str) -> None:
    ((first, second, reason),) = hints.look_alikes([one, "wasp", other])
    assert (first, second) == (one, other)
    assert why in reason
    root = tree(tmp_path / "both", "train", "test", classes=(one, other))
    if len(list((root / "train").iterdir())) < 2:
        pytest.skip("this file system takes them for one name")
    listing = read_layout("folder", root)
    assert len(listing.classes) == 2
    (note,) = listing.notes()
    assert ascii(one) in note
    assert ascii(other) in note
    assert why in note
    tree(tmp_path / "split", "train", classes=(one, "wasp"))
    tree(tmp_path / "split", "test", classes=(other, "wasp"))
    message = complaint(tmp_path / "split")
    assert "hold different classes" in message
    assert ascii(one) in message
    assert ascii(other) in message
    assert why in message


def test_different_names_are_not_taken_for_alike() -> None:
    names = ["ant", "aunt", "ánt", "ant-1", "ant_1", "ant 1", "蟻", "アリ", "ありさん", "🐜", "a\u0308", "1", "١"]
    assert hints.look_alikes(names) == []
    assert unicodedata.normalize("NFC", "a\u0308") == "ä"


def test_hints_raise_nothing(tmp_path: Path) -> None:
    missing = tmp_path / "no" / "such"
    (tmp_path / "loop").symlink_to("loop")
    assert hints.peek(missing) == hints.peek(tmp_path / "loop") == ([], [])
    assert hints.peek(tmp_path) == ([], ["loop"])
    assert hints.archives(missing) == hints.loose_images(missing) == hints.misnamed_split(missing, training=True) == ""

    def refuses(folder: Path) -> bool:
        raise PermissionError(folder)

    assert hints.elsewhere(tmp_path, refuses) == ""
