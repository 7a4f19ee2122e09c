"""Bytes that an iteration keeps for its backward pass, of each image: the whole step with all losses, at the paper's size."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from bench import cases, ways
from fd2fast.models.fused import fuse

CPU, ROWS = torch.device("cpu"), 2


def saved_bytes(run: Callable[[], object], known: Iterable[Tensor]) -> int:
    """Of the distinct storages that are saved, without those that are there anyway."""
    there = {t.untyped_storage().data_ptr() for t in known}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in there:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor keeps the address from being used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize(
    ("name", "megabytes"), [("ResNet18", 5.5), ("ResNet50", 24.0), ("MobileNetV2", 15.0), ("DenseNet121", 18.0)]
)
def test_a_step_keeps_little_of_each_image(name: str, megabytes: float) -> None:
    """224 x 224, bf16, SRe2L++ + FD2 with three earlier images; the plain loop in fp32 keeps six times as much (ResNet-18)."""
    teacher = cases.make_teacher(name, classes=20, size=224, device=CPU)
    case = cases.make_case("sre2l++_fd2", [teacher], rows=ROWS, priors=3, precision="bf16", device=CPU)
    fused = fuse(teacher, torch.bfloat16)
    run = ways.FusedStep(case, [fused], precision="bf16")
    step = run.step
    known = [*fused.buffers(), *step.tensors().values(), step.initial, case.labels, *case.priors]
    found = saved_bytes(lambda: run(0), known) / ROWS
    assert 0.5 * megabytes * 1e6 < found <= megabytes * 1e6
    if name == "ResNet18":
        plain = ways.Plain(case)
        known = [*teacher.parameters(), *teacher.buffers(), plain.images, *case.priors]
        assert saved_bytes(lambda: plain(0), known) / ROWS > 6 * found
