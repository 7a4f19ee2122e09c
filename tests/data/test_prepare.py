"""Preparation: arrays and manifest, conversions, every bad input, determinism, unfinished states taken up again."""

import errno
import io
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fd2fast.artifacts import config_dict, load
from fd2fast.data import prepare as module
from fd2fast.data.layouts import STATISTICS
from fd2fast.data.pixels import read_image
from fd2fast.data.prepare import describe, measure, prepare
from fd2fast.data.store import load_split
from fd2fast.errors import UserError
from fd2fast.settings.config import DataConfig, replace

CLASSES = ("ant", "bee", "cat")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 2)):
        for name in CLASSES:
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for n in range(count):
                Image.fromarray(random.integers(0, 256, (20, 12, 3), dtype=np.uint8)).save(folder / f"{n}.png")
    return tmp_path / "data"


@pytest.fixture
def config(tree: Path) -> DataConfig:
    return DataConfig(dataset="folder", root=tree, size=8)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file() and p.name not in ("manifest.json", "stamps.json")
    }


def test_arrays_labels_and_manifest(tmp_path: Path, tree: Path, config: DataConfig) -> None:
    result = prepare(config, tmp_path / "out")
    assert (result.kind, result.classes, result.size) == ("dataset", list(CLASSES), 8)
    assert sorted(contents(tmp_path / "out")) == [
        "preview.png",
        "test_images.npy",
        "test_labels.npy",
        "train_images.npy",
        "train_labels.npy",
    ]
    facts = result.facts
    assert (facts["name"], facts["train"], facts["test"]) == ("folder", 12, 6)
    assert facts["per_class"] == {"train": [4, 4, 4], "test": [2, 2, 2]}
    assert facts["skipped"] == []
    assert set(facts["converted"].values()) == {0}
    assert facts["statistics"] == {"mean": "measured", "std": "measured"}
    train = load_split(result, "train")
    expected = [(k, tree / "train" / name / f"{n}.png") for k, name in enumerate(CLASSES) for n in range(4)]
    assert train.labels.tolist() == [k for k, _ in expected]
    assert torch.equal(train.pixels(range(12)), torch.stack([read_image(path, 8) for _, path in expected]))
    values = train.unit(range(12), dtype=torch.float64)
    np.testing.assert_allclose(result.mean, values.mean((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(result.std, values.std((0, 2, 3), correction=0), atol=1e-6)
    result.verify()
    assert prepare(config, tmp_path / "out").id == result.id
    text = describe(result)
    assert all(part in text for part in ("folder at 8 x 8", "3: ant, bee, cat", "12 (4 of each class)", "measured"))
    with Image.open(tmp_path / "out" / "preview.png") as preview:
        assert preview.width > 4 * 64


def test_same_bytes_anywhere_and_whatever_the_threads(
    tmp_path: Path, config: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(config, tmp_path / "one")
    monkeypatch.setattr(module, "_CHUNK", 5)
    second = prepare(config, tmp_path / "two")
    assert first.id == second.id
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_known_given_and_measured_statistics(tmp_path: Path, config: DataConfig) -> None:
    given = prepare(replace(config, std=(0.2, 0.3, 0.4)), tmp_path / "given")
    assert given.std == (0.2, 0.3, 0.4)
    assert given.facts["statistics"] == {"mean": "measured", "std": "given"}
    images = np.zeros((1, 3, 2, 2), np.uint8)
    for size in (64, 224):
        assert module._statistics(DataConfig(dataset="cub", size=size), images, np.ones(1, bool)) == (
            *STATISTICS["cub", size],
            {"mean": "reference", "std": "reference"},
        )
    assert module._statistics(DataConfig(dataset="cub", size=32), images, np.ones(1, bool))[2]["mean"] == "measured"
    constant = np.full((2, 3, 2, 2), 51, np.uint8)
    mean, std = measure(constant)
    assert mean == (0.2, 0.2, 0.2)
    assert min(std) > 0


def test_every_mode_is_converted_and_counted(tmp_path: Path, tree: Path, config: DataConfig) -> None:
    ant = tree / "train" / "ant"
    Image.new("L", (9, 9), 7).save(ant / "0.png")
    Image.new("CMYK", (9, 9)).save(ant / "1.jpg")
    Image.new("RGBA", (9, 9), (0, 0, 0, 0)).save(ant / "2.png")
    Image.fromarray(np.full((9, 9), 65535, np.uint16)).save(ant / "3.png")
    Image.new("P", (9, 9)).save(tree / "test" / "bee" / "0.png")
    result = prepare(config, tmp_path / "out")
    assert result.facts["converted"] == {"grey": 2, "palette": 1, "cmyk": 1, "alpha": 1, "16bit": 1, "other": 0}
    train = load_split(result, "train")
    names = sorted(p.name for p in ant.iterdir())
    assert names == ["0.png", "1.jpg", "1.png", "2.png", "3.png"]
    shown = train.pixels(range(5)).float().mean((1, 2, 3))
    assert shown[0] == 7
    assert shown[1] > 250  # no ink on white
    assert shown[3:].tolist() == [255, 255]
    assert "converted 2 grey, 1 palette, 1 cmyk, 1 alpha, 1 16bit" in describe(result)


def spoil(tree: Path) -> list[str]:
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 50, 3), dtype=np.uint8)).save(whole, "JPEG")
    bad = {"empty.jpg": b"", "half.jpg": whole.getvalue()[:900], "notes.txt": b"not an image"}
    for name, data in bad.items():
        (tree / "train" / "bee" / name).write_bytes(data)
    (tree / "test" / "cat" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return [*(f"train/bee/{name}" for name in bad), "test/cat/1.png"]


def test_bad_images_are_all_named_and_nothing_is_lost(
    tmp_path: Path, tree: Path, config: DataConfig, monkeypatch
) -> None:
    bad = spoil(tree)
    with pytest.raises(UserError) as caught:
        prepare(config, tmp_path / "out")
    message = str(caught.value)
    assert "4 images cannot be read" in message
    assert "skip" in message
    assert all(str(tree / name) in message for name in bad)
    decoded: list[Path] = []
    decode = module.decode
    monkeypatch.setattr(module, "decode", lambda path: decoded.append(path) or decode(path))
    result = prepare(replace(config, bad_images="skip"), tmp_path / "out")
    assert sorted(str(p.relative_to(tree)) for p in decoded) == sorted(bad)  # the good rows were kept
    assert result.facts["skipped"] == sorted(bad)
    assert (result.facts["train"], result.facts["test"]) == (12, 5)
    assert result.facts["per_class"]["test"] == [2, 2, 1]
    assert "skipped   4: test/cat/1.png" in describe(result)
    assert not (tmp_path / "out" / "state").exists()
    monkeypatch.setattr(module, "decode", decode)
    for name in bad:
        (tree / name).unlink()
    clean = prepare(config, tmp_path / "clean")
    for name in ("train_images.npy", "train_labels.npy", "test_images.npy", "test_labels.npy"):
        assert (clean.path / name).read_bytes() == (result.path / name).read_bytes()


def test_many_bad_images_are_shown_in_part(tmp_path: Path, tree: Path, config: DataConfig) -> None:
    for n in range(30):
        (tree / "train" / "ant" / f"x{n:02d}.png").touch()
    with pytest.raises(UserError, match="30 images") as caught:
        prepare(config, tmp_path / "out")
    assert str(caught.value).count("x1") == 10
    assert str(caught.value).endswith("and 10 more")


def test_repaired_files_are_decoded_again_and_the_rest_is_kept(tmp_path: Path, tree: Path, config, monkeypatch) -> None:
    target = tree / "train" / "bee" / "0.png"
    good = target.read_bytes()
    target.write_bytes(good[:60])
    with pytest.raises(UserError, match=f"one image cannot .*\n  {target}: "):
        prepare(config, tmp_path / "out")
    target.write_bytes(good)
    (tree / "test" / "ant" / "0.png").rename(tree / "test" / "ant" / "9.png")
    decoded: list[str] = []
    decode = module.decode
    monkeypatch.setattr(module, "decode", lambda path: decoded.append(path.name) or decode(path))
    result = prepare(config, tmp_path / "out")
    assert sorted(decoded) == ["0.png", "9.png"]
    assert result.id == prepare(config, tmp_path / "fresh").id


def test_a_class_without_readable_images_is_named(tmp_path: Path, tree: Path, config: DataConfig) -> None:
    for path in (tree / "test" / "bee").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="no readable test images in class 'bee'"):
        prepare(replace(config, bad_images="skip"), tmp_path / "out")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moment", ["decoding", "marking", "moving", "manifest"])
def test_a_killed_run_ends_in_the_same_bytes(tmp_path: Path, tree: Path, config, monkeypatch, moment: str) -> None:
    spoil(tree)
    config = replace(config, bad_images="skip")
    whole = prepare(config, tmp_path / "whole")
    monkeypatch.setattr(module, "_CHUNK", 4)
    out, seen = tmp_path / "out", []

    def dies_at(target, name: str, count: int):
        original = getattr(target, name)

        def wrapped(*args, **kwargs):
            seen.append(1)
            if len(seen) == count:
                raise Killed
            return original(*args, **kwargs)

        return wrapped

    where = {
        "decoding": (module, "decode", 10),
        "marking": (module, "write_npy", 1),
        "moving": (module._Rows, "move", 2),
        "manifest": (module.Stage, "finish", 1),
    }[moment]
    with monkeypatch.context() as patch:
        patch.setattr(where[0], where[1], dies_at(*where))
        with pytest.raises(Killed):
            prepare(config, out)
    assert not (out / "manifest.json").exists()
    (out / ".fd2fast-tmp-1-left").write_bytes(b"half")
    decoded: list[str] = []
    decode = module.decode
    monkeypatch.setattr(module, "decode", lambda path: decoded.append(path.name) or decode(path))
    assert prepare(config, out).id == whole.id
    assert contents(out) == contents(tmp_path / "whole")
    assert len(decoded) <= (22 - 4 if moment == "decoding" else 4)  # 22 files, 4 of them bad


def test_damaged_state_is_made_anew(tmp_path: Path, config: DataConfig) -> None:
    whole = prepare(config, tmp_path / "whole")
    for n, damage in enumerate(("train.npy", "train.json", "train_status.npy")):
        out = tmp_path / f"out{n}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_finish", lambda *args: (_ for _ in ()).throw(Killed()))
            with pytest.raises(Killed):
                prepare(config, out)
        (out / "state" / damage).write_bytes(b"\x93NUMPY{")
        assert prepare(config, out).id == whole.id
    # a header that numpy's parser stumbles over, an archive, pixels of another type and of another size
    with open(tmp_path / "archive", "wb") as file:
        np.savez(file, np.zeros(3))
    header = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|u1', 'shape': ((,".ljust(117) + b"\n"
    contents_of = [header, (tmp_path / "archive").read_bytes()]
    for array in (np.zeros((12, 3, 16, 16), np.float32), np.zeros((12, 3, 5, 5), np.uint8)):
        with open(tmp_path / "array", "wb") as file:
            np.save(file, array)
        contents_of.append((tmp_path / "array").read_bytes())
    for n, content in enumerate(contents_of):
        out = tmp_path / f"other{n}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "_finish", lambda *args: (_ for _ in ()).throw(Killed()))
            with pytest.raises(Killed):
                prepare(config, out)
        (out / "state" / "train.npy").write_bytes(content)
        assert prepare(config, out).id == whole.id


