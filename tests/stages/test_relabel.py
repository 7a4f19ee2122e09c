"""The relabel stage: labels against single images and halves written out, BN untouched, kill and resume, refusals."""

import copy
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from distill_tools import MEAN, OTHER, SMALL, STD, make_dataset, make_teacher
from torch import nn
from torchvision.transforms.v2 import functional as tv

from fd2fast.artifacts import Artifact, file_digest, load, open_stage
from fd2fast.data.distilled import load_images
from fd2fast.data.pixels import save_image
from fd2fast.data.views import Views, ViewSettings, batch_offsets, draw_views, open_views
from fd2fast.errors import UserError
from fd2fast.models.teacher import load_teacher
from fd2fast.settings.config import DistillConfig, RelabelConfig, replace
from fd2fast.stages import relabel

CLASSES, SIZE, IPC = 4, 32, 3
CONFIG = RelabelConfig(epochs=3, batch_size=5, device="cpu")  # 12 images: 5, 5, 2


def make_images(path: Path, classes: list[str], seed: int = 0) -> Artifact:
    stage = open_stage(path, "images", DistillConfig(method="random", ipc=IPC, seed=seed), {})
    rng = np.random.default_rng(seed)
    for label in range(len(classes)):
        for image_id in range(IPC):
            coarse = torch.from_numpy(rng.random((1, 3, 4, 4)))
            pixels = (nn.functional.interpolate(coarse, size=SIZE, mode="bilinear")[0] * 255).to(torch.uint8)
            save_image(stage.path / f"images/new{label:03d}/class{label:03d}_id{image_id:03d}.png", pixels)
    return stage.finish(classes=classes, size=SIZE, mean=MEAN, std=STD, facts={"method": "random", "ipc": IPC})


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> types.SimpleNamespace:
    root = tmp_path_factory.mktemp("room")
    dataset = make_dataset(root / "dataset", CLASSES, SIZE)
    return types.SimpleNamespace(
        root=root,
        dataset=dataset,
        teacher=make_teacher(root / "teacher", dataset),
        other=make_teacher(root / "other", dataset, f"{OTHER},output_stride=8", seed=1, accuracy=57.0),
        images=make_images(root / "images", dataset.classes),
    )


def seen_by_loop(views: Views, pixels: np.ndarray, epoch: int, b: int) -> torch.Tensor:
    """One batch as a student sees it, image by image, fp32."""
    low, high = int(views.offsets[b]), int(views.offsets[b + 1])
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    single = []
    for n in range(low, high):
        x = (torch.from_numpy(pixels[views.order[epoch, n]]).float() / 255 - mean) / std
        x = tv.resized_crop(x[None], *(int(v) for v in views.crop[epoch, n]), [SIZE, SIZE], antialias=True)[0]
        single.append(x.flip(-1) if views.flip[epoch, n] else x)
    mixed = torch.stack(single)
    row0, row1, column0, column1 = (int(v) for v in views.bbox[epoch, b])
    for n in range(high - low):
        partner = single[int(views.mix_index[epoch, low + n])]
        mixed[n, :, row0:row1, column0:column1] = partner[:, row0:row1, column0:column1]
    return mixed


def by_loop(
    config: RelabelConfig, views: Views, pixels: np.ndarray, teachers: list, weights: list[float]
) -> np.ndarray:
    """Logits [E, N, K], by single images in eval mode and by halves of copies in plain train mode."""
    out = np.zeros((views.epochs, views.images, CLASSES))
    for epoch in range(views.epochs):
        for b in range(views.batches):
            low, high = int(views.offsets[b]), int(views.offsets[b + 1])
            x = seen_by_loop(views, pixels, epoch, b)
            middle = (high - low) // 2
            pieces = [x[:middle], x[middle:]] if config.teacher_mode == "batch" else list(x.split(1))
            for teacher, weight in zip(teachers, weights, strict=True):
                said = []
                for piece in pieces:
                    one = copy.deepcopy(teacher).train(config.teacher_mode == "batch")
                    with torch.no_grad():
                        answer = one(piece)
                    said.append(answer.logits if config.source == "backbone" else answer.cal_logits)
                out[epoch, low:high] += weight * torch.cat(said).numpy()
    return out


