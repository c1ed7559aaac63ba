"""Measures every figure that flatstep promises, in one run, and says which ones are met.

    python benchmarks/targets.py [--seconds 400] [--json FILE]

Times are medians of interleaved rounds; the two sides of a ratio come from the same run. The exit
code is 1 where a target is missed.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import Annotated

import torch
import typer
from figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.nn import Parameter

import flatstep
from flatstep import profiling
from flatstep._torch import zeros_flat
from flatstep.profiling.measure import Race
from flatstep.profiling.report import case_table, machine_line, pass_table, training_table

LARGE = ("flat", "gpt2")
# (optimizer, dtype, workloads): at most this share of torch's best time, on tensors and flat
RATIOS = {
    ("adam", "float32", LARGE): (0.88, 0.78),
    ("adamw", "float32", LARGE): (0.88, 0.78),
    ("sgd", "float32", LARGE): (0.92, 0.80),
    ("rmsprop", "float32", LARGE): (0.27, 0.23),
    ("adam", "bfloat16", LARGE): (0.72, 0.64),
    ("adam", "float32", ("many",)): (0.12, 0.05),
    ("adam", "float32", ("mlp",)): (0.30, 0.25),
}
# On GPT-2 small: at most this share of the time of the torch calls that a pass replaces.
PASSES = {
    "norm": 0.45,
    "clip": 0.62,
    "clip-ema": 0.58,
    "scaler-clip": 0.54,
    "scaler": 0.68,
    "bf16-grads": 0.65,
    "split": 0.55,
    "split-bf16-states": 0.45,
}
MOST_BY_CHANCE = 1.10
LEAST_OF_LIMIT = 0.93
LEAST_OF_LIMIT_IN_A_PASS = 0.88
MOST_WHOLE_STEP = 1.0
MOST_FIRST_STEP = 0.5
MOST_SUBNORMAL = 1.5
MOST_MEMORY = 1.01  # the same, to the noise of a process
MOST_DISPLACED = 1.05

ELEMENTS = 1 << 22  # more than the caches hold
SUBNORMAL_STEPS = 64
REPEATS = 3

Build = Callable[[list[Parameter]], torch.optim.Optimizer]
OURS: Build = flatstep.Adam
THEIRS: Build = lambda params: torch.optim.Adam(params, fused=True)  # noqa: E731


def tasks() -> list[profiling.Task]:
    return [
        profiling.Task(profiling.WORKLOADS[name], optimizer, dtype)
        for name in profiling.WORKLOADS
        for (optimizer, dtype, names) in RATIOS
        if name in names
    ]


def profiled(report: profiling.Report) -> Iterator[Figure]:
    """Ratios to torch, shares of the limit, and the whole step."""
    for case in report.measured:
        [target] = [
            target
            for (optimizer, dtype, names), target in RATIOS.items()
            if (optimizer, dtype) == (case.optimizer, case.dtype) and case.workload in names
        ]
        for name, most in zip(("flatstep", "flatstep flat"), target, strict=True):
            result, best = case.result(name), case.torch_best()
            if result is None or result.to_torch is None or best is None:
                continue
            yield Figure(f"{case}: {name} ÷ {best.implementation}", result.to_torch, most)
            if case.workload in LARGE and result.of_limit is not None:
                what = f"{case}: {name}, share of the limit on {result.pages}"
                yield Figure(what, result.of_limit, LEAST_OF_LIMIT, at_least=True)
    for way in report.training.results if report.training else []:
        if way.ours and way.to_torch is not None:
            yield Figure(f"whole step: {way.way} ÷ torch fused", way.to_torch, MOST_WHOLE_STEP)


def passed(report: profiling.Report) -> Iterator[Figure]:
    """Ratios to the torch calls that passes replace, and shares of the limit for their bytes."""
    for measured in report.measured_passes:
        nearest = measured.result("flatstep to nearest")
        for name in ("flatstep", "flatstep flat"):
            result = measured.result(name)
            if result is None or result.to_torch is None:
                continue
            most = PASSES.get(measured.name)
            yield Figure(f"{measured}: {name} ÷ {measured.calls}", result.to_torch, most)
            if result.of_limit is not None:
                least = LEAST_OF_LIMIT_IN_A_PASS
                what = f"{measured}: {name}, share of the limit on {result.pages}"
                yield Figure(what, result.of_limit, least, at_least=True)
        tensors = measured.result("flatstep")
        if nearest and nearest.timing and tensors and tensors.timing:
            ratio = tensors.timing.median / nearest.timing.median
            what = f"{measured}: flatstep ÷ {nearest.implementation}"
            yield Figure(what, ratio, MOST_BY_CHANCE)


def parameters(name: str) -> list[Parameter]:
    params = [Parameter(torch.randn(shape)) for shape in profiling.WORKLOADS[name].shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    return params


def first_step() -> Iterator[Figure]:
    """The step that creates the states, each time in a new optimizer."""
    params = parameters("gpt2")

    def seconds(build: Build) -> float:
        optimizer = build(params)
        # Memory that was in use just before is at hand: neither waits for the system to find it.
        zeros_flat(2 * sum(param.numel() for param in params), torch.float32).zero_()
        start = perf_counter()
        optimizer.step()
        return perf_counter() - start

    ratio = statistics.median(seconds(OURS) / seconds(THEIRS) for _ in range(REPEATS))
    yield Figure("first step, gpt2: flatstep ÷ torch fused", ratio, MOST_FIRST_STEP)


def subnormal() -> Iterator[Figure]:
    """The steps after the states have decayed to subnormals, beside steps in normal numbers."""
    for name, build, target in [("flatstep", OURS, MOST_SUBNORMAL), ("torch fused", THEIRS, None)]:
        param = Parameter(torch.randn(ELEMENTS))
        param.grad = torch.zeros_like(param)
        optimizer = build([param])
        optimizer.step()
        state = optimizer.state[param]

        def seconds(value: float, optimizer=optimizer, state=state) -> float:
            state["exp_avg"].fill_(value)
            state["exp_avg_sq"].fill_(value)
            start = perf_counter()
            for _ in range(SUBNORMAL_STEPS):
                optimizer.step()
            return perf_counter() - start

        ratio = statistics.median(seconds(1e-39) / seconds(1e-3) for _ in range(REPEATS))
        what = f"{SUBNORMAL_STEPS} steps from subnormal states ÷ from normal ones: {name}"
        yield Figure(what, ratio, target)


def displaced() -> Iterator[Figure]:
    """Gradients that begin 4 bytes into a bucket, beside aligned ones."""
    calls = {}
    for offset in (0, 1):
        params = parameters("resnet50")
        bucket = torch.randn(offset + sum(param.numel() for param in params))
        start = offset
        for param in params:
            param.grad = bucket[start : start + param.numel()].view_as(param)
            start += param.numel()
        calls[str(offset)] = OURS(params).step
    race = Race(calls)
    race.run(4, None, lambda done: None)
    times = race.timings()
    ratio = times["1"].median / times["0"].median
    yield Figure("gradients at a 4-byte offset ÷ aligned, resnet50", ratio, MOST_DISPLACED)


PEAK = r"""
import re, sys, torch, flatstep
from flatstep import profiling
kind = sys.argv[1]
shapes = profiling.WORKLOADS["gpt2"].shapes
params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
if kind == "flat":
    flatstep.FlatBuffer(params)
