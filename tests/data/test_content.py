"""Data sets by content: equal wherever they lie, noticed when they change, kept when they are gone, read once."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fd2fast import artifacts
from fd2fast.artifacts import Artifact, load
from fd2fast.data import prepare as module
from fd2fast.data import typefaces
from fd2fast.data.prepare import prepare
from fd2fast.errors import UserError
from fd2fast.settings.config import DataConfig, replace
from fd2fast.system import sources

CLASSES = ("ant", "bee", "cat")


def picture(path: Path, seed: int, size: tuple[int, int] = (9, 7)) -> None:
    """Noise without compression: the same number of bytes whatever the seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "BMP")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for number, name in enumerate(CLASSES):
        for split, count in (("train", 3), ("test", 1)):
            for n in range(count):
                picture(tmp_path / "data" / split / name / f"{n}.bmp", 100 * number + 10 * n + len(split))
    return tmp_path / "data"


@pytest.fixture
def config(tree: Path) -> DataConfig:
    return DataConfig(dataset="folder", root=tree, size=8)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stamps count at once, as they do two seconds after a file was written."""
    monkeypatch.setattr(sources, "SETTLED", -(10**15))


def no_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> str:
        raise AssertionError(f"{path} is read again")

    monkeypatch.setattr(sources, "file_digest", refuse)


# what happens to a data set, and what is told


def overwritten_in_place_under_the_old_time(tree: Path) -> str:
    path = tree / "train" / "ant" / "1.bmp"
    before = path.stat()
    picture(path, 999)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    return "1 changed (train/ant/1.bmp)"


def replaced_by_an_older_file(tree: Path) -> str:
    picture(tree.parent / "other.bmp", 998)
    os.utime(tree.parent / "other.bmp", (10**9, 10**9))
    os.replace(tree.parent / "other.bmp", tree / "test" / "bee" / "0.bmp")
    return "1 changed (test/bee/0.bmp)"


def two_images_swapped(tree: Path) -> str:
    one, two = tree / "train" / "ant" / "0.bmp", tree / "train" / "cat" / "0.bmp"
    for source, target in ((one, tree / "x"), (two, one), (tree / "x", two)):
        source.rename(target)
    return "2 changed (train/ant/0.bmp, train/cat/0.bmp)"


def two_splits_swapped(tree: Path) -> str:
    for source, target in (("train", "x"), ("test", "train"), ("x", "test")):
        (tree / source).rename(tree / target)
    return "6 changed"


def one_emptied(tree: Path) -> str:
    (tree / "train" / "bee" / "2.bmp").write_bytes(b"")
    return "1 changed (train/bee/2.bmp)"


def five_added(tree: Path) -> str:
    for n in range(5):
        picture(tree / "train" / "ant" / f"new{n}.bmp", n)
    return "5 added (train/ant/new0.bmp, train/ant/new1.bmp, train/ant/new2.bmp, ...)"


def one_removed(tree: Path) -> str:
    (tree / "train" / "bee" / "0.bmp").unlink()
    return "1 removed (train/bee/0.bmp)"


def one_put_into_another_class(tree: Path) -> str:
    (tree / "train" / "bee" / "0.bmp").rename(tree / "train" / "ant" / "7.bmp")
    return "1 added (train/ant/7.bmp), 1 removed (train/bee/0.bmp)"


def a_class_renamed(tree: Path) -> str:
    for split in ("train", "test"):
        (tree / split / "cat").rename(tree / split / "dog")
    return "4 added (train/dog/0.bmp, train/dog/1.bmp, train/dog/2.bmp, ...), 4 removed"


def a_link_led_elsewhere(tree: Path) -> str:
    path = tree / "train" / "cat" / "1.bmp"
    path.unlink()
    path.symlink_to(tree / "train" / "ant" / "1.bmp")
    return "1 changed (train/cat/1.bmp)"


def a_class_emptied(tree: Path) -> str:
    for path in (tree / "train" / "bee").iterdir():
        path.unlink()
    return "since the earlier run of this command: 3 removed (train/bee/0.bmp"


def one_split_deleted(tree: Path) -> str:
    shutil.rmtree(tree / "test")
    return "3 removed (test/ant/0.bmp"


ACCIDENTS = (
    overwritten_in_place_under_the_old_time,
    replaced_by_an_older_file,
    two_images_swapped,
    two_splits_swapped,
    one_emptied,
    five_added,
    one_removed,
    one_put_into_another_class,
    a_class_renamed,
    a_link_led_elsewhere,
    a_class_emptied,
    one_split_deleted,
)


@pytest.mark.parametrize("accident", ACCIDENTS, ids=lambda f: f.__name__)
def test_a_changed_data_set_is_refused_with_what_changed(
    tmp_path: Path, tree: Path, config: DataConfig, settled: None, accident: Callable[[Path], str]
) -> None:
    made = prepare(config, tmp_path / "out")
    assert prepare(config, tmp_path / "out").id == made.id
    told = accident(tree)
    for _ in range(2):  # not forgotten by being told once
        with pytest.raises(UserError) as caught:
            prepare(config, tmp_path / "out")
        assert told in str(caught.value)
    assert load(tmp_path / "out").manifest == made.manifest


def test_overwrite_takes_the_changed_images(tmp_path: Path, tree: Path, config: DataConfig) -> None:
    before = prepare(config, tmp_path / "out")
    five_added(tree)
    with pytest.raises(UserError, match="--overwrite"):
        prepare(config, tmp_path / "out")
    after = prepare(config, tmp_path / "out", overwrite=True)
    assert (before.facts["train"], after.facts["train"]) == (9, 14)
    assert prepare(config, tmp_path / "out").id == after.id != before.id


def same(one: Artifact, other: Artifact) -> bool:
    assert one.manifest["files"] == other.manifest["files"]
    return one.id == other.id


def test_equal_content_is_equal_wherever_it_lies(
    tmp_path: Path, tree: Path, config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(config, tmp_path / "out")
    assert "root" not in first.config
    assert first.manifest["places"] == {"root": str(tree)}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tree)
    shutil.copytree(tree, tmp_path / "disk" / "copy")
    shutil.copytree(tree, tmp_path / "linked", copy_function=os.link)
    (tmp_path / "parent" / "sub").mkdir(parents=True)
    shutil.copytree(tree, tmp_path / "parent" / "set")
    for number, root in enumerate(
        (
            "data",
            "./data/",
            "link",
            "disk/copy",
            str(tmp_path / "disk" / ".." / "data"),
            "linked",
            "parent",
            "link/train/..",
        )
    ):
        assert same(prepare(replace(config, root=Path(root)), tmp_path / "out"), first), root
        assert same(prepare(replace(config, root=Path(root)), tmp_path / f"out{number}"), first), root
    assert same(prepare(replace(config, root=Path("data")), tmp_path / "out", overwrite=True), first)
    tree.rename(tmp_path / "moved")
    assert same(prepare(replace(config, root=tmp_path / "moved"), tmp_path / "out"), first)


def test_the_second_look_reads_no_file(
    tmp_path: Path, tree: Path, config: DataConfig, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prepare(config, tmp_path / "out")
    with monkeypatch.context() as patch:
        no_reading(patch)
        assert prepare(config, tmp_path / "out").id == made.id
        tree.rename(tmp_path / "moved")
        assert prepare(replace(config, root=tmp_path / "moved"), tmp_path / "out").id == made.id
        os.utime(tmp_path / "moved" / "train" / "ant" / "0.bmp", (5, 5))
        with pytest.raises(AssertionError, match="0.bmp is read again"):
            prepare(replace(config, root=tmp_path / "moved"), tmp_path / "out")
    assert (
        prepare(replace(config, root=tmp_path / "moved"), tmp_path / "out").id == made.id
    )  # only its time was another
    with monkeypatch.context() as patch:
        no_reading(patch)
        prepare(replace(config, root=tmp_path / "moved"), tmp_path / "out")


def test_a_file_just_written_is_read_again(tmp_path: Path, config: DataConfig) -> None:
    """Its stamp may stay when it is written once more within the file system's tick."""
    made = prepare(config, tmp_path / "out")
    record = json.loads((tmp_path / "out" / artifacts.STAMPS).read_text())
    assert len(record["rows"]) == 12
    assert all(row[3] is None for row in record["rows"])
    assert artifacts.STAMPS not in made.manifest["files"]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"home": "/", "digest": "x", "rows": [[1, 2]]}', None])
