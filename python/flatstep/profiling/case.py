"""One workload under one optimizer: first steps, checks, and the race against the limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import perf_counter

import torch

from flatstep._torch import zeros_flat
from flatstep.profiling.check import STEPS, Sample, Values, check
from flatstep.profiling.device import Device
from flatstep.profiling.implementations import Implementation, Tensors
from flatstep.profiling.limit import Pages, Traffic
from flatstep.profiling.measure import Race, Timing
from flatstep.profiling.results import Case, Limit, Measured, Result

FIRST_STEPS = 0.4  # of a case's time, roughly


def measure(
    case: Case,
    device: Device,
    tensors: Tensors,
    limit: Traffic,
    sample: Sample,
    paths: Iterable[str],
    until: float,
    rounds: int | None,
    on_progress: Callable[[float], object],
) -> None:
    """Fills in a case's limits and results; an interrupt leaves those that there are so far.

    Args:
        case: The case, with neither.
        device: Where it is measured.
        tensors: The workload's parameters and gradients.
        limit: The memory traffic of the workload.
        sample: Where the results are checked.
        paths: torch's paths to measure.
        until: When it should end, by time.perf_counter.
        rounds: How many rounds to run, in place of those that fit into the time.
        on_progress: Called with the share that is done.
    """
    implementations = tensors.implementations(case.optimizer, paths)
    owner: Implementation | None = None  # of torch's states: one copy in memory is enough
    for place, implementation in enumerate(implementations):
        if owner is not None and not implementation.ours:
            owner.drop_states()
        # Memory that was in use just before is at hand: nobody's first step waits for more of it.
        zeros_flat(case.states * limit.size, torch.uint8, device.where).zero_()
        case.results.append(_first_steps(implementation, case.optimizer, device, sample))
        if not implementation.ours:
            owner = implementation
        on_progress(FIRST_STEPS * (place + 1) / len(implementations))
    right = [
        implementation
        for implementation, result in zip(implementations, case.results, strict=True)
        if result.problem is None
    ]
    for implementation in right:
        if owner is not None and not implementation.ours:
            implementation.share_states(owner)

    pages = {implementation.name: implementation.pages(limit) for implementation in right}
    limits = {
        kind: (limit_name(kind), limit.traffic(case.states, kind))
        for kind in limit.kinds(pages.values())
    }
    race = Race(
        {
            **dict(limits.values()),
            **{implementation.name: implementation.optimizer.step for implementation in right},
        },
        device.stopwatch,
    )
    try:
        race.run(
            until - perf_counter(),
            rounds,
            lambda done: on_progress(FIRST_STEPS + (1 - FIRST_STEPS) * done),
        )
    finally:
        timings = race.timings()
        for kind, (name, _) in limits.items():
            if timing := timings.get(name):
                case.limits.append(
                    Limit(text_of(kind), limit.granted(kind), timing, case.rate(timing))
                )
        for result in case.results:
            if timing := timings.get(result.implementation):
                fill_in(result, case, timing, pages[result.implementation])
        case.compare()


def _first_steps(
    implementation: Implementation, optimizer: str, device: Device, sample: Sample
) -> Result:
    """Makes the steps that are checked, and times the first."""
    result = Result(implementation.name)
    before = Values.of(implementation, sample)
    device.start_watching()
    try:
        result.first_step = device.stopwatch(implementation.optimizer.step, 1)
        for _ in range(STEPS - 1):
            implementation.optimizer.step()
    except (RuntimeError, TypeError, ValueError) as error:
        result.problem = f"failed: {error}"
        return result
    result.most_bytes = device.most_bytes()
    result.problem = check(implementation, optimizer, before, Values.of(implementation, sample))
    return result


def text_of(pages: Pages | None) -> str | None:
    """Pages in words."""
    return None if pages is None else str(pages)


def limit_name(pages: Pages | None) -> str:
    """What the limit on these pages is called in a race."""
    return "limit" if pages is None else f"limit, {pages}"


def fill_in(result: Result, measured: Measured, timing: Timing, pages: Pages | None) -> None:
    """Fills in a result's time, and what follows from it and from the limits."""
    result.timing = timing
    result.pages = text_of(pages)
    result.ns_per_parameter = timing.median / measured.parameters * 1e9
    result.gb_per_s = measured.rate(timing)
    same = [limit for limit in measured.limits if limit.pages == result.pages]
    if same:
        result.of_limit = same[0].timing.median / timing.median
