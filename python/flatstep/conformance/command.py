"""``flatstep verify --optimizer``: the cases, on the command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console

from flatstep.cli import facts
from flatstep.conformance import report, runner
from flatstep.verify.progress import INTERRUPTED, progress_bar


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
    cases_to_run = "1 case" if len(plan.rows) == 1 else f"{len(plan.rows)} cases"
    console.print(
        f"{plan.subject.label}: {cases_to_run}, against {plan.subject.rule}", markup=False
    )
    try:
        with progress_bar(console, plan.subject.rule) as on_progress:
            found = runner.run(plan, jobs=jobs, on_progress=on_progress)
    except RuntimeError as error:
        console.print(str(error), style="red", markup=False)
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
