#!/usr/bin/env bash
# Checks flatstep on a machine with a GPU, nvcc, torch and the build tools, which may be off line:
#
#     tools/gpu_check.sh OUT
#
# Builds without isolation into OUT/site, runs the tests that need a GPU, `flatstep verify`,
# compute-sanitizer on a small set, the benchmark and `flatstep profile`, and leaves logs, JSON and
# plots in OUT. A step that fails does not stop the others; the exit code says whether one did. Under
# nine minutes: a step that would take longer is interrupted, and what it has by then is kept.
set -uo pipefail
out=$(realpath -m "${1:?usage: tools/gpu_check.sh OUT}")
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
mkdir -p "$out"
failed=0
deadline=525

step() {
  local name=$1 start=$SECONDS left=$((deadline - SECONDS)) code
  shift
  printf '\n=== %s ===\n' "$name"
  if ((left < 10)); then
    echo "FAILED: $name: no time was left for it" | tee -a "$out/summary.txt"
    failed=1
    return
  fi
  timeout --signal=INT --kill-after=10 $((limit < left ? limit : left)) "$@" >"$out/$name.log" 2>&1
  code=$?
  tail -n 15 "$out/$name.log"
  printf '%-12s exit %d, %d s\n' "$name" "$code" $((SECONDS - start)) | tee -a "$out/summary.txt"
  ((code == 0)) || failed=1
}

architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
{ date -u; nvidia-smi -L; nvidia-smi --query-gpu=driver_version --format=csv; nvcc --version
  python -c 'import torch; print(torch.__version__, torch.version.cuda)'; } >"$out/machine.txt" 2>&1

limit=240
step build pip install --no-build-isolation --no-deps --no-index --target "$out/site" --upgrade \
  -C cmake.define.FLATSTEP_CUDA=ON -C "cmake.define.CMAKE_CUDA_ARCHITECTURES=$architecture" \
  -C cmake.define.FLATSTEP_WERROR=OFF .
export PYTHONPATH=$out/site
limit=150
# Without the project's configuration, which names plugins that a bare machine lacks.
step test python -m pytest -c /dev/null --rootdir . -q -p no:cacheprovider tests/test_gpu.py
step verify python tools/gpu_verify.py "$out/verify.json"
limit=120
for tool in memcheck racecheck initcheck; do
  if command -v compute-sanitizer >/dev/null; then
    step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 python tools/gpu_smoke.py
  else
    echo "SKIPPED: $tool: compute-sanitizer is absent" | tee -a "$out/summary.txt"
  fi
done
limit=200
step benchmark python benchmarks/gpu_targets.py --json "$out/gpu_targets.json"
limit=120
profile=(--device cuda --seconds 75 --json "$out/profile.json")
if python -c 'import typer, rich, matplotlib, plotly, jinja2' 2>"$out/profile-tools.txt"; then
  step profile python -c 'from flatstep.cli import main; main()' profile "${profile[@]}" \
    --plot "$out/profile.png"
else
  {
    echo "profile: no plot, and plain tables: $(tail -n 1 "$out/profile-tools.txt");"
    echo "  where there are: flatstep profile --load profile.json --plot profile.png"
  } | tee -a "$out/summary.txt"
  step profile python -m flatstep.profiling "${profile[@]}"
fi
exit "$failed"
