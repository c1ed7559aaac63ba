"""The command ``flatstep profile``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from flatstep._torch import DTYPES
from flatstep.profile.implementations import OPTIMIZERS
from flatstep.profile.plot import FORMATS, draw
from flatstep.profile.report import case_table, print_end, training_table
from flatstep.profile.run import OPTIMIZERS_BY_DEFAULT, SECONDS_BY_DEFAULT, plan, run
from flatstep.profile.workloads import WORKLOADS

INTERRUPTED = 130


def profile(
    workload: Annotated[
        list[str] | None,
        typer.Option(help=f"One of {', '.join(WORKLOADS)}; repeatable. [default: all]"),
    ] = None,
    optimizer: Annotated[
        list[str] | None,
        typer.Option(
            help=f"One of {', '.join(OPTIMIZERS)}; repeatable; sgd has momentum 0.9. "
            f"[default: {', '.join(OPTIMIZERS_BY_DEFAULT)}]"
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help=f"One of {', '.join(DTYPES)}. [default: float32, and adam in bfloat16 on the "
            "large workloads]"
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PACKAGE.MODULE:CALLABLE",
            help="Measure the parameters of the model that this callable returns.",
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads. [default: as many as torch uses]")
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Turns of each implementation. [default: what time allows]"),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=1, help="How long it may take, about.")
    ] = SECONDS_BY_DEFAULT,
    slow_paths: Annotated[
        bool,
        typer.Option(help="Measure torch's for-loop and foreach where it has a fused path too."),
    ] = True,
    whole_step: Annotated[
        bool | None,
        typer.Option(
            "--whole-step/--no-whole-step",
            help="Measure backward + step + zero_grad on a real model. "
            "[default: where no workload, optimizer, dtype or model is chosen]",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the bars here, such as bars.png.")
    ] = None,
) -> None:
    """Measure updates against this machine's limit and beside torch's own.

    Each implementation's result is checked before it is timed. Exit codes: 1 where flatstep's was
    wrong, 2 where nothing could be measured.
    """
    for path in (json_file, plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise typer.BadParameter(f"there is no directory {path.parent}")
    if plot is not None and plot.suffix not in FORMATS:
        raise typer.BadParameter(f"a plot's name ends in {', '.join(FORMATS)}; '{plot}' does not")
    try:
        tasks = plan(workload, optimizer, dtype, model)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if whole_step is None:
        whole_step = not (workload or optimizer or dtype or model)
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        speed_estimate_period=60,
        disable=not console.is_terminal,
    ) as progress:
        bar = progress.add_task("", total=1.0)
        report = run(
            tasks,
            threads=threads,
            rounds=rounds,
            seconds=seconds,
            slow_paths=slow_paths,
            whole_step=whole_step,
            on_case=lambda case: console.print(case_table(case)),
            on_training=lambda training: console.print(training_table(training)),
            on_progress=lambda done, label: progress.update(bar, completed=done, description=label),
        )
    print_end(console, report)
    if json_file is not None:
        json_file.write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    if plot is not None and report.measured:
        draw(report, plot)
    if report.failed:
        raise typer.Exit(1)
    if report.interrupted:
        raise typer.Exit(INTERRUPTED)
    if not report.measured and report.training is None:
        raise typer.Exit(2)
