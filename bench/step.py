"""Time and peak memory of an iteration: the engine's step against the plain loop and that loop vectorised and compiled.

fd2fast bench step                                # the paper's four methods, batch 100 at 224 x 224 (10 on a CPU)
fd2fast bench step --sweep                        # then the engine at 1 to 32 segments of 10 and of 100
fd2fast bench step --quick                        # tiny sizes, to try the bench itself
fd2fast bench step --methods sre2l++_fd2 --out results

Implementations, all in one process, their iterations taken in turns:
plain     fd2fast.reference.loop: hooks, one sample after the other, fp32 (as the published code)
rival     the same losses vectorised, channels_last, autocast, torch.compile, on a GPU one CUDA graph for the iteration
engine    fd2fast.step.GroupedStep
Before anything is timed, each is compared with the plain loop (bench/gate.py). Nothing is printed for a case that disagrees.

Times are medians with 10 and 90 % quantiles at steady state: CUDA events on a GPU, the wall clock on a CPU. `peak MB` is what
the implementation holds at most, its teachers' weights included (not counted for compiled code on a CPU). `limit` is the
direct convolutions' forward and input gradient at the rate of the best matrix product measured in the same process; Winograd's
algorithm, which has fewer products, can pass it.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from bench import results, timing
from bench.cases import PAPER_METHODS, POOL, Case, check_method, make_case, make_teacher, teachers_of
from bench.gate import LIMITS, DisagreementError, Reference, check, settle_reference_arithmetic
from bench.ways import AUTOCAST, FusedStep, Losses, Plain, Rival, fused_of
from fd2fast.distillation.memory import is_out_of_memory
from fd2fast.errors import UserError
from fd2fast.models.fused import FusedTeacher
from fd2fast.models.teacher import Teacher
from fd2fast.system.device import pick_device

COLUMNS = ("method", "way", "segments", "images", "size", "precision", "ms", "ms 10%", "ms 90%", "images/s", "peak MB")
COLUMNS += ("limit ms", "of limit", "x plain", "x rival")


WAYS = ("plain", "rival", "engine")


@dataclass(frozen=True)
class Options:
    """What to measure."""

    # Methods; the round robin ones take all of `pool`, the others `teacher`.
    methods: tuple[str, ...] = PAPER_METHODS
    # Backbone of single-teacher methods; empty: ResNet18.
    teacher: str = ""
    # Backbones of the others; none: the paper's four.
    pool: tuple[str, ...] = ()
    # Implementations.
    ways: tuple[str, ...] = WAYS
    # Classes of the teachers; 0: 200.
    classes: int = 0
    # Images of a segment; 0: 100 on a GPU, 10 on a CPU.
    rows: int = 0
    # Side of the images, pixels; 0: 224.
    size: int = 0
    # Earlier images of the same class for each image (FD2).
    priors: int = 1
    # Arithmetic of rival and engine.
    precision: str = "auto"
    # Turns of the implementations, each one iteration with every teacher; 0: 20.
    repetitions: int = 0
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
    # Folder for the JSON, Markdown and PNG files.
    out: Path = results.ROOT / "bench" / "results"

    def settled(self, device: torch.device) -> Options:
        """Without open fields. Raises UserError for values out of range."""
        default: dict[str, Any] = {"rows": 100 if device.type == "cuda" else 10, "size": 224, "repetitions": 20}
        default |= {"teacher": "ResNet18", "pool": POOL, "classes": 200}
        if self.quick:
            default = {"rows": 4, "size": 32, "repetitions": 3, "teacher": "timm:test_resnet", "classes": 10}
            default |= {"pool": ("timm:test_resnet", "timm:test_efficientnet")}
        found = dataclasses.replace(self, **{name: v for name, v in default.items() if not getattr(self, name)})
        for name in ("classes", "rows", "size", "repetitions"):
            if getattr(found, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(found, name)}")
        for method in found.methods:
            check_method(method)
        for way in found.ways:
            if way not in WAYS:
                raise UserError(f"unknown way {way!r}; wanted some of {', '.join(WAYS)}")
        if found.precision not in ("auto", *LIMITS):
            raise UserError(f"precision must be auto, {', '.join(LIMITS)}, got {found.precision}")
        return found


def case_of(method: str, options: Options, teachers: dict[str, Teacher], device: torch.device, rows: int) -> Case:
    """The method's segment with its own teachers."""
    chosen = [teachers[name] for name in teachers_of(method, options.teacher, options.pool)]
    precision = options.precision
    return make_case(method, chosen, rows=rows, priors=options.priors, precision=precision, device=device)


