"""What ``flatstep verify --accuracy`` does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console

from flatstep.accuracy import plot
from flatstep.accuracy.report import show
from flatstep.accuracy.run import STEPS, measure
from flatstep.cli import facts
from flatstep.subjects import Subject
from flatstep.verify.progress import progress_bar

FAILED, INTERRUPTED = 1, 130


def measure_accuracy(
    console: Console,
    *,
    rules: Sequence[str] | None,
    dtypes: Sequence[str] | None,
    subjects: Sequence[Subject],
    quick: bool,
    output: Path | None,
    picture: Path | None,
) -> int:
    """Measures, prints, and writes what was asked for.

    Returns:
        The exit code: 1 where flatstep's or a named optimizer raised, 130 after Ctrl-C. What
        another package refuses is said, and no fault of this machine.
    """
    if picture is not None and picture.suffix not in plot.FORMATS:
        raise typer.BadParameter(
            f"a plot's name ends in {', '.join(plot.FORMATS)}; '{picture}' does not"
        )
    try:
        with progress_bar(console, "the truth") as on_progress:
            report = measure(
                rules, dtypes, subjects, STEPS[:-1] if quick else STEPS, on_progress=on_progress
            )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    show(report, console)
    if output is not None:
        found = {"environment": facts(), **report.to_dict()}
        output.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n")
    if picture is not None and report.measured:
        plot.draw(report, picture)
    if report.interrupted:
        return INTERRUPTED
    judged = {subject.path for subject in subjects}
    failed = [
        run for run in report.failed if run.path in judged or run.path.startswith("flatstep:")
    ]
    return FAILED if failed else 0
