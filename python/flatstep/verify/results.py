"""What a verification found, as plain data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Value:
    """A stored value: its bits and what they mean."""

    hex: str
    value: str


@dataclass
class Mismatch:
    """The first element in which a kernel left the reference, and how to see it again.

    ``index`` counts in ``array``; below zero or from ``size`` on, the kernel wrote outside it.
    ``inputs`` holds that element of every array before the update.
    """

    rule: str
    variant: str
    dtype: str
    isa: str
    threads: int
    size: int
    setup: int
    step: int
    scale: float
    hyper: dict[str, float]
    array: str
    index: int
    inputs: dict[str, Value]
    expected: Value
    got: Value
    differing: int
    command: str

    @property
    def kernel(self) -> tuple[str, str, str, str]:
        """What identifies the kernel."""
        return self.rule, self.variant, self.dtype, self.isa


@dataclass
class Tally:
    """How many cases ran for one rule, dtype and instruction set, and how many differed."""

    rule: str
    dtype: str
    isa: str
    cases: int = 0
    mismatches: int = 0


@dataclass
class Distance:
    """How far parameters are from the reference's after some steps, in ULP of their dtype.

    ``lost`` is the share of elements that are not finite; ``worst`` and ``mean`` are of the others.
    """

    optimizer: str
    options: str
    dtype: str
    implementation: str
    worst: int
    mean: float
    lost: float


@dataclass
class Report:
    """What a verification found.

    ``mismatches`` holds the first of each variant, dtype and instruction set; the tallies count
    them all.
    """

    quick: bool
    seed: int
    planned: int
    isas: list[str]
    threads: list[int]
    sizes: list[int]
    names: list[str] = field(default_factory=list)
    tallies: list[Tally] = field(default_factory=list)
    mismatches: list[Mismatch] = field(default_factory=list)
    distances: list[Distance] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def cases(self) -> int:
        """How many cases ran."""
        return sum(tally.cases for tally in self.tallies)

    @property
    def mismatched(self) -> int:
        """How many cases differed."""
        return sum(tally.mismatches for tally in self.tallies)

    @property
    def strayed(self) -> list[Distance]:
        """The runs in which an optimizer of flatstep left the reference."""
        own = (distance for distance in self.distances if distance.implementation == "flatstep")
        return [distance for distance in own if distance.worst or distance.lost]

    @property
    def ok(self) -> bool:
        """Whether all that ran has the reference's bits, and the names agree."""
        return not self.mismatched and not self.names and not self.strayed

    def tally(self, rule: str, dtype: str, isa: str) -> Tally:
        """The tally of one rule, dtype and instruction set."""
        for tally in self.tallies:
            if (tally.rule, tally.dtype, tally.isa) == (rule, dtype, isa):
                return tally
        self.tallies.append(Tally(rule, dtype, isa))
        return self.tallies[-1]

    def add(self, mismatch: Mismatch) -> None:
        """Keeps a mismatch, unless there is one of its variant, dtype and instruction set."""
        if all(mismatch.kernel != kept.kernel for kept in self.mismatches):
            self.mismatches.append(mismatch)

    def to_dict(self) -> dict[str, Any]:
        """The report in types that JSON has."""
        totals = {"ok": self.ok, "cases": self.cases, "mismatched": self.mismatched}
        return totals | dataclasses.asdict(self)
