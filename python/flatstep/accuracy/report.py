"""A report on the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flatstep.accuracy.results import Distances, Report, Run
from flatstep.verify.report import add_rows, new_table

WIDE = 105  # columns, from which on the states have one too


def show(report: Report, console: Console) -> None:
    """Prints a table for each dtype, what failed, and how it ended."""
    for dtype in dict.fromkeys(run.dtype for run in report.runs):
        console.print(_table(report, dtype, console.width >= WIDE), "")
    for run in report.failed:
        console.print(
            f"[red]✗ {escape(run.implementation)}[/], {run.rule}, {run.dtype}: {escape(run.error)}"
        )
    console.print(_ending(report))


def _table(report: Report, dtype: str, wide: bool) -> Table:
    states = "; states: the worst of them" if wide else "; states: in a wider terminal, or --json"
    table = new_table(
        f"{dtype}: values between the result and the float64 truth, worst / mean",
        f"exact: elements that are the truth, rounded, after {_list(report.steps)} steps{states}",
    )
    table.add_column("rule")
    table.add_column("implementation", no_wrap=True)
    for steps in report.steps:
        table.add_column("1 step" if steps == 1 else f"{steps:,} steps", justify="right")
    table.add_column("exact", justify="right")
    if wide:
        table.add_column(f"states after {report.steps[-1]:,}", justify="right")
    return add_rows(table, _rows(report, dtype, wide))


def _list(numbers: list[int]) -> str:
    return ", ".join(f"{n:,}" for n in numbers)


def _rows(report: Report, dtype: str, wide: bool) -> Iterator[tuple[str, str, list[str]]]:
    for run in report.runs:
        if run.dtype == dtype:
            cells = [_cell(run, run.after(steps)) for steps in report.steps]
            cells.append(_exact(run, report.steps))
            if wide:
                cells.append(_states(run.states_after(report.steps[-1])))
            yield run.rule, escape(run.implementation), cells


def _cell(run: Run, found: Distances | None) -> str:
    if found is None:
        return "[red]error[/]" if run.error else "–"
    if found.not_finite == found.elements:
        return "[red]NaN/Inf[/]"
    text = format_distances(found)
    share = found.not_finite / found.elements
    return f"{text}\n[red]{share:.1%} NaN/Inf[/]" if share else text


def format_distances(found: Distances) -> str:
    """The worst and the mean, in a few characters."""
    return f"{found.worst:,} / {_short(found.mean)}" if found.worst else "0"


def _short(mean: float) -> str:
    return f"{mean:,.0f}" if mean >= 10 else f"{mean:.2g}"


def _exact(run: Run, steps: list[int]) -> str:
    shares = [found.exact for found in map(run.after, steps) if found]
    # Not all of them is not 100 %.
    return " ".join(f"{int(100 * share)}" for share in shares) + " %" if shares else "–"


def _states(states: list[Distances]) -> str:
    if not states:
        return "–"
    worst = max(states, key=lambda state: state.mean)
    return f"{worst.array} {format_distances(worst)}"


def _ending(report: Report) -> str:
    took = f"{report.seconds:.0f} s"
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    if report.interrupted:
        done = f"[yellow]Interrupted after {len(report.runs)} of {report.planned} runs[/] ({took})"
        return f"{done}: run it again, or a part of it with --rule and --dtype."
    measured = f"{len(report.measured)} runs of {report.elements:,} elements"
    if report.failed:
        return (
            f"{measured} measured, {len(report.failed)} failed as said above ({took}): "
            f"{versions}. The others stand."
        )
    return f"{measured} measured ({took}): {versions}."
