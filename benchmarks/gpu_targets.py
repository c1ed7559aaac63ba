"""Measures on a GPU every figure that flatstep promises there, in one run beside torch.

    python benchmarks/gpu_targets.py [--json FILE]

It needs torch and flatstep and nothing else: machines with a GPU are often bare. Times are medians
of interleaved rounds between CUDA events; the rate that they are held against is that of a copy on
the device, measured in the same run: the clock, the rounds and the copy are those of `flatstep
profile`. The exit code is 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from figure import Figure
from torch.nn import Parameter

import flatstep
from flatstep.profiling.device import Device, device_named
from flatstep.profiling.limit import Copies, bytes_moved
from flatstep.profiling.measure import Race, Stopwatch, on_the_gpu, on_the_host
from flatstep.profiling.workloads import WORKLOADS, Shape

Build = Callable[[list[Parameter]], torch.optim.Optimizer]

ROUNDS = 15

Shapes = Sequence[Shape]
LLAMA, MLP, MANY = (WORKLOADS[name].shapes for name in ("llama-3.2-1b", "mlp", "many"))
FLAT: Shapes = [(1 << 30,)]
ODD: Shapes = [((1 << 28) + 1,)]
EVEN: Shapes = [(1 << 28,)]


def parameters(shapes: Shapes, dtype: torch.dtype, offset: int = 0) -> list[Parameter]:
    """Parameters with gradients, which begin some elements after an aligned address."""
    params = []
    for shape in shapes:
        param = Parameter(torch.empty(shape, dtype=dtype, device="cuda").uniform_(-0.1, 0.1))
        room = torch.empty(param.numel() + offset, dtype=dtype, device="cuda").uniform_(-1, 1)
        param.grad = room[offset:].view(shape)
        params.append(param)
    return params


def launching(run: Callable[[], object], repeats: int) -> float:
    """The seconds of one run on the host, which does not wait for the GPU."""
    torch.cuda.synchronize()
    seconds = on_the_host(run, repeats)
    torch.cuda.synchronize()
    return seconds


def race(
    runs: dict[str, Callable[[], object]], stopwatch: Stopwatch = on_the_gpu, rounds: int = ROUNDS
) -> dict[str, float]:
    """Median seconds of each, in interleaved rounds."""
    contest = Race(runs, stopwatch)
    contest.run(0.0, rounds, lambda done: None)
    return {name: timing.median for name, timing in contest.timings().items()}


def copy_rate(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy on the device."""
    size = 4 << 30
    [seconds] = race({"copy": Copies(size, device).traffic(ADAM_STATES)}).values()
    return bytes_moved(size, ADAM_STATES) / seconds


def steps_of(params: list[Parameter], builds: dict[str, Build]) -> dict[str, Callable[[], object]]:
    return {name: build(params).step for name, build in builds.items()}


ADAM_STATES = 2
ADAM: dict[str, Build] = {
    "flatstep": flatstep.Adam,
    "torch fused": lambda params: torch.optim.Adam(params, fused=True),
}


def large(rate: float) -> list[Figure]:
    figures = []
    for dtype, of_copy, of_torch in ((torch.float32, 0.92, 0.90), (torch.bfloat16, 0.88, 0.80)):
        for name, shapes in (("Llama-3.2-1B", LLAMA), ("one flat tensor, 1 B", FLAT)):
            params = parameters(shapes, dtype)
            size = sum(param.nbytes for param in params)
            found = race(steps_of(params, ADAM))
            label = f"Adam, {str(dtype).removeprefix('torch.')}, {name}"
            share = bytes_moved(size, ADAM_STATES) / found["flatstep"] / rate
            ratio = found["flatstep"] / found["torch fused"]
            figures += [
                Figure(f"{label}: ms", found["flatstep"] * 1e3),
                Figure(f"{label}: torch fused, ms", found["torch fused"] * 1e3),
                Figure(f"{label}: share of the copy's rate", share, of_copy, at_least=True),
                Figure(f"{label}: ÷ torch fused", ratio, of_torch),
            ]
            del params
            torch.cuda.empty_cache()
    return figures


