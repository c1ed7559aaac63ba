"""Train a small GPT sharded over two processes by FSDP2, save it, and go on from the checkpoint.

The processes talk over gloo on the CPU; there is no port to choose and nothing is downloaded. Both
ways of training see the same batches: one process with the whole model, and two with a shard each.

    pip install -c constraints.txt '.[test]'
    python examples/fsdp2.py
    python examples/fsdp2.py --ranks 3 --steps 60
    torchrun --nproc-per-node 2 examples/fsdp2.py
    torchrun --nproc-per-node 2 examples/fsdp2.py --device cuda

What differs from training in one process is marked with "sharded"; the optimizer is the same.
More: docs/distributed.md.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import flatstep
from flatstep.profiling.training import SmallGPT

VOCABULARY, LENGTH, BATCH = 64, 32, 12
OPTIONS = {
    "lr": 3e-3,
    "master": "split",
    "state_dtype": torch.float32,
    "max_grad_norm": 1.0,  # of all shards
}


def batch(step: int) -> Tensor:
    """Sequences that count up, each by a step of its own."""
    generator = torch.Generator().manual_seed(step)
    start, stride = torch.randint(1, 8, (2, BATCH, 1), generator=generator)
    return (start + stride * torch.arange(LENGTH)) % VOCABULARY


def build() -> nn.Module:
    """The same weights on every rank."""
    torch.manual_seed(0)
    return SmallGPT(width=48, depth=2, vocabulary=VOCABULARY, length=LENGTH).bfloat16()


def shard(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Every block is gathered for its own forward and backward only."""
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(
    model: nn.Module, opt: torch.optim.Optimizer, steps: range, rank: int = 0, ranks: int = 1
) -> list[float]:
    """The losses over the whole batches, of which each rank has a part."""
    device = next(model.parameters()).device
    losses = []
    for step in steps:
        loss = model(batch(step).chunk(ranks)[rank].to(device))
        loss.backward()
        opt.step()
        opt.zero_grad()
        total = loss.detach().float()
        if ranks > 1:
            dist.all_reduce(total)  # sharded
        losses.append(float(total) / ranks)
    return losses


def train_sharded(rank: int, ranks: int, steps: int, device: str, folder: Path) -> list[float]:
    """Half of the steps, a checkpoint, and the other half in a new model and optimizer."""
    mesh = init_device_mesh(device, (ranks,))
    losses: list[float] = []
    for part in (range(steps // 2), range(steps // 2, steps)):
        model = shard(build().to(device), mesh)
        opt = flatstep.AdamW(model.parameters(), **OPTIONS)
        if part.start:
            weights, states = get_state_dict(model, opt)
            dcp.load({"model": weights, "optimizer": states}, checkpoint_id=folder)
            set_state_dict(model, opt, model_state_dict=weights, optim_state_dict=states)
        losses += train(model, opt, part, rank, ranks)
        if not part.start:
            weights, states = get_state_dict(model, opt)
            dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder)
    return losses


def report(alone: list[float], sharded: list[float], ranks: int) -> None:
    table = Table("step", "one process", f"{ranks} ranks", title="Loss")
    for step in sorted({*range(0, len(alone), max(1, len(alone) // 8)), len(alone) - 1}):
        table.add_row(str(step + 1), f"{alone[step]:.4f}", f"{sharded[step]:.4f}")
    Console().print(table)
    Console().print(
        f"from step {len(alone) // 2 + 1} on, the ranks go on from a checkpoint", highlight=False
    )


def work(rank: int, ranks: int, store: str | None, options: argparse.Namespace) -> None:
    """A rank; the first one trains the whole model too, and reports."""
    torch.set_num_threads(1)
    if options.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
    backend = "nccl" if options.device == "cuda" else "gloo"
    limit = timedelta(minutes=2)
    if store is None:  # torchrun has said where
        dist.init_process_group(backend, timeout=limit)
    else:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        place = dist.FileStore(store, ranks)
        dist.init_process_group(backend, store=place, rank=rank, world_size=ranks, timeout=limit)
    try:
        with tempfile.TemporaryDirectory() as own:
            folder = [own]
            dist.broadcast_object_list(folder)
            sharded = train_sharded(rank, ranks, options.steps, options.device, Path(folder[0]))
            dist.barrier()
        if rank == 0:
            whole = build().to(options.device)
            alone = train(
                whole, flatstep.AdamW(whole.parameters(), **OPTIONS), range(options.steps)
            )
            report(alone, sharded, ranks)
            if options.save is not None:
                torch.save({"alone": alone, "sharded": sharded}, options.save)
    finally:
        dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2, choices=(1, 2, 3, 4, 6), help="processes")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--save", type=Path, help="keeps the losses in this file")
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error("--steps must be at least 2: a checkpoint is made between them")
    if options.save is not None and not options.save.parent.is_dir():
        parser.error(f"--save: there is no folder {options.save.parent}")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        work(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), None, options)
        return
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        mp.spawn(work, (options.ranks, store, options), nprocs=options.ranks, daemon=True)


if __name__ == "__main__":
    main()
