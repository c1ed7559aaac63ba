"""What holds on several ranks: each check runs on both of a pair of processes at once.

A check is a function of the rank; `@check(...)` names it, once for each of the given values. In it
a process group is up, and the other rank runs the same lines. What the ranks do is compared with
what one process does with whole tensors, to the bit.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import bits, gradient
from distributed_pair import COLLECTIVE_LIMIT, WORLD
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
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

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, which it uses itself
    from torch.distributed.optim import (
        PostLocalSGDOptimizer,
        ZeroRedundancyOptimizer,
        _apply_optimizer_in_backward,
    )

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


def run(name: str, rank: int, folder: Path, device: str) -> None:
    """Runs a check on this rank; what it makes is on ``device``, on a GPU of its own with cuda."""
    warnings.simplefilter("error")
    if device == "cuda":
        torch.cuda.set_device(rank)
    torch.set_default_device(device)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    folder.mkdir(exist_ok=True)
    join_group(rank, WORLD, folder / "store")
    try:
        CHECKS[name](rank, folder)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def join_group(rank: int, world: int, store: Path) -> None:
    """Joins a group that needs no port: the ranks find each other through a file."""
    cuda = device_type() == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",  # what is offloaded has collectives too
        store=dist.FileStore(str(store), world),
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=COLLECTIVE_LIMIT),
        device_id=torch.device("cuda", torch.cuda.current_device()) if cuda else None,
    )


def device_type() -> str:
    return torch.get_default_device().type


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
    return init_device_mesh(device_type(), shape, mesh_dim_names=tuple("abc"[: len(shape)]))


def seeded(seed: int) -> Callable[[tuple[int, ...]], Tensor]:
    """Makes tensors of the same random numbers on every device."""
    generator = torch.Generator("cpu").manual_seed(seed)

    def numbers(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device_type())

    return numbers


class Bag(nn.Module):
    """Parameters of given shapes, the same on every rank."""

    def __init__(self, shapes: Iterable[tuple[int, ...]], dtype: torch.dtype = F32) -> None:
        super().__init__()
        numbers = seeded(3)
        for index, shape in enumerate(shapes):
            self.register_parameter(f"p{index}", Parameter(numbers(shape).to(dtype)))


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
    pieces: list[Any] = [None] * dist.get_world_size()  # gloo has no collective of 16-bit integers
    dist.all_gather_object(pieces, tensor.to_local().cpu())
    return torch.cat(pieces).to(tensor.device)


def assert_same_bits(a: Tensor, b: Tensor, what: str) -> None:
    assert a.dtype == b.dtype, (what, a.dtype, b.dtype)
    assert a.shape == b.shape, (what, a.shape, b.shape)
    assert torch.equal(bits(a).cpu(), bits(b).cpu()), (what, a, b)


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
    with torch.device("cpu"):  # the same weights on every device
        layers = [nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1)]
    return nn.Sequential(*layers).to(device_type(), dtype)


def loss_of(model: nn.Module, rank: int, step: int) -> Tensor:
    dtype = next(model.parameters()).dtype
    x = seeded(100 * step + rank)((6, 9)).to(dtype)
    loss: Tensor = model(x).float().square().mean()
    return loss


def follow(plain: nn.Module, model: nn.Module) -> None:
    """Gives a model in one process the whole gradients of a sharded one."""
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        p.grad = None if q.grad is None else whole(q.grad).to(p.device, copy=True)


POLICIES: dict[str, dict[str, Any]] = {
    "none": {},
    "bf16": {"mp_policy": MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=F32)},
    "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
    "kept": {"reshard_after_forward": False},
    "hybrid": {"shape": (2, 1)},
}


@check(policy=POLICIES, name=OPTIMIZERS)
def fsdp2_trains_as_one_process_does(rank: int, folder: Path, policy: str, name: str) -> None:
    """The gradients are views into the buffers of FSDP, wherever these begin."""
    model, plain = network(), network()
    options = dict(POLICIES[policy])
    over = mesh(*options.pop("shape", ()))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=over, **options)
    fully_shard(model, mesh=over, **options)
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


@check(reshard=[True, False])
def fsdp2_may_move_its_parameters_between_steps(rank: int, folder: Path, reshard: bool) -> None:
    model, plain = network(), network()
    fully_shard(model, mesh=mesh(), reshard_after_forward=reshard)
    opt, alone = OPTIMIZERS["AdamW"](model.parameters()), OPTIMIZERS["AdamW"](plain.parameters())
    for step in range(4):
        loss_of(model, rank, step).backward()
        follow(plain, model)
        if step == 1:
            model.unshard()
            model.reshard()
        if step >= 2:  # other memory, the same objects
            for param in model.parameters():
                param._local_tensor = param._local_tensor.clone()
        opt.step()
        alone.step()
        assert_same_run(opt, alone)
        opt.zero_grad()


@check()
def parameters_may_be_replaced_in_the_groups(rank: int, folder: Path) -> None:
    """As accelerate does: the optimizer is made of the whole model, which is sharded later."""
    model, plain = network(), network()
    opt, alone = OPTIMIZERS["AdamW"](model.parameters()), OPTIMIZERS["AdamW"](plain.parameters())
    names = {param: name for name, param in model.named_parameters()}
    order = [names[param] for param in opt.param_groups[0]["params"]]
    opt.param_groups[0]["params"] = [torch.empty(1) for _ in order]  # holds nothing meanwhile
    fully_shard(model, mesh=mesh())
    sharded = dict(model.named_parameters())
    opt.param_groups[0]["params"] = [sharded[name] for name in order]
    for step in range(2):
        loss_of(model, rank, step).backward()
        follow(plain, model)
        opt.step()
        alone.step()
        assert_same_run(opt, alone)
        opt.zero_grad()


@check()
def fsdp2_accumulates_gradients(rank: int, folder: Path) -> None:
    model, plain = network(), network()
    fully_shard(model, mesh=mesh())
    opt, alone = OPTIMIZERS["AdamW"](model.parameters()), OPTIMIZERS["AdamW"](plain.parameters())
    for step in range(3):
        for part in range(3):
            model.set_requires_gradient_sync(part == 2)
            loss_of(model, rank, 10 * step + part).backward()
        follow(plain, model)
        opt.step()
        alone.step()
        assert_same_run(opt, alone)
        opt.zero_grad()


@check()
def fsdp2_updates_in_backward(rank: int, folder: Path) -> None:
    model, same = network(BF16), network(BF16)
    for of in (model, same):
        fully_shard(of, mesh=mesh())
    opt = flatstep.AdamW(model.parameters(), lr=1e-2, **CHANCE)
    later = flatstep.AdamW(same.parameters(), lr=1e-2, **CHANCE)
    opt.step_in_backward()
    for step in range(3):
        for of in (model, same):
            loss_of(of, rank, step).backward()
        assert all(param.grad is None for param in model.parameters())
        later.step()
        later.zero_grad()
        assert_same_run(opt, later)


@check(dim=[0, 1])
def chance_counts_elements_as_one_process_does(rank: int, folder: Path, dim: int) -> None:
    """Replicas stay replicas; what is cut by rows has the bits of one process."""
    shapes = [(5, 4), (3,), (7, 2)]
    values = [torch.linspace(0.5, 1.5, math.prod(s)).view(s).bfloat16() for s in shapes]
    own = mesh()
    places = [[Shard(min(dim, v.dim() - 1))] for v in values]
    sharded = [
        Parameter(distribute_tensor(v.clone(), own, p)) for v, p in zip(values, places, strict=True)
    ]
    replicated = Parameter(distribute_tensor(torch.ones(300, dtype=BF16), own, [Replicate()]))
    plain = Parameter(torch.ones(200, dtype=BF16))
    params = [*sharded, replicated, plain]
    whole_params = [Parameter(whole(p).clone()) for p in params]
    opt = flatstep.SGD(params, lr=0.01, rounding="stochastic", seed=5)
    alone = flatstep.SGD(whole_params, lr=0.01, rounding="stochastic", seed=5)
    for step in range(3):
        give(params, step)
        give(whole_params, step)
        opt.step()
        alone.step()
    for i, (p, q) in enumerate(zip(params, whole_params, strict=True)):
        if dim == 0 or i in (1, 3, 4):
            assert_same_bits(whole(p), q.detach(), f"parameter {i}")
    copies: list[Any] = [None] * WORLD
    dist.all_gather_object(copies, [replicated.to_local().detach().cpu(), plain.detach().cpu()])
    for a, b in zip(*copies, strict=True):
        assert_same_bits(a, b, "replica")


@check()
def states_stay_where_an_offloaded_parameter_is(rank: int, folder: Path) -> None:
    """The mesh is of another device than its parameters, as with CPUOffloadPolicy on a GPU."""
    model, plain = Bag(UNEVEN, BF16), Bag(UNEVEN, BF16)
    fully_shard(model, mesh=mesh())
    options = {**SPLIT, "ema_decay": 0.5}
    opt = flatstep.AdamW(model.parameters(), **options)
    alone = flatstep.AdamW(plain.parameters(), **options)
    for step in range(2):
        for of in (opt, alone):
            give(of.param_groups[0]["params"], step)
        device_mesh = opt.param_groups[0]["params"][0].device_mesh
        device_mesh._device_type = "meta"
        opt.step()
        masters = list(opt.master_parameters())
        device_mesh._device_type = device_type()
        alone.step()
        assert all(master.device.type == device_type() for master in masters)
    assert_same_run(opt, alone)


# ---- one norm over all shards


@contextmanager
def counted_collectives() -> Iterator[list[int]]:
    """The elements of each all_reduce inside."""
    sizes: list[int] = []
    real = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(tensor.numel())
        return real(tensor, *args, **kwargs)

    dist.all_reduce = counting
    try:
        yield sizes
    finally:
        dist.all_reduce = real


def defined_norm(gradients: list[list[Tensor]], norm_type: float) -> float:
    """The norm as it is defined: of each gradient the shards' tiles, in order."""
    total = 0.0
    for shards in gradients:
        own = 0.0
        for shard in shards:
            for tile in shard.reshape(-1).split(TILE):
                if tile.numel():
                    array = (tile.cpu().numpy(), str(tile.dtype)[6:])
                    part = reference.norm_total([array], norm_type)
                    own = max(own, part) if norm_type == math.inf else own + part
        total = max(total, own) if norm_type == math.inf else total + own
    return reference.norm_of(total, norm_type, 1.0)


