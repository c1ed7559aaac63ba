"""The tables of a page: cells that show a text and are sorted by a value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from flatstep.profiling.measure import Timing
from flatstep.profiling.results import Measured, Overhead, Report, Sweep, Training
from flatstep.profiling.text import ms, peak, percent, ratio, short_problem, significant, spread

Value = str | float | int | None


@dataclass(frozen=True)
class Cell:
    """What is shown, and what it is sorted by."""

    text: str
    value: Value = None
    number: bool = False


@dataclass(frozen=True)
class Row:
    """The cells of a row.

    Attributes:
        cells: One for each column.
        kind: "ours" for flatstep's, "limit" for the machine's, "" for everything else.
    """

    cells: Sequence[Cell]
    kind: str = ""


@dataclass
class Table:
    """A table that can be sorted.

    Attributes:
        title: What it holds, in words.
        columns: Their names.
        rows: In the order of the report.
    """

    title: str
    columns: list[str]
    rows: list[Row] = field(default_factory=list)

    @property
    def numbers(self) -> list[bool]:
        """For each column, whether it holds numbers."""
        return [any(row.cells[place].number for row in self.rows) for place in range(self.width)]

    @property
    def width(self) -> int:
        """The number of columns."""
        return len(self.columns)

    def without_empty_columns(self) -> Table:
        """The table without the columns that nobody has anything in."""
        kept = [n for n in range(self.width) if any(row.cells[n].text for row in self.rows)]
        rows = [Row([row.cells[n] for n in kept], row.kind) for row in self.rows]
        return Table(self.title, [self.columns[n] for n in kept], rows)


def word(text: str | None) -> Cell:
    """A cell of words."""
    return Cell(text or "", text or "")


def number(value: float | None, text: str) -> Cell:
    """A cell of a number; empty where there is none."""
    return Cell("") if value is None else Cell(text, value, number=True)


def count(value: int) -> Cell:
    """A cell of a whole number."""
    return Cell(f"{value:,}", value, number=True)


RACE = [
    "implementation",
    "pages",
    "ms",
    "± quartiles",
    "ns/param",
    "GB/s",
    "of limit",
    "÷ torch",
    "first ms",
    "peak",
]


def race_table(
    title: str, columns: Sequence[str], races: Iterable[tuple[Sequence[Cell], Measured]]
) -> Table:
    """The limits and the results of several races, each behind cells that name it."""
    table = Table(title, [*columns, *RACE])
    for names, measured in races:
        for row in _race_rows(measured):
            table.rows.append(Row([*names, *row.cells], row.kind))
    return table.without_empty_columns()


def _race_rows(measured: Measured) -> Iterable[Row]:
    if measured.refused is not None:
        yield Row([word(f"refused: {measured.refused}"), *[Cell("")] * (len(RACE) - 1)])
    for limit in measured.limits:
        pages = limit.pages or ""
        yield Row(
            [
                word("limit"),
                word(pages if limit.granted else f"{pages}, not granted"),
                *_times(limit.timing, measured, limit.gb_per_s),
                *[Cell("")] * 4,
            ],
            "limit",
        )
    for result in measured.results:
        if result.timing is None:
            times: Sequence[Cell] = [word(short_problem(result.problem)), *[Cell("")] * 3]
        else:
            times = _times(result.timing, measured, result.gb_per_s)
        most = result.most_bytes
        yield Row(
            [
                word(result.implementation),
                word(result.pages),
                *times,
                number(result.of_limit, percent(result.of_limit)),
                number(result.to_torch, ratio(result.to_torch)),
                number(result.first_step, ms(result.first_step)),
                number(most, "" if most is None else peak(most)),
            ],
            "ours" if result.ours else "",
        )


def _times(timing: Timing, measured: Measured, gb_per_s: float | None) -> Sequence[Cell]:
    each = timing.median / measured.parameters * 1e9
    return [
        number(timing.median, ms(timing.median)),
        number(timing.spread, spread(timing)),
        number(each, significant(each)),
        number(gb_per_s, "" if gb_per_s is None else significant(gb_per_s)),
    ]


def updates_table(report: Report) -> Table:
    """Every case."""
    return race_table(
        "Updates",
        ["workload", "optimizer", "dtype", "parameters"],
        (
            ([word(c.workload), word(c.optimizer), word(c.dtype), count(c.parameters)], c)
            for c in report.cases
        ),
    )


def passes_table(report: Report) -> Table:
    """Every pass, with the torch calls that it replaces."""
    return race_table(
        "Passes",
        ["pass", "what is done", "torch's calls", "workload"],
        (
            ([word(p.name), word(p.title), word(p.calls), word(p.workload)], p)
            for p in report.passes
        ),
    )


def sweep_table(sweep: Sweep) -> Table:
    """Every point of a sweep."""
    return race_table(
        str(sweep), [sweep.axis], (([count(point.x)], point) for point in sweep.points)
    )


def buckets_table(report: Report) -> Table:
    """Every size class of every case."""
    return race_table(
        "Size classes",
        ["workload", "optimizer", "smallest", "largest", "tensors"],
        (
            (
                [
                    word(case.workload),
                    word(case.optimizer),
                    *map(count, (bucket.smallest, bucket.largest, bucket.tensors)),
                ],
                bucket,
            )
            for case in report.cases
            for bucket in case.buckets
        ),
    )


def overheads_table(overheads: Iterable[Overhead]) -> Table:
    """What a step and a tensor cost."""
    table = Table(
        "What a step and a tensor cost",
        ["implementation", "optimizer", "µs a step", "ns a tensor", "± of the line"],
    )
    for each in overheads:
        step, tensor = each.per_step * 1e6, each.per_tensor * 1e9
        table.rows.append(
            Row(
                [
                    word(each.implementation),
                    word(each.optimizer),
                    number(step, significant(step)),
                    number(tensor, significant(tensor)),
                    number(each.spread, f"±{percent(each.spread)}"),
                ],
                "ours" if each.implementation.partition(" ")[0] == "flatstep" else "",
            )
        )
    return table


def training_table(whole: Training) -> Table:
    """Every way of a whole step."""
    table = Table(
        "The whole step",
        [
            "way",
            "forward ms",
            "backward ms",
            "update ms",
            "clearing ms",
            "together ms",
            "± quartiles",
            "÷ torch",
        ],
    )
    for way in whole.results:
        phases = (way.forward, way.backward, way.step, way.zero_grad, way.total)
        cells = [number(p.median, ms(p.median)) if p else Cell("") for p in phases]
        if way.problem is not None:
            cells[-1] = word(short_problem(way.problem))
        noise = Cell("") if way.total is None else number(way.total.spread, spread(way.total))
        to_torch = number(way.to_torch, ratio(way.to_torch))
        table.rows.append(Row([word(way.way), *cells, noise, to_torch], "ours" if way.ours else ""))
    return table.without_empty_columns()
