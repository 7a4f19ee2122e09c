#!/bin/bash
# One command on a machine with an NVIDIA GPU: build, kernel tests on the GPU, memory check, bench, short table last.
# bash bench/gpu.sh [FOLDER for logs and CSV, default bench/results]; PYTHON chooses the interpreter (default python3).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench/results}
python=${PYTHON:-python3}
mkdir -p "$out"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
"$python" -m pip install -q --no-build-isolation --no-deps -e .
"$python" -m fd2fast info

# the tests that ask for the GPU marker, and every kernel test that takes the device it finds
"$python" -m pytest -q -m gpu tests/ops 2>&1 | tee "$out/gpu_tests.log" | tail -n 15

if command -v compute-sanitizer >/dev/null; then
  compute-sanitizer --tool memcheck --error-exitcode 9 --target-processes all \
    "$python" -m pytest -q -m gpu tests/ops -k "(segments or sizes or fused or gates or reference) and not compile" \
    2>&1 | tee "$out/gpu_memcheck.log" | tail -n 5
else
  echo "compute-sanitizer is not here: memory not checked"
fi

"$python" bench/kernels.py --csv "$out/kernels.csv" >"$out/gpu_bench.log"
"$python" - "$out/kernels.csv" <<'TABLE'
import csv, sys
rows = list(csv.DictReader(open(sys.argv[1])))
last = {(r["operation"], r["sizes"], r["implementation"]): r for r in rows}
print(f"{'operation':26s} {'sizes':44s} {'kernel ms':>18s} {'of copy':>12s} {'compiled ms':>18s} {'peak MB':>9s}")
for (operation, sizes, way), r in last.items():
    if way == "kernel":
        c = last.get((operation, sizes, "compiled"), {})
        print(
            f"{operation:26s} {sizes:44s} {r['forward ms']:>8s} + {r['backward ms']:>7s}"
            f" {r['forward of copy']:>5s} {r['backward of copy']:>6s}"
            f" {c.get('forward ms', '-'):>8s} + {c.get('backward ms', '-'):>7s} {r['peak MB']:>9s}"
        )
TABLE
