#!/bin/bash
# One command on a machine with an NVIDIA GPU: build, tests, memory check, benches, the short tables last.
# bash bench/gpu.sh [FOLDER for logs and results, default bench/results] [PART ...]
# Parts, in this order: tests memcheck kernels table step scale matching; none: all of them. A part that fails or is over its
# LIMIT (seconds, default 540) does not stop the next; what it measured until then is kept. A lease of ten minutes holds
# "tests memcheck", "kernels", "table", or "step scale matching". PYTHON chooses the interpreter (default python3). Where there
# is no network, wheels of missing packages in the folder WHEELS are installed first, say those of tyro docstring-parser typeguard
# pydantic pydantic-core annotated-types typing-inspection typing-extensions.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-bench/results}
shift || true
parts=${*:-tests memcheck kernels table step scale matching}
python=${PYTHON:-python3}
limit=${LIMIT:-540}
mkdir -p "$out"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} PYTHONUNBUFFERED=1
failed=()

wanted() { [[ " $parts " == *" $1 "* ]]; }
# NAME of the log, lines of its end to show, command
step() {
  local name=$1 lines=$2 code=0
  shift 2
  echo "== $name: $*"
  timeout --signal=INT --kill-after=20 "$limit" "$@" >"$out/gpu_$name.log" 2>&1 || code=$?
  if [ "$code" != 0 ]; then
    lines=$((lines + 10))
  fi
  tail -n "$lines" "$out/gpu_$name.log"
  if [ "$code" != 0 ]; then
    echo "== $name ended with $code"
    failed+=("$name")
  fi
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
if [ -n "${WHEELS:-}" ]; then
  "$python" -m pip install -q --no-index --no-deps "$WHEELS"/*.whl
fi
"$python" -m pip install -q --no-build-isolation --no-deps -e .
"$python" -m fd2fast info

if wanted tests; then
  spread=()
  if "$python" -c "import xdist" 2>/dev/null; then
    spread=(-n 6 --dist loadfile)
  fi
  # the tests that ask for the GPU marker, in every folder
  step tests 15 "$python" -m pytest -q -m gpu "${spread[@]}" tests
fi
if wanted memcheck; then
  if command -v compute-sanitizer >/dev/null; then
    # without torch's cache every tensor has its own bounds
    step memcheck 5 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 9 \
      --target-processes all "$python" -m pytest -q -m gpu tests/ops \
      -k "(segments or sizes or fused or gates or reference) and not compile and not real"
  else
    echo "compute-sanitizer is not here: memory not checked"
  fi
fi
if wanted kernels; then
  step kernels 0 "$python" -m bench.kernels --csv "$out/kernels.csv"
fi
if wanted table; then
  step table2 0 "$python" -m fd2fast bench table2 --out "$out"
fi
if wanted step; then
  step step 0 "$python" -m fd2fast bench step --methods sre2l++_fd2 fadrm+_fd2 --ways engine --sweep --out "$out"
fi
if wanted scale; then
  step scale 0 "$python" -m fd2fast bench scale --out "$out"
  step pipeline 0 "$python" -m fd2fast bench pipeline --parts cub --out "$out"
fi
if wanted matching; then
  step matching 0 "$python" -m fd2fast bench matching --out "$out"
fi

if wanted kernels && [ -e "$out/kernels.csv" ]; then
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
  newest=$(find "$out" -maxdepth 1 -name 'table2-*.md' | sort | tail -n 1)
  if [ -n "$newest" ]; then
    grep '^|' "$newest" | cut -d '|' -f 2-4,6,8-10,12-18
  fi
fi
if [ ${#failed[@]} -gt 0 ]; then
  echo "did not end well: ${failed[*]} (logs in $out)"
  exit 1
fi
