#!/usr/bin/env bash
# Runs the tests and `flatstep verify --quick` with a version of torch, and prints the table of
# docs/compatibility.md with its row:
#
#     tools/compatibility.sh VERSION [WORK]
#
# Makes a virtual environment with that torch and what it brings along, flatstep, and what else the
# tests need, as constraints.txt says. With WORK it is kept there with the results: what has run there
# is not run again. PYTHON names another interpreter. The result goes to
# benchmarks/results/compatibility-torch-VERSION.json; the exit code is 1 where something failed.
set -euo pipefail
version=${1:?usage: tools/compatibility.sh VERSION [WORK]}
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if (($# > 1)); then
  work=$(realpath -m "$2")
  mkdir -p "$work"
else
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
fi

if [[ ! -e $work/installed ]]; then
  "${PYTHON:-python3}" -m venv "$work/venv"
  "$work/venv/bin/pip" install --quiet "torch==$version"
  "$work/venv/bin/pip" list --format=freeze | sed 's/==.*//; s/_/-/g' | tr '[:upper:]' '[:lower:]' |
    awk -F== 'NR == FNR {has[$1]; next} !(tolower($1) in has)' - constraints.txt \
      >"$work/constraints.txt"
  echo "torch==$version" >>"$work/constraints.txt"
  PIP_CONSTRAINT=$work/constraints.txt PIP_BUILD_CONSTRAINT=$work/constraints.txt \
    "$work/venv/bin/pip" install --quiet '.[test]'
  touch "$work/installed"
fi
source "$work/venv/bin/activate"
export MPLBACKEND=Agg PYTHONDONTWRITEBYTECODE=1

# A file at a time, so that one that crashes or hangs costs no other its result.
mkdir -p "$work/junit"
for file in tests/test_*.py; do
  result=$work/junit/$(basename "$file" .py).xml
  [[ -e $result ]] ||
    timeout "${LIMIT:-1800}" pytest -q -p no:cacheprovider --junitxml="$result" "$file" ||
    echo "$file: exit $?"
done
[[ -e $work/verify.json ]] || flatstep verify --quick --json "$work/verify.json" ||
  echo "flatstep verify: exit $?"

python tools/compatibility.py record "$work" \
  "benchmarks/results/compatibility-torch-$version.json"
