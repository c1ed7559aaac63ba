#!/usr/bin/env bash
# Runs the kernel tests under AddressSanitizer and UBSan, in the active Python environment (which
# needs torch and the test tools). Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
site=$work/site

pip install --quiet --no-deps --target "$site" -C build-dir="$work/build" \
  -C cmake.define.FLATSTEP_SANITIZE=address,undefined -C cmake.define.FLATSTEP_CUDA=OFF .

# libstdc++ comes along because AddressSanitizer looks for __cxa_throw before Python loads it.
preload=
for library in libasan.so libubsan.so libstdc++.so.6; do
  preload+="$("${CXX:-g++}" -print-file-name="$library") "
done

sanitized() {
  LD_PRELOAD=$preload PYTHONPATH=$site ASAN_OPTIONS=detect_leaks=0 \
    UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 python "$@"
}

sanitized -c "
import sys, flatstep
assert flatstep.__file__.startswith(sys.argv[1]), flatstep.__file__" "$site"
# pytest's default capture would swallow the report of a process that aborts.
sanitized -m pytest tests/test_{kernels,border,properties,threads,precision,clipping}.py -m 'not slow' --capture=sys --timeout 900 \
  -p no:cacheprovider "$@"
