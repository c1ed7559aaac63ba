"""The command ``flatstep profile``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from flatstep._torch import DTYPES
from flatstep.profiling.choices import Choices, choose
from flatstep.profiling.device import DEVICES
from flatstep.profiling.implementations import OPTIMIZERS
from flatstep.profiling.page import render
from flatstep.profiling.passes import ALL, WORKLOAD_BY_DEFAULT
from flatstep.profiling.plot import FORMATS, draw
from flatstep.profiling.report import (
    case_table,
    pass_table,
    print_end,
    sweep_table,
    training_table,
)
from flatstep.profiling.results import Report
from flatstep.profiling.run import (
    OPTIMIZERS_BY_DEFAULT,
    SECONDS_BY_DEFAULT,
    run,
)
from flatstep.profiling.sweeps import OPTIMIZER_BY_DEFAULT, SWEEPS
from flatstep.profiling.workloads import (
    WORKLOADS,
    Workload,
    workload_of_file,
    workload_of_model,
)
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
            f"[default: {', '.join(OPTIMIZERS_BY_DEFAULT)}, or the rules of --against]"
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
            metavar="MODULE:CALLABLE",
            help="Measure the parameters of the model that this callable returns; "
            "package.module:callable.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help='Measure the shapes of a JSON file: {"name": "mine", "shapes": [[4096, 1024], '
            "[1024]]}; [[4096, 1024], 24] is a shape that occurs 24 times.",
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODULE:CLASS",
            help="Race this optimizer too, wherever its rule is measured; options after commas, "
            "and before it the rule that its name does not say, as in "
            "adam=mine:Fast,lr=1e-3; repeatable.",
        ),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help=f"Measure one update at growing {', '.join(SWEEPS)}, or {ALL}; repeatable. Of the "
            f"chosen optimizers, or {OPTIMIZER_BY_DEFAULT}; and the updates only where a workload, "
            "a model or a config is chosen too.",
        ),
    ] = None,
    buckets: Annotated[
        bool,
        typer.Option(
            "--buckets", help="Measure each case over its tensors of each size alone, too."
        ),
    ] = False,
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
            "file and no network. Measures all sweeps too, where nothing is chosen.",
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
    console = Console()
    if not console.is_terminal:
        console = Console(width=110)
    with _bad_parameters():
        outputs = Outputs(json_file, plot, html)
        if load is not None:
            if workload or optimizer or dtype or model or config or against or sweep or passes:
                raise ValueError("--load measures nothing: choose nothing to be measured")
            report = kept(load)
        else:
            choices = choose(
                workloads=_workloads(workload, model, config),
                optimizers=optimizer,
                dtype=dtype,
                against=against,
                passes=passes,
                no_passes=no_passes,
                sweeps=sweep,
                sweeps_by_default=html is not None,
                device=device,
                threads=threads,
                whole_step=whole_step,
            )
    if load is not None:
        _show(console, report)
    else:
        report = _measure(console, choices, rounds, seconds, slow_paths, buckets)
    print_end(console, report)
    outputs.write(report)
    raise typer.Exit(report.exit_code)


@dataclass(frozen=True)
class Outputs:
    """Where the figures go beside the terminal; the places are looked at before anything is run."""

    json_file: Path | None
    plot: Path | None
    html: Path | None

    def __post_init__(self) -> None:
        for path in (self.json_file, self.plot, self.html):
            if path is not None and not path.absolute().parent.is_dir():
                raise ValueError(f"there is no directory {path.parent}")
        if self.plot is not None and self.plot.suffix not in FORMATS:
            raise ValueError(f"a plot's name ends in {', '.join(FORMATS)}; '{self.plot}' does not")

    def write(self, report: Report) -> None:
        """Keeps and draws a report."""
        if self.json_file is not None:
            self.json_file.write_text(json.dumps(report.as_dict(), indent=2) + "\n")
        if self.plot is not None and report.measured:
            draw(report, self.plot)
        if self.html is not None:
            self.html.write_text(render(report), encoding="utf-8")


@contextmanager
def _bad_parameters() -> Iterator[None]:
    """Makes what is wrong with the options a message of the command line's."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _workloads(
    names: list[str] | None, model: str | None, config: Path | None
) -> list[str | Workload] | None:
    """The workloads that were chosen in one way or another."""
    found: list[str | Workload] = [*(names or [])]
    if model is not None:
        found.append(workload_of_model(model))
    if config is not None:
        found.append(workload_of_file(config))
    return found or None


def _measure(
    console: Console,
    choices: Choices,
    rounds: int | None,
    seconds: float,
    slow_paths: bool,
    buckets: bool,
) -> Report:
    """Measures, and prints each table when it is there."""
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
        return run(
            choices.tasks,
            passes=choices.passes,
            sweeps=choices.sweeps,
            buckets=buckets,
            against=choices.against,
            device=choices.device,
            threads=choices.threads,
            rounds=rounds,
            seconds=seconds,
            slow_paths=slow_paths,
            whole_step=choices.whole_step,
            on_case=lambda case: console.print(case_table(case)),
            on_passes=lambda measured: console.print(pass_table(measured)),
            on_training=lambda training: console.print(training_table(training)),
            on_sweep=lambda sweep, found: console.print(sweep_table(sweep, found)),
            on_progress=lambda done, label: progress.update(bar, completed=done, description=label),
        )


def kept(path: Path) -> Report:
    """The report that was written to a file."""
    try:
        return Report.from_dict(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path} cannot be loaded: {error}") from None


def _show(console: Console, report: Report) -> None:
    """Prints the tables of a report, in the order in which they are measured."""
    for case in report.cases:
        console.print(case_table(case))
    if report.passes:
        console.print(pass_table(report.passes))
    if report.training is not None:
        console.print(training_table(report.training))
    for sweep in report.sweeps:
        console.print(sweep_table(sweep, report.overheads_of(sweep)))
