"""The walk over the matrix."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from flatstep import _core, reference
from flatstep.verify import names, torch_distance
from flatstep.verify.cases import (
    FORMATS,
    GPU,
    NORM,
    Bits,
    Case,
    Selection,
    all_forms,
    format_of,
    select,
)
from flatstep.verify.compare import GUARD, Difference, Expected, Kernel, NormCase
from flatstep.verify.results import Mismatch, Report, Value

# Called with what is done, what there is to do, and what is being looked at.
OnProgress = Callable[[int, int, str], None]


def run(
    quick: bool = True,
    rules: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    isas: Sequence[str] | None = None,
    threads: Sequence[int] | None = None,
    sizes: Sequence[int] | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
    *,
    variants: Sequence[str] | None = None,
    setups: Sequence[int] | None = None,
    distances: bool = True,
) -> Report:
    """Compares the kernels with :mod:`flatstep.reference` on bytes.

    Args:
        quick: Fewer sizes, and fewer setups for the largest.
        rules: Names from ``adam``, ``rmsprop``, ``sgd``, ``norm``; None for all, here and below.
        dtypes: Names from ``float32``, ``float64``, ``bfloat16``, ``float16``, or of forms with
            arrays of several types or more than the rule, as in :func:`flatstep.verify.cases.
            all_forms`.
        isas: Instruction sets that this build has and this processor runs.
        threads: Numbers of threads.
        sizes: Numbers of elements.
        seed: Of the values, from 0.
        on_progress: Called with the cases done, the cases in all, and the name of what runs.
        variants: Flags that are on, as in ``amsgrad+l2``; ``plain`` where none is.
        setups: Places in :data:`flatstep.verify.cases.SETUPS`.
        distances: Whether to measure the distance to :mod:`torch.optim` too.

    Returns:
        The report; its ``ok`` says whether everything matched.

    Raises:
        ValueError: A name or number does not exist.
    """
    selection = select(
        quick=quick,
        rules=rules,
        variants=variants,
        dtypes=dtypes,
        isas=isas,
        threads=threads,
        sizes=sizes,
        setups=setups,
        seed=seed,
    )
    report = start(selection)
    compare(selection, report, on_progress)
    if distances:
        measure(selection, report, on_progress)
    return report


def start(selection: Selection) -> Report:
    """An empty report of what is to run."""
    return Report(
        quick=selection.quick,
        seed=selection.seed,
        planned=selection.count(),
        isas=selection.isas,
        threads=selection.threads,
        sizes=selection.sizes,
    )


def compare(selection: Selection, report: Report, on_progress: OnProgress | None = None) -> None:
    """Fills the report with every case of the selection; an exception leaves what was found."""
    began = time.perf_counter()
    report.names = names.disagreements()
    try:
        with _restored():
            for case in selection.cases() if not report.names else ():
                expected = Expected(case)
                for isa, threads, difference in _differences(expected, selection):
                    tally = report.tally(case.variant.rule, case.form.label, isa)
                    tally.cases += 1
                    if difference is not None:
                        tally.mismatches += 1
                        report.add(_explain(expected, isa, threads, difference))
                if on_progress is not None:
                    on_progress(report.cases, report.planned, f"{case.dtype} × {case.size:,}")
            for found in selection.norms() if not report.names else ():
                _compare_norm(found, selection, report)
                if on_progress is not None:
                    on_progress(report.cases, report.planned, f"norm of {found[0]}")
    finally:
        report.seconds += time.perf_counter() - began


def measure(selection: Selection, report: Report, on_progress: OnProgress | None = None) -> None:
    """Fills the report with the distances to torch's optimizers."""
    began = time.perf_counter()
    rules = {variant.rule for variant in selection.variants}
    try:
        with _restored():
            torch.set_num_threads(1)
            dtypes = [dtype for dtype in selection.dtypes if all_forms()[dtype].is_uniform]
            for done, total, distances in torch_distance.measure(rules, dtypes):
                report.distances += distances
                if on_progress is not None:
                    on_progress(done, total, "torch.optim")
    finally:
        report.seconds += time.perf_counter() - began


