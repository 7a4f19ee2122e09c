"""Wall time of each stage end to end, and CUB-200-2011 at IPC 5 from measured steps against the paper's 1,713 s an id.

fd2fast bench pipeline                         # runs the main job (built-in typefaces, some minutes) and reads its manifests
fd2fast bench pipeline --run runs/typefaces    # reads a finished run
fd2fast bench pipeline --parts cub             # only the computed part

Stage times are what the manifests hold: seconds of the stage in all its starts, and its process's peak memory. The paper's
1,713.1 s (App. Table 5, N_S 4) are for one image of all 200 classes, taken there as two segments of 100 and 10,000 iterations
each. Ours: the engine's step of the same segments measured with 0 … 3 earlier images, times those iterations; on a CPU the step
is measured with fewer images and the time is taken in proportion, marked so.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from bench import results, timing
from bench.cases import make_case, make_teacher
from bench.ways import FusedStep, fused_of
from fd2fast import artifacts
from fd2fast.errors import UserError
from fd2fast.settings.config import replace
from fd2fast.settings.presets import preset
from fd2fast.system.device import pick_device

PAPER_SECONDS, PAPER_ITERATIONS, PAPER_SEGMENTS, PAPER_ROWS = 1713.1, 10_000, 2, 100
COLUMNS = ("case", "stage", "seconds", "peak MB", "processes", "priors", "images", "ms", "ms 10%", "ms 90%", "s an id")
COLUMNS += ("paper s an id", "x paper", "computed", "note")


@dataclass(frozen=True)
class Options:
    """What to measure."""

    # stages: of a run. cub: computed from steps.
    parts: tuple[str, ...] = ("stages", "cub")
    # Output folder of a finished `fd2fast run`; none: run the preset.
    run: Path | None = None
    # Preset that is run, resumed or read again.
    preset: str = "typefaces"
    # Where it is run.
    into: Path = Path("runs/bench-pipeline")
    # Images of the measured CUB segment; 0: 100 on a GPU, 5 on a CPU.
    rows: int = 0
    # Side of its images, pixels.
    size: int = 224
    # Backbone of its teacher.
    teacher: str = "ResNet18"
    # Turns of the measured steps; 0: 50 on a GPU, 5 on a CPU.
    rounds: int = 0
    # Folder for the JSON, Markdown and PNG files.
    out: Path = results.ROOT / "bench" / "results"
    # Device.
    device: str = "auto"

    def settled(self, device: torch.device) -> Options:
        """Without open fields. Raises UserError for values out of range."""
        gpu = device.type == "cuda"
        found = dataclasses.replace(
            self, rows=self.rows or (PAPER_ROWS if gpu else 5), rounds=self.rounds or (50 if gpu else 5)
        )
        for name in ("rows", "rounds", "size"):
            if getattr(found, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(found, name)}")
        for part in found.parts:
            if part not in ("stages", "cub"):
                raise UserError(f"unknown part {part!r}; wanted stages, cub or both")
        preset(found.preset)
        return found


def stages(options: Options) -> list[dict[str, Any]]:
    """One row for each artifact of the run, in the order they were finished."""
    folder = options.run
    if folder is None:
        from fd2fast import pipeline

        folder = options.into
        pipeline.run(replace(preset(options.preset), out=folder))
    if not (folder / "run.json").is_file():
        raise UserError(f"{folder} holds no finished run (run.json is missing): run fd2fast run --out {folder} first")
    found = [artifacts.load(path.parent) for path in folder.rglob(artifacts.MANIFEST)]
    found.sort(key=lambda a: (a.measured.get("finished", ""), str(a.path)))
    return [
        {
            "case": "stages",
            "stage": artifact.path.relative_to(folder).as_posix(),
            "kind": artifact.kind,
            "seconds": artifact.measured["seconds"],
            "peak MB": round(artifact.measured["peak_memory_bytes"] / 1e6, 1),
            "processes": artifact.measured.get("processes"),
        }
        for artifact in found
    ]


def cub(options: Options, device: torch.device) -> list[dict[str, Any]]:
    """The step at every slot of a group, and an image id's time at the paper's iterations: the mean over five ids (N_S 4)."""
    teacher = make_teacher(options.teacher, classes=200, size=options.size, device=device)
    runs: dict[str, timing.Run] = {}
    for priors in range(4):
        case = make_case("sre2l++_fd2", [teacher], rows=options.rows, priors=priors, precision="auto", device=device)
        precision = case.config.precision
        runs[str(priors)] = FusedStep(case, fused_of([teacher], precision, options.rows), precision=precision)
    times = timing.interleaved(runs, options.rounds, 2, device)
    exact = options.rows == PAPER_ROWS
    rows, medians = [], []
    for name, values in times.items():
        if not values:
            rows.append({"case": "cub", "stage": "step", "priors": int(name), "note": "out of memory"})
            continue
        low, middle, high = timing.quantiles(values)
        medians.append(middle)
        row = {"case": "cub", "stage": "step", "priors": int(name), "images": options.rows, "size": options.size}
        rows.append({**row, "ms": round(middle, 3), "ms 10%": round(low, 3), "ms 90%": round(high, 3)})
    if len(medians) < 4:
        return rows
    slots = [0, 1, 2, 3, 0]  # of five image ids in groups of four
    mean = statistics.mean(medians[slot] for slot in slots) * PAPER_ROWS / options.rows
    seconds = mean * PAPER_ITERATIONS * PAPER_SEGMENTS / 1e3
    row = {
        "case": "cub",
        "stage": "image id of 200 classes",
        "s an id": round(seconds, 1),
        "paper s an id": PAPER_SECONDS,
    }
    row |= {"x paper": round(PAPER_SECONDS / seconds, 2)}
    row |= {"computed": "from the step" if exact else f"from a step of {options.rows} images, in proportion"}
    return [*rows, row]


def picture(rows: Sequence[Mapping[str, Any]], title: str) -> Any:
    """Seconds of every stage."""
    shown = [row for row in rows if row["case"] == "stages"] or [row for row in rows if "ms" in row]
    names = [
        textwrap.shorten(row["stage"].replace("-", " "), 30, placeholder=" …")
        if row["case"] == "stages"
        else f"step, {row['priors']} earlier images"
        for row in shown
    ]
    values = [row["seconds"] if row["case"] == "stages" else row["ms"] / 1e3 for row in shown]
    figure = results.figure_of(8, 0.8 + 0.27 * len(shown))
    axes = figure.add_subplot()
    axes.barh(range(len(values)), values, tick_label=names)
    for place, value in enumerate(values):
        axes.text(value, place, f" {value:.3g}", va="center", fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15 * max(values, default=1))
    axes.set_xlabel("seconds")
    figure.suptitle(title, fontsize=8)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the files, print the table; 2 for bad arguments."""
    try:
        given = tyro.cli(Options, args=arguments, description=__doc__, prog="fd2fast bench pipeline")
        device = pick_device(given.device)
        options = given.settled(device)
        results.prepare(options.out)
        place = results.about(device, "pipeline", arguments)
        name = options.run.name if options.run else options.preset
        place["work"] = f"run {name}; CUB: segments of {options.rows} images of {options.size}²"
        rows = stages(options) if "stages" in options.parts else []
        rows += cub(options, device) if "cub" in options.parts else []
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    results.publish(options.out, place, rows, COLUMNS, picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
