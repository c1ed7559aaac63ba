#!/usr/bin/env bash
# Builds the site of docs/ into a folder, or a new one, with warnings as errors. In the active Python
# environment: pip install -c constraints.txt '.[docs]'.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

site=${1:-$(mktemp -d)}
python -m sphinx --fail-on-warning --nitpicky --fresh-env --quiet --builder html \
  --doctree-dir "$site/.doctrees" docs "$site"
rm -r "$site/.doctrees"
echo "$site/index.html"
