"""What holds on several ranks: each check runs on both of a pair of processes at once.

A check is a function of the rank; `@check(...)` names it, once for each of the given values. In it a
process group is up, and the other rank runs the same lines. What the ranks do is compared with what
one process does with whole tensors, to the bit.
"""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import bits, gradient
from distributed_pair import COLLECTIVE_LIMIT, WORLD
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
)
from torch.nn import Parameter

import flatstep
from flatstep import reference

F32, BF16 = torch.float32, torch.bfloat16

CHECKS: dict[str, Callable[[int, Path], None]] = {}


def check(**values: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Names a check, once for each combination of the values."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        for chosen in itertools.product(*values.values()):
            label = "-".join(map(str, chosen))
            name = function.__name__ + (f"[{label}]" if label else "")
            CHECKS[name] = partial(function, **dict(zip(values, chosen, strict=True)))
        return function

    return register


def run(name: str, rank: int, folder: Path) -> None:
    """Runs a check on this rank."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    with process_group(rank, WORLD, folder / "store"):
        CHECKS[name](rank, folder)
        dist.barrier()


@contextmanager
def process_group(rank: int, world: int, store: Path) -> Iterator[None]:
    """A group that needs no port: the ranks find each other through a file."""
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(store), world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=COLLECTIVE_LIMIT),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


# ---- optimizers and what one process makes of the same

OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "Adam": partial(flatstep.Adam, lr=1e-2, weight_decay=0.1, amsgrad=True),
    "AdamW": partial(flatstep.AdamW, lr=1e-2, weight_decay=0.1),
    "RMSprop": partial(flatstep.RMSprop, lr=1e-2, momentum=0.9, centered=True),
    "SGD": partial(flatstep.SGD, lr=1e-1, momentum=0.9, nesterov=True),
}
CHANCE: dict[str, Any] = {"rounding": "stochastic", "seed": 7, "state_dtype": F32}
SPLIT: dict[str, Any] = {"master": "split", "state_dtype": F32}
# Of the parameters the dtype, and the options.
MODES: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "plain": (F32, {}),
    "bf16": (BF16, {}),
    "bf16 states": (F32, {"state_dtype": BF16}),
    "f32 master": (BF16, {"master": "float32", "state_dtype": F32}),
    "split": (BF16, SPLIT),
    "chance": (BF16, CHANCE),
    "average": (F32, {"ema_decay": 0.9}),
    "clip": (F32, {"max_grad_norm": 0.5}),
    "everything": (BF16, {**SPLIT, "max_grad_norm": 0.5, "ema_decay": 0.9}),
}
TILE = reference.TILE


def mesh(*shape: int) -> DeviceMesh:
    shape = shape or (WORLD,)
    return init_device_mesh("cpu", shape, mesh_dim_names=tuple("abc"[: len(shape)]))


class Bag(nn.Module):
    """Parameters of given shapes, the same on every rank."""

    def __init__(self, shapes: Iterable[tuple[int, ...]], dtype: torch.dtype = F32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        for index, shape in enumerate(shapes):
            value = torch.randn(shape, generator=generator).to(dtype)
            self.register_parameter(f"p{index}", Parameter(value))


# Rows that do not divide by two, fewer rows than ranks, and none.
UNEVEN = [(5, 3), (7,), (1, 4), (2, 3, 2), (1,), (0, 3), (33, 9)]
# Shards that begin and end with a tile.
ALIGNED = [(4, TILE // 2), (2 * TILE,), (8, TILE // 2), (2, 4, TILE // 4), (1, 100)]


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every rank."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    if tensor.dtype != torch.int16:
        return tensor.full_tensor().detach()
    pieces: list[Any] = [None] * WORLD  # gloo has no collective of 16-bit integers
    dist.all_gather_object(pieces, tensor.to_local())
    return torch.cat(pieces)


def assert_same_bits(a: Tensor, b: Tensor, what: str) -> None:
    assert a.dtype == b.dtype, (what, a.dtype, b.dtype)
    assert a.shape == b.shape, (what, a.shape, b.shape)
    assert torch.equal(bits(a), bits(b)), (what, a, b)


def assert_same_run(
    sharded: torch.optim.Optimizer, alone: torch.optim.Optimizer, *, states: bool = True
) -> None:
    """Parameters and states of the two are the same bits."""
    for group, other in zip(sharded.param_groups, alone.param_groups, strict=True):
        for i, (p, q) in enumerate(zip(group["params"], other["params"], strict=True)):
            assert_same_bits(whole(p), whole(q), f"parameter {i}")
            mine, its = sharded.state.get(p, {}), alone.state.get(q, {})
            assert list(mine) == list(its), (i, list(mine), list(its))
            for name in its if states else ():
                assert_same_bits(whole(mine[name]), whole(its[name]), f"state {name} of {i}")


def give(params: Iterable[Tensor], step: int) -> None:
    """The gradients of a step, each placed as its parameter is."""
    for index, param in enumerate(params):
        full = gradient(torch.empty(param.shape, dtype=param.dtype), step, index)
        param.grad = (
            distribute_tensor(full, param.device_mesh, param.placements)
            if isinstance(param, DTensor)
            else full
        )


# ---- FSDP2


@check(name=OPTIMIZERS, mode=MODES)
def fsdp2_steps_as_one_process(rank: int, folder: Path, name: str, mode: str) -> None:
    """Uneven and empty shards; with a norm, shards that are cut at tile boundaries."""
    dtype, options = MODES[mode]
    shapes = ALIGNED if "max_grad_norm" in options else UNEVEN
    model, plain = Bag(shapes, dtype), Bag(shapes, dtype)
    fully_shard(model, mesh=mesh())
    opt = OPTIMIZERS[name](model.parameters(), **options)
    alone = OPTIMIZERS[name](plain.parameters(), **options)
    for step in range(3):
        for of in (opt, alone):
            give(of.param_groups[0]["params"], step)
            of.step()
        assert_same_run(opt, alone)
    if "max_grad_norm" in options:
        assert_same_bits(opt.grad_norm, alone.grad_norm, "norm")
        assert float(opt.grad_norm) > 1


def network(dtype: torch.dtype = F32) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1)
    ).to(dtype)


def loss_of(model: nn.Module, rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + rank)
    dtype = next(model.parameters()).dtype
    x = torch.randn(6, 9, generator=generator).to(dtype)
    loss: Tensor = model(x).float().square().mean()
    return loss


def follow(plain: nn.Module, model: nn.Module) -> None:
    """Gives a model in one process the whole gradients of a sharded one."""
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        p.grad = None if q.grad is None else whole(q.grad).clone()


POLICIES: dict[str, dict[str, Any]] = {
    "none": {},
    "bf16": {"mp_policy": MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=F32)},
    "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "kept": {"reshard_after_forward": False},
}


@check(policy=POLICIES, name=OPTIMIZERS)
def fsdp2_trains_as_one_process_does(rank: int, folder: Path, policy: str, name: str) -> None:
    """The gradients are views into the buffers of FSDP, wherever these begin."""
    model, plain = network(), network()
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh(), **POLICIES[policy])
    fully_shard(model, mesh=mesh(), **POLICIES[policy])
    opt, alone = OPTIMIZERS[name](model.parameters()), OPTIMIZERS[name](plain.parameters())
    for step in range(4):
        loss_of(model, rank, step).backward()
        follow(plain, model)
        opt.step()
        alone.step()
        assert_same_run(opt, alone)
        opt.zero_grad()
    assert step_of(opt) in (None, 4)


def step_of(opt: torch.optim.Optimizer) -> int | None:
    state = opt.state[opt.param_groups[0]["params"][0]]
    return int(state["step"]) if "step" in state else None
