"""The built-in set: which faces are taken, that images are legible by measure, seeded, and words never shared by the splits."""

import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fd2fast.data import typefaces
from fd2fast.data.prepare import prepare
from fd2fast.errors import UserError
from fd2fast.settings.config import DataConfig, replace

SMALL = DataConfig(size=32, classes=3, train_per_class=3, test_per_class=2)


def fonts(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        shutil.copy(typefaces.builtin_folder() / name, folder / name)
    return folder


def test_the_faces_of_matplotlib() -> None:
    faces, dropped = typefaces.find_faces(typefaces.builtin_folder())
    names = {face.source for face in faces}
    assert {
        "DejaVuSans.ttf",
        "DejaVuSerif-BoldItalic.ttf",
        "DejaVuSansMono.ttf",
        "STIXGeneral.ttf",
        "cmr10.ttf",
    } <= names
    assert {"cmti10.ttf", "cmss10.ttf", "cmtt10.ttf"} <= names
    traps = ("STIXNonUni.ttf", "STIXSizOneSymReg.ttf", "cmex10.ttf", "cmsy10.ttf", "DejaVuSansDisplay.ttf")
    assert not names & {*traps, "LastResortHE-Regular.ttf"}
    assert len(faces) >= 20
    assert len({face.name for face in faces}) == len(faces)
    assert dropped["without all Latin letters and digits"] > 0
    assert dropped["not Latin letters"] > 0


def test_families_are_spread_before_styles() -> None:
    chosen = typefaces.choose(6)
    assert len({face.family for face in chosen}) == 6
    assert [face.name for face in chosen] == sorted(face.name for face in chosen)
    assert {face.name for face in chosen} <= {face.name for face in typefaces.choose(12)}


def test_folders_are_searched_below_and_look_alikes_taken_once(tmp_path: Path) -> None:
    fonts(tmp_path / "a" / "b", "DejaVuSans.ttf", "cmr10.ttf", "cmsy10.ttf")
    shutil.copy(typefaces.builtin_folder() / "DejaVuSans.ttf", tmp_path / "copy.otf")
    (tmp_path / "page.ttf").write_text("<html>not a font</html>")
    (tmp_path / "empty.woff2").touch()
    faces, dropped = typefaces.find_faces(tmp_path)
    assert [face.name for face in faces] == ["cmr10", "DejaVu-Sans"]
    assert dropped == {
        "unreadable": 2,
        "without all Latin letters and digits": 0,
        "not Latin letters": 1,
        "look-alikes": 1,
    }


def test_too_few_faces_are_counted_with_the_reasons(tmp_path: Path) -> None:
    fonts(tmp_path / "fonts", "DejaVuSans.ttf", "cmsy10.ttf")
    with pytest.raises(
        UserError, match=r"3 typefaces wanted, 1 usable found in .*fonts \(left out: 1 not Latin letters\)"
    ):
        prepare(replace(SMALL, fonts=tmp_path / "fonts"), tmp_path / "out")
    with pytest.raises(UserError, match="500 typefaces wanted, 2[0-9] usable found"):
        prepare(replace(SMALL, classes=500), tmp_path / "out")
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="holds no font files"):
        prepare(replace(SMALL, fonts=tmp_path / "none"), tmp_path / "out")
    with pytest.raises(UserError, match="missing does not exist"):
        prepare(replace(SMALL, fonts=tmp_path / "missing"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_words() -> None:
    train, test = set(typefaces.TRAIN_WORDS), set(typefaces.TEST_WORDS)
    assert not train & test
    assert len(train) == len(typefaces.TRAIN_WORDS) > 250
    assert len(test) == len(typefaces.TEST_WORDS) > 250
    for words in (train, test):
        assert {len(word) for word in words} == {3, 4, 5}
        assert set("".join(words)) == set("abcdefghijklmnopqrstuvwxyz")


def test_the_whole_word_is_inside_and_stands_out() -> None:
    for face in typefaces.choose(5):
        for number in range(12):
            random = np.random.default_rng(number)
            word = typefaces.TEST_WORDS[number * 20]
            mask = typefaces._mask(face, word, 64, random)
            assert mask.shape == (64, 64)
            assert mask[[0, -1]].max() < 40, (face.name, word)
            assert mask[:, [0, -1]].max() < 40, (face.name, word)
            columns = np.flatnonzero(mask.max(0) > 128)
            rows = np.flatnonzero(mask.max(1) > 128)
            assert max(columns[-1] - columns[0], rows[-1] - rows[0]) >= 40, (face.name, word)
            ground, letters = typefaces._colours(random)
            assert abs((ground - letters) @ np.array([0.2989, 0.587, 0.114])) > 0.3


def test_an_image_depends_on_seed_split_face_and_number_only() -> None:
    one, two = typefaces.choose(2)
    image = typefaces.render(one, 0, "train", 0, 32)
    assert image.shape == (32, 32, 3)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, typefaces.render(one, 0, "train", 0, 32))
    others = [(one, 1, "train", 0), (one, 0, "test", 0), (two, 0, "train", 0), (one, 0, "train", 1)]
    assert all(not np.array_equal(image, typefaces.render(*other, 32)) for other in others)


def test_the_set_as_an_artifact(tmp_path: Path) -> None:
    first = prepare(SMALL, tmp_path / "one")
    assert first.classes == sorted(first.classes)
    assert len(first.classes) == 3
    assert first.facts["fonts"].keys() == set(first.classes)
    assert (first.facts["train"], first.facts["test"]) == (9, 6)
    images = np.load(first.file("train_images.npy"))
    path = first.file(f"images/train/{first.classes[1]}/002.png")
    np.testing.assert_array_equal(images[5].transpose(1, 2, 0), np.asarray(Image.open(path)))
    assert prepare(SMALL, tmp_path / "two").id == first.id
    other = prepare(replace(SMALL, seed=1), tmp_path / "three")
    assert (tmp_path / "three" / "train_images.npy").read_bytes() != (
        tmp_path / "one" / "train_images.npy"
    ).read_bytes()
    assert other.classes == first.classes


def test_a_killed_rendering_goes_on_and_ends_in_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = prepare(SMALL, tmp_path / "whole")

    class Killed(BaseException):
        pass

    written: list[Path] = []
    write = typefaces._write

    def dies(path: Path, *rest) -> None:
        if len(written) >= 7:
            path.with_name(f".{path.name}.tmp").write_bytes(b"half")
            raise Killed
        written.append(path)
        write(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(typefaces, "_write", dies)
        with pytest.raises(Killed):
            prepare(SMALL, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in written}
    assert prepare(SMALL, tmp_path / "out").id == whole.id
    assert {path: path.stat().st_mtime_ns for path in written} == before
    names = [sorted(str(p.relative_to(r)) for p in r.rglob("*")) for r in (tmp_path / "whole", tmp_path / "out")]
    assert names[0] == names[1]


@pytest.mark.parametrize("left", ["empty", "cut", "zeros", "half zeros"])
def test_images_that_a_power_cut_left_unfinished_are_drawn_again(left: str, tmp_path: Path) -> None:
    """They have their name, but not their bytes."""
    config = DataConfig(size=16, classes=2, train_per_class=2, test_per_class=1)
    faces = typefaces.choose(2, None)
    typefaces.render_set(config, faces, tmp_path)
    path = sorted(tmp_path.rglob("*.png"))[1]
    whole = path.read_bytes()
    half = len(whole) // 2
    path.write_bytes(
        {
            "empty": b"",
            "cut": whole[:half],
            "zeros": bytes(len(whole)),
            "half zeros": whole[:half] + bytes(len(whole) - half),
        }[left]
    )
    typefaces.render_set(config, faces, tmp_path)
    assert path.read_bytes() == whole


def test_kill_9_and_again(tmp_path: Path) -> None:
    config = replace(SMALL, train_per_class=100)
    code = (
        "import sys; from fd2fast.settings.config import DataConfig; from fd2fast.data.prepare import prepare; "
        "prepare(DataConfig(size=32, classes=3, train_per_class=100, test_per_class=2), sys.argv[1])"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out")], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 600
        while not list((tmp_path / "out" / "images").rglob("010.png")) and time.monotonic() < deadline:
            time.sleep(0.005)
        process.kill()
    assert 10 <= len(list((tmp_path / "out").rglob("*.png"))) < 306
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert prepare(config, tmp_path / "out").id == prepare(config, tmp_path / "whole").id


def test_a_full_disk_keeps_what_is_rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced: list[Path] = []
    move = typefaces.os.replace

    def full(source: Path, target: Path) -> None:
        if len(replaced) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        replaced.append(target)
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(typefaces.os, "replace", lambda a, b: (full if "images" in str(a) else move)(a, b))
        with pytest.raises(UserError, match=r"no space left while writing .*png .*; what was finished before is kept"):
            prepare(SMALL, tmp_path / "out")
    assert [path for path in replaced if path.is_file()] == replaced
    assert not list((tmp_path / "out").rglob("*.tmp"))
    assert prepare(SMALL, tmp_path / "out").id == prepare(SMALL, tmp_path / "whole").id


def test_collections_hold_several_faces(tmp_path: Path) -> None:
    from fontTools.ttLib import TTCollection, TTFont

    collection = TTCollection()
    collection.fonts = [TTFont(typefaces.builtin_folder() / name) for name in ("cmr10.ttf", "cmsy10.ttf", "cmtt10.ttf")]
    collection.save(tmp_path / "three.ttc")
    faces, dropped = typefaces.find_faces(tmp_path)
    assert [(face.name, face.source) for face in faces] == [("cmr10", "three.ttc"), ("cmtt10", "three.ttc#2")]
    assert (dropped["not Latin letters"], dropped["unreadable"]) == (1, 0)
    alone = next(f for f in typefaces.find_faces(typefaces.builtin_folder())[0] if f.name == "cmtt10")
    np.testing.assert_array_equal(
        typefaces.render(faces[1], 0, "train", 3, 32), typefaces.render(alone, 0, "train", 3, 32)
    )


def test_more_images_add_to_a_set(tmp_path: Path) -> None:
    few = prepare(SMALL, tmp_path / "few")
    many = prepare(replace(SMALL, classes=5, train_per_class=4), tmp_path / "many")
    shared = set(few.classes) & set(many.classes)
    assert shared == set(few.classes)
    for name in shared:
        file = f"images/train/{name}/001.png"
        assert few.file(file).read_bytes() == many.file(file).read_bytes()


def test_each_font_file_is_found_once_and_loops_end(tmp_path: Path, caplog) -> None:
    fonts(tmp_path / "fonts" / ".local" / "deep", "DejaVuSans.ttf")
    fonts(tmp_path / "fonts", "cmr10.ttf")
    fonts(tmp_path / "fonts" / "__MACOSX", "DejaVuSerif.ttf")
    (tmp_path / "fonts" / "._cmr10.ttf").write_bytes(b"Mac OS X")
    (tmp_path / "fonts" / "self").symlink_to(".")
    (tmp_path / "fonts" / "root").symlink_to("/")
    (tmp_path / "fonts" / "link.ttf").symlink_to("cmr10.ttf")
    (tmp_path / "fonts" / "gone.otf").symlink_to("/nowhere/gone.otf")
    (tmp_path / "fonts" / "gone.conf").symlink_to("/nowhere/gone.conf")
    os.mkfifo(tmp_path / "fonts" / "pipe.ttf")
    with caplog.at_level("INFO", "fd2fast"):
        faces, dropped = typefaces.find_faces(tmp_path / "fonts")
    assert [face.name for face in faces] == ["cmr10", "DejaVu-Sans"]
    assert dropped["unreadable"] == 1
    assert dropped["look-alikes"] == 0
    assert "2 entries of NAS, system or archive programs (._cmr10.ttf, ...)" in caplog.text
    assert "2 links that lead back" in caplog.text


def test_a_folder_of_fonts_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch, caplog) -> None:
    fonts(tmp_path / "fonts", "DejaVuSans.ttf", "cmr10.ttf")
    (tmp_path / "fonts" / "private").mkdir()
    scandir = os.scandir

    def failing(path):
        if not isinstance(path, int) and os.fspath(path).endswith("private"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(UserError, match=f"cannot all be read .*skip.*private: {os.strerror(errno.EACCES)}"):
        typefaces.choose(2, tmp_path / "fonts")
    assert len(typefaces.choose(2, tmp_path / "fonts", skip=True)) == 2
    assert "fonts left out: " in caplog.text


def test_names_of_faces_are_fit_for_folders() -> None:
    tiles = np.zeros((52, 28, 56), np.float32)
    families = ["../../etc", "/", "a/b", "..", "x" * 400, "x" * 400, "\0", "CON\n", "日本", "~"]
    faces = [typefaces.Face(Path("f.ttf"), 0, family, "", "", tiles) for family in families]
    names = [face.name for face in typefaces._named(faces)]
    assert len(set(names)) == len(names)
    assert all(name.replace("-", "").isalnum() and name.isascii() and len(name) <= 110 for name in names)
