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
from flatstep.subjects import subject
from flatstep.verify.progress import INTERRUPTED, progress_bar

FAILED = 1


def measure_accuracy(
    console: Console,
    optimizer: str | None,
    options: Sequence[str],
    *,
    rules: Sequence[str] | None,
    dtypes: Sequence[str] | None,
    quick: bool,
    output: Path | None,
    picture: Path | None,
) -> int:
    """Measures what is there, and an optimizer that is named; prints and writes what was found.

    Returns:
        The exit code: 1 where flatstep's or a named optimizer raised, 130 after Ctrl-C. What
        another package refuses is said, and no fault of this machine.
    """
    if picture is not None and picture.suffix not in plot.FORMATS:
        raise typer.BadParameter(
            f"a plot's name ends in {', '.join(plot.FORMATS)}; '{picture}' does not"
        )
    if options and optimizer is None:
        raise typer.BadParameter("--with needs --optimizer PACKAGE.MODULE:CLASS")
    one_rule = rules[0] if rules is not None and len(rules) == 1 else None
    try:
        subjects = [] if optimizer is None else [subject(optimizer, options, one_rule)]
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
    failed = [
        run for run in report.failed if run.path.startswith("flatstep:") or run.path == optimizer
    ]
    return FAILED if failed else 0
