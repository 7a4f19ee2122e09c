"""Files from strangers: nothing in them is executed, and nothing is written outside the folder that was named."""

import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from campaign.mutate import Evil
from distill_tools import SMALL, make_dataset, make_patches, make_teacher

from fd2fast import artifacts
from fd2fast.artifacts import file_digest, identity_digest, open_stage, read_torch
from fd2fast.data.distilled import load_images
from fd2fast.data.layouts import read_layout
from fd2fast.data.pixels import save_image
from fd2fast.data.prepare import prepare
from fd2fast.data.store import load_split
from fd2fast.errors import UserError
from fd2fast.models.backbone import build_backbone, load_weights
from fd2fast.models.released_checkpoints import import_checkpoint
from fd2fast.pipeline import folder_name
from fd2fast.settings.config import DataConfig, EvaluateConfig, RelabelConfig
from fd2fast.stages import relabel
from fd2fast.stages.exchange import export_artifact
from fd2fast.students.student import prepare as prepare_student

WAYS = range(5)


def hostile(kind: str, path: Path, canary: Path, way: int) -> None:
    """Write a file that touches `canary` when it is unpickled."""
    import pickle

    evil = Evil(canary, way)
    state = {"state_dict": {"conv1.weight": torch.zeros(2), "x": evil}}
    if kind == "pickle":
        path.write_bytes(pickle.dumps(evil))
    elif kind == "torch":
        torch.save(state, path)
    elif kind == "old torch":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    else:
        array = np.empty(1, object)
        array[0] = evil
        with open(path, "wb") as file:
            np.save(file, array)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["pickle", "torch", "old torch", "npy"])
