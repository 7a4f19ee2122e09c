"""Random numbers of a recovery: files of draws both ways, the published code's own streams, and this engine's."""

from __future__ import annotations

import importlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from dropin_tools import Laid, lay_out
from PIL import Image
from torch import nn
from torchvision import transforms

from fd2fast.dropin.draws import Block, CounterSource, Draws, FileSource, ReferenceSource, Scene, Voting
from fd2fast.dropin.networks import small_backbone
from fd2fast.dropin.pool import Member, consume_initial_weights
from fd2fast.errors import UserError
from fd2fast.models.attention_head import AttentionHead

SIZE, CLASSES, JITTER = 32, 3, 4
NAMES = ("ResNet18", "ShuffleNetV2")


@pytest.fixture
def patches(tmp_path: Path) -> Path:
    for label in range(CLASSES):
        folder = tmp_path / "patches" / f"{label:05d}"
        folder.mkdir(parents=True)
        for image_id in range(4):
            Image.new("RGB", (SIZE, SIZE)).save(folder / f"class{label:05d}_id{image_id:05d}.jpg")
    return tmp_path / "patches"


def scene(patches: Path | None, **changed: Any) -> Scene:
    values: dict[str, Any] = {
        "size": SIZE,
        "phases": ((3, 24), (4, SIZE)),
        "jitter": JITTER,
        "augment": True,
        "voting": Voting(2, each=2, rule="random"),
        "initial": "noise" if patches is None else "patch by chance",
        "patch_folder": patches,
        "noise_sides": (24, SIZE),
        "names": NAMES,
    }
    return Scene(**values | changed)


BLOCKS = [Block(5, 0, 2), Block(5, 2, 3), Block(6, 0, 2, (5,)), Block(6, 2, 3, (5,))]


def networks(models: tuple[int, ...], new: bool) -> None:
    for index in models:
        consume_initial_weights(Member(NAMES[index], 4, 0.5), ("torchvision", "CVDD")[index], classes=CLASSES)


def test_reference_streams_are_those_of_the_seeded_generators(patches: Path) -> None:
    """Drawn here by the global generators with torchvision's own transforms, in the order of the published recover."""
    seed, setting = 11, scene(patches)
    before = torch.get_rng_state()
    found = Draws(BLOCKS, ReferenceSource(seed, setting, networks, weights_by_task=True))
    drawn = [found[task] for task in range(len(BLOCKS))]
    assert torch.equal(torch.get_rng_state(), before)

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    # a row of numbers tells what a view was cut from
    ramp = torch.arange(SIZE * SIZE, dtype=torch.float64).reshape(1, SIZE, SIZE).repeat(3, 1, 1)
    image_id = None
    for block, one in zip(BLOCKS, drawn, strict=True):
        if block.image_id != image_id:
            image_id, models = block.image_id, random.sample([0, 1], 2)
        assert one.models == tuple(models)
        for index in models:
            if NAMES[index] == "ResNet18":
                small_backbone("ResNet18", CLASSES)
                net = torchvision.models.resnet18(weights=None)
                net.fc = nn.Linear(net.fc.in_features, CLASSES)
                AttentionHead(512, CLASSES, 4)
            else:
                small_backbone("ShuffleNetV2", CLASSES)
                AttentionHead(1024, CLASSES, 4)
        weights = np.random.rand(2)
        np.testing.assert_array_equal(one.weights, weights / weights.sum())
        whole = transforms.Compose([transforms.RandomResizedCrop(SIZE), transforms.RandomHorizontalFlip()])
        for view in one.views:
            assert torch.equal(whole(ramp), cut(ramp, view, SIZE))
        assert len(one.views) == len(block.classes) * len(block.previous)
        for label, name in zip(block.classes, one.patches or (), strict=True):
            assert name == random.sample(setting.patches_of(label), 1)[0]
        row = iter(one.draws)
        for count, side in setting.phases:
            augmented = transforms.Compose([transforms.RandomResizedCrop(side), transforms.RandomHorizontalFlip()])
            small = ramp[:, :side, :side]
            for _ in range(count):
                values = next(row)
                assert torch.equal(augmented(small), cut(small, values, side))
                assert list(values[5:]) == [random.randint(0, JITTER), random.randint(0, JITTER)]


def cut(image: torch.Tensor, view: np.ndarray, side: int) -> torch.Tensor:
    top, left, height, width, flip = (int(v) for v in view[:5])
    found = transforms.functional.resized_crop(image, top, left, height, width, [side, side])
    return transforms.functional.hflip(found) if flip else found


def test_networks_are_made_once_for_an_image_id_where_the_script_does(patches: Path) -> None:
    calls: list[bool] = []
    source = ReferenceSource(1, scene(patches), lambda models, new: calls.append(new), weights_by_task=False)
    draws = Draws(BLOCKS, source)
    weights = [draws[task].weights for task in range(len(BLOCKS))]
    assert calls == [True, False, True, False]
    assert weights[0] == weights[1] != weights[2] == weights[3]


def test_noise_is_the_generators() -> None:
    source = ReferenceSource(3, scene(None), lambda models, new: None, weights_by_task=True)
    drawn = source.drawn(BLOCKS[0])
    torch.manual_seed(3)
    wanted = [torch.randn(2, 3, 24, 24), torch.randn(2, 3, SIZE, SIZE)]
    crop = transforms.RandomResizedCrop.get_params(torch.zeros(3, 24, 24), [0.08, 1.0], [3 / 4, 4 / 3])
    assert drawn.noise is not None
    for found, value in zip(drawn.noise(), wanted, strict=True):
        assert torch.equal(found, value)
    assert tuple(drawn.draws[0][:4]) == crop


