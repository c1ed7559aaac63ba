"""A conformance report on the terminal, and for those who collect test results."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from flatstep.conformance import cases as _  # noqa: F401 - fills the registry
from flatstep.conformance.registry import CASES, FLOATS
from flatstep.conformance.results import Outcome, Report, Result
from flatstep.conformance.text import describe, explain

SHOWN = 12  # cases that fail
LEGEND = "same: the reference's bits; N ULP: as near as a careful implementation is"

_CELLS = {
    Outcome.SAME: "[green]same[/]",
    Outcome.REFUSED: "refused",
    Outcome.NOT_OFFERED: "[dim]not offered[/]",
    Outcome.WRONG: "[red]✗ wrong[/]",
    Outcome.IGNORED: "[red]✗ ignored[/]",
    Outcome.ERROR: "[red]✗ error[/]",
    Outcome.CRASH: "[red]✗ crash[/]",
    Outcome.HANG: "[red]✗ no end[/]",
}


def show(report: Report, console: Console) -> None:
    """Prints the table, what is wrong and the verdict."""
    if report.results:
        console.print(_table(report))
        console.print(f"[dim]{LEGEND}[/]\n")
    failing: dict[str, list[Result]] = {}
    for result in report.failures:
        failing.setdefault(result.case, []).append(result)
    for results in list(failing.values())[:SHOWN]:
        _show_failure(results, console)
    if len(failing) > SHOWN:
        console.print(
            f"{len(failing) - SHOWN} more cases fail: --json FILE keeps all of them, "
            "--case NAME shows one.\n"
        )
    console.print(_verdict(report))


def list_cases(console: Console) -> None:
    """Prints every case with what it checks."""
    for group, names in _grouped(list(CASES)):
        console.print(f"[bold]{group}[/]")
        table = Table.grid(padding=(0, 2))
        table.add_column(no_wrap=True)
        for name in names:
            table.add_row(f"  {name}", CASES[name].title)
        console.print(table)


def _grouped(names: list[str]) -> Iterator[tuple[str, list[str]]]:
    groups = dict.fromkeys(CASES[name].group for name in names)
    for group in groups:
        yield group, [name for name in names if CASES[name].group == group]


def _table(report: Report) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    found = {(result.case, result.dtype): result for result in report.results}
    dtypes = [dtype for dtype in FLOATS if any(result.dtype == dtype for result in report.results)]
    table.add_column("case", no_wrap=True)
    for dtype in dtypes:
        table.add_column(dtype, no_wrap=True)
    for group, names in _grouped(list(dict.fromkeys(result.case for result in report.results))):
        table.add_row(f"[bold]{group}[/]")
        for name in names:
            table.add_row(f"  {name}", *(_cell(found.get((name, dtype))) for dtype in dtypes))
    return table


def _cell(result: Result | None) -> str:
    if result is None:
        return ""
    return _CELLS.get(result.outcome, f"[green]{result.ulp:,} ULP[/]")


def _show_failure(results: list[Result], console: Console) -> None:
    first, *others = results
    case = CASES[first.case]
    also = f"; {', '.join(result.dtype for result in others)} too" if others else ""
    console.print(
        f"[red bold]✗ {first.case}[/], {first.dtype}{also}: [red]{first.text}[/]: {case.title}"
    )
    if (evidence := first.evidence) is not None:
        for line in describe(first):
            console.print(line, markup=False)
        rows = Table.grid(padding=(0, 2))
        for name, value in (("expected", evidence.expected), ("got", evidence.got)):
            if value is not None:
                rows.add_row(name, value.hex, value.value)
        if rows.row_count:
            console.print(rows)
    console.print(case.advice)
    console.print(f"repeat: {first.command}\n", soft_wrap=True, markup=False)


def _verdict(report: Report) -> str:
    took = f"{report.seconds:.0f} s"
    counts = []
    for outcome in Outcome:
        if count := report.count([outcome]):
            worst = max(r.ulp for r in report.results if r.outcome is outcome)
            name = f"within {worst:,} ULP" if outcome is Outcome.CLOSE else outcome.value
            counts.append(f"{count} {name}")
    summary = f"{', '.join(counts) or 'nothing ran'} ({took})"
    if report.interrupted:
        return (
            f"[yellow]Interrupted after {len(report.results)} of {report.planned} cases[/]: "
            f"{summary}. Run it again, or a part of it with --case and --dtype."
        )
    if report.failures:
        return (
            f"[red bold]✗ {len(report.failures)} of {len(report.results)} cases fail[/]: "
            f"{summary}. Do not use it for what they name; repeat the first with its command, mend "
            "the optimizer or report it to its authors, and run this again."
        )
    if report.count([Outcome.SAME, Outcome.CLOSE, Outcome.REFUSED]) == 0:
        return f"[yellow]Nothing was checked[/]: {summary}. Choose other cases with --case."
    return (
        f"[green bold]✓ It follows {report.rule} in all {len(report.results)} cases[/]: {summary}."
        " Keep this command in your CI, to hear of it when that changes."
    )


def write_junit(report: Report, path: Path) -> None:
    """Writes the report as JUnit's XML, which CI systems show as tests."""
    kinds = {True: "failure", False: "error"}
    suite = ET.Element(
        "testsuite",
        name=f"flatstep verify {report.optimizer}",
        tests=str(len(report.results)),
        failures=str(report.count([Outcome.WRONG, Outcome.IGNORED])),
        errors=str(report.count([Outcome.ERROR, Outcome.CRASH, Outcome.HANG])),
        skipped=str(report.count([Outcome.NOT_OFFERED])),
        time=f"{report.seconds:.3f}",
    )
    for result in report.results:
        test = ET.SubElement(
            suite,
            "testcase",
            classname=report.optimizer.replace(":", "."),
            name=result.name,
            time=f"{result.seconds:.3f}",
        )
        if result.outcome is Outcome.NOT_OFFERED:
            what = result.evidence.what if result.evidence else ""
            ET.SubElement(test, "skipped", message=what)
        elif not result.outcome.is_fine:
            kind = kinds[result.outcome in (Outcome.WRONG, Outcome.IGNORED)]
            ET.SubElement(test, kind, message=result.text).text = explain(result)
    ET.ElementTree(suite).write(path, encoding="utf-8", xml_declaration=True)
