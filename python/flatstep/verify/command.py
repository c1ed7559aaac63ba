"""The command ``flatstep verify``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import flatstep
from flatstep.accuracy.command import measure_accuracy
from flatstep.cli import facts
from flatstep.conformance.command import conform
from flatstep.conformance.report import list_cases as show_cases
from flatstep.verify import cases, runner
from flatstep.verify.progress import INTERRUPTED, progress_bar
from flatstep.verify.report import show
from flatstep.verify.results import Report


def _only(what: str, metavar: str) -> Any:
    return typer.Option(help=f"Only {what}; repeatable.", metavar=metavar)


def _of_optimizers(
    text: str, metavar: str | None, name: str | None = None, least: int | None = None
) -> Any:
    names = () if name is None else (name,)
    panel = "Any optimizer class"
    return typer.Option(*names, help=text, metavar=metavar, min=least, rich_help_panel=panel)


def _refuse(given: Mapping[str, object], why: str) -> None:
    """Raises for the first option that is given and does not belong here."""
    for name, value in given.items():
        if value:
            raise typer.BadParameter(f"{name} {why}")


def verify(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes: under a minute.")] = False,
    rule: Annotated[list[str] | None, _only("this rule", "NAME")] = None,
    variant: Annotated[
        list[str] | None, _only("these flags, as in amsgrad+l2, or plain", "FLAGS")
    ] = None,
    dtype: Annotated[list[str] | None, _only("this dtype", "NAME")] = None,
    isa: Annotated[list[str] | None, _only("this instruction set", "NAME")] = None,
    threads: Annotated[list[int] | None, _only("this many threads", "N")] = None,
    size: Annotated[list[int] | None, _only("this many elements", "N")] = None,
    setup: Annotated[
        list[int] | None,
        _only(f"this set of hyper-parameters, 0 to {len(cases.SETUPS) - 1}", "N"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random values.", metavar="N")] = 0,
    torch: Annotated[
        bool, typer.Option("--torch/--no-torch", help="Measure the distance to torch.optim too.")
    ] = True,
    accuracy: Annotated[
        bool,
        typer.Option(
            "--accuracy",
            help="Measure how far each implementation here is from the float64 truth after 1, 20 "
            "and 1000 steps.",
        ),
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="With --accuracy: draw the distances here.", metavar="FILE"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--json", help="Write the report here.", metavar="FILE")
    ] = None,
    optimizer: Annotated[
        str | None,
        _of_optimizers("Verify this class instead, ours or not.", "PACKAGE.MODULE:CLASS"),
    ] = None,
    options: Annotated[
        list[str] | None, _of_optimizers("Build it with this; repeatable.", "NAME=VALUE", "--with")
    ] = None,
    case: Annotated[list[str] | None, _of_optimizers("Only this case; repeatable.", "NAME")] = None,
    jobs: Annotated[
        int | None, _of_optimizers("How many cases at a time; one for each core.", "N", least=1)
    ] = None,
    timeout: Annotated[
        float | None, _of_optimizers("Seconds for one case; a minute.", "SECONDS")
    ] = None,
    junit: Annotated[
        Path | None, _of_optimizers("Write the results as JUnit's XML here.", "FILE")
    ] = None,
    list_cases: Annotated[
        bool, _of_optimizers("List the cases and what they check.", None, "--list-cases")
    ] = False,
) -> None:
    """Prove on this machine that every kernel has the bits of the NumPy reference.

    Every rule, variant, dtype, instruction set, number of threads and size, with zeros,
    subnormals, infinities and NaN, at addresses that are not aligned. Where anything differs, it
    says where and how to see it again. Exit codes: 1 where anything differed, 130 after Ctrl-C.

    With `--optimizer`, hold any class with torch.optim's interface against its rule: `--rule` says
    which one where the name of the class does not, `--dtype` and `--size` narrow the cases.

    With `--accuracy`, measure how far this class, flatstep, torch and others are from the truth.
    """
    console = Console(highlight=False)
    for path in (output, junit, plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise typer.BadParameter(f"there is no directory {path.parent}")
    if list_cases:
        show_cases(console)
        raise typer.Exit
    if accuracy:
        _refuse(
            {
                "--variant": variant,
                "--isa": isa,
                "--threads": threads,
                "--size": size,
                "--setup": setup,
                "--seed": seed,
                "--no-torch": not torch,
                "--case": case,
                "--jobs": jobs,
                "--timeout": timeout,
                "--junit": junit,
            },
            "does not go with --accuracy: leave one of them out",
        )
        code = measure_accuracy(
            console,
            optimizer,
            options or [],
            rules=rule,
            dtypes=dtype,
            quick=quick,
            output=output,
            picture=plot,
        )
        raise typer.Exit(code)
    _refuse({"--plot": plot}, "needs --accuracy")
    if optimizer is not None:
        _refuse(
            {
                "--quick": quick,
                "--variant": variant,
                "--isa": isa,
                "--threads": threads,
                "--setup": setup,
                "--seed": seed,
                "--no-torch": not torch,
            },
            "is for flatstep's kernels: leave it out, or --optimizer",
        )
        code = conform(
            console,
            optimizer,
            options or [],
            rule or [],
            cases=case or [],
            dtypes=dtype or [],
            sizes=size or [],
            jobs=jobs,
            timeout=timeout,
            output=output,
            junit=junit,
        )
        raise typer.Exit(code)
    _refuse(
        {
            "--with": options,
            "--case": case,
            "--jobs": jobs,
            "--timeout": timeout,
            "--junit": junit,
        },
        "needs --optimizer PACKAGE.MODULE:CLASS",
    )
    try:
        selection = cases.select(
            quick=quick,
            rules=rule,
            variants=variant,
            dtypes=dtype,
            isas=isa,
            threads=threads,
            sizes=size,
            setups=setup,
            seed=seed,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    report = runner.start(selection)
    try:
        console.print(
            f"flatstep {flatstep.__version__}: {report.planned:,} cases on "
            f"{', '.join(report.isas)}; threads {', '.join(map(str, report.threads))}; "
            f"seed {seed}",
        )
        with progress_bar(console, "the reference") as on_progress:
            runner.compare(selection, report, on_progress)
        if torch:
            with progress_bar(console, "torch.optim") as on_progress:
                runner.measure(selection, report, on_progress)
    except KeyboardInterrupt:
        report.interrupted = True
    show(report, console)
    if output:
        found = {"environment": facts(), **report.to_dict()}
        output.write_text(json.dumps(found, indent=2, allow_nan=False) + "\n")
    raise typer.Exit(_exit_code(report))


def _exit_code(report: Report) -> int:
    if report.interrupted:
        return INTERRUPTED
    return 0 if report.ok else 1
