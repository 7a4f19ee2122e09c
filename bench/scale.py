"""Cost per image against classes, IPC, group size, step size, prototypes and processes: measured steps, the whole by the plan.

fd2fast bench scale                      # CUB-200-2011's work and up to ImageNet-21K's on a GPU, a reduced one on a CPU
fd2fast bench scale --parts step group   # only these

Parts:
step       one step of 1, 2, 4 … segments: ms for an image and iteration
group      the similarity term with 0 … N_S - 1 earlier images (App. Table 5: mean over the slots of a group)
classes    classifier and prototypes of 10 … 21,841 classes (K x D) in one step of the same images
plan       data sets of 10 … 21,841 classes, IPC 1 … 50: planner time, host memory of the plan, steps; seconds for an image
processes  the same plan shared out over 1 … 64 processes, step by step, wave by wave

Times of a step are measured (engine, steady state, turns of all sizes). Those of a whole data set are computed: the plan's
steps, each at the measured time of its size and slot and with the measured surcharge for the data set's classes, and are
marked `computed`. host MB: the plan's own arrays.
"""

from __future__ import annotations

import dataclasses
import heapq
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from bench import results, timing
from bench.cases import check_method, make_case, make_teacher
from bench.ways import FusedStep, fused_of
from fd2fast.distillation.memory import is_out_of_memory
from fd2fast.distillation.planner import Plan, make_plan
from fd2fast.errors import UserError
from fd2fast.methods import METHODS
from fd2fast.system.device import pick_device

PARTS = ("step", "group", "classes", "plan", "processes")
PAPER_SECONDS = {2: 1708.3, 3: 1709.0, 4: 1713.1, 5: 1739.4}  # App. Table 5, for an image id of all 200 classes
COLUMNS = (
    "case",
    "classes",
    "ipc",
    "group size",
    "segments",
    "images",
    "priors",
    "processes",
    "ms",
    "ms 10%",
    "ms 90%",
)
COLUMNS += (
    "us an image",
    "steps",
    "planner ms",
    "host MB",
    "s an image",
    "hours",
    "x 1 process",
    "computed",
    "paper s",
    "note",
)


@dataclass(frozen=True)
class Options:
    """What to measure; 0: the paper's work on a GPU, a reduced one on a CPU."""

    # Parts: step, group, classes, plan, processes.
    parts: tuple[str, ...] = PARTS
    # Method.
    method: str = "sre2l++_fd2"
    # Backbone.
    teacher: str = "ResNet18"
    # Classes of one segment.
    rows: int = 0
    # Side of the images, pixels.
    size: int = 0
    # Most segments in one step.
    segments: int = 0
    # Iterations of a step, for the computed times.
    iterations: int = 4000
    # Largest number of classes whose prototypes are measured.
    most_classes: int = 21841
    # Arithmetic.
    precision: str = "auto"
    # Turns of the measured sizes.
    rounds: int = 0
    # Folder for the JSON, Markdown and PNG files.
    out: Path = results.ROOT / "bench" / "results"
    # Threads on a CPU; 0: torch's own choice.
    threads: int = 0
    # Device.
    device: str = "auto"
    # Tiny sizes, to try the bench itself.
    quick: bool = False

    def settled(self, device: torch.device) -> Options:
        """Without open fields. Raises UserError for values out of range."""
        gpu = device.type == "cuda"
        default: dict[str, Any] = {"rows": 100, "size": 224, "segments": 16, "rounds": 50} if gpu else {}
        default = default or {"rows": 10, "size": 64, "segments": 8, "rounds": 7}
        if self.quick:
            default = {"rows": 4, "size": 32, "segments": 2, "rounds": 2}
        changes = {name: value for name, value in default.items() if not getattr(self, name)}
        if self.quick and self.teacher == "ResNet18":
            changes["teacher"] = "timm:test_resnet"
        found = dataclasses.replace(self, **changes)
        for name in ("rows", "size", "segments", "rounds", "iterations", "most_classes"):
            if getattr(found, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(found, name)}")
        unknown = [part for part in found.parts if part not in PARTS]
        if unknown:
            raise UserError(f"unknown part {unknown[0]!r}; wanted some of {', '.join(PARTS)}")
        check_method(found.method)
        if METHODS[found.method].least > 1:
            raise UserError(f"{found.method} takes several teachers; this bench measures one: sre2l++_fd2, say")
        if not found.method.endswith("_fd2") and "group" in found.parts:
            raise UserError(f"part group needs a method with FD2's similarity term, {found.method} has none")
        return found


