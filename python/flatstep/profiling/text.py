"""What a profile says, in plain text: for the tables, the plots and machines without either."""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence
from itertools import compress

from flatstep.profiling import training
from flatstep.profiling.measure import Timing
from flatstep.profiling.memory import TELLABLE
from flatstep.profiling.results import (
    Bucket,
    Case,
    Measured,
    Overhead,
    Pass,
    Report,
    Result,
    Sweep,
    Training,
)
from flatstep.profiling.works import FLAT, TENSORS, TORCH

COLUMNS = (
    "",
    "pages",
    "ms",
    "spread",
    "ns / param",
    "GB/s",
    "of limit",
    "÷ torch",
    "first ms",
    "peak MB",
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
BUCKET_TITLE = ("Its tensors of each size alone", "µs")
SMALLER = "give memory back, or choose a smaller --dtype"
OVERHEAD_COLUMNS = ("", "µs a step", "ns a tensor", "off the line")
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
        f"{counted(case.tensors, 'tensor')}, {millions(case.parameters)} parameters, "
        f"{format_bytes(case.bytes_moved)} a step, {case.bytes_per_parameter:.3g} bytes a parameter"
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
        column not in ("pages", "peak MB") or any(row[place] for row in rows)
        for place, column in enumerate(COLUMNS)
    ]
    return list(compress(COLUMNS, kept)), [list(compress(row, kept)) for row in rows]


def _result_row(case: Case, result: Result) -> Row:
    most = "" if result.most_bytes is None else _megabytes(result.most_bytes)
    name, first = result.implementation, ms(result.first_step)
    if result.timing is None or result.gb_per_s is None:
        return [name, "", short_problem(result.problem), "", "", "", "", "", first, most]
    return [
        name,
        result.pages or "",
        *_time(result.timing, case.parameters, result.gb_per_s),
        percent(result.of_limit),
        ratio(result.to_torch),
        first,
        most,
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
            [f"  {part.implementation} alone", "", "", "", _ms_or_problem(part), *[""] * 5]
            for part in measured.parts
        ]
        rows += [
            [f"  ÷ {other.implementation}", "", *_beside(ours, other)]
            for other in measured.results
            if other.ours and other.implementation not in (TENSORS, FLAT)
        ]
        rows += [
            [f"  with {other.implementation}", "", *_with_named(ours, other)]
            for other in measured.results
            if not (other.ours or other.of_torch)
        ]
    return rows


def bucket_rows(case: Case) -> tuple[Row, list[Row]]:
    """The columns, and the cells of each size class of a case."""
    columns, rows = _grid("tensors of", case.buckets, [bucket_name(b) for b in case.buckets])
    counts = [f"{bucket.tensors:,}" for bucket in case.buckets]
    shares = [percent(bucket.parameters / case.parameters) for bucket in case.buckets]
    added = zip(rows, counts, shares, strict=True)
    return (
        [columns[0], "tensors", "of all", *columns[1:]],
        [[row[0], count, share, *row[1:]] for row, count, share in added],
    )


def bucket_name(bucket: Bucket) -> str:
    """The sizes of a class's tensors."""
    if bucket.smallest == bucket.largest:
        return f"{bucket.smallest:,}"
    return f"{bucket.smallest:,} to {bucket.largest:,}"


def sweep_title(sweep: Sweep) -> tuple[str, str]:
    """What a sweep is, and of what."""
    return sweep.title, f"{sweep.optimizer}, {sweep.dtype}; µs"


def sweep_rows(sweep: Sweep) -> tuple[Row, list[Row]]:
    """The columns, and the cells of each point."""
    return _grid(sweep.axis, sweep.points, [f"{point.x:,}" for point in sweep.points])


def _grid(axis: str, races: Sequence[Measured], names: Sequence[str]) -> tuple[Row, list[Row]]:
    """A row for each race, and a column for the time of each implementation."""
    found = dict.fromkeys(result.implementation for race in races for result in race.results)
    ours = {
        name: title for name, title in {TENSORS: "flatstep", FLAT: "flat"}.items() if name in found
    }
    letters = {name: letter for letter, name in _letters(races).items()}
    titles = {**ours, **{name: letters.get(name, name) for name in found if name not in ours}}
    columns = [axis, "limit", *titles.values(), "÷ torch", "flat", "of limit", "flat"]
    rows = []
    for race, name in zip(races, names, strict=True):
        if race.refused is not None:
            rows.append([name, "refused", *[""] * (len(columns) - 2)])
            continue
        limit = race.best_limit()
        results = [race.result(implementation) for implementation in (TENSORS, FLAT)]
        rows.append(
            [
                name,
                microseconds(limit.timing.median) if limit else "",
                *(_microseconds_or_problem(race.result(each)) for each in titles),
                *(ratio(result.to_torch if result else None) for result in results),
                *(percent(result.of_limit if result else None) for result in results),
            ]
        )
    return columns, rows


