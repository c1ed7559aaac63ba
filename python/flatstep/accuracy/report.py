"""A report on the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from flatstep.accuracy.results import Distances, Report, Run
from flatstep.verify.report import new_table

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
    last = f"{report.steps[-1]:,}"
    when = f"{', '.join(f'{n:,}' for n in report.steps)} steps" if wide else f"{last} steps"
    states = "the worst of them" if wide else "in a wider terminal, or in --json"
    table = new_table(
        f"{dtype}: values between the result and the truth, worst / mean",
        f"exact: elements that are the truth, rounded, after {when}; states: {states}",
    )
    table.add_column("rule and implementation", no_wrap=True)
    for steps in report.steps:
        title = "1 step" if steps == 1 else f"{steps:,} steps"
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("exact", justify="right", no_wrap=True)
    if wide:
        table.add_column(f"states after {last}", justify="right")
    runs = [run for run in report.runs if run.dtype == dtype]
    for rule in dict.fromkeys(run.rule for run in runs):
        table.add_row(f"[bold]{rule}[/]")
        for run in runs:
            if run.rule == rule:
                table.add_row(f"  {escape(run.implementation)}", *_cells(report, run, wide))
    return table


def _cells(report: Report, run: Run, wide: bool) -> Iterator[str]:
    yield from (_cell(run, run.after(steps)) for steps in report.steps)
    yield _exact(run, report.steps if wide else report.steps[-1:])
    if wide:
        yield _states(run.states_after(report.steps[-1]))


def _cell(run: Run, found: Distances | None) -> str:
    if found is None:
        return "[red]error[/]" if run.error else "–"
    if found.not_finite == found.elements:
        return "[red]NaN/Inf[/]"
    text = _worst_and_mean(found)
    share = found.not_finite / found.elements
    return f"{text}\n[red]{share:.1%} NaN/Inf[/]" if share else text


def _worst_and_mean(found: Distances) -> str:
    return f"{_short(found.worst)} / {_short(found.mean)}" if found.worst else "0"


def _short(distance: float) -> str:
    if distance >= 1e5:
        mantissa, exponent = f"{distance:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{distance:,.0f}" if distance >= 10 else f"{distance:.2g}"


def _exact(run: Run, steps: list[int]) -> str:
    shares = [found.exact for found in map(run.after, steps) if found]
    # Not all of them is not 100 %.
    return " ".join(f"{int(100 * share)}" for share in shares) + " %" if shares else "–"


def _states(states: list[Distances]) -> str:
    if not states:
        return "–"
    worst = max(states, key=lambda state: state.mean)
    return f"{worst.array} {_worst_and_mean(worst)}"


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
