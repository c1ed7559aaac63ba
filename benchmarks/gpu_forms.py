"""Measures both forms of the GPU's kernels beside a copy on the device, and says which is faster.

    python benchmarks/gpu_forms.py [--json FILE] [--seconds SECONDS]

The vectorised form loads and stores 16 bytes a thread; the bulk form lets the copy engine of
compute capability 9.0 and newer bring tiles through shared memory. A build has both with
`-C cmake.define.FLATSTEP_CUDA_BULK=ON`. First their bits are held against each other: nothing is
timed where they differ. Then Adam on Llama-3.2-1B's tensors and on one flat tensor, and RMSprop and
SGD on a flat one, in float32 and bfloat16: the forms, in several shapes, and the copy take turns.

It needs torch and flatstep and nothing else. The exit code is 1 where bits differ.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import geometric_mean, median
from time import perf_counter
from typing import Any

import torch
from gpu_targets import FLAT, LLAMA, machine_facts, parameters
from torch.nn import Parameter

import flatstep
from flatstep.profiling.device import device_named
from flatstep.profiling.limit import Copies, bytes_moved
from flatstep.profiling.measure import LEAST_ROUNDS, Race, on_the_gpu
from flatstep.profiling.workloads import Shape

FORM = "FLATSTEP_CUDA_FORM"
# As csrc/cuda/form.h reads them. Bytes on their way to a processor: for the vectorised form, what
# its blocks' threads ask for at once; for the bulk form, (stages - 1) × tile × arrays × blocks.
VECTORISED = ["vector", "vector,blocks=1"]
BULK = [
    "bulk,stages=2,tile=4096",
    "bulk,stages=3,tile=4096",
    "bulk,stages=4,tile=4096",
    "bulk,stages=3,tile=4096,blocks=1",
    "bulk,stages=4,tile=2048",
    "bulk,stages=2,tile=8192",
    "bulk,stages=3,tile=8192",
    "bulk,stages=4,tile=8192",
    "bulk,stages=3,tile=12288",
]
CHECKED = ["bulk,stages=2,tile=512", *BULK]
LEFT_OVER: Sequence[Shape] = [((1 << 20) + 5,), (3, 7), (128256, 64), (0,), (2049,)]
DTYPES = (torch.float32, torch.bfloat16)

Build = Callable[[list[Parameter]], torch.optim.Optimizer]


def sgd(params: list[Parameter]) -> torch.optim.Optimizer:
    return flatstep.SGD(params, momentum=0.9, nesterov=True)


def rmsprop(params: list[Parameter]) -> torch.optim.Optimizer:
    return flatstep.RMSprop(params, momentum=0.9, centered=True)


@dataclass(frozen=True)
class Case:
    """An optimizer on some tensors."""

    optimizer: str
    build: Build
    states: int
    workload: str
    shapes: Sequence[Shape]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.optimizer}, {name_of(self.dtype)}, {self.workload}"


CASES = [
    Case(*optimizer, *workload, dtype)
    for dtype in DTYPES
    for optimizer, workload in (
        (("Adam", flatstep.Adam, 2), ("Llama-3.2-1B", LLAMA)),
        (("Adam", flatstep.Adam, 2), ("one flat tensor, 1 B", FLAT)),
        (("RMSprop, momentum, centered", rmsprop, 3), ("one flat tensor, 268 M", [(1 << 28,)])),
        (("SGD, momentum, Nesterov", sgd, 1), ("one flat tensor, 268 M", [(1 << 28,)])),
    )
]


@dataclass(frozen=True)
class Found:
    """What a form reached in a case."""

    case: str
    dtype: str
    form: str
    milliseconds: float
    spread: float  # between the quartiles, as a share of the median
    share: float  # of the copy's rate
    rounds: int

    def line(self) -> str:
        return (
            f"  {self.form:34} {self.milliseconds:8.3f} ms  ± {self.spread:5.1%}  {self.share:6.3f}"
        )


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def stepping(form: str, opt: torch.optim.Optimizer) -> Callable[[], object]:
    def step() -> None:
        os.environ[FORM] = form
        opt.step()

    return step


def trained(build: Build, dtype: torch.dtype, offset: int, form: str) -> list[torch.Tensor]:
    """Parameters and states after three steps; some of the tensors are not aligned."""
    torch.manual_seed(0)
    params = parameters(LEFT_OVER, dtype, offset)
    opt = build(params)
    step = stepping(form, opt)
    for _ in range(3):
        step()
    states = [state[name] for state in opt.state.values() for name in sorted(state)]
    return [*params, *(state for state in states if state.is_cuda)]


def differing() -> Iterator[str]:
    """Where the bulk form has not the vectorised form's bits."""
    for case in {case.optimizer: case for case in CASES}.values():
        for dtype in DTYPES:
            for offset in (0, 1):
                expected = trained(case.build, dtype, offset, VECTORISED[0])
                for form in CHECKED:
                    label = f"{case.optimizer}, {name_of(dtype)}, offset {offset}: {form}"
                    try:
                        found = trained(case.build, dtype, offset, form)
                    except RuntimeError as error:
                        print(f"NOT CHECKED: {label}: {error}", flush=True)
                        continue
                    pairs = zip(found, expected, strict=True)
                    if not all(torch.equal(bits(a), bits(b)) for a, b in pairs):
                        yield label


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def measured(case: Case, seconds: float) -> list[Found]:
    """The forms and the copy in turns; prints what they reached."""
    params = parameters(case.shapes, case.dtype)
    opt = case.build(params)
    size = sum(param.nbytes for param in params)
    runs = {form: stepping(form, opt) for form in (*VECTORISED, *BULK)}
    runs["copy"] = Copies(size, params[0].device).traffic(case.states)
    race = Race(runs, on_the_gpu)
    race.run(seconds, None, lambda done: None)
    timings = race.timings()
    copy = timings.pop("copy").median
    rate = bytes_moved(size, case.states) / copy / 1e9
    print(f"{case}: the copy {copy * 1e3:.3f} ms, {rate:.0f} GB/s")
    dtype = name_of(case.dtype)
    found = [
        Found(
            case=str(case),
            dtype=dtype,
            form=form,
            milliseconds=each.median * 1e3,
            spread=each.spread,
            share=copy / each.median,
            rounds=each.rounds,
        )
        for form, each in timings.items()
    ]
    failed = [f"  {form}: {why}" for form, why in race.failures.items()]
    print(*(each.line() for each in found), *failed, sep="\n", flush=True)
    return found


