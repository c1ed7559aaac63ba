#!/usr/bin/env bash
# Cross-compiles the NEON and the scalar kernels for AArch64 and runs them under qemu against
# vectors written by the reference. Needs the package in the active Python environment. Exits with
# 77 where the cross compiler or qemu is absent; in CI, a root user with apt-get gets them first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

have_tools() { command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64; } >/dev/null

if ! have_tools && [[ ${CI-} == true && $EUID == 0 ]] && command -v apt-get >/dev/null; then
  { apt-get update -qq && apt-get install -y -qq g++-aarch64-linux-gnu qemu-user; } || true
fi
if ! have_tools; then
  echo "SKIPPED: NEON under qemu: aarch64-linux-gnu-g++ or qemu-aarch64 is absent"
  exit 77
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

aarch64-linux-gnu-g++ -std=c++20 -O3 -ffp-contract=off -fno-math-errno -fno-trapping-math \
  -Wall -Wextra -Werror -Wno-missing-field-initializers -static -I csrc -o "$work/driver" \
  tests/neon/driver.cpp csrc/registry.cpp csrc/cpu/{isa,isas_arm64,kernels_neon,kernels_scalar}.cpp
python tests/neon/write_vectors.py "$work/vectors.bin"
qemu-aarch64 "$work/driver" "$work/vectors.bin"
