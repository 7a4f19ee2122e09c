"""Time and memory of each operation's kernel against the eager and the compiled reference, after checking the kernel.

python -m bench.kernels                      # every operation at the paper's sizes, on a GPU
python -m bench.kernels --op prototype_loss  # only these
python -m bench.kernels --csv FILE           # also append one row for each line printed

Times are the median (and 20 and 80 % quantiles) of one call as a CUDA graph, after the L2 cache was overwritten, as in
the step. The backward is forward and backward together less the forward. Without a GPU (--device cpu) only the two
references are timed and the kernel is checked in the interpreter.
"""

import argparse
import csv
import datetime
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.registry import REGISTRY, Problem
from bench.shapes import PAPER, TINY

COPY_RATE = 4.3e12  # bytes/s of a copy on an H200, measured
CALLS = 50


def graph_of(call: Callable[[], object]) -> Callable[[], object]:
    """The call as a replayed CUDA graph; the call itself where it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        torch.cuda.set_stream(current)  # a failed capture may leave its own
        print(f"not captured, timed with its launches: {error}", file=sys.stderr)
        return call
    return graph.replay


def quantiles(call: Callable[[], object], device: torch.device, calls: int) -> tuple[float, float, float]:
    """Milliseconds of one call: 20, 50 and 80 % quantiles."""
    times = []
    if device.type == "cuda":
        call = graph_of(call)
        cache = torch.empty(256 << 20, dtype=torch.int8, device=device)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, end in events:
            cache.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) for start, end in events]
    else:
        call()
        for _ in range(calls):
            begin = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - begin))
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return cuts[1], cuts[4], cuts[7]


def peak(call: Callable[[], object], device: torch.device) -> float:
    """MB that one call takes on top of what is allocated; NaN on a CPU."""
    if device.type != "cuda":
        return float("nan")
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def measure(
    problem: Problem, device: torch.device, calls: int = CALLS, compile: bool = True
) -> list[dict[str, object]]:
    """Check the kernel, then one row for each implementation. Raises AssertionError where the check fails."""
    problem.check()
    ways = {"reference": (problem.call, "reference")}
    if compile:
        torch._dynamo.reset()
        ways["compiled"] = (torch.compile(problem.call, fullgraph=True), "reference")
    if device.type == "cuda":
        ways["kernel"] = (problem.call, "triton")
    rows = []
    for way, (operation, backend) in ways.items():
        given = [t.detach().requires_grad_() if i in problem.grads else t for i, t in enumerate(problem.inputs)]
        leaves = [given[i] for i in problem.grads]
        fixed = [t.detach() for t in given]
        outputs = operation(*fixed, backend=backend)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradient = [torch.randn_like(o) for o in outputs]

        def forward(operation=operation, fixed=fixed, backend=backend):
            return operation(*fixed, backend=backend)

        def both(operation=operation, given=given, backend=backend, leaves=leaves, gradient=gradient):
            return torch.autograd.grad(operation(*given, backend=backend), leaves, gradient)

        low, middle, high = quantiles(forward, device, calls)
        whole = both if leaves else forward
        low_both, middle_both, high_both = quantiles(whole, device, calls)
        backward = max(middle_both - middle, 1e-9) if leaves else float("nan")
        rows.append(
            {
                "implementation": way,
                "forward ms": round(middle, 4),
                "forward 20-80": f"{low:.4f}-{high:.4f}",
                "both ms": round(middle_both, 4),
                "both 20-80": f"{low_both:.4f}-{high_both:.4f}",
                "backward ms": round(backward, 4),
                "forward of copy": round(problem.forward_bytes / (middle * 1e-3) / COPY_RATE, 3),
                "backward of copy": round(problem.backward_bytes / (backward * 1e-3) / COPY_RATE, 3),
                "peak MB": round(peak(whole, device), 1),
            }
        )
    return rows


def about(device: torch.device) -> dict[str, str]:
    """Where a row was measured."""
    import triton

    root = Path(__file__).parents[1]
    sha = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True).stdout
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": sha.strip(),
    }


def append(path: Path, rows: list[dict[str, object]]) -> None:
    """The rows behind those of a CSV file; with its header where it is new."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        if new:
            writer.writeheader()
        writer.writerows(rows)


def main(arguments: list[str] | None = None) -> None:
    """Print each line, and append it to the CSV file, as soon as it is measured.

    Nothing is reported for a kernel that fails its check; the message at the end says which. Exits with a message also without
    a GPU.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="*", help="operations, all without this")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the bench itself")
    parser.add_argument("--calls", type=int, default=CALLS)
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled reference out")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no NVIDIA GPU is visible; --device cpu --tiny tries the bench without one")
    if device.type == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    unknown = set(options.op or ()) - set(REGISTRY)
    if unknown:
        sys.exit(f"--op must be among {', '.join(REGISTRY)}, got {', '.join(sorted(unknown))}")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    place = about(device)
    print(", ".join(place.values()))
    wrong = []
    for name in options.op or REGISTRY:
        for sizes in (TINY if options.tiny else PAPER)[name]:
            title = " ".join(f"{key}={value}" for key, value in sizes.items())
            try:
                rows = measure(REGISTRY[name](device, **sizes), device, options.calls, not options.no_compile)
            except AssertionError as error:
                wrong.append(f"{name} {title}: the kernel is wrong, nothing is reported: {error}")
                continue
            for row in rows:
                print(f"{name} {title}: " + ", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            if options.csv:
                append(options.csv, [{**place, "operation": name, "sizes": title, **row} for row in rows])
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
