"""Timing that compares: the contestants take turns in one process, and medians are kept."""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import torch

SAMPLE_SECONDS = 2e-3  # a shorter call is repeated within a sample
LEAST_ROUNDS = 5
LEAST_TURNS = 3  # of the slowest call in them
PATIENCE = 5.0  # seconds over time before a race is broken off all the same
MOST_ROUNDS = 60


# Whatever an optimizer raises, also one that ends the process; but not an interrupt.
FAILURES = (Exception, SystemExit)

# Runs a call several times and says how many seconds one took.
Stopwatch = Callable[[Callable[[], object], int], float]


def on_the_host(call: Callable[[], object], repeats: int) -> float:
    """The seconds of one call, from several, by the host's clock."""
    start = perf_counter()
    for _ in range(repeats):
        call()
    return (perf_counter() - start) / repeats


def on_the_gpu(call: Callable[[], object], repeats: int) -> float:
    """The seconds of one call, from several, between two events of the GPU's current stream.

    What the stream had to do before is not counted; where the host cannot keep up with the GPU, its
    time is.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1e3 / repeats


def failure(error: BaseException) -> str:
    """What a failure is called in a report."""
    if isinstance(error, RuntimeError) and str(error):
        return f"failed: {error}"
    return f"failed: {type(error).__name__}: {error}"


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median over the rounds, the quartiles and the extremes."""

    median: float
    lower_quartile: float
    upper_quartile: float
    least: float
    most: float
    rounds: int

    @staticmethod
    def of(samples: list[float]) -> Timing:
        """The timing that at least one sample gives."""
        if len(samples) > 1:
            lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
        else:
            lower = median = upper = samples[0]
        return Timing(median, lower, upper, min(samples), max(samples), len(samples))

    @property
    def spread(self) -> float:
        """Between the quartiles, as a share of the median."""
        return (self.upper_quartile - self.lower_quartile) / self.median


class Race:
    """Calls that take turns, in another order each round.

    A call that takes several times as long as the shortest sits out some rounds. One that raises
    drops out.

    Attributes:
        failures: What those raised that have dropped out.
    """

    def __init__(
        self, calls: Mapping[str, Callable[[], object]], stopwatch: Stopwatch = on_the_host
    ):
        self.calls = calls
        self.stopwatch = stopwatch
        self.samples: dict[str, list[float]] = {name: [] for name in calls}
        self.failures: dict[str, str] = {}

    def run(
        self, seconds: float, rounds: int | None, on_progress: Callable[[float], object]
    ) -> None:
        """Runs the given number of rounds, or those that fit into the time.

        They are at least :data:`LEAST_ROUNDS`, unless the machine becomes so slow that even those
        take far longer; everything has its turn once at least.

        Args:
            seconds: How long the race may take.
            rounds: How often each call takes its turn; the time is ignored then.
            on_progress: Called with the share of the race that is done.
        """
        until = perf_counter() + seconds
        repeats: dict[str, int] = {}
        costs: dict[str, float] = {}
        for name, call in self.calls.items():
            with self._guard(name):
                repeats[name], costs[name] = _calibrate(call, self.stopwatch)
        strides = dict.fromkeys(costs, 1)
        if not costs:
            return
        patience = float("inf")
        if rounds is None:
            patience = PATIENCE
            shortest = min(costs.values())
            strides = {name: max(1, round(cost / shortest / 2)) for name, cost in costs.items()}
            a_round = sum(cost / strides[name] for name, cost in costs.items())
            fitting = int((until - perf_counter()) / a_round)
            rounds = min(max(fitting, LEAST_ROUNDS), MOST_ROUNDS)
            most = (rounds - 1) // (LEAST_TURNS - 1)
            strides = {name: min(stride, most) for name, stride in strides.items()}
        shuffled = random.Random(0)
        collects = gc.isenabled()
        gc.disable()
        try:
            for turn in range(rounds):
                running = [name for name in costs if name not in self.failures]
                due = [name for name in running if turn % strides[name] == 0]
                for name in shuffled.sample(due, len(due)):
                    with self._guard(name):
                        self.samples[name].append(self.stopwatch(self.calls[name], repeats[name]))
                on_progress((turn + 1) / rounds)
                if perf_counter() > until + patience:
                    break
        finally:
            if collects:
                gc.enable()

    @contextmanager
    def _guard(self, name: str) -> Iterator[None]:
        try:
            yield
        except FAILURES as error:
            self.failures[name] = failure(error)

    def timings(self) -> dict[str, Timing]:
        """The timing of each call that has had a turn, and has not dropped out."""
        return {
            name: Timing.of(samples)
            for name, samples in self.samples.items()
            if samples and name not in self.failures
        }


def _calibrate(call: Callable[[], object], stopwatch: Stopwatch) -> tuple[int, float]:
    """How often a call is repeated within a sample, and the seconds that this takes."""
    repeats = 1
    while True:
        took = repeats * stopwatch(call, repeats)
        if took > SAMPLE_SECONDS / 4:
            right = max(1, round(repeats * SAMPLE_SECONDS / took))
            return right, took / repeats * right
        repeats *= 4
