"""Tensors whose address is not simply their data: right numbers or an error that names them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import (
    LAYOUT_SHAPE,
    LAYOUTS,
    Case,
    assert_same_run,
    clones,
    give_gradients,
    gradient,
    parameters,
    rich,
    same_bits,
    train,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn import Parameter
from torch.testing._internal.two_tensor import TwoTensor
from torch_versions import (
    DTensor,
    Replicate,
    Shard,
    distribute_tensor,
    label,
    named,
    needs_fully_shard,
)

REFUSAL = (TypeError, ValueError, RuntimeError)


def refusal_of(action: Callable[[], Any]) -> str | None:
    """The message with which `action` is refused; None if it runs."""
    try:
        action()
    except REFUSAL as refusal:
        return str(refusal)
    return None


class Tagged(torch.Tensor):
    """A subclass that adds nothing."""


def at_an_odd_byte(x: Tensor) -> Tensor:
    raw = bytearray(x.numel() * x.element_size() + 1)
    unaligned = torch.frombuffer(raw, dtype=x.dtype, offset=1, count=x.numel()).view(x.shape)
    return unaligned.copy_(x)


def from_functional(p: Tensor) -> Tensor:
    torch._sync(p)
    return torch._from_functional_tensor(p.detach())


def both(p: Any) -> Tensor:
    """A TwoTensor's value, NaN where its halves differ."""
    return torch.where(p.a == p.b, p.a, torch.nan)


@dataclass(frozen=True)
class Odd:
    """How a parameter and its gradient are made from plain values, and read back."""

    parameter: Callable[[Tensor], Tensor] = torch.clone
    gradient: Callable[[Tensor], Tensor] = torch.clone
    read: Callable[[Any], Tensor] = lambda p: p.detach().as_subclass(Tensor)
    dtype: torch.dtype = torch.float32


ODD: dict[str, Odd] = {
    "lazy_parameter": Odd(parameter=lambda x: torch._lazy_clone(x.clone())),
    "lazy_gradient": Odd(gradient=lambda x: torch._lazy_clone(x.clone())),
    "negative_parameter": Odd(parameter=lambda x: torch._neg_view(-x)),
    "negative_gradient": Odd(gradient=lambda x: torch._neg_view(-x)),
    "imaginary_gradient": Odd(gradient=lambda x: torch.complex(x, -x).conj().imag),
    "conjugate_parameter": Odd(lambda x: x.conj().resolve_conj().conj(), dtype=torch.complex64),
    "conjugate_gradient": Odd(
        gradient=lambda x: x.conj().resolve_conj().conj(), dtype=torch.complex64
    ),
    "subclass_parameter": Odd(parameter=lambda x: x.clone().as_subclass(Tagged)),
    "subclass_gradient": Odd(gradient=lambda x: x.clone().as_subclass(Tagged)),
    "wrapper": Odd(
        lambda x: TwoTensor(x.clone(), x.clone()),
        lambda x: TwoTensor(x.clone(), x.clone()),
        both,
    ),
    "functional": Odd(
        torch._to_functional_tensor, lambda x: torch._to_functional_tensor(x), from_functional
    ),
    "odd_byte_parameter": Odd(parameter=at_an_odd_byte),
    "odd_byte_gradient": Odd(gradient=at_an_odd_byte),
}


@pytest.mark.parametrize("name", ODD)
@rich
def test_an_odd_tensor_is_updated_rightly_or_refused_by_name(case: Case, name: str) -> None:
    odd = ODD[name]
    values = parameters(odd.dtype, [(5,), (4, 3), (6,)])
    theirs = case.torchs(clones(values))
    train(theirs, range(3))
    first, _, last = clones(values)
    middle = Parameter(odd.parameter(values[1].detach().clone()))
    ours = case.ours(named(first=first, odd=middle, last=last))

    def run() -> None:
        for step in range(3):
            give_gradients([first], step)
            middle.grad = odd.gradient(gradient(values[1], step, 1))
            last.grad = gradient(last, step, 2)
            ours.step()

    message = refusal_of(run)
    assert message is None or label("odd", 1) in message
    stepped = theirs.param_groups[0]["params"]
    expected = [v.detach() for v in (stepped if message is None else values)]
    for p, q in zip((first, odd.read(middle), last), expected, strict=True):
        torch.testing.assert_close(p.detach(), q, rtol=0, atol=1e-5)


@rich
def test_what_a_lazy_clone_was_made_of_keeps_its_value(case: Case) -> None:
    source = torch.linspace(0.5, 1, 9)
    before = source.clone()
    p = Parameter(torch._lazy_clone(source))
    p.grad = torch._lazy_clone(p.data)
    opt = case.ours([p])
    opt.step()
    assert same_bits(source, before)
    assert same_bits(p.grad, before)
    assert not torch.equal(p, before)


