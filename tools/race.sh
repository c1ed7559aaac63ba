#!/usr/bin/env bash
# Runs the threads of an update under ThreadSanitizer: the pool of ours, called from several threads
# at once. Without Python, which is not built for it; torch's pool is torch's own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"${CXX:-g++}" -std=c++20 -O1 -g -fsanitize=thread -ffp-contract=off -fno-math-errno \
  -fno-trapping-math -Wall -Wextra -Werror -Wno-missing-field-initializers -Wno-psabi -I csrc \
  -o "$work/driver" tests/threads/driver.cpp \
  csrc/cpu/{isa,threads,update}.cpp -pthread -ldl
TSAN_OPTIONS=halt_on_error=1 "$work/driver"
