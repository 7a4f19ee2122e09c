"""Time and peak memory of an iteration: the engine's step against the plain loop and that loop vectorised and compiled.

python bench/step.py                                # the paper's four methods, batch 100 at 224 x 224 (10 on a CPU)
python bench/step.py --sweep                        # then the engine at 1 to 32 segments of 10 and of 100
python bench/step.py --quick                        # tiny sizes, to try the bench itself
python bench/step.py --methods sre2l++_fd2 --json FILE

Implementations, all in one process, their iterations taken in turns:
plain     fd2fast.reference.loop: hooks, one sample after the other, fp32 (as the published code)
rival     the same losses vectorised, channels_last, autocast, torch.compile, on a GPU one CUDA graph for the iteration
engine    fd2fast.step.GroupedStep
Before anything is timed, each is compared with the plain loop (bench/gate.py). Nothing is printed for a case that disagrees.

Times are medians with 10 and 90 % quantiles at steady state: CUDA events on a GPU, the wall clock on a CPU. Peak memory is
what an iteration allocates at most, on a GPU. `limit` is the convolutions' forward and input gradient at the rate of the best
matrix product measured in the same process.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import results
import timing
import torch
import tyro
from cases import PAPER_METHODS, POOL, Case, make_case, make_teacher, teachers_of
from gate import DisagreementError, Reference, check, settle_reference_arithmetic
from ways import AUTOCAST, Engine, Losses, Plain, Rival

from fd2fast.device import pick_device
from fd2fast.memory import is_out_of_memory
from fd2fast.models.fused import FusedTeacher, fuse
from fd2fast.models.teacher import Teacher
from fd2fast.step import map_dtype

COLUMNS = ("method", "way", "segments", "images", "size", "precision", "ms", "ms 10%", "ms 90%", "images/s", "peak MB")
COLUMNS += ("limit ms", "of limit", "x plain", "x rival")


@dataclass(frozen=True)
class Options:
    """What to measure."""

    # Methods; the round robin ones take all of `pool`, the others `teacher`.
    methods: tuple[str, ...] = PAPER_METHODS
    # Backbone of single-teacher methods.
    teacher: str = "ResNet18"
    # Backbones of the others.
    pool: tuple[str, ...] = POOL
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
    # Turns of the implementations; each is one iteration with every teacher.
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


def case_of(method: str, options: Options, teachers: dict[str, Teacher], device: torch.device, rows: int) -> Case:
    """The method's segment with its own teachers."""
    chosen = [teachers[name] for name in teachers_of(method, options.teacher, options.pool)]
    precision = options.precision
    return make_case(method, chosen, rows=rows, priors=options.priors, precision=precision, device=device)


def fused_of(case: Case) -> list[FusedTeacher]:
    """The case's teachers in its precision."""
    return [fuse(t, map_dtype(case.config.precision, torch.float32)) for t in case.teachers]


def limit_ms(case: Case, device: torch.device) -> float:
    """Milliseconds of the convolutions alone at the best product's rate, mean over the teachers."""
    rate = timing.product_rate(AUTOCAST.get(case.config.precision, torch.float32), device)
    flops = [timing.convolution_flops(t.backbone, case.initial) * case.rows for t in case.teachers]
    return 1e3 * statistics.mean(flops) / rate


def checked(case: Case, fused: list[FusedTeacher]) -> dict[str, float]:
    """DisagreementError unless rival and engine compute what the plain loop computes; the errors for the record."""
    precision, reference, found = case.config.precision, Reference(case), {}
    exact = [fuse(t, torch.float32) for t in case.teachers]

    used = ["fp32", precision] if precision in AUTOCAST else ["fp32"]
    for arithmetic in used:
        teachers = exact if arithmetic == "fp32" else fused
        errors = {
            "rival": reference.errors_of(functools.partial(Rival, losses=Losses(case, precision=arithmetic))),
            "engine": reference.errors_of(lambda c, a=arithmetic, t=teachers: Engine(c, t, precision=a)),
        }
        check("rival", errors["rival"], arithmetic)
        check("engine", errors["engine"], arithmetic, errors["rival"] if arithmetic in AUTOCAST else None)
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
    case = case_of(method, options, teachers, device, options.rows)
    precision, period, fused = case.config.precision, len(case.teachers), fused_of(case)
    errors = checked(case, fused)
    losses = Losses(case, precision=precision, compile=options.compile)
    makers: dict[str, Callable[[], timing.Run]] = {
        "plain": lambda: Plain(case),
        "rival": lambda: Rival(case, losses, graph=options.compile),
        "engine": lambda: Engine(case, fused, precision=precision),
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
        if device.type == "cuda":  # one implementation at a time, the others gone
            row["peak MB"] = round(timing.peak_memory(makers[way], period, device)[0] or 0.0, 1)
        rows.append({**row, **{k: v for k, v in errors.items() if k.startswith(way)}})
    return rows


def sweep(method: str, options: Options, teachers: dict[str, Teacher], device: torch.device) -> list[dict[str, Any]]:
    """The engine alone: several segments of 10 and 100 rows in one step; ends where the memory does."""
    found = []
    for rows in (options.rows,) if options.quick else (10, 100):
        case = case_of(method, options, teachers, device, rows)
        precision, period, fused = case.config.precision, len(case.teachers), fused_of(case)
        limit = limit_ms(case, device)
        for segments in (1, 2) if options.quick else (1, 2, 4, 8, 16, 32):
            try:
                run = Engine(case, fused, precision=precision, segments=segments)
                times = timing.interleaved({"engine": run}, options.repetitions, period, device)["engine"]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                break
            if not times:
                break
            base = {"method": method, "segments": segments, "images": rows * segments, "size": options.size}
            row = row_of("engine", times, {**base, "precision": precision, "limit ms": round(limit * segments, 3)})
            if device.type == "cuda":
                del run
                make = functools.partial(Engine, case, fused, precision=precision, segments=segments)
                row["peak MB"] = round(timing.peak_memory(make, period, device)[0] or 0.0, 1)
            found.append(row)
            if device.type == "cpu" and segments * rows >= 40:
                break
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Print and write the rows, then the table; 1 where a case disagrees with the plain loop."""
    given = tyro.cli(Options, args=arguments, description=__doc__)
    options = given.settled()
    device = pick_device(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    settle_reference_arithmetic()
    names = {name for method in options.methods for name in teachers_of(method, options.teacher, options.pool)}
    teachers = {
        name: make_teacher(name, classes=options.classes, size=options.size, device=device) for name in sorted(names)
    }
    place, rows, failed = results.about(device, "step", arguments), [], False
    for method in options.methods:
        try:
            found = measure(method, options, teachers, device)
        except DisagreementError as error:
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
    print(results.markdown(rows, COLUMNS))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
