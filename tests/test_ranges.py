"""Settings by themselves: every wrong type, choice, number and range is named, all at once, with what was wanted and came."""

import dataclasses
import math
import typing

import numpy as np
import pytest
from annotated_types import Ge, Gt, Interval, Le, Lt

from fd2fast.data import prepare
from fd2fast.methods import faults as distill_faults
from fd2fast.settings.config import (
    DataConfig,
    DistillConfig,
    EvaluateConfig,
    PatchesConfig,
    PretrainConfig,
    RelabelConfig,
    RunConfig,
    wrong_settings,
)
from fd2fast.settings.ranges import either, repeated
from fd2fast.stages import evaluate, patches, pretrain, relabel

STAGES = {
    "data": (DataConfig(), prepare.faults),
    "pretrain": (PretrainConfig(), pretrain.faults),
    "patches": (PatchesConfig(), patches.faults),
    "distill": (DistillConfig(), distill_faults),
    "relabel": (RelabelConfig(), relabel.faults),
    "evaluate": (EvaluateConfig(), evaluate.faults),
}


@pytest.mark.parametrize("stage", STAGES)
def test_the_defaults_are_right(stage):
    config, faults = STAGES[stage]
    assert faults(config) == []


@pytest.mark.parametrize("stage", STAGES)
def test_no_number_may_be_infinite_or_no_number_or_a_text(stage):
    """Every number of every stage; a whole one neither a fraction nor beyond all counting."""
    config, faults = STAGES[stage]
    hints = typing.get_type_hints(type(config))
    tried = 0
    for field in dataclasses.fields(config):
        kinds = {hints[field.name], *typing.get_args(hints[field.name])}
        wrong: list[object] = []
        if kinds & {int, float} and tuple not in {typing.get_origin(kind) for kind in kinds}:
            wrong = [math.nan, math.inf, "7", True]
        if int in kinds and wrong:
            wrong += [1.5, 10**40]
        for value in wrong:
            (fault,) = faults(dataclasses.replace(config, **{field.name: value}))
            assert fault.startswith(f"{stage}.{field.name} must be ")
            assert fault.endswith(f"got {value!r}")
            tried += 1
    assert tried >= 12


@pytest.mark.parametrize("stage", STAGES)
def test_no_choice_may_be_another_word(stage):
    config, faults = STAGES[stage]
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        options = [hints[field.name], *typing.get_args(hints[field.name])]
        if any(typing.get_origin(option) is typing.Literal for option in options):
            (fault,) = faults(dataclasses.replace(config, **{field.name: "nonsense"}))
            assert fault.startswith(f"{stage}.{field.name} must be ")


def wrong(stage, **changes):
    config, faults = STAGES[stage]
    return faults(dataclasses.replace(config, **changes))


def test_all_faults_of_a_stage_come_at_once():
    found = wrong("pretrain", epochs=-3, lr=0.0, momentum=1.0, optimizer="adamm", device="gpu7", warmup=-1.0)
    names = [fault.split()[0].rstrip(":") for fault in found]
    assert names == [f"pretrain.{name}" for name in ("epochs", "optimizer", "lr", "momentum", "warmup", "device")]
    assert "did you mean 'adamw'" in found[1] or "did you mean 'adam'" in found[1]


COUNT = "a whole number of at least 1"
POSITIVE = "a finite number above 0"
SHARE = "a number within [0, 1]"
COUNTS = f"a list of at least one, each {COUNT}"
PER_CLASS = "a whole number of images per class, at least 1"
SIDE = "a whole number of pixels within [8, 32767]"
SEEDS = "a list of at least one seed, all different"
JITTER = "4 finite numbers of at least 0, the last (hue) at most 0.5"


