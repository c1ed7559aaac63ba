#!/usr/bin/env bash
# Compares python/flatstep/_core.pyi with the installed extension; `--write` brings it up to date.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python -m pybind11_stubgen flatstep._core --exit-code --output-dir "$work"
ruff format --quiet --isolated --line-length 100 "$work"
stub=$work/flatstep/_core.pyi

if [[ ${1-} == --write ]]; then
  cp "$stub" python/flatstep/_core.pyi
else
  diff -u python/flatstep/_core.pyi "$stub"
fi