def test_no_space_left_is_said_before_anything_is_written(tmp_path: Path, config: DataConfig, monkeypatch) -> None:
    def full(*args) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full, raising=False)
        with pytest.raises(UserError, match="no space left"):
            prepare(config, tmp_path / "out")
    assert prepare(config, tmp_path / "out").facts["train"] == 12


def test_settings_are_checked_first(tmp_path: Path, config: DataConfig) -> None:
    cases = {
        "unknown data set 'imagenete': did you mean 'imagenette'": replace(config, dataset="imagenete"),
        r"size must be a whole number of pixels within \[8, 32767\], got 0": replace(config, size=0),
        r"mean must be 3 values, each a number within \[0, 1\], got \(123": replace(config, mean=(123.0, 117.0, 104.0)),
        r"std must be 3 values, each a number within \[1e-06, 1\], got": replace(config, std=(0.0, 0.2, 0.2)),
        "bad_images must be": replace(config, bad_images="ignore"),
        "does not exist": replace(config, root=tmp_path / "nowhere"),
        "take no root": DataConfig(root=tmp_path),
        "classes must be a whole number of at least 2, got 1": DataConfig(classes=1),
        "test_per_class must be a whole number of at least 1, got 0": DataConfig(test_per_class=0),
    }
    for message, wrong in cases.items():
        with pytest.raises(UserError, match=message):
            prepare(wrong, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_another_configuration_is_refused_unless_overwritten(tmp_path: Path, config: DataConfig) -> None:
    prepare(config, tmp_path / "out")
    with pytest.raises(UserError, match="size was 8, now 16"):
        prepare(replace(config, size=16), tmp_path / "out")
    assert prepare(replace(config, size=16), tmp_path / "out", overwrite=True).size == 16
    assert load(tmp_path / "out", "dataset").size == 16


def test_images_that_the_annotations_promise_but_the_disk_lacks_are_named(tmp_path: Path) -> None:
    data = tmp_path / "fgvc-aircraft-2013b" / "data"
    (data / "images").mkdir(parents=True)
    (data / "variants.txt").write_text("a\nb\n")
    for name, numbers in (("trainval", (1, 2, 3)), ("test", (4, 5))):
        (data / f"images_variant_{name}.txt").write_text("".join(f"{n:07d} {'ab'[n % 2]}\n" for n in numbers))
        for n in numbers:
            Image.new("RGB", (10, 10), (n, n, n)).save(data / "images" / f"{n:07d}.jpg")
    config = DataConfig(dataset="aircraft", root=tmp_path, size=8)
    assert prepare(config, tmp_path / "whole").facts["per_class"] == {"train": [1, 2], "test": [1, 1]}
    (data / "images" / "0000001.jpg").unlink()
    with pytest.raises(UserError, match="0000001.jpg: no such file"):
        prepare(config, tmp_path / "out")
    result = prepare(replace(config, bad_images="skip"), tmp_path / "out")
    assert result.facts["skipped"] == ["images/0000001.jpg"]
    assert result.facts["per_class"]["train"] == [1, 1]


def turned(path: Path, orientation: int) -> None:
    """A picture twice as high as wide, its upper half red, with an EXIF orientation."""
    image = Image.new("RGB", (8, 16))
    image.paste((255, 0, 0), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)


def test_exif_orientations_are_counted_and_applied_when_asked(tmp_path: Path, tree: Path, config, caplog) -> None:
    plain = prepare(config, tmp_path / "plain")
    assert plain.measured["oriented"] == 0
    assert not [r for r in caplog.records if "EXIF" in r.message]
    for n, orientation in enumerate((3, 6, 1)):
        turned(tree / "train" / "ant" / f"{n}.png", orientation)
    turned(tree / "test" / "bee" / "0.png", 8)
    ignored = prepare(config, tmp_path / "ignored")
    assert ignored.measured["oriented"] == 3
    assert (
        "3 images have an EXIF orientation: it is ignored, as torchvision does (exif 'apply' turns them)" in caplog.text
    )
    assert "turned    3 images have an EXIF orientation: it is ignored" in describe(ignored)
    applied = prepare(replace(config, exif="apply"), tmp_path / "applied")
    assert applied.measured["oriented"] == 3
    assert "an EXIF orientation: it was applied" in describe(applied)
    red = load_split(ignored, "train").pixels(range(3))[:, 0].float() > 128
    assert torch.equal(red[0], red[1])
    assert torch.equal(red[0], red[2])
    new = load_split(applied, "train").pixels(range(3))[:, 0].float() > 128
    assert torch.equal(new[0], red[0].flip(0))
    assert torch.equal(new[1], red[0].rot90(-1))
    assert torch.equal(new[2], red[0])
    assert applied.id != ignored.id
    assert "exif" not in ignored.config
    assert applied.config["exif"] == "apply"
    with pytest.raises(UserError, match="exif"):
        prepare(replace(config, exif="apply"), tmp_path / "ignored")


def test_rows_decoded_with_the_other_exif_setting_are_not_kept(tmp_path: Path, tree: Path, config) -> None:
    turned(tree / "train" / "ant" / "0.png", 3)
    broken = tree / "train" / "bee" / "x.png"
    broken.write_bytes(b"no image")
    with pytest.raises(UserError, match="one image cannot"):
        prepare(config, tmp_path / "out")
    broken.unlink()
    result = prepare(replace(config, exif="apply"), tmp_path / "out")
    assert result.id == prepare(replace(config, exif="apply"), tmp_path / "fresh").id


def test_new_options_leave_the_identity_of_earlier_results_alone(config: DataConfig) -> None:
    assert not {"exif", "level"} & set(config_dict(config))
    assert config_dict(replace(config, exif="apply"))["exif"] == "apply"
    assert config_dict(replace(config, level="family"))["level"] == "family"


def test_what_the_walk_left_out_is_said_and_measured_and_no_part_of_the_result(
    tmp_path: Path, tree: Path, config, caplog
) -> None:
    clean = prepare(config, tmp_path / "clean")
    assert clean.measured["left_out"] == {}
    assert not [r for r in caplog.records if "left out" in r.message]
    for name in (
        "train/@eaDir/ant/0.png",
        "train/ant/@eaDir/0.png/SYNOPHOTO_THUMB_M.jpg",
        "test/bee/#recycle/9.png",
        "test/cat/.1.png",
    ):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes((tree / "train" / "ant" / "0.png").read_bytes())
    (tree / "train" / "bee" / "self").symlink_to(".")
    (tree / "train" / "bee" / "again.png").symlink_to("0.png")
    os.mkfifo(tree / "test" / "ant" / "pipe.png")
    result = prepare(config, tmp_path / "out")
    assert result.measured["left_out"] == {"junk": 3, "hidden": 1, "leads_back": 1, "again": 1, "special": 1}
    assert "left out 3 entries of NAS, system or archive programs (" in caplog.text
    assert "1 link that leads back to a folder above it (train/bee/self)" in caplog.text
    assert "left out  3 entries of NAS" in describe(result)
    assert (result.id, contents(result.path)) == (clean.id, contents(clean.path))


def refuse(monkeypatch: pytest.MonkeyPatch, folder: Path, code: int) -> None:
    scandir = os.scandir

    def failing(path):
        if not isinstance(path, int) and os.fspath(path) == str(folder):
            raise OSError(code, os.strerror(code), str(folder))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_folders_that_cannot_be_read_are_named_or_skipped_as_images_are(
    tmp_path: Path, tree, config, monkeypatch, code
) -> None:
    (tree / "train" / "ant" / "more").mkdir()
    (tree / "train" / "ant" / "more" / "9.png").write_bytes((tree / "train" / "ant" / "0.png").read_bytes())
    (tree / "test" / "cat" / "far.png").symlink_to("/nowhere/far.png")
    refuse(monkeypatch, tree / "train" / "ant" / "more", code)
    monkeypatch.setattr(module, "decode", None)  # said before anything is decoded
    with pytest.raises(UserError, match="2 files or folders cannot be read .*skip") as caught:
        prepare(config, tmp_path / "out")
    assert f"train/ant/more: {os.strerror(code)}" in str(caught.value)
    assert "far.png: a link to /nowhere/far.png, which does not exist" in str(caught.value)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    refuse(monkeypatch, tree / "train" / "ant" / "more", code)
    result = prepare(replace(config, bad_images="skip"), tmp_path / "out")
    assert result.facts["skipped"] == ["test/cat/far.png", "train/ant/more"]
    assert (result.facts["train"], result.facts["test"]) == (12, 6)


def test_class_names_cannot_lead_out_of_the_output_folder(tmp_path: Path, tree: Path, monkeypatch) -> None:
    """Names from annotation files are only text, those of folders are what the file system allows."""
    data = tmp_path / "inside" / "fgvc-aircraft-2013b" / "data"
    (data / "images").mkdir(parents=True)
    names = [
        "../../../escape",
        "/tmp/escape",
        "..",
        "a/b",
        "CON",
        "x" * 300,
        "~",
        "$HOME",
        "\x1b[31mred",
        "a\0b",
        "\ufeffmark",
    ]
    (data / "variants.txt").write_text("\n".join(names) + "\n")
    for split, first in (("trainval", 0), ("test", len(names))):
        lines = [f"{first + n:07d} {name}\n" for n, name in enumerate(names)]
        (data / f"images_variant_{split}.txt").write_text("".join(lines))
        for n in range(len(names)):
            Image.new("RGB", (8, 8), (n, n, n)).save(data / "images" / f"{first + n:07d}.jpg")
    before = {p for p in tmp_path.rglob("*")}
    result = prepare(DataConfig(dataset="aircraft", root=data, size=8), tmp_path / "inside" / "out")
    assert result.classes == names
    new = {p for p in tmp_path.rglob("*")} - before
    assert all((tmp_path / "inside" / "out") in (p, *p.parents) for p in new)
    assert sorted(p.name for p in new) == sorted(["out", "manifest.json", "stamps.json", *contents(result.path)])
    assert load(result.path, "dataset").classes == names


def test_settings_of_exif_and_level_are_checked(tmp_path: Path, config: DataConfig) -> None:
    cases = {
        "data.exif must be ignore or apply, got 'rotate'": replace(config, exif="rotate"),
        "data.level must be variant, family or manufacturer, got 'maker'": replace(
            config, dataset="aircraft", level="maker"
        ),
        "level 'family' is one of the data set aircraft; folder has no levels": replace(config, level="family"),
    }
    for message, wrong in cases.items():
        with pytest.raises(UserError, match=message):
            prepare(wrong, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_an_aircraft_level_is_part_of_the_identity(tmp_path: Path) -> None:
    data = tmp_path / "fgvc-aircraft-2013b" / "data"
    (data / "images").mkdir(parents=True)
    (data / "variants.txt").write_text("a1\na2\nb1\n")
    (data / "families.txt").write_text("a\nb\n")
    for split, numbers in (("trainval", (1, 2, 3)), ("test", (4, 5, 6))):
        variants = zip(numbers, ("a1", "a2", "b1"), strict=True)
        rows = [(f"{n:07d}", variant) for n, variant in variants]
        (data / f"images_variant_{split}.txt").write_text("".join(f"{n} {v}\n" for n, v in rows))
        (data / f"images_family_{split}.txt").write_text("".join(f"{n} {v[0]}\n" for n, v in rows))
        for n, _ in rows:
            Image.new("RGB", (10, 10), (int(n), 0, 0)).save(data / "images" / f"{n}.jpg")
    config = DataConfig(dataset="aircraft", root=tmp_path, size=8)
    variant, family = prepare(config, tmp_path / "v"), prepare(replace(config, level="family"), tmp_path / "f")
    assert (variant.classes, family.classes) == (["a1", "a2", "b1"], ["a", "b"])
    assert family.facts["per_class"] == {"train": [2, 1], "test": [2, 1]}
    assert ("level" in variant.config, family.config["level"]) == (False, "family")
    assert variant.id != family.id
