#!/bin/bash
# One command on a machine with an NVIDIA GPU: build, tests, memory check, benches, the short table last.
# bash bench/gpu.sh [FOLDER for logs and results, default bench/results] [PART ...]
# Parts, in this order: tests memcheck kernels table step scale matching; none: all of them. A lease of ten minutes holds
# "tests memcheck kernels" or "table", or "step scale matching". PYTHON chooses the interpreter (default python3).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench/results}
shift || true
parts=${*:-tests memcheck kernels table step scale matching}
python=${PYTHON:-python3}
mkdir -p "$out"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
wanted() { [[ " $parts " == *" $1 "* ]]; }

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
"$python" -m pip install -q --no-build-isolation --no-deps -e .
"$python" -m fd2fast info

if wanted tests; then
  # the tests that ask for the GPU marker, in every folder
  "$python" -m pytest -q -m gpu tests 2>&1 | tee "$out/gpu_tests.log" | tail -n 15
fi

if wanted memcheck; then
  if command -v compute-sanitizer >/dev/null; then
    compute-sanitizer --tool memcheck --error-exitcode 9 --target-processes all \
      "$python" -m pytest -q -m gpu tests/ops -k "(segments or sizes or fused or gates or reference) and not compile" \
      2>&1 | tee "$out/gpu_memcheck.log" | tail -n 5
  else
    echo "compute-sanitizer is not here: memory not checked"
  fi
fi

if wanted kernels; then
  "$python" bench/kernels.py --csv "$out/kernels.csv" >"$out/gpu_kernels.log"
fi
if wanted step; then
  "$python" -m fd2fast bench step --methods sre2l++_fd2 fadrm+_fd2 --ways engine --sweep --json "$out/step.jsonl" >"$out/gpu_step.log"
fi
if wanted scale; then
  "$python" -m fd2fast bench scale --out "$out" >"$out/gpu_scale.log"
  "$python" -m fd2fast bench pipeline --parts cub --out "$out" >"$out/gpu_pipeline.log"
fi
if wanted matching; then
  "$python" -m fd2fast bench matching --out "$out" >"$out/gpu_matching.log"
fi

if wanted kernels; then
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
fi
if wanted table; then
  "$python" -m fd2fast bench table2 --out "$out" | tee "$out/gpu_table2.log" | cut -d '|' -f 2-4,6-8,11-15
fi
