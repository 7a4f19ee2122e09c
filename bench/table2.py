"""The paper's table of time per iteration and peak memory, measured, with the strongest rivals in it.

fd2fast bench table2                           # the paper's work on a GPU (under 8 minutes), a reduced one on a CPU (5 to 10)
fd2fast bench table2 --methods sre2l++_fd2     # one column of the paper's table
fd2fast bench table2 --dataset runs/cub/dataset --teachers-from runs/cub/teachers --out results

The paper's work (App. Table 2, CUB-200-2011, IPC 1): segments of 100 classes of 200, 224 x 224, one ResNet-18, or four
teachers in turns (FADRM+). Weights and images are random unless they are given: time and memory do not depend on them.
IPC 1 has no earlier images, so no similarity term; --priors N gives each image N of them.

Rows, each with what it adds to the one before:
plain        fd2fast.reference.loop: hooks, one sample after the other, fp32 (TF32 convolutions on a GPU, torch's default)
vectorised   the same losses on whole tensors
bf16         channels_last and autocast
compiled     torch.compile of the whole loss
graph        one CUDA graph an iteration (GPU only)
engine       fd2fast, one segment in a step
engine, all  fd2fast, all classes' segments in one step; its time is given for one segment's share

Before anything is timed a row's first gradient, loss terms and the images after a few iterations are compared with the plain
loop's in fp32 (bench/gate.py); a row that disagrees gets no time. Columns: `paper ms` the paper's number; `first 5 ms` the
paper's protocol (mean of the first 5 iterations of a fresh run on the host's clock, unsynchronised; code was compiled for
the check before); `ms` median, with
10 and 90 % quantiles, at steady state, all rows taking turns; `x rival` the median over the turns of the fastest rival's time
over the row's; `of limit` the time that the work takes at the device's best rates (direct convolutions at the best measured
matrix product, or bytes at the best measured copy, whichever is more) over the row's: above 1 where Winograd's algorithm, which
has a quarter of the products of a 3 x 3 convolution, does better than any direct one can; `peak MB` what the row holds at most,
its teachers' weights included, as torch allocates it (the paper's GB likewise), `reserved MB` what torch takes from the device
for it.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from bench import results, timing
from bench.cases import PAPER_METHODS, POOL, Case, check_method, make_case, make_teacher, teachers_of
from bench.gate import LIMITS, DisagreementError, Errors, Reference, check, settle_reference_arithmetic
from bench.ways import AUTOCAST, FusedStep, Losses, Plain, Rival, fused_of
from fd2fast.distillation.memory import is_out_of_memory
from fd2fast.errors import UserError
from fd2fast.models.fused import FusedTeacher
from fd2fast.models.teacher import Teacher, load_teacher
from fd2fast.system.device import pick_device

PAPER = {"sre2l++": (64.6, 4.8), "sre2l++_fd2": (96.8, 5.3), "fadrm+": (88.9, 12.2), "fadrm+_fd2": (134.8, 14.1)}
RIVALS = ("plain", "vectorised", "bf16", "compiled", "graph")
WAYS = (*RIVALS, "engine", "engine, all")
COLUMNS = (
    "method",
    "way",
    "precision",
    "images",
    "paper ms",
    "first 5 ms",
    "ms",
    "ms 10%",
    "ms 90%",
    "images/s",
    "x plain",
)
COLUMNS += ("x rival", "of limit", "paper GB", "peak MB", "reserved MB", "note")


@dataclass(frozen=True)
class Options:
    """What to measure; 0 or "auto": the paper's work on a GPU, a reduced one on a CPU."""

    # Methods.
    methods: tuple[str, ...] = PAPER_METHODS
    # Rows: plain, vectorised, bf16, compiled, graph, engine, "engine, all".
    ways: tuple[str, ...] = WAYS
    # Backbone of single-teacher methods.
    teacher: str = "ResNet18"
    # Backbones of the others, in turns.
    pool: tuple[str, ...] = ()
    # Classes of the data set: all of them share the last row's step.
    classes: int = 0
    # Classes of one segment.
    rows: int = 0
    # Side of the images, pixels.
    size: int = 0
    # Earlier images of the same class for each image.
    priors: int = 0
    # Arithmetic of the rows after `vectorised`.
    precision: str = "auto"
    # Turns at steady state, each one iteration with every teacher; 0: 200 iterations on a GPU, 10 turns on a CPU.
    rounds: int = 0
    # Folder of a data set made by `fd2fast datasets`: its training images are the initial ones.
    dataset: Path | None = None
    # Folder of teachers made by `fd2fast pretrain`, by the names of `teacher` and `pool`.
    teachers_from: Path | None = None
    # Folder for the JSON, Markdown and PNG files.
    out: Path = results.ROOT / "bench" / "results"
    # Threads on a CPU; 0: torch's own choice.
    threads: int = 0
    # Device: auto, cpu, cuda, cuda:N.
    device: str = "auto"
    # Tiny sizes, to try the bench itself.
    quick: bool = False

    def settled(self, device: torch.device) -> Options:
        """Without open fields. Raises UserError for values out of range."""
        gpu = device.type == "cuda"
        default = {
            "pool": POOL if gpu else ("ResNet18", "MobileNetV2"),
            "classes": 200 if gpu else 20,
            "rows": 100 if gpu else 10,
            "size": 224 if gpu else 112,
        }
        if self.quick:
            default = {
                "pool": ("timm:test_resnet", "timm:test_efficientnet"),
                "classes": 8,
                "rows": 4,
                "size": 32,
                "rounds": 2,
            }
        changes: dict[str, Any] = {name: value for name, value in default.items() if not getattr(self, name)}
        if self.quick and self.teacher == "ResNet18":
            changes["teacher"] = "timm:test_resnet"
        found = dataclasses.replace(self, **changes)
        for name in ("classes", "rows", "size"):
            if getattr(found, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(found, name)}")
        if found.rounds < 0:
            raise UserError(f"rounds must be 0 or more, got {found.rounds}")
        if found.classes % found.rows:
            raise UserError(f"classes must be a multiple of the {found.rows} rows of a segment, got {found.classes}")
        if found.priors < 0:
            raise UserError(f"priors must be 0 or more, got {found.priors}")
        if found.precision not in ("auto", *LIMITS):
            raise UserError(f"precision must be auto, {', '.join(LIMITS)}, got {found.precision}")
        for method in found.methods:
            check_method(method)
        for way in found.ways:
            if way not in WAYS:
                raise UserError(f"unknown way {way!r}; wanted some of {', '.join(WAYS)}")
        return found


