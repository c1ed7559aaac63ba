"""The charts of a page, in the colors of light and of dark."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import plotly.graph_objects as go
from markupsafe import escape

from flatstep.profiling.measure import Timing
from flatstep.profiling.results import (
    Case,
    Limit,
    Measured,
    Pass,
    Point,
    Report,
    Result,
    Sweep,
    TrainingResult,
)
from flatstep.profiling.text import (
    bucket_name,
    format_bytes,
    format_time,
    millions,
    ratio,
    significant,
)
from flatstep.profiling.works import FLAT, TENSORS

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif'
ROW = 30  # pixels
FRAME = 70  # pixels of a chart around its rows
LIMIT = "limit"


@dataclass(frozen=True)
class Palette:
    """The colors of a chart.

    Attributes:
        name: As the page calls it.
        ink: Of text.
        faint: Of axes.
        rule: Of grids.
        ground: Behind everything.
        ours: flatstep's, with a flat buffer first.
        others: Of everything else, the most important first.
    """

    name: str
    ink: str
    faint: str
    rule: str
    ground: str
    ours: tuple[str, ...]
    others: tuple[str, ...]

    def template(self) -> go.layout.Template:
        """What all charts share."""
        axis = {
            "gridcolor": self.rule,
            "linecolor": self.rule,
            "zeroline": False,
            "ticks": "",
            "automargin": True,
            "exponentformat": "SI",
            "ticklabelstandoff": 6,
            "fixedrange": True,
            "tickfont": {"color": self.faint, "size": 12},
            "title": {"font": {"color": self.faint, "size": 12}, "standoff": 10},
        }
        return go.layout.Template(
            layout={
                "font": {"family": FONT, "color": self.ink, "size": 13},
                "paper_bgcolor": "rgba(0,0,0,0)",
                "plot_bgcolor": "rgba(0,0,0,0)",
                "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
                "xaxis": axis,
                "yaxis": axis,
                "dragmode": False,
                "bargap": 0.35,
                "hoverlabel": {
                    "bgcolor": self.ground,
                    "bordercolor": self.rule,
                    "font": {"color": self.ink, "family": FONT, "size": 12},
                    "align": "left",
                },
                "showlegend": False,  # the page has one of its own, which wraps
            }
        )


LIGHT = Palette(
    "light",
    ink="#1c1f24",
    faint="#667080",
    rule="#e6e8ec",
    ground="#ffffff",
    ours=("#0f62d6", "#7db1f5", "#3f8cf0", "#b3d1fa"),
    others=("#5d6673", "#98a1ad", "#c3c9d1", "#7a8492"),
)
DARK = Palette(
    "dark",
    ink="#e8eaee",
    faint="#98a2b0",
    rule="#2a3038",
    ground="#14171c",
    ours=("#5aa2ff", "#2f6cc0", "#8cc0ff", "#24508c"),
    others=("#a3acb8", "#707a87", "#4b535e", "#8a93a0"),
)
PALETTES = (LIGHT, DARK)


class Look(NamedTuple):
    """How one implementation looks in every chart of a page."""

    color: str
    symbol: str


class Looks:
    """The look of each implementation of a report: the same in every chart."""

    def __init__(self, report: Report, palette: Palette):
        self.palette = palette
        names = [result.implementation for _, each in report.races() for result in each.results]
        names += [way.way for way in report.training.results] if report.training else []
        there = list(dict.fromkeys(names))
        self.ours = [FLAT, TENSORS, *(n for n in there if _is_ours(n) and n not in (FLAT, TENSORS))]
        self.others = sorted((n for n in there if not _is_ours(n)), key=_importance)

    def of(self, name: str) -> Look:
        """The look of one implementation, or of the limit."""
        if name == LIMIT:
            return Look(self.palette.ink, "line-ns")
        known = self.ours if _is_ours(name) else self.others
        colors = self.palette.ours if _is_ours(name) else self.palette.others
        symbols = ("circle", "circle", "diamond", "square", "triangle-up", "cross")
        place = known.index(name)
        return Look(colors[place % len(colors)], symbols[place % len(symbols)])

    def order(self, names: Iterable[str]) -> list[str]:
        """Names in the order of a legend."""
        there = set(names)
        return [name for name in [*self.ours, *self.others] if name in there]


def _is_ours(name: str) -> bool:
    return name.replace(",", " ").partition(" ")[0] == "flatstep"


def _importance(name: str) -> int:
    order = ["torch", "torch fused", "torch foreach", "torch for-loop"]
    return order.index(name) if name in order else len(order)


Draw = Callable[[Report, Looks], go.Figure]


def text(value: object) -> str:
    """A name for a chart, whose texts know a few of HTML's tags."""
    return str(escape(value))


def _figure(looks: Looks, height: float, **layout: Any) -> go.Figure:
    return go.Figure(layout={"template": looks.palette.template(), "height": height, **layout})