def limit_ms(case: Case, device: torch.device) -> float:
    """Milliseconds of the convolutions alone at the best product's rate, mean over the teachers."""
    rate = timing.best_rate(AUTOCAST.get(case.config.precision, torch.float32), device)
    flops = [timing.convolution_flops(t.backbone, case.initial) * case.rows for t in case.teachers]
    return 1e3 * statistics.mean(flops) / rate


def checked(case: Case, fused: list[FusedTeacher]) -> dict[str, float]:
    """DisagreementError unless rival and engine compute what the plain loop computes; the errors for the record."""
    precision, reference, found = case.config.precision, Reference(case), {}
    exact = fused_of(case.teachers, "fp32", case.rows)

    used = ["fp32", precision] if precision in AUTOCAST else ["fp32"]
    for arithmetic in used:
        teachers = exact if arithmetic == "fp32" else fused
        errors = {
            "rival": reference.errors_of(functools.partial(Rival, losses=Losses(case, precision=arithmetic))),
            "engine": reference.errors_of(lambda c, a=arithmetic, t=teachers: FusedStep(c, t, precision=a)),
        }
        check("rival", errors["rival"], arithmetic, rounding=reference.rounding)
        peer = errors["rival"] if arithmetic in AUTOCAST else None
        check("engine", errors["engine"], arithmetic, peer, reference.rounding)
        for name, error in errors.items():
            found |= error.record(f"{name} {arithmetic}")
    return found


def row_of(way: str, values: list[float], base: dict[str, Any]) -> dict[str, Any]:
    """One line of the table."""
    low, middle, high = timing.quantiles(values)
    row = {**base, "way": way, "ms": round(middle, 3), "ms 10%": round(low, 3), "ms 90%": round(high, 3)}
    return row | {"images/s": round(1e3 * base["images"] / middle, 1), "of limit": round(base["limit ms"] / middle, 3)}


def measure(method: str, options: Options, teachers: dict[str, Teacher], device: torch.device) -> list[dict[str, Any]]:
    """Check, then one row for each implementation. Raises DisagreementError where the check fails."""
    torch._dynamo.reset()  # compiled code of other methods counts against its limit
    case = case_of(method, options, teachers, device, options.rows)
    precision, period = case.config.precision, len(case.teachers)
    fused = fused_of(case.teachers, precision, case.rows)
    errors = checked(case, fused)
    losses = Losses(case, precision=precision, compile=options.compile)
    makers: dict[str, Callable[[], timing.Run]] = {
        "plain": lambda: Plain(case),
        "rival": lambda: Rival(case, losses, graph=options.compile),
        "engine": lambda: FusedStep(case, fused, precision=precision),
    }
    runs = {way: makers[way]() for way in options.ways}
    times = timing.interleaved(runs, options.repetitions, period, device)
    runs.clear()
    base = {
        "method": method,
        "segments": 1,
        "images": case.rows,
        "size": options.size,
        "limit ms": round(limit_ms(case, device), 3),
    }
    rows = []
    for way, values in times.items():
        if not values:
            print(f"{method}, {way}: out of memory", file=sys.stderr)
            continue
        row = row_of(way, values, {**base, "precision": "fp32" if way == "plain" else precision})
        row |= {
            f"x {other}": round(timing.ratio(times[other], values), 2)
            for other in ("plain", "rival")
            if times.get(other)
        }
        if device.type == "cuda" or not (way == "rival" and options.compile):  # one at a time, the others gone
            row["peak MB"] = peak_mb(makers[way], fused if way == "engine" else case.teachers, period, device)
        rows.append({**row, **{k: v for k, v in errors.items() if k.startswith(way)}})
    return rows