def test_a_hostile_checkpoint_is_refused_unread(kind: str, way: int, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    readers: list[tuple[str, Callable[[Path], object]]] = [
        ("ResNet18_M8_5e-1cal.pth", lambda path: load_weights(build_backbone(SMALL, 3), path)),
        ("weights.safetensors", lambda path: load_weights(build_backbone(SMALL, 3), path)),
        ("ResNet18_M8_5e-1cal.pth", lambda path: import_checkpoint(path, size=32)),
        ("state.pt", read_torch),
    ]
    for name, read in readers:
        hostile(kind, tmp_path / name, canary, way)
        with pytest.raises(UserError, match=name):
            read(tmp_path / name)
        assert not canary.exists()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, a teacher, patches, images and labels."""
    folder = tmp_path_factory.mktemp("made")
    dataset = make_dataset(folder / "dataset", classes=2)
    teacher = make_teacher(folder / "teacher", dataset)
    make_patches(folder / "patches", dataset)
    stage = open_stage(folder / "images", "images", RelabelConfig(), {"dataset": dataset})
    for label in range(2):
        for image_id in range(2):
            pixels = torch.full((3, 32, 32), 40 * label + image_id, dtype=torch.uint8)
            save_image(stage.path / f"images/new{label:03d}/class{label:03d}_id{image_id:03d}.png", pixels)
    images = stage.finish(
        classes=dataset.classes, size=32, mean=dataset.mean, std=dataset.std, facts={"method": "random", "ipc": 2}
    )
    relabel.run(RelabelConfig(epochs=2, device="cpu"), folder / "labels", images, [teacher])
    return folder


def copied(made: Path, name: str, to: Path) -> Path:
    """A copy of an artifact that may be spoilt."""
    return Path(shutil.copytree(made / name, to / name))


def vouch(path: Path) -> None:
    """Bring the manifest's hashes into step with the files, as who forges one would."""
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"] = {name: file_digest(path / name) for name in manifest["files"] if (path / name).is_file()}
    manifest["id"] = identity_digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("way", WAYS)
def test_hostile_arrays_of_a_data_set_are_refused_unread(way: int, made: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for file in ("train_images.npy", "train_labels.npy"):
        path = copied(made, "dataset", tmp_path / file)
        hostile("npy", path / file, canary, way)
        vouch(path)
        with pytest.raises(UserError, match=file):
            load_split(artifacts.load(path, "dataset"), "train")
        assert not canary.exists()


@pytest.mark.parametrize("file", ["logits.npy", "views/order.npy", "views/bbox.npy", "views/offsets.npy"])
def test_hostile_label_stores_are_refused_unread(file: str, made: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    dataset, images = artifacts.load(made / "dataset"), artifacts.load(made / "images")
    for way in WAYS:
        path = copied(made, "labels", tmp_path / str(way))
        hostile("npy", path / file, canary, way)
        vouch(path)
        with pytest.raises(UserError, match=Path(file).name):
            prepare_student(EvaluateConfig(device="cpu"), dataset, images, artifacts.load(path, "labels"))
        assert not canary.exists()


@pytest.mark.parametrize(
    "name",
    [
        "../../../outside/class000_id000.png",
        "images/new000/../../../../outside/class000_id000.png",
        "/tmp/class000_id000.png",
        "images/new000/class000_id000.png/../../../../outside.png",
        "images/new000\\..\\..\\outside.png",
    ],
)
def test_a_manifest_writes_nowhere_else(name: str, made: Path, tmp_path: Path) -> None:
    """Names in a manifest that lead out of its folder are neither read as images nor written by an export."""
    path = copied(made, "images", tmp_path / "in")
    manifest = json.loads((path / "manifest.json").read_text())
    first = next(key for key in manifest["files"] if key.startswith("images/"))
    manifest["files"][name] = manifest["files"].pop(first)
    manifest["id"] = identity_digest(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError):
        export_artifact(artifacts.load(path), tmp_path / "out" / "export")
    assert [p for p in sorted(tmp_path.rglob("*")) if p not in before and "out" not in p.parts] == []
    assert not any("outside" in p.name for p in tmp_path.rglob("*"))


def test_a_manifest_of_nonsense_is_refused(made: Path, tmp_path: Path) -> None:
    for number, content in enumerate((b"[" * 100_000, b"\xff\xfe\0{", b'{"schema": 1}', b"null", b'"x"', b"")):
        path = copied(made, "images", tmp_path / str(number))
        (path / "manifest.json").write_bytes(content)
        with pytest.raises(UserError, match="manifest"):
            load_images(artifacts.load(path, "images"))


@pytest.mark.parametrize("line", ["../../outside.jpg", "/etc/passwd", "001.a/../../../x.jpg"])
def test_annotation_files_lead_nowhere_else(line: str, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    content = {
        "classes.txt": "1 a\n2 b\n",
        "images.txt": f"1 {line}\n2 b/2.jpg\n",
        "image_class_labels.txt": "1 1\n2 2\n",
        "train_test_split.txt": "1 1\n2 0\n",
    }
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match="leads out of"):
        read_layout("cub", tmp_path)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "..", "x\0y", "a b*?"])
def test_model_and_method_names_name_one_folder(name: str) -> None:
    found = folder_name(f"timm:{name}")
    assert "/" not in found
    assert "\0" not in found
    assert found not in (".", "..")


def test_archives_are_not_unpacked(tmp_path: Path) -> None:
    """A tar or zip with names that lead out, given as weights, as an image and as a data set."""
    inside, names = tmp_path / "a" / "b", ("../outside", "/outside", "x/../../outside")
    inside.mkdir(parents=True)
    buffers = {"tar": io.BytesIO(), "zip": io.BytesIO()}
    with tarfile.open(fileobj=buffers["tar"], mode="w") as tar, zipfile.ZipFile(buffers["zip"], "w") as zipped:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = 4
            tar.addfile(entry, io.BytesIO(b"evil"))
            zipped.writestr(name, b"evil")
    for kind, buffer in buffers.items():
        path = inside / f"weights.{kind}.pth"
        path.write_bytes(buffer.getvalue())
        with pytest.raises(UserError, match="weights"):
            load_weights(build_backbone(SMALL, 3), path)
        for split in ("train", "test"):
            for label in ("x", "y"):
                folder = inside / kind / split / label
                folder.mkdir(parents=True)
                (folder / f"image.{kind}").write_bytes(buffer.getvalue())
        with pytest.raises(UserError):
            prepare(DataConfig(dataset="folder", root=inside / kind, size=16), inside / "out")
    assert not any(path.name == "outside" for path in tmp_path.rglob("*"))
    assert not (tmp_path.parent / "outside").exists()