@check(norm_type=[2.0, math.inf], shapes=["aligned", "uneven"])
def the_norm_is_over_all_shards(rank: int, folder: Path, norm_type: float, shapes: str) -> None:
    model = Bag({"aligned": ALIGNED, "uneven": [*UNEVEN, (3, TILE)]}[shapes])
    fully_shard(model, mesh=mesh())
    opt = flatstep.SGD(model.parameters(), lr=0.1, max_grad_norm=0.1, norm_type=norm_type)
    params = list(model.parameters())
    with counted_collectives() as sizes:
        for step in range(2):
            give(params, step)
            opt.step()
    assert len(sizes) == 2, "one collective call a step"
    fulls = [whole(param.grad) for param in params]
    shards = [list(full.chunk(WORLD)) for full in fulls]
    assert float(opt.grad_norm) == torch.tensor(defined_norm(shards, norm_type)).float()
    alone = reference.norm([(full.cpu().numpy(), "float32") for full in fulls], norm_type)
    if shapes == "aligned":
        assert defined_norm(shards, norm_type) == alone
    assert math.isclose(float(opt.grad_norm), alone, rel_tol=1e-6)
    if norm_type == 2:  # torch has no largest magnitude of an empty shard, and hangs
        theirs = torch.nn.utils.get_total_norm([p.grad for p in params])
        assert math.isclose(float(opt.grad_norm), float(whole(theirs)), rel_tol=1e-5)