def makers(case: Case, fused: list[FusedTeacher], exact: list[FusedTeacher], all_segments: int) -> dict[str, Any]:
    """Each row's implementation for a case; `exact`: in fp32, for the check of the engine."""
    precision = case.config.precision
    plain = functools.cache(lambda: Losses(case, precision="fp32", channels_last=False))
    half = functools.cache(lambda: Losses(case, precision=precision))
    compiled = functools.cache(lambda: Losses(case, precision=precision, compile=True))
    return {
        "plain": lambda c: Plain(c),
        "vectorised": lambda c: Rival(c, plain()),
        "bf16": lambda c: Rival(c, half()),
        "compiled": lambda c: Rival(c, compiled()),
        "graph": lambda c: Rival(c, compiled(), graph=True),
        "engine": lambda c: FusedStep(c, fused, precision=precision),
        "engine, all": lambda c: FusedStep(c, fused, precision=precision, segments=all_segments),
        "engine in fp32": lambda c: FusedStep(c, exact, precision="fp32"),
    }


def measure(
    method: str, options: Options, teachers: dict[str, Teacher], device: torch.device, images: Any
) -> list[dict[str, Any]]:
    """The rows of one method."""
    chosen = [teachers[name] for name in teachers_of(method, options.teacher, options.pool)]
    case = make_case(
        method,
        chosen,
        rows=options.rows,
        priors=options.priors,
        precision=options.precision,
        device=device,
        images=images,
    )
    precision, gpu, period = case.config.precision, device.type == "cuda", len(chosen)
    torch._dynamo.reset()  # compiled code of other methods counts against its limit
    fused = fused_of(case.teachers, precision, case.rows)
    segments = options.classes // options.rows
    make = makers(case, fused, fused_of(case.teachers, "fp32", case.rows), segments)
    arithmetic = {"plain": "fp32", "vectorised": "fp32"}

    rows: dict[str, dict[str, Any]] = {}
    for way in options.ways:
        count = case.rows * (segments if way == "engine, all" else 1)
        rows[way] = {"method": method, "way": way, "precision": arithmetic.get(way, precision), "images": count}
        rows[way] |= {"size": options.size, "teachers": [t.name for t in chosen], "priors": options.priors}
        rows[way] |= {"paper ms": PAPER[method][0], "paper GB": PAPER[method][1]} if method in PAPER else {}
    if not gpu and "graph" in rows:
        rows["graph"]["note"] = "needs a GPU"

    _gate(rows, make, case)
    # torch's defaults from here on: TF32 in convolutions, not in products
    torch.backends.cudnn.allow_tf32 = True
    runs: dict[str, timing.Run] = {}
    for way, row in rows.items():
        if "note" not in row:
            try:
                runs[way] = make[way](case)
                row["first 5 ms"] = round(timing.first_five(runs[way]) / (segments if way == "engine, all" else 1), 3)
            except (RuntimeError, MemoryError) as error:
                _no_memory(row, error)
                runs.pop(way, None)
    rounds = options.rounds or (-(-200 // period) if gpu else 10)
    times = timing.interleaved(runs, rounds, period, device)
    runs.clear()
    _fill(rows, times, options, case, device, segments)
    for way, row in rows.items():
        if "ms" in row and not (device.type == "cpu" and way in ("compiled", "graph")):
            gc.collect()
            try:
                peak, reserved = timing.peak_memory(functools.partial(make[way], case), period, device)
                peak += timing.weight_bytes(fused if way.startswith("engine") else case.teachers) / 1e6
                row |= {"peak MB": round(peak, 1), "reserved MB": reserved and round(reserved, 1)} if peak else {}
            except (RuntimeError, MemoryError) as error:
                _no_memory(row, error)
    settle_reference_arithmetic()
    return list(rows.values())


def _gate(rows: dict[str, dict[str, Any]], make: dict[str, Any], case: Case) -> None:
    """Compare every row with the plain loop; a row that disagrees gets a note in place of times."""
    settle_reference_arithmetic()
    precision = case.config.precision
    try:
        reference = Reference(case)
    except (RuntimeError, MemoryError) as error:
        for way, row in rows.items():
            _no_memory(row, error)
            if way != "plain":
                row["note"] = "no time: not checked, the plain loop runs out of memory"
        return
    known: dict[str, Errors] = {}
    for way, row in rows.items():
        if way == "plain" or "note" in row:
            continue
        try:
            if way.startswith("engine"):
                if "exact" not in known:
                    known["exact"] = reference.errors_of(make["engine in fp32"])
                check("engine", known["exact"], "fp32", rounding=reference.rounding)
            # a graph has no gradient to look at before the first update: the uncaptured code is the same
            code = "compiled" if way == "graph" else way
            if code not in known:
                known[code] = reference.errors_of(make[code])
            if way == "graph":
                known[way] = dataclasses.replace(known[code], images=reference.images_error_of(make[way]))
            used = "fp32" if way == "vectorised" else precision
            peer = known.get("bf16") if way.startswith("engine") and used in AUTOCAST else None
            check(way, known[way], used, peer, reference.rounding)
            row |= known[way].record(way)
        except DisagreementError as error:
            row["note"] = f"no time: {error}"
        except (RuntimeError, MemoryError) as error:
            _no_memory(row, error)


def _no_memory(row: dict[str, Any], error: BaseException) -> None:
    if not is_out_of_memory(error):
        raise error
    row["note"] = "out of memory"
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _fill(
    rows: dict[str, dict[str, Any]],
    times: dict[str, list[float]],
    options: Options,
    case: Case,
    device: torch.device,
    segments: int,
) -> None:
    """Times, ratios and the share of the limit. Times are of one segment: a step of several is divided by their number."""
    for way in times:
        if not times[way] and "note" not in rows[way]:
            rows[way]["note"] = "out of memory"
    share = {way: [t / (segments if way == "engine, all" else 1) for t in values] for way, values in times.items()}
    medians = {way: statistics.median(values) for way, values in share.items() if values}
    rivals = [way for way in RIVALS if way in medians]
    best = min(rivals, key=lambda way: medians[way]) if rivals else None
    for way, values in share.items():
        if not values:
            continue
        row, precision = rows[way], rows[way]["precision"]
        low, middle, high = timing.quantiles(values)
        limit = least_ms(case, precision, device)
        row |= {"ms": round(middle, 3), "ms 10%": round(low, 3), "ms 90%": round(high, 3), "rounds": len(values)}
        row |= {
            "images/s": round(1e3 * case.rows / middle, 1),
            "limit ms": round(limit, 3),
            "of limit": round(limit / middle, 3),
        }
        if share.get("plain"):
            row["x plain"] = round(timing.ratio(share["plain"], values), 2)
        if best is not None:
            row |= {"x rival": round(timing.ratio(share[best], values), 2), "strongest rival": best}


def least_ms(case: Case, precision: str, device: torch.device) -> float:
    """Milliseconds that direct convolutions or the bytes take at the device's best rates, mean over the teachers: the more."""
    dtype = AUTOCAST.get(precision, torch.float32)
    found = []
    for teacher in case.teachers:
        flops = timing.convolution_flops(teacher.backbone, case.initial) * case.rows
        moved = timing.traffic_elements(teacher.backbone, case.initial) * case.rows * dtype.itemsize
        moved += 12 * case.initial.numel() * 4  # images, moments and gradients through view, adjoint and Adam, in fp32
        found.append(max(flops / timing.best_rate(dtype, device), moved / timing.copy_rate(device)))
    return 1e3 * statistics.mean(found)


def ceilings(device: torch.device, teachers: dict[str, Teacher], options: Options, precision: str) -> dict[str, Any]:
    """What `of limit` is made of: the device's measured rates, and FLOPs and elements moved by each teacher."""
    image = torch.zeros(1, 3, options.size, options.size, device=device)
    work = {
        name: {
            "GFLOP an image": round(timing.convolution_flops(teacher.backbone, image) / 1e9, 3),
            "M elements moved an image": round(timing.traffic_elements(teacher.backbone, image) / 1e6, 2),
        }
        for name, teacher in teachers.items()
    }
    # on a CPU not of a type that no row used: one without bf16 products emulates them, at a second each
    names = dict.fromkeys(["fp32", precision] if device.type == "cpu" else ["fp32", "bf16"])
    dtypes = {name: AUTOCAST.get(name, torch.float32) for name in names}
    rates = {name: round(timing.product_rate(dtype, device) / 1e12, 3) for name, dtype in dtypes.items()}
    return {
        "GB/s of a copy": round(timing.copy_rate(device) / 1e9, 1),
        "TFLOP/s of a product": rates,
        "teachers": work,
        "clocks after": results.clocks(device),
    }


def picture(rows: Sequence[dict[str, Any]], title: str) -> Any:
    """Bars of the times by method, the paper's number as a line where the work is the paper's."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure = results.figure_of(3.4 * len(methods), 3.4)
    for column, method in enumerate(methods):
        axes = figure.add_subplot(1, len(methods), column + 1)
        shown = [row for row in rows if row["method"] == method and "ms" in row]
        names = [row["way"] for row in shown]
        colours = ["tab:orange" if name.startswith("engine") else "tab:grey" for name in names]
        middles = [row["ms"] for row in shown]
        spread = [[row["ms"] - row["ms 10%"] for row in shown], [row["ms 90%"] - row["ms"] for row in shown]]
        axes.barh(names, middles, xerr=spread, color=colours)
        for place, row in enumerate(shown):
            axes.text(row["ms 90%"], place, f" {row['ms']:.3g}", va="center", fontsize=8)
        axes.invert_yaxis()
        axes.set_title(method)
        axes.set_xlabel("ms per iteration of one segment")
        axes.set_xlim(0, 1.25 * max(middles, default=1))
    figure.suptitle(title, fontsize=9)
    return figure


def given_teachers(options: Options, device: torch.device) -> dict[str, Teacher]:
    """Random ones of the sizes wanted, or those of a run."""
    from fd2fast import artifacts
    from fd2fast.entries import folder_name

    names = {name for method in options.methods for name in teachers_of(method, options.teacher, options.pool)}
    if options.teachers_from is None:
        return {
            name: make_teacher(name, classes=options.classes, size=options.size, device=device)
            for name in sorted(names)
        }
    loaded = {
        name: load_teacher(
            artifacts.TeacherArtifact.load(options.teachers_from / folder_name(name)), device, torch.float32
        )
        for name in sorted(names)
    }
    for name, teacher in loaded.items():
        if (teacher.size, teacher.classes) != (options.size, options.classes):
            raise UserError(
                f"teacher {name} is for {teacher.classes} classes of {teacher.size} pixels, this bench for "
                f"{options.classes} of {options.size}: give --classes and --size"
            )
    return loaded


def given_images(options: Options) -> Any:
    """The first training image of each class of one segment, normalised; None for random ones."""
    if options.dataset is None:
        return None
    from fd2fast import artifacts
    from fd2fast.data.pixels import normalise
    from fd2fast.data.store import load_split

    dataset = artifacts.Dataset.load(options.dataset)
    if dataset.size != options.size or len(dataset.classes) < options.rows:
        raise UserError(
            f"{dataset.path} has {len(dataset.classes)} classes of {dataset.size} pixels, wanted at least {options.rows} "
            f"of {options.size}: give --size and --rows"
        )
    train = load_split(dataset, "train")
    pixels = train.pixels([int(train.of_class(k)[0]) for k in range(options.rows)])
    return normalise(pixels, dataset.mean, dataset.std, torch.float32)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the files, print the table; 1 where a row disagrees with the plain loop, 2 for bad arguments."""
    try:
        given = tyro.cli(Options, args=arguments, description=__doc__, prog="fd2fast bench table2")
        device = pick_device(given.device)
        options = given.settled(device)
        timing.use_threads(options.threads)
        results.prepare(options.out)
        place = results.about(device, "table2", arguments)
        teachers, images = given_teachers(options, device), given_images(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    backbones = f"{options.teacher} or {', '.join(options.pool)}"
    work = f"{options.rows} images of {options.size}², {options.classes} classes, teachers {backbones}"
    place["work"] = (
        work + ("" if options.teachers_from else "; random weights") + ("" if options.dataset else "; random images")
    )
    rows: list[dict[str, Any]] = []
    for method in options.methods:
        print(f"{method} …", file=sys.stderr, flush=True)
        rows += measure(method, options, teachers, device, images)
        place |= ceilings(device, teachers, options, rows[-1]["precision"])
        # after each method, so that what was measured outlives a lease that ends
        path = results.save(options.out, place, rows, COLUMNS, picture)
    print(results.markdown(rows, COLUMNS))
    print(path)
    return int(any(str(row.get("note", "")).startswith("no time") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
