"""Official layouts: tiny trees of each are listed with the right labels, and every fault is named."""

from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from fd2fast.data.layouts import NETTE, WOOF, Listing, read_layout
from fd2fast.errors import UserError


def write(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def files(listing: Listing) -> dict[str, list[tuple[str, int]]]:
    return {
        name: [(p.name, k) for p, k in zip(split.files, split.labels, strict=True)]
        for name, split in (("train", listing.train), ("test", listing.test))
    }


def cub(root: Path) -> Path:
    home = root / "CUB_200_2011"
    write(home / "classes.txt", "1 001.Albatross\n2 002.Bunting\n")
    write(home / "images.txt", "1 001.A/a1.jpg\n2 001.A/a2.jpg\n3 002.B/b1.jpg\n4 002.B/b2.jpg\n")
    write(home / "image_class_labels.txt", "1 1\n2 1\n3 2\n4 2\n")
    write(home / "train_test_split.txt", "1 1\n2 0\n3 0\n4 1\n")
    for name in ("001.A/a1", "001.A/a2", "002.B/b1", "002.B/b2"):
        write(home / "images" / f"{name}.jpg")
    return home


def aircraft(root: Path) -> Path:
    data = root / "fgvc-aircraft-2013b" / "data"
    write(data / "variants.txt", "707-320\nF/A-18\n")
    write(data / "images_variant_trainval.txt", "0000001 F/A-18\n0000002 707-320\n")
    write(data / "images_variant_test.txt", "0000003 707-320\n0000004 F/A-18\n")
    (data / "images").mkdir()
    return data


def annotations(**columns) -> np.ndarray:
    count = len(next(iter(columns.values())))
    array = np.zeros((1, count), dtype=[(name, object) for name in columns])
    for name, values in columns.items():
        for n, value in enumerate(values):
            array[0, n][name] = value
    return array


NAMES = {"class_names": np.array([["Acura RL", "Ram C/V", "smart"]], dtype=object)}


def cars_single(root: Path, classes=(1, 3, 2, 1, 2, 3)) -> Path:
    paths = [f"car_ims/{n:06d}.jpg" for n in range(1, 7)]
    rows = annotations(relative_im_path=paths, bbox_x1=[1] * 6, **{"class": list(classes)}, test=[0, 0, 0, 1, 1, 1])
    (root / "car_ims").mkdir(parents=True)
    savemat(root / "cars_annos.mat", {"annotations": rows, **NAMES})
    return root


def cars_devkit(root: Path, *, labelled: bool = True, beside: bool = False) -> Path:
    kit = root / "devkit"
    kit.mkdir(parents=True)
    for folder in ("cars_train", "cars_test"):
        (root / folder).mkdir()
    savemat(kit / "cars_meta.mat", NAMES)
    train = annotations(bbox_x1=[1] * 3, **{"class": [3, 1, 2]}, fname=["00001.jpg", "00002.jpg", "00003.jpg"])
    savemat(kit / "cars_train_annos.mat", {"annotations": train})
    test = annotations(**{"class": [2, 3, 1]}, fname=["00001.jpg", "00002.jpg", "00003.jpg"])
    if labelled:
        savemat((root if beside else kit) / "cars_test_annos_withlabels.mat", {"annotations": test})
    else:
        savemat(kit / "cars_test_annos.mat", {"annotations": annotations(fname=["00001.jpg", "00002.jpg"])})
    return root


def tree(root: Path, classes, splits=("train", "test"), count: int = 2) -> Path:
    for split in splits:
        for name in classes:
            for n in range(count):
                write(root / split / name / f"{n}.png")
    return root


@pytest.mark.parametrize("inside", [True, False])
def test_cub(tmp_path: Path, inside: bool) -> None:
    home = cub(tmp_path)
    listing = read_layout("cub", home if inside else tmp_path)
    assert listing.classes == ["001.Albatross", "002.Bunting"]
    assert files(listing) == {"train": [("a1.jpg", 0), ("b2.jpg", 1)], "test": [("a2.jpg", 0), ("b1.jpg", 1)]}
    assert all(path.exists() for path in listing.train.files)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("image_class_labels.txt", "1 1\n2 1\n3 3\n4 2\n", r"image_class_labels.txt, line 3: .*1 to 2, got '3'"),
        ("image_class_labels.txt", "1 1\n2 1\n3 0\n4 2\n", r"line 3: .*1 to 2, got '0'"),
        ("image_class_labels.txt", "1 1\n2 x\n3 2\n4 2\n", r"line 2: .*got 'x'"),
        ("image_class_labels.txt", "1 1\n2 1\n4 2\n", "no line for image 3"),
        ("image_class_labels.txt", "1 1\n2 1\n3 2\n4 2\n9 2\n", "line 5: image 9 is not in images.txt"),
        ("image_class_labels.txt", "", "image_class_labels.txt is empty"),
        (
            "train_test_split.txt",
            "1 1\n2 2\n3 0\n4 1\n",
            r"train_test_split.txt, line 2: split must be 0 to 1, got '2'",
        ),
        ("train_test_split.txt", "1 1\n1 0\n3 0\n4 1\n", "line 2: id 1 was on line 1"),
        ("train_test_split.txt", "1 1\n2 1\n3 0\n4 1\n", "no test images in class '001.Albatross'"),
        ("images.txt", "1 001.A/a1.jpg\nx\n", "images.txt, line 2: wanted a number"),
        ("images.txt", "1 ../../etc/x\n2 001.A/a2.jpg\n3 002.B/b1.jpg\n4 002.B/b2.jpg\n", "line 1: .*leads out of"),
        ("classes.txt", "1 a\n3 b\n", "classes.txt: .*without gaps"),
        ("classes.txt", "1 a\n2 b\n3 c\n", "no training images in class 'c'"),
    ],
)
def test_cub_faults_name_file_and_line(tmp_path: Path, file: str, text: str, message: str) -> None:
    (cub(tmp_path) / file).write_text(text)
    with pytest.raises(UserError, match=message):
        read_layout("cub", tmp_path)


