"""What a profile says, in plain text: for the tables, the plots and machines without either."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import compress

from flatstep.profiling import training
from flatstep.profiling.measure import Timing
from flatstep.profiling.results import Case, Pass, Report, Result, Training
from flatstep.profiling.works import FLAT, TENSORS, TORCH

COLUMNS = (
    "",
    "pages",
    "ms",
    "spread",
    "ns/param",
    "GB/s",
    "of limit",
    "÷ torch",
    "first ms",
    "peak GB",
)
PASS_TITLE = "One pass, beside the torch calls that it replaces"
# Bytes are those of each parameter; what is said twice is said of tensors, and of a flat buffer.
PASS_COLUMNS = (
    "",
    "bytes",
    "flatstep",
    "flat",
    "torch",
    "÷ torch",
    "flat",
    "GB/s",
    "of limit",
    "flat",
)
WORTH_SAYING = 0.02  # of a time: less may be chance

Row = list[str]


def machine_line(report: Report) -> str:
    """What the figures belong to."""
    machine = report.machine
    host = f"{machine.cpu}, {machine.cores} cores"
    if machine.gpu is not None:
        hardware = f"{machine.gpu}, CUDA {machine.cuda}; host {host}"
    else:
        hardware = f"{host}, {machine.threads} threads, {machine.isa}"
    return f"{hardware}; flatstep {machine.flatstep}, torch {machine.torch}, {machine.system}"


def case_title(case: Case) -> tuple[str, str]:
    """What a case is, and how large."""
    size = (
        f"{_count(case.tensors, 'tensor')}, {millions(case.parameters)} parameters, "
        f"{format_bytes(case.bytes_moved)} a step"
    )
    return f"{case.title} × {case.optimizer}, {case.dtype}", size


def case_rows(case: Case) -> tuple[Row, list[Row]]:
    """The columns, and the cells of the limits and of the results; without what nobody has."""
    rows: list[Row] = []
    for limit in case.limits:
        pages = limit.pages or ""
        rates = _time(limit.timing, case.parameters, limit.gb_per_s)
        rows.append(
            ["limit", pages if limit.granted else f"{pages}, not granted", *rates, "", "", "", ""]
        )
    rows += [_result_row(case, result) for result in case.results]
    kept = [
        column not in ("pages", "peak GB") or any(row[place] for row in rows)
        for place, column in enumerate(COLUMNS)
    ]
    return list(compress(COLUMNS, kept)), [list(compress(row, kept)) for row in rows]


def _result_row(case: Case, result: Result) -> Row:
    peak = "" if result.most_bytes is None else significant(result.most_bytes / 1e9)
    name, first = result.implementation, ms(result.first_step)
    if result.timing is None or result.gb_per_s is None:
        return [name, "", short_problem(result.problem), "", "", "", "", "", first, peak]
    return [
        name,
        result.pages or "",
        *_time(result.timing, case.parameters, result.gb_per_s),
        percent(result.of_limit),
        ratio(result.to_torch),
        first,
        peak,
    ]


def pass_title(passes: Sequence[Pass]) -> tuple[str, str]:
    """What the passes are, and how large."""
    sizes = {p.workload: f"{p.workload}, {millions(p.parameters)} parameters" for p in passes}
    return PASS_TITLE, f"{'; '.join(sizes.values())}, adamw; ms"


def pass_rows(passes: Sequence[Pass]) -> list[Row]:
    """The cells of each pass; what else of flatstep's was raced has a row of its own after it."""
    rows: list[Row] = []
    several = len({measured.workload for measured in passes}) > 1
    for measured in passes:
        title = f"{measured.workload}: {measured.title}" if several else measured.title
        each = f"{measured.bytes_per_parameter:.0f}"
        if measured.refused is not None:
            rows.append([title, each, "refused", *[""] * (len(PASS_COLUMNS) - 3)])
            continue
        ours = [measured.result(name) for name in (TENSORS, FLAT)]
        row = [title, each, *(_ms_or_problem(r) for r in (*ours, measured.result(TORCH)))]
        row += [ratio(r.to_torch if r else None) for r in ours]
        rate = ours[0].gb_per_s if ours[0] else None
        row.append("" if rate is None else significant(rate))
        rows.append([*row, *(percent(r.of_limit if r else None) for r in ours)])
        rows += [
            [f"  ÷ {other.implementation}", "", *_beside(ours, other)]
            for other in measured.results
            if other.ours and other.implementation not in (TENSORS, FLAT)
        ]
    return rows


