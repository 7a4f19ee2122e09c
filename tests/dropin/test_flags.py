"""The stand-ins' flags are the published scripts' own: every recover command of the released repositories is read as written."""

from __future__ import annotations

import argparse
import importlib

import pytest

from fd2fast.dropin.flags import parse

DATASETS = {"CUB": (8, 16, 8, 16), "A": (32, 16, 32, 16), "SC": (8, 16, 32, 32)}
RATIOS = {"CUB": (0.5, 0.5, 0.3, 0.4), "A": (0.3, 0.2, 0.4, 0.4), "SC": (0.3, 0.4, 0.4, 0.4)}
FINE = ("ResNet18", "MobileNetV2", "ResNet50", "Densenet121")
FIVE = ("cifar10", "cifar100", "tiny_imagenet", "imagenet-nette", "imagenet1k")


def script(name: str) -> object:
    return importlib.import_module(f"fd2fast.dropin.{name}").SCRIPT


def fine_grained() -> list[tuple[str, str]]:
    """The two sets of scripts of the FD2 code: three data sets, image ids 0 to 3 and then 4."""
    found = []
    for short, maps in DATASETS.items():
        for first, end in ((0, 4), (4, 5)):
            both = (
                f"--matplotlib --apply_data_augmentation --dataset_name {short}_imsize224 --class_num 100 --subprocess_num 1 "
                "--syn_data_path S --patch_dir P --model_pool_dir W --pretrained_model_type offline --r_bn 1e-3 --FC "
                "--FC_ratio 0.9 --IntraFC_ratio 0.5 --SC --SC_ratio 0.1 --SC_loss_threshold 0.0 --store_best_images "
                f"--ipc_start {first} --ipc_end {end} --initialisation_method Patches"
            )
            iterations = 10000 if short == "CUB" else 4000
            found.append(
                (
                    "recover_FD2",
                    f"--exp_name rec_res18_ipc5 {both} --model_choice ResNet18 --M {maps[0]} --cal_ratio {RATIOS[short][0]} "
                    f"--voter_type equal --selected_size 1 --lr 1e-3 --iteration {iterations} --patch_diff 2",
                )
            )
            found.append(
                (
                    "recover_FD2_FADRM",
                    f"--exp_name rec_res18_MNV2_res50_DN121_ipc5 {both} --optimization_budgets 1500 1500 1500 2000 "
                    "--input_size_lis 200 224 200 224 --alpha 0.5 --lr 0.1 "
                    f"--model_choice {' '.join(FINE)} --M {' '.join(map(str, maps))} "
                    f"--cal_ratio {' '.join(map(str, RATIOS[short]))} --patch_diff 1",
                )
            )
    return found


def cvdd() -> list[tuple[str, str]]:
    """CV-DD: SRe2L++ and the voters' scripts for IPC 1, 10 and 50 on each of its five sets."""
    found = []
    for name in FIVE:
        size = 10 if name in ("cifar10", "imagenet-nette") else 100
        place = "--patch-dir P" if name == "imagenet1k" else "--patch-dir P --model-pool-dir W"
        kind = "online" if name == "imagenet1k" else "offline"
        for voters, end in (
            ("--model-setting 0 --sre2l-model ResNet18 --voter-type equal --selected-size 1", 50),
            ("--model-setting 4 --voter-type prior --selected-size 2", 1),
            ("--model-setting 5 --voter-type prior --selected-size 2", 10),
            ("--model-setting 3 --voter-type prior --selected-size 2", 50),
        ):
            found.append(
                (
                    "recover_CVDD",
                    f"--exp-name e --apply-data-augmentation --dataset-name {name} --batch-size {size} --syn-data-path S "
                    f"{place} --pretrained-model-type {kind} {voters} --lr 0.25 --iteration 4000 --r-bn 0.01 "
                    f"--store-best-images --ipc-start 0 --ipc-end {end} --initialisation-method Patches --patch-diff medium",
                )
            )
    return found


def fadrm() -> list[tuple[str, str]]:
    """FADRM: single teacher at IPC 50, committees at IPC 1, 10 and 50, on five sets."""
    four = "ResNet18 Densenet121 ShuffleNetV2 MobileNetV2"
    found = []
    for name in ("cifar100", "tiny_imagenet", "imagenet-nette", "imagewoof", "imagenet1k"):
        sizes = {"cifar100": "32 32 32 32", "tiny_imagenet": "64 64 64 64"}.get(name, "200 224 200 224")
        for teachers, end in (("ResNet18", 50), (four, 1), (four, 10), (four, 50)):
            pool = "online" if name == "imagenet1k" else "offline --model-pool-dir W"
            found.append(
                (
                    "recover_FADRM",
                    f"--exp-name fadrm --apply-data-augmentation --dataset-name {name} --batch-size 100 --syn-data-path S "
                    f"--patch-dir P --teacher-model-list {teachers} --pretrained-model-type {pool} --lr 0.25 --r-bn 0.01 "
                    f"--input-size-lis {sizes} --optimization-budgets 500 500 500 500 --alpha 0.5 --store-best-images "
                    f"--ipc-start 0 --ipc-end {end} --initialisation-method Patches --patch-diff medium",
                )
            )
    return found


