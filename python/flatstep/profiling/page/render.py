"""A profile as one HTML file: sections of charts and tables, and what they say."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from flatstep.profiling.page import charts, tables
from flatstep.profiling.page.charts import Looks
from flatstep.profiling.page.tables import Table
from flatstep.profiling.results import Case, Report, Result
from flatstep.profiling.text import advice, left_out, machine_line, percent, ratio
from flatstep.profiling.works import FLAT, TENSORS

Draw = Callable[[Looks], go.Figure]

NOTHING = 0.005  # of a time


@dataclass
class Chart:
    """A chart, and what it shows in words."""

    name: str
    title: str
    draw: Draw


@dataclass
class Section:
    """A part of the page.

    Attributes:
        name: In the page's address.
        title: A few words.
        lead: What to look for.
        charts: One below the other.
        tables: Below them.
        beside: Whether the charts stand side by side where there is room.
    """

    name: str
    title: str
    lead: str
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    beside: bool = False


@dataclass(frozen=True)
class Tile:
    """A figure that stands out."""

    figure: str
    what: str


def render(report: Report) -> str:
    """The page of a report, which needs no other file and no network."""
    environment = Environment(
        loader=PackageLoader("flatstep.profiling.page", "template"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(code=_code, capital=_capital)
    found = sections(report)
    return environment.get_template("page.html").render(
        report=report,
        machine=machine_line(report),
        headline=headline(report),
        tiles=tiles(report),
        alarms=[f"{place}: {problem}" for place, problem in report.problems.items()],
        warnings=_warnings(report),
        advice=advice(report),
        sections=found,
        missing=missing(report),
        figures=_figures(report, found),
        plotly=Markup(get_plotlyjs()),
    )


def _code(text: str) -> Markup:
    """A line whose commands stand between backticks."""
    return Markup(re.sub("`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def _capital(text: str) -> str:
    """A line that begins with a capital letter, but for flatstep's name."""
    return text if text.startswith("flatstep") else text[:1].upper() + text[1:]


def _figures(report: Report, found: list[Section]) -> dict[str, dict[str, Any]]:
    """Each chart in every palette, by its name."""
    looks = [Looks(report, palette) for palette in charts.PALETTES]
    return {
        chart.name: {look.palette.name: chart.draw(look).to_plotly_json() for look in looks}
        for section in found
        for chart in section.charts
    }


def _warnings(report: Report) -> list[str]:
    lines = [*report.warnings, *left_out(report)]
    if report.interrupted:
        lines.insert(0, "interrupted: this is what was measured so far")
    return lines


# ---- what the figures say


def _best(case: Case) -> Result | None:
    """The faster of flatstep's two ways."""
    ours = [r for name in (FLAT, TENSORS) if (r := case.result(name)) is not None and r.timing]
    return min(ours, key=lambda r: r.timing.median if r.timing else math.inf, default=None)


def _races(report: Report) -> list[tuple[Case, Result]]:
    """The cases that both flatstep and torch have a time for."""
    pairs = [(case, _best(case)) for case in report.measured]
    return [(case, ours) for case, ours in pairs if ours is not None and ours.to_torch is not None]


def headline(report: Report) -> list[str]:
    """What flatstep saves here, and where it does not, in a few sentences."""
    races = [(case, ours, ours.to_torch) for case, ours in _races(report) if ours.to_torch]
    lines = []
    if len(races) == 1:
        [(case, _, share)] = races
        lines += [
            f"flatstep's update takes {_less(share)} time than torch's fastest",
            f"measured on {case}",
        ]
    elif races:
        mean = statistics.geometric_mean(share for _, _, share in races)
        most, least = (pick(races, key=lambda race: race[2]) for pick in (min, max))
        lines += [
            f"flatstep's updates take {_less(least[2], most[2])} time than torch's fastest",
            f"the least is saved on {least[0]}, the most on {most[0]}; the geometric mean over "
            f"{len(races)} is {_less(mean)}",
        ]
    even = [str(case) for case, ours, _ in races if not _is_faster(case, ours)]
    if even:
        lines.append(f"no gain beyond the noise: {'; '.join(even)}")
    passes = _passes_to_torch(report)
    if passes:
        lines.append(
            "norms, clipping, averages and mixed precision take "
            f"{_less(statistics.geometric_mean(passes))} time than torch's calls, in the geometric "
            f"mean over {len(passes)} passes"
        )
    totals = _totals_to_torch(report)
    if totals and report.training:
        lines.append(
            f"in training, a step of {report.training.model} takes {_less(min(totals))} time than "
            "with torch's fused"
        )
    return lines


