"""Import and export: a teacher there and back, images as a folder, refusals."""

import errno
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from distill_tools import make_dataset
from PIL import Image

from fd2fast.artifacts import MANIFEST, TeacherArtifact, identity_digest, load, open_stage, write_json
from fd2fast.data.pixels import save_image
from fd2fast.errors import UserError
from fd2fast.models.backbone import build_backbone
from fd2fast.models.teacher import Teacher
from fd2fast.settings.config import DistillConfig, PretrainConfig
from fd2fast.stages import exchange
from fd2fast.stages.exchange import export_artifact, import_teacher


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("exchange") / "dataset")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory, dataset):
    stage = open_stage(tmp_path_factory.mktemp("exchange") / "t", "teacher", PretrainConfig(), {"dataset": dataset})
    made = Teacher(build_backbone("MobileNetV2", 5), 2, alpha=0.5, size=32, accuracy=50.0)
    made.prototypes_last.copy_(torch.rand_like(made.prototypes_last))
    made.save(stage.path / TeacherArtifact.WEIGHTS)
    return stage.finish(classes=dataset.classes, size=32, mean=dataset.mean, std=dataset.std)


def test_a_teacher_goes_out_and_comes_back(dataset, teacher, tmp_path):
    export_artifact(teacher, tmp_path)
    checkpoint = tmp_path / "MobileNetV2_M2_5e-1cal.pth"
    back = import_teacher(checkpoint, "MobileNetV2", tmp_path / "back", dataset)
    before, after = (
        Teacher.load(teacher.file(TeacherArtifact.WEIGHTS)),
        Teacher.load(back.file(TeacherArtifact.WEIGHTS)),
    )
    assert (after.attention_maps, after.alpha, after.name) == (2, 0.5, "MobileNetV2")
    for key, value in before.state_dict().items():
        if key != "prototypes_ema":  # the checkpoint of the reference has none
            torch.testing.assert_close(after.state_dict()[key], value, rtol=0, atol=0)


def test_a_checkpoint_renamed_or_replaced_is_noticed_and_a_moved_one_is_the_same(dataset, teacher, tmp_path):
    export_artifact(teacher, tmp_path)
    checkpoint = tmp_path / "MobileNetV2_M2_5e-1cal.pth"
    made = import_teacher(checkpoint, "MobileNetV2", tmp_path / "back", dataset)
    (tmp_path / "disk").mkdir()
    moved = checkpoint.rename(tmp_path / "disk" / checkpoint.name)
    assert import_teacher(moved, "MobileNetV2", tmp_path / "back", dataset).id == made.id
    assert import_teacher(moved, "MobileNetV2", tmp_path / "anew", dataset).id == made.id
    renamed = moved.rename(tmp_path / "MobileNetV2_M2_1e-1cal.pth")
    with pytest.raises(UserError, match=r"alpha 0\.5, the name MobileNetV2_M2_1e-1cal\.pth says 0\.1"):
        import_teacher(renamed, "MobileNetV2", tmp_path / "back", dataset)
    assert import_teacher(renamed, "MobileNetV2", tmp_path / "back", dataset, overwrite=True).facts["alpha"] == 0.1
    content = torch.load(renamed, weights_only=True)
    content["feature_center"] += 1
    torch.save(content, renamed)
    with pytest.raises(UserError, match=r"checkpoint .*1e-1cal\.pth: its content is not what it was"):
        import_teacher(renamed, "MobileNetV2", tmp_path / "back", dataset)


def test_a_finished_import_whose_checkpoint_is_gone_is_taken(dataset, teacher, tmp_path, caplog):
    export_artifact(teacher, tmp_path)
    checkpoint = tmp_path / "MobileNetV2_M2_5e-1cal.pth"
    made = import_teacher(checkpoint, "MobileNetV2", tmp_path / "back", dataset)
    checkpoint.unlink()
    assert import_teacher(checkpoint, "MobileNetV2", tmp_path / "back", dataset).id == made.id
    assert "checkpoint cannot be compared with what this was made from" in caplog.text
    for folder, named, overwrite in (
        ("new", checkpoint, False),
        ("back", tmp_path / "o.pth", False),
        ("back", checkpoint, True),
    ):
        with pytest.raises(UserError, match=r"\.pth is missing"):
            import_teacher(named, "MobileNetV2", tmp_path / folder, dataset, overwrite=overwrite)
    assert load(tmp_path / "back").id == made.id


