"""What changed between two profiles: ``flatstep compare``.

A shared machine is slower today than yesterday, so the times of two runs say little about the code.
Each run measures the memory traffic of an update beside the update, in turns. A time is therefore
divided by that limit of its own run before it is compared; where a run has none, as in training, by
torch's time. What has grown has grown beside the machine.
"""

from __future__ import annotations

import math
import re
import shlex
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from flatstep.profiling import training
from flatstep.profiling.measure import LEAST_TURNS, Timing
from flatstep.profiling.results import Bucket, Case, Machine, Pass, Point, Report
from flatstep.profiling.workloads import WORKLOADS

Verdict = Literal[
    "within noise",
    "faster",
    "slower",
    "unsure",
    "yardstick",
    "only in A",
    "only in B",
    "fails in B",
]
Unit = Literal["limit", "torch", "nothing"]

Key = tuple[str, int, str]

THRESHOLD_BY_DEFAULT = "5%"
WHOLE_STEP = "--workload mlp --optimizer adam --whole-step"


def share_of(text: str) -> float:
    """A share that is written in per cent, such as "5%".

    Raises:
        ValueError: It is written in another way.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?%", text.strip())
    if found is None:
        raise ValueError(f"'{text}' is no share in per cent: write it as in 5% or 0.5%")
    return float(found[1]) / 100


@dataclass(frozen=True)
class Figures:
    """One implementation in one run.

    Attributes:
        seconds: The median time of a call.
        noise: Half of what is between the quartiles of the cost, as a share of the cost: those of
            the time and of what it is divided by. None where there were too few turns to tell.
        cost: The time, divided by what the row says.
        of_limit: The limit's time divided by this one's, where the row's times are so divided.
        to_torch: The time divided by that of torch's fastest path.
    """

    seconds: float
    noise: float | None
    cost: float
    of_limit: float | None
    to_torch: float | None


@dataclass(frozen=True)
class Row:
    """One implementation in both runs.

    Attributes:
        place: What was measured, such as "gpt2 × adam, float32".
        implementation: Such as "flatstep flat".
        judged: Whether its change decides: every one but torch's own paths.
        unit: What the times are divided by before they are compared: the limit of the same run,
            torch's time in the same run, or nothing.
        a: In the first run.
        b: In the second run.
        change: How much the cost has grown, as a share of the first.
        verdict: What became of it. "within noise" where the quartiles of the two costs overlap.
        past_threshold: Whether it is judged, and became slower by more than the threshold, or
            fails.
        again: The options of ``flatstep profile`` that measure it.
        problem: Why there is no time in the second run.
    """

    place: str
    implementation: str
    judged: bool
    unit: Unit
    a: Figures | None
    b: Figures | None
    change: float | None
    verdict: Verdict
    past_threshold: bool
    again: str
    problem: str | None = None

    @property
    def noise(self) -> float:
        """The change that is still within the noise of the two; infinite where that is unknown."""
        if not (self.a and self.b) or self.a.noise is None or self.b.noise is None:
            return math.inf
        return self.a.noise + self.b.noise * self.b.cost / self.a.cost


@dataclass(frozen=True)
class Comparison:
    """Two runs beside each other.

    Attributes:
        machines: What the two runs do not share, such as torch's version: by what it is, in the
            first and in the second.
        limits: How much longer the limits took in the second run: the median of the shares.
        rows: In the order of the first run; what only the second has is at the end.
        threshold: The growth of a cost that is too much, as a share.
    """

    machines: dict[str, tuple[Any, Any]]
    limits: float | None
    rows: list[Row]
    threshold: float

    @property
    def compared(self) -> list[Row]:
        """The rows that both runs have a time for."""
        return [row for row in self.rows if row.change is not None]

    @property
    def past_threshold(self) -> list[Row]:
        """The rows that are too slow, or fail."""
        return [row for row in self.rows if row.past_threshold]

    @property
    def blind(self) -> list[Row]:
        """Those of the judged rows where a change as large as the threshold would be noise."""
        return [row for row in self.compared if row.judged and row.noise > self.threshold]

    @property
    def exit_code(self) -> int:
        """1 where something that is judged became too slow, 2 where nothing could be compared."""
        if self.past_threshold:
            return 1
        return 0 if self.compared else 2

    def as_dict(self) -> dict[str, Any]:
        """The comparison in dictionaries, lists, strings and numbers."""
        return {**asdict(self), "exit_code": self.exit_code}


@dataclass(frozen=True)
class _Entry:
    """One implementation in one run, and what its time can be divided by."""

    place: str
    implementation: str
    judged: bool
    again: str
    problem: str | None
    timing: Timing | None
    torch: Timing | None
    pages: str | None = None
    limits: dict[str | None, Timing] = field(default_factory=dict)

    def figures(self, yardstick: Timing | None, unit: Unit) -> Figures | None:
        """The entry's figures, its time divided by the yardstick's."""
        if self.timing is None:
            return None
        cost, low, high = self.timing.median, self.timing.lower_quartile, self.timing.upper_quartile
        rounds = self.timing.rounds
        if yardstick is not None:
            cost /= yardstick.median
            low /= yardstick.upper_quartile
            high /= yardstick.lower_quartile
            rounds = min(rounds, yardstick.rounds)
        return Figures(
            seconds=self.timing.median,
            noise=(high - low) / 2 / cost if rounds >= LEAST_TURNS else None,
            cost=cost,
            of_limit=1 / cost if unit == "limit" else None,
            to_torch=self.timing.median / self.torch.median if self.torch else None,
        )


def compare(a: Report, b: Report, threshold: float = 0.05) -> Comparison:
    """Holds what a second run found against what a first one found.

    Args:
        a: The first run.
        b: The second run.
        threshold: The growth of a cost that is too much, as a share.
    """
    before, after = dict(_entries(a)), dict(_entries(b))
    rows = [
        _row(before.get(key), after.get(key), threshold) for key in dict.fromkeys([*before, *after])
    ]
    return Comparison(
        machines=_differences(a.machine, b.machine),
        limits=_growth_of_limits(a, b),
        rows=[row for row in rows if row is not None],
        threshold=threshold,
    )


def _differences(a: Machine, b: Machine) -> dict[str, tuple[Any, Any]]:
    pairs = {f.name: (getattr(a, f.name), getattr(b, f.name)) for f in fields(Machine)}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _growth_of_limits(a: Report, b: Report) -> float | None:
    before, after = _limits(a), _limits(b)
    shares = [after[key].median / before[key].median - 1 for key in before.keys() & after]
    return statistics.median(shares) if shares else None


def _limits(report: Report) -> dict[Key, Timing]:
    return {
        (place, measured.parameters, str(limit.pages)): limit.timing
        for place, measured in report.races()
        for limit in measured.limits
    }


def _entries(report: Report) -> Iterator[tuple[Key, _Entry]]:
    again = _commands(report)
    for place, measured in report.races():
        best = measured.torch_best()
        for result in measured.results:
            entry = _Entry(
                place=place,
                implementation=result.implementation,
                judged=not result.of_torch,
                again=again[place],
                problem=result.problem,
                timing=result.timing,
                torch=best.timing if best else None,
                pages=result.pages,
                limits={limit.pages: limit.timing for limit in measured.limits},
            )
            yield (place, measured.parameters, result.implementation), entry
    whole = report.training
    if whole is not None:
        place = f"whole step, {whole.model} × {whole.optimizer}"
        torch = next((way.total for way in whole.results if way.way == training.TORCH), None)
        for way in whole.results:
            entry = _Entry(
                place, way.way, way.way != training.TORCH, WHOLE_STEP, way.problem, way.total, torch
            )
            yield (place, whole.parameters, way.way), entry


def _commands(report: Report) -> dict[str, str]:
    """The options of ``flatstep profile`` that measure each place."""
    on = "" if report.machine.device == "cpu" else f" --device {report.machine.device}"
    sweeps = {id(point): sweep for sweep in report.sweeps for point in sweep.points}
    found = {}
    of_case = ""
    for place, measured in report.races():
        if isinstance(measured, Case):
            of = _workload(measured.workload)
            by = f"--optimizer {shlex.quote(measured.optimizer)} --dtype {measured.dtype}"
            found[place] = of_case = f"{of} {by}{on}"
        elif isinstance(measured, Bucket):
            found[place] = f"{of_case} --buckets"
        elif isinstance(measured, Pass):
            found[place] = f"--pass {measured.name} --workload {measured.workload}"
        elif isinstance(measured, Point):
            sweep = sweeps[id(measured)]
            name = "sizes" if sweep.axis == "parameters" else sweep.axis
            by = f"--optimizer {shlex.quote(sweep.optimizer)} --dtype {sweep.dtype}"
            found[place] = f"--sweep {name} {by}{on}"
    return found


def _workload(name: str) -> str:
    if name in WORKLOADS:
        return f"--workload {name}"
    return f"--model {shlex.quote(name)}" if ":" in name else "--config FILE"


def _row(a: _Entry | None, b: _Entry | None, threshold: float) -> Row | None:
    """The row of an implementation that at least one run knows; None where neither has a time."""
    known = a or b
    assert known is not None
    unit, yardsticks = _unit(a or known, b or known)
    before = a.figures(yardsticks[0], unit) if a else None
    after = b.figures(yardsticks[1], unit) if b else None
    change: float | None = None
    verdict: Verdict
    if before is None and after is None:
        return None
    elif before is None:
        verdict = "only in B"
    elif after is None:
        verdict = "fails in B" if b is not None and b.problem else "only in A"
    elif unit == "torch" and known.timing is known.torch:
        verdict = "yardstick"
    else:
        change = after.cost / before.cost - 1
        verdict = _verdict(before, after)
    too_slow = verdict == "slower" and change is not None and change > threshold
    return Row(
        place=known.place,
        implementation=known.implementation,
        judged=known.judged,
        unit=unit,
        a=before,
        b=after,
        change=change,
        verdict=verdict,
        past_threshold=known.judged and (too_slow or verdict == "fails in B"),
        again=known.again,
        problem=b.problem if b else None,
    )


def _verdict(a: Figures, b: Figures) -> Verdict:
    if a.noise is None or b.noise is None:
        return "unsure"
    if abs(b.cost - a.cost) <= a.noise * a.cost + b.noise * b.cost:
        return "within noise"
    return "slower" if b.cost > a.cost else "faster"


def _unit(a: _Entry, b: _Entry) -> tuple[Unit, tuple[Timing | None, Timing | None]]:
    """What both times are divided by.

    The limit is that of the pages that the implementation lies on, where both runs gave it the
    same; otherwise that of the fastest in each run, so that a loss of huge pages is seen.
    """
    if a.limits and b.limits:
        if a.pages == b.pages and a.pages in a.limits and a.pages in b.limits:
            return "limit", (a.limits[a.pages], b.limits[a.pages])
        return "limit", (_fastest(a), _fastest(b))
    if a.torch and b.torch:
        return "torch", (a.torch, b.torch)
    return "nothing", (None, None)


def _fastest(entry: _Entry) -> Timing:
    return min(entry.limits.values(), key=lambda timing: timing.median)
