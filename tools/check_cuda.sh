#!/usr/bin/env bash
# Compiles every kernel for every GPU with warnings as errors, and checks what came out: no fused
# multiply-add and no flush to zero in the PTX, no spills, no more registers than two blocks a
# processor have, and no values of an update anywhere else. Runs no kernel. Exits with 77 where nvcc is
# absent.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! command -v nvcc >/dev/null; then
  echo "SKIPPED: CUDA compile check: nvcc is absent"
  exit 77
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
flags=(-std=c++20 -O3 --fmad=false --ftz=false --prec-div=true --prec-sqrt=true
  --expt-relaxed-constexpr -Werror all-warnings -I csrc)

compile() {
  local architecture=$1 file
  for file in kernels device bulk; do
    nvcc "${flags[@]}" -Xptxas -v,-Werror,-warn-spills -arch "sm_$architecture" \
      -c "csrc/cuda/$file.cu" -o "$work/$file.o" 2>"$work/log" || { cat "$work/log"; return 1; }
    grep 'Used [0-9]* registers' "$work/log" >>"$work/registers" || true
    # A loop over elements that is not unrolled has them in local memory.
    awk '/Function properties for/ {name = $NF}
      /bytes stack frame/ && $1 > 0 && name ~ /4LoopI/ {print name ":", $0; bad = 1}
      END {exit bad}' "$work/log" || { echo "for sm_$architecture"; return 1; }
  done
}

for file in kernels bulk; do
  nvcc "${flags[@]}" -arch sm_90 -ptx "csrc/cuda/$file.cu" -o "$work/$file.ptx"
  for exact in div.rn.f32 sqrt.rn.f32 div.rn.f64; do
    grep -q "$exact" "$work/$file.ptx" || { echo "no $exact in the PTX: not the $file"; exit 1; }
  done
  if grep -nE '\bfma\.|\.ftz|\.approx' "$work/$file.ptx" >"$work/inexact"; then
    head "$work/inexact"
    echo "the PTX holds operations that are not those of the reference"
    exit 1
  fi
done

for architecture in 80 86 89 90 100 120; do compile "$architecture"; done
"${CXX:-c++}" -std=c++20 -Wall -Wextra -Werror -fsyntax-only -I csrc csrc/cuda/vector_only.cpp
most=$(grep -o 'Used [0-9]*' "$work/registers" | awk '{ print $2 }' | sort -n | tail -n 1)
kernels=$(wc -l <"$work/registers")
echo "$kernels kernels, at most $most registers, no spills, no fma, no flush to zero"
((most <= 128))
