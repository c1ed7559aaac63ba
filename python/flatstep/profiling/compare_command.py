"""The command ``flatstep compare``."""

from __future__ import annotations

import json
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from flatstep.profiling.command import kept
from flatstep.profiling.compare import (
    THRESHOLD_BY_DEFAULT,
    Comparison,
    Figures,
    Row,
    Unit,
    compare,
    share_of,
)
from flatstep.profiling.results import Report
from flatstep.profiling.text import machine_line, ms, percent, ratio

STYLES = {"faster": "green", "slower": "yellow", "fails in B": "red", "unsure": "dim"}
FAILS = "bold red"
ONE_SIDED = ("only in A", "only in B")
AGAIN = "--seconds 300 --json again.json"
COMMANDS_SHOWN = 3
WIDE = 100  # columns
UNITS: dict[Unit, str] = {
    "limit": "",
    "torch": "   changes are those of the time ÷ torch's",
    "nothing": "   changes are those of the time: no limit and no torch was measured beside it",
}


def compare_profiles(
    a: Annotated[
        Path, typer.Argument(metavar="A.json", help="The first run, from profile --json.")
    ],
    b: Annotated[Path, typer.Argument(metavar="B.json", help="The second run.")],
    threshold: Annotated[
        str,
        typer.Option(metavar="PERCENT", help="How much slower flatstep may become, as in 5%."),
    ] = THRESHOLD_BY_DEFAULT,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the comparison here.")
    ] = None,
) -> None:
    """Show what changed between two profiles, beside the noise of each.

    Times are divided by the machine's limit of their own run, or torch's time where there is none:
    two runs on a shared machine have that in common, and not the clock. Exit codes: 1 where
    something became slower by more than the threshold, beyond the noise, or fails;
    2 where nothing could be compared.
    """
    try:
        share = share_of(threshold)
        if json_file is not None and not json_file.absolute().parent.is_dir():
            raise ValueError(f"there is no directory {json_file.parent}")
        reports = kept(a), kept(b)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    comparison = compare(*reports, share)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=110)
    _print_machines(console, comparison, reports)
    for (place, unit), rows in groupby(comparison.rows, key=lambda row: (row.place, row.unit)):
        shown = [row for row in rows if row.verdict not in ONE_SIDED]
        if shown:
            console.print(_table(place, unit, shown, console.width >= WIDE))
    for line in _one_sided(comparison):
        console.print(escape(line), style="dim")
    for row in comparison.rows:
        if row.verdict == "fails in B":
            console.print(f"{row.place}, {row.implementation}: {row.problem}", style="red")
    for line in advice(comparison, a):
        console.print(f"→ {escape(line)}")
    if json_file is not None:
        json_file.write_text(json.dumps(comparison.as_dict(), indent=2) + "\n")
    raise typer.Exit(comparison.exit_code)


def _print_machines(
    console: Console, comparison: Comparison, reports: tuple[Report, Report]
) -> None:
    """Says what the two runs do not share, and how they began."""
    for name, report in zip("AB", reports, strict=True):
        console.print(f"{name}: {escape(machine_line(report))}", style="dim")
        for warning in report.warnings:
            console.print(f"[yellow]{name}: warning: {escape(warning)}")
    differ = [f"{name}: {a} in A, {b} in B" for name, (a, b) in comparison.machines.items()]
    if differ:
        console.print(
            f"[bold yellow]the runs differ in more than time: {escape('; '.join(differ))}"
        )
    if comparison.limits is not None:
        grown = comparison.limits
        said = f"{abs(grown):.1%} {'more' if grown > 0 else 'less'} time" if grown else "as long"
        console.print(
            f"B's machine took {said} for the same memory traffic, so changes are those of each "
            "time ÷ the limit in its own run"
        )
    console.print()


def _table(place: str, unit: Unit, rows: list[Row], wide: bool) -> RenderableType:
    title = Text.assemble((place, "bold"), UNITS[unit])
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("", min_width=14)
    beside_torch = ["÷ torch A", "B"] if wide else []
    for column in ("ms A", "B", "limit A", "B", *beside_torch, "change", "noise A", "B"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in rows:
        both = (row.a, row.b)
        style = FAILS if row.past_threshold else STYLES.get(row.verdict, "dim")
        table.add_row(
            escape(row.implementation),
            *(ms(each.seconds) if each else "" for each in both),
            *(percent(each.of_limit) if each else "" for each in both),
            *((ratio(each.to_torch) if each else "" for each in both) if wide else ()),
            "" if row.change is None else f"{row.change:+.1%}",
            *(_noise(each) for each in both),
            f"[{style}]{row.verdict}[/]",
            style="bold" if row.judged else "",
        )
    return Group(title, table, "")


def _noise(figures: Figures | None) -> str:
    if figures is None:
        return ""
    return "?" if figures.noise is None else f"±{percent(figures.noise)}"


def _one_sided(comparison: Comparison) -> list[str]:
    lines = []
    for verdict in ONE_SIDED:
        names = []
        for place, rows in groupby(comparison.rows, key=lambda row: row.place):
            there = list(rows)
            found = [row.implementation for row in there if row.verdict == verdict]
            if len(found) == len(there):
                names.append(place)
            elif found:
                names.append(f"{place}: {', '.join(found)}")
        if names:
            lines.append(f"{verdict}: {'; '.join(names)}")
    return lines


def advice(comparison: Comparison, a: Path) -> list[str]:
    """What the comparison says, and what to do next."""
    if not comparison.compared:
        return [
            "nothing to compare: the two runs measured different things; measure again with the "
            f"options that {a} was measured with"
        ]
    threshold = f"{comparison.threshold * 100:.3g}%"
    slow, blind = comparison.past_threshold, comparison.blind
    lines = [_tally("measured", True, comparison), _tally("torch", False, comparison)]
    slower = f"became slower by more than {threshold} beyond the noise"
    if slow:
        lines.append(
            f"something {slower}, or fails, {_times(len(slow))}: measure that again, for longer, "
            "before you look for the cause"
        )
    elif blind:
        lines.append(
            f"nothing {slower}, but {_times(len(blind))} the noise is larger than that, or "
            "unknown: measure that again, for longer, on a quiet machine"
        )
    else:
        lines.append(f"nothing {slower}: hold the next run against the second file")
    options = list(dict.fromkeys(row.again for row in slow or blind))
    commands = [f"`flatstep profile {each} {AGAIN}`" for each in options]
    if len(commands) > COMMANDS_SHOWN:
        commands = [f"`flatstep profile`, with the options of the first run and `{AGAIN}`"]
    lines += [f"{each}, then `flatstep compare {a} again.json`" for each in commands]
    return [line for line in lines if line]


def _tally(whose: str, judged: bool, comparison: Comparison) -> str:
    verdicts = Counter(row.verdict for row in comparison.rows if row.judged is judged)
    said = [f"{count} {name}" for name, count in verdicts.items() if name != "yardstick"]
    return f"{whose}: {', '.join(said)}" if said else ""


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