PLACES: dict[str, tuple[tuple[int, ...], list[Any]]] = {
    "rows": ((2,), [Shard(0)]),
    "columns": ((2,), [Shard(1)]),
    "replicated": ((2,), [Replicate()]),
    "hybrid": ((1, 2), [Replicate(), Shard(0)]),
    "hybrid, replicas": ((2, 1), [Replicate(), Shard(0)]),
    "both ways": ((2, 1), [Shard(0), Shard(1)]),
}


@check(place=PLACES)
def each_gradient_counts_once(rank: int, folder: Path, place: str) -> None:
    """Whatever its placement, beside a plain parameter and one of another mesh."""
    shape, placements = PLACES[place]
    values = [torch.ones(6, 4), torch.full((4, 6), 2.0)]
    params: list[Tensor] = [
        Parameter(distribute_tensor(v, mesh(*shape), placements)) for v in values
    ]
    params.append(Parameter(distribute_tensor(torch.ones(3, 3), mesh(), [Shard(0)])))
    params.append(Parameter(torch.ones(5)))
    opt = flatstep.SGD(params, lr=1.0, max_grad_norm=0.5)
    for param in params:
        param.grad = param.detach().clone()
    opt.step()
    norm = math.sqrt(24 + 4 * 24 + 9 + 5)
    assert float(opt.grad_norm) == torch.tensor(norm).float()
    factor = 1 - 0.5 / norm
    for param, value in zip(params, [1, 2, 1, 1], strict=True):
        torch.testing.assert_close(whole(param), torch.full(param.shape, value * factor))


