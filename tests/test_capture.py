"""Captured iterations: when which kind is recorded, what happens where it fails, and that a recording is the iteration."""

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from distill_tools import MEAN, OTHER, SMALL, STD, tiny_config, tiny_teacher
from torch.utils._python_dispatch import TorchDispatchMode

from fd2fast import ops
from fd2fast.distillation.planner import iteration_table
from fd2fast.ops import _checks, _dispatch
from fd2fast.ops.cpu import native
from fd2fast.step import GroupedStep, Priors, capture
from fd2fast.step.capture import Captures
from fd2fast.step.tables import DeviceTable
from fd2fast.step.update import PixelAdam

LOW = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)], dtype=torch.float64)
HIGH = torch.tensor([(1 - m) / s for m, s in zip(MEAN, STD, strict=True)], dtype=torch.float64)
CLASSES, ROWS = 5, [0, 2, 5]
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class Counting:
    """A recorder that records nothing and counts."""

    def __init__(self, failing: Exception | None = None):
        self.events: list[str] = []
        self.failing = failing

    def warm_up(self, work: Callable) -> torch.Tensor:
        self.events.append("warm up")
        return work()

    def record(self, work: Callable) -> Callable:
        self.events.append("record")
        if self.failing is not None:
            raise self.failing

        def replay() -> torch.Tensor:
            self.events.append("replay")
            return work()

        return replay

    def release(self) -> None:
        self.events.append("release")


def test_each_kind_is_warmed_up_recorded_once_and_replayed() -> None:
    recorder = Counting()
    captures = Captures(recorder)
    assert [float(captures.run(k, lambda k=k: torch.tensor(float(k)))) for k in (0, 1, 0, 1, 1, 0)] == [
        0,
        1,
        0,
        1,
        1,
        0,
    ]
    assert recorder.events == ["warm up", "warm up", *["record", "replay"] * 2, "replay", "replay"]
    assert len(captures) == 2
    captures.clear()
    assert len(captures) == 0
    assert recorder.events[-1] == "release"
    captures.run(0, lambda: torch.zeros(()))
    assert recorder.events[-1] == "warm up"
    assert not captures.replayed


def test_what_cannot_be_recorded_runs_eagerly(caplog: pytest.LogCaptureFixture) -> None:
    """The reason is logged once in a process; nothing is recorded again, what was recorded is released."""
    capture._told.clear()
    for _ in range(2):
        recorder = Counting()
        captures, done = Captures(recorder), []
        for _ in range(2):
            captures.run("good", lambda: torch.zeros(()))
        recorder.failing = RuntimeError("operation not permitted when stream is capturing\nmore")
        with caplog.at_level(logging.WARNING, logger="fd2fast"):
            for k in range(4):
                assert captures.run("bad", lambda k=k, done=done: done.append(k) or torch.tensor(k)) == k
        assert done == [0, 1, 2, 3]
        assert recorder.events == ["warm up", "record", "replay", "warm up", "record", "release"]
        assert len(captures) == 0
        assert captures.reason == "RuntimeError: operation not permitted when stream is capturing"
        captures.run("good", lambda: torch.zeros(()))
        assert recorder.events[-1] == "release"
    assert [r.message for r in caplog.records if "without CUDA graphs" in r.message] == [
        "iterations run without CUDA graphs: RuntimeError: operation not permitted when stream is capturing"
    ]


def test_errors_of_the_work_itself_are_raised() -> None:
    def fail() -> torch.Tensor:
        raise torch.OutOfMemoryError("made up")

    recorder = Counting()
    captures = Captures(recorder)
    with pytest.raises(torch.OutOfMemoryError):
        captures.run(0, fail)
    assert captures.reason is None
    captures.run(0, lambda: torch.zeros(()))
    assert recorder.events == ["warm up", "warm up"]


def test_too_many_kinds_stay_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "MOST_GRAPHS", 2)
    recorder = Counting()
    captures = Captures(recorder)
    for _ in range(3):
        for k in range(3):
            captures.run(k, lambda: torch.zeros(()))
    assert len(captures) == 2
    assert recorder.events.count("record") == 2