def test_counters_give_what_does_not_depend_on_order(patches: Path) -> None:
    setting = scene(patches)
    forward = [CounterSource(1, setting).drawn(block) for block in BLOCKS]
    backward = [CounterSource(1, setting).drawn(block) for block in reversed(BLOCKS)][::-1]
    for a, b in zip(forward, backward, strict=True):
        assert (a.models, a.weights, a.patches) == (b.models, b.weights, b.patches)
        np.testing.assert_array_equal(a.draws, b.draws)
        np.testing.assert_array_equal(a.views, b.views)
    other = CounterSource(2, setting).drawn(BLOCKS[0])
    assert not np.array_equal(other.draws, forward[0].draws)
    assert not np.array_equal(forward[1].draws, forward[0].draws)
    top, left, height, width = forward[0].draws[:3].T[:4]
    assert (top + height).max() <= 24
    assert (left + width).max() <= 24


def test_without_augmentation_the_whole_image_is_rolled(patches: Path) -> None:
    for source in (
        CounterSource(1, scene(patches, augment=False)),
        ReferenceSource(1, scene(patches, augment=False), lambda models, new: None, weights_by_task=True),
    ):
        drawn = source.drawn(BLOCKS[2])
        assert (drawn.draws[:3, :5] == [0, 0, 24, 24, 0]).all()
        assert (drawn.views == [0, 0, SIZE, SIZE, 0, 0, 0]).all()
        assert drawn.draws[:, 5:].max() > 0


def test_votes() -> None:
    prior = Voting(3, rule="prior", scores=(70.2, 73.4, 76.6), temperature=5)
    powers = np.exp([70.2 / 5, 76.6 / 5])
    np.testing.assert_allclose(prior.weights((0, 2), np.random.rand), powers / powers.sum(), rtol=1e-15)
    assert Voting(3).weights((0, 2), np.random.rand) == (0.5, 0.5)
    assert Voting(3, rule="prior", scores=(None,) * 3).weights((1,), np.random.rand) == (1.0,)


def test_files_of_draws_go_both_ways(patches: Path, tmp_path: Path) -> None:
    setting = scene(patches)
    draws = Draws(BLOCKS, CounterSource(4, setting))
    draws.write(tmp_path / "draws.jsonl", NAMES)
    source = FileSource(tmp_path / "draws.jsonl", setting)
    for task in (3, 0, 2, 1):
        read, made = source.drawn(BLOCKS[task]), draws[task]
        assert (read.models, read.weights, read.patches) == (made.models, made.weights, made.patches)
        np.testing.assert_array_equal(read.draws, made.draws)
        np.testing.assert_array_equal(read.views, made.views)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"draws": [[0, 0, 24, 24, 0, 0, 0]]}, r"line 2: draws must be int \[7, 7\], got \[1, 7\]"),
        ({"draws": [[0, 0, 25, 24, 0, 0, 0]] * 7}, r"draws\[0\] must be a crop inside 24 pixels"),
        ({"draws": "x"}, "draws must be int"),
        ({"patches": ["a.jpg"]}, "patches must be 2 files"),
        ({"patches": ["../a.jpg", "b.jpg"]}, "must lie below the patch folder"),
        ({"models": ["ResNet50"]}, "models must be some of"),
        ({"models": ["ResNet18"] * 2}, "models must be some of"),
        ({"weights": [1.0]}, "weights must be 2 numbers"),
        ({"ipc_id": 4}, "has no task of image id 5, classes 0 to 1"),
        ({"ipc_id": "x"}, "line 2: no task"),
    ],
)
def test_faulty_files_of_draws(patches: Path, tmp_path: Path, change: dict[str, Any], told: str) -> None:
    setting, path = scene(patches), tmp_path / "draws.jsonl"
    Draws(BLOCKS, CounterSource(4, setting)).write(path, NAMES)
    head, first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([head, json.dumps(json.loads(first) | change), *rest]))
    with pytest.raises(UserError, match=told):
        FileSource(path, setting).drawn(BLOCKS[0])


@pytest.mark.parametrize("content", ["", "{}\n", "no json\n", '[1]\n{"ipc_id": 0}\n'])
def test_files_of_something_else(patches: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "draws.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"draws\.jsonl"):
        FileSource(tmp_path / "draws.jsonl", scene(patches))


@pytest.fixture
def laid(tmp_path: Path) -> Laid:
    return lay_out("sre2l", tmp_path / "laid")


def recovered(laid: Laid, name: str, *more: str, draws: bool = False) -> dict[str, bytes]:
    """Images of a short run into a folder of its own."""
    arguments = list(laid.arguments)
    if not draws:
        at = arguments.index("--draws")
        del arguments[at : at + 2]
    for flag, value in (("iteration", "4"), ("syn_data_path", str(laid.folder / name))):
        arguments[arguments.index(f"--{flag}") + 1] = value
    assert importlib.import_module("fd2fast.dropin.recover_FD2").main([*arguments, *more]) == 0
    return {str(p.relative_to(laid.folder / name)): p.read_bytes() for p in (laid.folder / name).rglob("*.jpg")}


@pytest.mark.slow
def test_dumped_draws_give_the_same_images(laid: Laid) -> None:
    """Of a run by a seed and of one by the published streams; without a seed every run is another."""
    dumped = laid.folder / "dumped.jsonl"
    for source in (["--fd2fast_seed", "3"], ["--reference_rng", "3"]):
        made = recovered(laid, "made", *source, "--dump_draws", str(dumped))
        again = recovered(laid, "again", "--draws", str(dumped))
        assert made == again
        assert len(made) == 8
    assert recovered(laid, "other", "--fd2fast_seed", "4") != recovered(laid, "made", "--fd2fast_seed", "3")
