"""What a conformance run found, as plain data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from flatstep.verify.results import Value


class Outcome(str, Enum):
    """How a case ended."""

    SAME = "same bits"
    CLOSE = "within N ULP"
    REFUSED = "refused"
    NOT_OFFERED = "not offered"
    WRONG = "wrong"
    IGNORED = "ignored in silence"
    ERROR = "error"
    CRASH = "crash"
    HANG = "no end"

    @property
    def is_fine(self) -> bool:
        """Whether an optimizer may be used that ends so."""
        return self in FINE


FINE = (Outcome.SAME, Outcome.CLOSE, Outcome.REFUSED, Outcome.NOT_OFFERED)


@dataclass
class Evidence:
    """What was seen, at the first step and in the first element that show it.

    Attributes:
        what: One sentence.
        step: Counted from 1; 0 before the first.
        shape: Of the parameter.
        stride: Of the parameter, in elements.
        index: Of the element; in the storage around the parameter where ``what`` says so.
        expected: What the reference has there.
        got: What the optimizer left there.
        allowed: How far from the exact result the element may be.
        count: How many elements are wrong.
    """

    what: str
    step: int = 0
    shape: list[int] | None = None
    stride: list[int] | None = None
    index: list[int] | None = None
    expected: Value | None = None
    got: Value | None = None
    allowed: float | None = None
    count: int = 0

    @staticmethod
    def of(found: dict[str, Any]) -> Evidence:
        """The inverse of ``dataclasses.asdict``."""
        values = {
            name: Value(**found[name]) if found[name] else None for name in ("expected", "got")
        }
        return Evidence(**{**found, **values})


@dataclass
class Result:
    """How one case ended for one dtype.

    Attributes:
        case: The case's name.
        dtype: The parameters' dtype.
        outcome: How it ended.
        ulp: The largest distance of a parameter from the reference, where it was compared.
        size: The smallest size that shows the outcome, where something is wrong.
        evidence: What was seen, unless all was well.
        command: What repeats it.
        output: The last lines that the process printed, where something is wrong.
        seconds: How long it took.
    """

    case: str
    dtype: str
    outcome: Outcome
    ulp: int = 0
    size: int | None = None
    evidence: Evidence | None = None
    command: str = ""
    output: str = ""
    seconds: float = 0.0

    @property
    def name(self) -> str:
        """As in ``sliced-float32``."""
        return f"{self.case}-{self.dtype}"

    @property
    def text(self) -> str:
        """The outcome with its number."""
        return f"within {self.ulp:,} ULP" if self.outcome is Outcome.CLOSE else self.outcome.value


@dataclass
class Report:
    """What a conformance run found.

    Attributes:
        optimizer: The class, as "package.module:Class".
        options: What it was built with, in Python's notation.
        rule: What it was held against.
        planned: How many cases there are to run.
        results: Those that ran.
        seconds: How long they took together.
        interrupted: Whether Ctrl-C ended it.
    """

    optimizer: str
    options: list[str]
    rule: str
    planned: int
    results: list[Result] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: bool = False

    @property
    def failures(self) -> list[Result]:
        """The results that are not fine."""
        return [result for result in self.results if not result.outcome.is_fine]

    @property
    def ok(self) -> bool:
        """Whether everything that ran is fine."""
        return not self.failures

    def count(self, outcomes: Iterable[Outcome]) -> int:
        """How many cases ended in one of these ways."""
        return sum(result.outcome in tuple(outcomes) for result in self.results)

    def to_dict(self) -> dict[str, Any]:
        """The report in types that JSON has."""
        totals = {
            outcome.value: count for outcome in Outcome if (count := self.count([outcome])) > 0
        }
        return {"ok": self.ok, "outcomes": totals} | dataclasses.asdict(self)