def test_a_checkpoint_that_changes_while_it_is_read_is_refused(dataset, teacher, tmp_path, monkeypatch):
    export_artifact(teacher, tmp_path)
    checkpoint = tmp_path / "MobileNetV2_M2_5e-1cal.pth"
    read = exchange.import_checkpoint

    def changing(path, **named):
        found = read(path, **named)
        content = torch.load(checkpoint, weights_only=True)
        content["feature_center"] += 1
        torch.save(content, checkpoint)
        return found

    monkeypatch.setattr(exchange, "import_checkpoint", changing)
    with pytest.raises(UserError, match="changed while it was read"):
        import_teacher(checkpoint, "MobileNetV2", tmp_path / "back", dataset)


def test_an_import_of_an_earlier_version_is_known_by_the_hash_among_its_settings(dataset, teacher, tmp_path):
    export_artifact(teacher, tmp_path)
    checkpoint = tmp_path / "MobileNetV2_M2_5e-1cal.pth"
    made = import_teacher(checkpoint, "MobileNetV2", tmp_path / "back", dataset)
    manifest = json.loads((made.path / MANIFEST).read_text())
    del manifest["places"]
    manifest["config"]["checkpoint_sha256"] = manifest.pop("inputs")["checkpoint"]
    manifest["id"] = identity_digest(manifest)
    write_json(made.path / MANIFEST, manifest)
    assert import_teacher(checkpoint, "MobileNetV2", tmp_path / "back", dataset).id == manifest["id"]
    content = torch.load(checkpoint, weights_only=True)
    content["feature_center"] += 1
    torch.save(content, checkpoint)
    with pytest.raises(UserError, match="its content is not what it was"):
        import_teacher(checkpoint, "MobileNetV2", tmp_path / "back", dataset)
    checkpoint.unlink()
    with pytest.raises(UserError, match="is missing"):  # where it lay was not recorded
        import_teacher(checkpoint, "MobileNetV2", tmp_path / "back", dataset)


def test_a_teacher_changed_by_hand_is_not_exported(dataset, teacher, tmp_path):
    copied = tmp_path / "t"
    shutil.copytree(teacher.path, copied)
    data = bytearray((copied / TeacherArtifact.WEIGHTS).read_bytes())
    data[-1] ^= 1
    (copied / TeacherArtifact.WEIGHTS).write_bytes(bytes(data))
    with pytest.raises(UserError, match="was changed after it was made"):
        export_artifact(load(copied), tmp_path / "out")


def test_a_teacher_of_other_classes_is_refused(teacher, tmp_path):
    export_artifact(teacher, tmp_path)
    other = make_dataset(tmp_path / "six", classes=6)
    with pytest.raises(UserError, match="a teacher of 5 classes, but .* has 6"):
        import_teacher(tmp_path / "MobileNetV2_M2_5e-1cal.pth", None, tmp_path / "back", other)


def test_a_missing_checkpoint_is_named(dataset, tmp_path):
    with pytest.raises(UserError, match=r"none\.pth is missing"):
        import_teacher(tmp_path / "none.pth", None, tmp_path / "back", dataset)


def test_images_leave_as_a_folder_of_the_first_ids(dataset, tmp_path):
    stage = open_stage(tmp_path / "images", "images", DistillConfig(ipc=2), {"dataset": dataset})
    for label in range(5):
        for image_id in range(2):
            pixels = torch.full((3, 32, 32), 10 * label + image_id, dtype=torch.uint8)
            save_image(stage.path / f"images/new{label:03d}/class{label:03d}_id{image_id:03d}.png", pixels)
    images = stage.finish(classes=dataset.classes, size=32, mean=dataset.mean, std=dataset.std)
    assert export_artifact(images, tmp_path / "out", ipc=1).startswith("wrote 5 images, 1 of each class")
    files = sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.png"))
    assert files == [f"new{k:03d}/class{k:03d}_id000.png" for k in range(5)]
    assert int(np.asarray(Image.open(tmp_path / "out" / files[3])).max()) == 30
    # what a killed export left: some files, and one that was being written
    (tmp_path / "out" / files[3]).unlink()
    (tmp_path / "out" / "new003" / ".fd2fast-tmp-1-x.png").write_bytes(b"half")
    assert export_artifact(images, tmp_path / "out", ipc=1).startswith("wrote 5 images, 1 of each class")
    assert sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.png")) == files
    export_artifact(images, tmp_path / "two")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    (tmp_path / "changed" / "new003").mkdir(parents=True)
    (tmp_path / "changed" / files[3]).write_bytes(b"mine")
    for name in ("two", "other", "changed"):
        with pytest.raises(UserError, match="holds files of something else"):
            export_artifact(images, tmp_path / name, ipc=1)
    assert (tmp_path / "changed" / files[3]).read_bytes() == b"mine"
    with pytest.raises(UserError, match="ipc must be 1 to 2"):
        export_artifact(images, tmp_path / "more", ipc=3)


