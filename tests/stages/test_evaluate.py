"""Students: formulas, replayed labels, honest accuracy, resume after a kill, refusals."""

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from distill_tools import make_dataset, make_teacher
from safetensors.torch import load_file

from fd2fast import seeding
from fd2fast.artifacts import load, open_stage
from fd2fast.data.distilled import load_images
from fd2fast.data.pixels import save_image
from fd2fast.data.store import load_split
from fd2fast.data.views import Source, open_views, replay
from fd2fast.errors import UserError
from fd2fast.models.backbone import build_backbone
from fd2fast.settings.config import DistillConfig, EvaluateConfig, RelabelConfig, replace
from fd2fast.stages import evaluate, relabel
from fd2fast.students import student
from fd2fast.system import threads

CONFIG = EvaluateConfig(model="timm:test_resnet", seeds=(0, 1), eval_every=2)


def make_images(path, dataset, ipc=2, seed=0):
    stage = open_stage(path, "images", DistillConfig(ipc=ipc, seed=seed), {"dataset": dataset})
    train = load_split(dataset, "train")
    for label in range(len(dataset.classes)):
        for i, row in enumerate(train.of_class(label)[:ipc]):
            save_image(
                path / f"images/new{label:03d}/class{label:03d}_id{i:03d}.png",
                torch.from_numpy(train.images[row].copy()),
            )
    facts = {"method": "random", "ipc": ipc}
    return stage.finish(classes=dataset.classes, size=dataset.size, mean=dataset.mean, std=dataset.std, facts=facts)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    dataset = make_dataset(folder / "dataset")
    images = make_images(folder / "images", dataset)
    teacher = make_teacher(folder / "teacher", dataset)
    labels = relabel.run(RelabelConfig(epochs=3), folder / "labels", images, [teacher])
    return folder, dataset, images, teacher, labels


def test_soft_loss_is_the_divergence_by_hand():
    scores, labels = torch.tensor([[0.0, math.log(3) * 2]]), torch.tensor([[0.0, 0.0]])
    # T 2: teacher (1/2, 1/2), student (1/4, 3/4): sum t log(t/s) = (log 2 + log 2/3) / 2
    assert student.soft_loss(scores, labels, 2.0).item() == pytest.approx(
        0.5 * (math.log(2) + math.log(2 / 3)), rel=1e-5
    )
    double = student.soft_loss(scores.repeat(2, 1), labels.repeat(2, 1), 2.0)
    assert double.item() == pytest.approx(student.soft_loss(scores, labels, 2.0).item())


def test_learning_rate_ends_where_eta_says():
    assert student.learning_rate(0.1, 0, 400, 2) == pytest.approx(0.1)
    assert student.learning_rate(0.1, 400, 400, 2) == pytest.approx(0.05)
    assert student.learning_rate(0.1, 400, 400, 1) == pytest.approx(0.0)
    assert student.learning_rate(0.1, 100, 400, 1) == pytest.approx(0.1 * (1 + math.sqrt(0.5)) / 2)


@pytest.mark.parametrize(
    ("count", "usual", "accumulation", "expected"),
    [
        (20, 20, 2, [(0, 10), (10, 20)]),
        (14, 14, 2, [(0, 7), (7, 14)]),
        (21, 20, 2, [(0, 10), (10, 21)]),
        (7, 20, 2, [(0, 7)]),
        (13, 20, 2, [(0, 10), (10, 13)]),
        (3, 3, 1, [(0, 3)]),
        (2, 2, 5, [(0, 1), (1, 2)]),
    ],
)
def test_parts_follow_the_released_loop(count, usual, accumulation, expected):
    assert student.parts(count, usual, accumulation) == expected