def test_without_stamps_or_with_damaged_ones_all_is_read(
    tmp_path: Path, tree: Path, config: DataConfig, settled: None, damage: bytes | None
) -> None:
    made = prepare(config, tmp_path / "out")
    stamps = tmp_path / "out" / artifacts.STAMPS
    if damage is None:
        stamps.unlink()
    else:
        stamps.write_bytes(damage)
    assert prepare(config, tmp_path / "out").id == made.id
    assert json.loads(stamps.read_text())["digest"] == made.manifest["inputs"]["root"]
    stamps.unlink()
    picture(tree / "train" / "ant" / "0.bmp", 77)
    with pytest.raises(UserError, match="its content is not what it was"):
        prepare(config, tmp_path / "out")


def all_deleted(tree: Path) -> None:
    shutil.rmtree(tree)


def disk_not_mounted(tree: Path) -> None:
    shutil.rmtree(tree)
    tree.mkdir()


def images_deleted_folders_left(tree: Path) -> None:
    for path in tree.rglob("*.bmp"):
        path.unlink()


def a_file_in_its_place(tree: Path) -> None:
    shutil.rmtree(tree)
    tree.write_text("moved to the archive")


@pytest.mark.parametrize("accident", [all_deleted, disk_not_mounted, images_deleted_folders_left, a_file_in_its_place])
def test_a_finished_data_set_outlives_its_images(
    tmp_path: Path, tree: Path, config: DataConfig, caplog: pytest.LogCaptureFixture, accident: Callable[[Path], None]
) -> None:
    made = prepare(config, tmp_path / "out")
    accident(tree)
    with caplog.at_level(logging.WARNING):
        assert prepare(config, tmp_path / "out").id == made.id
    assert "root cannot be compared with what this was made from" in caplog.text
    for other in (tmp_path / "elsewhere", tmp_path):
        with pytest.raises(UserError):
            prepare(replace(config, root=other), tmp_path / "out")
    for overwrite in (True, False):
        with pytest.raises(UserError):
            prepare(config, tmp_path / "fresh", overwrite=overwrite)
    with pytest.raises(UserError):
        prepare(config, tmp_path / "out", overwrite=True)
    assert load(tmp_path / "out").id == made.id
    assert not (tmp_path / "fresh").exists()


