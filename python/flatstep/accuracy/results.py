"""What a measurement of accuracy found, as plain data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

PERCENTILES = (50, 90, 99)


@dataclass
class Distances:
    """How far the elements of one array are from the truth, after some steps.

    A distance is the number of values of ``dtype`` from an element to the truth rounded to
    ``dtype``: 0 where nothing better can be stored, 1 for a neighbour of that.

    Attributes:
        steps: How many steps were made.
        array: "param", or a state by torch's name.
        dtype: In which the array is stored.
        worst: The largest distance of a finite element, as are the next three of those.
        mean: The mean distance.
        percentiles: Of the distances, by their numbers.
        histogram: How many distances there are of 0, 1, 2, 3 to 4, 5 to 8, and so on.
        not_finite: How many elements are infinite or NaN.
    """

    steps: int
    array: str
    dtype: str
    worst: int
    mean: float
    percentiles: dict[str, int]
    histogram: list[int]
    not_finite: int

    @classmethod
    def of(
        cls, steps: int, array: str, dtype: str, apart: npt.NDArray[np.uint64], not_finite: int
    ) -> Distances:
        """Those of the finite elements, ``apart`` from the truth."""
        found = apart if apart.size else np.zeros(1, np.uint64)
        # An element is counted at the number of bits of its distance less 1; 0 is before them all.
        _, exponents = np.frexp((np.maximum(apart, 1) - 1).astype(np.float64))
        places = np.where(apart == 0, 0, exponents + 1)
        percentiles = np.percentile(found, PERCENTILES, method="higher")
        return cls(
            steps=steps,
            array=array,
            dtype=dtype,
            worst=int(found.max()),
            mean=float(found.astype(np.float64).mean()),
            percentiles={str(n): int(x) for n, x in zip(PERCENTILES, percentiles, strict=True)},
            histogram=np.bincount(places, minlength=1).tolist(),
            not_finite=not_finite,
        )

    @property
    def elements(self) -> int:
        """How many elements the array has."""
        return sum(self.histogram) + self.not_finite

    @property
    def exact(self) -> float:
        """The share of elements that are the truth, rounded."""
        return self.histogram[0] / self.elements


def bucket(place: int) -> str:
    """Which distances are counted at a place of a histogram."""
    if place < 3:
        return str(place)
    return f"{(1 << (place - 2)) + 1:,}–{1 << (place - 1):,}"


@dataclass
class Run:
    """One implementation's training with one rule and dtype.

    Attributes:
        rule: The rule that it claims to follow.
        dtype: Of the parameters and gradients.
        implementation: Its name in tables.
        path: Of the class, "package.module:Class".
        options: What it was built with.
        distances: After each number of steps, of each array.
        error: What it raised; empty where it came to the end.
    """

    rule: str
    dtype: str
    implementation: str
    path: str
    options: dict[str, str]
    distances: list[Distances] = field(default_factory=list)
    error: str = ""

    def after(self, steps: int, array: str = "param") -> Distances | None:
        """The distances of an array after some steps; None where there are none."""
        for found in self.distances:
            if (found.steps, found.array) == (steps, array):
                return found
        return None

    def states_after(self, steps: int) -> list[Distances]:
        """The distances of the states after some steps."""
        return [d for d in self.distances if d.steps == steps and d.array != "param"]


@dataclass
class Report:
    """What a measurement of accuracy found.

    Attributes:
        steps: After how many steps distances were taken.
        elements: How many elements each run has.
        planned: How many runs there are.
        versions: Of the packages that the implementations are from.
        runs: Those that came to an end, or raised.
        seconds: How long it took.
        interrupted: Whether Ctrl-C ended it.
    """

    steps: list[int]
    elements: int
    planned: int
    versions: dict[str, str] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def failed(self) -> list[Run]:
        """The runs that raised."""
        return [run for run in self.runs if run.error]

    @property
    def measured(self) -> list[Run]:
        """The runs that came to an end."""
        return [run for run in self.runs if not run.error]

    def to_dict(self) -> dict[str, Any]:
        """The report in types that JSON has."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> Report:
        """The report that :meth:`to_dict` wrote; what is not part of one is ignored."""
        names = [known.name for known in dataclasses.fields(cls)]
        runs = [
            Run(**{**run, "distances": [Distances(**each) for each in run["distances"]]})
            for run in found["runs"]
        ]
        return cls(**{**{name: found[name] for name in names}, "runs": runs})
