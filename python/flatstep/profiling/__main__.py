"""The profile where the command line's libraries are absent: ``python -m flatstep.profiling``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from flatstep.profiling.choices import choose
from flatstep.profiling.device import DEVICES
from flatstep.profiling.run import SECONDS_BY_DEFAULT, run
from flatstep.profiling.text import (
    left_out,
    machine_line,
    plain_case,
    plain_passes,
    plain_sweep,
    problem_lines,
)


def main() -> int:
    """Measures as ``flatstep profile`` does, but for the whole step, and prints plain lines."""
    parser = argparse.ArgumentParser(
        prog="python -m flatstep.profiling",
        description="Measures updates like `flatstep profile`, without the libraries that it needs "
        "for tables and plots; `flatstep profile --load FILE` makes them of what --json keeps.",
    )
    parser.add_argument("--device", default="cpu", help=f"one of {', '.join(DEVICES)}")
    parser.add_argument("--workload", action="append", help="repeatable")
    parser.add_argument("--optimizer", action="append", help="repeatable")
    parser.add_argument("--dtype")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, default=SECONDS_BY_DEFAULT)
    parser.add_argument("--no-slow-paths", dest="slow_paths", action="store_false")
    parser.add_argument("--pass", dest="passes", action="append", metavar="NAME", help="repeatable")
    parser.add_argument("--no-passes", action="store_true")
    parser.add_argument("--sweep", dest="sweeps", action="append", metavar="NAME")
    parser.add_argument("--buckets", action="store_true", help="each size of tensor alone, too")
    parser.add_argument("--against", action="append", metavar="MODULE:CLASS", help="repeatable")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args()
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"there is no directory {options.json.parent}")
    try:
        choices = choose(
            workloads=options.workload,
            optimizers=options.optimizer,
            dtype=options.dtype,
            against=options.against,
            passes=options.passes,
            no_passes=options.no_passes,
            sweeps=options.sweeps,
            device=options.device,
            whole_step=False,
        )
        report = run(
            choices.tasks,
            passes=choices.passes,
            sweeps=choices.sweeps,
            buckets=options.buckets,
            against=choices.against,
            device=options.device,
            rounds=options.rounds,
            seconds=options.seconds,
            slow_paths=options.slow_paths,
            whole_step=False,
            on_case=lambda case: print(plain_case(case), flush=True),
            on_passes=lambda measured: print(plain_passes(measured), flush=True),
            on_sweep=lambda sweep, found: print(plain_sweep(sweep, found), flush=True),
        )
    except ValueError as error:
        parser.error(str(error))
    for line in [
        *problem_lines(report),
        *(f"warning: {warning}" for warning in report.warnings),
        *left_out(report),
    ]:
        print(line)
    print(f"{report.seconds:.0f} s; {machine_line(report)}")
    if options.json is not None:
        options.json.write_text(json.dumps(report.as_dict(), indent=2) + "\n")
    return report.exit_code


if __name__ == "__main__":
    sys.exit(main())
