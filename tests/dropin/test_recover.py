"""A recover stand-in at work: its folders, lines and pictures, blocks of classes, committees, and going on after a kill."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dropin_tools import Laid, lay_out
from PIL import Image

from fd2fast.dropin import recover_CVDD, recover_FADRM, recover_FD2, recover_FD2_FADRM
from fd2fast.dropin.networks import small_backbone
from fd2fast.dropin.recovery import RecoveryEngine

NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"


@pytest.fixture
def laid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Laid:
    """In its own folder: pictures are written to the current one."""
    monkeypatch.chdir(tmp_path)
    return lay_out("sre2l", tmp_path / "laid")


def arguments_of(laid: Laid, *more: str, drop: Sequence[str] = ("draws",), **values: str) -> list[str]:
    """The case's command with other values and flags; drop: flags with one value that are left out."""
    found = list(laid.arguments)
    for name in drop:
        at = found.index(f"--{name}")
        del found[at : at + (1 if at + 1 == len(found) or found[at + 1].startswith("--") else 2)]
    for name, value in values.items():
        found[found.index(f"--{name}") + 1] = value
    return [*found, *more]


def images_in(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*g") if ".fd2fast" not in p.parts}


def test_lines_pictures_and_copies(laid: Laid, capsys: pytest.CaptureFixture[str]) -> None:
    """Of three iterations of the second id alone: the first id's images are compared with, as an earlier call left them."""
    first = arguments_of(laid, "--fd2fast_seed", "1", iteration="1", ipc_end="1")
    assert recover_FD2.main(first) == 0
    capsys.readouterr()
    more = ["--matplotlib", "--store_initialised_images", "--initialisation_dir", str(laid.folder / "begun")]
    arguments = arguments_of(laid, *more, "--fd2fast_seed", "2", iteration="3", class_num="3", SC_ratio="0.25")
    assert recover_FD2.main(arguments) == 0
    told = capsys.readouterr().out
    for line in (
        "---The recover process will be performed on device: cpu",
        "torchvision's ShuffleNetV2 can match ckpt",
        "currently processing label from 0 to 2",
        "currently processing label from 3 to 3",
        "---The recover models are changed to ShuffleNetV2",
        "initialisation method: Patches--2 ",
        "-------ipcID:0,class:0_2,iteration:0-------",
        "-------ipcID:1,class:3_3,iteration:2-------",
        "Model:ShuffleNetV2_cal,weight:1.0",
        "save_images call",
    ):
        assert line in told.splitlines(), line
    for pattern in (
        rf"^time for previous iterations: {NUMBER}$",
        rf"^Average time for distill 3 images \(40\) of ipcID\(1\) = {NUMBER} s$",
        rf"^time for ipc_id\(0\) = {NUMBER}$",
    ):
        assert re.search(pattern, told, re.MULTILINE), pattern
    # Eq. 12 with the flags' weights: CAL's half, BN matching, L_F and, where there are finished images, L_S
    parts = re.findall(
        rf"total loss: ({NUMBER})\nModel:\S+\nCE loss:ShuffleNetV2:({NUMBER}),ShuffleNetV2_cal:({NUMBER})\nBN loss:({NUMBER})\n"
        rf"FC_loss: ({NUMBER})\n(?:\nSC_loss: ({NUMBER}))?",
        told,
    )
    assert len(parts) == 8
    assert sum(bool(similar) for *_, similar in parts) == 4
    for total, ce, cal, bn, fc, sc in parts:
        value = 0.5 * float(ce) + 0.5 * float(cal) + 1e-3 * float(bn) + 0.9 * float(fc) + 0.25 * float(sc or 0)
        assert float(total) == pytest.approx(value, rel=1e-12)
    for image_id in (0, 1):
        for classes in ("cls0_2", "cls3_3"):
            picture = Path(f"result/cal_exp_recorded_ipcID{image_id}/{classes}/recover_base_loss.png")
            with Image.open(picture) as drawn:
                assert drawn.width > 100
    assert sorted(p.relative_to(laid.folder / "begun").as_posix() for p in (laid.folder / "begun").rglob("*.jpg")) == [
        f"exp/call_{image_id}/{block}.jpg"
        for image_id in (0, 1)
        for block in ("0_to_3/0", "0_to_3/1", "0_to_3/2", "3_to_4/3")
    ]


def test_first_class_of_the_first_id(laid: Laid) -> None:
    """Blocks begin at --start_index in the first id only; nothing else is written."""
    arguments = arguments_of(laid, "--start_index", "3", drop=("draws", "SC"), iteration="1")
    assert recover_FD2.main(arguments) == 0
    names = sorted(path.name for path in laid.images.rglob("*.*"))
    assert names == sorted(["class003_id000.jpg", *(f"class{label:03d}_id001.jpg" for label in range(4))])
    assert {path.name for path in (laid.folder / "syn").iterdir()} == {"exp"}


def test_nothing_is_stored_without_the_flag(laid: Laid) -> None:
    arguments = arguments_of(laid, drop=("draws", "SC", "store_best_images"), iteration="1")
    assert recover_FD2.main(arguments) == 0
    assert not images_in(laid.folder / "syn")
    assert laid.images.is_dir()


class Killed(Exception):
    pass


@pytest.mark.slow
def test_a_killed_run_goes_on(laid: Laid, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in its second wave, without a seed given; afterwards nothing is left, and the next run is a new one."""
    arguments = arguments_of(laid, iteration="6")
    seen, count = RecoveryEngine.seen, 0

    def dies(self: Any, *given: Any) -> None:
        nonlocal count
        seen(self, *given)
        count += 1
        if count == 9:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RecoveryEngine, "seen", dies)
        assert recover_FD2.main(arguments) == 70
    (state,) = (laid.folder / "syn/.fd2fast").iterdir()
    seed = json.loads((state / "settings.json").read_text())["seed"]
    assert len(images_in(laid.images)) == 4
    before = count
    monkeypatch.setattr(RecoveryEngine, "seen", lambda self, *given: steps.append(1) or seen(self, *given))  # type: ignore[func-returns-value]
    steps: list[int] = []
    assert recover_FD2.main(arguments) == 0
    assert before == 9
    assert len(steps) == 6  # of the second wave alone
    found = images_in(laid.images)
    assert {path.name for path in (laid.folder / "syn").iterdir()} == {"exp"}
    assert recover_FD2.main([*arguments, "--fd2fast_seed", str(seed)]) == 0
    assert images_in(laid.images) == found
    assert recover_FD2.main(arguments) == 0
    assert images_in(laid.images) != found


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A pool of two small plain networks, patches by id and a description of the data set: 3 classes of 32 pixels."""
    (tmp_path / "pool").mkdir()
    for name in ("ResNet18", "ShuffleNetV2"):
        torch.save(small_backbone(name, 3).net.state_dict(), tmp_path / f"pool/{name}.pth")
    rng = np.random.default_rng(0)
    for label in range(3):
        folder = tmp_path / f"patches/medium/{label:05d}"
        folder.mkdir(parents=True)
        for image_id in range(2):
            pixels = rng.integers(40, 200, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"class{label:05d}_id{image_id:05d}.jpg")
    told = {
        "classes": 3,
        "size": 32,
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "accuracies": {"ResNet18": 60, "ShuffleNetV2": 50},
    }
    (tmp_path / "data.json").write_text(json.dumps(told))
    return tmp_path


def general(folder: Path, *more: str) -> list[str]:
    line = (
        f"--dataset-name own --exp-name e --apply-data-augmentation --pretrained-model-type offline --batch-size 2 "
        f"--syn-data-path {folder}/syn --model-pool-dir {folder}/pool --patch-dir {folder}/patches --lr 0.01 --r-bn 0.01 "
        f"--store-best-images --ipc-end 1 --initialisation-method Patches --fd2fast-dataset {folder}/data.json "
        "--fd2fast-device cpu --fd2fast-seed 1"
    )
    return [*line.split(), *more]


def test_cvdd_committee(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights by accuracy over the temperature; each teacher's own losses are told, and the total is their weighted sum."""
    setting = "--model-setting 4 --selected-size 2 --iteration 2 --weight-temperature 10".split()
    arguments = general(small, *setting, "--verifier", "--verifier-arch", "ShuffleNetV2", "--verifier-weight-path", "x")
    assert recover_CVDD.main(arguments) == 0
    lines = capsys.readouterr().out
    shares = np.exp([6.0, 5.0]) / np.exp([6.0, 5.0]).sum()
    found = re.findall(
        rf"total loss ({NUMBER})\nModel: (\w+), CE loss: ({NUMBER}), BN loss: ({NUMBER}), weight: ({NUMBER})\n"
        rf"Model: (\w+), CE loss: ({NUMBER}), BN loss: ({NUMBER}), weight: ({NUMBER})",
        lines,
    )
    assert len(found) == 2
    for total, *parts in found:
        models = [parts[:4], parts[4:]]
        assert {name: pytest.approx(float(weight)) for name, _, _, weight in models} == {
            "ResNet18": shares[0],
            "ShuffleNetV2": shares[1],
        }
        value = sum(float(weight) * (float(ce) + 0.01 * float(bn)) for _, ce, bn, weight in models)
        assert float(total) == pytest.approx(value, rel=1e-5)
    assert lines.count("Verifier accuracy:  ") == 2
    assert "currently processing label from 0 to 2" in lines
    assert sorted(images_in(small / "syn")) == [f"e/new{k:03d}/class{k:03d}_id000.jpg" for k in range(3)]


def test_fadrm(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    phases = "--input-size-lis 24 32 --optimization-budgets 2 2 --alpha 0.5 --teacher-model-list ResNet18 ShuffleNetV2"
    assert recover_FADRM.main(general(small, *phases.split())) == 0
    lines = capsys.readouterr().out
    for line in (
        "Downsampled the data",
        "---Now input size is 24",
        "I changed",
        "Residual added",
        "---Now input size is 32",
    ):
        assert line in lines
    assert re.search(rf"^Model: ResNet18, CE loss: {NUMBER}, BN loss: {NUMBER}$", lines, re.MULTILINE)
    found = images_in(small / "syn")
    assert sorted(found) == [f"e/new{k:03d}/class{k:03d}_id000.png" for k in range(3)]
    assert all(data.startswith(b"\x89PNG") for data in found.values())


def test_missing_patch_of_an_id(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = small / "patches/medium/00002/class00002_id00001.jpg"
    path.unlink()
    setting = "--model-setting 0 --selected-size 1 --voter-type equal --iteration 1 --ipc-end 2"
    assert recover_CVDD.main(general(small, *setting.split())) == 2
    assert f"{path} is missing: class 2, id 1" in capsys.readouterr().err


def test_noise_of_both_scripts(small: Path, laid: Laid) -> None:
    """Without patches: CV-DD's, and FADRM+FD2's whose later phases mix other noise in."""
    setting = "--model-setting 0 --selected-size 1 --voter-type equal --iteration 1 --initialisation-method Guassian"
    assert recover_CVDD.main(general(small, *setting.split())) == 0
    assert len(images_in(small / "syn")) == 3
    folder = laid.folder / "noise"
    case = lay_out("fadrm", folder)
    arguments = arguments_of(case, drop=("draws", "SC"), initialisation_method="Guassian", ipc_end="1")
    at = arguments.index("--optimization_budgets")
    arguments[at + 1 : at + 5] = ["1", "1", "1", "1"]
    assert recover_FD2_FADRM.main(arguments) == 0
    assert len(images_in(case.images)) == 4
