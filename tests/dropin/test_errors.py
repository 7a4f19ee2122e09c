"""What a recover stand-in refuses, in one line that names it, before any image is made."""

from __future__ import annotations

import importlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from dropin_tools import Laid, lay_out

from fd2fast.dropin.pool import Member, check_names, load_pooled
from fd2fast.errors import UserError


@pytest.fixture
def laid(tmp_path: Path) -> Laid:
    return lay_out("sre2l", tmp_path)


def refused(laid: Laid, capsys: pytest.CaptureFixture[str], arguments: list[str] | None = None) -> str:
    """The line on standard error of a run that must fail."""
    module = importlib.import_module(f"fd2fast.dropin.{laid.script}")
    assert module.main(laid.arguments if arguments is None else arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert not [path for path in laid.folder.glob("syn/**/*") if path.is_file()]
    return lines[0]


def changed(arguments: list[str], **values: str) -> list[str]:
    """The arguments with other values of some flags, which have one each."""
    found = list(arguments)
    for name, value in values.items():
        found[found.index(f"--{name}") + 1] = value
    return found


def without(arguments: list[str], name: str) -> list[str]:
    at = arguments.index(f"--{name}")
    return arguments[:at] + arguments[at + 2 :]


def edited(laid: Laid, **values: Any) -> dict[str, Any]:
    """Change entries of the teacher's file."""
    path = laid.folder / "pool" / laid.case["teachers"][0]["file"]
    content = torch.load(path, weights_only=True)
    content |= values
    torch.save(content, path)
    return content


def test_missing_patch(laid: Laid, capsys: pytest.CaptureFixture[str]) -> None:
    path = laid.folder / "patches/2/00002/class00002_id00001.jpg"
    path.unlink()
    assert str(path) in refused(laid, capsys)


def test_class_without_patches(laid: Laid, capsys: pytest.CaptureFixture[str]) -> None:
    folder = laid.folder / "patches/2/00003"
    for path in folder.iterdir():
        path.unlink()
    assert str(folder) in refused(laid, capsys, without(laid.arguments, "draws"))


def test_patch_of_another_size(laid: Laid, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    path = laid.folder / "patches/2/00001/class00001_id00000.jpg"
    Image.new("RGB", (48, 40)).save(path)
    told = refused(laid, capsys)
    assert str(path) in told
    assert "[3, 40, 40]" in told
    assert "[3, 40, 48]" in told


def test_wrong_number_of_maps(laid: Laid, capsys: pytest.CaptureFixture[str]) -> None:
    pool = laid.folder / "pool"
    (pool / "ShuffleNetV2_M4_5e-1cal.pth").rename(pool / "ShuffleNetV2_M8_5e-1cal.pth")
    told = refused(laid, capsys, changed(laid.arguments, M="8"))
    assert "[4, 1024, 1, 1]" in told
    assert "[8, 1024, 1, 1]" in told


def test_missing_teacher(laid: Laid, capsys: pytest.CaptureFixture[str]) -> None:
    assert str(laid.folder / "pool/ShuffleNetV2_M8_5e-1cal.pth") in refused(
        laid, capsys, changed(laid.arguments, M="8")
    )


def test_teacher_of_another_class_count(laid: Laid, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads((laid.folder / "data.json").read_text())
    (laid.folder / "data.json").write_text(json.dumps(told | {"classes": 5}))
    line = refused(laid, capsys, without(laid.arguments, "draws"))
    assert "fc.weight is [4, 1024], wanted [5, 1024]" in line


def test_prototypes_of_another_shape(laid: Laid, capsys: pytest.CaptureFixture[str]) -> None:
    edited(laid, feature_center=torch.zeros(4, 7))
    told = refused(laid, capsys)
    assert "[4, 7]" in told
    assert "[4, 4096]" in told


def test_plain_weights_are_no_teacher(laid: Laid, capsys: pytest.CaptureFixture[str]) -> None:
    path = laid.folder / "pool" / laid.case["teachers"][0]["file"]
    torch.save({"conv1.0.weight": torch.zeros(1)}, path)
    told = refused(laid, capsys)
    assert str(path) in told
    assert "'ShuffleNetV2'" in told


class Hostile:
    """Leaves a mark when it is unpickled as an ordinary object."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("whole", [True, False])
def test_hostile_file(laid: Laid, capsys: pytest.CaptureFixture[str], whole: bool) -> None:
    mark = laid.folder / "executed"
    path = laid.folder / "pool" / laid.case["teachers"][0]["file"]
    if whole:
        path.write_bytes(pickle.dumps(Hostile(mark)))
    else:
        torch.save({"ShuffleNetV2": Hostile(mark), "cal": {}, "feature_center": torch.zeros(4, 4096)}, path)
    assert str(path) in refused(laid, capsys)
    assert not mark.exists()


def test_online_teachers_have_no_head(laid: Laid, capsys: pytest.CaptureFixture[str]) -> None:
    assert "CAL head" in refused(laid, capsys, changed(laid.arguments, pretrained_model_type="online"))


def test_online_teacher_without_a_network(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    from fd2fast.dropin import recover_CVDD

    def cut(*given: Any, **named: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models.ResNet18_Weights.get_state_dict", cut)
    arguments = (
        f"--dataset-name imagenet1k --exp-name e --pretrained-model-type online --syn-data-path {tmp_path} "
        "--model-setting 0 --selected-size 1 --voter-type equal --iteration 1 --ipc-end 1"
    )
    assert recover_CVDD.main(arguments.split()) == 2
    told = capsys.readouterr().err
    assert "ResNet18 cannot be fetched (no route to host)" in told
    assert "offline" in told


def test_ratios_with_one_file_name() -> None:
    with pytest.raises(UserError, match=r"0\.25 and 0\.2 of ResNet18 have one file name, ResNet18_M8_2e-1cal\.pth"):
        check_names([Member("ResNet18", 8, 0.25), Member("ResNet18", 8, 0.2)])
    check_names([Member("ResNet18", 8, 0.25), Member("ResNet18", 16, 0.2), Member("ResNet50", 8, 0.2)])


def test_a_ratio_that_its_file_does_not_tell(laid: Laid, capsys: pytest.CaptureFixture[str]) -> None:
    refused(laid, capsys, changed(laid.arguments, cal_ratio="0.52", patch_dir=str(laid.folder / "none")))
    importlib.import_module("fd2fast.dropin.recover_FD2").main(
        changed(laid.arguments, cal_ratio="0.52", patch_dir=str(laid.folder / "none"))
    )
    assert "ShuffleNetV2_M4_5e-1cal.pth is read for --cal_ratio 0.52" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"dataset_name": "CUB", "fd2fast_dataset": ""}, "cannot be read"),
        ({"selected_size": "2"}, "--selected_size must be 1 to 1"),
        ({"class_num": "0"}, "class block must be at least 1"),
        ({"ipc_end": "0"}, "image ids must be at least 1"),
        ({"iteration": "0"}, "1 or more iterations"),
        ({"patch_dir": "/nowhere"}, "/nowhere"),
    ],
)
def test_settings_out_of_range(
    laid: Laid, capsys: pytest.CaptureFixture[str], values: dict[str, str], told: str
) -> None:
    assert told in refused(laid, capsys, changed(laid.arguments, **values))


def test_unknown_data_set(laid: Laid, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = without(changed(laid.arguments, dataset_name="CUB_imsize225"), "fd2fast_dataset")
    assert "CUB_imsize224" in refused(laid, capsys, arguments)


def test_similarity_needs_stored_images(laid: Laid, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [one for one in laid.arguments if one != "--store_best_images"]
    assert "--store_best_images" in refused(laid, capsys, arguments)


def test_prior_without_accuracies(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from fd2fast.dropin import recover_FD2

    arguments = (
        f"--dataset_name A_imsize224 --exp_name e --pretrained_model_type offline --syn_data_path {tmp_path} "
        f"--model_pool_dir {tmp_path} --model_choice ResNet18 ResNet50 --M 8 8 --cal_ratio .5 .3"
    )
    assert recover_FD2.main(arguments.split()) == 2
    assert "ResNet18, ResNet50 on A_imsize224" in capsys.readouterr().err


def test_strange_tensors_are_refused(tmp_path: Path) -> None:
    """As the published loader does where it does not skip: a plain file with one tensor too many."""
    from fd2fast.dropin.networks import small_backbone

    state = small_backbone("ShuffleNetV2", 3).net.state_dict()
    torch.save(state | {"extra": torch.zeros(1)}, tmp_path / "ShuffleNetV2.pth")
    with pytest.raises(UserError, match="extra is strange to it"):
        load_pooled(Member("ShuffleNetV2"), tmp_path, classes=3, size=32)
