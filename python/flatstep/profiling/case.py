"""One optimizer over some tensors: first steps, checks, and the race against the limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch

from flatstep._torch import zeros_flat
from flatstep.profiling.check import STEPS, Sample, Values, check
from flatstep.profiling.device import Device
from flatstep.profiling.implementations import (
    Entrant,
    Implementation,
    Rivals,
    Tensors,
    hyperparameters,
    states_kept,
)
from flatstep.profiling.limit import Pages, Traffic, bytes_moved
from flatstep.profiling.measure import FAILURES, Race, Timing, failure
from flatstep.profiling.results import Limit, Measured, Result
from flatstep.profiling.workloads import Workload

FIRST_STEPS = 0.4  # of a case's time, roughly


@dataclass
class Ground:
    """What the races over one workload's tensors share.

    Attributes:
        device: Where they are run.
        tensors: The parameters and gradients.
        limit: The memory traffic.
        sample: Where the results are checked.
    """

    device: Device
    tensors: Tensors
    limit: Traffic
    sample: Sample

    @staticmethod
    def of(workload: Workload, dtype: torch.dtype, device: Device) -> Ground:
        """Takes the memory for a workload."""
        return Ground(
            device,
            Tensors(workload, dtype, device.where),
            device.traffic(workload.parameters * dtype.itemsize),
            Sample(workload.shapes),
        )


def bytes_of(workload: Workload, optimizer: str, dtype: torch.dtype) -> int:
    """What an update reads and writes, by the rule's own count."""
    return bytes_moved(workload.parameters * dtype.itemsize, states_kept(optimizer))


def measure(
    measured: Measured,
    optimizer: str,
    ground: Ground,
    rivals: Rivals,
    until: float,
    rounds: int | None,
    on_progress: Callable[[float], object],
) -> None:
    """Fills in limits and results; an interrupt leaves those that there are so far.

    Args:
        measured: Where they go.
        optimizer: The optimizer's name.
        ground: The tensors.
        rivals: What is raced beside flatstep.
        until: When it should end, by time.perf_counter.
        rounds: How many rounds to run, in place of those that fit into the time.
        on_progress: Called with the share that is done.
    """
    device, limit = ground.device, ground.limit
    states = states_kept(optimizer)
    entrants = ground.tensors.entrants(optimizer, rivals)
    right: list[Implementation] = []
    owner: Implementation | None = None  # of torch's states: one copy in memory is enough
    for place, entrant in enumerate(entrants):
        if owner is not None and entrant.of_torch:
            owner.drop_states()
        # Memory that was in use just before is at hand: nobody's first step waits for more of it.
        zeros_flat(states * limit.size, torch.uint8, device.where).zero_()
        implementation, result = _first_steps(entrant, optimizer, ground)
        measured.results.append(result)
        if implementation is not None and result.problem is None:
            right.append(implementation)
        if entrant.of_torch:
            owner = implementation or owner
        on_progress(FIRST_STEPS * (place + 1) / len(entrants))
    for implementation in right:
        if owner is not None and implementation.of_torch:
            implementation.share_states(owner)
    _race(measured, right, states, ground, until, rounds, on_progress)


def _first_steps(
    entrant: Entrant, optimizer: str, ground: Ground
) -> tuple[Implementation | None, Result]:
    """Builds an implementation, makes the steps that are checked, and times the first."""
    device, result = ground.device, Result(entrant.name)
    implementation: Implementation | None = None
    params = entrant.params()
    device.start_watching()
    try:
        built = entrant.build(params)
        implementation = Implementation(entrant.name, built, params, entrant.subject is not None)
        before = Values.of(implementation, ground.sample)
        result.first_step = device.stopwatch(implementation.optimizer.step, 1)
        for _ in range(STEPS - 1):
            implementation.optimizer.step()
        result.most_bytes = device.most_bytes()
        after = Values.of(implementation, ground.sample)
        result.problem = check(implementation, optimizer, before, after)
    except FAILURES as error:
        result.problem = failure(error)
    if result.problem is not None and entrant.subject is not None:
        options = hyperparameters(entrant.subject, optimizer).items()
        with_them = ", ".join(f"{key}={value}" for key, value in options)
        result.problem += f" (built with {with_them or 'no options'})"
    return implementation, result


def _race(
    measured: Measured,
    right: list[Implementation],
    states: int,
    ground: Ground,
    until: float,
    rounds: int | None,
    on_progress: Callable[[float], object],
) -> None:
    limit = ground.limit
    pages = {implementation.name: implementation.pages(limit) for implementation in right}
    limits = {
        kind: (limit_name(kind), limit.traffic(states, kind))
        for kind in limit.kinds(pages.values())
    }
    race = Race(
        {
            **dict(limits.values()),
            **{implementation.name: implementation.optimizer.step for implementation in right},
        },
        ground.device.stopwatch,
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
                rate = measured.rate(timing)
                measured.limits.append(Limit(text_of(kind), limit.granted(kind), timing, rate))
        for result in measured.results:
            result.problem = race.failures.get(result.implementation, result.problem)
            if timing := timings.get(result.implementation):
                fill_in(result, measured, timing, pages[result.implementation])
        measured.compare()


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