def verdict(found: Sequence[Found], dtype: str) -> str:
    """Which form is faster for a dtype, each in the shape that is best over all its cases."""
    of_dtype = [each for each in found if each.dtype == dtype]
    if min(each.rounds for each in of_dtype) < LEAST_ROUNDS:
        return f"{dtype}: no verdict: fewer than {LEAST_ROUNDS} rounds; give it more --seconds"
    cases = {each.case for each in of_dtype}
    by_form: dict[str, list[Found]] = {}
    for each in of_dtype:
        by_form.setdefault(each.form, []).append(each)
    means = {
        form: geometric_mean(each.share for each in own)
        for form, own in by_form.items()
        if len(own) == len(cases)
    }
    best = []
    for forms in (VECTORISED, BULK):
        ran = [form for form in forms if form in means]
        if not ran:
            return f"{dtype}: no verdict: none of {', '.join(forms)} ran in every case"
        best.append(max(ran, key=means.__getitem__))
    vectorised, bulk = best
    gain = means[bulk] / means[vectorised] - 1
    spread = median(each.spread for form in best for each in by_form[form])
    reached = ", ".join(f"{form} {means[form]:.3f}" for form in best)
    if abs(gain) <= spread:
        said = "no more apart than their spread: keep the vectorised form, which is less code"
    elif gain > 0:
        said = "keep the bulk form"
    else:
        said = "keep the vectorised form"
    return f"{dtype}: of the copy's rate {reached}; {gain:+.1%}, spread {spread:.1%}: {said}"


def main() -> int:
    """Checks, measures, prints, and says which form is to be kept."""
    began = perf_counter()
    parser = argparse.ArgumentParser(description="Measures both forms of the GPU's kernels.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found here")
    parser.add_argument("--seconds", type=float, default=50.0, help="in all (default: %(default)s)")
    options = parser.parse_args()
    try:
        device = device_named("cuda")
        for form in (BULK[0], VECTORISED[0]):
            stepping(form, sgd(parameters([(1 << 16,)], torch.float32)))()
    except (ValueError, RuntimeError) as error:
        parser.error(f"nothing can be measured: {error}")
    machine = machine_facts(device)
    print(machine)
    wrong = list(differing())
    for what in wrong:
        print(f"OTHER BITS: {what}", flush=True)
    found: list[Found] = []
    for place, case in enumerate(() if wrong else CASES):
        left = options.seconds - (perf_counter() - began)
        found += measured(case, max(0.0, left / (len(CASES) - place)))
        torch.cuda.empty_cache()
        write(options.json, machine, wrong, found)  # what is there when the time runs out
    write(options.json, machine, wrong, found)
    for dtype in dict.fromkeys(each.dtype for each in found):
        print(verdict(found, dtype))
    return 1 if wrong else 0


def write(
    to: Path | None, machine: Mapping[str, Any], wrong: list[str], found: Sequence[Found]
) -> None:
    if to is not None:
        kept = {"machine": machine, "other_bits": wrong, "found": [asdict(each) for each in found]}
        to.write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
