"""The picture of a measurement: how the distances of each implementation are distributed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from flatstep.accuracy.results import Distances, Report, bucket

FORMATS = (".png", ".svg", ".pdf")

# Places of a histogram that share a colour, each from the last one's end to before this.
ENDS = (1, 2, 3, 4, 6, 8, 10)
COLORS = [matplotlib.colormaps["YlGnBu"](0.06 + 0.9 * i / len(ENDS)) for i in range(len(ENDS) + 1)]
INK, FAINT, RULE, ALARM = "#222222", "#777777", "#cccccc", "#c00000"
BAR, PANEL_WIDTH = 0.19, 3.6  # inches


def draw(report: Report, path: Path) -> None:
    """Draws the distances after the last step, by rule and dtype.

    Args:
        report: With at least one run that came to an end.
        path: Ends in one of :data:`FORMATS`.
    """
    runs = report.measured
    rules = list(dict.fromkeys(run.rule for run in runs))
    dtypes = list(dict.fromkeys(run.dtype for run in runs))
    panels = {
        (rule, dtype): {
            run.implementation: found
            for run in runs
            if (run.rule, run.dtype) == (rule, dtype)
            and (found := run.after(report.steps[-1])) is not None
        }
        for rule in rules
        for dtype in dtypes
    }
    most = [max(len(panels[rule, dtype]) for dtype in dtypes) for rule in rules]
    width = max(PANEL_WIDTH * len(dtypes), 7.5)
    height = 1.25 + sum(BAR * n + 0.55 for n in most)
    figure = Figure(figsize=(width, height), dpi=150)
    grid = figure.subplots(len(rules), len(dtypes), squeeze=False, height_ratios=most)
    for row, rule in enumerate(rules):
        for column, dtype in enumerate(dtypes):
            axes = grid[row, column]
            if panels[rule, dtype]:
                _draw_panel(axes, panels[rule, dtype], most[row])
                axes.set_title(f"{rule}, {dtype}", loc="left", fontsize=9, color=INK)
            else:
                axes.set_axis_off()

    def write(inches: float, text: str, **style: Any) -> None:
        figure.text(0.1 / width, inches / height, text, **style)

    steps = report.steps[-1]
    title = f"Distance from the truth after {steps:,} step{'s' if steps > 1 else ''}"
    write(height - 0.32, title, fontsize=12, fontweight="bold", color=INK)
    write(
        height - 0.56,
        "Share of elements, by values of the dtype in between. Lighter is better.",
        fontsize=8.5,
        color=FAINT,
    )
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    write(0.08, f"{versions}; {report.elements:,} elements", fontsize=7.5, color=FAINT)
    figure.legend(
        handles=[Patch(color=color, label=label) for label, color in _legend()],
        loc="upper left",
        bbox_to_anchor=(0, 1 - 0.6 / height),
        ncols=len(COLORS) + 1,
        fontsize=7.5,
        frameon=False,
        handlelength=1,
        handleheight=1,
        columnspacing=1.2,
    )
    figure.tight_layout(rect=(0, 0.22 / height, 1, 1 - 0.85 / height), h_pad=0.8, w_pad=1.2)
    figure.savefig(path)


def _legend() -> list[tuple[str, Any]]:
    names = []
    for start, end in zip((0, *ENDS), (*ENDS, None), strict=True):
        first = bucket(start).partition("–")[0]
        last = "" if end is None else bucket(end - 1).rpartition("–")[2]
        names.append(
            f"{first} and more" if end is None else first if first == last else f"{first}–{last}"
        )
    names[0] = "0: the truth, rounded"
    return [*zip(names, COLORS, strict=True), ("NaN or infinity", ALARM)]


def _draw_panel(axes: Axes, found: dict[str, Distances], places: int) -> None:
    for place, distances in enumerate(found.values()):
        left = 0.0
        for share, color in _shares(distances):
            axes.barh(place, share, left=left, height=0.78, color=color)
            left += share
    axes.set_yticks(range(len(found)), list(found), fontsize=7.5)
    axes.set_xlim(0, 100)
    axes.set_ylim(places - 0.5, -0.5)
    axes.xaxis.set_major_formatter("{x:.0f} %")
    axes.tick_params(axis="x", labelsize=7, color=RULE, labelcolor=FAINT)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.spines[:].set_visible(False)


def _shares(found: Distances) -> list[tuple[float, Any]]:
    starts, ends = (0, *ENDS), (*ENDS, len(found.histogram) + 1)
    counts = [sum(found.histogram[start:end]) for start, end in zip(starts, ends, strict=True)]
    shares = [100 * count / found.elements for count in (*counts, found.not_finite)]
    return [(share, color) for share, color in zip(shares, [*COLORS, ALARM], strict=True) if share]
