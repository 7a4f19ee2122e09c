"""Time and peak memory of an iteration: the engine's step against the plain loop and that loop vectorised and compiled.

python bench/step.py                                # the paper's four methods, batch 100 at 224 x 224 (10 on a CPU)
python bench/step.py --sweep                        # then the engine at 1 to 32 segments of 10 and of 100
python bench/step.py --quick                        # tiny sizes, to try the bench itself
python bench/step.py --methods sre2l++_fd2 --json FILE

Implementations, all in one process, their iterations taken in turns:
plain     fd2fast.reference.loop: hooks, one sample after the other, fp32 (as the published code)
rival     the same losses vectorised, channels_last, autocast, torch.compile, on a GPU one CUDA graph for the iteration
engine    fd2fast.step.GroupedStep
Before anything is timed, losses and gradient of one iteration are compared with the plain loop: in fp32 they must agree, in
lower precision the engine's error must be no worse than the rival's. Nothing is printed for a case that disagrees.

Times are medians with 20 and 80 % quantiles at steady state: CUDA events on a GPU, the wall clock on a CPU. Peak memory is
what an iteration allocates at most, on a GPU. `limit` is the convolutions' forward and input gradient at the rate of the best
matrix product measured in the same process.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fd2fast.config import DistillConfig
from fd2fast.device import pick_device, settle_precision
from fd2fast.methods import METHODS, resolve
from fd2fast.models.backbone import build_backbone
from fd2fast.models.fused import FusedTeacher, fuse
from fd2fast.models.teacher import Teacher
from fd2fast.planner import iteration_table
from fd2fast.reference.loop import crop_flip_roll, segment_loss
from fd2fast.step import GroupedStep, Priors, map_dtype

MEAN, STD = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
MAPS = {"ResNet18": 8, "ResNet50": 8, "MobileNetV2": 16, "DenseNet121": 16, "ShuffleNetV2": 8}
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Options:
    """What to measure."""

    # Methods; the round robin ones take all of `pool`, the others `teacher`.
    methods: tuple[str, ...] = ("sre2l++", "sre2l++_fd2", "fadrm+", "fadrm+_fd2")
    # Backbone of single-teacher methods.
    teacher: str = "ResNet18"
    # Backbones of the others.
    pool: tuple[str, ...] = ("ResNet18", "MobileNetV2", "ResNet50", "DenseNet121")
    # Implementations.
    ways: tuple[str, ...] = ("plain", "rival", "engine")
    # Classes of the teachers.
    classes: int = 200
    # Images of a segment; 0: 100 on a GPU, 10 on a CPU.
    rows: int = 0
    # Side of the images, pixels.
    size: int = 224
    # Earlier images of the same class for each image (FD2).
    priors: int = 1
    # Arithmetic of rival and engine.
    precision: str = "auto"
    # Iterations timed of each implementation and teacher.
    repetitions: int = 20
    # Compile the rival.
    compile: bool = True
    # Also the engine alone at 1 to 32 segments of 10 and 100 rows (fewer where the memory ends).
    sweep: bool = False
    # Tiny teachers, images and counts.
    quick: bool = False
    # Threads on a CPU; 0: torch's own choice.
    threads: int = 0
    # Device.
    device: str = "auto"
    # File that gets a JSON object a line; printed without it.
    json: Path | None = None

    def settled(self) -> Options:
        """Without open fields."""
        changes: dict[str, Any] = {}
        if self.quick:
            changes = {"teacher": "timm:test_resnet", "size": 32, "repetitions": 3, "classes": 10}
            changes |= {"pool": ("timm:test_resnet", "timm:test_efficientnet"), "rows": self.rows or 4}
        elif not self.rows:
            changes = {"rows": 100 if pick_device(self.device).type == "cuda" else 10}
        return dataclasses.replace(self, **changes)


@dataclass
class Case:
    """One method on one segment: what every implementation is given."""

    config: DistillConfig
    teachers: list[Teacher]
    initial: Tensor
    labels: Tensor
    priors: list[Tensor]  # per teacher, attention [rows, P, M, h, w]; empty for a base method
    low: Tensor
    high: Tensor
    draws: Tensor  # int [T, 1, 7]

    @property
    def rows(self) -> int:
        return len(self.labels)


def make_teacher(name: str, options: Options, device: torch.device) -> Teacher:
    """Random, with settled BN statistics and prototypes, frozen."""
    torch.manual_seed(0)
    teacher = Teacher(
        build_backbone(name, options.classes), MAPS.get(name, 4), alpha=0.5, size=options.size, accuracy=50
    )
    for _, layer in teacher.bn_layers():
        nn.init.uniform_(layer.weight, 0.5, 1.0)
        nn.init.normal_(layer.bias, std=0.2)
    # a random head sits on its kinks, attention and features at 0; a trained one is mostly away from them
    nn.init.constant_(teacher.head.attentions.bn.bias, 1.0)
    nn.init.constant_(teacher.backbone.bn_layers()[-1][1].bias, 0.5)
    teacher = teacher.to(device).train()
    with torch.no_grad():
        for _ in range(3):
            teacher(torch.randn(8, 3, options.size, options.size, device=device))
        teacher.eval().requires_grad_(False)
        z = teacher(torch.randn(4, 3, options.size, options.size, device=device)).z
        shape = teacher.prototypes_ema.shape
        near = F.normalize(z.mean(0) + 0.3 * z.mean() * torch.rand(shape, device=device), dim=1)
        teacher.prototypes_ema.copy_(near)
        teacher.prototypes_last.copy_(0.05 * near)
    return teacher.to(memory_format=torch.channels_last)


def make_case(method: str, options: Options, teachers: dict[str, Teacher], device: torch.device, rows: int) -> Case:
    """A segment of `rows` classes whose images have `options.priors` finished ones before them."""
    names = options.pool if METHODS[method].least > 1 else (options.teacher,)
    chosen = [teachers[name] for name in names]
    wanted = DistillConfig(
        method=method,
        precision=options.precision,  # type: ignore[arg-type]
        iterations=(1_000_000,),
        sizes=(options.size,),
        segment_size=min(rows, options.classes),
        device=str(device),
    )
    config = resolve(settle_precision(wanted), classes=options.classes, size=options.size)
    low, high = ((0 - MEAN) / STD).to(device), ((1 - MEAN) / STD).to(device)
    unit = torch.rand(rows, 3, options.size, options.size, generator=torch.Generator().manual_seed(1))
    initial = ((unit - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)).to(device)
    priors = []
    if config.fd2:
        with torch.no_grad():
            for teacher in chosen:
                found = teacher(initial.flip(0)).attention
                priors.append((found[:, None] * torch.rand(1, options.priors, 1, 1, 1, device=device)).contiguous())
    assert config.jitter is not None
    draws = torch.from_numpy(iteration_table(0, [0], 0, 64, options.size, jitter=config.jitter))
    labels = (torch.arange(rows) % options.classes).to(device)
    return Case(config, chosen, initial, labels, priors, low, high, draws)


class Plain:
    """The plain loop, one iteration at a time, as fd2fast.reference.loop.optimise_segment runs it."""

    def __init__(self, case: Case):
        self.case = case
        self.images = case.initial.clone().requires_grad_()
        assert case.config.lr is not None
        self.optimizer = torch.optim.Adam([self.images], case.config.lr, case.config.betas, case.config.adam_eps)
        none = case.initial.new_zeros(0, 1, 1, 1)
        self.priors = [list(p) for p in case.priors] or [[none] * case.rows] * len(case.teachers)
        self.terms: dict[str, float] = {}

    def __call__(self, t: int, *, read: bool = False) -> None:
        case, turn = self.case, t % len(self.case.teachers)
        view = crop_flip_roll(self.images, case.draws[t % len(case.draws), 0].tolist(), self.images.shape[-1])
        self.optimizer.zero_grad()
        loss, terms = segment_loss(case.teachers[turn], view, case.labels, self.priors[turn], case.config)
        loss.backward()
        if read:
            self.terms = {name: value.item() for name, value in terms.items()}
            return
        self.optimizer.step()
        with torch.no_grad():
            for channel in range(3):
                self.images[:, channel].clamp_(case.low[channel], case.high[channel])

    @property
    def gradient(self) -> Tensor:
        assert self.images.grad is not None
        return self.images.grad


def resize_matrices(draw: Sequence[int], size: int) -> tuple[Tensor, Tensor]:
    """Crop, resize, flip and roll as view = down @ image @ right^T (RandomResizedCrop is separable)."""
    top, left, height, width, flip, shift_down, shift_right = (int(v) for v in draw)
    eye = torch.eye(size)[None, None]
    down = crop_flip_roll(eye, (top, 0, height, size, 0, shift_down, 0), size)[0, 0]
    right = crop_flip_roll(eye, (0, left, size, width, flip, 0, shift_right), size)[0, 0].T
    return down.contiguous(), right.contiguous()


class Rival:
    """The plain loop's formulas on whole tensors; compiled, and captured as one CUDA graph per teacher on a GPU."""

    def __init__(self, case: Case, *, precision: str, compile: bool):
        self.case, self.precision = case, precision
        config, device = case.config, case.initial.device
        assert config.lr is not None
        self.images = case.initial.clone().to(memory_format=torch.channels_last).requires_grad_()
        on_gpu = device.type == "cuda"
        rate = torch.tensor(config.lr, device=device) if on_gpu else config.lr
        self.optimizer = torch.optim.Adam(
            [self.images], rate, config.betas, config.adam_eps, fused=True, capturable=on_gpu
        )
        size = case.initial.shape[-1]
        self.down, self.right = (torch.empty(size, size, device=device) for _ in range(2))
        low, high = (b.view(3, 1, 1) for b in (case.low, case.high))
        self.low, self.high = low, high
        self.tables = [resize_matrices(draw[0].tolist(), size) for draw in case.draws]
        losses = [self._losses_of(i) for i in range(len(case.teachers))]
        self.losses = [torch.compile(f, fullgraph=True) for f in losses] if compile else losses
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.capture = on_gpu and compile
        self.terms: dict[str, float] = {}

    def _losses_of(self, index: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """A function of images and matrices: total, ce_backbone, bn, ce_cal, l_f, l_s [6]."""
        case, config = self.case, self.case.config
        teacher = case.teachers[index]
        alpha = (teacher.alpha if config.alpha is None else config.alpha) if config.fd2 else 0.0
        layers = [layer for _, layer in teacher.bn_layers()]
        layers = layers if alpha > 0 else layers[:-1]
        prototypes = teacher.prototypes_ema if config.prototypes == "ema" else teacher.prototypes_last
        half = AUTOCAST.get(self.precision)
        labels, prior = case.labels, case.priors[index] if case.priors else None
        measured: list[Tensor] = []

        def measure(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            var, mean = torch.var_mean(inputs[0].float(), dim=(0, 2, 3), correction=0)
            measured.append((var - layer.running_var).norm() + (mean - layer.running_mean).norm())

        for layer in layers:
            layer.register_forward_pre_hook(lambda layer, inputs: measure(layer, inputs) if self.measuring else None)

        def losses(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
            view = (down @ images @ right.T).contiguous(memory_format=torch.channels_last)
            measured.clear()
            with torch.autocast(images.device.type, dtype=half or torch.bfloat16, enabled=half is not None):
                if config.fd2:
                    out = teacher(view)
                    logits = out.logits
                else:
                    logits = teacher.backbone(view)
            bn = sum(measured[1:], start=config.first_bn_multiplier * measured[0])
            ce = F.cross_entropy(logits.float(), labels)
            zero = torch.zeros_like(bn)
            total = (1 - alpha) * ce + config.r_bn * bn
            if not config.fd2:
                return torch.stack([total, ce, bn, zero, zero, zero])
            ce_cal = F.cross_entropy(out.cal_logits.float(), labels)
            z, eps = out.z, config.eps
            apart = torch.cdist(z, prototypes, compute_mode="use_mm_for_euclid_dist")
            distances = apart / (z.norm(dim=1, keepdim=True) + prototypes.norm(dim=1) + eps)
            own = distances.gather(1, labels[:, None])[:, 0]
            others = (distances.sum(dim=1) - own) / (len(prototypes) - 1)
            l_f = (config.beta * own + (1 - config.beta) * (1 - others)).mean()
            assert prior is not None
            a, b = out.attention.float().flatten(1)[:, None], prior.flatten(2)
            similar = (a - b).norm(dim=2) / (a.norm(dim=2) + b.norm(dim=2) + eps)
            l_s = (1 - similar.mean(dim=1)).mean()
            total = total + alpha * ce_cal + config.lam * l_f + (1 - config.lam) * l_s
            return torch.stack([total, ce, bn, ce_cal, l_f, l_s])

        return losses

    measuring = False

    def _iterate(self, turn: int) -> Tensor:
        self.measuring = True
        losses = self.losses[turn](self.images, self.down, self.right)
        self.measuring = False
        self.optimizer.zero_grad(set_to_none=not self.capture)
        losses[0].backward()
        return losses

    def _update(self) -> None:
        self.optimizer.step()
        with torch.no_grad():
            self.images.clamp_(self.low, self.high)

    def __call__(self, t: int, *, read: bool = False) -> None:
        turn = t % len(self.case.teachers)
        down, right = self.tables[t % len(self.tables)]
        self.down.copy_(down)
        self.right.copy_(right)
        if read:
            names = ("total", "ce_backbone", "bn", "ce_cal", "l_f", "l_s")
            self.terms = dict(zip(names, self._iterate(turn).tolist(), strict=True))
            return
        if not self.capture:
            self._iterate(turn)
            self._update()
            return
        if turn not in self.graphs:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(3):
                    self._iterate(turn)
                    self._update()
            torch.cuda.current_stream().wait_stream(side)
            self.graphs[turn] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graphs[turn]):
                self._iterate(turn)
                self._update()
        self.graphs[turn].replay()

    @property
    def gradient(self) -> Tensor:
        assert self.images.grad is not None
        return self.images.grad


class Engine:
    """GroupedStep over copies of the case's segment."""

    def __init__(self, case: Case, fused: Sequence[FusedTeacher], *, precision: str, segments: int = 1):
        config = dataclasses.replace(case.config, precision=precision)  # type: ignore[arg-type]
        offsets = [case.rows * s for s in range(segments + 1)]
        total = case.rows * segments
        priors: list[Priors | None] = [None] * len(case.teachers)
        for index, maps in enumerate(case.priors):
            every = maps.shape[1]
            flat = maps.flatten(0, 1).repeat(segments, 1, 1, 1)
            priors[index] = Priors(flat, tuple(range(0, total * every + 1, every)))
        self.step = GroupedStep(
            config,
            list(fused),
            case.initial.repeat(segments, 1, 1, 1),
            case.labels.repeat(segments),
            offsets,
            low=case.low,
            high=case.high,
            priors=priors,
        )
        self.draws = case.draws.expand(-1, segments, -1).contiguous()
        self.terms: dict[str, float] = {}

    def __call__(self, t: int, *, read: bool = False) -> None:
        losses = self.step.iterate(self.draws[t % len(self.draws)])
        if read:
            names = ("total", "ce_backbone", "ce_cal", "bn", "l_f", "l_s")
            self.terms = dict(zip(names, losses[0].tolist(), strict=True))

    @property
    def gradient(self) -> Tensor:
        assert self.step.gradient is not None
        return self.step.gradient


@dataclass
class Errors:
    """Against the plain loop in fp32, over all teachers: the largest of each."""

    gradient: float = 0.0  # relative L2
    terms: dict[str, float] = field(default_factory=dict)  # relative

    def take(self, actual: Any, expected: Plain) -> None:
        difference = (actual.gradient - expected.gradient).norm() / expected.gradient.norm()
        self.gradient = max(self.gradient, float(difference))
        for name, value in expected.terms.items():
            error = abs(actual.terms[name] - value) / max(abs(value), 1e-6)
            self.terms[name] = max(self.terms.get(name, 0.0), error)

    @property
    def worst_term(self) -> float:
        return max(self.terms.values())


def errors_of(make: Callable[[], Any], case: Case) -> Errors:
    """First iteration of every teacher: fresh images, so that no earlier update blurs the comparison."""
    found = Errors()
    for turn in range(len(case.teachers)):
        plain, actual = Plain(case), make()
        plain(turn, read=True)
        if isinstance(actual, Engine):
            actual.step.iteration = turn
        actual(turn, read=True)
        found.take(actual, plain)
    return found


def check(case: Case, fused: list[FusedTeacher], exact: list[FusedTeacher]) -> dict[str, float]:
    """AssertionError unless rival and engine compute what the plain loop computes; the errors for the record."""
    precision = case.config.precision
    full = {
        "rival": errors_of(lambda: Rival(case, precision="fp32", compile=False), case),
        "engine": errors_of(lambda: Engine(case, exact, precision="fp32"), case),
    }
    for name, errors in full.items():
        # a ReLU that flips changes a gradient by more than rounding does
        assert errors.gradient < 5e-3, f"{name} in fp32: gradient off by {errors.gradient:.1e} (relative L2)"
        assert errors.worst_term < 1e-3, f"{name} in fp32: loss terms off by {errors.terms}"
    found = {f"{name} fp32 gradient error": errors.gradient for name, errors in full.items()}
    if precision in AUTOCAST:
        rival = errors_of(lambda: Rival(case, precision=precision, compile=False), case)
        engine = errors_of(lambda: Engine(case, fused, precision=precision), case)
        assert engine.gradient <= 1.5 * rival.gradient + 1e-3, (
            f"engine in {precision}: gradient off by {engine.gradient:.2f}, autocast by {rival.gradient:.2f} (relative L2)"
        )
        assert engine.worst_term <= 1.5 * rival.worst_term + 1e-2, (
            f"engine in {precision}: loss terms off by {engine.terms}, autocast by {rival.terms}"
        )
        found |= {f"{n} {precision} gradient error": e.gradient for n, e in (("rival", rival), ("engine", engine))}
    return found


def timed(
    runs: dict[str, Callable[[int], None]], teachers: int, repetitions: int, device: torch.device
) -> dict[str, Any]:
    """Milliseconds of each run's iterations per teacher, [teachers][repetitions]; the runs take turns."""
    found: dict[str, list[list[float]]] = {name: [[] for _ in range(teachers)] for name in runs}
    for t in range(2 * teachers):  # compilation, capture, caches
        for run in runs.values():
            run(t)
    for t in range(teachers * repetitions):
        for name, run in runs.items():
            if device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                torch.cuda.synchronize()
                start.record()
                run(t)
                end.record()
                torch.cuda.synchronize()
                taken = start.elapsed_time(end)
            else:
                begin = time.perf_counter()
                run(t)
                taken = 1e3 * (time.perf_counter() - begin)
            found[name][t % teachers].append(taken)
    return found


def peak_megabytes(run: Callable[[int], None], teachers: int, device: torch.device) -> float | None:
    """The most that iterations hold allocated, everything of this process counted; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for t in range(teachers):
        run(t)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 1e6


def product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the best of a few square matrix products in this type."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(12):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * side**3 / best


def convolution_flops(case: Case) -> list[float]:
    """Of each teacher for the case's rows: convolutions and products forward, and again for the input's gradient."""
    found = []
    for teacher in case.teachers:
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            teacher.backbone(case.initial[:1])
        found.append(2.0 * counter.get_total_flops() * case.rows)
    return found


def row_of(name: str, times: list[list[float]], base: dict[str, Any]) -> dict[str, Any]:
    """One line of the table: the mean over teachers of each one's quantiles."""
    cuts = [statistics.quantiles(t, n=10, method="inclusive") if len(t) > 1 else [t[0]] * 9 for t in times]
    low, middle, high = (statistics.mean(c[i] for c in cuts) for i in (1, 4, 7))
    row = {**base, "way": name, "ms": round(middle, 3), "ms 20%": round(low, 3), "ms 80%": round(high, 3)}
    row["ms each teacher"] = [round(c[4], 3) for c in cuts]
    row["images/s"] = round(1e3 * base["images"] / middle, 1)
    return row


def measure(method: str, options: Options, teachers: dict[str, Teacher], device: torch.device) -> list[dict[str, Any]]:
    """Check, then one row for each implementation. Raises AssertionError where the check fails."""
    case = make_case(method, options, teachers, device, options.rows)
    precision = case.config.precision
    fused = [fuse(t, map_dtype(precision, torch.float32)) for t in case.teachers]
    errors = check(case, fused, [fuse(t, torch.float32) for t in case.teachers])
    makers: dict[str, Callable[[], Any]] = {
        "plain": lambda: Plain(case),
        "rival": lambda: Rival(case, precision=precision, compile=options.compile),
        "engine": lambda: Engine(case, fused, precision=precision),
    }
    count = len(case.teachers)
    runs = {name: makers[name]() for name in options.ways}
    times = timed(runs, count, options.repetitions, device)
    rate = product_rate(AUTOCAST.get(precision, torch.float32), device)
    limit = statistics.mean(convolution_flops(case)) / rate * 1e3
    base = {
        "method": method,
        "images": case.rows,
        "size": options.size,
        "precision": precision,
        "limit ms": round(limit, 3),
    }
    rows = []
    for name in runs:
        row = row_of(name, times[name], base)
        row["precision"] = "fp32" if name == "plain" else precision
        row["of limit"] = round(limit / row["ms"], 3)
        rows.append({**row, **{k: v for k, v in errors.items() if k.startswith(name)}})
    for row in rows:  # one implementation at a time, the others gone
        runs.clear()
        run = makers[row["way"]]()
        for t in range(count):
            run(t)
        row["peak MB"] = peak_megabytes(run, count, device)
        del run
    plain = next((row["ms"] for row in rows if row["way"] == "plain"), None)
    rival = next((row["ms"] for row in rows if row["way"] == "rival"), None)
    for row in rows:
        row["x plain"] = None if plain is None else round(plain / row["ms"], 2)
        row["x rival"] = None if rival is None else round(rival / row["ms"], 2)
    return rows


def sweep(method: str, options: Options, teachers: dict[str, Teacher], device: torch.device) -> list[dict[str, Any]]:
    """The engine alone: several segments of 10 and 100 rows in one step; ends where the memory does."""
    found = []
    sizes = (options.rows,) if options.quick else (10, 100)
    for rows in sizes:
        case = make_case(method, options, teachers, device, rows)
        precision = case.config.precision
        fused = [fuse(t, map_dtype(precision, torch.float32)) for t in case.teachers]
        rate = product_rate(AUTOCAST.get(precision, torch.float32), device)
        for segments in (1, 2) if options.quick else (1, 2, 4, 8, 16, 32):
            try:
                run = Engine(case, fused, precision=precision, segments=segments)
                times = timed({"engine": run}, len(fused), options.repetitions, device)["engine"]
                peak = peak_megabytes(run, len(fused), device)
            except (torch.OutOfMemoryError, MemoryError):
                break
            images = rows * segments
            limit = statistics.mean(convolution_flops(case)) * segments / rate * 1e3
            base = {"method": method, "images": images, "size": options.size, "precision": precision}
            row = row_of("engine", times, {**base, "limit ms": round(limit, 3)})
            row |= {"segments": segments, "peak MB": peak, "of limit": round(limit / row["ms"], 3)}
            found.append(row)
            if device.type == "cpu" and segments * rows >= 40:
                break
    return found


def about(device: torch.device) -> dict[str, Any]:
    """Where the rows were measured."""
    root = Path(__file__).parents[1]
    sha = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True).stdout
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "date": datetime.date.today().isoformat(),
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": sha.strip(),
        "command": " ".join(["python", "bench/step.py", *sys.argv[1:]]),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    columns = (
        "method",
        "way",
        "images",
        "size",
        "precision",
        "ms",
        "ms 20%",
        "ms 80%",
        "images/s",
        "peak MB",
        "limit ms",
    )
    columns += ("of limit", "x plain", "x rival")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = ("-" if row.get(c) is None else str(row[c]) for c in columns)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print and write the rows, then the table; 1 where a case disagrees with the plain loop."""
    given = tyro.cli(Options, args=arguments, description=__doc__)
    options = given.settled()
    device = pick_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    # nothing but the precision asked for
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    names = {name for name in (options.teacher, *options.pool)}
    teachers = {name: make_teacher(name, options, device) for name in sorted(names)}
    place, rows, failed = about(device), [], False
    for method in options.methods:
        try:
            found = measure(method, options, teachers, device)
        except AssertionError as error:
            print(f"{method}: no time, the results disagree: {error}", file=sys.stderr)
            failed = True
            continue
        if options.sweep:
            found += sweep(method, options, teachers, device)
        for row in found:
            line = json.dumps({**place, **row})
            if options.json is None:
                print(line, flush=True)
            else:
                with options.json.open("a") as file:
                    file.write(line + "\n")
        rows += found
    print(", ".join(f"{k} {v}" for k, v in place.items()))
    print(table(rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
