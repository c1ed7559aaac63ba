#!/usr/bin/env bash
# Runs the way of a parameter on a GPU with an emulated one: the kernels' own loop, thread by thread
# on the host, whose memory counts as the GPU's. It says nothing of a real GPU. In the active Python
# environment, which needs torch and the test tools. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip install --quiet --no-deps --target "$work/site" -C build-dir="$work/build" \
  -C cmake.define.FLATSTEP_CUDA=EMULATED .

emulated() {
  PYTHONPATH=$work/site python "$@"
}

emulated -c "
import sys, flatstep
from flatstep import _core
assert flatstep.__file__.startswith(sys.argv[1]), flatstep.__file__
assert _core.gpu_count() == 1" "$work/site"
emulated -m pytest -q -n 2 tests/test_cuda_path.py tests/test_torch_faults.py tests/test_clipping.py \
  tests/test_precision.py "$@"
FLATSTEP_CUDA_FORM=bulk,stages=2,tile=512 emulated -m pytest -q -n 2 tests/test_cuda_path.py "$@"
emulated -m pytest -q -n 2 tests/test_torch_parity.py -k "twenty_steps and (float32 or bfloat16)" "$@"