def peak_mb(
    make: Callable[[], timing.Run], teachers: Sequence[torch.nn.Module], period: int, device: torch.device
) -> float:
    """MB at most, the teachers' weights included."""
    gc.collect()
    peak, _ = timing.peak_memory(make, period, device)
    return round((peak or 0.0) + timing.weight_bytes(teachers) / 1e6, 1)


def sweep(method: str, options: Options, teachers: dict[str, Teacher], device: torch.device) -> list[dict[str, Any]]:
    """The engine alone: several segments of 10 and 100 rows in one step; ends where the memory does."""
    found = []
    for rows in (options.rows,) if options.quick else (10, 100):
        case = case_of(method, options, teachers, device, rows)
        precision, period = case.config.precision, len(case.teachers)
        fused = fused_of(case.teachers, precision, case.rows)
        limit = limit_ms(case, device)
        for segments in (1, 2) if options.quick else (1, 2, 4, 8, 16, 32):
            try:
                run = FusedStep(case, fused, precision=precision, segments=segments)
                times = timing.interleaved({"engine": run}, options.repetitions, period, device)["engine"]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                break
            if not times:
                break
            base = {"method": method, "segments": segments, "images": rows * segments, "size": options.size}
            row = row_of("engine", times, {**base, "precision": precision, "limit ms": round(limit * segments, 3)})
            del run
            make = functools.partial(FusedStep, case, fused, precision=precision, segments=segments)
            row["peak MB"] = peak_mb(make, fused, period, device)
            found.append(row)
            if device.type == "cpu" and segments * rows >= (40 if rows == 10 else 100):
                break
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the files, print the table; 1 where a case disagrees with the plain loop, 2 for bad arguments."""
    try:
        given = tyro.cli(Options, args=arguments, description=__doc__, prog="fd2fast bench step")
        device = pick_device(given.device)
        options = given.settled(device)
        timing.use_threads(options.threads)
        results.prepare(options.out)
        settle_reference_arithmetic()
        names = {name for method in options.methods for name in teachers_of(method, options.teacher, options.pool)}
        teachers = {
            name: make_teacher(name, classes=options.classes, size=options.size, device=device)
            for name in sorted(names)
        }
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    place: dict[str, Any] = results.about(device, "step", arguments)
    place["work"] = f"{options.rows} images of {options.size}², {', '.join(sorted(names))}; random weights and images"
    rows: list[dict[str, Any]] = []
    failed = False
    for method in options.methods:
        try:
            found = measure(method, options, teachers, device)
        except DisagreementError as error:
            print(f"{method}: no time, the results disagree: {error}", file=sys.stderr)
            failed = True
            continue
        if options.sweep:
            found += sweep(method, options, teachers, device)
        rows += found
        results.save(options.out, place, rows, COLUMNS, picture)
    if rows:
        results.publish(options.out, place, rows, COLUMNS, picture)
    return int(failed)


def picture(rows: Sequence[dict[str, Any]], title: str) -> Any:
    """Milliseconds for an image by method: implementations with one segment, and the sweep's steps."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = results.figure_of(3.4 * len(methods), 3.4)
    for column, method in enumerate(methods):
        axes = figure.add_subplot(1, len(methods), column + 1)
        shown = [row for row in rows if row["method"] == method]
        names = [f"{row['way']}, {row['segments']} x {row['images'] // row['segments']}" for row in shown]
        colours = ["tab:orange" if row["way"] == "engine" else "tab:grey" for row in shown]
        axes.barh(range(len(shown)), [row["ms"] / row["images"] for row in shown], color=colours, tick_label=names)
        axes.invert_yaxis()
        axes.set_title(method)
        axes.set_xlabel("ms an image and iteration")
    figure.suptitle(title, fontsize=9)
    return figure


if __name__ == "__main__":
    sys.exit(main())