@pytest.mark.parametrize(
    ("changes", "both"),
    [
        ({"teacher_mode": "eval"}, False),
        ({"teacher_mode": "batch"}, False),
        ({"teacher_mode": "eval", "source": "cal", "mix": "none"}, False),
        ({"teacher_mode": "batch", "teacher_weights": "prior"}, True),
    ],
    ids=["eval", "batch", "cal", "committee"],
)
def test_the_store_is_the_labels_of_the_loop(room, tmp_path: Path, changes: dict, both: bool) -> None:
    config = replace(CONFIG, **changes)
    teachers = [room.teacher, room.other] if both else [room.teacher]
    made = relabel.run(config, tmp_path / "labels", room.images, teachers)
    views = open_views(made.path)
    drawn = draw_views(ViewSettings.of(config), batch_offsets(CLASSES * IPC, 5), SIZE, 0, 3)
    assert np.array_equal(views.order, drawn.order)
    assert np.array_equal(views.bbox, drawn.bbox)
    weights = [1.0]
    if both:  # accuracies 50 and 57
        share = 1 / (1 + math.exp(0.7))
        weights = [share, 1 - share]
    assert made.facts["weights"] == pytest.approx(weights)
    pixels, targets = load_images(room.images)
    wanted = by_loop(config, views, pixels, [load_teacher(t) for t in teachers], weights)
    logits = np.load(made.file("logits.npy"))
    assert logits.dtype == np.float16
    assert logits.shape == wanted.shape == (3, CLASSES * IPC, CLASSES)
    np.testing.assert_allclose(logits, wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())
    assert np.ptp(wanted, axis=1).max() > 50e-3 * np.abs(wanted).max()  # views do get different labels
    agree = 0
    for epoch in range(3):
        for b in range(views.batches):
            low, high = int(views.offsets[b]), int(views.offsets[b + 1])
            own = targets[views.order[epoch, low:high]]
            said = logits[epoch, low:high].argmax(1)
            agree += int(((said == own) | (said == own[views.mix_index[epoch, low:high]])).sum())
    assert made.facts["agreement"] == pytest.approx(100 * agree / (3 * CLASSES * IPC), abs=1e-3)
    assert [made.facts[k] for k in ("images", "ipc", "epochs", "batch_size")] == [12, IPC, 3, 5]


def test_fewer_images_per_class_are_the_first_ids(room, tmp_path: Path) -> None:
    made = relabel.run(replace(CONFIG, ipc=1, batch_size=None), tmp_path / "labels", room.images, [room.teacher])
    assert (made.facts["images"], made.facts["ipc"], made.facts["batch_size"]) == (CLASSES, 1, CLASSES)
    views = open_views(made.path)
    pixels, _ = load_images(room.images, 1)
    wanted = by_loop(CONFIG, views, pixels, [load_teacher(room.teacher)], [1.0])
    np.testing.assert_allclose(np.load(made.file("logits.npy")), wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())


@pytest.mark.parametrize("which", ["teacher", "other"])
def test_batch_mode_leaves_statistics_and_modes(room, which: str) -> None:
    """nn.BatchNorm2d and timm's own BN layers; a mixture of modes comes back as it was, also after an error."""
    teacher = load_teacher(getattr(room, which))
    x = torch.randn(4, 3, SIZE, SIZE) * 3
    with torch.no_grad():
        before = teacher(x).logits
    next(teacher.backbone.net.children()).train()
    modes = [layer.training for layer in teacher.modules()]
    tracked = [getattr(layer, "track_running_stats", None) for layer in teacher.modules()]
    state = {name: value.clone() for name, value in teacher.state_dict().items()}
    with torch.no_grad():
        with relabel.batch_statistics(teacher):
            by_batch = teacher(x).logits
            torch.testing.assert_close(teacher(x).logits, by_batch)
            assert not torch.allclose(teacher(x[:2]).logits, by_batch[:2], rtol=1e-2)
        assert not torch.allclose(before, by_batch, rtol=1e-2)
        with pytest.raises(RuntimeError), relabel.batch_statistics(teacher):
            raise RuntimeError
    assert [layer.training for layer in teacher.modules()] == modes
    assert [getattr(layer, "track_running_stats", None) for layer in teacher.modules()] == tracked
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, state[name]), name


def files_of(artifact: Artifact) -> dict[str, str]:
    return {name: file_digest(artifact.path / name) for name in artifact.manifest["files"]}


KILL = """
import os, signal, sys
from fd2fast import artifacts
from fd2fast.settings.config import RelabelConfig
from fd2fast.stages import relabel
root, out = sys.argv[1:]
relabel.SAVE_SECONDS, relabel.images_at_once = 0.0, lambda size: 24  # a save after every 2 epochs
real, calls = relabel._label, []
def deadly(*args):
    calls.append(1)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
relabel._label = deadly
images, teacher = artifacts.load(f"{root}/images", "images"), artifacts.load(f"{root}/teacher", "teacher")
relabel.run(RelabelConfig(epochs=9, batch_size=5, device="cpu"), out, images, [teacher])
"""


