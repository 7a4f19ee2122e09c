"""Official layouts: tiny trees of each are listed with the right labels, and every fault is named."""

import errno
import os
import signal
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
    both = read_layout("folder", home)
    assert len(both.test.files) == 2
    assert f"{home}: val/ is not used: the test images are those of test/" in both.notes()


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


LISTS = {
    "family": (
        "families.txt",
        "Boeing 707\nF/A-18\n",
        ("0000001 F/A-18\n0000002 Boeing 707\n", "0000003 Boeing 707\n0000004 F/A-18\n"),
    ),
    "manufacturer": (
        "manufacturers.txt",
        "Boeing\nMcDonnell Douglas\n",
        ("0000001 McDonnell Douglas\n0000002 Boeing\n", "0000003 Boeing\n0000004 McDonnell Douglas\n"),
    ),
}


@pytest.mark.parametrize("level", LISTS)
@pytest.mark.parametrize("depth", [0, 2])
def test_aircraft_levels(tmp_path: Path, level: str, depth: int) -> None:
    data = aircraft(tmp_path)
    names, classes, (trainval, test) = LISTS[level]
    with pytest.raises(UserError, match=f"{names} is missing|wanted .*{names}"):
        read_layout("aircraft", data, level=level)
    write(data / names, classes)
    write(data / f"images_{level}_trainval.txt", trainval)
    write(data / f"images_{level}_test.txt", test)
    listing = read_layout("aircraft", [data, data.parent, tmp_path][depth], level=level)
    assert listing.classes == classes.splitlines()
    assert files(listing) == files(read_layout("aircraft", data))
    write(data / f"images_{level}_test.txt", "0000003 Boing\n")
    with pytest.raises(
        UserError, match=f"images_{level}_test.txt, line 1: {level} 'Boing' is not one of the 2 in {names}"
    ):
        read_layout("aircraft", data, level=level)


def test_an_unknown_aircraft_level_is_refused(tmp_path: Path) -> None:
    aircraft(tmp_path)
    with pytest.raises(UserError, match="unknown level 'maker' of aircraft: did you mean 'manufacturer'"):
        read_layout("aircraft", tmp_path, level="maker")


@pytest.mark.parametrize("nested", ["", "cars_train/"])
def test_cars_images_without_annotations_name_the_files_that_are_wanted(tmp_path: Path, nested: str) -> None:
    write(tmp_path / "cars_train" / f"{nested}00001.jpg")
    write(tmp_path / "cars_test" / "cars_test" / "00001.jpg")
    write(tmp_path / "names.csv", "Audi\n")
    with pytest.raises(UserError, match="holds no annotations of Stanford Cars") as caught:
        read_layout("cars", tmp_path)
    for name in ("cars_annos.mat", "cars_meta.mat", "cars_train_annos.mat", "cars_test_annos_withlabels.mat"):
        assert name in str(caught.value)


def test_junk_is_no_class_and_is_counted(tmp_path: Path) -> None:
    home = tree(tmp_path / "birds", ("a", "b"), ("train", "val"))
    for junk in (
        "train/@eaDir/a/0.png/SYNOPHOTO_THUMB_M.jpg",
        "train/__MACOSX/._a",
        "train/a/@eaDir/0.png/x.jpg",
        "val/b/Thumbs.db",
    ):
        write(home / junk)
    write(home / "__MACOSX" / "train" / "a" / "._0.png")
    listing = read_layout("folder", tmp_path)
    assert listing.classes == ["a", "b"]
    assert len(listing.train.files) == len(listing.test.files) == 4
    assert listing.left_out.counts == {"junk": 4}
    remark, note = listing.notes()
    assert remark == f"{home}: the test images are those of val/ (there is no test/)"
    assert note.startswith(f"{home}: left out 4 entries of NAS")
    assert f"({Path('train/@eaDir')}, ...)" in note