@dataclass(frozen=True)
class Cost:
    """Milliseconds of a step's iteration: a straight line through the measured ones, and surcharges of a segment."""

    fixed: float
    segment: float
    slot: float  # more for each earlier image of a segment's classes
    base: int = 0  # classes of the teacher that the line was measured with
    per_class: float = 0.0  # more for each further class

    def ms(self, segments: float, slot: int, classes: int | None = None) -> float:
        """Of one step of so many segments; classes: of the data set, those measured with without."""
        more = 0 if classes is None else classes - self.base
        return self.fixed + segments * max(0.0, self.segment + slot * self.slot + more * self.per_class)


def measured(
    options: Options, device: torch.device, points: Sequence[tuple[int, int, int]]
) -> dict[tuple[int, int, int], list[float]]:
    """Times of engine iterations for (classes, segments, priors), taking turns; empty where the memory ends."""
    runs, by_classes = {}, {}
    for point in points:
        classes, segments, priors = point
        try:
            if classes not in by_classes:
                by_classes.clear()  # one set of large prototypes at a time
                teacher = make_teacher(options.teacher, classes=classes, size=options.size, device=device)
                by_classes[classes] = teacher
            case = make_case(
                options.method,
                [by_classes[classes]],
                rows=min(options.rows, classes),
                priors=priors,
                precision=options.precision,
                device=device,
            )
            precision = case.config.precision
            fused = fused_of([by_classes[classes]], precision, case.rows)
            runs[point] = FusedStep(case, fused, precision=precision, segments=segments)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
    named = {str(point): run for point, run in runs.items()}
    times = timing.interleaved(named, options.rounds, 4, device)
    return {point: times.get(str(point), []) for point in points}


def row_of(case: str, values: Sequence[float], images: int, **rest: Any) -> dict[str, Any]:
    """A measured row, or one that says why it is not."""
    if not values:
        return {"case": case, "images": images, **rest, "note": "out of memory"}
    low, middle, high = timing.quantiles(values)
    row = {
        "case": case,
        "images": images,
        **rest,
        "ms": round(middle, 3),
        "ms 10%": round(low, 3),
        "ms 90%": round(high, 3),
    }
    return {**row, "us an image": round(1e3 * middle / images, 2)}


def step_sizes(most: int) -> list[int]:
    """1, 2, 4 … most."""
    return sorted({min(most, 1 << n) for n in range(most.bit_length() + 1)})


def cost_of(
    steps: Mapping[int, float], slots: Mapping[int, float], classes: Mapping[int, float] | None = None, base: int = 0
) -> Cost:
    """steps: ms by segments without priors; slots: ms of one segment by priors; classes: by classes. Least squares.

    base: the classes that steps and slots were measured with.
    """
    if len(steps) == 1:
        ((count, ms),) = steps.items()
        fixed, segment = 0.0, ms / count
    else:
        segment, fixed = statistics.linear_regression(list(steps), list(steps.values()))
    slot = statistics.linear_regression(list(slots), list(slots.values())).slope if len(slots) > 1 else 0.0
    classes = classes or {}
    per_class = statistics.linear_regression(list(classes), list(classes.values())).slope if len(classes) > 1 else 0.0
    return Cost(max(0.0, fixed), segment, max(0.0, slot), base, max(0.0, per_class))


def seconds_of(plan: Plan, cost: Cost, iterations: int, processes: int = 1) -> float:
    """Wall time of a plan: in each wave a free process takes the next step, and the next wave waits for the last one."""
    total = 0.0
    for wave in range(plan.n_waves):
        free = [0.0] * processes
        for step in plan.steps():
            if step.wave == wave:
                # one with a short last block counts as its share of a full segment
                share = int(plan.rows(step.segments)[-1]) / plan.segment_size
                took = cost.ms(share, wave, plan.classes)
                heapq.heapreplace(free, free[0] + took * iterations / 1e3)
        total += max(free)
    return total


def plan_row(classes: int, ipc: int, group: int, options: Options, cost: Cost) -> tuple[dict[str, Any], Plan]:
    """Planner time and memory, and the computed cost of a data set."""
    rows = min(options.rows, classes)
    settings = {"group_size": group, "segment_size": rows, "segments_per_step": options.segments}
    begin = time.perf_counter()
    plan = make_plan(classes, ipc, **settings)
    planned = 1e3 * (time.perf_counter() - begin)
    held = sum(value.nbytes for value in vars(plan).values() if isinstance(value, np.ndarray))
    seconds = seconds_of(plan, cost, options.iterations)
    row = {"case": "plan", "classes": classes, "ipc": ipc, "group size": group, "segments": options.segments}
    row |= {"steps": plan.n_steps, "planner ms": round(planned, 2), "host MB": round(held / 1e6, 3)}
    row |= {"s an image": round(seconds / (classes * ipc), 4), "hours": round(seconds / 3600, 3), "computed": "yes"}
    return row, plan