def _letters(races: Sequence[Measured]) -> dict[str, str]:
    """A letter for each named optimizer: their names are too long for a column's head."""
    found = [result for race in races for result in race.results]
    named = dict.fromkeys(r.implementation for r in found if not (r.ours or r.of_torch))
    return dict(zip(string.ascii_uppercase, named, strict=False))


def legend(races: Sequence[Measured]) -> list[str]:
    """What the letters of a table stand for."""
    return [f"{letter}: {name}" for letter, name in _letters(races).items()]


def _microseconds_or_problem(result: Result | None) -> str:
    if result is None or result.timing is None:
        return short_problem(result.problem).partition(" ")[0] if result else ""
    return microseconds(result.timing.median)


def sweep_refusals(sweep: Sweep) -> list[str]:
    """Why points were not measured, and what to do."""
    return [
        f"{point.x:,} {sweep.axis}: refused: {point.refused}; {SMALLER}"
        for point in sweep.points
        if point.refused is not None
    ]


def bucket_refusals(case: Case) -> list[str]:
    """Why size classes were not measured, and what to do."""
    return [
        f"tensors of {bucket_name(bucket)}: refused: {bucket.refused}; {SMALLER}"
        for bucket in case.buckets
        if bucket.refused is not None
    ]


def overhead_title(found: Sequence[Overhead]) -> tuple[str, str]:
    """What the overheads are, and of what."""
    return "What a step and a tensor cost", f"{found[0].optimizer}, a line through these times"


def overhead_rows(found: Sequence[Overhead]) -> list[Row]:
    """The cells of each implementation."""
    return [
        [
            each.implementation,
            microseconds(each.per_step),
            significant(each.per_tensor * 1e9),
            f"±{each.spread:.0%}",
        ]
        for each in found
    ]


def _beside(ours: Sequence[Result | None], other: Result) -> Row:
    """What another way of flatstep's took, and the times of the two divided by it."""
    return [_ms_or_problem(other), "", "", *_ratios(ours, other), "", "", ""]


def _with_named(ours: Sequence[Result | None], other: Result) -> Row:
    """What torch's calls took with a named optimizer, and flatstep's times divided by that."""
    return ["", "", _ms_or_problem(other), *_ratios(ours, other), "", "", ""]


def _ratios(ours: Sequence[Result | None], other: Result) -> Row:
    return [
        ratio(result.timing.median / other.timing.median)
        if result and result.timing and other.timing
        else ""
        for result in ours
    ]


def _ms_or_problem(result: Result | None) -> str:
    if result is None or result.timing is None:
        return short_problem(result.problem) if result else ""
    return ms(result.timing.median)


def plain_passes(passes: Sequence[Pass]) -> str:
    """The passes' title and table, for a terminal of which nothing is known."""
    lines = ["   ".join(pass_title(passes)), *plain_table(PASS_COLUMNS, pass_rows(passes))]
    return "\n".join([*lines, *pass_refusals(passes), ""])


def pass_refusals(passes: Sequence[Pass]) -> list[str]:
    """Why passes were not measured."""
    return [f"{p}: refused: {p.refused}" for p in passes if p.refused is not None]


def plain_case(case: Case) -> str:
    """A case's title and table, for a terminal of which nothing is known."""
    lines = ["   ".join(case_title(case))]
    if case.refused is not None:
        return "\n".join([*lines, f"  refused: {case.refused}", ""])
    lines += plain_table(*case_rows(case))
    if case.buckets:
        lines += ["", "   ".join(BUCKET_TITLE), *plain_table(*bucket_rows(case))]
        lines += [*legend(case.buckets), *bucket_refusals(case)]
    return "\n".join([*lines, ""])


def plain_sweep(sweep: Sweep, found: Sequence[Overhead]) -> str:
    """A sweep's title and table, and what a step and a tensor cost by it."""
    lines = ["   ".join(sweep_title(sweep)), *plain_table(*sweep_rows(sweep))]
    lines += [*legend(sweep.points), *sweep_refusals(sweep), ""]
    if found:
        lines += ["   ".join(overhead_title(found))]
        lines += [*plain_table(OVERHEAD_COLUMNS, overhead_rows(found)), ""]
    return "\n".join(lines)