def _marker(looks: Looks, name: str) -> dict[str, Any]:
    """A marker that is told apart from those below it."""
    look = looks.of(name)
    edge = {"color": looks.palette.ground, "width": 1.5}
    return {"color": look.color, "symbol": look.symbol, "line": edge}


def _faded(color: str, alpha: float) -> str:
    red, green, blue = (int(color[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},{alpha})"


def _hover(measured: Measured, result: Result) -> str:
    assert result.timing is not None
    said = [format_time(result.timing.median), f"±{result.timing.spread / 2:.1%}"]
    if result.gb_per_s is not None:
        said.append(f"{result.gb_per_s:.3g} GB/s")
    if result.of_limit is not None:
        said.append(f"{result.of_limit:.0%} of the limit")
    if result.to_torch is not None:
        said.append(f"{ratio(result.to_torch)} × torch's time")
    return f"{', '.join(said)}<br>{millions(measured.parameters)} parameters"


# ---- dots: a line for each race


Value = Callable[[Measured, Result], float | None]


def draw_dots(
    rows: Sequence[tuple[str, Measured]],
    looks: Looks,
    value: Value,
    title: str,
    line: float | None = None,
    **axis: Any,
) -> go.Figure:
    """Each implementation as a dot on the line of what was raced.

    Args:
        rows: What was raced, and what it is called.
        looks: The look of each implementation.
        value: Where a result's dot stands; None for no dot.
        title: Of the axis.
        line: Where to draw a line across.
        **axis: Other properties of the axis.
    """
    figure = _figure(looks, ROW * len(rows) + FRAME)
    dots = [
        (text(label), measured, result, place)
        for label, measured in rows
        for result in measured.results
        if result.timing is not None and (place := value(measured, result)) is not None
    ]
    for label, _ in rows:
        places = [place for where, _, _, place in dots if where == text(label)]
        if places:
            figure.add_scatter(
                x=[min(places), max(places)],
                y=[text(label)] * 2,
                mode="lines",
                line={"color": looks.palette.rule, "width": 6},
                hoverinfo="skip",
            )
    names = looks.order(result.implementation for _, _, result, _ in dots)
    for name in reversed(names):
        there = [dot for dot in dots if dot[2].implementation == name]
        figure.add_scatter(
            name=text(name),
            meta=name,
            legendrank=names.index(name),
            x=[place for *_, place in there],
            y=[label for label, *_ in there],
            mode="markers",
            marker={**_marker(looks, name), "size": 13},
            customdata=[_hover(measured, result) for _, measured, result, _ in there],
            hovertemplate="%{y}<br><b>%{fullData.name}</b>: %{customdata}<extra></extra>",
        )
    if line is not None:
        figure.add_vline(x=line, line={"color": looks.palette.ink, "width": 1, "dash": "dot"})
    figure.update_xaxes(title_text=title, **axis)
    figure.update_yaxes(
        type="category",
        categoryorder="array",
        categoryarray=[text(label) for label, _ in reversed(rows)],
        range=[-0.6, len(rows) - 0.4],
        showgrid=False,
        tickfont={"color": looks.palette.ink},
    )
    return figure


def draw_updates(report: Report, looks: Looks) -> go.Figure:
    """The share of the limit that each implementation reaches, in each case."""
    rows = [(str(case), case) for case in report.measured if case.limits]
    title = "share of the limit"
    return draw_dots(rows, looks, _share, title, 100, ticksuffix="%", rangemode="tozero")


def _share(measured: Measured, result: Result) -> float | None:
    """The share of the fastest limit, in per cent."""
    limit = measured.best_limit()
    if limit is None or result.timing is None:
        return None
    return 100 * limit.timing.median / result.timing.median


def draw_passes(report: Report, looks: Looks) -> go.Figure:
    """The time of each pass, divided by that of the torch calls that it replaces."""
    passes = report.measured_passes
    rows = [(pass_label(each, passes), each) for each in passes]
    title = "time ÷ that of torch's calls"
    return draw_dots(rows, looks, lambda _, r: r.to_torch, title, 1, rangemode="tozero")


def pass_label(each: Pass, passes: Sequence[Pass]) -> str:
    """A pass's name, with the workload's where there are several."""
    several = len({other.workload for other in passes}) > 1
    return f"{each.name}, {each.workload}" if several else each.name


def bucketed(report: Report) -> list[Case]:
    """The cases whose tensors were measured by size."""
    return [case for case in report.cases if any(bucket.is_timed for bucket in case.buckets)]


def draw_buckets(case: Case, looks: Looks) -> go.Figure:
    """Nanoseconds for each parameter, by the sizes of tensors."""
    rows = [
        (f"{bucket_name(bucket)} ({bucket.tensors:,})", bucket)
        for bucket in case.buckets
        if bucket.is_timed
    ]
    title = "ns for each parameter"
    return draw_dots(
        rows, looks, lambda _, r: r.ns_per_parameter, title, type="log", dtick="D2", tickformat="~g"
    )


# ---- roofline


def roofline_points(report: Report) -> list[tuple[str, Measured]]:
    """What a roofline shows: updates at every size that was measured on the same threads."""
    found: list[tuple[str, Measured]] = [(str(case), case) for case in report.measured]
    for sweep in report.measured_sweeps:
        if sweep.axis == "parameters":
            found += [(str(sweep), point) for point in sweep.points]
    return [(name, each) for name, each in found if each.limits and each.is_timed]


def draw_roofline(report: Report, looks: Looks) -> go.Figure:
    """The rate of every implementation below the limit's, over the bytes of a step."""
    points = sorted(roofline_points(report), key=lambda pair: pair[1].bytes_moved)
    figure = _figure(looks, 420)
    best: dict[int, Limit] = {}
    for _, each in points:
        limit = each.best_limit()
        assert limit is not None
        if each.bytes_moved not in best or limit.gb_per_s > best[each.bytes_moved].gb_per_s:
            best[each.bytes_moved] = limit
    figure.add_scatter(
        name=LIMIT,
        meta=LIMIT,
        x=list(best),
        y=[limit.gb_per_s for limit in best.values()],
        mode="lines",
        line={"color": looks.palette.ink, "width": 1.5},
        hovertemplate="limit: %{y:.3g} GB/s<extra></extra>",
    )
    names = looks.order(r.implementation for _, each in points for r in each.results)
    for name in reversed(names):
        there = [
            (where, each, result)
            for where, each in points
            if (result := each.result(name)) is not None and result.timing is not None
        ]
        figure.add_scatter(
            name=text(name),
            meta=name,
            legendrank=names.index(name),
            x=[each.bytes_moved for _, each, _ in there],
            y=[result.gb_per_s for _, _, result in there],
            mode="markers",
            marker={**_marker(looks, name), "size": 11},
            customdata=[[text(where), _hover(each, result)] for where, each, result in there],
            hovertemplate="%{customdata[0]}<br><b>%{fullData.name}</b>: %{customdata[1]}"
            "<extra></extra>",
        )
    powers = [10**power for power in range(13) if min(best) / 10 < 10**power < max(best) * 10]
    figure.update_xaxes(
        type="log",
        title_text="bytes that a step reads and writes",
        tickvals=powers,
        ticktext=[format_bytes(power) for power in powers],
    )
    figure.update_yaxes(type="log", title_text="GB/s", dtick=1, tickformat="~g")
    return figure


# ---- sweeps


def sweeps_of(report: Report, axis: str) -> list[Sweep]:
    """The sweeps over one axis that have a time."""
    return [sweep for sweep in report.measured_sweeps if sweep.axis == axis]


Scale = Callable[[Measured, float], float]


def ns_per_parameter(measured: Measured, seconds: float) -> float:
    """Nanoseconds for each parameter."""
    return seconds / measured.parameters * 1e9


def gb_per_s(measured: Measured, seconds: float) -> float:
    """The bytes that the rule counts, in 1e9 a second."""
    return measured.bytes_moved / seconds / 1e9


def microseconds(measured: Measured, seconds: float) -> float:
    """Microseconds of a step."""
    return seconds * 1e6


def draw_sweep(
    sweep: Sweep, looks: Looks, value: Scale, x_title: str, y_title: str, by_point: bool
) -> go.Figure:
    """One line for each implementation, its quartiles as a band, and the limit's."""
    figure = _figure(looks, 380)
    limits = [(point, limit.timing) for point in sweep.points if (limit := point.best_limit())]
    _add_line(figure, looks, LIMIT, limits, value)
    for name in looks.order(r.implementation for point in sweep.points for r in point.results):
        timed = [
            (point, result.timing)
            for point in sweep.points
            if (result := point.result(name)) is not None and result.timing is not None
        ]
        _add_line(figure, looks, name, timed, value)
    ticks = {"tickvals": [point.x for point in sweep.points]} if by_point else {"dtick": 1}
    figure.update_xaxes(title_text=x_title, type="log", **ticks)
    if by_point:
        figure.update_yaxes(title_text=y_title, rangemode="tozero")
    else:
        figure.update_yaxes(title_text=y_title, type="log", dtick=1, tickformat="~g")
    return figure


def _add_line(
    figure: go.Figure,
    looks: Looks,
    name: str,
    timed: Sequence[tuple[Point, Timing]],
    value: Scale,
) -> None:
    look = looks.of(name)
    xs = [point.x for point, _ in timed]
    upper = [value(point, timing.upper_quartile) for point, timing in timed]
    lower = [value(point, timing.lower_quartile) for point, timing in timed]
    figure.add_scatter(
        x=[*xs, *reversed(xs)],
        y=[*upper, *reversed(lower)],
        fill="toself",
        fillcolor=_faded(look.color, 0.14),
        line={"width": 0},
        mode="lines",
        hoverinfo="skip",
        legendgroup=name,
    )
    dash = "dot" if name == LIMIT else "solid"
    figure.add_scatter(
        name=text(name),
        meta=name,
        x=xs,
        y=[value(point, timing.median) for point, timing in timed],
        mode="lines" if name == LIMIT else "lines+markers",
        line={"color": look.color, "width": 1.5 if name == LIMIT else 2.5, "dash": dash},
        marker={"color": look.color, "size": 7, "symbol": look.symbol},
        customdata=[
            f"{format_time(timing.median)}, ±{timing.spread / 2:.1%}" for _, timing in timed
        ],
        hovertemplate="<b>%{fullData.name}</b> at %{x:,}: %{y:.3g} (%{customdata})<extra></extra>",
        legendgroup=name,
    )


# ---- the whole step


def draw_training(report: Report, looks: Looks) -> go.Figure:
    """What the phases of a step take, one above the other, in every way."""
    assert report.training is not None
    ways = [way for way in report.training.results if way.total is not None]
    names = [text(way.way).replace(", ", ",<br>") for way in ways]
    palette = looks.palette
    phases = {
        "forward": ([way.forward for way in ways], palette.others[2]),
        "backward": ([way.backward for way in ways], palette.others[1]),
        "update": ([way.step for way in ways], palette.ours[0]),
        "clearing": ([way.zero_grad for way in ways], palette.ours[1]),
    }
    figure = _figure(looks, (ROW + 14) * len(ways) + FRAME, barmode="stack")
    for name, (timings, color) in phases.items():
        if not any(timings):
            continue
        figure.add_bar(
            name=name,
            meta=name,
            orientation="h",
            y=names,
            x=[timing.median * 1e3 if timing else 0.0 for timing in timings],
            marker={"color": color, "line": {"width": 0}},
            customdata=[f"±{timing.spread / 2:.1%}" if timing else "" for timing in timings],
            hovertemplate="%{y}<br><b>%{fullData.name}</b>: %{x:.3g} ms, %{customdata}"
            "<extra></extra>",
        )
    figure.update_xaxes(title_text="ms")
    figure.update_yaxes(autorange="reversed", showgrid=False, tickfont={"color": palette.ink})
    ends = [
        sum(timing.median * 1e3 for timing in way if timing)
        for way in zip(*(timings for timings, _ in phases.values()), strict=True)
    ]
    figure.add_scatter(
        x=ends,
        y=names,
        mode="text",
        text=[f" {_together(way)}" for way in ways],
        textposition="middle right",
        cliponaxis=False,
        hoverinfo="skip",
    )
    figure.update_xaxes(range=[0, 1.18 * max(ends)])
    return figure


def _together(way: TrainingResult) -> str:
    """Milliseconds of all phases, as they were measured together."""
    timings = [timing for timing in (way.forward, way.total) if timing]
    return significant(1e3 * sum(timing.median for timing in timings))


# ---- torch's calls


def draw_parts(report: Report, looks: Looks) -> go.Figure:
    """The calls of torch one after the other, beside flatstep's one."""
    passes = [each for each in report.measured_passes if each.parts]
    greys = looks.palette.others
    figure = _figure(looks, 2 * ROW * len(passes) + FRAME, barmode="stack")
    figure.update_layout(uniformtext={"minsize": 10, "mode": "hide"})
    rows: list[str] = []
    for each in passes:
        label = text(pass_label(each, passes))
        rows += [f"{label}, torch", label]
        timed = [part for part in each.parts if part.timing]
        for place, part in enumerate(timed):
            assert part.timing is not None
            _add_part(figure, rows[-2], part.implementation, part.timing, greys[place % len(greys)])
        ours = each.result(TENSORS)
        if ours is not None and ours.timing is not None:
            _add_part(figure, label, TENSORS, ours.timing, looks.of(TENSORS).color)
    figure.update_xaxes(title_text="ms")
    figure.update_yaxes(
        categoryorder="array",
        categoryarray=rows[::-1],
        showgrid=False,
        tickfont={"color": looks.palette.ink},
    )
    return figure


def _add_part(figure: go.Figure, row: str, name: str, timing: Timing, color: str) -> None:
    figure.add_bar(
        name=text(name),
        orientation="h",
        y=[row],
        x=[timing.median * 1e3],
        text=text(name),
        textposition="inside",
        insidetextanchor="middle",
        constraintext="inside",
        marker={"color": color},
        hovertemplate=f"%{{fullData.name}}: %{{x:.3g}} ms, ±{timing.spread / 2:.1%}<extra></extra>",
    )
