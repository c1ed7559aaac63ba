"""The command ``flatstep verify``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import flatstep
from flatstep import subjects
from flatstep.accuracy.command import measure_accuracy
from flatstep.cli import facts
from flatstep.verify import cases, runner
from flatstep.verify.progress import progress_bar
from flatstep.verify.report import show
from flatstep.verify.results import Report

INTERRUPTED = 130  # the shell's code for Ctrl-C


def _only(what: str, metavar: str) -> Any:
    return typer.Option(help=f"Only {what}; repeatable.", metavar=metavar)


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
            help="Instead: how far every implementation here, torch's too, is from the float64 "
            "truth after 1, 20 and 1000 steps.",
        ),
    ] = False,
    optimizer: Annotated[
        list[str] | None,
        typer.Option(
            help="With --accuracy: measure this class too; repeatable.",
            metavar="PACKAGE.MODULE:CLASS",
        ),
    ] = None,
    with_: Annotated[
        list[str] | None,
        typer.Option(
            "--with", help="An option of the named optimizers; repeatable.", metavar="NAME=VALUE"
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="With --accuracy: draw the distances here.", metavar="FILE"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--json", help="Write the report here.", metavar="FILE")
    ] = None,
) -> None:
    """Prove on this machine that every kernel has the bits of the NumPy reference.

    Every rule, variant, dtype, instruction set, number of threads and size, with zeros,
    subnormals, infinities and NaN, at addresses that are not aligned. Where anything differs, it
    says where and how to see it again. Exit codes: 1 where anything differed, 130 after Ctrl-C.
    """
    console = Console(highlight=False)
    for path in (output, plot):
        if path is not None and not path.absolute().parent.is_dir():
            raise typer.BadParameter(f"there is no directory {path.parent}")
    if accuracy:
        unused = {"variant": variant, "isa": isa, "threads": threads, "size": size, "setup": setup}
        for name, given in unused.items():
            if given:
                raise typer.BadParameter(f"--{name} does not go with --accuracy: drop one of them")
        one_rule = rule[0] if rule is not None and len(rule) == 1 else None
        try:
            named = [subjects.subject(path, with_ or (), one_rule) for path in optimizer or ()]
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        raise typer.Exit(
            measure_accuracy(
                console,
                rules=rule,
                dtypes=dtype,
                subjects=named,
                quick=quick,
                output=output,
                picture=plot,
            )
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