COMMANDS = [*fine_grained(), *cvdd(), *fadrm()]


def read(name: str, line: str) -> argparse.Namespace:
    return parse(script(name), line.split())  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "line"), COMMANDS)
def test_published_commands_are_read(name: str, line: str) -> None:
    options = read(name, line)
    given = [word.split("=")[0][2:].replace("-", "_") for word in line.split() if word.startswith("--")]
    assert set(given) <= vars(options).keys()
    assert all(getattr(options, flag) is not None for flag in given)


# Name, kind, default of every flag of a script; None for no default, "f" for a flag without a value.
TABLES = {
    "recover_FD2": "selected_size=2 voter_type=prior iteration=1000 weight_temperature=5",
    "recover_FD2_FADRM": "optimization_budgets=None alpha=0.5 weight_temperature=5",
    "recover_CVDD": "sre2l_model=ResNet18 model_setting=0 selected_size=2 voter_type=prior iteration=1000 "
    "weight_temperature=5 patch_diff=medium",
    "recover_FADRM": "alpha=None iteration=1000 weight_temperature=5 patch_diff=medium input_size_lis=None "
    "optimization_budgets=None",
}
BOTH = (
    "start_index=0 lr=0.1 jitter=4 r_bn=0.05 first_bn_multiplier=10.0 initialisation_method=Guassian ipc_start=0 ipc_end=50 "
    "store_best_images=False store_initialised_images=False apply_data_augmentation=False initialisation_dir=None "
    "model_pool_dir=None patch_dir=None patch_diff=medium"
)
ONLY_FINE = (
    "class_num=1 subprocess_num=10 FC=False FC_ratio=0.8 IntraFC_ratio=0.5 SC=False SC_ratio=0.2 SC_loss_threshold=0.6 "
    "matplotlib=False model_choice=None M=None cal_ratio=None"
)
ONLY_GENERAL = "batch_size=100 verifier=False verifier_arch=MobileNetV2 verifier_weight_path=None"
REQUIRED = ("dataset_name", "exp_name", "pretrained_model_type", "syn_data_path")


@pytest.mark.parametrize("name", TABLES)
def test_defaults_are_the_published(name: str) -> None:
    fine = name.startswith("recover_FD2")
    mark = "_" if fine else "-"
    line = " ".join(f"--{flag.replace('_', mark)} {'offline' if 'type' in flag else 'x'}" for flag in REQUIRED)
    options = vars(read(name, line))
    table = f"{TABLES[name]} {BOTH} {ONLY_FINE if fine else ONLY_GENERAL}"
    wanted = dict(entry.split("=") for entry in table.split())
    if name == "recover_FADRM":
        assert options["teacher_model_list"] == ["ResNet18"]
        wanted["teacher_model_list"] = "['ResNet18']"
    if name == "recover_FD2_FADRM":
        assert options["input_size_lis"] == [200, 224, 200, 224]
        wanted["input_size_lis"] = "[200, 224, 200, 224]"
    own = {flag.key for flag in script(name).own}  # type: ignore[attr-defined]
    assert {key: str(value) for key, value in options.items() if key not in {*own, *REQUIRED}} == wanted


@pytest.mark.parametrize("flag", REQUIRED)
def test_required_flags(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    rest = " ".join(f"--{one} offline" for one in REQUIRED if one != flag)
    with pytest.raises(SystemExit):
        read("recover_FD2", rest)
    assert f"--{flag}" in capsys.readouterr().err


def test_flags_without_effect_are_named_once(capsys: pytest.CaptureFixture[str]) -> None:
    line = " ".join(f"--{one} offline" for one in REQUIRED)
    read("recover_FD2", f"{line} --jitter 8 --subprocess_num 1")
    told = capsys.readouterr().err
    assert told.count("--jitter") == told.count("--subprocess_num") == 1
    read("recover_FD2", line)
    assert not capsys.readouterr().err


def test_both_spellings_of_own_flags() -> None:
    line = " ".join(f"--{one.replace('_', '-')} offline" for one in REQUIRED)
    options = read("recover_CVDD", f"{line} --reference-rng 3 --dump_draws D --fd2fast-precision fp64")
    assert (options.reference_rng, options.dump_draws, options.fd2fast_precision) == (3, "D", "fp64")
