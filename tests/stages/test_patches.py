"""The patches stage against a plain per-image loop; resume, refusals."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from model_tools import make_dataset, make_teacher, tree_bytes
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as TF

from fd2fast import artifacts, seeding
from fd2fast.data.crops import random_resized_crops
from fd2fast.data.pixels import normalise, read_image
from fd2fast.data.store import load_split
from fd2fast.errors import UserError
from fd2fast.models.teacher import load_teacher
from fd2fast.settings.config import PatchesConfig
from fd2fast.stages import patches


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("patches")
    dataset = make_dataset(root / "dataset")
    return dataset, make_teacher(root / "teacher", dataset)


def best_crops_by_hand(config, dataset, teacher, label, repetition, pool):
    """Loop over images and crops, with torchvision's resized_crop; [(score, crop)] in rank order."""
    train, net = load_split(dataset, "train"), load_teacher(teacher)
    size = dataset.size
    side = size // config.factor
    draws = torch.rand(
        pool * config.crops,
        22,
        generator=seeding.generator(config.seed, "patches", label, repetition),
        dtype=torch.float64,
    )
    boxes = random_resized_crops(
        draws[:, :20].unflatten(1, (-1, 2)), draws[:, 20:], (size, size), (config.min_crop, 1.0), (1.0, 1.0)
    ).tolist()
    found = []
    for i, index in enumerate(train.of_class(label)[:pool]):
        of_image = []
        for c in range(config.crops):
            crop = TF.resized_crop(train.unit([index])[0], *boxes[i * config.crops + c], [side, side], antialias=True)
            canvas = torch.zeros(3, size, size)
            at = (size - side) // 2
            canvas[:, at : at + side, at : at + side] = normalise(crop, dataset.mean, dataset.std)
            score = -F.log_softmax(net(canvas[None]).logits[0], 0)[label].item()
            of_image.append((score, crop))
        found.append(min(of_image, key=lambda pair: pair[0]))
    return sorted(found, key=lambda pair: pair[0])


@pytest.mark.parametrize(("factor", "per_class", "pool"), [(2, 2, None), (1, 5, None), (2, 3, 5), (1, 5, 4)])
def test_images_are_the_plain_loops(tmp_path, inputs, factor, per_class, pool):
    dataset, teacher = inputs
    config = PatchesConfig(factor=factor, per_class=per_class, pool=pool, crops=3, seed=5)
    artifact = patches.run(config, tmp_path / "out", dataset, teacher)
    pool = pool or 9
    for label in range(3):
        made, repetition = [], 0
        while len(made) < per_class:
            ranked = best_crops_by_hand(config, dataset, teacher, label, repetition, pool)
            count = min(pool // factor**2, per_class - len(made))
            for j in range(count):
                cells = [ranked[j + q * count][1] for q in range(factor**2)]
                if factor == 2:
                    cells = [torch.cat(cells[:2], 2), torch.cat(cells[2:], 2)]
                made.append(torch.cat(cells, 1))
            repetition += 1
        for j, wanted in enumerate(made):
            pixels = read_image(artifact.file(f"images/{label:05d}/class{label:05d}_id{j:05d}.png"))
            assert pixels.shape == (3, 32, 32)
            assert (pixels.float() / 255 - wanted).abs().max() < 0.51 / 255 + 1e-5
    assert artifact.facts["factor"] == factor
    assert artifact.facts["per_class"] == per_class
    assert artifact.facts["pool"] == pool
    assert artifact.file("preview.png").stat().st_size > 100


def test_scores_are_the_plain_loops(inputs):
    dataset, teacher = inputs
    config = PatchesConfig(factor=2, crops=4, seed=1)
    train = load_split(dataset, "train")
    images = train.unit(train.of_class(1))
    ranked = patches.rank_crops(config, images, 1, load_teacher(teacher), train, seeding.generator(1, "patches", 1, 0))
    wanted = best_crops_by_hand(config, dataset, teacher, 1, 0, 9)
    np.testing.assert_allclose(ranked.scores.numpy(), [score for score, _ in wanted], rtol=1e-4)
    assert ranked.scores.diff().min() >= 0
    assert sorted(ranked.sources.tolist()) == list(range(9))


def test_an_interrupted_run_ends_in_the_same_bytes(tmp_path, inputs, monkeypatch):
    dataset, teacher = inputs
    config = PatchesConfig(factor=1, per_class=2, crops=2)
    whole = patches.run(config, tmp_path / "whole", dataset, teacher)
    save, calls = patches.save_image, []

    def dies(path, pixels):
        calls.append(path)
        if len(calls) == 4:
            raise KeyboardInterrupt
        save(path, pixels)

    monkeypatch.setattr(patches, "save_image", dies)
    with pytest.raises(KeyboardInterrupt):
        patches.run(config, tmp_path / "killed", dataset, teacher)
    with pytest.raises(UserError, match="not a finished patches"):
        artifacts.load(tmp_path / "killed", "patches")
    calls.clear()
    monkeypatch.setattr(patches, "save_image", lambda path, pixels: (calls.append(path), save(path, pixels)))
    resumed = patches.run(config, tmp_path / "killed", dataset, teacher)
    assert len(calls) == 4, "the finished class was made again"
    assert resumed.id == whole.id
    assert tree_bytes(tmp_path / "killed") == tree_bytes(tmp_path / "whole")
    calls.clear()
    assert patches.run(config, tmp_path / "killed", dataset, teacher).id == whole.id
    assert not calls


def test_other_seeds_give_other_crops(tmp_path, inputs):
    dataset, teacher = inputs
    one = patches.run(PatchesConfig(per_class=1, seed=1), tmp_path / "a", dataset, teacher)
    two = patches.run(PatchesConfig(per_class=1, seed=2), tmp_path / "b", dataset, teacher)
    assert one.manifest["files"] != two.manifest["files"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"per_class": 0}, r"per_class must be a whole number of images per class, at least 1, got 0"),
        ({"crops": 0}, "crops must be a whole number of at least 1, got 0"),
        ({"min_crop": 0.0}, r"min_crop must be a number within \(0, 1\], got 0.0"),
        ({"factor": 3}, "factor must be 1 or 2, got 3"),
        ({"pool": 2}, r"pool must be at least factor\^2 = 4, got 2"),
        ({"pool": 10}, r"class 0 \(9\)"),
        ({"device": "cuda:99"}, "cuda:99"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, inputs, changes, told):
    with pytest.raises(UserError, match=told):
        patches.run(PatchesConfig(**changes), tmp_path / "out", *inputs)
    assert not (tmp_path / "out").exists()


