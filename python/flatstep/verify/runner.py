"""The walk over the matrix."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from flatstep import _core, reference
from flatstep.verify import names, torch_distance
from flatstep.verify.cases import FORMATS, GPU, Bits, Case, Selection, select
from flatstep.verify.compare import Difference, Expected, Kernel
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
        rules: Names from ``adam``, ``rmsprop``, ``sgd``; None for all, here and below.
        dtypes: Names from ``float32``, ``float64``, ``bfloat16``, ``float16``.
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
                    tally = report.tally(case.variant.rule, case.dtype, isa)
                    tally.cases += 1
                    if difference is not None:
                        tally.mismatches += 1
                        report.add(_explain(expected, isa, threads, difference))
                if on_progress is not None:
                    on_progress(report.cases, report.planned, f"{case.dtype} × {case.size:,}")
    finally:
        report.seconds += time.perf_counter() - began


def measure(selection: Selection, report: Report, on_progress: OnProgress | None = None) -> None:
    """Fills the report with the distances to torch's optimizers."""
    began = time.perf_counter()
    rules = {variant.rule for variant in selection.variants}
    try:
        with _restored():
            torch.set_num_threads(1)
            for done, total, distances in torch_distance.measure(rules, selection.dtypes):
                report.distances += distances
                if on_progress is not None:
                    on_progress(done, total, "torch.optim")
    finally:
        report.seconds += time.perf_counter() - began


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
    case, arena = expected.case, expected.arena
    array, index = arena.place(difference.at)
    inputs = {}
    if 0 <= index < case.size:
        before = expected.before(difference.update)
        inputs = {name: _value(arena.array(before, name)[index], case) for name in arena.starts}
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
        expected=_value(expected.after[difference.update][difference.at], case),
        got=_value(difference.got[difference.at], case),
        differing=difference.count,
        command=_command(case, isa, threads),
    )


def _value(bits: np.unsignedinteger, case: Case) -> Value:
    form = FORMATS[case.dtype]
    one: Bits = np.array([bits], form.unsigned)
    wide = reference.widen(one.view(form.storage), case.dtype)
    return Value(f"0x{int(bits):0{form.bits // 4}x}", str(wide[0]))


def _command(case: Case, isa: str, threads: int) -> str:
    return (
        f"flatstep verify --rule {case.variant.rule} --variant {case.variant.name}"
        f" --dtype {case.dtype} --isa {isa} --threads {threads} --size {case.size}"
        f" --setup {case.setup} --seed {case.seed} --no-torch"
    )