class _Tape(TorchDispatchMode):
    """Runs operations and notes them with the very tensors they read and wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.lines.append((func, args, kwargs or {}, found))
        return found

    def run(self) -> None:
        """All of it again: the same memory read and written, no value taken from the host."""
        for func, args, kwargs, noted in self.lines:
            results = func(*args, **kwargs)
            pairs = zip(results, noted, strict=True) if isinstance(noted, (tuple, list)) else [(results, noted)]
            for result, place in pairs:
                if isinstance(place, torch.Tensor) and result.data_ptr() != place.data_ptr():
                    place.detach().copy_(result)


class TapeRecorder(Counting):
    """What a CUDA graph is, on a CPU: static memory, and every host value as it was when the tape was made."""

    step: GroupedStep
    table: DeviceTable

    def record(self, work: Callable) -> Callable:
        self.events.append("record")
        state = [*self.step.tensors().values(), self.table.position]
        before = [t.clone() for t in state]
        with _Tape() as tape, torch.no_grad(), torch.enable_grad():
            found = work()
        for tensor, value in zip(state, before, strict=True):  # a CUDA graph records without running
            tensor.copy_(value)

        def replay() -> torch.Tensor:
            self.events.append("replay")
            with torch.no_grad():
                tape.run()
            return found.clone()

        return replay


def make_step(
    method: str,
    device: torch.device | str = "cpu",
    graphs: bool | None = None,
    parts: dict[str, object] | None = None,
    **changes: object,
) -> GroupedStep:
    """Two segments of 2 and 3 rows with earlier images."""
    changes = {"precision": "fp32", **changes}
    config = tiny_config(method, classes=CLASSES, **changes)
    names = [SMALL, OTHER] if method.startswith(("fadrm+", "cvdd")) else [SMALL]
    teachers = [
        tiny_teacher(f"{name},output_stride=8", CLASSES, seed=i, dtype=torch.float32).to(device)
        for i, name in enumerate(names)
    ]
    rows = ROWS[-1]
    generator = torch.Generator().manual_seed(0)
    unit = torch.rand(rows, 3, 32, 32, generator=generator)
    initial = (LOW.view(3, 1, 1) + unit * (HIGH - LOW).view(3, 1, 1)).float().to(device)
    maps = [torch.rand(rows, t.attention_maps, 4, 4, generator=generator).to(device) for t in teachers]
    priors = [Priors(m, tuple(range(rows + 1))) for m in maps] if config.fd2 else None
    labels = torch.tensor([0, 1, 0, 1, 2])
    return GroupedStep(
        config, teachers, initial, labels, ROWS, low=LOW, high=HIGH, priors=priors, graphs=graphs, **(parts or {})
    )


def load(step: GroupedStep) -> None:
    """The draws from the coming iteration to the end of its phase."""
    count, jitter = step.phase_end - step.iteration, step.recipe.jitter
    draws = iteration_table(0, [0, 1], step.iteration, count, step.size, jitter=min(jitter, step.size - 1))
    step.load_table(draws, None, step.iteration)


def finish(step: GroupedStep) -> torch.Tensor:
    """All iterations by tables of whole phases; the losses [T, segments, terms]."""
    losses = []
    while not step.finished:
        if step.iteration in step.phases.begins:
            load(step)
        losses.append(step.iterate().clone())
    return torch.stack(losses)


CASES = [
    ("sre2l++", {"iterations": (7,)}),
    ("sre2l++_fd2", {"iterations": (7,)}),
    ("fadrm+_fd2", {"iterations": (6, 7), "sizes": (24, 32)}),
    ("cvdd_fd2", {"iterations": (5,)}),
    ("sre2l++_fd2", {"iterations": (5,), "precision": "fp16"}),
]


@pytest.mark.parametrize(("method", "changes"), CASES)
def test_a_recorded_iteration_is_the_iteration(method: str, changes: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replayed operation by operation on the same memory it gives the bytes of the eager loop: no host value is baked in."""
    # a tape sees torch's operations only
    monkeypatch.setattr(_dispatch, "off_cpu", lambda *given: "there is a tape")
    monkeypatch.setattr(native, "why_not", lambda x: "there is a tape")
    monkeypatch.setattr(_checks, "reads_values", lambda tensor: False)
    specification = ops.crop_flip_roll
    monkeypatch.setattr(ops, "crop_flip_roll", lambda *a, **k: specification(*a, **k, backend="reference"))
    found = []
    for recorded in (False, True):
        recorder, table = TapeRecorder(), DeviceTable(2, CPU)
        captures = Captures(recorder) if recorded else None
        with make_step(method, parts={"table": table, "captures": captures}, **changes) as step:
            recorder.step, recorder.table = step, table
            found.append((finish(step), step.state()))
            if recorded:
                assert captures.reason is None
                phases, kinds = len(step.recipe.iterations), len(step.schedule)
                assert recorder.events.count("record") == phases * kinds
                assert recorder.events.count("replay") == step.total_iterations - phases * kinds
                assert step.gradient is None
    (eager, wanted), (replayed, state) = found
    assert torch.equal(replayed, eager)
    for name, value in wanted.items():
        assert torch.equal(state[name], value) if isinstance(value, torch.Tensor) else state[name] == value