def test_data_that_do_not_fit_are_refused(tmp_path, inputs):
    dataset, teacher = inputs
    few = make_dataset(tmp_path / "few", per_class=(9, 3, 9))
    with pytest.raises(UserError, match=r"too few in: class 1 \(3\)"):
        patches.run(PatchesConfig(), tmp_path / "out", few, make_teacher(tmp_path / "t", few))
    with pytest.raises(UserError, match="another data set"):
        patches.run(PatchesConfig(), tmp_path / "out", few, teacher)
    more = make_dataset(tmp_path / "more", per_class=(5, 5, 5, 5))
    with pytest.raises(UserError, match="classes 3 against 4 entries"):
        patches.run(PatchesConfig(), tmp_path / "out", more, teacher)
    with pytest.raises(UserError, match="holds a dataset artifact; wanted a teacher"):
        patches.run(PatchesConfig(), tmp_path / "out", dataset, dataset)
    odd = make_dataset(tmp_path / "odd", size=33)
    with pytest.raises(UserError, match="side 33 cannot be cut into 2 x 2"):
        patches.run(PatchesConfig(), tmp_path / "out", odd, make_teacher(tmp_path / "o", odd))


KILLED = """
import os, signal, sys
from fd2fast import artifacts
from fd2fast.settings.config import PatchesConfig
from fd2fast.stages import patches
save, calls = patches.save_image, []
def dies(path, pixels):
    calls.append(path)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    save(path, pixels)
patches.save_image = dies
patches.run(PatchesConfig(factor=1, per_class=2, crops=2), sys.argv[3], *(artifacts.load(path) for path in sys.argv[1:3]))
"""


def test_kill_9_and_the_same_command_again_ends_in_the_same_bytes(tmp_path, inputs):
    dataset, teacher = inputs
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "FD2FAST_PROGRESS": "0"}
    command = [sys.executable, "-c", KILLED, str(dataset.path), str(teacher.path), str(tmp_path / "killed")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    config = PatchesConfig(factor=1, per_class=2, crops=2)
    resumed = patches.run(config, tmp_path / "killed", dataset, teacher)
    assert resumed.id == patches.run(config, tmp_path / "whole", dataset, teacher).id
    assert tree_bytes(tmp_path / "killed") == tree_bytes(tmp_path / "whole")