@pytest.mark.parametrize("file", ["images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt"])
def test_cub_missing_annotation_files_are_named(tmp_path: Path, file: str) -> None:
    (cub(tmp_path) / file).unlink()
    with pytest.raises(UserError, match=f"{file} is missing"):
        read_layout("cub", tmp_path)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_aircraft(tmp_path: Path, depth: int) -> None:
    data = aircraft(tmp_path)
    listing = read_layout("aircraft", [data, data.parent, tmp_path][depth])
    assert listing.classes == ["707-320", "F/A-18"]
    assert files(listing) == {
        "train": [("0000001.jpg", 1), ("0000002.jpg", 0)],
        "test": [("0000003.jpg", 0), ("0000004.jpg", 1)],
    }
    assert listing.train.files[0] == data / "images" / "0000001.jpg"


def test_aircraft_faults(tmp_path: Path) -> None:
    data = aircraft(tmp_path)
    write(data / "images_variant_test.txt", "0000003 707-320\n\n0000004 747\n")
    with pytest.raises(UserError, match="images_variant_test.txt, line 3: variant '747' is not one of the 2"):
        read_layout("aircraft", tmp_path)
    (data / "images_variant_test.txt").unlink()
    with pytest.raises(UserError, match="images_variant_test.txt is missing"):
        read_layout("aircraft", tmp_path)
    write(data / "variants.txt", "a\nb\na\n")
    with pytest.raises(UserError, match="variants.txt, line 3: variant 'a' appears twice"):
        read_layout("aircraft", tmp_path)


@pytest.mark.parametrize("inside", [True, False])
def test_cars_single_file(tmp_path: Path, inside: bool) -> None:
    home = cars_single(tmp_path / "stanford_cars")
    listing = read_layout("cars", home if inside else tmp_path)
    assert listing.classes == ["Acura RL", "Ram C/V", "smart"]
    assert files(listing) == {
        "train": [("000001.jpg", 0), ("000002.jpg", 2), ("000003.jpg", 1)],
        "test": [("000004.jpg", 0), ("000005.jpg", 1), ("000006.jpg", 2)],
    }
    assert listing.train.files[0] == home / "car_ims" / "000001.jpg"


@pytest.mark.parametrize("beside", [True, False])
def test_cars_devkit(tmp_path: Path, beside: bool) -> None:
    home = cars_devkit(tmp_path / "stanford_cars", beside=beside)
    listing = read_layout("cars", tmp_path)
    assert listing.classes == ["Acura RL", "Ram C/V", "smart"]
    assert files(listing) == {
        "train": [("00001.jpg", 2), ("00002.jpg", 0), ("00003.jpg", 1)],
        "test": [("00001.jpg", 1), ("00002.jpg", 2), ("00003.jpg", 0)],
    }
    assert listing.test.files[0] == home / "cars_test" / "00001.jpg"
    (home / "cars_train" / "cars_train").mkdir()
    assert read_layout("cars", home).train.files[0] == home / "cars_train" / "cars_train" / "00001.jpg"


