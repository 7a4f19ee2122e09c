"""Time and memory of planning and of filling iteration tables: C++ against plain Python and vectorised numpy.

python -m bench.planner              # every case, one JSON object a line
python -m bench.planner --case NAME  # one case, in this process
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from fd2fast.distillation.planner import TableStream, iteration_table, make_plan

IMAGENET_21K = {"classes": 21_841, "ipc": 50, "segments_per_step": 8}
SINGLE = {**IMAGENET_21K, "segment_size": 1, "segments_per_step": 800}
SEGMENTS = np.arange(1000)
AUGMENTATION = {"jitter": 32}

# A case gives what to time and the number of rows or images that one call makes.
Case = Callable[[], tuple[Callable[[], object], int]]


def plan_cpp(request: dict[str, int]) -> tuple[Callable[[], object], int]:
    return lambda: make_plan(**request), request["classes"] * request["ipc"]


def plan_python(request: dict[str, int]) -> tuple[Callable[[], object], int]:
    from fd2fast.reference import planner as reference

    wanted, got = reference.make_plan(**request), make_plan(**request)
    assert wanted.step_segments == got.step_segments.tolist()
    assert wanted.prior_segments == got.prior_segments.tolist()
    return lambda: reference.make_plan(**request), request["classes"] * request["ipc"]


def table_cpp(threads: int) -> tuple[Callable[[], object], int]:
    count = 2000

    def fill() -> object:
        return iteration_table(0, SEGMENTS, 0, count, 224, threads=threads, **AUGMENTATION)

    return fill, count * len(SEGMENTS)


def table_numpy() -> tuple[Callable[[], object], int]:
    from fd2fast.reference import planner as reference

    count = 200

    def fill() -> np.ndarray:
        return reference.iteration_array(0, SEGMENTS, 0, count, 224, **AUGMENTATION)

    assert np.array_equal(fill(), iteration_table(0, SEGMENTS, 0, count, 224, **AUGMENTATION))
    return fill, count * len(SEGMENTS)


def table_python() -> tuple[Callable[[], object], int]:
    from fd2fast.reference import planner as reference

    count = 4

    def fill() -> list[list[list[int]]]:
        return reference.iteration_table(0, SEGMENTS.tolist(), 0, count, 224, **AUGMENTATION)

    assert fill() == iteration_table(0, SEGMENTS, 0, count, 224, **AUGMENTATION).tolist()
    return fill, count * len(SEGMENTS)


def stream(segments: int, count: int) -> tuple[Callable[[], object], int]:
    def drain() -> None:
        with TableStream(0, np.arange(segments), 0, count, 224, lr=0.1, total=count, **AUGMENTATION) as tables:
            for _ in tables:
                pass

    return drain, segments * count


CASES: dict[str, Case] = {
    "plan 21841 x 50, C++": lambda: plan_cpp(IMAGENET_21K),
    "plan 21841 x 50, Python": lambda: plan_python(IMAGENET_21K),
    "plan 21841 x 50, segments of 1, C++": lambda: plan_cpp(SINGLE),
    "table, C++, 1 thread": lambda: table_cpp(1),
    "table, C++, all threads": lambda: table_cpp(0),
    "table, numpy": table_numpy,
    "table, Python": table_python,
    "stream, 1000 segments": lambda: stream(1000, 2000),
    "stream, 32 segments": lambda: stream(32, 20_000),
    "stream, 1 segment": lambda: stream(1, 100_000),
}


def peak_mb() -> float:
    """Peak resident MiB of this process; not ru_maxrss, which begins at the parent's peak."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def measure(name: str, repeats: int) -> dict[str, object]:
    before = peak_mb()
    run, rows = CASES[name]()
    run()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    wall = statistics.median(seconds)
    return {
        "case": name,
        "wall_s": wall,
        "worst_s": max(seconds),
        "rows": rows,
        "rows_per_s": rows / wall,
        "peak_rss_mb": round(peak_mb(), 1),
        "rss_before_mb": round(before, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.case, args.repeats)))
        return
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    machine = {"cpus": os.cpu_count(), "machine": platform.machine()}
    versions = {"python": platform.python_version(), "numpy": np.__version__}
    print(json.dumps({"commit": commit, **machine, **versions}), flush=True)
    root = Path(__file__).parents[1]
    for name in CASES:  # a process each: peak memory is per process
        command = [sys.executable, "-m", "bench.planner", "--case", name, "--repeats", str(args.repeats)]
        print(subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout, end="", flush=True)


if __name__ == "__main__":
    main()
