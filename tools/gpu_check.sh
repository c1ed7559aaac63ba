#!/usr/bin/env bash
# Checks flatstep on a machine with a GPU, nvcc, torch and the build tools, which may be off line:
#
#     tools/gpu_check.sh OUT [STEP...]
#
# Builds, without isolation and with both forms of the kernels, into build/gpu_check; then all steps,
# or those that are named. A step that fails does not stop the others; the exit code says whether one
# did. Under nine minutes: a step that would take longer is interrupted, and what it has by then is
# kept. OUT gets summary.txt, log.txt with all output as it comes, and what the steps make.
set -uo pipefail
out=$(realpath -m "${1:?usage: tools/gpu_check.sh OUT [STEP...]}")
shift
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
known=' test benchmark forms verify memcheck memcheck_bulk profile racecheck initcheck '
wanted=" ${*:-$known} "
for name in "$@"; do
  [[ $known == *" $name "* ]] || { echo "no step '$name'; there are:$known"; exit 2; }
done
mkdir -p "$out"
: >"$out/summary.txt"
: >"$out/log.txt"
trap 'rm -f "$out/step.txt"' EXIT
failed=0
deadline=525
PATH=$(python3 -c 'import os, sys; print(os.path.dirname(sys.executable))'):$PATH:/usr/local/cuda/bin
export PATH PYTHONUNBUFFERED=1

note() { echo "$*" | tee -a "$out/summary.txt" "$out/log.txt"; }

run() {
  local name=$1 limit=$2 start=$SECONDS left=$((deadline - SECONDS)) code
  shift 2
  printf '\n=== %s ===\n' "$name" | tee -a "$out/log.txt"
  if ((left < 10)); then
    note "FAILED: $name: no time was left for it"
    failed=1
    return 1
  fi
  # Where this shell ignores interrupts, what it starts would too.
  timeout --signal=INT --kill-after=10 $((limit < left ? limit : left)) \
    env --default-signal=INT "$@" >"$out/step.txt" 2>&1
  code=$?
  cat "$out/step.txt" >>"$out/log.txt"
  tail -n 15 "$out/step.txt"
  note "$(printf '%-14s exit %d, %d s' "$name" "$code" $((SECONDS - start)))"
  ((code == 0)) || failed=1
  return "$code"
}

step() { [[ $wanted != *" $1 "* ]] || run "$@"; }

# An allocation for each tensor, so that what lies outside it is outside for the sanitizer too.
sanitize() {
  local name=$1 tool=$2
  if command -v compute-sanitizer >/dev/null; then
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 step "$name" 90 compute-sanitizer --tool "$tool" \
      --report-api-errors no --error-exitcode 1 python3 tools/gpu_smoke.py
  elif [[ $wanted == *" $name "* ]]; then
    note "SKIPPED: $name: compute-sanitizer is absent"
  fi
}

{ date -u; nvidia-smi -L; nvidia-smi --query-gpu=driver_version --format=csv,noheader
  nvcc --version | tail -n 1; python3 -c 'import torch; print("torch", torch.__version__)'
  python3 -m pip list; } >>"$out/log.txt" 2>&1
head -n 5 "$out/log.txt" | tee -a "$out/summary.txt"

site=$PWD/build/gpu_check/site
options=(FLATSTEP_CUDA=ON FLATSTEP_CUDA_BULK=ON FLATSTEP_WERROR=OFF CMAKE_CUDA_ARCHITECTURES="$(
  nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d . | grep . ||
    echo 90)")
# What is off line builds with the scikit-build-core that it has.
if ! run build 240 python3 -m pip install --no-build-isolation --no-deps --no-index --upgrade \
  --target "$site" -Cminimum-version=0.11 "${options[@]/#/-Ccmake.define.}" .; then
  echo "nothing can be checked without a build"
  exit 1
fi
export PYTHONPATH=$site
if ! run device 60 python3 -c "
import torch, flatstep
from flatstep import _core
print(flatstep.__file__, torch.cuda.get_device_name())
assert _core.gpu_count() > 0, _core.gpu_absence()"; then
  echo "nothing can be checked without a GPU"
  exit 1
fi

# Without the project's configuration, which names plugins that a bare machine lacks. The CPU's side
# of each test takes the longest.
workers=()
if python3 -c 'import xdist' 2>>"$out/log.txt"; then workers=(-n 6); fi
step test 150 python3 -m pytest -c /dev/null --rootdir . -q -p no:cacheprovider \
  ${workers[@]+"${workers[@]}"} tests/test_gpu.py
step benchmark 120 python3 benchmarks/gpu_targets.py --json "$out/gpu_targets.json"
step forms 90 python3 benchmarks/gpu_forms.py --json "$out/gpu_forms.json"
step verify 120 python3 tools/gpu_verify.py "$out/verify.json"
sanitize memcheck memcheck
FLATSTEP_CUDA_FORM=bulk,tile=512 sanitize memcheck_bulk memcheck
profile=(--device cuda --seconds 60 --json "$out/profile.json")
if python3 -c 'import typer, rich, matplotlib, plotly, jinja2' 2>"$out/step.txt"; then
  step profile 100 python3 -c 'from flatstep.cli import main; main()' profile "${profile[@]}" \
    --plot "$out/profile.png"
else
  if [[ $wanted == *' profile '* ]]; then
    note "profile: plain tables and no plot, $(tail -n 1 "$out/step.txt");"
    note "  elsewhere: flatstep profile --load profile.json --plot profile.png"
  fi
  step profile 100 python3 -m flatstep.profiling "${profile[@]}"
fi
sanitize racecheck racecheck
sanitize initcheck initcheck
printf '\n=== summary ===\n'
cat "$out/summary.txt"
exit "$failed"