for param in params:
    grad = torch.randn_like(param)
    param.grad = grad if param.grad is None else param.grad.copy_(grad)
build = torch.optim.Adam if kind == "torch" else flatstep.Adam
optimizer = build(params, fused=True)
for _ in range(3):
    optimizer.step()
# Not ru_maxrss, which a child inherits from its parent.
print(re.search(r"VmHWM:\s+(\d+) kB", open("/proc/self/status").read())[1])
"""


def peak_memory() -> Iterator[Figure]:
    """The most memory that a process which builds GPT-2's parameters and steps had resident."""
    peak = {}
    for kind in ("torch", "tensors", "flat"):
        run = [sys.executable, "-c", PEAK, kind]
        peak[kind] = int(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    for kind in ("tensors", "flat"):
        what = f"peak memory, gpt2: flatstep, {kind} ÷ torch fused"
        yield Figure(what, peak[kind] / peak["torch"], MOST_MEMORY)


def main(
    seconds: Annotated[float, typer.Option(help="How long the profile takes, about.")] = 400,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the figures here.")
    ] = None,
) -> None:
    """Measure every figure that flatstep promises, and say which ones are met."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    figures: list[Figure] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=1.0)
        for measure in (first_step, subnormal, displaced, peak_memory):
            progress.update(bar, description=measure.__name__.replace("_", " "))
            figures += measure()
        report = profiling.run(
            tasks(),
            passes=profiling.plan_passes(workloads=["gpt2"]),
            seconds=seconds,
            slow_paths=False,
            on_case=lambda case: console.print(case_table(case)),
            on_passes=lambda measured: console.print(pass_table(measured)),
            on_training=lambda training: console.print(training_table(training)),
            on_progress=lambda done, label: progress.update(bar, completed=done, description=label),
        )
    figures = [*profiled(report), *passed(report), *figures]
    table = Table("figure", "found", "target", "", box=None, header_style="dim")
    for figure in figures:
        table.add_row(*figure.row())
    console.print(table)
    for warning in report.warnings:
        console.print(f"[yellow]warning: {warning}")
    missed = sum(not figure.met for figure in figures)
    console.print(f"{missed} of {len(figures)} missed" if missed else "all met", style="bold")
    console.print(machine_line(report), style="dim")
    if json_file is not None:
        found = [{**asdict(figure), "met": figure.met} for figure in figures]
        json_file.write_text(json.dumps({"figures": found, **report.as_dict()}, indent=2) + "\n")
    if missed or report.failed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
