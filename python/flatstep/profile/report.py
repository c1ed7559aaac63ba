"""The tables of a profile, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from flatstep.profile import training
from flatstep.profile.measure import Timing
from flatstep.profile.results import Case, Report, Result, Training

OURS, MACHINE, PROBLEM = "bold", "cyan", "red"
FASTER, SLOWER = "green", "yellow"
WORTH_SAYING = 0.02  # of a time: less may be chance


def machine_line(report: Report) -> str:
    """What the figures belong to."""
    machine = report.machine
    return (
        f"{machine.cpu}, {machine.cores} cores, {machine.threads} threads, {machine.isa}; "
        f"flatstep {machine.flatstep}, torch {machine.torch}, {machine.system}"
    )


def case_table(case: Case) -> RenderableType:
    """One case: the machine's limit, then every implementation."""
    title = Text.assemble(
        (f"{case.title} × {case.optimizer}, {case.dtype}", "bold"),
        f"   {_count(case.tensors, 'tensor')}, {_millions(case.parameters)} parameters, "
        f"{_bytes(case.bytes_moved)} a step",
    )
    if case.refused is not None:
        return Group(title, Text(f"  refused: {case.refused}\n", style=PROBLEM))
    table = _table(
        "", "pages", "ms", "spread", "ns/param", "GB/s", "of limit", "÷ torch", "first ms"
    )
    for limit in case.limits:
        pages = limit.pages if limit.granted else f"{limit.pages}, not granted"
        rates = _time(limit.timing, case.parameters, limit.gb_per_s)
        table.add_row("limit", pages, *rates, "", "", "", style=MACHINE)
    table.add_section()
    for result in case.results:
        table.add_row(*_result_row(case, result), style=OURS if result.ours else "")
    return Group(title, table)


def _result_row(case: Case, result: Result) -> list[str]:
    first = _ms(result.first_step)
    if result.timing is None or result.gb_per_s is None:
        problem = (result.problem or "").partition(":")[0]
        return [result.implementation, "", *[f"[{PROBLEM}]{problem}", "", "", ""], "", "", first]
    return [
        result.implementation,
        result.pages or "",
        *_time(result.timing, case.parameters, result.gb_per_s),
        _percent(result.of_limit),
        _ratio(result.to_torch, result.ours),
        first,
    ]


def training_table(measured: Training) -> RenderableType:
    """Backward, step and zero_grad in every way."""
    title = Text.assemble(
        ("backward + step + zero_grad", "bold"),
        f"   {measured.model}, {_millions(measured.parameters)} parameters, {measured.optimizer}, "
        "float32; ms",
    )
    table = _table("", "backward", "step", "zero_grad", "together", "spread", "÷ torch")
    for result in measured.results:
        style = OURS if result.ours else ""
        if result.total is None:
            problem = (result.problem or "").partition(":")[0]
            table.add_row(result.way, "", "", "", f"[{PROBLEM}]{problem}", "", "", style=style)
            continue
        phases = [result.backward, result.step, result.zero_grad, result.total]
        table.add_row(
            result.way,
            *(_ms(timing.median if timing else None) for timing in phases),
            _spread(result.total),
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
            *(_percent(result.of_limit if result else None) for result in (tensors, flat)),
            f"{best.implementation}, {_percent(best.of_limit)}" if best else "",
        )
    title = Text("flatstep's time ÷ torch's best, and share of the limit on the same pages", "bold")
    return Group(title, table)


def print_end(console: Console, report: Report) -> None:
    """Prints the summary, what went wrong and what to do next."""
    if len(report.measured) > 1:
        console.print(summary_table(report))
    for place, problem in report.problems.items():
        console.print(f"[{PROBLEM}]{escape(place)}: {escape(problem)}")
    for warning in report.warnings:
        console.print(f"[{SLOWER}]warning: {escape(warning)}")
    if report.interrupted:
        console.print(f"[{SLOWER}]interrupted: this is what was measured so far")
    for line in advice(report):
        console.print(f"→ {escape(line)}")
    console.print(f"{report.seconds:.0f} s; {escape(machine_line(report))}", style="dim")


def advice(report: Report) -> list[str]:
    """What the figures say, and what to do next."""
    lines = [*_flat_advice(report.measured), *_training_advice(report.training)]
    if report.measured:
        lines.append(
            "`--plot bars.png` draws this, `--json FILE` keeps it, "
            "`--model package.module:callable` measures your own model; "
            "`flatstep verify` proves the bits"
        )
    return lines


def _flat_advice(cases: Iterable[Case]) -> list[str]:
    gains = []
    for case in cases:
        tensors, flat = case.result("flatstep"), case.result("flatstep flat")
        if tensors and flat and tensors.timing and flat.timing:
            gain = 1 - flat.timing.median / tensors.timing.median
            certain = flat.timing.upper_quartile < tensors.timing.lower_quartile
            if gain > WORTH_SAYING and certain:
                gains.append(f"{gain:.0%} of {case}")
    return [f"FlatBuffer saves, of the update alone: {'; '.join(gains)}"] if gains else []


def _training_advice(measured: Training | None) -> list[str]:
    totals = {r.way: r.total.median for r in (measured.results if measured else []) if r.total}
    if training.TENSORS not in totals:
        return []
    best = min((way for way in totals if way != training.TORCH), key=totals.__getitem__)
    saved = 1 - totals[best] / totals[training.TENSORS]
    if saved > WORTH_SAYING:
        line = f"in training, {best} pays: {saved:.0%} less time than without"
    else:
        line = "in training, a FlatBuffer does not pay here: parameters may stay where they are"
    if training.TORCH in totals:
        gain = 1 - totals[best] / totals[training.TORCH]
        line += f"; {abs(gain):.1%} {'less' if gain > 0 else 'more'} time than with torch's fused"
    return [line]


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 1), header_style="dim")
    for index, column in enumerate(columns):
        left = index == 0 or column == "pages"
        table.add_column(column, justify="left" if left else "right", no_wrap=index == 0)
    return table


def _time(timing: Timing, parameters: int, gb_per_s: float) -> list[str]:
    return [
        _ms(timing.median),
        _spread(timing),
        _significant(timing.median / parameters * 1e9),
        _significant(gb_per_s),
    ]


def format_time(seconds: float) -> str:
    """Milli- or microseconds, with the unit."""
    return (
        f"{_significant(seconds * 1e3)} ms"
        if seconds >= 1e-3
        else f"{_significant(seconds * 1e6)} µs"
    )


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else _significant(seconds * 1e3)


def _significant(value: float) -> str:
    """At least three significant digits, and no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def _spread(timing: Timing) -> str:
    return f"±{timing.spread / 2:.1%}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.{0 if share >= 0.1 else 1}%}"


def _ratio(ratio: float | None, ours: bool) -> str:
    if ratio is None:
        return ""
    style = (FASTER if ratio < 1 else SLOWER) if ours else "default"
    return f"[{style}]{ratio:.2f}[/]"


def _count(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'s' * (count != 1)}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"


def _bytes(count: int) -> str:
    for unit, size in [("GB", 1e9), ("MB", 1e6), ("kB", 1e3)]:
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