def test_what_an_empty_class_folder_holds_is_said(tmp_path: Path) -> None:
    home = tree(tmp_path / "birds", ("a", "b"))
    for path in (home / "test" / "b").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="no test images in class 'b'; .*test/b holds only folders or nothing"):
        read_layout("folder", home)
    write(home / "test" / "b" / "Thumbs.db")
    write(home / "test" / "b" / ".0.png")
    with pytest.raises(UserError, match=r"test/b holds only 1 entry of a NAS.*\(test/b/Thumbs.db\), 1 hidden entry"):
        read_layout("folder", home)
    (home / "test" / "b" / "0.png").symlink_to("gone.png")
    with pytest.raises(UserError, match="no test images in class 'b'; .*a link to gone.png, which does not exist"):
        read_layout("folder", home)
    for split in ("train", "test"):
        for name in ("a", "b"):
            (home / split / name).rename(home / split / f".{name}")
    with pytest.raises(UserError, match=r"train holds no class folders; left out: 2 hidden entries \(train/.a, ...\)"):
        read_layout("folder", home)


def test_links_to_classes_and_files_outside_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    home = tree(tmp_path / "birds", ("a", "b"))
    store = tree(tmp_path / "store", ("c",), ("x",), count=3) / "x" / "c"
    for split in ("train", "test"):
        (home / split / "c").symlink_to(store)
        (home / split / "all").symlink_to("..")
        (home / split / "a" / "self").symlink_to(".")
        (home / split / "a" / "again.png").symlink_to("0.png")
        (home / split / "b" / "far.png").symlink_to(store / "0.png")
    listing = read_layout("folder", home)
    assert listing.classes == ["a", "b", "c"]
    assert listing.train.labels == listing.test.labels == [0, 0, 1, 1, 1, 2, 2, 2]
    assert listing.left_out.counts == {"leads_back": 4, "again": 2}
    assert not listing.faults
    assert not listing.followed
    more = tree(tmp_path / "more", ("d",), ("x",), count=1) / "x"
    (home / "train" / "b" / "more").symlink_to(more)
    assert (
        read_layout("folder", home).notes()[0]
        == f"{home}: followed 1 link to folders elsewhere (train/b/more to {more})"
    )


def test_what_cannot_be_read_is_a_fault_of_the_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tree(tmp_path / "birds", ("a", "b"))
    write(home / "train" / "a" / "more" / "2.png")
    (home / "train" / "b" / "9.png").symlink_to("/nowhere/9.png")
    (home / "train" / "c").symlink_to("/nowhere/c")
    scandir = os.scandir

    def failing(path):
        if os.fspath(path) in refused:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    refused = {str(home / "train" / "a" / "more")}
    listing = read_layout("folder", home)
    assert [str(path.relative_to(home)) for path, _ in listing.faults] == ["train/c", "train/a/more", "train/b/9.png"]
    assert listing.train.labels == [0, 0, 1, 1]
    refused = {str(home / "test" / "b")}
    with pytest.raises(
        UserError, match=f"no test images in class 'b'; .*train/c: a link.*test/b: {os.strerror(errno.EACCES)}"
    ):
        read_layout("folder", home)
    refused = {str(home / "test")}
    with pytest.raises(UserError, match=f"test holds no class folders; .*test: {os.strerror(errno.EACCES)}"):
        read_layout("folder", home)
    tree(home, ("c",), ("test",))
    refused = set()
    with pytest.raises(
        UserError, match="only test/ has class 'c'; .*train/c: a link to /nowhere/c, which does not exist"
    ):
        read_layout("folder", home)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_root_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def failing(self, *args, **options):
        raise OSError(code, os.strerror(code), str(self))

    monkeypatch.setattr(Path, "iterdir", failing)
    with pytest.raises(UserError, match=f"{tmp_path}: {os.strerror(code)}"):
        read_layout("folder", tmp_path)
    monkeypatch.setattr(Path, "is_dir", failing)
    with pytest.raises(UserError, match=f"{tmp_path}: {os.strerror(code)}"):
        read_layout("cub", tmp_path)


def test_annotation_files_that_are_no_files_are_not_waited_for(tmp_path: Path) -> None:
    home = cub(tmp_path)
    (home / "classes.txt").unlink()
    os.mkfifo(home / "classes.txt")
    with pytest.raises(UserError, match="classes.txt is not a regular file"):
        read_layout("cub", tmp_path)
    home = cars_devkit(tmp_path / "cars")
    (home / "devkit" / "cars_meta.mat").unlink()
    (home / "devkit" / "cars_meta.mat").symlink_to(os.devnull)
    with pytest.raises(UserError, match="cars_meta.mat is not a regular file"):
        read_layout("cars", home)
    data = aircraft(tmp_path / "planes")
    (data / "variants.txt").unlink()
    (data / "variants.txt").mkdir()
    with pytest.raises(UserError, match="variants.txt is not a regular file"):
        read_layout("aircraft", data)


