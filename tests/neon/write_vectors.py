"""Writes updates and the reference's results for `driver.cpp`: `write_vectors.py OUT`.

The file is little-endian: the eight bytes `flatstep`, then records until it ends.

    record  u32 length and bytes of the rule's name, likewise of the layout's type
            u32 flags, i64 step, f64 scale, u32 number of hyper-parameters, f64 each
            u64 count, u32 number of arrays, then each array's stored values before the update
            (p, g, the states that the flags call for), then each array's after it
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import BinaryIO

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kernel_cases import (
    DTYPES,
    VARIANTS,
    Arrays,
    Update,
    every_value,
    narrowing_factors,
    plain_sgd,
    random_arrays,
    updates,
)

# The driver tries every size up to this one: blocks, whole vectors and tails.
COUNT = 70


def write_record(file: BinaryIO, update: Update, before: Arrays) -> None:
    after = update.by_reference(before)
    for text in (update.variant.rule, update.dtype):
        file.write(struct.pack("<I", len(text)) + text.encode())
    file.write(struct.pack("<Iqd", update.variant.flags, update.step, update.scale))
    hyper = [update.hyper[name] for name in update.variant.hyper_names]
    file.write(struct.pack(f"<I{len(hyper)}d", len(hyper), *hyper))
    file.write(struct.pack("<QI", before["p"].size, len(update.variant.arrays)))
    for arrays in (before, after):
        for name in update.variant.arrays:
            x = arrays[name]
            file.write(x.astype(x.dtype.newbyteorder("<")).tobytes())


def main() -> None:
    with open(sys.argv[1], "wb") as file:
        file.write(b"flatstep")
        for of in VARIANTS:
            for dtype in DTYPES:
                for update in updates(of, dtype):
                    write_record(file, update, random_arrays(of, dtype, COUNT))
        for dtype in ("bfloat16", "float16"):
            values = every_value(dtype)
            zeros = np.zeros_like(values)
            write_record(file, plain_sgd(dtype, lr=0.0), {"p": values, "g": zeros})
            for factor in narrowing_factors():
                write_record(file, plain_sgd(dtype, lr=-factor), {"p": zeros, "g": values})


if __name__ == "__main__":
    main()
