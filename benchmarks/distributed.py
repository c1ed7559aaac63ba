"""Measures an update of shards: FSDP2 with flatstep.AdamW beside torch's AdamW, on each rank.

    python benchmarks/distributed.py [--ranks 2] [--layers 12] [--device cuda] [--json FILE]

The model is GPT-2 small, sharded by ``fully_shard`` over as many processes, on gloo on the CPU and
on NCCL with ``--device cuda`` (a GPU for each rank). Times are medians of interleaved rounds; all
ranks begin a timed call together, and the slowest one counts. The exit code is 1 where the target
for many small tensors is missed.
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from enum import Enum
from multiprocessing.queues import Queue
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import typer
from figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

import flatstep
from flatstep.profiling.training import SmallGPT

MOST_PER_TENSOR = 0.3  # of torch's foreach, on small DTensors
SMALL = 64  # elements of a small tensor
LENGTH = 64  # tokens of a batch

OURS, OURS_CLIPPED = "flatstep", "flatstep, clipped"
FOREACH, FUSED, FOREACH_CLIPPED = "torch foreach", "torch fused", "torch foreach, clipped"

Optimizer = torch.optim.Optimizer
Params = list[nn.Parameter]


class Device(str, Enum):
    cpu = "cpu"
    cuda = "cuda"


@dataclass(frozen=True)
class Setting:
    """What is measured, as told to every rank."""

    device: str
    ranks: int
    layers: int
    vocabulary: int
    tensors: int
    rounds: int


@dataclass(frozen=True)
class Contender:
    """A way to update."""

    make: Callable[[Params], Optimizer]
    clips_before: bool = False

    def step(self, params: Params, optimizer: Optimizer) -> None:
        if self.clips_before:
            nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()


CONTENDERS: dict[str, Contender] = {
    OURS: Contender(lambda params: flatstep.AdamW(params)),
    FUSED: Contender(lambda params: torch.optim.AdamW(params, fused=True)),
    FOREACH: Contender(lambda params: torch.optim.AdamW(params, foreach=True)),
    OURS_CLIPPED: Contender(lambda params: flatstep.AdamW(params, max_grad_norm=1.0)),
    FOREACH_CLIPPED: Contender(lambda params: torch.optim.AdamW(params, foreach=True), True),
}
WHOLE_STEPS = (OURS, FUSED, FOREACH)
MANY = (OURS, FOREACH, OURS_CLIPPED, FOREACH_CLIPPED)


class Rank:
    """One process's part: its mesh, and the clock that all ranks share."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.mesh: DeviceMesh = init_device_mesh(setting.device, (setting.ranks,))

    def wait(self) -> None:
        if self.setting.device == "cuda":
            torch.cuda.synchronize()

    def race(self, calls: dict[str, Callable[[], object]]) -> dict[str, float]:
        """The median seconds of each call; of a round, those of the slowest rank."""
        times: dict[str, list[float]] = {name: [] for name in calls}
        shuffled = random.Random(0)
        for call in calls.values():
            call()
        gc.collect()
        gc.disable()
        for _ in range(self.setting.rounds):
            for name in shuffled.sample(list(calls), len(calls)):
                dist.barrier()
                self.wait()
                start = perf_counter()
                calls[name]()
                self.wait()
                times[name].append(perf_counter() - start)
        gc.enable()
        names = list(calls)
        slowest = torch.tensor([times[name] for name in names], device=self.setting.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return {name: statistics.median(slowest[i].tolist()) for i, name in enumerate(names)}

    def model(self) -> SmallGPT:
        with torch.device("meta"):
            model = SmallGPT(768, self.setting.layers, self.setting.vocabulary, 1024)
        for block in model.blocks:
            fully_shard(block, mesh=self.mesh)
        fully_shard(model, mesh=self.mesh)
        model.to_empty(device=self.setting.device)
        for param in model.parameters():
            param.detach().to_local().normal_(std=0.02)
        return model

    def tokens(self) -> Tensor:
        generator = torch.Generator().manual_seed(dist.get_rank())
        return torch.randint(self.setting.vocabulary, (1, LENGTH), generator=generator).to(
            self.setting.device
        )

    def update(self) -> dict[str, float]:
        """An update of the sharded model, whose gradients are there."""
        calls: dict[str, Callable[[], object]] = {}
        for name, contender in CONTENDERS.items():
            model = self.model()
            model(self.tokens()).backward()
            params = list(model.parameters())
            calls[name] = _step(contender, params)
        return self.race(calls)

    def many(self) -> dict[str, float]:
        """An update of many small tensors."""
        calls: dict[str, Callable[[], object]] = {}
        for name in MANY:
            params = []
            for _ in range(self.setting.tensors):
                value = torch.randn(SMALL, device=self.setting.device)
                params.append(nn.Parameter(distribute_tensor(value, self.mesh, [Shard(0)])))
                params[-1].grad = distribute_tensor(value, self.mesh, [Shard(0)])
            calls[name] = _step(CONTENDERS[name], params)
        return self.race(calls)

    def whole(self) -> dict[str, float]:
        """Forward, backward, step and zero_grad of the sharded model."""
        calls: dict[str, Callable[[], object]] = {}
        tokens = self.tokens()
        for name in WHOLE_STEPS:
            model = self.model()
            optimizer = CONTENDERS[name].make(list(model.parameters()))

            def iterate(model: nn.Module = model, optimizer: Optimizer = optimizer) -> None:
                model(tokens).backward()
                optimizer.step()
                optimizer.zero_grad()

            calls[name] = iterate
        return self.race(calls)

    def memory(self, name: str) -> dict[str, float]:
        """The most bytes that this process had, with one way alone, after three iterations."""
        model, tokens = self.model(), self.tokens()
        optimizer = CONTENDERS[name].make(list(model.parameters()))
        for _ in range(3):
            model(tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if self.setting.device == "cuda":
            peak = torch.cuda.max_memory_allocated()
        most = torch.tensor([float(peak)], device=self.setting.device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return {name: most.item()}


def _step(contender: Contender, params: Params) -> Callable[[], object]:
    optimizer = contender.make(params)
    return lambda: contender.step(params, optimizer)


def work(
    rank: int, setting: Setting, store: str, what: str, arguments: list[str], answer: Queue[Any]
) -> None:
    """A process of the benchmark: joins the others, measures, and rank 0 answers."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // setting.ranks))
    if setting.device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if setting.device == "cuda" else "gloo",
        store=dist.FileStore(store, setting.ranks),
        rank=rank,
        world_size=setting.ranks,
        timeout=timedelta(minutes=5),
    )
    try:
        found = getattr(Rank(setting), what)(*arguments)
        if rank == 0:
            answer.put(found)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def measure(setting: Setting, what: str, *arguments: str) -> dict[str, float]:
    """Runs one measurement in processes of its own, none of which outlives it."""
    answer = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        mp.spawn(
            work,
            (setting, store, what, list(arguments), answer),
            nprocs=setting.ranks,
            daemon=True,
        )
        found: dict[str, float] = answer.get()
    return found


def figures(found: dict[str, dict[str, float]], setting: Setting) -> list[Figure]:
    """The ratios, each of two times of one race."""
    update, many, whole, memory = (found[name] for name in ("update", "many", "whole", "memory"))
    of = f"{setting.tensors} small DTensors"
    return [
        Figure(f"update: flatstep ÷ {FUSED}", update[OURS] / update[FUSED]),
        Figure(f"update: flatstep ÷ {FOREACH}", update[OURS] / update[FOREACH]),
        Figure("update, clipped: flatstep ÷ torch", update[OURS_CLIPPED] / update[FOREACH_CLIPPED]),
        Figure(f"{of}: flatstep ÷ {FOREACH}", many[OURS] / many[FOREACH], MOST_PER_TENSOR),
        Figure(
            f"{of}, clipped: flatstep ÷ torch",
            many[OURS_CLIPPED] / many[FOREACH_CLIPPED],
            MOST_PER_TENSOR,
        ),
        Figure(f"whole step: flatstep ÷ {FUSED}", whole[OURS] / whole[FUSED]),
        Figure(f"peak memory: flatstep ÷ {FUSED}", memory[OURS] / memory[FUSED]),
    ]


def main(
    ranks: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    layers: Annotated[int, typer.Option(min=1, help="Of the model; GPT-2 small has 12.")] = 12,
    vocabulary: Annotated[int, typer.Option(min=1, help="Of the model, likewise 50257.")] = 50257,
    tensors: Annotated[int, typer.Option(min=1, help="Small tensors, each on its own.")] = 1000,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contender.")] = 15,
    device: Annotated[Device, typer.Option(help="With cuda, a GPU for each rank.")] = Device.cpu,
    save: Annotated[Path | None, typer.Option("--json", help="Keeps everything here.")] = None,
) -> None:
    """Measures an update of shards beside torch's, and says whether its target is met."""
    if device is Device.cuda and torch.cuda.device_count() < ranks:
        raise typer.BadParameter(
            f"{ranks} ranks need as many GPUs; there are {torch.cuda.device_count()}",
            param_hint="--device",
        )
    if save is not None and not save.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {save.parent}", param_hint="--json")
    setting = Setting(device.value, ranks, layers, vocabulary, tensors, rounds)
    console = Console()
    found: dict[str, dict[str, float]] = {"memory": {}}
    with console.status("measuring"):
        for what in ("update", "many", "whole"):
            found[what] = measure(setting, what)
        for name in (OURS, FUSED):
            found["memory"] |= measure(setting, "memory", name)
    table = Table(
        title=f"FSDP2, {ranks} ranks on {device.value}, GPT-2 with {layers} layers, AdamW"
    )
    for column in ("", "update ms", f"{tensors} tensors, µs each", "whole step ms", "peak MB"):
        table.add_column(column, justify="left" if not column else "right")
    for name in CONTENDERS:
        table.add_row(
            name,
            _cell(found["update"].get(name), 1e3),
            _cell(found["many"].get(name), 1e6 / tensors),
            _cell(found["whole"].get(name), 1e3),
            _cell(found["memory"].get(name), 1e-6, "{:.0f}"),
        )
    console.print(table)
    all_figures = figures(found, setting)
    ratios = Table("", "found", "target", "")
    for figure in all_figures:
        ratios.add_row(*figure.row())
    console.print(ratios)
    if save is not None:
        everything = {
            "torch": torch.__version__,
            "setting": asdict(setting),
            "seconds and bytes": found,
            "figures": [asdict(figure) for figure in all_figures],
        }
        save.write_text(json.dumps(everything, indent=1) + "\n")
    sys.exit(not all(figure.met for figure in all_figures))


def _cell(value: float | None, scale: float, form: str = "{:.2f}") -> str:
    return "" if value is None else form.format(value * scale)


if __name__ == "__main__":
    typer.run(main)