def test_annotation_files_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    home = cub(tmp_path)
    for name in ("classes.txt", "images.txt", "image_class_labels.txt", "train_test_split.txt"):
        (home / name).write_bytes(b"\xef\xbb\xbf" + (home / name).read_bytes())
    assert read_layout("cub", home).classes == ["001.Albatross", "002.Bunting"]


def test_names_that_no_file_can_have_are_refused_with_the_line(tmp_path: Path) -> None:
    home = cub(tmp_path)
    write(home / "images.txt", "1 001.A/a1.jpg\n2 001.A/a\0.jpg\n3 002.B/b1.jpg\n4 002.B/b2.jpg\n")
    with pytest.raises(UserError, match="images.txt, line 2: .*NUL"):
        read_layout("cub", home)
    for name in ("../x", "/etc/passwd", "a/../../x"):
        write(home / "images.txt", f"1 {name}\n2 001.A/a2.jpg\n3 002.B/b1.jpg\n4 002.B/b2.jpg\n")
        with pytest.raises(UserError, match="line 1: .*leads out of"):
            read_layout("cub", home)


def test_class_names_read_alike_whatever_the_locale(tmp_path: Path) -> None:
    latin = os.fsdecode(b"caf\xe9")
    try:
        home = tree(tmp_path / "birds", ("b\xe9", latin, "x" * 200, "-rf", "~", "$HOME", "a:b", "CON"))
    except OSError:
        pytest.skip("this file system takes no such name")
    listing = read_layout("folder", home)
    assert listing.classes == sorted(["b\xe9", "caf\udce9", "x" * 200, "-rf", "~", "$HOME", "a:b", "CON"])
    assert all(path.is_file() for path in listing.train.files)


def test_cars_annotations_that_lie_elsewhere_or_belong_to_other_images_are_named(tmp_path: Path) -> None:
    home = cars_devkit(tmp_path / "cars")
    (home / "my").mkdir()
    (home / "devkit").rename(home / "my" / "devkit")
    with pytest.raises(UserError, match=f"; {home}/my/devkit holds some of them: move them to {home}/devkit"):
        read_layout("cars", home)
    (home / "my" / "devkit").rename(tmp_path / "away")
    cars_single(tmp_path / "one")
    (tmp_path / "one" / "cars_annos.mat").rename(home / "cars_annos.mat")
    with pytest.raises(UserError, match="cars_annos.mat belongs to car_ims/, which is missing"):
        read_layout("cars", home)


def test_the_number_of_entries_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tree(tmp_path / "birds", ("a", "b", "c"))
    monkeypatch.setattr("fd2fast.data.layouts.MOST_ENTRIES", 10)
    with pytest.raises(UserError, match=r"birds holds more than 1\d entries: .*link"):
        read_layout("folder", home)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (float("nan"), "class must be 1 to 3, got nan"),
        (float("inf"), "class must be 1 to 3, got inf"),
        (1.5, "class must be 1 to 3, got 1.5"),
        (10.0**30, r"class must be 1 to 3, got 1e\+30"),
        ("two", "class must be 1 to 3, got 'two'"),
        ([1, 2], "entry 2: wanted one value in each field, got 2"),
        ([], "entry 2: wanted one value in each field, got 0"),
    ],
)
def test_cars_classes_that_are_none_are_named(value: object, told: str, tmp_path: Path) -> None:
    home = cars_single(tmp_path / "cars", classes=(1, value, 2, 1, 2, 3))
    with pytest.raises(UserError, match=told):
        read_layout("cars", home)


def test_a_file_that_crashes_the_reader_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As SciPy's does on some damaged files: the process ends, and there is no exception."""
    import scipy.io

    home, begun = cars_single(tmp_path / "cars"), os.getpid()
    real = scipy.io.loadmat

    def crashes(*arguments: object, **named: object) -> object:
        if os.getpid() != begun:
            os.kill(os.getpid(), signal.SIGSEGV)
        return real(*arguments, **named)

    monkeypatch.setattr(scipy.io, "loadmat", crashes)
    with pytest.raises(UserError, match=r"cars_annos\.mat is not a readable MATLAB file .* crashes SciPy's reader"):
        read_layout("cars", home)