def plain_table(columns: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """The lines of a table: words to the left, figures to the right."""
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    lines = []
    for row in [columns, *rows]:
        cells = [
            cell.ljust(width) if place == 0 or name == "pages" else cell.rjust(width)
            for place, (name, cell, width) in enumerate(zip(columns, row, widths, strict=True))
        ]
        lines.append(f" {'  '.join(cells)}".rstrip())
    return lines


def problem_lines(report: Report) -> list[str]:
    """What went wrong; that of one implementation once, and in how many other places it did."""
    named = {
        result.implementation
        for _, measured in report.races()
        for result in measured.results
        if not (result.ours or result.of_torch)
    }
    lines: dict[tuple[str, str], list[str]] = {}
    for place, problem in report.problems.items():
        whose = next((name for name in named if place.endswith(f", {name}")), place)
        lines.setdefault((whose, short_problem(problem)), []).append(f"{place}: {problem}")
    return [
        f"{first}; and so in {counted(len(others), 'other race')}" if others else first
        for first, *others in lines.values()
    ]


def left_out(report: Report) -> list[str]:
    """What the device has no figures for."""
    return [f"left out on {report.machine.device}: {what}" for what in report.left_out]


def advice(report: Report) -> list[str]:
    """What the figures say, and what to do next."""
    lines = [*_flat_advice(report.measured), *_training_advice(report.training)]
    lines += [line for sweep in report.sweeps for line in _thread_advice(sweep)]
    lines += _named_advice(report)
    if report.measured:
        verify = "flatstep verify" + (" --isa cuda" if report.machine.gpu else "")
        lines.append(
            "`--plot bars.png` draws this, `--json FILE` keeps it, "
            "`--model package.module:callable` measures your own model, "
            "`--against package.module:Class` your own optimizer; "
            f"`{verify}` proves the bits"
        )
    elif report.measured_passes or report.measured_sweeps:
        lines.append("`--html report.html` draws this, `--json FILE` keeps it")
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


def _thread_advice(sweep: Sweep) -> list[str]:
    """Whether fewer threads than all are faster."""
    timed = [(point.x, point.result(TENSORS)) for point in sweep.points]
    times = {x: result.timing for x, result in timed if result and result.timing}
    if sweep.axis != "threads" or len(times) < 2:
        return []
    best, most = min(times, key=lambda x: times[x].median), max(times)
    gain = 1 - times[best].median / times[most].median
    if gain > WORTH_SAYING and times[best].upper_quartile < times[most].lower_quartile:
        return [
            f"the update takes {gain:.0%} less time on {best} threads than on {most}: "
            f"torch.set_num_threads({best}) if backward does not suffer"
        ]
    return [f"threads: the update is at its fastest on {most}: leave torch.set_num_threads alone"]


def _named_advice(report: Report) -> list[str]:
    """What to do about named optimizers with another result."""
    wrong = {
        result.implementation
        for _, measured in report.races()
        for result in measured.results
        if not (result.ours or result.of_torch) and (result.problem or "").startswith("wrong")
    }
    return [
        f"{name} does another update than torch's: give it the same options after a comma, as in "
        "package.module:Class,weight_decay=0.01, or name another rule before it, as in adamw=; "
        "`flatstep verify --optimizer package.module:Class` says where they part"
        for name in sorted(wrong)
    ]


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
    if round(seconds * 1e6) >= 1000:
        return f"{significant(seconds * 1e3)} ms"
    return f"{significant(seconds * 1e6)} µs"


def short_problem(problem: str | None) -> str:
    """A problem without its particulars."""
    return (problem or "").partition(":")[0]


def ms(seconds: float | None) -> str:
    """Milliseconds, without the unit."""
    return "" if seconds is None else significant(seconds * 1e3)


def microseconds(seconds: float) -> str:
    """Microseconds, without the unit."""
    return significant(seconds * 1e6)


def significant(value: float) -> str:
    """At least three significant digits, and no exponent."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:#.3g}"


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


def _megabytes(count: int) -> str:
    return f"<{TELLABLE / 1e6:.0f}" if count < TELLABLE else significant(count / 1e6)


def peak(count: int) -> str:
    """Bytes that are not told below a certain count."""
    return f"<{format_bytes(TELLABLE)}" if count < TELLABLE else format_bytes(count)


def counted(count: int, thing: str) -> str:
    """A count, and what is counted."""
    return f"{count:,} {thing}{'s' * (count != 1)}"


def format_bytes(count: int) -> str:
    """Bytes, with the unit."""
    for unit, size in [("GB", 1e9), ("MB", 1e6), ("kB", 1e3)]:
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