@rich
def test_a_lazy_clone_of_a_state_keeps_its_value(case: Case) -> None:
    """A copy-on-write snapshot of the state must not follow the training."""
    opt = case.ours(parameters(shapes=[(5,), (4, 3)]))
    train(opt, range(2))
    states = [s for state in opt.state.values() for s in state.values()]
    try:
        kept = [(torch._lazy_clone(s), s.clone()) for s in states]
    except RuntimeError:
        pytest.skip("torch cannot clone this storage lazily")
    train(opt, [2])
    assert all(same_bits(lazy, copy) for lazy, copy in kept)


STATES: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda s: s[:1].expand(s.shape),
    "sparse": lambda s: s.to_sparse(),
    "lazy": lambda s: torch._lazy_clone(s.clone()),
    "negative": lambda s: torch._neg_view(-s),
    "subclass": lambda s: s.as_subclass(Tagged),
    "other_dtype": lambda s: s.double(),
    "odd_byte": at_an_odd_byte,
    "needs_gradient": lambda s: s.requires_grad_(),
}


@pytest.mark.parametrize("name", STATES)
@rich
def test_an_odd_state_is_taken_at_its_value_or_refused_by_name(case: Case, name: str) -> None:
    values = parameters(shapes=[(5,), (4, 3)])
    ours = case.ours(named(first=values[0], odd=values[1]))
    theirs = case.torchs(clones(values))
    for opt in (ours, theirs):
        train(opt, range(2))
        state = opt.state[opt.param_groups[0]["params"][1]]
        for key in [k for k in state if k != "step"]:
            odd = STATES[name](state[key].clone())
            state[key] = odd if opt is ours else odd.detach().to_dense().float().clone()
    before = clones(values)
    message = refusal_of(lambda: train(ours, range(2, 4)))
    if message is None:
        train(theirs, range(2, 4))
        before = theirs.param_groups[0]["params"]
    assert message is None or label("odd", 1) in message
    for p, q in zip(values, before, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-5)


# ---- tensors without data


@rich
def test_a_fake_or_meta_parameter_is_followed_or_refused_by_name(case: Case) -> None:
    mode = FakeTensorMode()
    meta = Parameter(torch.ones(3, device="meta"))
    meta.grad = torch.ones(3, device="meta")
    fake = Parameter(mode.from_tensor(torch.ones(3)))
    fake.grad = mode.from_tensor(torch.ones(3))
    for odd in (meta, fake):
        real = Parameter(torch.ones(3))
        real.grad = torch.ones(3)
        opt = case.ours(named(real=real, odd=odd))
        message = refusal_of(opt.step)
        if message is not None:
            assert label("odd", 1) in message
            assert (real == 1).all()
        else:
            assert (real != 1).all()
            states = [s for k, s in opt.state[odd].items() if k != "step"]
            assert all(type(s) is type(odd.data) and s.device == odd.device for s in states)


@rich
def test_a_step_in_a_fake_world_runs_or_is_refused_by_name(case: Case) -> None:
    with FakeTensorMode():
        p = Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        opt = case.ours(named(odd=p))
        message = refusal_of(opt.step)
        assert message is None or label("odd", 0) in message
        assert message or all(s.shape in (p.shape, ()) for s in opt.state[p].values())


@rich
def test_a_fake_gradient_of_a_real_parameter_is_refused_by_name(case: Case) -> None:
    first, odd = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    first.grad, odd.grad = torch.ones(3), FakeTensorMode().from_tensor(torch.ones(3))
    opt = case.ours(named(first=first, odd=odd))
    with pytest.raises(REFUSAL, match=label("odd", 1)):
        opt.step()
    assert (first == 1).all()
    assert (odd == 1).all()


# ---- views into larger memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [1, 2, 3, 5])
@rich
def test_bucket_views_at_any_offset_give_the_bits_of_aligned_tensors(
    case: Case, offset: int, dtype: torch.dtype
) -> None:
    values = parameters(dtype, [(33,), (5, 7), (1,), (64,)])
    sizes = [v.numel() for v in values]
    flat_p, flat_g = (torch.full((sum(sizes) + offset + 9,), 7.0, dtype=dtype) for _ in range(2))
    buckets: list[Parameter] = []
    views: list[Tensor] = []
    at = offset
    for v in values:
        part = slice(at, at + v.numel())
        flat_p[part] = v.detach().reshape(-1)
        buckets.append(Parameter(flat_p[part].view(v.shape)))
        views.append(flat_g[part].view(v.shape))
        at += v.numel()
    aligned = case.ours(values)
    ours = case.ours(buckets)
    for step in range(3):
        train(aligned, [step])
        for index, (p, view) in enumerate(zip(buckets, views, strict=True)):
            view.copy_(gradient(p, step, index))
            p.grad = view
        ours.step()
    assert all(same_bits(p, q) for p, q in zip(buckets, values, strict=True))
    for flat in (flat_p, flat_g):
        assert (flat[:offset] == 7).all()
        assert (flat[at:] == 7).all()