def older(made: Artifact, root: str | None) -> None:
    """The manifest as versions before this wrote it."""
    manifest = json.loads((made.path / artifacts.MANIFEST).read_text())
    manifest.pop("inputs", None)
    manifest.pop("places", None)
    manifest["config"] = {"root": root, "fonts": None} | manifest["config"] | {"root": root}
    manifest["id"] = artifacts.identity_digest(manifest)
    (made.path / artifacts.MANIFEST).write_text(json.dumps(manifest))
    (made.path / artifacts.STAMPS).unlink()


def test_older_data_sets_are_taken_and_watched_from_then_on(
    tmp_path: Path, tree: Path, config: DataConfig, caplog, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prepare(config, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    for root in (str(tree), "data", str(tmp_path / "x" / ".." / "data")):
        older(made, root)
        before = load(made.path).manifest
        caplog.clear()
        assert prepare(config, tmp_path / "out").manifest == before
        assert "did not record its content" in caplog.text
        caplog.clear()
        assert prepare(config, tmp_path / "out").manifest == before
        assert caplog.text == ""
    one_removed(tree)
    with pytest.raises(UserError, match="1 removed"):
        prepare(config, tmp_path / "out")
    (tmp_path / "out" / artifacts.STAMPS).unlink()
    with pytest.raises(UserError, match=r"root was .*, now .*elsewhere"):
        prepare(replace(config, root=tree.rename(tmp_path / "elsewhere")), tmp_path / "out")


def test_a_setting_newer_than_the_manifest_counts_as_its_default(tmp_path: Path, config: DataConfig) -> None:
    made = prepare(config, tmp_path / "out")
    manifest = json.loads((made.path / artifacts.MANIFEST).read_text())
    del manifest["config"]["bad_images"]
    manifest["id"] = artifacts.identity_digest(manifest)
    (made.path / artifacts.MANIFEST).write_text(json.dumps(manifest))
    assert prepare(config, tmp_path / "out").id == manifest["id"]
    with pytest.raises(UserError, match=r"config\.bad_images was 'error', now 'skip'"):
        prepare(replace(config, bad_images="skip"), tmp_path / "out")


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_with_the_images_as_they_are_now(
    tmp_path: Path, tree: Path, config: DataConfig, caplog, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module, "_finish", lambda *args: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            prepare(config, tmp_path / "out")
    overwritten_in_place_under_the_old_time(tree)
    one_removed(tree)
    decoded: list[str] = []
    decode = module.decode
    monkeypatch.setattr(module, "decode", lambda path: decoded.append(path.name) or decode(path))
    made = prepare(config, tmp_path / "out")
    assert decoded == ["1.bmp"]
    assert "1 changed (train/ant/1.bmp), 1 removed (train/bee/0.bmp)" in caplog.text
    assert same(prepare(config, tmp_path / "fresh"), made)


def test_images_that_change_while_they_are_read_are_named(
    tmp_path: Path, tree: Path, config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = module.decode
    touched = tree / "test" / "cat" / "0.bmp"

    def meanwhile(path: Path):
        if path.name == "0.bmp" and path.parent.name == "ant":
            picture(touched, 4711)
            (tree / "train" / "ant" / "2.bmp").touch()  # its content stays: no error
        return decode(path)

    with monkeypatch.context() as patch:
        patch.setattr(module, "decode", meanwhile)
        with pytest.raises(UserError, match=r"1 changed \(.*test/cat/0\.bmp\) while the data set was prepared"):
            prepare(config, tmp_path / "out")
    assert same(prepare(config, tmp_path / "out"), prepare(config, tmp_path / "fresh"))


@pytest.fixture
def aircraft(tmp_path: Path) -> DataConfig:
    data = tmp_path / "fgvc-aircraft-2013b" / "data"
    for n in range(1, 7):
        picture(data / "images" / f"{n:07d}.jpg", n)
    (data / "variants.txt").write_text("707\nA320\n")
    for name, numbers in (("trainval", (1, 2, 3, 4)), ("test", (5, 6))):
        lines = "".join(f"{n:07d} {('707', 'A320')[n % 2]}\n" for n in numbers)
        (data / f"images_variant_{name}.txt").write_text(lines)
    return DataConfig(dataset="aircraft", root=tmp_path / "fgvc-aircraft-2013b", size=8)


def test_changed_annotations_are_noticed_and_their_form_is_not(tmp_path: Path, aircraft: DataConfig) -> None:
    made = prepare(aircraft, tmp_path / "out")
    for root in (tmp_path, tmp_path / "fgvc-aircraft-2013b" / "data"):
        assert same(prepare(replace(aircraft, root=root), tmp_path / "out"), made)
    labels = tmp_path / "fgvc-aircraft-2013b" / "data" / "images_variant_trainval.txt"
    text = labels.read_text()
    labels.write_bytes(text.replace("\n", "\r\n").encode())
    assert prepare(aircraft, tmp_path / "out").id == made.id
    labels.write_text(text.replace("0000003 A320", "0000003 707"))
    with pytest.raises(UserError, match=r"1 of another class \(images/0000003\.jpg: train A320, now train 707\)"):
        prepare(aircraft, tmp_path / "out")
    labels.write_text("".join(sorted(text.splitlines(keepends=True), reverse=True)))
    with pytest.raises(UserError, match="its content is not what it was"):  # the same images in another order
        prepare(aircraft, tmp_path / "out")
    (labels.parent / "variants.txt").write_text("A320\n707\n")
    with pytest.raises(UserError):
        prepare(aircraft, tmp_path / "out")


@pytest.fixture
def fonts(tmp_path: Path) -> DataConfig:
    (tmp_path / "fonts").mkdir()
    for name in ("DejaVuSans.ttf", "DejaVuSerif.ttf"):
        shutil.copyfile(typefaces.builtin_folder() / name, tmp_path / "fonts" / name)
    return DataConfig(classes=2, size=16, train_per_class=1, test_per_class=1, fonts=tmp_path / "fonts")


def test_fonts_count_by_their_content(
    tmp_path: Path, fonts: DataConfig, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prepare(fonts, tmp_path / "out")
    assert made.manifest["places"] == {"fonts": str(tmp_path / "fonts")}
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tmp_path / "fonts", tmp_path / "copy")
    for folder in ("fonts", "copy"):
        assert same(prepare(replace(fonts, fonts=Path(folder)), tmp_path / "out"), made)
    with monkeypatch.context() as patch:
        no_reading(patch)
        patch.setattr(typefaces, "choose", lambda *args: pytest.fail("the faces are chosen again"))
        (tmp_path / "copy").rename(tmp_path / "moved")
        assert prepare(replace(fonts, fonts=tmp_path / "moved"), tmp_path / "out").id == made.id
    (tmp_path / "fonts" / "broken.ttf").write_bytes(b"no font")  # no class is made from it
    assert prepare(fonts, tmp_path / "out").id == made.id
    (tmp_path / "fonts" / "DejaVuSerif.ttf").write_bytes(
        (typefaces.builtin_folder() / "DejaVuSansMono.ttf").read_bytes()
    )
    with pytest.raises(UserError, match=r"fonts .*: 1 changed \(DejaVuSerif\.ttf\)"):
        prepare(fonts, tmp_path / "out")
    os.replace(tmp_path / "fonts" / "DejaVuSerif.ttf", tmp_path / "fonts" / "a.ttf")
    with pytest.raises(UserError, match=r"1 added \(a\.ttf\), 1 removed \(DejaVuSerif\.ttf\)"):
        prepare(fonts, tmp_path / "out")
    assert load(tmp_path / "out").manifest == made.manifest


def test_deleted_fonts_do_not_cost_the_finished_set(tmp_path: Path, fonts: DataConfig, caplog) -> None:
    made = prepare(fonts, tmp_path / "out")
    (tmp_path / "fonts" / "DejaVuSerif.ttf").unlink()
    with pytest.raises(UserError, match=r"2 typefaces wanted, 1 usable .*1 removed \(DejaVuSerif\.ttf\)"):
        prepare(fonts, tmp_path / "out")
    shutil.rmtree(tmp_path / "fonts")
    assert prepare(fonts, tmp_path / "out").id == made.id
    assert "does not exist; wanted a folder of fonts" in caplog.text


def test_other_fonts_of_matplotlib_are_told_and_the_finished_set_stays(
    tmp_path: Path, fonts: DataConfig, caplog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fonts that come with a library change when it is updated, which nobody means to do to their data."""
    own = replace(fonts, fonts=None)
    typefaces._latin()  # drawn with the real ones
    shutil.copytree(tmp_path / "fonts", updated := tmp_path / "updated")
    (updated / "DejaVuSerif.ttf").unlink()
    shutil.copyfile(typefaces.builtin_folder() / "DejaVuSansMono.ttf", updated / "DejaVuSansMono.ttf")
    monkeypatch.setattr(typefaces, "builtin_folder", lambda: tmp_path / "fonts")
    made = prepare(own, tmp_path / "out")
    assert made.manifest["places"] == {"fonts": "matplotlib"}
    assert made.id == prepare(fonts, tmp_path / "given").id
    monkeypatch.setattr(typefaces, "builtin_folder", lambda: updated)
    for _ in range(2):
        caplog.clear()
        assert prepare(own, tmp_path / "out").id == made.id
        assert "1 added (DejaVuSansMono.ttf), 1 removed (DejaVuSerif.ttf)" in caplog.text
