"""Devices and precisions by name."""

import pytest
import torch

from fd2fast.errors import UserError
from fd2fast.system import device
from fd2fast.system.device import autocast, pick_device


def test_auto_takes_a_gpu_when_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == torch.device("cpu")
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="'cuda' was asked for, but torch .* finds no GPU"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert pick_device("auto") == torch.device("cuda", 0)
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("auto") == torch.device("cuda", 1)
    assert current == [0, 1, 1]  # Triton launches on the current one
    with pytest.raises(UserError, match="'cuda:2' was asked for, but this machine has 2 GPU"):
        pick_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", ""])
def test_unknown_devices_are_refused(name):
    with pytest.raises(UserError, match="wanted auto, cpu, cuda or cuda:N"):
        pick_device(name)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp64", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_autocast_sets_the_type_of_a_product(precision, dtype):
    with autocast(torch.device("cpu"), precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_an_unknown_precision_is_refused():
    with pytest.raises(UserError, match="'fp8' is unknown"):
        autocast(torch.device("cpu"), "fp8")


def test_auto_precision_is_settled_before_the_manifest_is_written(monkeypatch):
    from fd2fast.settings.config import EvaluateConfig
    from fd2fast.system import device

    config = EvaluateConfig(device="cpu")
    for fast, expected in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(device, "fast_bf16", lambda _, fast=fast: fast)
        assert device.settle_precision(config).precision == expected
    kept = EvaluateConfig(precision="fp16")
    assert device.settle_precision(kept) is kept


def test_too_little_address_space_for_any_work_is_said_ahead(monkeypatch):
    monkeypatch.setattr(device.limits, "spare", lambda: 20_000_000)
    assert device.device_faults("distill", "cpu") == [
        "distill: out of memory: the limit on address space leaves 20.0 MB, wanted at least 134 MB; raise it (ulimit -v)"
    ]
    monkeypatch.setattr(device.limits, "spare", lambda: device.limits.LEAST)
    assert device.device_faults("distill", "cpu") == []