def measure(options: Options, device: torch.device) -> list[dict[str, Any]]:
    """All parts that were asked for."""
    base, rows = max(options.rows, 2), []
    sizes, group = step_sizes(options.segments), range(4)
    needed = [(base, n, 0) for n in sizes] + [(base, 1, priors) for priors in group if options.method.endswith("_fd2")]
    times = measured(options, device, list(dict.fromkeys(needed)))
    if "step" in options.parts:
        for n in sizes:
            rows.append(row_of("step", times[base, n, 0], options.rows * n, classes=base, segments=n, priors=0))
    steps = {n: statistics.median(times[base, n, 0]) for n in sizes if times[base, n, 0]}
    slots = {p: statistics.median(times[base, 1, p]) for p in group if times.get((base, 1, p))}
    if not steps:
        raise UserError(f"not even one segment of {options.rows} images of {options.size} pixels fits the memory")
    by_classes: dict[int, list[float]] = {}
    if {"classes", "plan", "processes"} & set(options.parts):
        counts = [k for k in (10, 100, 200, 1000, 5000, 21841) if base <= k <= max(base, options.most_classes)]
        by_classes = {k: measured(options, device, [(k, 1, 0)])[k, 1, 0] for k in counts}
    cost = cost_of(steps, slots, {k: statistics.median(v) for k, v in by_classes.items() if v}, base)
    if "group" in options.parts:
        for p in group:
            rows.append(row_of("group", times[base, 1, p], options.rows, classes=base, segments=1, priors=p))
        for n_s in (1, 2, 3, 4, 5):
            mean = statistics.mean(cost.ms(1, slot) for slot in range(n_s))
            row = {
                "case": "group, mean of slots",
                "group size": n_s,
                "images": options.rows,
                "ms": round(mean, 3),
                "computed": "yes",
            }
            if options.rows == 100 and options.size == 224 and n_s in PAPER_SECONDS:
                row["paper s"] = PAPER_SECONDS[n_s]
            rows.append(row)
    if "classes" in options.parts:
        for k, found in by_classes.items():
            rows.append(row_of("classes", found, min(options.rows, k), classes=k, segments=1, priors=0))
    for part in ("plan", "processes"):
        if part not in options.parts:
            continue
        for classes, ipc in ((10, 50), (100, 5), (200, 1), (200, 5), (1000, 50), (21841, 1), (21841, 50)):
            row, plan = plan_row(classes, ipc, 4, options, cost)
            if part == "plan":
                rows.append(row)
                continue
            alone = seconds_of(plan, cost, options.iterations)
            for processes in (1, 2, 4, 8, 16, 64):
                took = seconds_of(plan, cost, options.iterations, processes)
                rows.append(
                    {
                        "case": "processes",
                        "classes": classes,
                        "ipc": ipc,
                        "processes": processes,
                        "hours": round(took / 3600, 3),
                    }
                    | {"x 1 process": round(alone / took, 2), "steps": plan.n_steps, "computed": "yes"}
                )
    return rows


def picture(rows: Sequence[Mapping[str, Any]], title: str) -> Any:
    """Cost per image against the step's size, the earlier images and the classes; speed-up against processes."""
    figure = results.figure_of(12.5, 3)
    panels = (
        ("step", "segments", "us an image", "segments in a step"),
        ("group", "priors", "us an image", "earlier images of the class"),
        ("classes", "classes", "us an image", "classes (prototypes)"),
        ("processes", "processes", "x 1 process", "processes (computed)"),
    )
    for place, (case, x, y, label) in enumerate(panels):
        axes = figure.add_subplot(1, 4, place + 1)
        shown = [row for row in rows if row["case"] == case and y in row]
        for name in dict.fromkeys((row.get("ipc"), row["classes"] if case == "processes" else None) for row in shown):
            line = [r for r in shown if (r.get("ipc"), r["classes"] if case == "processes" else None) == name]
            text = f"{name[1]} x {name[0]}" if case == "processes" else None
            axes.plot([r[x] for r in line], [r[y] for r in line], marker="o", label=text)
        if case in ("classes", "processes"):
            axes.set_xscale("log")
        if case == "processes":
            axes.set_yscale("log")
        if case == "processes" and shown:
            axes.legend(fontsize=6)
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(label)
        axes.set_ylabel("µs an image and iteration" if y == "us an image" else "times one process")
    figure.suptitle(title, fontsize=9)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the files, print the table; 2 for bad arguments."""
    try:
        given = tyro.cli(Options, args=arguments, description=__doc__, prog="fd2fast bench scale")
        device = pick_device(given.device)
        options = given.settled(device)
        timing.use_threads(options.threads)
        results.prepare(options.out)
        place = results.about(device, "scale", arguments)
        place["work"] = (
            f"{options.method}, {options.teacher}, segments of {options.rows} images of {options.size}², random weights"
        )
        place["work"] += f"; computed for {options.iterations} iterations"
        rows = measure(options, device)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results.publish(options.out, place, rows, COLUMNS, picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
