"""What both benchmarks of the promised figures report. Needs nothing but Python."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Figure:
    """A figure beside its target; some have none and are there to compare."""

    what: str
    found: float
    target: float | None = None
    at_least: bool = False

    @property
    def met(self) -> bool:
        if self.target is None:
            return True
        return self.found >= self.target if self.at_least else self.found <= self.target

    @property
    def bound(self) -> str:
        if self.target is None:
            return ""
        return f"{'≥' if self.at_least else '≤'} {self.target:.2f}"

    def row(self) -> list[str]:
        """The columns of a table, marked up for rich."""
        verdict = ""
        if self.target is not None:
            by = abs(self.found / self.target - 1)
            verdict = "[green]met" if self.met else f"[red]missed by {by:.1%}"
        return [self.what, f"{self.found:.3f}", self.bound, verdict]

    def line(self) -> str:
        """The same in plain text."""
        verdict = "" if self.target is None else "met" if self.met else "MISSED"
        return f"{self.what:60} {self.found:10.3f}  {self.bound}  {verdict}".rstrip()
