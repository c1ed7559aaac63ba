"""``flatstep verify --optimizer``: the cases, on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from flatstep.cli import facts
from flatstep.conformance import report, runner
from flatstep.conformance.results import Result
from flatstep.verify.progress import INTERRUPTED


def conform(
    console: Console,
    optimizer: str,
    options: Sequence[str],
    rules: Sequence[str],
    *,
    cases: Sequence[str],
    dtypes: Sequence[str],
    sizes: Sequence[int],
    jobs: int | None,
    timeout: float | None,
    output: Path | None,
    junit: Path | None,
) -> int:
    """Holds an optimizer against its rule, and shows what was found.

    Returns:
        The exit code.

    Raises:
        typer.BadParameter: Something is asked for that does not exist.
    """
    if len(rules) > 1:
        raise typer.BadParameter("an optimizer follows one rule: give --rule once")
    try:
        plan = runner.plan(
            optimizer,
            options,
            rules[0] if rules else None,
            cases=cases,
            dtypes=dtypes,
            sizes=sizes,
            timeout=runner.TIMEOUT if timeout is None else timeout,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    console.print(f"{plan.subject.label}: {len(plan.rows)} cases, against {plan.subject.rule}")
    try:
        with _progress(console) as on_progress:
            found = runner.run(plan, jobs=jobs, on_progress=on_progress)
    except RuntimeError as error:
        console.print(f"[red]{error}[/]")
        console.print(f"Import {optimizer} alone, and mend what that says.", markup=False)
        return 1
    report.show(found, console)
    if output:
        text = json.dumps({"environment": facts(), **found.to_dict()}, indent=2)
        output.write_text(text + "\n")
    if junit:
        report.write_junit(found, junit)
    if found.interrupted:
        return INTERRUPTED
    return 0 if found.ok else 1


@contextmanager
def _progress(console: Console) -> Iterator[runner.OnProgress]:
    """A bar with the time left, on a terminal only."""
    with Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task: TaskID = progress.add_task("starting", total=None)

        def on_progress(done: int, total: int, result: Result) -> None:
            progress.update(task, completed=done, total=total, description=result.name)

        yield on_progress
