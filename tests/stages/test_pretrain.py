"""The pretrain stage: its loss, schedules, settings of the paper, resume after a kill, refusals."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from model_tools import TINY, make_dataset, tree_bytes
from torch.nn import functional as F

from fd2fast import artifacts
from fd2fast.data.store import load_split
from fd2fast.errors import UserError
from fd2fast.models.attention_views import crop_and_drop
from fd2fast.models.backbone import build_backbone, hub_name
from fd2fast.models.teacher import load_teacher
from fd2fast.settings.config import PretrainConfig
from fd2fast.stages import pretrain
from fd2fast.system.progress import Progress

QUICK = PretrainConfig(
    model=TINY,
    attention_maps=3,
    alpha=0.4,
    epochs=2,
    batch_size=8,
    lr=0.05,
    eval_every=1,
    optimizer="sgd",
    precision="fp32",
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("pretrain") / "dataset")


def trainer_of(config, dataset, device="cpu"):
    config = pretrain.resolve(config, "folder")
    return pretrain._Trainer(config, load_split(dataset, "train"), load_split(dataset, "test"), torch.device(device))


def test_the_paper_settings_are_its_table():
    def of(data, model):
        config = pretrain.resolve(PretrainConfig(model=model), data)
        return config.attention_maps, config.alpha

    assert of("cub", "ResNet18") == (8, 0.5)
    assert of("cub", "mobilenetv2") == (16, 0.5)
    assert of("aircraft", "ResNet50") == (32, 0.4)
    assert of("cars", "densenet121") == (32, 0.4)
    assert of("imagenette", "ResNet50") == (32, 0.2)
    assert of("imagewoof", "shufflenetv2_x0.5") == (16, 0.4)
    assert of("typefaces", "ResNet18") == of("cub", "timm:resnet10t") == (8, 0.5)
    for table in pretrain.PAPER_SETTINGS.values():
        assert len(table) == 5
    given = pretrain.resolve(PretrainConfig(model="ResNet18", alpha=0.0, attention_maps=2), "cars")
    assert (given.attention_maps, given.alpha) == (2, 0.0)
    assert pretrain.resolve(PretrainConfig(alpha=0.1), "cars").attention_maps == 8


def test_schedules():
    step = PretrainConfig(schedule="step", lr=0.1, rate=0.9, duration=2, epochs=10)
    assert pretrain.learning_rate(step, 0, 5, 10) == 0.1
    assert pretrain.learning_rate(step, 3, 0, 10) == pytest.approx(0.1 * 0.9**1.5)
    cosine = PretrainConfig(schedule="cosine", lr=0.1, warmup=2, epochs=10)
    rates = [pretrain.learning_rate(cosine, e, s, 5) for e in range(10) for s in range(5)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(0.1)
    assert rates[30] == pytest.approx(0.05)
    assert all(a >= b for a, b in zip(rates[9:], rates[10:], strict=False))
    assert 0 < rates[-1] < 1e-3


def test_a_last_single_image_joins_the_batch_before():
    assert [len(b) for b in pretrain.batches(9, 4, torch.arange(9))] == [4, 5]
    assert [len(b) for b in pretrain.batches(10, 4, torch.arange(10))] == [4, 4, 2]
    assert [len(b) for b in pretrain.batches(3, 1, torch.arange(3))] == [1, 1, 1]
    assert [len(b) for b in pretrain.batches(1, 4, torch.arange(1))] == [1]


@pytest.mark.parametrize("views", [True, False])
@pytest.mark.parametrize("rule", ["ema", "last"])
def test_the_loss_is_written_out_by_hand(dataset, views, rule):
    config = dataclasses.replace(
        QUICK, attention_views=views, prototype_rule=rule, center_weight=0.7, label_smoothing=0.1
    )
    trainer = trainer_of(config, dataset)
    train = load_split(dataset, "train")
    x, y = train.tensor(range(0, 27, 3)), trainer.labels[::3]
    trainer.teacher.train()
    for first in (True, False):  # the prototypes of the second pass are not empty
        before = {"ema": trainer.prototypes.ema.clone(), "last": trainer.prototypes.last.clone()}[rule]
        torch.manual_seed(7)
        loss, parts, logits = trainer._losses(x, y, 4, 2)

        teacher = trainer.teacher
        torch.manual_seed(7)

        def ce(p, t):
            return F.cross_entropy(p, t, label_smoothing=0.1)

        features = teacher.backbone.features(x)
        raw = teacher.head(features, "random")
        torch.testing.assert_close(logits, teacher.backbone.logits(features))
        if first and rule == "ema":
            target = torch.stack([raw.z[y.tolist().index(label)] for label in y.tolist()])
        else:
            target = F.normalize(before[y], dim=1, eps=1e-12)
        center = sum(((z - t) ** 2).sum() for z, t in zip(raw.z, target.detach(), strict=True)) / len(y)
        if views:
            draws = torch.rand(9, 4, generator=pretrain.seeding.generator(0, "pretrain", "attention", 4, 2))
            boxes, kept = crop_and_drop(raw.attention.detach(), draws, (32, 32))
            crops = torch.stack(
                [
                    F.interpolate(
                        image[None, :, t : t + h, w0 : w0 + w], (32, 32), mode="bilinear", align_corners=False
                    )[0]
                    for image, (t, w0, h, w) in zip(x, boxes.tolist(), strict=True)
                ]
            )
            seen = teacher.head(teacher.backbone.features(torch.cat([crops, x * kept])), "random")
            cal = (
                ce(raw.logits, y) / 3
                + ce(torch.cat([raw.effect_logits, seen.effect_logits]), y.repeat(3))
                + ce(seen.logits, y.repeat(2)) * 2 / 3
                + 0.7 * center
            )
        else:
            cal = ce(raw.logits, y) + ce(raw.effect_logits, y) + 0.7 * center
        wanted = 0.6 * ce(logits, y) + 0.4 * cal
        torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(parts["center"], center, rtol=1e-4, atol=1e-5)
        if rule == "last":
            torch.testing.assert_close(trainer.prototypes.last[y[-1]], 0.05 * raw.z[-1].detach(), rtol=1e-4, atol=1e-6)
    loss.backward()
    assert teacher.head.fc.weight.grad.abs().max() > 0


def test_it_learns_and_tells_the_true_accuracies(tmp_path, dataset):
    config = dataclasses.replace(
        QUICK, epochs=8, optimizer="adamw", lr=1e-2, color_jitter=(0.0,) * 4, flip=0.0, rotation=0.0
    )
    artifact = pretrain.run(config, tmp_path / "t", dataset)
    facts, teacher = artifact.facts, load_teacher(artifact)
    test = load_split(dataset, "test")
    out = teacher(test.tensor(range(len(test.labels))))
    labels = torch.from_numpy(test.labels)
    for name, logits in (("backbone_accuracy", out.logits), ("cal_accuracy", out.cal_logits)):
        assert facts[name] == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())
    assert facts["backbone_accuracy"] >= 80
    assert facts["cal_accuracy"] >= 80
    assert teacher.accuracy == facts["backbone_accuracy"]
    assert (facts["model"], facts["attention_maps"], facts["alpha"], facts["channels"]) == (TINY, 3, 0.4, 16)
    assert facts["head_trained"] is True
    norms = teacher.prototypes_last.norm(dim=1).tolist()
    assert norms == pytest.approx([0.05] * 3, rel=1e-5)
    assert all(0.1 < norm <= 1 + 1e-6 for norm in teacher.prototypes_ema.norm(dim=1).tolist())
    history = json.loads(artifact.file("curves.json").read_text())
    assert [record["epoch"] for record in history] == list(range(1, 9))
    assert history[-1]["loss"] < history[0]["loss"]
    assert {"backbone", "cal", "effect", "views", "center", "train_accuracy", "lr"} <= history[0].keys()
    for picture in ("attention.png", "curves.png"):
        assert artifact.file(picture).read_bytes()[:4] == b"\x89PNG"
    assert pretrain.run(config, tmp_path / "t", dataset).measured == artifact.measured


def test_alpha_zero_trains_a_plain_backbone_and_says_so(tmp_path, dataset):
    config = dataclasses.replace(QUICK, alpha=0.0, epochs=1)
    artifact = pretrain.run(config, tmp_path / "t", dataset)
    assert artifact.facts["head_trained"] is False
    assert "alpha is 0" in artifact.facts["notices"][0]
    teacher, begun = load_teacher(artifact), trainer_of(config, dataset).teacher
    for a, b in zip(teacher.head.parameters(), begun.head.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not teacher.prototypes_ema.any()
    assert not torch.equal(teacher.backbone.net.conv1[0].weight, begun.backbone.net.conv1[0].weight)


def test_the_backbone_can_start_alone(dataset):
    config = dataclasses.replace(QUICK, epochs=3, backbone_epochs=2)
    trainer = trainer_of(config, dataset)
    head = {key: value.clone() for key, value in trainer.teacher.head.state_dict().items()}
    with Progress("", 1) as bar:
        for epoch in range(3):
            weight = trainer.teacher.backbone.net.conv1[0].weight.clone()
            trainer.train_epoch(bar)
            assert not torch.equal(weight, trainer.teacher.backbone.net.conv1[0].weight)
            kept = all(torch.equal(head[key], value) for key, value in trainer.teacher.head.state_dict().items())
            assert kept == (epoch < 2)
            assert bool(trainer.prototypes.seen.any()) == (epoch == 2)
    assert [("cal" in record) for record in trainer.history] == [False, False, True]
    assert trainer.history[0]["loss"] == trainer.history[0]["backbone"]
    assert pretrain._curves(trainer.history, "x")[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16", "optimizer": "adamw", "lr": 2e-3},
        {"precision": "fp16", "optimizer": "adam", "lr": 2e-3},
        {
            "keep": "best",
            "epochs": 4,
            "backbone_epochs": 2,
            "model": "ShuffleNetV2_x0.5",
            "schedule": "cosine",
            "attention_views": False,
        },
    ],
)
def test_a_resumed_run_ends_in_the_same_bytes(tmp_path, dataset, changes, monkeypatch):
    """Interrupted in the last epoch; MobileNet-like dropout, scaler, moments and the best weights must come back."""
    config = dataclasses.replace(QUICK, **changes)
    whole = pretrain.run(config, tmp_path / "whole", dataset)
    step, calls = pretrain._Trainer._step, []

    def dies(self, chosen, epoch, at):
        calls.append((epoch, at))
        if epoch == config.epochs - 1 and at == 2:
            raise KeyboardInterrupt
        return step(self, chosen, epoch, at)

    monkeypatch.setattr(pretrain._Trainer, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        pretrain.run(config, tmp_path / "killed", dataset)
    monkeypatch.setattr(pretrain._Trainer, "_step", lambda s, c, e, a: calls.append((e, a)) or step(s, c, e, a))
    calls.clear()
    resumed = pretrain.run(config, tmp_path / "killed", dataset)
    assert calls[0] == (config.epochs - 1, 0)
    assert resumed.id == whole.id
    assert tree_bytes(tmp_path / "killed") == tree_bytes(tmp_path / "whole")


def test_kill_9_and_the_same_command_again_ends_in_the_same_bytes(tmp_path, dataset):
    out = tmp_path / "killed"
    script = (
        "import sys; from fd2fast import artifacts; from fd2fast.settings.config import PretrainConfig;"
        "from fd2fast.stages import pretrain; import torch; torch.set_num_threads(1);"
        f"pretrain.run(PretrainConfig(model={TINY!r}, epochs=400, batch_size=8, eval_every=2),"
        "sys.argv[1], artifacts.load(sys.argv[2]))"
    )
    environment = {**os.environ, "FD2FAST_PROGRESS": "0"}
    process = subprocess.Popen([sys.executable, "-c", script, str(out), str(dataset.path)], env=environment)
    state, deadline = out / "state" / "epoch.pt", time.monotonic() + 600
    while not state.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.15)  # into an epoch, or into a write
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = artifacts.read_torch(state)["epoch"]
    assert done >= 1
    assert not (out / artifacts.MANIFEST).exists()
    # the interrupted run wanted 400 epochs; what it did is continued to two epochs more
    epochs = done + 2
    config = PretrainConfig(model=TINY, epochs=epochs, batch_size=8, eval_every=2)
    begun = out / "state" / "begun.json"
    recorded = json.loads(begun.read_text())
    assert recorded["config"]["epochs"] == 400
    recorded["config"]["epochs"] = epochs
    begun.write_text(json.dumps(recorded))
    killed = pretrain.run(config, out, dataset)
    whole = pretrain.run(config, tmp_path / "whole", dataset)
    assert killed.id == whole.id
    assert tree_bytes(out) == tree_bytes(Path(tmp_path / "whole"))


def test_a_loss_that_is_not_finite_stops_with_epoch_and_rate(tmp_path, dataset):
    config = dataclasses.replace(QUICK, lr=1e30)
    with pytest.raises(UserError, match=r"the loss became .* in epoch 1 at learning rate 1e\+30"):
        pretrain.run(config, tmp_path / "t", dataset)


def weights_file(path, seed, classes=7):
    torch.manual_seed(seed)
    torch.save(build_backbone(TINY, classes).net.state_dict(), path)
    return path


def test_weights_are_loaded_and_become_part_of_the_identity(tmp_path, dataset):
    torch.manual_seed(5)
    source = build_backbone(TINY, 7)
    torch.save(source.net.state_dict(), tmp_path / "w.pth")
    config = dataclasses.replace(QUICK, weights=str(tmp_path / "w.pth"), epochs=1, lr=1e-12)
    artifact = pretrain.run(config, tmp_path / "t", dataset)
    loaded = load_teacher(artifact).backbone.net.state_dict()
    assert torch.allclose(loaded["conv1.0.weight"], source.net.state_dict()["conv1.0.weight"], atol=1e-6)
    assert artifact.facts["weights_sha256"] == artifacts.file_digest(tmp_path / "w.pth")
    assert artifact.facts["notices"][0].startswith("head fc is (7, 16) in the weights")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_dataset(tmp_path_factory.mktemp("pretrain") / "small", per_class=(2, 2, 2), test=1)


def test_a_teacher_belongs_to_the_bytes_of_its_weights_not_to_their_place(tmp_path, small, caplog, monkeypatch):
    path = weights_file(tmp_path / "w.pth", 5)
    config = dataclasses.replace(QUICK, weights=str(path), epochs=1)
    made = pretrain.run(config, tmp_path / "t", small)
    assert str(tmp_path) not in json.dumps({k: v for k, v in made.manifest.items() if k != "places"})
    # replaced at the same path, size and time kept
    before = path.read_bytes()
    at = before.rindex(torch.load(path, weights_only=True)["fc.bias"].numpy().tobytes())
    path.write_bytes(before[:at] + bytes([before[at] ^ 1]) + before[at + 1 :])
    with pytest.raises(UserError, match=r"weights .*w\.pth: its content is not what it was"):
        pretrain.run(config, tmp_path / "t", small)
    path.write_bytes(before)
    # moved, renamed, copied, linked, relative: the same teacher
    path.rename(tmp_path / "resnet.pth")
    (tmp_path / "link.pth").symlink_to("resnet.pth")
    monkeypatch.chdir(tmp_path)
    for place in ("resnet.pth", "link.pth", str(tmp_path / "resnet.pth")):
        moved = dataclasses.replace(config, weights=place)
        assert pretrain.run(moved, tmp_path / "t", small).id == made.id
    moved = dataclasses.replace(config, weights="link.pth")
    assert pretrain.run(moved, tmp_path / "anew", small).id == made.id
    # gone: told, and the finished teacher stays
    with pytest.raises(UserError, match="there is no such file"):
        pretrain.run(dataclasses.replace(config, weights="other.pth"), tmp_path / "t", small)
    assert caplog.text.count("no such file") == 0
    assert pretrain.run(config, tmp_path / "t", small).id == made.id
    assert "weights cannot be compared" in caplog.text
    with pytest.raises(UserError, match="there is no such file"):
        pretrain.run(config, tmp_path / "t", small, overwrite=True)
    assert artifacts.load(tmp_path / "t").id == made.id


def test_weights_may_be_put_right_until_an_epoch_is_done(tmp_path, small, monkeypatch):
    path = tmp_path / "w.pth"
    path.write_bytes(b"<html>404</html>")
    config = dataclasses.replace(QUICK, weights=str(path))
    with pytest.raises(UserError):
        pretrain.run(config, tmp_path / "t", small)
    weights_file(path, 5)

    class Killed(BaseException):
        pass

    def killed(*args):
        raise Killed

    checkpoint = artifacts.Stage.checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(artifacts.Stage, "checkpoint", lambda *args: checkpoint(*args) or killed())
        with pytest.raises(Killed):
            pretrain.run(config, tmp_path / "t", small)
    weights_file(path, 6)
    with pytest.raises(UserError, match="its content is not what it was"):
        pretrain.run(config, tmp_path / "t", small)
    weights_file(path, 5)
    assert pretrain.run(config, tmp_path / "t", small).id == pretrain.run(config, tmp_path / "whole", small).id


def test_weights_replaced_while_they_are_read_are_told(tmp_path, small, monkeypatch):
    path = weights_file(tmp_path / "w.pth", 5)
    load = pretrain.load_weights
    monkeypatch.setattr(pretrain, "load_weights", lambda *args: load(*args) + [str(weights_file(path, 6))])
    with pytest.raises(UserError, match="changed while they were read"):
        pretrain.run(dataclasses.replace(QUICK, weights=str(path)), tmp_path / "t", small)


def test_weights_of_the_hub_are_known_by_name_and_recorded_by_their_tensors(tmp_path, small, monkeypatch):
    given = {}

    def of_the_hub(backbone, source):
        assert source == "hub"
        backbone.net.load_state_dict(given["state"], strict=False)
        return []

    def teacher(folder, seed):
        torch.manual_seed(seed)
        given["state"] = build_backbone(TINY, 3).net.state_dict()
        return pretrain.run(dataclasses.replace(QUICK, weights="hub", epochs=1), tmp_path / folder, small)

    monkeypatch.setattr(pretrain, "load_weights", of_the_hub)
    made = teacher("t", 1)
    assert made.manifest["inputs"]["weights"].startswith("hub:timm/resnet10t")
    assert made.manifest["places"] == {"weights": "hub"}
    assert made.facts["weights"] == "hub"
    assert teacher("same", 1).id == made.id
    assert teacher("other", 2).facts["weights_sha256"] != made.facts["weights_sha256"]
    monkeypatch.setattr(pretrain, "load_weights", lambda *args: pytest.fail("a finished teacher needs no network"))
    assert teacher("t", 1).id == made.id
    assert hub_name("resnet18") == "resnet18-f37072fd.pth"
    assert hub_name("timm:no_such_model") == "timm/no_such_model"


def test_a_teacher_of_earlier_versions_is_compared_by_its_hash(tmp_path, small):
    path = weights_file(tmp_path / "w.pth", 5)
    config = dataclasses.replace(QUICK, weights=str(path), epochs=1)
    pretrain.run(config, tmp_path / "t", small)
    manifest = json.loads((tmp_path / "t" / "manifest.json").read_text())
    del manifest["inputs"], manifest["places"]
    manifest["config"]["weights"] = manifest["facts"]["weights"] = "/elsewhere/w.pth"
    manifest["id"] = artifacts.identity_digest(manifest)
    (tmp_path / "t" / "manifest.json").write_text(json.dumps(manifest))
    assert pretrain.run(config, tmp_path / "t", small).id == manifest["id"]
    weights_file(path, 6)
    with pytest.raises(UserError, match="its content is not what it was in /elsewhere"):
        pretrain.run(config, tmp_path / "t", small)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"epochs": 0}, "epochs must be a whole number of at least 1, got 0"),
        ({"backbone_epochs": 2}, "backbone_epochs must be below epochs = 2, got 2"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1"),
        ({"alpha": 1.5}, r"alpha must be a number within \[0, 1\], got 1.5"),
        ({"mu": 0.0}, r"mu must be a number within \(0, 1\], got 0.0"),
        ({"attention_maps": 0}, "attention_maps must be a whole number of at least 1"),
        ({"lr": -1.0}, "lr must be a finite number above 0, got -1.0"),
        ({"min_crop": 0.0}, "min_crop"),
        ({"color_jitter": (0.1, 0.1, 0.1, 0.7)}, "hue"),
        ({"model": "timm:test_convnext"}, "no BatchNorm2d"),
        ({"model": "ResNet19"}, "did you mean"),
        ({"weights": "/nowhere/w.pth"}, "no such file"),
        ({"device": "cuda:77"}, "cuda:77"),
    ],
)
def test_bad_settings_are_refused(tmp_path, dataset, changes, told):
    with pytest.raises(UserError, match=told):
        pretrain.run(dataclasses.replace(QUICK, **changes), tmp_path / "t", dataset)


def test_an_artifact_of_another_kind_is_refused(tmp_path, dataset):
    teacher = pretrain.run(dataclasses.replace(QUICK, epochs=1), tmp_path / "t", dataset)
    with pytest.raises(UserError, match="wanted a dataset"):
        pretrain.run(QUICK, tmp_path / "u", teacher)
    with pytest.raises(UserError, match="epochs was 1, now 2"):
        pretrain.run(QUICK, tmp_path / "t", dataset)
