"""Settings by themselves: every wrong type, choice, number and range is named, all at once."""

import dataclasses
import math
import typing

import numpy as np
import pytest

from fd2fast.config import DataConfig, DistillConfig, EvaluateConfig, PatchesConfig, PretrainConfig, RelabelConfig
from fd2fast.data import prepare
from fd2fast.methods import faults as distill_faults
from fd2fast.ranges import either, out_of_range, repeated
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


@pytest.mark.parametrize(
    ("stage", "changes", "told"),
    [
        ("evaluate", {"eval_every": -1}, "evaluate.eval_every must be 1 or more, got -1"),
        ("evaluate", {"accumulation": 0}, "evaluate.accumulation must be 1 or more, got 0"),
        ("evaluate", {"seeds": (3, 4, 3)}, "evaluate.seeds must be all different, got (3, 4, 3)"),
        ("evaluate", {"seeds": ("a",)}, "evaluate.seeds must be a list, each a whole number, got ('a',)"),
        ("evaluate", {"test_batch": 0}, "evaluate.test_batch must be 1 or more, got 0"),
        ("evaluate", {"flip": -0.5}, "evaluate.flip must be in [0, 1], got -0.5"),
        ("relabel", {"mix_alpha": -1.0}, "relabel.mix_alpha must be above 0, got -1.0"),
        ("relabel", {"batch_size": 1}, "relabel.batch_size must be at least 2, got 1"),
        ("relabel", {"epochs": 0}, "relabel.epochs must be at least 1, got 0"),
        ("relabel", {"ipc": 0}, "relabel.ipc must be at least 1, got 0"),
        ("patches", {"factor": 3}, "patches.factor must be 1 or 2, got 3"),
        ("patches", {"pool": 3}, "patches.pool must be at least factor^2 = 4, got 3"),
        ("distill", {"beta": 1.5}, "distill.beta must be within [0, 1], got 1.5"),
        ("distill", {"betas": (0.9,)}, "distill.betas must be 2 values, got (0.9,)"),
        (
            "distill",
            {"iterations": (10, -1)},
            "distill.iterations must be at least one phase, each of 1 or more, got (10, -1)",
        ),
        ("distill", {"group_size": 0}, "distill.group_size must be at least 1 image (N_S), got 0"),
        ("data", {"size": 100_000}, "data.size must be at most 32767 pixels, got 100000"),
        ("data", {"dataset": "folder", "std": (0.1, 0.2, 2.0)}, "data.std must be three numbers in"),
        ("pretrain", {"color_jitter": (0.2, 0.2, 0.2)}, "pretrain.color_jitter must be 4 values"),
        ("pretrain", {"backbone_epochs": 51}, "pretrain.backbone_epochs must be at least 0 and below epochs, got 51"),
        ("pretrain", {"model": " "}, "pretrain.model must be a name, got ' '"),
    ],
)
def test_what_is_out_of_range_is_named(stage, changes, told):
    found = wrong(stage, **changes)
    assert any(fault.startswith(told) for fault in found), found


def test_numbers_of_numpy_and_lists_are_numbers():
    config = dataclasses.replace(DistillConfig(), ipc=np.int64(3), lr=np.float32(0.1), iterations=[5, 6])
    assert distill_faults(config) == []


def test_helpers():
    assert repeated(["a", "b", "a", "c", "b", "a"]) == ["a", "b"]
    assert [either([1]), either([1, 2]), either("abc")] == ["1", "1 or 2", "a, b or c"]
    assert out_of_range(DataConfig(), "data", [("size", lambda v: v > 64, "above 64")]) == [
        "data.size must be above 64, got 64"
    ]
