"""Writes updates and the reference's results for `driver.cpp`: `write_vectors.py OUT`.

The file is little-endian: the eight bytes `flatstep`, then records until it ends.

    record  u32 length and bytes of the rule's name, likewise of each of the layout's three types
            u32 variant (flags and extras), i64 step, f64 scale
            u32 number of hyper-parameters, f64 each
            f64 unscale, f64 average_decay, u64 seed, i64 count of the step, u32 first
            u64 count, u32 number of arrays, u32 bytes of an element of each
            each array's stored values before the update (p, g, the states that the flags call for,
            master, average), then each array's after it

A norm has the rule "norm", as variant whether it is the largest magnitude, as hyper-parameter what
is expected (a sum of squares, not its root), and one array.
"""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

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

from flatstep.verify import cases, compare

# The driver tries every size up to this one: blocks, whole vectors and tails.
COUNT = 70


def write(
    file: BinaryIO,
    rule: str,
    types: Sequence[str],
    variant: int,
    step: int,
    scale: float,
    hyper: Sequence[float],
    before: Sequence[np.ndarray],
    after: Sequence[np.ndarray],
    extras: Mapping[str, Any],
) -> None:
    for text in (rule, *types):
        file.write(struct.pack("<I", len(text)) + text.encode())
    file.write(struct.pack("<Iqd", variant, step, scale))
    file.write(struct.pack(f"<I{len(hyper)}d", len(hyper), *hyper))
    file.write(
        struct.pack(
            "<ddQqI",
            extras.get("unscale", 1.0),
            extras.get("average_decay", 0.0),
            extras.get("seed", 0),
            extras.get("count_of_step", 1),
            extras.get("first", 0),
        )
    )
    sizes = [x.itemsize for x in before]
    file.write(struct.pack(f"<QI{len(sizes)}I", before[0].size, len(sizes), *sizes))
    for x in (*before, *after):
        file.write(x.astype(x.dtype.newbyteorder("<")).tobytes())


def write_record(file: BinaryIO, update: Update, before: Arrays) -> None:
    after = update.by_reference(before)
    names, hyper = update.variant.arrays, update.variant.hyper_names
    write(
        file,
        update.variant.rule,
        [update.dtype] * 3,
        update.variant.flags,
        update.step,
        update.scale,
        [update.hyper[name] for name in hyper],
        [before[name] for name in names],
        [after[name] for name in names],
        {},
    )


def write_case(file: BinaryIO, case: cases.Case) -> None:
    """A case of `flatstep verify`, which has forms of all kinds."""
    expected = compare.Expected(case)
    arena, form = expected.arena, case.form
    blocks = (expected.before(0), expected.after[0])
    before, after = ([arena.array(block, name) for name in arena.dtypes] for block in blocks)
    write(
        file,
        case.variant.rule,
        [form.param, form.grad, form.state],
        case.variant.number | form.bits,
        case.numbers.step,
        case.numbers.scale,
        expected.hyper,
        before,
        after,
        expected.numbers(0),
    )


def write_norm(file: BinaryIO, case: compare.NormCase) -> None:
    gradient = case.gradient()
    expected = case.expected(gradient)
    types = [case.dtype] * 3
    largest = case.norm_type == math.inf
    write(file, "norm", types, largest, 1, 1.0, [expected], [gradient], [gradient], {})


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
        forms = [form.name for form in cases.all_forms().values() if not form.is_uniform]
        for place, form in enumerate(forms):
            for variant in cases.all_variants():
                write_case(file, cases.Case(variant, form, COUNT, place % len(cases.SETUPS), 0))
        for dtype in DTYPES:
            for size in (0, COUNT, 4097, 10_000):
                for norm_type in cases.NORM_TYPES:
                    write_norm(file, compare.NormCase(dtype, size, 1, 0, norm_type))


if __name__ == "__main__":
    main()
