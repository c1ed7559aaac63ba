"""The tables of a profile, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from flatstep.profiling.results import Case, Overhead, Pass, Report, Sweep, Training
from flatstep.profiling.sweeps import LIMIT
from flatstep.profiling.text import (
    BUCKET_TITLE,
    OVERHEAD_COLUMNS,
    PASS_COLUMNS,
    advice,
    bucket_refusals,
    bucket_rows,
    case_rows,
    case_title,
    left_out,
    legend,
    machine_line,
    millions,
    ms,
    overhead_rows,
    overhead_title,
    pass_refusals,
    pass_rows,
    pass_title,
    percent,
    problem_lines,
    ratio,
    short_problem,
    spread,
    sweep_refusals,
    sweep_rows,
    sweep_title,
)

__all__ = [
    "case_table",
    "machine_line",
    "pass_table",
    "print_end",
    "summary_table",
    "sweep_table",
    "training_table",
]

OURS, MACHINE, PROBLEM = "bold", "cyan", "red"
FASTER, SLOWER = "green", "yellow"


def case_table(case: Case) -> RenderableType:
    """One case: the limit, then every implementation."""
    what, size = case_title(case)
    title = Text.assemble((what, "bold"), f"   {size}")
    if case.refused is not None:
        return Group(title, Text(f"  refused: {case.refused}\n", style=PROBLEM))
    columns, rows = case_rows(case)
    table = _table(*columns)
    limits = len(case.limits)
    for row in rows[:limits]:
        table.add_row(*row, style=MACHINE)
    table.add_section()
    for row, result in zip(rows[limits:], case.results, strict=True):
        if result.timing is None:
            place = columns.index("ms")
            row[place] = f"[{PROBLEM}]{row[place]}"
        row[columns.index("÷ torch")] = _ratio(result.to_torch, result.ours)
        table.add_row(*row, style=OURS if result.ours else "")
    if not case.buckets:
        return Group(title, table)
    what, size = BUCKET_TITLE
    return Group(
        title,
        table,
        Text.assemble("\n", (what, "bold"), f"   {size}"),
        _grid_table(*bucket_rows(case)),
        *_notes(legend(case.buckets)),
        *_problems(bucket_refusals(case)),
    )


def sweep_table(sweep: Sweep, found: Sequence[Overhead]) -> RenderableType:
    """A sweep, and what a step and a tensor cost by it."""
    what, size = sweep_title(sweep)
    title = Text.assemble((what, "bold"), f"   {size}")
    parts: list[RenderableType] = [
        title,
        _grid_table(*sweep_rows(sweep)),
        *_notes(legend(sweep.points)),
        *_problems(sweep_refusals(sweep)),
    ]
    if found:
        what, size = overhead_title(found)
        table = _table(*OVERHEAD_COLUMNS)
        for row, overhead in zip(overhead_rows(found), found, strict=True):
            table.add_row(*row, style=MACHINE if overhead.implementation == LIMIT else "")
        parts += [Text(), Text.assemble((what, "bold"), f"   {size}"), table]
    return Group(*parts)


def _grid_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = _table(*columns)
    for row in rows:
        table.add_row(*row)
    return table


def _notes(lines: Sequence[str]) -> list[Text]:
    return [Text(f" {line}", style="dim") for line in lines]


def _problems(lines: Sequence[str]) -> list[Text]:
    return [Text(f"  {line}", style=PROBLEM) for line in lines]


def pass_table(passes: Sequence[Pass]) -> RenderableType:
    """The options of a step, each beside the torch calls that it replaces."""
    what, size = pass_title(passes)
    title = Text.assemble((what, "bold"), f"   {size}")
    table = _table(*PASS_COLUMNS)
    for row in pass_rows(passes):
        table.add_row(*row)
    return Group(title, table, *_problems(pass_refusals(passes)))


def training_table(measured: Training) -> RenderableType:
    """Backward, step and zero_grad in every way."""
    title = Text.assemble(
        ("backward + step + zero_grad", "bold"),
        f"   {measured.model}, {millions(measured.parameters)} parameters, {measured.optimizer}, "
        "float32; ms",
    )
    table = _table("", "forward", "backward", "step", "zero_grad", "together", "spread", "÷ torch")
    for result in measured.results:
        style = OURS if result.ours else ""
        if result.total is None:
            problem = f"[{PROBLEM}]{short_problem(result.problem)}"
            table.add_row(result.way, "", "", "", "", problem, "", "", style=style)
            continue
        phases = [result.forward, result.backward, result.step, result.zero_grad, result.total]
        table.add_row(
            result.way,
            *(ms(timing.median if timing else None) for timing in phases),
            spread(result.total),
            _ratio(result.to_torch, result.ours),
            style=style,
        )
    return Group(title, table)


def summary_table(report: Report) -> RenderableType:
    """A line for each case."""
    table = _table("", "÷ torch", "flat", "of limit", "flat", "torch's best")
    for case in report.measured:
        tensors, flat = case.result("flatstep"), case.result("flatstep flat")
        best = case.torch_best()
        table.add_row(
            str(case),
            *(_ratio(result.to_torch if result else None, True) for result in (tensors, flat)),
            *(percent(result.of_limit if result else None) for result in (tensors, flat)),
            f"{best.implementation}, {percent(best.of_limit)}" if best else "",
        )
    limit = "limit" if report.machine.gpu else "limit on the same pages"
    title = Text(f"flatstep's time ÷ torch's best, and share of the {limit}", "bold")
    return Group(title, table)


def print_end(console: Console, report: Report) -> None:
    """Prints the summary, what went wrong and what to do next."""
    if len(report.measured) > 1:
        console.print(summary_table(report))
    for line in problem_lines(report):
        console.print(f"[{PROBLEM}]{escape(line)}")
    for warning in report.warnings:
        console.print(f"[{SLOWER}]warning: {escape(warning)}")
    if report.interrupted:
        console.print(
            f"[{SLOWER}]interrupted: this is what was measured so far; "
            "--workload, --optimizer and --sweep choose what is left"
        )
    for line in left_out(report):
        console.print(escape(line), style="dim")
    for line in advice(report):
        console.print(f"→ {escape(line)}")
    console.print(f"{report.seconds:.0f} s; {escape(machine_line(report))}", style="dim")


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for index, column in enumerate(columns):
        left = index == 0 or column == "pages"
        table.add_column(column, justify="left" if left else "right", no_wrap=index == 0)
    return table


def _ratio(value: float | None, ours: bool) -> str:
    if value is None:
        return ""
    style = (FASTER if value < 1 else SLOWER) if ours else "default"
    return f"[{style}]{ratio(value)}[/]"