def rmsprop() -> list[Figure]:
    options: dict[str, Any] = {"momentum": 0.9, "centered": True}
    builds: dict[str, Build] = {
        "flatstep": lambda params: flatstep.RMSprop(params, **options),
        "torch": lambda params: torch.optim.RMSprop(params, foreach=True, **options),
    }
    found = race(steps_of(parameters(EVEN, torch.float32), builds))
    what = "RMSprop with momentum, centered, float32: ÷ torch foreach"
    return [Figure(what, found["flatstep"] / found["torch"], 0.40)]


def awkward() -> list[Figure]:
    builds = {"flatstep": ADAM["flatstep"]}
    runs = {
        "aligned": steps_of(parameters(EVEN, torch.float32), builds)["flatstep"],
        "odd": steps_of(parameters(ODD, torch.float32), builds)["flatstep"],
        "offset": steps_of(parameters(EVEN, torch.float32, 1), builds)["flatstep"],
    }
    found = race(runs)
    return [
        Figure("a tensor of odd size ÷ an even one", found["odd"] / found["aligned"], 1.1),
        Figure("gradients 4 bytes off ÷ aligned", found["offset"] / found["aligned"], 1.1),
    ]


def frozen() -> list[Figure]:
    """Rows whose gradient is zero and whose states have been snapped to zero."""
    params = parameters(EVEN, torch.float32)
    opt = flatstep.Adam(params)
    normal = race({"normal": opt.step})["normal"]
    for param in params:
        assert param.grad is not None
        param.grad.zero_()
        for name in ("exp_avg", "exp_avg_sq"):
            opt.state[param][name].fill_(1e-39)
    opt.step()
    snapped = race({"snapped": opt.step})["snapped"]
    return [Figure("zero gradients and snapped states ÷ normal", snapped / normal, 1.1)]


def small() -> list[Figure]:
    many = race(steps_of(parameters(MANY, torch.float32), ADAM), launching, 7)
    mlp = race(steps_of(parameters(MLP, torch.float32), ADAM), launching)
    captured = {
        "flatstep": captured_step(lambda params: flatstep.Adam(params, capturable=True)),
        "torch": captured_step(lambda p: torch.optim.Adam(p, fused=True, capturable=True)),
    }
    graph = race(captured)
    return [
        Figure("10,000 × 256: ÷ torch fused", many["flatstep"] / many["torch fused"], 0.15),
        Figure("MLP, on the host: µs", mlp["flatstep"] * 1e6),
        Figure("MLP, on the host: ÷ torch fused", mlp["flatstep"] / mlp["torch fused"], 0.4),
        Figure("MLP, in a graph: µs", graph["flatstep"] * 1e6),
        Figure("MLP, in a graph: ÷ torch fused", graph["flatstep"] / graph["torch"], 1.0),
    ]


def captured_step(build: Build) -> Callable[[], object]:
    opt = build(parameters(MLP, torch.float32))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            opt.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    return graph.replay


def machine_facts(device: Device) -> dict[str, str | None]:
    """What figures are of."""
    return {
        "gpu": device.title,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "flatstep": flatstep.__version__,
        "system": platform.platform(),
    }


def main() -> int:
    """Measures, prints, and says whether all is met."""
    parser = argparse.ArgumentParser(description="Measures every figure promised on a GPU.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_args()
    try:
        device = device_named("cuda")
    except ValueError as error:
        parser.error(str(error))
    machine = machine_facts(device)
    print(machine)
    rate = copy_rate(device.where)
    figures: list[Figure] = [Figure("a copy on the device: GB/s", rate / 1e9)]
    for measure in (lambda: large(rate), rmsprop, awkward, frozen, small):
        for figure in measure():
            figures.append(figure)
            print(figure.line(), flush=True)
        torch.cuda.empty_cache()
        if options.json:  # what is there when the time runs out
            found = [{**asdict(figure), "met": figure.met} for figure in figures]
            text = json.dumps({"machine": machine, "figures": found}, indent=2)
            options.json.write_text(text + "\n")
    return 0 if all(figure.met for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