def _beside(ours: Sequence[Result | None], other: Result) -> Row:
    """What another way of flatstep's took, and the times of the two divided by it."""
    ratios = []
    for result in ours:
        if result and result.timing and other.timing:
            ratios.append(ratio(result.timing.median / other.timing.median))
        else:
            ratios.append("")
    return [_ms_or_problem(other), "", "", *ratios, "", "", ""]


def _ms_or_problem(result: Result | None) -> str:
    if result is None or result.timing is None:
        return short_problem(result.problem) if result else ""
    return ms(result.timing.median)


def plain_passes(passes: Sequence[Pass]) -> str:
    """The passes' title and table, for a terminal of which nothing is known."""
    lines = ["   ".join(pass_title(passes)), *_plain_table(PASS_COLUMNS, pass_rows(passes))]
    return "\n".join([*lines, *pass_refusals(passes), ""])


def pass_refusals(passes: Sequence[Pass]) -> list[str]:
    """Why passes were not measured."""
    return [f"{p}: refused: {p.refused}" for p in passes if p.refused is not None]


def plain_case(case: Case) -> str:
    """A case's title and table, for a terminal of which nothing is known."""
    lines = ["   ".join(case_title(case))]
    if case.refused is not None:
        return "\n".join([*lines, f"  refused: {case.refused}", ""])
    return "\n".join([*lines, *_plain_table(*case_rows(case)), ""])


def _plain_table(columns: Sequence[str], rows: Sequence[Row]) -> list[str]:
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = []
    for row in [columns, *rows]:
        cells = [
            cell.ljust(width) if name in ("", "pages") else cell.rjust(width)
            for name, cell, width in zip(columns, row, widths, strict=True)
        ]
        lines.append(f" {'  '.join(cells)}".rstrip())
    return lines


def left_out(report: Report) -> list[str]:
    """What the device has no figures for."""
    return [f"left out on {report.machine.device}: {what}" for what in report.left_out]


def advice(report: Report) -> list[str]:
    """What the figures say, and what to do next."""
    lines = [*_flat_advice(report.measured), *_training_advice(report.training)]
    if report.measured:
        verify = "flatstep verify" + (" --isa cuda" if report.machine.gpu else "")
        lines.append(
            "`--plot bars.png` draws this, `--json FILE` keeps it, "
            "`--model package.module:callable` measures your own model; "
            f"`{verify}` proves the bits"
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


def _time(timing: Timing, parameters: int, gb_per_s: float) -> Sequence[str]:
    return [
        ms(timing.median),
        spread(timing),
        significant(timing.median / parameters * 1e9),
        significant(gb_per_s),
    ]


def format_time(seconds: float) -> str:
    """Milli- or microseconds, with the unit."""
    return (
        f"{significant(seconds * 1e3)} ms"
        if seconds >= 1e-3
        else f"{significant(seconds * 1e6)} µs"
    )


def short_problem(problem: str | None) -> str:
    """A problem without its particulars."""
    return (problem or "").partition(":")[0]


def ms(seconds: float | None) -> str:
    """Milliseconds, without the unit."""
    return "" if seconds is None else significant(seconds * 1e3)


def significant(value: float) -> str:
    """At least three significant digits, and no exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:#.3g}"


def spread(timing: Timing) -> str:
    """Half of what is between the quartiles."""
    return f"±{timing.spread / 2:.1%}"


def ratio(value: float | None) -> str:
    """One time divided by another."""
    return "" if value is None else f"{value:.2f}"


def percent(share: float | None) -> str:
    """A share, in per cent."""
    return "" if share is None else f"{share:.{0 if share >= 0.1 else 1}%}"


def millions(count: int) -> str:
    """A count, in millions where it has some."""
    return f"{count / 1e6:.1f} M" if count >= 1e6 else f"{count:,}"


def _count(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'s' * (count != 1)}"


def format_bytes(count: int) -> str:
    """Bytes, with the unit."""
    for unit, size in [("GB", 1e9), ("MB", 1e6), ("kB", 1e3)]:
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
