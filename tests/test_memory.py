"""The memory model: counts what is alive, predicts larger steps, grows with what should cost more, errors that say how much."""

import pytest
import torch
from distill_tools import OTHER, tiny_config, tiny_teacher

from fd2fast.distillation import memory
from fd2fast.distillation.memory import StepMemory, free_bytes, measure, too_small
from fd2fast.errors import UserError
from fd2fast.models.fused import FusedTeacher, fuse
from fd2fast.settings.config import DistillConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teachers() -> list[FusedTeacher]:
    """Two, of different size, in fp32."""
    return [
        fuse(tiny_teacher(dtype=torch.float32)),
        fuse(tiny_teacher(f"{OTHER},output_stride=8", seed=1, dtype=torch.float32)),
    ]


def config_of(method: str, **changes: object) -> DistillConfig:
    return tiny_config(method, **{"precision": "fp32", "iterations": (4,), **changes})


def peak_of(config: DistillConfig, teachers: list[FusedTeacher], rows: int, device: torch.device = CPU) -> int:
    """What one iteration of every turn holds at most, measured at this size itself."""
    shapes = [memory._map_shape(teacher, max(config.sizes), device) for teacher in teachers]
    turns = len(teachers) if config.teacher_schedule == "round_robin" else 1
    single = memory.replace(config, iterations=(turns,), sizes=(max(config.sizes),))
    return memory.peak_bytes(device, lambda: memory._iterate(single, teachers, shapes, rows, device))


def test_alive_bytes_are_counted() -> None:
    kept: list[torch.Tensor] = []

    def work() -> None:
        a = torch.zeros(1000)  # 4,000 bytes
        b = a.double()  # 8,000
        view = b.view(10, 100)  # nothing
        del a
        kept.append(view + 1)  # 8,000 while b lives
        del b, view
        torch.zeros(500)  # 2,000, in the place of others

    assert memory.peak_bytes(CPU, work) == 16_000
    assert memory.peak_bytes(CPU, lambda: None) == 0


@pytest.mark.parametrize(
    ("method", "changes"),
    [("sre2l++", {}), ("sre2l++_fd2", {}), ("fadrm+_fd2", {"sizes": (24, 32), "iterations": (2, 2)}), ("cvdd_fd2", {})],
)
def test_larger_steps_are_predicted(method: str, changes: dict, teachers: list[FusedTeacher]) -> None:
    used = teachers if method.startswith(("fadrm+", "cvdd")) else teachers[:1]
    config = config_of(method, **changes)
    found = measure(config, used, CPU)
    for rows in (1, 9, 16):
        peak = peak_of(config, used, rows)
        assert peak <= found.of(rows) <= 1.15 * peak


def test_what_costs_more_is_seen(teachers: list[FusedTeacher]) -> None:
    base = measure(config_of("sre2l++"), teachers[:1], CPU)
    fd2 = measure(config_of("sre2l++_fd2"), teachers[:1], CPU)
    alone = measure(config_of("sre2l++_fd2", group_size=1), teachers[:1], CPU)
    assert base.of(100) < alone.of(100) < fd2.of(100)  # the head and its losses, then the priors
    half = [fuse(tiny_teacher(dtype=torch.float32), torch.bfloat16)]
    assert measure(config_of("sre2l++", precision="bf16"), half, CPU).row < base.row
    committee = measure(config_of("fadrm+", sizes=(32,)), teachers, CPU)
    each = [measure(config_of("sre2l++"), [t], CPU) for t in teachers]
    assert committee.row == pytest.approx(max(m.row for m in each), rel=0.1)


def test_what_is_free(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """The system's own count, or a container's limit below it."""
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    system = free_bytes(CPU)
    assert 10**8 < system < 10**13
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 600000\ninactive_file 50000\n")
    assert free_bytes(CPU) > 10**8
    (tmp_path / "memory.max").write_text("1000000\n")
    assert free_bytes(CPU) == 350_000


def test_a_limit_on_the_address_space_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.limits, "spare", lambda: 40 << 20)
    monkeypatch.setattr(memory.limits, "address_space", lambda: 67_890)
    assert free_bytes(CPU) == 8 << 20
    assert memory.total_bytes(CPU) == 67_890


def test_nothing_is_measured_where_libraries_would_find_no_memory(
    teachers: list[FusedTeacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = iter((100 << 20, 30 << 20))
    monkeypatch.setattr(memory.limits, "spare", lambda *, least=False: next(left, 20 << 20))
    monkeypatch.setattr(memory, "_iterate", lambda *_: None)
    with pytest.raises(UserError, match="4 images at once do not fit the memory; 0.0 MB are free"):
        measure(config_of("sre2l++"), teachers[:1], CPU)


def test_the_error_says_how_much() -> None:
    text = str(too_small(StepMemory(2_000_000, 9_000_000), 100, 500_000_000, "fp32"))
    assert "they need about 902.0 MB" in text
    assert "Use precision bf16" in text
    assert "bf16" not in str(too_small(StepMemory(2_000_000, 9_000_000), 100, 500_000_000, "bf16"))
    assert "100 images" in text
    assert "902.0 MB" in text
    assert "500.0 MB are free" in text
    assert "segment_size" in text
    assert "need about" not in str(too_small(None, 3, 10**10, "fp32"))


def test_too_little_memory_for_the_measurement_itself(
    teachers: list[FusedTeacher], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(memory.GroupedStep, "iterate", full)
    with pytest.raises(UserError, match="4 images at once do not fit the memory"):
        measure(config_of("sre2l++"), teachers[:1], CPU)


@pytest.mark.gpu
def test_on_a_gpu_larger_steps_are_predicted() -> None:
    device = torch.device("cuda", 0)
    teacher = fuse(tiny_teacher(size=64, dtype=torch.float32).to(device))
    config = config_of("sre2l++_fd2", size=64)
    found, peak = measure(config, [teacher], device), peak_of(config, [teacher], 32, device)
    assert peak <= found.of(32) <= 1.2 * peak
    assert free_bytes(device) > 10**8