@pytest.mark.parametrize("layout", ["sliced", "sliced_transposed", "displaced"])
def test_memory_around_a_view_stays_as_it_was(case: Case, layout: str) -> None:
    """Around the parameter, its gradient and its states lies NaN; nothing reads or writes it."""
    start = parameters(shapes=[LAYOUT_SHAPE])[0].detach()
    p = Parameter(LAYOUTS[layout](start))
    opt = case.ours([p])
    for step in range(2):
        p.grad = LAYOUTS[layout](gradient(start, step))
        opt.step()
        for key, state in opt.state[p].items():
            if key != "step":
                opt.state[p][key] = LAYOUTS[layout](state)
    p.grad = LAYOUTS[layout](gradient(start, 2))
    opt.step()
    states = [s for key, s in opt.state[p].items() if key != "step"]
    for x in (p.detach(), p.grad, *states):
        storage = torch.empty(0).set_(x.untyped_storage())
        assert x.isfinite().all()
        if x.numel() < storage.numel():
            assert int(storage.isnan().sum()) == storage.numel() - x.numel()


@pytest.mark.parametrize("layout", LAYOUTS)
@rich
def test_a_state_with_other_strides_than_its_parameter_is_paired_rightly(
    case: Case, layout: str
) -> None:
    values = parameters(shapes=[LAYOUT_SHAPE])
    ours, theirs = case.ours(values), case.torchs(clones(values))
    train(ours, range(2))
    train(theirs, range(2))
    state = ours.state[values[0]]
    for key in [k for k in state if k != "step"]:
        state[key] = LAYOUTS[layout](state[key])
    train(ours, range(2, 5))
    train(theirs, range(2, 5))
    assert_same_run(ours, theirs)


# ---- DTensor


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of one process; a store in memory needs no port."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


# torch 2.4 says that chance is another there.
@pytest.mark.filterwarnings("ignore:DTensor random operators:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=["sharded", "replicated"])
def test_a_dtensor_is_updated_through_its_local_tensor(
    case: Case, placement: Any, dtype: torch.dtype, mesh: DeviceMesh
) -> None:
    values = parameters(dtype, [(5,), (4, 3), (0, 3), (33,)])
    sharded = [Parameter(distribute_tensor(v.detach().clone(), mesh, [placement])) for v in values]
    plain, ours = case.ours(values), case.ours(sharded)
    for step in range(3):
        train(plain, [step])
        for index, (p, v) in enumerate(zip(sharded, values, strict=True)):
            p.grad = distribute_tensor(gradient(v, step, index), mesh, [placement])
        ours.step()
    for p, v in zip(sharded, values, strict=True):
        assert same_bits(p.detach().to_local(), v)
        assert list(ours.state.get(p, {})) == list(plain.state.get(v, {}))
        for key, state in ours.state.get(p, {}).items():
            if key == "step":
                assert not isinstance(state, DTensor)
                assert state == 3
            else:
                assert isinstance(state, DTensor)
                assert state.placements == p.placements
                assert same_bits(state.to_local(), plain.state[v][key])


@needs_fully_shard
@rich
def test_fsdp2_trains_to_torchs_run_and_its_checkpoint_goes_on(
    case: Case, mesh: DeviceMesh
) -> None:
    from torch.distributed.fsdp import fully_shard

    plain = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    start = {k: v.clone() for k, v in plain.state_dict().items()}

    def sharded() -> torch.nn.Module:
        model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
        model.load_state_dict(start)
        return fully_shard(model, mesh=mesh)

    def run(model: torch.nn.Module, opt: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
            opt.zero_grad()
            (model(x) ** 2).mean().backward()
            opt.step()

    model = sharded()
    theirs, ours = case.torchs(plain.parameters()), case.ours(model.parameters())
    run(plain, theirs, range(6))
    run(model, ours, range(3))
    saved = get_optimizer_state_dict(model, ours)
    fresh = case.ours(model.parameters())
    set_optimizer_state_dict(model, fresh, saved)
    run(model, fresh, range(3, 6))
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.detach().to_local(), q.detach(), rtol=0, atol=1e-5)
