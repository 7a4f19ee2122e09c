"""The distill stage: the bytes of the plain loop, resuming, prefixes of larger sets, records, refusals."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from distill_tools import MEAN, OTHER, STD, make_dataset, make_patches, make_teacher
from PIL import Image

from fd2fast import students
from fd2fast.artifacts import Artifact, file_digest, load
from fd2fast.distillation import runner
from fd2fast.distillation.memory import StepMemory, measure
from fd2fast.distillation.planner import iteration_table, make_plan
from fd2fast.errors import UserError
from fd2fast.methods import resolve
from fd2fast.models import convolution
from fd2fast.models.fused import fuse
from fd2fast.models.teacher import load_teacher
from fd2fast.reference.loop import crop_flip_roll, optimise_segment, prior_attention
from fd2fast.settings.config import DistillConfig, replace
from fd2fast.stages import distill
from fd2fast.step import TERMS, GroupedStep
from fd2fast.system import lock

CLASSES, SIZE = 5, 32
LOW = [-m / s for m, s in zip(MEAN, STD, strict=True)]
HIGH = [(1 - m) / s for m, s in zip(MEAN, STD, strict=True)]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> types.SimpleNamespace:
    """One data set with two teachers and patches for all tests."""
    root = tmp_path_factory.mktemp("room")
    dataset = make_dataset(root / "dataset", CLASSES, SIZE)
    return types.SimpleNamespace(
        root=root,
        dataset=dataset,
        teacher=make_teacher(root / "teacher", dataset),
        other=make_teacher(root / "other", dataset, f"{OTHER},output_stride=8", seed=1, alpha=0.7, accuracy=57.0),
        patches=make_patches(root / "patches", dataset),
    )


def settings(**changes: object) -> DistillConfig:
    return replace(
        DistillConfig(ipc=3, group_size=2, segment_size=3, segments_per_step=2, iterations=(6,), precision="fp32"),
        **changes,
    )


def files_of(artifact: Artifact) -> dict[str, str]:
    return {name: file_digest(artifact.path / name) for name in artifact.manifest["files"]}


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def normalised(path: Path) -> torch.Tensor:
    pixels = torch.from_numpy(pixels_of(path)).permute(2, 0, 1).double() / 255
    return (pixels - torch.tensor(MEAN, dtype=torch.float64).view(3, 1, 1)) / torch.tensor(
        STD, dtype=torch.float64
    ).view(3, 1, 1)


def by_the_loop(
    config: DistillConfig,
    room: types.SimpleNamespace,
    teachers: list[Artifact],
    out: Path,
    draws: dict,
    prior_draws: dict,
) -> None:
    """The whole stage by the plain loop, one segment after the other, ids ascending."""
    resolved = resolve(config, classes=CLASSES, size=SIZE)
    loaded = [load_teacher(t, "cpu", torch.float64) for t in teachers]
    suffix = resolved.save_format
    for image_id in range(config.ipc):
        first_of_group = image_id - image_id % config.group_size
        for block, first in enumerate(range(0, CLASSES, config.segment_size)):
            labels = list(range(first, min(CLASSES, first + config.segment_size)))
            segment = image_id * -(-CLASSES // config.segment_size) + block
            names = [f"images/{k:05d}/class{k:05d}_id{image_id:05d}.png" for k in labels]
            initial = torch.stack([normalised(room.patches.file(name)) for name in names])
            earlier = range(first_of_group, image_id)
            priors: list[list[torch.Tensor]] = [[] for _ in loaded]
            for row, k in enumerate(labels):
                images = [normalised(out / f"class{k}_id{i}.{suffix}") for i in earlier]
                if resolved.prior_view == "augmented":
                    views = prior_draws[segment][row * len(images) : (row + 1) * len(images)] if images else []
                    images = [crop_flip_roll(x[None], d, SIZE)[0] for x, d in zip(images, views, strict=True)]
                for mine, teacher in zip(priors, loaded, strict=True):
                    empty = torch.zeros(0, 1, 4, 4, dtype=torch.float64)
                    mine.append(prior_attention(teacher, torch.stack(images)) if images else empty)
            final = optimise_segment(
                initial,
                torch.tensor(labels),
                loaded,
                draws[segment].tolist(),
                resolved,
                low=LOW,
                high=HIGH,
                priors=priors,
            )
            unit = final * torch.tensor(STD, dtype=torch.float64).view(3, 1, 1) + torch.tensor(
                MEAN, dtype=torch.float64
            ).view(3, 1, 1)
            values = unit.clamp(0, 1) * 255
            pixels = (values.round() if resolved.quantize == "round" else values.floor()).to(torch.uint8)
            for k, image in zip(labels, pixels, strict=True):
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(out / f"class{k}_id{image_id}.{suffix}")


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("sre2l++_fd2", {"iterations": (8,)}),
        ("fadrm+_fd2", {"iterations": (4, 5), "sizes": (16, 32)}),
        ("sre2l++_fd2", {"iterations": (8,), "semantics": "released", "patch_choice": "id", "lr": 0.1}),
    ],
)
def test_saved_bytes_are_those_of_the_plain_loop(
    method: str, changes: dict, room: types.SimpleNamespace, tmp_path: Path
) -> None:
    config = settings(method=method, precision="fp64", **changes)
    teachers = [room.teacher, room.other] if method.startswith("fadrm+") else [room.teacher]
    resolved = resolve(config, classes=CLASSES, size=SIZE)
    plan = make_plan(CLASSES, config.ipc, group_size=config.group_size, segment_size=config.segment_size)
    draws, prior_draws = {}, {}
    for segment in range(plan.n_segments):
        tables, first = [], 0
        for count, size in zip(resolved.iterations, resolved.sizes, strict=True):
            tables.append(iteration_table(11, [segment], first, count, size, jitter=4)[:, 0])
            first += count
        draws[segment] = np.concatenate(tables)
        rows = int(plan.slot[segment]) * int(plan.end_class[segment] - plan.first_class[segment])
        prior_draws[segment] = iteration_table(12, list(range(rows)), segment, 1, SIZE, jitter=0)[0]
    made = distill.run(
        config, tmp_path / "a", room.dataset, teachers, room.patches, draws=draws, prior_draws=prior_draws
    )
    out = tmp_path / "b"
    out.mkdir()
    by_the_loop(config, room, teachers, out, draws, prior_draws)
    for k in range(CLASSES):
        for i in range(config.ipc):
            name = f"class{k:03d}_id{i:03d}.{resolved.save_format}"
            mine = pixels_of(made.file(f"images/new{k:03d}/{name}"))
            theirs = pixels_of(out / f"class{k}_id{i}.{resolved.save_format}")
            assert np.array_equal(mine, theirs), f"{name}: {np.abs(mine.astype(int) - theirs).max()}"


def test_what_is_written(room: types.SimpleNamespace, tmp_path: Path) -> None:
    config = settings(method="sre2l++_fd2", iterations=(40,))
    made = distill.run(config, tmp_path / "a", room.dataset, [room.teacher], room.patches)
    assert made.kind == "images"
    assert made.config["lr"] == 0.25
    assert {k: made.facts[k] for k in ("method", "semantics", "ipc")} == {
        "method": "sre2l++_fd2",
        "semantics": "paper",
        "ipc": 3,
    }
    assert made.facts["teachers"] == [room.teacher.facts["model"]]
    assert sum(name.startswith("images/") for name in made.manifest["files"]) == 15
    assert {"grid.png", "losses.json", "losses.png", "plan.json"} <= set(made.manifest["files"])
    assert not (made.path / "state").exists()

    losses = json.loads(made.file("losses.json").read_text())
    assert list(losses["segments"]) == [str(s) for s in range(6)]
    last_of_group = losses["segments"]["2"]
    assert (last_of_group["classes"], last_of_group["image_id"], last_of_group["slot"]) == ([0, 3], 1, 1)
    assert last_of_group["iterations"] == [*range(0, 40, 2), 39]
    assert set(TERMS) < set(last_of_group)
    assert all(v > 0 for v in last_of_group["l_s"])
    assert not any(losses["segments"]["0"]["l_s"])
    assert last_of_group["total"][-1] < last_of_group["total"][0]

    plan = json.loads(made.file("plan.json").read_text())
    assert sorted(s for step in plan["steps"] for s in step) == list(range(6))
    assert max(len(step) for step in plan["steps"]) == 2
    height, width, _ = pixels_of(made.file("grid.png")).shape
    assert width > 4 * SIZE  # the initial image and three ids
    assert height > CLASSES * SIZE
    again = distill.run(config, tmp_path / "a", room.dataset, [room.teacher], room.patches)
    assert again.id == made.id


def test_smaller_sets_are_prefixes(room: types.SimpleNamespace, tmp_path: Path) -> None:
    """Ids of a smaller set are those of the larger, for patches, real images, noise and the released random patches."""
    for changes, small, large in (
        ({}, 2, 3),
        ({"init": "real"}, 1, 2),
        ({"init": "noise"}, 1, 2),
        ({"semantics": "released", "lr": 0.1}, 2, 3),
    ):
        made = {}
        for ipc in (small, large):
            config = settings(method="sre2l++_fd2", ipc=ipc, segments_per_step=1, iterations=(2,), **changes)
            name = "-".join(map(str, changes.values()))
            made[ipc] = files_of(
                distill.run(config, tmp_path / f"{ipc}{name}", room.dataset, [room.teacher], room.patches)
            )
        images = {k: v for k, v in made[small].items() if k.startswith("images/")}
        assert len(images) == CLASSES * small
        assert {k: made[large][k] for k in images} == images


def test_initial_images_differ_between_ids(room: types.SimpleNamespace, tmp_path: Path) -> None:
    for init in ("patches", "real", "noise"):
        config = settings(method="sre2l++", init=init, ipc=2, lr=1e-9, iterations=(1,))
        made = distill.run(config, tmp_path / init, room.dataset, [room.teacher], room.patches)
        digests = [v for k, v in files_of(made).items() if k.startswith("images/")]
        assert len(set(digests)) == 10
    first = pixels_of(tmp_path / "patches/images/new002/class002_id001.png").astype(int)
    patch = pixels_of(room.patches.file("images/00002/class00002_id00001.png")).astype(int)
    assert np.abs(first - patch).max() <= 1


@pytest.mark.parametrize(
    "method", ["sre2l++", "sre2l++_fd2", "fadrm", "fadrm_fd2", "fadrm+", "fadrm+_fd2", "cvdd", "cvdd_fd2"]
)
@pytest.mark.parametrize("semantics", ["paper", "released"])
def test_every_method_runs(method: str, semantics: str, room: types.SimpleNamespace, tmp_path: Path) -> None:
    teachers = [room.teacher, room.other] if method.startswith(("fadrm+", "cvdd")) else [room.teacher]
    config = settings(method=method, semantics=semantics, ipc=2, iterations=(4,))
    made = distill.run(config, tmp_path / "out", room.dataset, teachers, room.patches)
    assert made.config["iterations"] == ([4] if "fadrm" not in method else [1] * 4)
    suffix = "jpg" if semantics == "released" else "png"
    image = pixels_of(made.file(f"images/new004/class004_id001.{suffix}"))
    assert image.shape == (SIZE, SIZE, 3)
    assert image.std() > 1


def test_committees_are_drawn_per_image_id(room: types.SimpleNamespace, tmp_path: Path) -> None:
    """Two of three, differing between ids; a step with different committees runs, and ids do not depend on IPC."""
    third = make_teacher(tmp_path / "third", room.dataset, seed=3, accuracy=60.0)
    teachers = [room.teacher, room.other, third]
    config = settings(method="cvdd_fd2", ipc=6, group_size=1, segments_per_step=4, iterations=(2,))
    resolved = resolve(config, classes=CLASSES, size=SIZE)
    found: list = []
    original = GroupedStep.__init__

    def spy(self: GroupedStep, *args: object, **kwargs: object) -> None:
        found.extend(kwargs["committees"])
        original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(distill, "measure", lambda *_: StepMemory(0, 1))
        patched.setattr(GroupedStep, "__init__", spy)
        distill.run(config, tmp_path / "out", room.dataset, teachers, init_patches(room, tmp_path))
    assert resolved.teachers_per_image == 2
    assert all(len(c) == 2 and c[0] < c[1] for c in found)
    assert len({tuple(c) for c in found}) > 1


def init_patches(room: types.SimpleNamespace, tmp_path: Path) -> Artifact:
    """Patches for six ids need six training images of each class."""
    dataset = make_dataset(tmp_path / "more", CLASSES, SIZE, per_class=6)
    patches = make_patches(tmp_path / "more patches", dataset, per_class=6)
    patches.manifest["parents"] = {"dataset": {"kind": "dataset", "id": room.dataset.id}}
    return patches


KILL = """
import os, signal, sys
from fd2fast import artifacts
from fd2fast.settings.config import DistillConfig, replace
from fd2fast.distillation import runner
from fd2fast.stages import distill
from fd2fast.step import GroupedStep
import torch
torch.set_num_threads(1)
root, out, what, after = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
calls = 0
def deadly(original):
    def call(*args, **kwargs):
        global calls
        calls += 1
        if calls > after:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)
    return call
