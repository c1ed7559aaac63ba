"""The same update at growing sizes, on more threads, over more tensors; what a tensor costs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from flatstep._torch import DTYPES
from flatstep.profiling.case import bytes_of
from flatstep.profiling.implementations import optimizer_named
from flatstep.profiling.passes import ALL
from flatstep.profiling.results import Overhead, Point, Sweep
from flatstep.profiling.workloads import WORKLOADS, Workload

LIMIT = "limit"
OPTIMIZER_BY_DEFAULT = "adam"
SIZES = tuple(10**power for power in range(2, 9))
TENSORS = (1, 10, 100, 1000, 10_000)
TENSOR_SIZE = 256
THREADS_WORKLOAD = "resnet50"
LEAST_POINTS = 3  # of a line that does not go through all of them


@dataclass(frozen=True)
class Place:
    """A point of a sweep before it is measured.

    Attributes:
        x: Where it is.
        workload: What is updated there.
        threads: How many of the CPU's are used; None for as many as elsewhere.
    """

    x: int
    workload: Workload
    threads: int | None = None


@dataclass(frozen=True)
class SweepTask:
    """A sweep to measure.

    Attributes:
        name: As it is chosen: "sizes", "threads" or "tensors".
        optimizer: The optimizer's name.
        dtype: Of parameters, gradients and states.
    """

    name: str
    optimizer: str = OPTIMIZER_BY_DEFAULT
    dtype: str = "float32"

    def places(self) -> list[Place]:
        """Its points, in growing order."""
        return SWEEPS[self.name].places()

    def result(self) -> Sweep:
        """The sweep, before it is measured."""
        kind = SWEEPS[self.name]
        return Sweep(kind.axis, kind.title, self.optimizer, self.dtype)

    def point(self, place: Place) -> Point:
        """A point, before it is measured."""
        count = place.workload.parameters
        moved = bytes_of(place.workload, self.optimizer, DTYPES[self.dtype])
        return Point(parameters=count, bytes_moved=moved, x=place.x)


@dataclass(frozen=True)
class Kind:
    """A kind of sweep.

    Attributes:
        axis: What grows.
        title: What is measured, in words.
        places: Makes its points, in growing order.
    """

    axis: str
    title: str
    places: Callable[[], list[Place]]


def _sizes() -> list[Place]:
    return [Place(size, Workload(f"{size:,}", "One tensor", ((size,),))) for size in SIZES]


def _threads() -> list[Place]:
    workload = WORKLOADS[THREADS_WORKLOAD]
    return [Place(count, workload, count) for count in thread_counts(cores())]


def _tensors() -> list[Place]:
    shape = (TENSOR_SIZE,)
    return [Place(n, Workload(f"{n:,}", "Small tensors", (shape,) * n)) for n in TENSORS]


SWEEPS: dict[str, Kind] = {
    "sizes": Kind("parameters", "One tensor, from small to large", _sizes),
    "threads": Kind("threads", "ResNet-50, on more and more threads", _threads),
    "tensors": Kind("tensors", f"Tensors of {TENSOR_SIZE}, from one to many", _tensors),
}


def cores() -> int:
    """How many of the machine's processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def thread_counts(most: int) -> list[int]:
    """The powers of two up to a count, and the count itself."""
    powers = [1 << power for power in range(most.bit_length())]
    return powers if powers[-1] == most else [*powers, most]


def plan_sweeps(
    names: Sequence[str],
    optimizers: Sequence[str] | None = None,
    dtype: str | None = None,
    device: str = "cpu",
) -> list[SweepTask]:
    """The sweeps to measure.

    Args:
        names: "sizes", "threads", "tensors", or "all" for those that the device has.
        optimizers: Names such as "adam", which is the default.
        dtype: A name such as "float32"; None for float32.
        device: "cpu" or "cuda".

    Raises:
        ValueError: An unknown name, with those that there are, or a sweep that the device has not.
    """
    for name in names:
        if name not in (*SWEEPS, ALL):
            raise ValueError(f"no sweep '{name}'; there are {', '.join(SWEEPS)} and {ALL}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"no dtype '{dtype}'; there are {', '.join(DTYPES)}")
    if "threads" in names and device != "cpu":
        raise ValueError(
            f"a sweep of threads is for device 'cpu': choose sizes or tensors with '{device}'"
        )
    on_device = [name for name in SWEEPS if name != "threads" or device == "cpu"]
    chosen = on_device if ALL in names else [name for name in SWEEPS if name in names]
    wanted = list(dict.fromkeys(optimizers or [OPTIMIZER_BY_DEFAULT]))
    for name in wanted:
        optimizer_named(name)
    return [SweepTask(name, each, dtype or "float32") for each in wanted for name in chosen]


def overheads(sweep: Sweep) -> list[Overhead]:
    """What a step and a tensor cost each implementation, and the limit for as many bytes.

    A line through the times over the number of tensors: its relative distances from them are as
    small as they can be, so that microseconds and milliseconds weigh alike. An implementation with
    fewer than three times has none.
    """
    times: dict[str, dict[int, float]] = {}
    for point in sweep.points:
        limit = point.best_limit()
        if limit is not None:
            times.setdefault(LIMIT, {})[point.x] = limit.timing.median
        for result in point.results:
            if result.timing is not None:
                times.setdefault(result.implementation, {})[point.x] = result.timing.median
    found = []
    for implementation, by_count in times.items():
        if len(by_count) >= LEAST_POINTS:
            step, tensor, spread = fit_line(list(by_count), list(by_count.values()))
            found.append(Overhead(implementation, sweep.optimizer, step, tensor, spread))
    return found


def fit_line(counts: Sequence[int], seconds: Sequence[float]) -> tuple[float, float, float]:
    """The intercept and the slope of a line, and the root of the mean square of what it is off.

    All by least squares of the relative distances. Neither cost is negative, whatever the noise.
    """
    x, y = np.asarray(counts, float), np.asarray(seconds, float)
    columns = np.stack([1 / y, x / y], axis=1)
    both, *_ = np.linalg.lstsq(columns, np.ones_like(y), rcond=None)
    lines = [both]
    if both.min() < 0:
        alone = columns.sum(axis=0) / (columns**2).sum(axis=0)
        lines = [np.array([alone[0], 0.0]), np.array([0.0, alone[1]])]
    off, line = min(
        (float(np.sqrt(np.mean((columns @ line - 1) ** 2))), tuple(map(float, line)))
        for line in lines
    )
    step, tensor = line
    return step, tensor, off
