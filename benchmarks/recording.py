"""Measures what ``with flatstep.profile(opt)`` adds to a step.

    python benchmarks/recording.py [--rounds N]

Recorded and plain steps take turns on one thread. The promise is less than 1 µs and 1 % of the
step; the exit code is 1 where more is added.
"""

from __future__ import annotations

import sys
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import flatstep

STEPS = 100  # of one turn
PROMISED_SECONDS, PROMISED_SHARE = 1e-6, 0.01
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "2 tensors of 16": (2, 16, {}),
    "2 tensors of 16, clipped": (2, 16, {"max_grad_norm": 1.0}),
    "148 tensors of 256": (148, 256, {}),
    "148 tensors of 256, clipped": (148, 256, {"max_grad_norm": 1.0}),
    "2000 tensors of 256": (2000, 256, {}),
}


def turn(optimizer: torch.optim.Optimizer) -> float:
    """The median seconds of a step."""
    times = []
    for _ in range(STEPS):
        begin = perf_counter()
        optimizer.step()
        times.append(perf_counter() - begin)
    return median(times)


def measure(count: int, size: int, options: dict[str, Any], rounds: int) -> tuple[float, float]:
    """Seconds of a plain step, and those that a recorded one takes more."""
    params = [torch.nn.Parameter(torch.zeros(size)) for _ in range(count)]
    for param in params:
        param.grad = torch.ones(size)
    optimizer = flatstep.AdamW(params, **options)
    optimizer.step()
    recording = flatstep.profile(optimizer)
    plain, added = [], []
    for _ in range(rounds):
        before = turn(optimizer)
        with recording:
            recorded = turn(optimizer)
        after = turn(optimizer)
        plain += [before, after]
        added.append(recorded - (before + after) / 2)
    return median(plain), median(added)


def main(rounds: Annotated[int, typer.Option(min=1, help="of each case")] = 30) -> None:
    torch.set_num_threads(1)
    table = Table("AdamW, one thread", "step, µs", "added, µs", "promised, µs", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    missed = False
    for name, (count, size, options) in CASES.items():
        plain, added = measure(count, size, options, rounds)
        promised = PROMISED_SECONDS + PROMISED_SHARE * plain
        missed |= added > promised
        figures = [f"{1e6 * seconds:.2f}" for seconds in (plain, added, promised)]
        table.add_row(name, *figures, style="red" if added > promised else "")
    Console().print(table)
    sys.exit(missed)


if __name__ == "__main__":
    typer.run(main)
