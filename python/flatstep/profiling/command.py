"""The command ``flatstep profile``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from flatstep._torch import DTYPES
from flatstep.profiling.device import DEVICES
from flatstep.profiling.implementations import OPTIMIZERS
from flatstep.profiling.page import render
from flatstep.profiling.passes import ALL, WORKLOAD_BY_DEFAULT, plan_passes
from flatstep.profiling.plot import FORMATS, draw
from flatstep.profiling.report import case_table, pass_table, print_end, training_table
from flatstep.profiling.results import Report
from flatstep.profiling.run import OPTIMIZERS_BY_DEFAULT, SECONDS_BY_DEFAULT, device_for, plan, run
from flatstep.profiling.workloads import WORKLOADS
from flatstep.profiling.works import WORKS


def profile(
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help=f"One of {', '.join(WORKLOADS)}; repeatable. [default: those for the device]"
        ),
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
    device: Annotated[
        str,
        typer.Option(help=f"One of {', '.join(DEVICES)}; cuda is torch's current GPU."),
    ] = "cpu",
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads of the CPU. [default: as many as torch uses]"),
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
            "[default: where no workload, optimizer, dtype, model or GPU is chosen]",
        ),
    ] = None,
    passes: Annotated[
        list[str] | None,
        typer.Option(
            "--pass",
            metavar="NAME",
            help="Measure an option of adamw's step beside the torch calls that it replaces: "
            f"{', '.join(WORKS)}, or {ALL}; repeatable. On the chosen workloads, or "
            f"{WORKLOAD_BY_DEFAULT}; and updates only where an optimizer, a dtype or a model is "
            "chosen too. [default: all, where nothing is chosen and not on a GPU]",
        ),
    ] = None,
    no_passes: Annotated[
        bool,
        typer.Option(
            "--no-passes",
            help="Leave the passes out.",
        ),
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw the bars here, such as bars.png.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write a page of charts and tables here, such as report.html; it needs no other "
            "file and no network.",
        ),
    ] = None,
    load: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Measure nothing: show, and draw, what --json kept, here or elsewhere.",
        ),
    ] = None,
) -> None:
    """Measure updates against this machine's limit and beside torch's own.

    Each implementation's result is checked before it is timed. Exit codes: 1 where flatstep's was
    wrong, 2 where nothing could be measured.
    """
    for path in (json_file, plot, html):
        if path is not None and not path.absolute().parent.is_dir():
            raise typer.BadParameter(f"there is no directory {path.parent}")
    if plot is not None and plot.suffix not in FORMATS:
        raise typer.BadParameter(f"a plot's name ends in {', '.join(FORMATS)}; '{plot}' does not")
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    if load is not None:
        if workload or optimizer or dtype or model or passes:
            raise typer.BadParameter("--load measures nothing: choose nothing to be measured")
        report = kept(load)
        for case in report.cases:
            console.print(case_table(case))
        if report.passes:
            console.print(pass_table(report.passes))
        if report.training is not None:
            console.print(training_table(report.training))
        _finish(console, report, json_file, plot, html)
    if passes and no_passes:
        raise typer.BadParameter("--pass and --no-passes exclude each other: drop one")
    updates = bool(optimizer or dtype or model)
    chosen = bool(workload or updates)
    try:
        tasks = [] if passes and not updates else plan(workload, optimizer, dtype, model, device)
        by_default = device == "cpu" and not chosen and not no_passes
        pass_tasks = plan_passes(passes, workload) if passes or by_default else []
        device_for(device, threads, whole_step, pass_tasks)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    if whole_step is None and device == "cpu":
        whole_step = not (chosen or passes)
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
            passes=pass_tasks,
            device=device,
            threads=threads,
            rounds=rounds,
            seconds=seconds,
            slow_paths=slow_paths,
            whole_step=whole_step,
            on_case=lambda case: console.print(case_table(case)),
            on_passes=lambda measured: console.print(pass_table(measured)),
            on_training=lambda training: console.print(training_table(training)),
            on_progress=lambda done, label: progress.update(bar, completed=done, description=label),
        )
    _finish(console, report, json_file, plot, html)


def kept(path: Path) -> Report:
    """The report that was written to a file."""
    try:
        return Report.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path} cannot be loaded: {error}") from None


def _finish(
    console: Console,
    report: Report,
    json_file: Path | None,
    plot: Path | None,
    html: Path | None,
) -> NoReturn:
    """Says how it ended, keeps and draws it, and leaves."""
    print_end(console, report)
    if json_file is not None:
        json_file.write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    if plot is not None and report.measured:
        draw(report, plot)
    if html is not None:
        html.write_text(render(report), encoding="utf-8")
    raise typer.Exit(report.exit_code)