def _compare_norm(found: tuple[str, int, int, float], selection: Selection, report: Report) -> None:
    dtype, size, setup, norm_type = found
    case = NormCase(dtype, size, setup, selection.seed, norm_type)
    gradient = case.gradient()
    expected = case.expected(gradient)
    for threads in selection.threads:
        torch.set_num_threads(threads)
        for isa in selection.isas:
            tally = report.tally(NORM, dtype, isa)
            tally.cases += 1
            if isa == GPU:
                got = case.got_on_gpu(gradient)
            else:
                _core.use_isa(isa)
                got = case.got(gradient, threads)
            if got != expected and not (math.isnan(got) and math.isnan(expected)):
                tally.mismatches += 1
                report.add(_explain_norm(case, isa, threads, expected, got))


def _explain_norm(case: NormCase, isa: str, threads: int, expected: float, got: float) -> Mismatch:
    wanted, found = (Value(x.hex(), str(x)) for x in (expected, got))
    return Mismatch(
        rule=NORM,
        variant=f"type {case.norm_type:g}",
        dtype=case.dtype,
        isa=isa,
        threads=threads,
        size=case.size,
        setup=case.setup,
        step=1,
        scale=1.0,
        hyper={},
        array=NORM,
        index=0,
        inputs={},
        expected=wanted,
        got=found,
        differing=1,
        command=(
            f"flatstep verify --rule {NORM} --dtype {case.dtype} --isa {isa} --threads {threads} "
            f"--size {case.size} --setup {case.setup} --seed {case.seed} --no-torch"
        ),
    )


def _differences(
    expected: Expected, selection: Selection
) -> Iterator[tuple[str, int, Difference | None]]:
    kernel = Kernel(expected)
    for threads in selection.threads:
        torch.set_num_threads(threads)
        for isa in selection.isas:
            if isa != GPU:
                _core.use_isa(isa)
            yield isa, threads, kernel.first_difference(threads, on_gpu=isa == GPU)


@contextmanager
def _restored() -> Iterator[None]:
    isa, threads = _core.isa(), torch.get_num_threads()
    try:
        yield
    finally:
        _core.use_isa(isa)
        torch.set_num_threads(threads)


def _explain(expected: Expected, isa: str, threads: int, difference: Difference) -> Mismatch:
    case, arena, array, index = (
        expected.case,
        expected.arena,
        difference.array,
        difference.index,
    )
    inputs = {}
    if 0 <= index < case.size:
        before = expected.before(difference.update)
        inputs = {
            name: _value(arena.array(before, name)[index], dtype)
            for name, dtype in arena.dtypes.items()
        }
    after = expected.after[difference.update]
    pair = (arena.array(block, array, GUARD, GUARD) for block in (after, difference.got))
    wanted, got = (_value(bits[index + GUARD], arena.dtypes[array]) for bits in pair)
    return Mismatch(
        rule=case.variant.rule,
        variant=case.variant.name,
        dtype=case.dtype,
        isa=isa,
        threads=threads,
        size=case.size,
        setup=case.setup,
        step=case.numbers.step + difference.update,
        scale=case.numbers.scale,
        hyper=dict(zip(case.variant.hyper, expected.hyper, strict=True)),
        array=array,
        index=index,
        inputs=inputs,
        expected=wanted,
        got=got,
        differing=difference.count,
        command=_command(case, isa, threads),
    )


def _value(bits: np.unsignedinteger, dtype: str) -> Value:
    form = format_of(dtype)
    one: Bits = np.array([bits], form.unsigned)
    value = reference.widen(one.view(form.storage), dtype)[0] if dtype in FORMATS else int(bits)
    return Value(f"0x{int(bits):0{form.bits // 4}x}", str(value))


def _command(case: Case, isa: str, threads: int) -> str:
    return (
        f"flatstep verify --rule {case.variant.rule} --variant {case.variant.name}"
        f" --dtype {case.dtype} --isa {isa} --threads {threads} --size {case.size}"
        f" --setup {case.setup} --seed {case.seed} --no-torch"
    )
