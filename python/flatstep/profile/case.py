"""One workload under one optimizer: first steps, checks, and the race against the limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import perf_counter

import torch

from flatstep._torch import HUGE_PAGE, zeros_flat
from flatstep.profile.check import STEPS, Sample, Values, check
from flatstep.profile.implementations import Implementation, Tensors
from flatstep.profile.limit import Pages, Streams
from flatstep.profile.measure import Race, Timing
from flatstep.profile.results import Case, Limit, Result

FIRST_STEPS = 0.4  # of a case's time, roughly


def measure(
    case: Case,
    tensors: Tensors,
    streams: Streams,
    sample: Sample,
    paths: Iterable[str],
    until: float,
    rounds: int | None,
    on_progress: Callable[[float], object],
) -> None:
    """Fills in a case's limits and results; an interrupt leaves those that there are so far.

    Args:
        case: The case, with neither.
        tensors: The workload's parameters and gradients.
        streams: The arrays for the limit.
        sample: Where the results are checked.
        paths: torch's paths to measure.
        until: When it should end, by time.perf_counter.
        rounds: How many rounds to run, in place of those that fit into the time.
        on_progress: Called with the share that is done.
    """
    implementations = tensors.implementations(case.optimizer, paths)
    for place, implementation in enumerate(implementations):
        if not implementation.ours:
            for other in implementations[:place]:
                if not other.ours:  # one copy of torch's states in memory is enough
                    other.optimizer.state.clear()
        # Memory that was in use just before is at hand: nobody's first step waits for more of it.
        zeros_flat(case.states * streams.size, torch.uint8).zero_()
        case.results.append(_first_steps(implementation, case.optimizer, sample))
        on_progress(FIRST_STEPS * (place + 1) / len(implementations))
    right = [
        implementation
        for implementation, result in zip(implementations, case.results, strict=True)
        if result.problem is None
    ]
    theirs = [implementation for implementation in right if not implementation.ours]
    for implementation in theirs:
        implementation.optimizer.state = theirs[-1].optimizer.state

    pages = {implementation.name: Pages() for implementation in right}
    kinds = [Pages()]
    if streams.size >= HUGE_PAGE:
        pages = {implementation.name: implementation.pages() for implementation in right}
        kinds = [Pages(params=True, states=True), *pages.values(), *kinds]
    limits = {kind: streams.traffic(case.states, kind) for kind in kinds}
    race = Race(
        {
            **{str(kind): traffic for kind, traffic in limits.items()},
            **{implementation.name: implementation.optimizer.step for implementation in right},
        }
    )
    try:
        race.run(
            until - perf_counter(),
            rounds,
            lambda done: on_progress(FIRST_STEPS + (1 - FIRST_STEPS) * done),
        )
    finally:
        timings = race.timings()
        for kind in limits:
            if timing := timings.get(str(kind)):
                case.limits.append(
                    Limit(str(kind), streams.granted(kind), timing, case.rate(timing))
                )
        for result in case.results:
            if timing := timings.get(result.implementation):
                _fill_in(result, case, timing, pages[result.implementation])
        best = case.torch_best()
        for result in case.results:
            if result.timing is not None and best is not None and best.timing is not None:
                result.to_torch = result.timing.median / best.timing.median


def _first_steps(implementation: Implementation, optimizer: str, sample: Sample) -> Result:
    """Makes the steps that are checked, and times the first."""
    result = Result(implementation.name)
    before = Values.of(implementation, sample)
    try:
        start = perf_counter()
        implementation.optimizer.step()
        result.first_step = perf_counter() - start
        for _ in range(STEPS - 1):
            implementation.optimizer.step()
    except (RuntimeError, TypeError, ValueError) as error:
        result.problem = f"failed: {error}"
        return result
    result.problem = check(implementation, optimizer, before, Values.of(implementation, sample))
    return result


def _fill_in(result: Result, case: Case, timing: Timing, pages: Pages) -> None:
    result.timing = timing
    result.pages = str(pages)
    result.ns_per_parameter = timing.median / case.parameters * 1e9
    result.gb_per_s = case.rate(timing)
    same = [limit for limit in case.limits if limit.pages == result.pages]
    if same:
        result.of_limit = same[0].timing.median / timing.median
