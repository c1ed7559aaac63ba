"""A report on the terminal."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from flatstep.torch_paths import PATHS
from flatstep.verify.cases import UPDATES
from flatstep.verify.results import Distance, Mismatch, Report, Value
from flatstep.verify.torch_distance import STEPS

SHOWN = 3  # mismatches, each of another rule, dtype or instruction set
ISSUES = "https://github.com/flatstep/flatstep/issues"


def show(report: Report, console: Console) -> None:
    """Prints the tables, the first mismatches and the verdict."""
    if report.tallies:
        console.print(_tallies(report), "")
    if report.distances:
        console.print(_distances(report), "")
    firsts: dict[tuple[str, str, str], Mismatch] = {}
    for mismatch in report.mismatches:
        firsts.setdefault((mismatch.rule, mismatch.dtype, mismatch.isa), mismatch)
    for mismatch in list(firsts.values())[:SHOWN]:
        _show_mismatch(mismatch, console)
    if len(report.mismatches) > SHOWN:
        console.print(f"{len(report.mismatches)} variants differ: --json FILE keeps all of them.")
    for name in report.names:
        console.print(f"[red]{name}[/]")
    console.print(_verdict(report))


def new_table(title: str, caption: str) -> Table:
    """An empty table in the style of these reports."""
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        caption_style="dim",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )


def _add_rows(table: Table, rows: Iterator[tuple[str, str, list[str]]]) -> Table:
    """Adds rows of a name, a dtype and cells; a name that comes again is left out."""
    previous = ""
    for name, dtype, cells in rows:
        table.add_row("" if name == previous else name, dtype, *cells)
        previous = name
    return table


def _tallies(report: Report) -> Table:
    table = new_table(
        "Cases with the reference's bytes",
        f"a case: {UPDATES} updates of one variant, size and setup",
    )
    table.add_column("rule")
    table.add_column("dtype")
    for isa in report.isas:
        table.add_column(isa, justify="right")
    found = {(tally.rule, tally.dtype, tally.isa): tally for tally in report.tallies}
    rules, dtypes = ([key[i] for key in found] for i in (0, 1))

    def cell(rule: str, dtype: str, isa: str) -> str:
        tally = found.get((rule, dtype, isa))
        if tally is None:
            return "–"
        if tally.mismatches:
            return f"[red]{tally.mismatches:,} of {tally.cases:,} differ[/]"
        return f"{tally.cases:,} [green]✓[/]"

    return _add_rows(
        table,
        (
            (rule, dtype, [cell(rule, dtype, isa) for isa in report.isas])
            for rule in dict.fromkeys(rules)
            for dtype in dict.fromkeys(dtypes)
        ),
    )


def _distances(report: Report) -> Table:
    implementations = ("flatstep", *PATHS)
    table = new_table(
        f"Parameters after {STEPS} steps: distance from the reference, torch {torch.__version__}",
        "worst / mean, in ULP of the dtype; flatstep's is 0, torch's is said, not judged",
    )
    table.add_column("optimizer")
    table.add_column("dtype")
    for implementation in implementations:
        header = implementation if implementation == "flatstep" else f"torch {implementation}"
        table.add_column(header, justify="right")
    found: dict[tuple[str, str, str], list[Distance]] = {}
    for distance in report.distances:
        key = (distance.optimizer, distance.dtype, distance.implementation)
        found.setdefault(key, []).append(distance)

    def cell(optimizer: str, dtype: str, implementation: str) -> str:
        distances = found.get((optimizer, dtype, implementation))
        if not distances:
            return "–"
        worst = max(distance.worst for distance in distances)
        mean = sum(distance.mean for distance in distances) / len(distances)
        lost = max(distance.lost for distance in distances)
        text = f"{worst:,} / {mean:.2g}" if worst else "0"
        return f"{text}\n{lost:.0%} NaN/Inf" if lost else text

    return _add_rows(
        table,
        (
            (optimizer, dtype, [cell(optimizer, dtype, name) for name in implementations])
            for optimizer, dtype in dict.fromkeys((d.optimizer, d.dtype) for d in report.distances)
        ),
    )


def _show_mismatch(mismatch: Mismatch, console: Console) -> None:
    m = mismatch
    elements = "1 element" if m.size == 1 else f"{m.size:,} elements"
    threads = "1 thread" if m.threads == 1 else f"{m.threads} threads"
    rows = Table.grid(padding=(0, 2))
    rows.add_row("expected", *_cells(m.expected))
    rows.add_row("got", *_cells(m.got), style="red")
    for name, value in m.inputs.items():
        rows.add_row(f"{name} before", *_cells(value))
    numbers = {"step": m.step, "scale": m.scale, **m.hyper}
    console.print(
        f"[red bold]✗ {m.rule} {m.variant}[/], {m.dtype}, {m.isa}, {threads}, {elements}",
    )
    console.print(_where(m))
    console.print(rows)
    console.print(", ".join(f"{name} {value:g}" for name, value in numbers.items()), style="dim")
    console.print(f"repeat: {m.command}\n", soft_wrap=True)


def _cells(value: Value) -> tuple[str, str]:
    return value.hex, value.value


def _where(mismatch: Mismatch) -> str:
    m = mismatch
    values = "1 value differs" if m.differing == 1 else f"{m.differing:,} values differ"
    where = f"{values} from the reference's, first {m.array}\\[{m.index}]"
    if not 0 <= m.index < m.size:
        return f"{where}, outside the array"
    if m.array == "grad":
        return f"{where}, which is only to be read"
    return where


def _verdict(report: Report) -> str:
    took = f"{report.seconds:.0f} s"
    if report.interrupted:
        ran = f"[yellow]Interrupted after {report.cases:,} of {report.planned:,} cases[/] ({took})"
        return f"{ran}: run it again, or a part of it with --rule, --dtype and --isa."
    if report.names:
        return "[red bold]Nothing was compared: the names above must agree first.[/]"
    please = f"please report it, with this output and that of `flatstep info`, at {ISSUES}"
    if report.mismatched:
        return (
            f"[red bold]{report.mismatched:,} of {report.cases:,} cases differ[/] ({took}). "
            f"Repeat the first with its command; if it differs again, {please}"
        )
    if report.strayed:
        runs = ", ".join(f"{d.optimizer} {d.dtype} ({d.options})" for d in report.strayed)
        return (
            f"[red bold]The kernels have the reference's bytes, the optimizers have not:[/] {runs} "
            f"({took}): {please}"
        )
    return f"[green bold]✓ All {report.cases:,} cases have the reference's bytes[/] ({took})."