def _less(*ratios: float) -> str:
    """How much less time one ratio to torch's means, or two, the larger first."""
    saved = [1 - share for share in ratios]
    said = [percent(abs(share)) if abs(share) >= NOTHING else "0%" for share in saved]
    ways = ["less" if share > -NOTHING else "more" for share in saved]
    if said == ["0%"]:
        return "no less"
    if len(set(ways)) == 1:
        return f"{' to '.join(dict.fromkeys(said))} {ways[0]}"
    return " to ".join(f"{share} {way}" for share, way in zip(said, ways, strict=True))


def _passes_to_torch(report: Report) -> list[float]:
    ours = [each.result(TENSORS) for each in report.measured_passes]
    return [each.to_torch for each in ours if each is not None and each.to_torch is not None]


def _is_faster(case: Case, ours: Result) -> bool:
    best = case.torch_best()
    if best is None or best.timing is None or ours.timing is None:
        return False
    return ours.timing.upper_quartile < best.timing.lower_quartile


def tiles(report: Report) -> list[Tile]:
    """The figures that stand out."""
    found = []
    races = [ours.to_torch for _, ours in _races(report) if ours.to_torch]
    if races:
        mean = statistics.geometric_mean(races)
        found.append(Tile(f"{ratio(mean)}×", "time of an update beside torch's fastest"))
    shares = [ours.of_limit for _, ours in _races(report) if ours.of_limit]
    if shares:
        found.append(
            Tile(percent(statistics.median(shares)), "of the memory's limit, the median update")
        )
    totals = _totals_to_torch(report)
    if totals:
        found.append(Tile(f"{ratio(min(totals))}×", "time of a whole step beside torch's"))
    passes = _passes_to_torch(report)
    if passes:
        mean = statistics.geometric_mean(passes)
        found.append(Tile(f"{ratio(mean)}×", "time of a pass beside torch's calls"))
    return found


def _totals_to_torch(report: Report) -> list[float]:
    ways = report.training.results if report.training else []
    return [way.to_torch for way in ways if way.ours and way.to_torch is not None]


# ---- sections


def sections(report: Report) -> list[Section]:
    """What the report has figures for."""
    found = []
    for part in (_updates, _roofline, _sizes, _threads, _tensors, _buckets, _training, _passes):
        section = part(report)
        if section is not None:
            found.append(section)
    return found


def missing(report: Report) -> list[tuple[str, str]]:
    """What the report has no figures for, and the command that brings them."""
    there = {section.name for section in sections(report)}
    commands = {
        "updates": ("Updates", "flatstep profile --workload gpt2 --html report.html"),
        "sizes": ("Sizes", "flatstep profile --sweep sizes --html report.html"),
        "threads": ("Threads", "flatstep profile --sweep threads --html report.html"),
        "tensors": ("Tensors", "flatstep profile --sweep tensors --html report.html"),
        "buckets": (
            "Size classes",
            "flatstep profile --workload gpt2 --buckets --html report.html",
        ),
        "training": ("The whole step", "flatstep profile --whole-step --html report.html"),
        "passes": ("Passes", "flatstep profile --pass all --html report.html"),
    }
    on_cpu = ("threads", "training", "passes")
    return [
        command
        for name, command in commands.items()
        if name not in there and not (report.machine.gpu and name in on_cpu)
    ]


def _updates(report: Report) -> Section | None:
    if not report.cases:
        return None
    drawn = [case for case in report.measured if case.limits]
    chart = Chart(
        "updates",
        "Share of the memory's limit that each implementation reaches",
        partial(charts.draw_updates, report),
    )
    return Section(
        "updates",
        "Updates",
        "How close a step comes to what this memory can do. The limit is the same traffic without "
        "arithmetic, on the fastest kind of pages. Further right is better.",
        [chart] if drawn else [],
        [tables.updates_table(report)],
    )


