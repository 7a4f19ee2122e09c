"""A run is looked at as a whole before its first stage: all faults of all stages at once, nothing begun, a plan on request."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from model_tools import TINY, make_dataset
from PIL import Image

from fd2fast import artifacts, cli, pipeline
from fd2fast.models.backbone import build_backbone
from fd2fast.pipeline import Planned, check, data_faults, describe_plan, jobs, parse_entry
from fd2fast.settings.config import DataConfig, PatchesConfig, PretrainConfig, RunConfig
from fd2fast.system import space

OTHER = "timm:test_resnet"
SMALL = RunConfig(
    teachers=(TINY,),
    students=(TINY,),
    methods=("random", "sre2l++_fd2"),
    ipc=(1, 2),
    data=DataConfig(size=32, classes=4, train_per_class=8, test_per_class=4),
    pretrain=PretrainConfig(epochs=1, batch_size=8, attention_maps=2),
    patches=PatchesConfig(per_class=2, crops=2),
)


def changed(**changes):
    """SMALL with fields of stages, written stage__field, and its own."""
    config = SMALL
    for name, value in changes.items():
        stage, _, field = name.partition("__")
        if field:
            config = dataclasses.replace(
                config, **{stage: dataclasses.replace(getattr(config, stage), **{field: value})}
            )
        else:
            config = dataclasses.replace(config, **{name: value})
    return config


def job_of(config: RunConfig, stage: str, *key: object) -> Planned:
    """The job of a stage for this key, a name or several."""
    entries = [parse_entry(name) for name in config.methods]
    wanted = key[0] if len(key) == 1 else key
    return next(one for one in jobs(config, entries) if one.name == stage and one.job.key == wanted)


def picture_folder(root: Path, train: dict[str, int], test: int = 1) -> DataConfig:
    """A folder data set of empty pictures: these many training images of each class."""
    for split in ("train", "test"):
        for name, count in train.items():
            (root / split / name).mkdir(parents=True)
            for number in range(count if split == "train" else test):
                Image.new("RGB", (8, 8)).save(root / split / name / f"{number}.png")
    return DataConfig(dataset="folder", root=root, size=32)


def test_a_good_run_has_no_faults_and_leaves_nothing(tmp_path):
    plan = check(changed(out=tmp_path / "out"))
    assert (plan.faults, plan.warnings) == ([], [])
    assert [one.kind for one in plan.work].count("metrics") == 4
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        # settings by themselves
        ({"evaluate__test_batch": 0}, ["evaluate.test_batch must be a whole number of at least 1, got 0"]),
        (
            {"relabel__min_crop": 0.0, "distill__lr": -1.0, "patches__crops": 0},
            ["patches.", "distill.lr", "relabel.min_crop"],
        ),
        (
            {"distill__eps": float("inf"), "evaluate__temperature": float("nan")},
            ["distill.eps", "evaluate.temperature"],
        ),
        ({"methods": ("sre2l", "hreding", "rded:sharp")}, ["'sre2l++'", "'herding'", "labels are hard or soft"]),
        ({"methods": ("rded", "rded:soft")}, ["methods name rded twice"]),
        ({"methods": ()}, ["run.methods must be a list of at least one name, got ()"]),
        ({"teachers": ("ResNet18", "resnet18")}, ["teachers name ResNet18 twice"]),
        ({"students": (TINY, TINY)}, ["students name"]),
        ({"students": ("timm:a/b", "timm:a-b")}, ["would share the folder"]),
        ({"ipc": (2, 2)}, ["ipc names 2 twice"]),
        (
            {"evaluate__seeds": (1, 1)},
            ["evaluate.seeds must be a list of at least one seed, all different, got (1, 1)"],
        ),
        ({"evaluate__device": "cuda:41", "relabel__device": "tpu"}, ["relabel.device", "evaluate.device"]),
        # with the data set
        ({"teachers": (TINY, "MobilNetV2"), "methods": ("fadrm+",)}, ["did you mean 'MobileNetV2'"]),
        ({"students": ("ResNet19", "timm:resnet10s")}, ["student ResNet19", "student timm:resnet10s"]),
        ({"methods": ("cvdd_fd2",)}, ["needs at least 2 teacher(s), got 1"]),
        ({"methods": ("random", "herding"), "ipc": (9,)}, ["random at IPC 9", "herding at IPC 9"]),
        ({"patches__pool": 9}, ["patches with factor 2 and pool 9"]),
        ({"data__train_per_class": 3}, ["patches with factor 2 needs 4"]),
        ({"data__size": 33}, ["side 33 cannot be cut into 2 x 2"]),
        ({"distill__segment_size": 5}, ["segment_size must be at most the 4 classes"]),
        ({"distill__sizes": (32, 24)}, ["the same number of phases"]),
        ({"distill__iterations": (3,), "methods": ("fadrm",)}, ["iterations must be at least 4"]),
        ({"evaluate__epochs": 301}, ["evaluate.epochs must be at most the 300 epochs of the labels, got 301"]),
        ({"data__size": 16, "relabel__batch_size": 2}, ["relabel.teacher_mode batch"]),
        (
            {"data__size": 16, "pretrain__batch_size": 1},
            ["pretrain of timm:resnet10t", "from a batch of 1 image at 16 px"],
        ),
        ({"data__size": 16, "evaluate__accumulation": 8}, ["evaluate: timm:resnet10t", "a lower accumulation"]),
        ({"pretrain__weights": "/nowhere/w.pth", "students": ("ResNet19",)}, ["/nowhere/w.pth", "ResNet19"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_faults_of_every_stage_are_known_before_the_first(tmp_path, capsys, monkeypatch, changes, told):
    monkeypatch.chdir(tmp_path)
    found = check(changed(out=tmp_path / "out", **changes)).faults
    for words in told:
        assert any(words in fault for fault in found), (words, found)
    assert all(len(fault.splitlines()) == 1 for fault in found)
    assert len(found) == len(set(found))
    assert not list(tmp_path.iterdir())


def test_the_command_lists_all_of_them_and_begins_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--evaluate.eval-every", "-2", "--distill.lam", "7", "--pretrain.lr", "nan", "--relabel.epochs", "0"]
    assert cli.main(["run", *options, "--out", "o"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[0] == "error: 4 things are wrong, nothing was begun:"
    assert [line.split()[0] for line in lines[1:]] == [
        "pretrain.lr",
        "distill.lam",
        "relabel.epochs",
        "evaluate.eval_every",
    ]
    assert not list(tmp_path.iterdir())


def test_classes_with_few_images_are_known_from_the_folders(tmp_path):
    data = picture_folder(tmp_path / "set", {"auk": 6, "bee": 1, "cat": 6})
    found = check(changed(out=tmp_path / "out", data=data, methods=("kcenter", "fadrm"), ipc=(4,))).faults
    assert found == ["kcenter at IPC 4 needs 4 training images of each class; too few in: bee (1)"]
    found = check(changed(out=tmp_path / "out", data=dataclasses.replace(data, root=tmp_path / "sett"))).faults
    assert any("sett does not exist" in fault for fault in found)


def test_images_that_cannot_be_read_count_once_that_is_known(tmp_path, capsys):
    data = picture_folder(tmp_path / "set", {"auk": 3, "bee": 3})
    (tmp_path / "set" / "train" / "bee" / "1.png").write_bytes(b"")
    config = changed(
        out=tmp_path / "out", data=dataclasses.replace(data, bad_images="skip"), methods=("random",), ipc=(3,)
    )
    assert check(config).faults == []
    with pytest.raises(pipeline.UserError, match=r"random at IPC 3 needs 3 .* bee \(2\)"):
        pipeline.run(config)
    assert not (tmp_path / "out" / "teachers").exists()


def test_weights_are_tried_with_every_teacher(tmp_path):
    torch.save(build_backbone(TINY, 7).net.state_dict(), tmp_path / "w.pth")
    config = changed(out=tmp_path / "out", pretrain__weights=str(tmp_path / "w.pth"), teachers=(TINY, OTHER))
    (fault,) = check(dataclasses.replace(config, methods=("fadrm+",))).faults
    assert fault.startswith(f"pretrain of {OTHER}: ")
    assert str(tmp_path / "w.pth") in fault


def test_weights_by_name_are_fetched_first_but_not_for_a_plan(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("fd2fast.stages.pretrain.check_weights", lambda *given: asked.append(given))
    config = changed(out=tmp_path / "out", pretrain__weights="hub")
    check(config)
    assert asked == []
    check(config, hub=True)
    assert asked == [(TINY, 4, "hub")]


def test_the_output_folder_is_looked_at(tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "is a file" in check(changed(out=tmp_path / "file")).faults[0]
    out = tmp_path / "out"
    (out / "dataset").mkdir(parents=True)
    (out / "dataset" / "photo.jpg").write_text("mine")
    (out / "images" / "random").mkdir(parents=True)
    (out / "images" / "random" / "photo.jpg").write_text("mine")
    for overwrite in (False, True):
        found = check(changed(out=out), overwrite=overwrite).faults
        assert [fault.split()[0] for fault in found] == [str(out / "dataset"), str(out / "images" / "random")]


def test_the_folder_of_one_stage_is_none_of_a_run(tmp_path):
    make_dataset(tmp_path / "d")
    assert "holds the result of one stage" in check(changed(out=tmp_path / "d")).faults[0]


def test_results_of_other_settings_are_known_before_work(tmp_path):
    out = tmp_path / "out"
    config = changed(out=out)
    labels = job_of(config, "relabel", "sre2l++_fd2", 2).path
    artifacts.open_stage(labels, "labels", dataclasses.replace(config.relabel, ipc=2, seed=7), {})
    metrics = job_of(config, "evaluate", "random", 1, TINY).path
    artifacts.open_stage(metrics, "images", config.distill, {})
    found = check(config).faults
    assert len(found) == 2
    assert "seed was 7, now 42" in found[0]
    assert "holds a images" in found[1]
    assert check(config, overwrite=True).faults == []
    (labels / "state" / "begun.json").write_text("{")
    assert "is damaged" in check(config).faults[0]


def test_a_prepared_data_set_is_enough(tmp_path):
    """The pictures may be gone by then."""
    data = DataConfig(dataset="folder", root=tmp_path / "gone", seed=0)
    config = changed(out=tmp_path / "out", data=data, methods=("random",), ipc=(6,))
    assert any("gone does not exist" in fault for fault in check(config).faults)
    made = make_dataset(tmp_path / "out" / "dataset", per_class=(5, 6, 7))
    manifest = json.loads((made.path / "manifest.json").read_text())
    manifest["config"] = artifacts.config_dict(data)
    manifest["id"] = artifacts.identity_digest(manifest)
    (made.path / "manifest.json").write_text(json.dumps(manifest))
    assert check(config).faults == ["random at IPC 6 needs 6 training images of each class; too few in: class 0 (5)"]


def test_what_is_finished_is_not_asked_again(tmp_path):
    config = changed(out=tmp_path / "out", methods=("random",), ipc=(9,))
    outline = pipeline.outline_on_disk(config.data)
    entries = [parse_entry("random")]
    assert len(data_faults(config, entries, outline)) == 1
    images = job_of(config, "distill", "random")
    stage = artifacts.open_stage(images.path, "images", images.job.config, {})
    stage.finish(classes=["a"], size=8, mean=(0, 0, 0), std=(1, 1, 1))
    assert data_faults(config, entries, outline) == []
    assert len(data_faults(config, entries, outline, overwrite=True)) == 1


def test_disk_that_cannot_hold_it_is_refused_and_scarce_disk_is_said(tmp_path, monkeypatch):
    labels = changed(out=tmp_path / "out", relabel__epochs=2_000_000, data__classes=400, ipc=(50,), patches__pool=4)
    labels = dataclasses.replace(labels, data=dataclasses.replace(labels.data, train_per_class=50))
    monkeypatch.setattr(space, "free_space", lambda path: 10**12)
    (fault,) = check(labels).faults
    assert "more will be written, 1.0 TB are free" in fault
    least = pipeline.needed(check(changed(out=tmp_path / "out")).work)
    monkeypatch.setattr(space, "free_space", lambda path: least.least + 1)
    plan = check(changed(out=tmp_path / "out"))
    assert plan.faults == []
    assert len(plan.warnings) == 1
    monkeypatch.setattr(space, "free_space", lambda path: least.least - 1)
    assert len(check(changed(out=tmp_path / "out")).faults) == 1


def test_memory_that_cannot_hold_a_batch_is_refused(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("fd2fast.distillation.memory.total_bytes", lambda device: 1000)
    found = check(changed(out=tmp_path / "out", data__train_per_class=200, pretrain__batch_size=500)).faults
    assert any(fault.startswith("pretrain.batch_size 500 with") for fault in found)
    assert any(fault.startswith("student ") for fault in found)
    monkeypatch.setattr("fd2fast.distillation.memory.total_bytes", lambda device: 10**12)
    monkeypatch.setattr("fd2fast.distillation.memory.free_bytes", lambda device: 1000)
    assert check(changed(out=tmp_path / "out", pretrain__batch_size=31)).faults == []
    assert "pretrain.batch_size 31 with" in caplog.text
    assert "free at the moment" in caplog.text
    monkeypatch.setattr("fd2fast.distillation.memory.total_bytes", lambda device: None)
    assert check(changed(out=tmp_path / "out", pretrain__batch_size=500)).faults == []


def test_the_estimates_of_arrays_are_exact(tmp_path):
    """What is refused for lack of space is what the stages really reserve."""
    from fd2fast.data.prepare import prepare

    config = changed(out=tmp_path / "out", data=picture_folder(tmp_path / "set", {"auk": 3, "bee": 2}))
    plan = check(dataclasses.replace(config, methods=("random",), ipc=(1,)))
    made = prepare(config.data, tmp_path / "out" / "dataset")
    arrays = sum(os.path.getsize(made.file(f"{split}_images.npy")) - 128 for split in ("train", "test"))
    assert plan.work[0].space is not None
    assert plan.work[0].space.least == arrays


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(
        f'methods = ["random", "sre2l++"]\nteachers = ["{TINY}"]\nstudents = ["{TINY}"]\n[data]\nsize = 32\nclasses = 4\n'
    )
    before = sorted(tmp_path.iterdir())
    assert cli.main(["run", "--config", "small.toml", "--out", "o", "--dry-run"]) == 0
    text = capsys.readouterr().out
    for words in (
        "dataset",
        "teachers/",
        "patches/2",
        "images/sre2l++",
        "labels/sre2l++-ipc",
        "metrics/random-ipc",
        "disk: ",
    ):
        assert words in text
    assert text.count(" new ") == 8
    assert sorted(tmp_path.iterdir()) == before
    assert cli.main(["run", "--config", "small.toml", "--out", "o", "--dry-run", "--patches.pool", "999"]) == 2
    assert "pool 999" in capsys.readouterr().err


def test_a_plan_says_what_is_finished(tmp_path):
    config = changed(out=tmp_path / "out")
    images, cut = job_of(config, "distill", "random"), job_of(config, "patches", 2)
    stage = artifacts.open_stage(images.path, "images", images.job.config, {})
    artifacts.open_stage(cut.path, "patches", cut.job.config, {})
    stage.finish(classes=["a"], size=8, mean=(0, 0, 0), std=(1, 1, 1))
    plan = check(config)
    states = {one.path.relative_to(tmp_path / "out").as_posix(): one.state for one in plan.work}
    assert (states["patches/2"], states["dataset"]) == ("begun", "new")
    assert "anew" in describe_plan(config, plan, overwrite=True)