@pytest.mark.parametrize(
    ("stage", "changes", "told"),
    [
        ("evaluate", {"eval_every": -1}, f"eval_every must be {COUNT}, got -1"),
        ("evaluate", {"accumulation": 0}, f"accumulation must be {COUNT}, got 0"),
        ("evaluate", {"seeds": (3, 4, 3)}, f"seeds must be {SEEDS}, got (3, 4, 3)"),
        ("evaluate", {"seeds": ("a",)}, f"seeds must be {SEEDS}, got ('a',)"),
        ("evaluate", {"seeds": ()}, f"seeds must be {SEEDS}, got ()"),
        ("evaluate", {"test_batch": 0}, f"test_batch must be {COUNT}, got 0"),
        ("evaluate", {"flip": -0.5}, f"flip must be {SHARE}, got -0.5"),
        ("evaluate", {"temperature": math.nan}, f"temperature must be {POSITIVE}, got nan"),
        ("relabel", {"mix_alpha": -1.0}, f"mix_alpha must be {POSITIVE}, got -1.0"),
        ("relabel", {"batch_size": 1}, "batch_size must be a whole number of at least 2, got 1"),
        ("relabel", {"epochs": 0}, f"epochs must be {COUNT}, got 0"),
        ("relabel", {"ipc": 0}, f"ipc must be {PER_CLASS}, got 0"),
        ("relabel", {"teacher_mode": "train"}, "teacher_mode must be batch or eval, got 'train'"),
        ("relabel", {"mix": None}, "mix must be cutmix or none, got None"),
        ("patches", {"factor": 3}, "factor must be 1 or 2, got 3"),
        ("patches", {"pool": 3}, "pool must be at least factor^2 = 4, got 3"),
        ("patches", {"min_crop": 0.0}, "min_crop must be a number within (0, 1], got 0.0"),
        ("patches", {"per_class": "5"}, f"per_class must be {PER_CLASS}, got '5'"),
        ("distill", {"beta": 1.5}, f"beta must be {SHARE}, got 1.5"),
        ("distill", {"betas": (0.9,)}, "betas must be 2 values, each a number within [0, 1), got (0.9,)"),
        ("distill", {"betas": (0.5, 1.0)}, "betas must be 2 values, each a number within [0, 1), got (0.5, 1.0)"),
        ("distill", {"iterations": (10, -1)}, f"iterations must be {COUNTS}, got (10, -1)"),
        ("distill", {"iterations": ()}, f"iterations must be {COUNTS}, got ()"),
        ("distill", {"iterations": 300}, f"iterations must be {COUNTS}, got 300"),
        ("distill", {"group_size": 0}, "group_size must be a whole number of images (N_S), at least 1, got 0"),
        ("distill", {"lr": "0.1"}, f"lr must be {POSITIVE}, got '0.1'"),
        ("distill", {"lr": math.inf}, f"lr must be {POSITIVE}, got inf"),
        ("distill", {"ipc": None}, f"ipc must be {PER_CLASS}, got None"),
        ("distill", {"ipc": 1.5}, f"ipc must be {PER_CLASS}, got 1.5"),
        ("distill", {"ipc": 10**20}, f"ipc must be a whole number up to 2147483647, got {10**20}"),
        ("distill", {"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ("distill", {"seed": 2**63}, f"seed must be a whole number up to {2**63 - 1}, got {2**63}"),
        ("distill", {"fd2": 1}, "fd2 must be true or false, got 1"),
        ("distill", {"fd2": "yes"}, "fd2 must be true or false, got 'yes'"),
        ("distill", {"method": 3}, "method must be a name, got 3"),
        ("distill", {"r_bn": -1.0}, "r_bn must be a finite number of at least 0, got -1.0"),
        ("distill", {"jitter": -1}, "jitter must be a whole number of pixels, at least 0, got -1"),
        ("distill", {"memory_limit": 0.0}, "memory_limit must be a finite number of GB above 0, got 0.0"),
        ("distill", {"ls_threshold": "x"}, "ls_threshold must be a finite number, got 'x'"),
        ("distill", {"init": "patchs"}, "init must be patches, real or noise, got 'patchs': did you mean 'patches'?"),
        (
            "distill",
            {"sizes": (4,)},
            "sizes must be a list of at least one side, each 8 to 32767 pixels, got (4,)",
        ),
        ("data", {"size": 100_000}, f"size must be {SIDE}, got 100000"),
        ("data", {"size": [64]}, f"size must be {SIDE}, got [64]"),
        ("data", {"classes": 1}, "classes must be a whole number of at least 2, got 1"),
        (
            "data",
            {"std": (0.1, 0.2, 2.0)},
            "std must be 3 values, each a number within [1e-06, 1], got (0.1, 0.2, 2.0)",
        ),
        ("data", {"mean": (0.1, "x", 1.0)}, f"mean must be 3 values, each {SHARE}, got (0.1, 'x', 1.0)"),
        ("data", {"fonts": 3}, "fonts must be a path, got 3"),
        ("data", {"exif": "aply"}, "exif must be ignore or apply, got 'aply': did you mean 'apply'?"),
        ("pretrain", {"color_jitter": (0.2, 0.2, 0.2)}, f"color_jitter must be {JITTER}, got (0.2, 0.2, 0.2)"),
        (
            "pretrain",
            {"color_jitter": (0.2, 0.2, 0.2, 0.6)},
            f"color_jitter must be {JITTER}, got (0.2, 0.2, 0.2, 0.6)",
        ),
        ("pretrain", {"backbone_epochs": 51}, "backbone_epochs must be below epochs = 51, got 51"),
        ("pretrain", {"warmup": 52.0}, "warmup must be at most epochs = 51, got 52.0"),
        ("pretrain", {"model": " "}, "model must be a name, got ' '"),
        ("pretrain", {"weights": 3}, "weights must be a file or hub, got 3"),
        ("pretrain", {"epochs": "x", "warmup": 99.0}, f"epochs must be {COUNT}, got 'x'"),
        ("pretrain", {"rotation": 999.0}, "rotation must be a number of degrees within [0, 180], got 999.0"),
    ],
)
def test_what_is_out_of_range_is_named(stage, changes, told):
    assert wrong(stage, **changes) == [f"{stage}.{told}"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"methods": "sre2l++"}, "run.methods must be a list of at least one name, got 'sre2l++'"),
        ({"methods": ()}, "run.methods must be a list of at least one name, got ()"),
        ({"ipc": 3}, "run.ipc must be a list of at least one number of images per class, each at least 1, got 3"),
        (
            {"ipc": (1, 0)},
            "run.ipc must be a list of at least one number of images per class, each at least 1, got (1, 0)",
        ),
        ({"students": ("",)}, "run.students must be a list of at least one name, got ('',)"),
        ({"data": 3}, "run.data must be of the type DataConfig, got 3"),
        ({"distill": {"lam": 7}}, "run.distill must be of the type DistillConfig, got {'lam': 7}"),
        ({"out": 3}, "run.out must be a path, got 3"),
    ],
)
def test_what_is_wrong_with_a_run_by_itself_is_named(changes, told):
    assert wrong_settings(dataclasses.replace(RunConfig(), **changes), "run") == [told]