@check()
def fsdp_beside_tensor_parallelism_has_one_norm(rank: int, folder: Path) -> None:
    """FSDP2 over a mesh of two dimensions cuts rows that are cut already."""
    for shape in ((2, 1), (1, 2)):
        both = mesh(*shape)
        model = Bag([(6, 4), (5, 3)])
        for name, param in list(model.named_parameters()):
            cut = distribute_tensor(param.detach(), both["b"], [Shard(0)])
            model.register_parameter(name, Parameter(cut))
        fully_shard(model, mesh=both["a"])
        opt = flatstep.SGD(model.parameters(), lr=0.1, max_grad_norm=1.0)
        for param in model.parameters():
            param.grad = torch.full_like(param, 3.0)
        opt.step()
        assert float(opt.grad_norm) == torch.tensor(3 * math.sqrt(24 + 15)).float()


@check(who=["nobody", "rank 0", "rank 1", "some"])
def a_rank_without_gradients_joins(rank: int, folder: Path, who: str) -> None:
    model = Bag([(4, 3), (5,)])
    fully_shard(model, mesh=mesh())
    params = list(model.parameters())
    opt = flatstep.AdamW(params, lr=0.1, max_grad_norm=1.0)
    for step in range(2):
        give(params, step)
        fulls = [whole(param.grad) for param in params]
        absent = [who == "nobody" or who == f"rank {rank}"] * 2
        if who == "some":
            absent = [rank == 0, rank == 1]
        for param, without in zip(params, absent, strict=True):
            if without:
                param.grad = None
        opt.step()
        mine = [
            (shard.cpu().numpy(), "float32")
            for full, without_on in zip(fulls, ([0], [1]), strict=True)
            for at, shard in enumerate(full.chunk(WORLD))
            if not (who == "nobody" or who == f"rank {at}" or (who == "some" and at in without_on))
        ]
        assert math.isclose(float(opt.grad_norm), reference.norm(mine, 2.0), rel_tol=1e-6)
    assert whole(params[0]).isfinite().all()


@check()
def a_gradient_that_is_still_to_be_summed_up_is_measured_as_a_sum(rank: int, folder: Path) -> None:
    own = mesh()
    param = Parameter(distribute_tensor(torch.ones(4, 3), own, [Shard(0)]))
    local = torch.full((4, 3), 1.0 + rank)
    param.grad = DTensor.from_local(local, own, [Partial()], run_check=False)
    opt = flatstep.SGD([param], lr=0.1, max_grad_norm=1.0)
    opt.step()
    norm = 3 * math.sqrt(12)
    assert float(opt.grad_norm) == torch.tensor(norm).float()
    torch.testing.assert_close(whole(param), torch.full((4, 3), 1 - 0.1 * 3 / norm))


@check()
def a_parameter_that_is_to_be_summed_up_is_refused(rank: int, folder: Path) -> None:
    own = mesh()
    first = Parameter(distribute_tensor(torch.ones(4), own, [Shard(0)]))
    param = Parameter(DTensor.from_local(torch.ones(4), own, [Partial()], run_check=False))
    opt = flatstep.SGD([("first", first), ("sum", param)], lr=0.1, max_grad_norm=1.0)
    first.grad, param.grad = torch.ones_like(first), torch.ones_like(param)
    assert_refused(opt.step, "'sum' has placements", "redistribute")
    assert torch.equal(whole(first), torch.ones(4))


@check(which=["parameter", "gradient"])
def a_parameter_and_a_gradient_of_two_kinds_are_refused(
    rank: int, folder: Path, which: str
) -> None:
    sharded = distribute_tensor(torch.ones(4), mesh(), [Shard(0)])
    first, odd = (
        Parameter(torch.ones(4)),
        Parameter(sharded if which == "parameter" else torch.ones(4)),
    )
    opt = flatstep.SGD([("first", first), ("odd", odd)], lr=0.1)
    first.grad = torch.ones(4)
    odd.grad = torch.ones(4) if which == "parameter" else sharded
    assert_refused(opt.step, "'odd' is", "a DTensor, but its gradient is")
    assert torch.equal(first, torch.ones(4))


def assert_refused(action: Callable[[], Any], *words: str) -> None:
    with pytest.raises(ValueError, match=words[0]) as refusal:
        action()
    assert all(word in str(refusal.value) for word in words), refusal.value


