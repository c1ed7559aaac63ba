#!/usr/bin/env bash
# Fuzzes the border to C++ for so many seconds: tools/fuzz.sh [SECONDS], 60 unless told. In the
# active Python environment, which needs the package and Atheris. Exits with 77 where Atheris is
# absent; in CI pip gets it first. What crashes is kept as crash-* in the folder FUZZ_OUT, else in
# the working directory; give the file to tests/fuzz/fuzz_plan.py to see it again.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if ! python -c 'import atheris' 2>/dev/null && [[ ${CI-} == true ]]; then
  pip install --quiet -c "$root/constraints.txt" atheris || true
fi
if ! python -c 'import atheris' 2>/dev/null; then
  echo "SKIPPED: fuzzing: Atheris is absent, or not made for this Python"
  exit 77
fi
python -X faulthandler "$root/tests/fuzz/fuzz_plan.py" -max_total_time="${1:-60}" -max_len=512 \
  -len_control=0 -timeout=60 -rss_limit_mb=4096 -print_final_stats=1 -artifact_prefix="${FUZZ_OUT:-.}/"