def test_numbers_of_numpy_and_lists_are_numbers():
    config = dataclasses.replace(DistillConfig(), ipc=np.int64(3), lr=np.float32(0.1), iterations=[5, 6])
    assert distill_faults(config) == []


def test_helpers():
    assert repeated(["a", "b", "a", "c", "b", "a"]) == ["a", "b"]
    assert [either([1]), either([1, 2]), either("abc")] == ["1", "1 or 2", "a, b or c"]


@pytest.mark.parametrize("kind", [type(config) for config, _ in STAGES.values()])
def test_what_is_said_of_a_type_is_what_is_checked(kind):
    """The limits of every field, but those of counters, stand in its words."""
    said = 0
    for hint in typing.get_type_hints(kind, include_extras=True).values():
        for part in (hint, *typing.get_args(hint)):
            beside = getattr(part, "__metadata__", ())
            bounds = [one for each in beside for one in (each if isinstance(each, Interval) else [each])]
            for lower in (True, False):
                limits = [one for one in bounds if isinstance(one, (Ge, Gt) if lower else (Le, Lt))]
                values = [getattr(one, type(one).__name__.lower()) for one in limits]
                if values and abs(values[-1]) < 2**31 - 1:
                    assert f"{values[-1]:g}" in [one for one in beside if isinstance(one, str)][-1]
                    said += 1
    assert said >= 4