def test_cars_faults(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cars_annos.mat, entry 4: class must be 1 to 3, got 4"):
        read_layout("cars", cars_single(tmp_path / "a", classes=(1, 3, 2, 4, 2, 3)))
    with pytest.raises(UserError, match="cars_test_annos.mat: no field class .*cars_test_annos_withlabels.mat"):
        read_layout("cars", cars_devkit(tmp_path / "b", labelled=False))
    home = cars_devkit(tmp_path / "c")
    (home / "devkit" / "cars_meta.mat").write_bytes(b"MATLAB 5.0 but no")
    with pytest.raises(UserError, match="cars_meta.mat is not a readable MATLAB file"):
        read_layout("cars", home)
    (home / "devkit" / "cars_meta.mat").unlink()
    with pytest.raises(UserError, match="cars_meta.mat is missing"):
        read_layout("cars", home)
    home = cars_devkit(tmp_path / "d")
    (home / "cars_test").rmdir()
    with pytest.raises(UserError, match="cars_test is missing"):
        read_layout("cars", home)


@pytest.mark.parametrize(("name", "known"), [("imagenette", NETTE), ("imagewoof", WOOF)])
def test_wordnet_folders_get_readable_names(tmp_path: Path, name: str, known: dict[str, str]) -> None:
    home = tree(tmp_path / f"{name}2-160", known, ("train", "val"), count=1)
    listing = read_layout(name, tmp_path)
    assert len(listing.classes) == 10
    assert listing.classes == [known[k] for k in sorted(known)]
    assert [p.parent.name for p in listing.train.files] == sorted(known)
    assert listing.test.labels == list(range(10))
    assert read_layout(name, home).classes == listing.classes
    first = sorted(known)[0]
    (home / "val" / first / "0.png").unlink()
    with pytest.raises(UserError, match=f"no test images in class '{known[first]}'"):
        read_layout(name, home)
    (home / "val" / first).rmdir()
    with pytest.raises(UserError, match=rf"val lacks .*{known[first]}"):
        read_layout(name, home)
    write(home / "train" / "n00000001" / "0.png")
    with pytest.raises(UserError, match=f"'n00000001' do not belong to {name}"):
        read_layout(name, home)
    tree(tmp_path / f"{name}2", known, ("train", "val"), count=1)
    with pytest.raises(UserError, match="several .*name one"):
        read_layout(name, tmp_path)


def test_any_folder_tree(tmp_path: Path) -> None:
    home = tree(tmp_path / "birds", ("b", "a"), ("train", "val"))
    for ignored in (".DS_Store", "a/.hidden.png", "a/Thumbs.db"):
        write(home / "train" / ignored)
    write(home / "train" / "a" / "deeper" / "0.png")
    for root in (home, tmp_path):
        listing = read_layout("folder", root)
        assert listing.classes == ["a", "b"]
        assert files(listing) == {
            "train": [("0.png", 0), ("1.png", 0), ("0.png", 0), ("0.png", 1), ("1.png", 1)],
            "test": [("0.png", 0), ("1.png", 0), ("0.png", 1), ("1.png", 1)],
        }
    tree(home, ("a", "b"), ("test",), count=1)
    assert len(read_layout("folder", home).test.files) == 2  # test/ goes before val/


def test_folder_faults(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a root"):
        read_layout("folder", None)
    with pytest.raises(UserError, match="nowhere does not exist"):
        read_layout("folder", tmp_path / "nowhere")
    write(tmp_path / "file")
    with pytest.raises(UserError, match="file is not a folder"):
        read_layout("folder", tmp_path / "file")
    for dataset in ("cub", "aircraft", "cars", "imagenette", "imagewoof", "folder"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match="empty does not hold"):
            read_layout(dataset, tmp_path / "empty")
    home = tree(tmp_path / "one", ("a", "b"), ("train",))
    with pytest.raises(UserError, match="neither test/ nor val/"):
        read_layout("folder", home)
    (home / "test").mkdir()
    with pytest.raises(UserError, match="test holds no class folders"):
        read_layout("folder", home)
    tree(home, ("b", "c"), ("test",))
    with pytest.raises(UserError, match="different classes: only train/ has class 'a'"):
        read_layout("folder", home)
    tree(home, ("a",), ("test",))
    with pytest.raises(UserError, match="different classes: only test/ has class 'c'"):
        read_layout("folder", home)
    (home / "train" / "c").mkdir()
    with pytest.raises(UserError, match="no training images in class 'c'"):
        read_layout("folder", home)
    for name in ("x", "y"):
        tree(tmp_path / "two" / name, ("a",))
    with pytest.raises(UserError, match=r"two holds several .*\(x, y\)"):
        read_layout("folder", tmp_path / "two")