def test_accuracy_is_that_of_the_saved_student_on_the_whole_test_set(made, tmp_path):
    _, dataset, images, _, labels = made
    metrics = evaluate.run(replace(CONFIG, test_batch=7), tmp_path / "m", dataset, images, labels)
    test = load_split(dataset, "test")
    for seed, expected in zip(metrics.facts["seeds"], metrics.facts["last"], strict=True):
        student = build_backbone("timm:test_resnet", len(dataset.classes))
        student.load_state_dict(load_file(metrics.file(f"students/{seed}.safetensors")))
        with torch.no_grad():
            said = student.eval()(test.tensor(range(len(test)))).argmax(1).numpy()
        assert 100 * np.mean(said == test.labels) == pytest.approx(expected, abs=1e-3)
    last = metrics.facts["last"]
    assert metrics.facts["last_mean"] == pytest.approx(sum(last) / 2, abs=1e-3)
    assert metrics.facts["last_std"] == pytest.approx(abs(last[0] - last[1]) / math.sqrt(2), abs=1e-3)
    assert metrics.facts["epochs"] == 3
    assert metrics.facts["ipc"] == 2


def test_students_learn_what_the_labels_say(made, tmp_path):
    """A student trained on its own test images as classes fits them, so lessons and labels belong together."""
    folder, dataset, *_ = made
    images = make_images(tmp_path / "images", dataset, ipc=4)
    config = EvaluateConfig(
        model="timm:test_resnet",
        labels="hard",
        seeds=(0,),
        epochs=25,
        mix="none",
        min_crop=0.9,
        flip=0.0,
        lr=3e-3,
        eta=1.0,
    )
    metrics = evaluate.run(config, tmp_path / "m", dataset, images)
    import json

    losses = json.loads(metrics.file("metrics.json").read_text())["0"]["losses"]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_a_student_is_the_plain_loop(made, tmp_path, kind):
    """The saved student equals one trained by torch's own losses and AdamW on the stored views, image by image."""
    _, dataset, images, _, labels = made
    config = replace(CONFIG, labels=kind, seeds=(3,), precision="fp32", weight_decay=0.1, eta=1.0, lr=1e-4)
    metrics = evaluate.run(config, tmp_path / "m", dataset, images, labels)

    seeding.seed_all(3, "student")
    student = build_backbone("timm:test_resnet", len(dataset.classes)).to(memory_format=torch.channels_last)
    decay = {name: 0.1 if p.ndim >= 2 else 0.0 for name, p in student.named_parameters()}
    groups = [{"params": [p], "weight_decay": decay[name]} for name, p in student.named_parameters()]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, foreach=False, fused=False)
    pixels, classes = load_images(images)
    views, stored = open_views(labels.path), torch.from_numpy(np.load(labels.file("logits.npy")))
    mixed = 0
    for epoch in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 * (1 + math.cos(math.pi * epoch / 3)) / 2
        seeding.seed_all(3, "student epoch", epoch)
        for b in range(views.batches):
            x = replay(views, Source(pixels, images.mean, images.std), [(epoch, b)])
            rows = range(views.offsets[b], views.offsets[b + 1])
            own = torch.from_numpy(classes[views.order[epoch, rows]])
            x0, x1, y0, y1 = (int(v) for v in views.bbox[epoch, b])
            share = (x1 - x0) * (y1 - y0) / dataset.size**2
            mixed += 0 < share < 1
            told = torch.nn.functional.one_hot(own, len(dataset.classes)).double()
            told = (1 - share) * told + share * told[views.mix_index[epoch, rows]]
            if kind == "soft":
                told = torch.softmax(stored[epoch, rows].double() / 20, 1)
            optimizer.zero_grad()
            for half in (slice(0, len(x) // 2), slice(len(x) // 2, len(x))):
                scores = student(x[half].contiguous(memory_format=torch.channels_last)).double()
                if kind == "soft":
                    loss = (told[half] * (told[half].log() - (scores / 20).log_softmax(1))).sum(1).mean()
                else:
                    loss = -(told[half] * scores.log_softmax(1)).sum(1).mean()
                (loss / 2).backward()
            optimizer.step()
    assert mixed, "no batch was cut-mixed: another seed is needed"
    saved = load_file(metrics.file("students/3.safetensors"))
    for name, value in student.state_dict().items():
        torch.testing.assert_close(saved[name], value, rtol=1e-4, atol=2e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_times_are_measured_but_not_part_of_the_result(made, tmp_path):
    _, dataset, images, _, labels = made
    metrics = evaluate.run(replace(CONFIG, epochs=1), tmp_path / "m", dataset, images, labels)
    assert set(metrics.measured["seconds_of_each_student"]) == {"0", "1"}
    assert all(seconds > 0 for seconds in metrics.measured["seconds_of_each_student"].values())
    assert metrics.measured["seconds_of_the_labels"] == labels.measured["seconds"]
    assert "seconds" not in metrics.file("metrics.json").read_text()


def test_parts_of_one_image_are_refused_with_advice(made, tmp_path):
    _, dataset, images, _, labels = made
    with pytest.raises(UserError, match="one value per channel"):
        evaluate.run(
            replace(CONFIG, model="ShuffleNetV2", accumulation=10, seeds=(0,)), tmp_path / "m", dataset, images, labels
        )


def test_hard_labels_need_no_store_and_soft_do(made, tmp_path):
    _, dataset, images, *_ = made
    with pytest.raises(UserError, match="no labels artifact was given"):
        evaluate.run(CONFIG, tmp_path / "s", dataset, images)
    hard = evaluate.run(replace(CONFIG, labels="hard", epochs=1, seeds=(0,)), tmp_path / "h", dataset, images)
    assert hard.facts["labels"] == "hard"
    assert hard.facts["last_std"] is None


def test_equal_seeds_give_equal_students_and_others_differ(made, tmp_path):
    _, dataset, images, _, labels = made
    one = evaluate.run(CONFIG, tmp_path / "1", dataset, images, labels)
    two = evaluate.run(CONFIG, tmp_path / "2", dataset, images, labels)
    assert one.id == two.id
    files = one.manifest["files"]
    assert files["students/0.safetensors"] != files["students/1.safetensors"]


KILLED = """
import os, signal, sys
from fd2fast import artifacts
from fd2fast.students import student
from fd2fast.settings.config import EvaluateConfig
from fd2fast.students import student
from fd2fast.stages import evaluate
student.SAVE_SECONDS = 0.0
folder, out, at = sys.argv[1], sys.argv[2], int(sys.argv[3])
count = 0
original = student.write_torch
def write(path, value):
    global count
    original(path, value)
    count += 1
    if count == at:
        os.kill(os.getpid(), signal.SIGKILL)
student.write_torch = write
load = artifacts.load
config = EvaluateConfig(model="timm:test_resnet", seeds=(0, 1), eval_every=2)
evaluate.run(config, out, load(folder + "/dataset"), load(folder + "/images"), load(folder + "/labels"))
"""


def test_killed_and_resumed_equals_unbroken(made, tmp_path):
    folder, dataset, images, _, labels = made
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FD2FAST_PROGRESS": "0"}

    def go(at):
        command = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "killed"), str(at)]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    # the second save of the first student, then the first save of the second one
    for at in (2, 2):
        done = go(at)
        assert done.returncode == -signal.SIGKILL, done.stderr
    done = go(1000)
    assert done.returncode == 0, done.stderr
    unbroken = evaluate.run(CONFIG, tmp_path / "unbroken", dataset, images, labels)
    assert load(tmp_path / "killed").manifest["files"] == unbroken.manifest["files"]
    assert load(tmp_path / "killed").id == unbroken.id


def test_side_by_side_equals_alone(made, tmp_path, monkeypatch):
    """Students of two rows in two processes: the bytes of one after the other in this one."""
    _, dataset, images, _, labels = made
    configs = {"soft": CONFIG, "hard": replace(CONFIG, labels="hard", epochs=2)}

    def rows(folder):
        return [
            evaluate.Row(config, tmp_path / folder / name, dataset, images, labels) for name, config in configs.items()
        ]

    found = {}
    for folder, count in (("alone", "1"), ("together", "2")):
        monkeypatch.setenv("OMP_NUM_THREADS", count)
        found[folder] = evaluate.run_all(rows(folder))
    for alone, together in zip(found["alone"], found["together"], strict=True):
        assert alone.manifest["files"] == together.manifest["files"]
        assert alone.id == together.id
        assert not (together.path / "state").exists()


BESIDE = """
import sys
from fd2fast import artifacts
from fd2fast.students import student
from fd2fast.settings.config import EvaluateConfig
from fd2fast.stages import evaluate
folder, out = sys.argv[1:]
load = artifacts.load
config = EvaluateConfig(model="timm:test_resnet", seeds=(0, 1, 2), eval_every=2)
evaluate.run(config, out, load(folder + "/dataset"), load(folder + "/images"), load(folder + "/labels"))
"""


def children_of(pid):
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return found


def works(pid):
    """Whether a process runs; one that only waits for init to ask for its exit code does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_killed_with_its_processes_and_resumed_equals_unbroken(made, tmp_path):
    folder, dataset, images, _, labels = made
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "FD2FAST_PROGRESS": "0"}
    command = [sys.executable, "-c", BESIDE, str(folder), str(tmp_path / "killed")]
    state = tmp_path / "killed" / "state"
    running = subprocess.Popen(command, env=environment)
    orphans = []
    while running.poll() is None and not list(state.glob("student-*.json")):
        orphans = children_of(running.pid) or orphans
        time.sleep(0.02)
    running.kill()
    running.wait()
    assert len(orphans) == 2
    limit = time.monotonic() + 600
    while any(works(pid) for pid in orphans):
        assert time.monotonic() < limit, "processes were left behind"
        time.sleep(0.05)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    config = replace(CONFIG, seeds=(0, 1, 2))
    unbroken = evaluate.run(config, tmp_path / "unbroken", dataset, images, labels)
    assert load(tmp_path / "killed").id == unbroken.id


def test_a_busy_machine_is_said_once_for_all_students(made, tmp_path, monkeypatch, caplog):
    _, dataset, images, _, labels = made
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # here, where the clock can be replaced
    monkeypatch.setattr(threads.Watch, "lost", lambda self: 0.7)
    with caplog.at_level("WARNING", logger="fd2fast"):
        evaluate.run(replace(CONFIG, epochs=2), tmp_path / "m", dataset, images, labels)
    assert [record.getMessage() for record in caplog.records if "busy" in record.getMessage()] == [
        "this machine is busy: the work waited for a core 70 % of the time; other programs hold them "
        "(fewer threads may be faster: OMP_NUM_THREADS)"
    ]


def test_a_failing_student_is_named_and_finished_ones_are_kept(made, tmp_path, monkeypatch):
    _, dataset, images, _, labels = made
    config = replace(CONFIG, seeds=(0, 1), lr=1e30)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    with pytest.raises(
        UserError, match=r"student timm:test_resnet, seed \d, of .* soft: the loss of student .* lower lr"
    ):
        evaluate.run(config, tmp_path / "m", dataset, images, labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": ()}, r"seeds must be a list of at least one seed, all different, got \(\)"),
        ({"seeds": (1, 1)}, "seeds must be a list of at least one seed, all different"),
        ({"temperature": 0.0}, "temperature must be a finite number above 0, got 0.0"),
        ({"epochs": 9}, "holds labels of 3 epochs, but 9 were asked for"),
        ({"ipc": 1}, "labels 2 images per class, but 1 were asked for"),
        ({"model": "ResNet19"}, "ResNet19"),
    ],
)
def test_settings_that_do_not_fit_are_named(made, tmp_path, changes, message):
    _, dataset, images, _, labels = made
    with pytest.raises(UserError, match=message):
        evaluate.run(replace(CONFIG, **changes), tmp_path / "m", dataset, images, labels)
    assert not (tmp_path / "m").exists()


def test_labels_of_other_images_are_refused(made, tmp_path):
    _, dataset, _, _, labels = made
    other = make_images(tmp_path / "other", dataset, ipc=1)
    with pytest.raises(UserError, match="labels other images"):
        evaluate.run(CONFIG, tmp_path / "m", dataset, other, labels)


def test_images_of_another_set_are_refused(made, tmp_path):
    _, _, images, _, labels = made
    other = make_dataset(tmp_path / "d6", classes=6)
    with pytest.raises(UserError, match="5 against 6 entries|6 against 5 entries"):
        evaluate.run(CONFIG, tmp_path / "m", other, images, labels)