def test_other_artifacts_are_refused(dataset, tmp_path):
    with pytest.raises(UserError, match="holds a dataset artifact"):
        export_artifact(dataset, tmp_path / "out")


@pytest.mark.parametrize("kind", ["teacher", "images"])
def test_an_export_goes_to_a_folder_of_its_own(dataset, teacher, tmp_path, kind):
    artifact = teacher
    if kind == "images":
        stage = open_stage(tmp_path / "images", "images", DistillConfig(ipc=1), {"dataset": dataset})
        for label in range(5):
            save_image(
                stage.path / f"images/new{label:03d}/class{label:03d}_id000.png",
                torch.full((3, 32, 32), label, dtype=torch.uint8),
            )
        artifact = stage.finish(classes=dataset.classes, size=32, mean=dataset.mean, std=dataset.std)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link").symlink_to(artifact.path)
    before = sorted(artifact.path.rglob("*"))
    for out, told in (
        (tmp_path / "file", "is a file; wanted a folder"),
        (tmp_path / "file" / "below", "a part of the path is a file"),
        (tmp_path / "dangling", "link to nothing"),
        (artifact.path, "is the folder of an artifact"),
        (tmp_path / "link", "is the folder of an artifact"),
        (artifact.path / "export", "lies in the folder of an artifact"),
        (artifact.path / "a" / ".." / "export", "lies in the folder of an artifact"),
        (dataset.path, "is the folder of an artifact"),
    ):
        with pytest.raises(UserError, match=told):
            export_artifact(artifact, out)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(artifact.path.rglob("*")) == before
    (tmp_path / "manifest.json").write_text("{}")  # of a web page, say
    export_artifact(artifact, tmp_path / "out")


def test_an_export_that_fails_takes_back_what_it_wrote(dataset, tmp_path, monkeypatch):
    stage = open_stage(tmp_path / "images", "images", DistillConfig(ipc=1), {"dataset": dataset})
    for label in range(5):
        pixels = torch.full((3, 32, 32), label, dtype=torch.uint8)
        save_image(stage.path / f"images/new{label:03d}/class{label:03d}_id000.png", pixels)
    images = stage.finish(classes=dataset.classes, size=32, mean=dataset.mean, std=dataset.std)
    copies = []

    def full(source, target):
        copies.append(source)
        if len(copies) == 3:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        Path(target).write_bytes(Path(source).read_bytes())

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(UserError, match="no space left"):
        export_artifact(images, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export_artifact(images, tmp_path / "out").startswith("wrote 5 images")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"<!DOCTYPE html><title>Quota exceeded</title>", "Quota exceeded"),
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_told(dataset, tmp_path, content, told):
    (tmp_path / "ResNet18_M2_5e-1cal.pth").write_bytes(content)
    with pytest.raises(UserError, match=told):
        import_teacher(tmp_path / "ResNet18_M2_5e-1cal.pth", None, tmp_path / "back", dataset)
    with pytest.raises(UserError, match="is a folder"):
        import_teacher(tmp_path, None, tmp_path / "back", dataset)


def test_plain_weights_are_sent_to_pretrain(dataset, tmp_path):
    torch.save(build_backbone("ShuffleNetV2_x0.5", 5).net.state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="fd2fast pretrain --weights"):
        import_teacher(tmp_path / "w.pth", None, tmp_path / "back", dataset)