@check(option=["error_if_nonfinite", "skip_nonfinite"], value=[math.nan, math.inf])
def ranks_decide_alike_about_what_is_not_finite(
    rank: int, folder: Path, option: str, value: float
) -> None:
    """Only the last rank's shard holds it."""
    model = Bag([(4, 3), (5,)])
    fully_shard(model, mesh=mesh())
    params = list(model.parameters())
    opt = flatstep.AdamW(params, lr=0.1, **{option: True})
    before = [whole(param).clone() for param in params]
    give(params, 0)
    if rank == WORLD - 1:
        params[0].grad._local_tensor[0, 0] = value
    if option == "error_if_nonfinite":
        with pytest.raises(RuntimeError, match="non-finite"):
            opt.step()
    else:
        opt.step()
        assert opt.skipped_steps == 1
    assert not opt.state
    for param, old in zip(params, before, strict=True):
        assert_same_bits(whole(param), old, "parameter")
    give(params, 0)
    opt.step()
    assert step_of(opt) == 1


@check(clips=[False, True], fused=[False, True], ours=[False, True])
def a_scaler_skips_on_every_rank(
    rank: int, folder: Path, clips: bool, fused: bool, ours: bool
) -> None:
    """Only one rank's shard overflows; the first step is among those that are skipped."""
    model, plain = network(), network()
    fully_shard(model, mesh=mesh())
    options: dict[str, Any] = {"lr": 0.1, "fused": fused}
    if clips:
        options["error_if_nonfinite"] = False
        options["max_grad_norm"] = math.inf  # measured, and never clipped: the same bits
    opt = flatstep.AdamW(model.parameters(), **options)
    alone = flatstep.AdamW(plain.parameters(), lr=0.1)
    scaler = (flatstep.GradScaler if ours else torch.amp.GradScaler)(device_type(), init_scale=8.0)
    done = 0
    for step in range(4):
        scaler.scale(loss_of(model, rank, step)).backward()
        follow(plain, model)
        if step % 2 == 0:
            if rank == step // 2:
                next(model.parameters()).grad._local_tensor[0, 0] = math.inf
        else:
            for param in plain.parameters():
                param.grad /= scaler.get_scale()
            alone.step()
            done += 1
        scaler.step(opt)
        scaler.update()
        assert step_of(opt) == done if done else not opt.state
        opt.zero_grad()
        if done:
            assert_same_run(opt, alone)


# ---- distributed checkpoints


def train(opt: torch.optim.Optimizer, steps: Iterable[int]) -> None:
    for step in steps:
        give(opt.param_groups[0]["params"], step)
        opt.step()


def sharded_bag(dtype: torch.dtype, *, ranks: int = WORLD) -> nn.Module:
    model = Bag(SAVED, dtype)
    fully_shard(model, mesh=init_device_mesh(device_type(), (ranks,)))
    return model


SAVED = [(5, 3), (7,), (1, 4), (33, 9)]
KEPT = ["plain", "bf16 states", "f32 master", "split", "chance", "average"]