if what == "iterate":
    GroupedStep.iterate = deadly(GroupedStep.iterate)
else:
    runner.save_image = deadly(runner.save_image)
load = lambda name, kind: artifacts.load(f"{root}/{name}", kind)
config = DistillConfig(method="fadrm+_fd2", ipc=2, group_size=2, segment_size=3, segments_per_step=2,
                       iterations=(5, 6), sizes=(16, 32), save_every=4, precision="fp32")
teachers = [load("teacher", "teacher"), load("other", "teacher")]
distill.run(config, out, load("dataset", "dataset"), teachers, load("patches", "patches"))
"""


def test_killed_and_resumed_is_unbroken(room: types.SimpleNamespace, tmp_path: Path) -> None:
    """kill -9 in the second phase of the first step, then between two images of the second step: same bytes, same id."""
    out = tmp_path / "killed"
    for what, after in (("iterate", 9), ("save_image", 5 + 2)):
        command = [sys.executable, "-c", KILL, str(room.root), str(out), what, str(after)]
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        assert ended.returncode == -9, ended.stderr
        assert not (out / "manifest.json").exists()
    assert len(list(out.glob("images/*/*"))) == 5 + 2
    assert len(list(out.glob("state/steps/*.json"))) == 1
    config = settings(method="fadrm+_fd2", ipc=2, iterations=(5, 6), sizes=(16, 32), save_every=4)
    parents = (room.dataset, [room.teacher, room.other], room.patches)
    resumed = distill.run(config, out, *parents)
    assert resumed.measured["iterations_this_run"] < 11  # the first step and a part of the second were kept
    unbroken = distill.run(replace(config, save_every=1000), tmp_path / "unbroken", *parents)
    assert files_of(resumed) == files_of(unbroken)
    assert resumed.id == unbroken.id


def test_a_lost_image_of_a_finished_step_is_made_again(room: types.SimpleNamespace, tmp_path: Path) -> None:
    config = settings(method="sre2l++", ipc=1, segments_per_step=1, iterations=(3,))
    parents = (room.dataset, [room.teacher], room.patches)
    whole = distill.run(config, tmp_path / "a", *parents)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(distill, "_write_overviews", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            distill.run(config, tmp_path / "b", *parents)
    (tmp_path / "b/images/new001/class001_id000.png").unlink()
    assert distill.run(config, tmp_path / "b", *parents).id == whole.id


def test_draws_are_recorded(room: types.SimpleNamespace, tmp_path: Path) -> None:
    config = settings(method="sre2l++", ipc=1, iterations=(2,))
    parents = (room.dataset, [room.teacher], room.patches)
    draws = {s: iteration_table(5, [s], 0, 2, SIZE, jitter=4)[:, 0] for s in range(2)}
    made = distill.run(config, tmp_path / "a", *parents, draws=draws)
    assert len(made.facts["given_draws"]["draws"]) == 64
    assert distill.run(config, tmp_path / "a", *parents, draws=draws).id == made.id
    with pytest.raises(UserError, match="was begun with other draws"):
        distill.run(config, tmp_path / "a", *parents)
    with pytest.raises(UserError, match=r"draws\[1\] must be int \[2, 7\], got None"):
        distill.run(config, tmp_path / "b", *parents, draws={0: draws[0]})
    with pytest.raises(UserError, match=r"draws\[0\] must be int \[2, 7\], got \(1, 7\)"):
        distill.run(config, tmp_path / "c", *parents, draws={0: draws[0][:1], 1: draws[1]})


def test_baselines_are_written_like_distilled_images(room: types.SimpleNamespace, tmp_path: Path) -> None:
    chosen = np.random.default_rng(0).integers(0, 256, (CLASSES, 2, 3, SIZE, SIZE), dtype=np.uint8)
    asked: list = []

    def select(*args: object) -> np.ndarray:
        asked.append(args)
        return chosen

    with pytest.MonkeyPatch.context() as patched:
        fake = types.SimpleNamespace(select=select)
        patched.setitem(sys.modules, "fd2fast.students.baselines", fake)
        patched.setattr(students, "baselines", fake, raising=False)
        made = distill.run(settings(method="random", ipc=2), tmp_path / "a", room.dataset, [room.teacher])
        with pytest.raises(UserError, match="'rded' starts from patches and none were given"):
            distill.run(settings(method="rded", ipc=2), tmp_path / "b", room.dataset, [room.teacher])
    assert asked[0][:3] == ("random", 2, room.dataset)
    image = pixels_of(made.file("images/new003/class003_id001.png"))
    assert np.array_equal(image.transpose(2, 0, 1), chosen[3, 1])
    assert "grid.png" in made.manifest["files"]


def test_what_does_not_fit_is_refused(room: types.SimpleNamespace, tmp_path: Path) -> None:
    def refused(
        message: str, *, teachers: list | None = None, patches: Artifact | None = room.patches, **changes: object
    ):
        config = settings(**{"method": "sre2l++_fd2", **changes})
        with pytest.raises(UserError, match=message):
            distill.run(
                config, tmp_path / "out", room.dataset, [room.teacher] if teachers is None else teachers, patches
            )
        assert not (tmp_path / "out").exists()

    other_data = make_dataset(tmp_path / "data", CLASSES, SIZE, seed=9)
    fewer = make_dataset(tmp_path / "fewer", CLASSES - 1, SIZE)
    larger = make_dataset(tmp_path / "larger", CLASSES, 40)
    refused("was made from another data set", teachers=[make_teacher(tmp_path / "t1", other_data)])
    refused("classes 4 against 5 entries", teachers=[make_teacher(tmp_path / "t2", fewer)])
    refused("image size 40 against 32", teachers=[make_teacher(tmp_path / "t3", larger)])
    refused("holds a patches artifact; wanted a teacher", teachers=[room.patches])
    refused("needs at least 1", teachers=[])
    refused("takes 1 teacher, got 2", teachers=[room.teacher, room.other])
    refused("'fadrm\\+_fd2' needs at least 2", method="fadrm+_fd2", iterations=(8,))
    refused("starts from patches and none were given", patches=None)
    refused("holds a teacher artifact; wanted patches", patches=room.teacher)
    refused("holds 3 initial images of each class, IPC 4 needs 4", ipc=4)
    refused("was made from another data set", patches=make_patches(tmp_path / "p", other_data))
    refused("ipc must be a whole number of images per class, at least 1", ipc=0)
    refused("segment_size must be at most the 5 classes", segment_size=6)
    refused("device 'gpu' is unknown", device="gpu")
    no_accuracy = make_teacher(tmp_path / "t4", room.dataset, accuracy=float("nan"))
    refused("has no accuracy", teachers=[room.teacher, no_accuracy], method="cvdd")
    with pytest.raises(UserError, match="wanted a dataset"):
        distill.run(settings(), tmp_path / "out", room.teacher, [room.teacher], room.patches)


def test_a_damaged_prior_is_named(room: types.SimpleNamespace, tmp_path: Path) -> None:
    config = settings(method="sre2l++_fd2", ipc=2, segments_per_step=1, iterations=(2,))
    original = runner.save_image

    def damage(path: Path, pixels: torch.Tensor, extension: str) -> None:
        original(path, pixels, extension)
        if path.name == "class001_id000.png":
            path.write_bytes(b"")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(runner, "save_image", damage)
        with pytest.raises(UserError, match="class001_id000.png.*0 bytes"):
            distill.run(config, tmp_path / "a", room.dataset, [room.teacher], room.patches)


def out_of_memory_above(rows: int, error: Exception, from_iteration: int = 0):
    """GroupedStep.iterate that fails for more rows than fit, as a device or the host would."""
    original = GroupedStep.iterate

    def iterate(self: GroupedStep, *args: object) -> torch.Tensor:
        if len(self.labels) > rows and self.iteration >= from_iteration:
            raise error
        return original(self, *args)

    return iterate


HOST_IS_FULL = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
DEVICE_IS_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")


@pytest.mark.parametrize("error", [HOST_IS_FULL, DEVICE_IS_FULL, MemoryError()])
def test_a_segment_that_does_not_fit_says_what_to_change(
    error: Exception, room: types.SimpleNamespace, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(distill, "measure", lambda *_: StepMemory(0, 1))
        patched.setattr(GroupedStep, "iterate", out_of_memory_above(2, error))
        with pytest.raises(UserError, match="3 images.*segment_size"):
            distill.run(settings(method="sre2l++"), tmp_path / "a", room.dataset, [room.teacher], room.patches)


@pytest.mark.parametrize(("method", "at"), [("sre2l++_fd2", 0), ("fadrm+_fd2", 7)])
def test_out_of_memory_splits_the_step_and_loses_no_iteration(
    method: str, at: int, room: types.SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"iterations": (5, 6), "sizes": (16, 32)} if method == "fadrm+_fd2" else {"iterations": (9,)}
    config = settings(method=method, ipc=4, segments_per_step=4, precision="fp64", **changes)
    teachers = [room.teacher, room.other] if method == "fadrm+_fd2" else [room.teacher]
    parents = (room.dataset, teachers, init_patches(room, tmp_path))
    whole = distill.run(config, tmp_path / "whole", *parents)
    calls: list[int] = []
    fails = out_of_memory_above(6, DEVICE_IS_FULL, at)

    def iterate(self: GroupedStep, *args: object) -> torch.Tensor:
        losses = fails(self, *args)
        calls.extend([self.iteration] * len(losses))
        return losses

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(distill, "measure", lambda *_: StepMemory(0, 1))
        patched.setattr(GroupedStep, "iterate", iterate)
        split = distill.run(config, tmp_path / "split", *parents)
    total = sum(changes["iterations"])
    assert sorted(calls) == sorted(list(range(1, total + 1)) * 8)  # each segment, each iteration, once
    assert "does not fit the memory" in caplog.text
    assert f"going on at iteration {at} with 2 and 2 segments" in caplog.text
    for k in range(CLASSES):
        for i in range(4):
            name = f"images/new{k:03d}/class{k:03d}_id{i:03d}.png"
            assert np.array_equal(pixels_of(split.file(name)), pixels_of(whole.file(name)))
    record = json.loads(split.file("plan.json").read_text())
    assert [len(s) for s in record["steps"]] == [2, 2, 2, 2]
    losses = [json.loads(a.file("losses.json").read_text())["segments"] for a in (split, whole)]
    for segment, found in losses[0].items():
        assert found["iterations"] == losses[1][segment]["iterations"]
        assert found["total"] == pytest.approx(losses[1][segment]["total"], rel=1e-5)


@pytest.mark.parametrize("method", ["sre2l++_fd2", "fadrm+_fd2", "cvdd_fd2"])
def test_steps_of_any_size_give_the_same_images(room: types.SimpleNamespace, tmp_path: Path, method: str) -> None:
    """IPC 5, N_S 4, class blocks of 2, 2 and 1: one segment a step, and as many as there are."""
    patches = init_patches(room, tmp_path)
    teachers = [room.teacher] if method.startswith("sre2l") else [room.teacher, room.other]
    made = [
        distill.run(
            settings(
                method=method, ipc=5, group_size=4, segment_size=2, segments_per_step=n, precision="fp64", init="real"
            ),
            tmp_path / str(n),
            room.dataset,
            teachers,
            patches,
        )
        for n in (1, None)
    ]
    steps = [json.loads(a.file("plan.json").read_text())["steps"] for a in made]
    assert [len(s) for s in steps] == [15, 4]
    one, many = ({k: v for k, v in files_of(a).items() if k.startswith("images/")} for a in made)
    assert len(one) == 5 * CLASSES
    assert one == many


def test_a_split_step_is_resumed_where_it_was(room: types.SimpleNamespace, tmp_path: Path) -> None:
    """Split at iteration 4, stopped in the second half: the first half is not run again, the second goes on."""
    config = settings(method="sre2l++", ipc=2, segments_per_step=4, iterations=(8,), precision="fp64")
    parents = (room.dataset, [room.teacher], room.patches)
    whole = distill.run(config, tmp_path / "whole", *parents)
    fails = out_of_memory_above(6, DEVICE_IS_FULL, 4)
    calls = 0

    def iterate(self: GroupedStep, *args: object) -> torch.Tensor:
        nonlocal calls
        losses = fails(self, *args)
        calls += 1
        if calls > 4 + 4 + 2:
            raise KeyboardInterrupt
        return losses

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(distill, "measure", lambda *_: StepMemory(0, 1))
        patched.setattr(GroupedStep, "iterate", iterate)
        with pytest.raises(KeyboardInterrupt):
            distill.run(config, tmp_path / "split", *parents)
    resumed = distill.run(config, tmp_path / "split", *parents)
    assert resumed.measured["iterations_this_run"] == 4  # of the second half, from where the split had saved it
    images = {k: v for k, v in files_of(whole).items() if k.startswith("images/")}
    assert {k: v for k, v in files_of(resumed).items() if k.startswith("images/")} == images


def test_the_plan_fits_the_memory(room: types.SimpleNamespace, tmp_path: Path) -> None:
    """More memory, larger steps; too little for one segment is refused with what it needs; a begun plan stays."""
    config = settings(method="sre2l++", ipc=3, segments_per_step=None, iterations=(2,))
    parents = (room.dataset, [room.teacher], room.patches)

    def largest_step(limit: float | None) -> int:
        made = distill.run(replace(config, memory_limit=limit), tmp_path / str(limit), *parents)
        return max(len(s) for s in json.loads(made.file("plan.json").read_text())["steps"])

    memory = measure(
        resolve(config, classes=CLASSES, size=SIZE),
        [fuse(load_teacher(room.teacher, "cpu", torch.float32))],
        torch.device("cpu"),
    )
    two = (memory.fixed + 6.5 * memory.row) / 1e9
    assert largest_step(None) == 6
    assert largest_step(two) == 2
    with pytest.raises(UserError, match="3 images.*GB|3 images.*MB"):
        largest_step((memory.fixed + 2.5 * memory.row) / 1e9)


def test_two_processes_write_the_same_bytes_as_one(room: types.SimpleNamespace, tmp_path: Path) -> None:
    """torchrun with two gloo processes: a worker killed in its second step, the same command again, one process alone."""
    flags = ["--method", "sre2l++_fd2", "--ipc", "3", "--group-size", "2", "--segment-size", "2", "--iterations", "5"]
    flags += ["--segments-per-step", "2", "--precision", "fp32", "--save-every", "2", "--device", "cpu"]
    parents = [
        "--dataset",
        room.root / "dataset",
        "--teachers",
        room.root / "teacher",
        "--patches",
        room.root / "patches",
    ]
    arguments = ["distill", *flags, *map(str, parents), "--out"]
    together = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(command: list[str], out: Path, **extra: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*command, *arguments, str(out)], env={**environment, **extra}, capture_output=True, text=True, check=False
        )

    script = tmp_path / "dies.py"
    script.write_text(DIES)
    ended = start([*together, str(script)], tmp_path / "two")
    assert ended.returncode != 0
    finished = list((tmp_path / "two/state/steps").glob("*.json"))
    assert 1 <= len(finished) < 5
    segments = [s for path in finished for s in json.loads(path.read_text())["segments"]]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "two/images").glob("*/*.png")}
    ended = start([*together, "-m", "fd2fast"], tmp_path / "two")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("images:") == 1
    kept = [path for path, time in written.items() if path.stat().st_mtime_ns == time]
    assert len(kept) >= sum(min(2, CLASSES - 2 * (s % 3)) for s in segments) > 0  # finished steps are not done again
    ended = start([sys.executable, "-m", "fd2fast"], tmp_path / "one")
    assert ended.returncode == 0, ended.stderr
    two, one = (load(tmp_path / name, "images") for name in ("two", "one"))
    assert files_of(two) == files_of(one)
    assert two.id == one.id
    assert not list(tmp_path.rglob(f"{lock.OURS}*"))  # nor is a lock left by the job that was killed
    assert (two.measured["processes"], one.measured["processes"]) == (2, 1)


DIES = """
import os, signal, sys
from fd2fast import cli
from fd2fast.step import GroupedStep
original, calls = GroupedStep.iterate, 0
def iterate(self, *args):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls > 5 + 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, *args)
GroupedStep.iterate = iterate
sys.exit(cli.main(sys.argv[1:]))
"""


def test_diverged_losses_stop_the_run(room: types.SimpleNamespace, tmp_path: Path) -> None:
    original = GroupedStep.iterate
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(GroupedStep, "iterate", lambda self, *draws: original(self, *draws) * float("nan"))
        with pytest.raises(UserError, match="losses of segment 0 are not finite at iteration 0"):
            distill.run(settings(method="sre2l++"), tmp_path / "a", room.dataset, [room.teacher], room.patches)


def test_convolutions_are_measured_once_and_a_resumed_run_keeps_them(
    room: types.SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The algorithms of the first start, also where another would be faster when the run goes on."""
    config = settings(method="sre2l++_fd2", iterations=(6,), precision="fp32")
    measured: list[dict[str, str]] = []
    real = distill.tune

    def tune(*arguments: object, **settings: object) -> object:
        found = real(*arguments, **settings)
        measured.append(dict(found.chosen))
        return found

    def seconds(candidates: dict[str, object]) -> dict[str, float]:
        order = list(candidates)[:: 1 if not measured else -1]
        return {name: 1.0 + place for place, name in enumerate(order)}

    monkeypatch.setenv("FD2FAST_TUNE", "1")
    monkeypatch.setattr(distill, "tune", tune)
    monkeypatch.setattr(convolution, "_measured", seconds)
    unbroken = distill.run(config, tmp_path / "unbroken", room.dataset, [room.teacher], room.patches)
    recorded = json.loads(unbroken.file("plan.json").read_text())["convolutions"]
    assert recorded == measured[0]
    assert set(recorded.values()) > {"winograd"}

    measured.clear()
    iterate, count = GroupedStep.iterate, [0]

    def stops(self: GroupedStep, *arguments: object) -> object:
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        return iterate(self, *arguments)

    monkeypatch.setattr(GroupedStep, "iterate", stops)
    with pytest.raises(KeyboardInterrupt):
        distill.run(config, tmp_path / "broken", room.dataset, [room.teacher], room.patches)
    assert len(measured) == 1
    again = distill.run(config, tmp_path / "broken", room.dataset, [room.teacher], room.patches)
    assert len(measured) == 1
    assert json.loads(again.file("plan.json").read_text())["convolutions"] == recorded
    assert again.id == unbroken.id