def test_the_tape_bakes_host_values_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above can fail: with a host value in the iteration, replays differ."""
    monkeypatch.setattr(_dispatch, "off_cpu", lambda *given: "there is a tape")
    monkeypatch.setattr(native, "why_not", lambda x: "there is a tape")
    monkeypatch.setattr(_checks, "reads_values", lambda tensor: False)

    class Wrong(PixelAdam):
        def __call__(self, state, gradient, rate, number):
            return super().__call__(state, gradient, rate * (1 + self.step.iteration), number)

    found = []
    for recorded in (False, True):
        recorder, table = TapeRecorder(), DeviceTable(2, CPU)
        update = Wrong(tiny_config("sre2l++", classes=CLASSES, iterations=(5,)), LOW.float(), HIGH.float())
        parts = {"table": table, "captures": Captures(recorder) if recorded else None, "update": update}
        with make_step("sre2l++", parts=parts, iterations=(5,)) as step:
            recorder.step, recorder.table, update.step = step, table, step
            finish(step)
            found.append(step.images)
    assert not torch.equal(*found)


def test_graphs_end_with_phase_state_and_step() -> None:
    recorder = Counting()
    captures = Captures(recorder)
    parts = {"table": DeviceTable(2, CPU), "captures": captures}
    with make_step("fadrm+", parts=parts, iterations=(5, 5), sizes=(24, 32)) as step:
        load(step)
        for _ in range(5):
            step.iterate()
        assert len(captures) == 2
        state = step.state()
        load(step)
        step.iterate()  # the next phase
        assert recorder.events.count("release") == 1
        assert recorder.events[-1] == "warm up"
        for _ in range(3):
            step.iterate()
        assert len(captures) == 2
        step.load_state(state)
        assert len(captures) == 0
        for _ in range(5):
            step.iterate()
        assert step.finished
    assert len(captures) == 0


def test_a_larger_table_is_recorded_anew() -> None:
    captures = Captures(Counting())
    with make_step("sre2l++", parts={"table": DeviceTable(2, CPU), "captures": captures}, iterations=(200,)) as step:
        for _ in range(3):
            step.iterate(torch.tensor([[0, 0, 32, 32, 0, 0, 0]] * 2))
        assert len(captures) == 1
        load(step)
        assert len(captures) == 0


def test_a_failed_recording_gives_the_stream_back(monkeypatch: pytest.MonkeyPatch) -> None:
    events = []

    @contextlib.contextmanager
    def graph(graph, pool, stream, capture_error_mode):
        events.append("side stream")
        yield  # torch before 2.12 does not go back where the capture fails

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "side")
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "own")
    monkeypatch.setattr(torch.cuda, "set_stream", events.append)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    capture._side_stream.cache_clear()
    recorder = capture.CudaRecorder(torch.device("cuda", 7))
    assert capture.CudaRecorder(torch.device("cuda", 7))._stream is recorder._stream  # one for all steps

    def work() -> torch.Tensor:
        raise RuntimeError("not while capturing")

    with pytest.raises(RuntimeError, match="not while capturing"):
        recorder.record(work)
    capture._side_stream.cache_clear()
    assert events == ["side stream", "own"]


@pytest.mark.gpu
@pytest.mark.parametrize(("method", "changes"), CASES)
def test_graph_equals_eager(method: str, changes: dict) -> None:
    """Bytes: the same kernels on the same memory."""
    found = []
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        for graphs in (False, True):
            captures = Captures(capture.CudaRecorder(GPU)) if graphs else None
            with make_step(method, "cuda", graphs, {"captures": captures}, **changes) as step:
                found.append((finish(step), step.state()))
                if captures is not None:
                    assert captures.reason is None
                    assert len(captures) == len(step.schedule)
    (eager, wanted), (replayed, state) = found
    assert torch.equal(replayed, eager)
    for name, value in wanted.items():
        assert torch.equal(state[name], value) if isinstance(value, torch.Tensor) else state[name] == value


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(("method", "changes"), CASES)
def test_the_loop_does_not_wait_for_the_gpu(method: str, changes: dict, graphs: bool) -> None:
    """torch's own check, on iterations after the first round (which compiles, chooses algorithms and records)."""
    changes = {**changes, "iterations": (20,), "sizes": (32,)}
    with make_step(method, "cuda", graphs, **changes) as step:
        load(step)
        for _ in range(2 * len(step.schedule)):
            step.iterate()
        torch.cuda.set_sync_debug_mode("error")
        try:
            while not step.finished:
                if step.iteration == 15:
                    load(step)
                step.iterate()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.isfinite(step.images).all()


@pytest.mark.gpu
def test_a_step_that_cannot_be_captured_runs_eagerly() -> None:
    """In a process of its own: torch before 2.12 leaves its allocator as during a capture after one that failed."""
    if "OWN_PROCESS" not in os.environ:
        own = f"{__file__}::test_a_step_that_cannot_be_captured_runs_eagerly"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", own]
        done = subprocess.run(command, env={**os.environ, "OWN_PROCESS": "1"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        return
    found = []
    for syncs in (False, True):
        captures = Captures(capture.CudaRecorder(GPU))
        with make_step("sre2l++", "cuda", True, {"captures": captures}, iterations=(6,)) as step:
            if syncs:
                body, forward = step.losses.teachers[0].body, step.losses.teachers[0].body.forward

                def reading(x, segments, forward=forward):
                    assert x.sum().item() == x.sum().item()
                    return forward(x, segments)

                body.forward = reading
            finish(step)
            assert (captures.reason is not None) is syncs
            found.append(step.images.clone())
    torch.testing.assert_close(*found, rtol=0.1, atol=0.1)