def save(model: nn.Module, opt: torch.optim.Optimizer, to: Path, flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    state = get_optimizer_state_dict(model, opt, options=options)
    dcp.save({"model": model.state_dict(), "optimizer": state}, checkpoint_id=to)


def load(model: nn.Module, opt: torch.optim.Optimizer, of: Path, flatten: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    found: dict[str, Any] = {
        "model": model.state_dict(),
        "optimizer": get_optimizer_state_dict(model, opt, options=options),
    }
    dcp.load(found, checkpoint_id=of)
    model.load_state_dict(found["model"])
    set_optimizer_state_dict(model, opt, found["optimizer"], options=options)


def alone_after(name: str, mode: str, steps: int) -> torch.optim.Optimizer:
    dtype, options = MODES[mode]
    opt: torch.optim.Optimizer = OPTIMIZERS[name](Bag(SAVED, dtype).parameters(), **options)
    train(opt, range(steps))
    return opt


@contextmanager
def as_one_rank(rank: int, folder: Path) -> Iterator[None]:
    """Outside the pair's group, each rank in one of its own."""
    dist.barrier()
    dist.destroy_process_group()
    join_group(0, 1, folder / f"alone{rank}")
    yield
    dist.destroy_process_group()
    join_group(rank, WORLD, folder / "again")


@check(way=["2to2", "2to1", "1to2"], flatten=[False, True], mode=KEPT)
def checkpoints_go_on_to_the_bit(
    rank: int, folder: Path, way: str, flatten: bool, mode: str
) -> None:
    """Saved by so many ranks, loaded by so many; what is loaded into has made other steps."""
    dtype, options = MODES[mode]
    make = partial(OPTIMIZERS["AdamW"], **options)
    expected = alone_after("AdamW", mode, 4)

    def write() -> None:
        model = sharded_bag(dtype, ranks=dist.get_world_size())
        opt = make(model.parameters())
        train(opt, range(2))
        save(model, opt, folder / "saved", flatten)

    def go_on() -> None:
        model = sharded_bag(dtype, ranks=dist.get_world_size())
        if "chance" in mode:
            opt = make(model.parameters(), seed=1)  # the saved one is what counts
        else:
            opt = make(model.parameters())
        load(model, opt, folder / "saved", flatten)
        train(opt, range(2, 4))
        assert_same_run(opt, expected)

    if way == "1to2":
        with as_one_rank(rank, folder):
            if rank == 0:
                write()
        go_on()
    else:
        write()
        if way == "2to2":
            go_on()
        else:
            with as_one_rank(rank, folder):
                go_on()


@check(name=OPTIMIZERS)
def checkpoints_of_every_class_are_resharded(rank: int, folder: Path, name: str) -> None:
    expected = alone_after(name, "plain", 4)
    model = sharded_bag(F32)
    opt = OPTIMIZERS[name](model.parameters())
    train(opt, range(2))
    save(model, opt, folder / "saved", flatten=False)
    with as_one_rank(rank, folder):
        model = sharded_bag(F32, ranks=1)
        opt = OPTIMIZERS[name](model.parameters())
        load(model, opt, folder / "saved", flatten=False)
        train(opt, range(2, 4))
        assert_same_run(opt, expected)


TORCHS: dict[str, Callable[..., Any]] = {
    name: partial(getattr(torch.optim, name), **make.keywords)  # type: ignore[attr-defined]
    for name, make in OPTIMIZERS.items()
}


@check(name=OPTIMIZERS, direction=["from torch", "to torch"])
def checkpoints_go_to_torch_and_come_from_it(
    rank: int, folder: Path, name: str, direction: str
) -> None:
    first, second = TORCHS[name], OPTIMIZERS[name]
    if direction == "to torch":
        first, second = second, first
    expected = TORCHS[name](Bag(SAVED).parameters())
    train(expected, range(4))
    model = sharded_bag(F32)
    opt = first(model.parameters())
    train(opt, range(2))
    save(model, opt, folder / "saved", flatten=False)
    model = sharded_bag(F32)
    opt = second(model.parameters())
    load(model, opt, folder / "saved", flatten=False)
    train(opt, range(2, 4))
    for p, q in zip(opt.param_groups[0]["params"], expected.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(whole(p), q.detach(), rtol=0, atol=1e-5)
        assert list(opt.state[p]) == list(expected.state[q])


@check(mode=KEPT, name=OPTIMIZERS)
def the_initialising_step_changes_no_bit(rank: int, folder: Path, mode: str, name: str) -> None:
    """A checkpoint makes states by a step with zero gradients and lr = 0."""
    dtype, options = MODES[mode]
    model = sharded_bag(dtype)
    opt = OPTIMIZERS[name](model.parameters(), **options)
    before = [whole(param).clone() for param in model.parameters()]
    saved = get_optimizer_state_dict(model, opt)
    assert saved["state"]
    for param, old in zip(model.parameters(), before, strict=True):
        assert_same_bits(whole(param), old, "parameter")
    for master, old in zip(opt.master_parameters(), before, strict=True):
        assert_same_bits(whole(master).to(dtype), old, "master")
    assert opt.param_groups[0]["lr"] == OPTIMIZERS[name].keywords["lr"]


@check(mode=KEPT)
def a_whole_state_dict_is_gathered_and_given_out(rank: int, folder: Path, mode: str) -> None:
    """full_state_dict and broadcast_from_rank0."""
    dtype, options = MODES[mode]
    expected = alone_after("AdamW", mode, 3)
    make = partial(OPTIMIZERS["AdamW"], **options)
    model = sharded_bag(dtype)
    opt = make(model.parameters())
    train(opt, range(2))
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = {name: whole(value).clone() for name, value in model.state_dict().items()}
    saved = get_optimizer_state_dict(model, opt, options=full)
    assert bool(saved) == (rank == 0)
    model = sharded_bag(dtype)
    for name, param in model.named_parameters():
        own = distribute_tensor(weights[name], param.device_mesh, param.placements)
        param.detach().copy_(own)
    opt = make(model.parameters())
    given = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(model, opt, saved, options=given)
    train(opt, [2])
    assert_same_run(opt, expected)


@check(mode=["f32 master", "split", "average"])
def masters_and_averages_come_out_of_shards_and_go_in(rank: int, folder: Path, mode: str) -> None:
    dtype, options = MODES[mode]
    expected = alone_after("AdamW", mode, 2)
    model = sharded_bag(dtype)
    opt = OPTIMIZERS["AdamW"](model.parameters(), **options)
    train(opt, range(2))
    masters = list(opt.master_parameters())
    for mine, its in zip(masters, expected.master_parameters(), strict=True):
        assert_same_bits(whole(mine), whole(its), "master")
    saved = {k: v.clone() for k, v in opt.master_state_dict(model).items()}
    if mode == "average":
        before = [whole(param).clone() for param in model.parameters()]
        with opt.average_parameters(), expected.average_parameters():
            for p, q in zip(model.parameters(), expected.param_groups[0]["params"], strict=True):
                assert_same_bits(whole(p), whole(q), "average")
        for param, old in zip(model.parameters(), before, strict=True):
            assert_same_bits(whole(param), old, "parameter")
        copied = sharded_bag(dtype)
        opt.copy_average_to(copied)
        for p, q in zip(copied.parameters(), opt.param_groups[0]["params"], strict=True):
            assert_same_bits(whole(p), whole(opt.state[q]["average"]), "copied average")
    other = sharded_bag(dtype)
    fresh = OPTIMIZERS["AdamW"](other.parameters(), **options)
    fresh.load_master_state_dict(other, saved)
    for p, q in zip(other.parameters(), model.parameters(), strict=True):
        assert_same_bits(whole(p), whole(q), "parameter")
    fresh.load_master_parameters([master.clone() for master in masters])
    for mine, its in zip(fresh.master_parameters(), masters, strict=True):
        assert_same_bits(whole(mine), whole(its), "master")


# ---- ZeroRedundancyOptimizer, DDP and what else torch wraps around an optimizer


def parallel(model: nn.Module, **options: Any) -> Any:
    return nn.parallel.DistributedDataParallel(model, **options)


def mean_gradients(plain: nn.Module, steps: Iterable[int]) -> None:
    """The gradients that DDP leaves, from the losses of every rank."""
    for param in plain.parameters():
        param.grad = None
    for step in steps:
        for rank in range(WORLD):
            (loss_of(plain, rank, step) / WORLD).backward()


def assert_replicas(model: nn.Module) -> None:
    """Every rank has the same bits."""
    found: list[Any] = [None] * WORLD
    dist.all_gather_object(found, [param.detach().cpu() for param in model.parameters()])
    for i, (a, b) in enumerate(zip(*found, strict=True)):
        assert_same_bits(a, b, f"parameter {i}")


@check(
    name=OPTIMIZERS,
    views=[False, True],
    flat=["no", "parameters", "gradients", "cleared"],
)
def ddp_trains_as_one_process_does(
    rank: int, folder: Path, name: str, views: bool, flat: str
) -> None:
    model, plain = network(), network()
    if flat != "no":
        flatstep.flatten_(model, flat != "parameters", clear_gradients=flat == "cleared")
    ddp = parallel(model, gradient_as_bucket_view=views)
    opt = OPTIMIZERS[name](model.parameters(), max_grad_norm=0.5)
    alone = OPTIMIZERS[name](plain.parameters(), max_grad_norm=0.5)
    for step in range(4):
        loss_of(ddp, rank, step).backward()
        follow(plain, model)
        opt.step()
        alone.step()
        opt.zero_grad()
        assert_same_run(opt, alone)
    assert_replicas(model)
    mean_gradients(plain, [4])
    loss_of(ddp, rank, 4).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@check(views=[False, True], flat=[False, True])
def ddp_accumulates_gradients(rank: int, folder: Path, views: bool, flat: bool) -> None:
    model, plain = network(), network()
    if flat:
        flatstep.flatten_(model)
    ddp = parallel(model, gradient_as_bucket_view=views)
    opt, alone = OPTIMIZERS["AdamW"](model.parameters()), OPTIMIZERS["AdamW"](plain.parameters())
    for step in range(3):
        steps = range(3 * step, 3 * step + 3)
        with ddp.no_sync():
            for part in steps[:-1]:
                loss_of(ddp, rank, part).backward()
        loss_of(ddp, rank, steps[-1]).backward()
        mean_gradients(plain, steps)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        follow(plain, model)
        opt.step()
        alone.step()
        opt.zero_grad()
        assert_same_run(opt, alone)


@check(mode=["f32 master", "split", "chance", "average"])
def ddp_replicas_stay_the_same(rank: int, folder: Path, mode: str) -> None:
    dtype, options = MODES[mode]
    model = network(dtype)
    ddp = parallel(model, gradient_as_bucket_view=True)
    opt = OPTIMIZERS["AdamW"](model.parameters(), **options)
    for step in range(3):
        loss_of(ddp, rank, step).backward()
        opt.step()
        opt.zero_grad()
    assert_replicas(model)


@check(name=OPTIMIZERS, views=[False, True], buckets=[False, True])
def zero_trains_as_one_process_does(
    rank: int, folder: Path, name: str, views: bool, buckets: bool
) -> None:
    """Each rank has the states of a part of the parameters, and sends what it updates."""
    model, plain = network(), network()
    ddp = parallel(model, gradient_as_bucket_view=views)
    opt = zero(model, name, parameters_as_bucket_view=buckets)
    alone = OPTIMIZERS[name](plain.parameters())
    assert 0 < len(opt.optim.param_groups[0]["params"]) < len(list(model.parameters()))
    for step in range(4):
        loss_of(ddp, rank, step).backward()
        follow(plain, model)
        if step == 2:
            opt.param_groups[0]["lr"] = alone.param_groups[0]["lr"] = 1e-3
        opt.step()
        alone.step()
        opt.zero_grad()
        for i, (p, q) in enumerate(zip(model.parameters(), plain.parameters(), strict=True)):
            assert_same_bits(p.detach(), q.detach(), f"parameter {i}")


def zero(model: nn.Module, name: str, **options: Any) -> ZeroRedundancyOptimizer:
    make = OPTIMIZERS[name]
    return ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=make.func, **make.keywords, **options
    )


@check(mode=["plain", "f32 master", "split", "average"])
def zero_goes_on_from_a_checkpoint(rank: int, folder: Path, mode: str) -> None:
    dtype, options = MODES[mode]
    models = [network(dtype), network(dtype)]
    plain = network(dtype)
    alone = OPTIMIZERS["AdamW"](plain.parameters(), **options)
    opt = zero(models[0], "AdamW", **options)

    def go(of: ZeroRedundancyOptimizer, model: nn.Module, steps: range) -> None:
        for step in steps:
            give(list(model.parameters()), step)
            give(list(plain.parameters()), step)
            of.step()
            alone.step()
        for i, (p, q) in enumerate(zip(model.parameters(), plain.parameters(), strict=True)):
            assert_same_bits(p.detach(), q.detach(), f"parameter {i}")

    go(opt, models[0], range(2))
    opt.consolidate_state_dict(to=0)
    saved = [opt.state_dict() if rank == 0 else None]
    dist.broadcast_object_list(saved, src=0)
    models[1].load_state_dict(models[0].state_dict())
    fresh = zero(models[1], "AdamW", **options)
    fresh.load_state_dict(saved[0])
    go(fresh, models[1], range(2, 4))


@check()
def post_local_sgd_averages_models(rank: int, folder: Path) -> None:
    model, other = network(), network()
    runs = []
    for of, cls in ((model, flatstep.SGD), (other, torch.optim.SGD)):
        averager = PeriodicModelAverager(period=2, warmup_steps=2)
        runs.append(PostLocalSGDOptimizer(cls(of.parameters(), lr=0.1, momentum=0.9), averager))
    for step in range(6):
        for opt, of in zip(runs, (model, other), strict=True):
            opt.zero_grad()
            loss_of(of, rank, step).backward()
            opt.step()
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-6)
    saved = runs[0].state_dict()
    runs[0].load_state_dict(saved)
    assert runs[0].averager.step == 6


@check(name=OPTIMIZERS)
def updates_are_applied_in_backward(rank: int, folder: Path, name: str) -> None:
    """One optimizer for each parameter, which torch runs as soon as its gradient is there."""
    model, plain = network(), network()
    make = OPTIMIZERS[name]
    _apply_optimizer_in_backward(make.func, model.parameters(), make.keywords)
    alone = make(plain.parameters())
    for step in range(3):
        loss_of(model, rank, step).backward()
        loss_of(plain, rank, step).backward()
        alone.step()
        alone.zero_grad()
        assert all(param.grad is None for param in model.parameters())
    for i, (p, q) in enumerate(zip(model.parameters(), plain.parameters(), strict=True)):
        assert_same_bits(p.detach(), q.detach(), f"parameter {i}")
        (one,) = p._in_backward_optimizers
        assert list(one.state[p]) == list(alone.state[q])