def _roofline(report: Report) -> Section | None:
    points = charts.roofline_points(report)
    if len({each.bytes_moved for _, each in points}) < 2:
        return None
    return Section(
        "roofline",
        "Roofline",
        "An update has little arithmetic for each byte, so the roof is the memory's rate. The line "
        "is the limit, measured in turns with what is below it; small steps live in the caches.",
        [
            Chart(
                "roofline",
                "Rate of each implementation and of the limit, over the bytes of a step",
                partial(charts.draw_roofline, report),
            )
        ],
    )


def _sweep_charts(
    report: Report,
    axis: str,
    x_title: str,
    values: Mapping[str, charts.Scale],
    by_point: bool = False,
) -> list[Chart]:
    return [
        Chart(
            f"{axis}-{place}-{number}",
            f"{sweep.title}, {sweep.optimizer}, {sweep.dtype}: {y_title}",
            partial(
                charts.draw_sweep,
                sweep,
                value=value,
                x_title=x_title,
                y_title=y_title,
                by_point=by_point,
            ),
        )
        for place, sweep in enumerate(charts.sweeps_of(report, axis))
        for number, (y_title, value) in enumerate(values.items())
    ]


def _sweep_tables(report: Report, axis: str) -> list[Table]:
    return [tables.sweep_table(sweep) for sweep in charts.sweeps_of(report, axis)]


def _sizes(report: Report) -> Section | None:
    if not charts.sweeps_of(report, "parameters"):
        return None
    values = {"ns for each parameter": charts.ns_per_parameter, "GB/s": charts.gb_per_s}
    return Section(
        "sizes",
        "Sizes",
        "A small step pays for the call, a large one for memory. Bands are between the quartiles.",
        _sweep_charts(report, "parameters", "parameters", values),
        _sweep_tables(report, "parameters"),
        beside=True,
    )


def _threads(report: Report) -> Section | None:
    if not charts.sweeps_of(report, "threads"):
        return None
    return Section(
        "threads",
        "Threads",
        "Where the lines level out, memory has no more to give: further threads may do other work.",
        _sweep_charts(report, "threads", "threads", {"GB/s": charts.gb_per_s}, by_point=True),
        _sweep_tables(report, "threads"),
    )


def _tensors(report: Report) -> Section | None:
    if not (charts.sweeps_of(report, "tensors") or report.overheads):
        return None
    found = _sweep_tables(report, "tensors")
    if report.overheads:
        found.insert(0, tables.overheads_table(report.overheads))
    return Section(
        "tensors",
        "Tensors",
        "What each tensor adds to a step: the slope of a line through these times. To flatstep, a "
        "FlatBuffer is one tensor.",
        _sweep_charts(report, "tensors", "tensors", {"µs of a step": charts.microseconds}),
        found,
    )


def _buckets(report: Report) -> Section | None:
    cases = charts.bucketed(report)
    if not cases:
        return None
    return Section(
        "buckets",
        "Size classes",
        "The same update over only those tensors of a model that are of one size. Further "
        "left is better; how many tensors there are stands between parentheses.",
        [
            Chart(
                f"buckets-{place}",
                f"{case}, by the elements of a tensor",
                partial(charts.draw_buckets, case),
            )
            for place, case in enumerate(cases)
        ],
        [tables.buckets_table(report)],
    )


def _training(report: Report) -> Section | None:
    whole = report.training
    if whole is None or not whole.results:
        return None
    timed = any(way.total is not None for way in whole.results)
    chart = Chart(
        "training",
        f"What a step of {whole.model} takes, by its phases",
        partial(charts.draw_training, report),
    )
    return Section(
        "training",
        "The whole step",
        f"{whole.model} with {whole.parameters:,} parameters, {whole.optimizer}: an update is a "
        "part of a step, and this is how large a part.",
        [chart] if timed else [],
        [tables.training_table(whole)],
    )


def _passes(report: Report) -> Section | None:
    if not report.passes:
        return None
    found = []
    if report.measured_passes:
        found.append(
            Chart(
                "passes",
                "Time of each pass, divided by that of the torch calls that it replaces",
                partial(charts.draw_passes, report),
            )
        )
    if any(each.parts for each in report.measured_passes):
        found.append(
            Chart("parts", "torch's calls, one after the other", partial(charts.draw_parts, report))
        )
    return Section(
        "passes",
        "Passes",
        "Norm, clipping, averages and mixed precision in the update's one pass, beside the "
        "sequence of torch calls that does the same. Further left is better.",
        found,
        [tables.passes_table(report)],
    )
