"""The picture of a profile: each implementation's share of what this memory can do."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flatstep.profiling.results import Case, Report
from flatstep.profiling.text import format_time, machine_line, short_problem

FORMATS = (".png", ".svg", ".pdf")

TITLE = "Speed of one step, as a share of what this {}'s memory can do"
SUBTITLE = "100 %: {}. Longer is better."
LIMITS = {
    "cpu": "the same memory traffic without arithmetic, on the fastest kind of pages",
    "cuda": "a copy on the GPU that reads and writes as many bytes",
}
COLORS = {
    "flatstep flat": "#0b5394",
    "flatstep": "#4f9bd9",
    "torch fused": "#e69138",
    "torch foreach": "#b7a99a",
    "torch for-loop": "#d5ccc3",
}
NAMED = "#38761d"  # with --against
LIGHT = ("torch foreach", "torch for-loop")
INK, FAINT, RULE, ALARM = "#222222", "#777777", "#cccccc", "#c00000"
SMALL = 7.5  # points
LABEL = 22  # letters
RIGHT = 108  # per cent
BAR, PANEL_WIDTH = 0.21, 2.9  # inches


def draw(report: Report, path: Path) -> None:
    """Draws the bars of every measured case, by workload and optimizer.

    Args:
        report: With at least one measured case.
        path: Ends in one of :data:`FORMATS`.
    """
    cases = report.measured
    rows = list(dict.fromkeys(case.workload for case in cases))
    columns = list(dict.fromkeys((case.optimizer, case.dtype) for case in cases))
    found = {result.implementation for case in cases for result in case.results}
    names = [name for name in COLORS if name in found] + sorted(found - COLORS.keys())
    width = max(1.3 + PANEL_WIDTH * len(columns), 7.5)
    height = 1.1 + BAR * (len(names) + 2.6) * len(rows)
    figure = Figure(figsize=(width, height), dpi=150)
    panels = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=True)
    by_place = {(case.workload, case.optimizer, case.dtype): case for case in cases}
    for row, workload in enumerate(rows):
        for column, (optimizer, dtype) in enumerate(columns):
            case = by_place.get((workload, optimizer, dtype))
            if case is None:
                panels[row, column].set_axis_off()
            else:
                _draw_case(panels[row, column], case, names)
    left = 0.08 / width

    def write(inches: float, text: str, **style: Any) -> None:
        figure.text(left, inches / height, text, **style)

    machine = report.machine
    title = TITLE.format("GPU" if machine.gpu else "machine")
    write(height - 0.35, title, fontsize=12, fontweight="bold", color=INK)
    subtitle = SUBTITLE.format(LIMITS[machine.device])
    write(height - 0.6, subtitle, fontsize=8.5, color=FAINT)
    write(0.08, machine_line(report), fontsize=SMALL, color=FAINT)
    figure.tight_layout(rect=(0, 0.2 / height, 1, 1 - 0.7 / height), h_pad=1.2, w_pad=1.5)
    figure.savefig(path)


def _draw_case(axes: Axes, case: Case, names: list[str]) -> None:
    limit = case.best_limit()
    assert limit is not None
    for place, name in enumerate(names):
        result = case.result(name)
        if result is None:
            absent = "not in torch" if name in COLORS else "follows another rule"
            _note(axes, 1, place, absent, FAINT)
        elif result.timing is None:
            _note(axes, 1, place, short_problem(result.problem), ALARM)
        else:
            share = min(100 * limit.timing.median / result.timing.median, RIGHT)
            axes.barh(place, share, height=0.78, color=COLORS.get(name, NAMED))
            time = format_time(result.timing.median)
            if share > 50:
                _note(axes, share - 1.5, place, time, INK if name in LIGHT else "white", "right")
            else:
                _note(axes, share + 1.5, place, time, INK)
    axes.axvline(100, color=INK, linewidth=1)
    axes.set_title(f"{case.title} × {case.optimizer}, {case.dtype}", loc="left", fontsize=9)
    axes.set_yticks(range(len(names)), [fill(name, LABEL) for name in names], fontsize=8)
    axes.set_xlim(0, RIGHT)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.xaxis.set_major_formatter("{x:.0f} %")
    axes.tick_params(axis="x", labelsize=SMALL, color=RULE, labelcolor=FAINT)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(RULE)


def _note(axes: Axes, x: float, y: float, text: str, color: str, side: str = "left") -> None:
    axes.text(x, y, text, ha=side, va="center", fontsize=SMALL, color=color, in_layout=False)