def test_killed_and_resumed_is_unbroken(room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 in the fourth span, then an end between two of the moves at the close: same bytes, same id."""
    monkeypatch.setattr(relabel, "images_at_once", lambda size: 24)
    config, out = replace(CONFIG, epochs=9), tmp_path / "killed"
    command = [sys.executable, "-c", KILL, str(room.root), str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == -9, ended.stderr
    assert not (out / "manifest.json").exists()

    drawn: list[int] = []
    real = relabel.draw_views
    monkeypatch.setattr(relabel, "draw_views", lambda *a: drawn.append(a[3]) or real(*a))
    moves: list[Path] = []

    def stopping(source: Path, target: Path) -> None:
        moves.append(target)
        if len(moves) == 3:
            raise KeyboardInterrupt
        os.replace(source, target)

    monkeypatch.setattr(
        relabel, "os", types.SimpleNamespace(replace=stopping, posix_fallocate=os.posix_fallocate, path=os.path)
    )
    with pytest.raises(KeyboardInterrupt):
        relabel.run(config, out, room.images, [room.teacher])
    assert drawn == [6, 8]  # the first six epochs were kept
    monkeypatch.setattr(relabel, "os", os)
    drawn.clear()
    resumed = relabel.run(config, out, room.images, [room.teacher])
    assert drawn == []
    unbroken = relabel.run(config, tmp_path / "unbroken", room.images, [room.teacher])
    assert files_of(resumed) == files_of(unbroken)
    assert resumed.id == unbroken.id
    resumed.verify()
    assert not (out / "state").exists()


def test_a_finished_store_is_returned_at_once(room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = relabel.run(CONFIG, tmp_path / "labels", room.images, [room.teacher])
    monkeypatch.setattr(relabel, "load_teacher", lambda *_: pytest.fail("worked again"))
    assert relabel.run(CONFIG, tmp_path / "labels", room.images, [room.teacher]).id == made.id
    with pytest.raises(UserError, match="epochs was 3, now 4"):
        relabel.run(replace(CONFIG, epochs=4), tmp_path / "labels", room.images, [room.teacher])


def test_images_of_another_class_list_are_refused(room, tmp_path: Path) -> None:
    renamed = make_images(tmp_path / "renamed", [*room.dataset.classes[:-1], "stranger"])
    with pytest.raises(UserError, match="classes differ at index 3: 'stranger' against 'class 3'"):
        relabel.run(CONFIG, tmp_path / "labels", renamed, [room.teacher])
    fewer = make_images(tmp_path / "fewer", room.dataset.classes[:-1])
    with pytest.raises(UserError, match="3 against 4 entries"):
        relabel.run(CONFIG, tmp_path / "labels", fewer, [room.teacher])
    assert not (tmp_path / "labels").exists()


def test_settings_and_parents_that_cannot_work_are_refused(room, tmp_path: Path) -> None:
    run = lambda config, images=room.images, teachers=(room.teacher,): relabel.run(  # noqa: E731
        config, tmp_path / "labels", images, teachers
    )
    with pytest.raises(UserError, match="at least one teacher"):
        run(CONFIG, teachers=())
    with pytest.raises(UserError, match="wanted an images artifact"):
        run(CONFIG, images=room.dataset)
    with pytest.raises(UserError, match="wanted a teacher artifact"):
        run(CONFIG, teachers=(room.images,))
    with pytest.raises(UserError, match="epochs must be a whole number of at least 1, got 0"):
        run(replace(CONFIG, epochs=0))
    with pytest.raises(UserError, match="1 to 3, .*; got 4"):
        run(replace(CONFIG, ipc=4))
    unknown = load(room.teacher.path)
    for accuracy in (math.nan, None):  # of imported teachers
        unknown.manifest["facts"]["backbone_accuracy"] = accuracy
        with pytest.raises(UserError, match="needs every teacher's accuracy"):
            run(replace(CONFIG, teacher_weights="prior"), teachers=(unknown,))


def test_half_batches_of_one_position_are_refused_with_advice(room, tmp_path: Path) -> None:
    coarse = make_teacher(tmp_path / "coarse", room.dataset, SMALL)  # a last map of 1 x 1
    with pytest.raises(UserError, match="larger batch_size"):
        relabel.run(replace(CONFIG, batch_size=2), tmp_path / "labels", room.images, [coarse])


def test_labels_that_are_not_finite_are_refused(room, tmp_path: Path) -> None:
    broken = make_teacher(tmp_path / "broken", room.dataset)
    teacher = load_teacher(broken)
    teacher.backbone.bn_layers()[-1][1].bias.fill_(torch.nan)
    teacher.save(broken.path / "teacher.safetensors")
    files = {"teacher.safetensors": file_digest(broken.path / "teacher.safetensors")}
    broken = Artifact(broken.path, {**broken.manifest, "files": files})
    with pytest.raises(UserError, match="not finite"):
        relabel.run(replace(CONFIG, teacher_mode="eval"), tmp_path / "labels", room.images, [broken])
