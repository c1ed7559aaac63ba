"""A flat buffer changes where parameters and gradients lie, and nothing else that can be seen."""

from __future__ import annotations

import copy
import gc
import io
import math
import pickle
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from conftest import (
    LAYOUT_SHAPE,
    LAYOUTS,
    Case,
    assert_same_run,
    assert_unchanged,
    case_of,
    cases,
    clones,
    give_gradients,
    gradient,
    parameters,
    rich,
    same_bits,
    snapshot,
    tensors_of,
    train,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter
from torch.optim import Optimizer
from torch_versions import set_grad_dtype

import flatstep
from flatstep import FlatBuffer, flatten_

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)
WAYS: dict[str, dict[str, bool]] = {
    "gradients": {},
    "parameters_only": {"gradients": False},
    "clearing": {"clear_gradients": True},
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
flat_gradients = pytest.mark.parametrize(
    "way", [WAYS["gradients"], WAYS["clearing"]], ids=["gradients", "clearing"]
)


class Net(nn.Module):
    """Convolution, recurrence, norm, frozen weights, and an embedding tied to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.conv = nn.Conv2d(4, 6, 3, padding=1).to(memory_format=torch.channels_last)
        self.frozen = nn.Linear(6, 8).requires_grad_(False)
        self.recur = nn.LSTM(8, 8)
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 11)
        self.out.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        image = x.reshape(-1, 4, 2, 1).to(self.conv.weight.dtype)
        x = x + self.frozen(self.conv(image).mean((2, 3))).view(x.shape)
        return self.out(self.norm(self.recur(x)[0]))


def net() -> Net:
    torch.manual_seed(5)
    return Net()


def loss_of(model: nn.Module, step: int) -> Tensor:
    tokens = torch.randint(0, 11, (6, 3), generator=torch.Generator().manual_seed(step))
    return nn.functional.cross_entropy(model(tokens)[:-1].flatten(0, 1), tokens[1:].flatten())


def fit(model: nn.Module, opt: Optimizer, steps: Iterable[int]) -> None:
    for step in steps:
        opt.zero_grad()
        loss_of(model, step).backward()
        opt.step()


def assert_same_model(a: nn.Module, b: nn.Module) -> None:
    values = a.state_dict(), b.state_dict()
    assert list(values[0]) == list(values[1])
    assert [name for name in values[0] if not same_bits(values[0][name], values[1][name])] == []


def is_inside(x: Tensor | None, buffers: list[Tensor]) -> bool:
    assert x is not None
    storages = [b.untyped_storage().data_ptr() for b in buffers]
    return x.untyped_storage().data_ptr() in storages


def sixteens() -> list[Parameter]:
    return parameters(shapes=[(16,), (3, 32), (48, 2)])


# ---- what stays as it was


@every_way
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_keep_their_values_shapes_and_memory_order(
    layout: str, dtype: torch.dtype, way: dict[str, bool]
) -> None:
    (start,) = parameters(dtype, [LAYOUT_SHAPE])
    p = Parameter(LAYOUTS[layout](start.detach()))
    others = parameters(dtype, [(), (5,), (0, 3)])
    stride = torch.empty_like(p, memory_format=torch.preserve_format).stride()
    buffer = FlatBuffer([others[0], p, *others[1:]], **way)
    assert type(p) is Parameter
    assert p.is_leaf
    assert p.requires_grad
    assert same_bits(p, start)
    assert p.stride() == stride
    assert is_inside(p, buffer.data)
    assert all(q.data_ptr() % 64 == 0 for q in (p, *others, *buffer.data, *buffer.grads))
    assert p.grad is None or p.grad.stride() == stride


@every_way
def test_a_module_is_the_same_module(way: dict[str, bool]) -> None:
    model = net()
    named = dict(model.named_parameters())
    before = copy.deepcopy(model.state_dict())
    flatten_(model, **way)
    assert all(named[name] is p for name, p in model.named_parameters())
    assert model.out.weight is model.embed.weight
    assert not model.frozen.weight.requires_grad
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(same_bits(after[name], before[name]) for name in before)
    assert all(after[name].stride() == before[name].stride() for name in before)


def test_a_state_dict_goes_in_and_out_in_place() -> None:
    flat, plain = net(), net()
    for p in plain.parameters():
        p.data.mul_(2)
    buffer = flatten_(flat)
    flat.load_state_dict(plain.state_dict())
    assert_same_model(flat, plain)
    buffer.check()
    net().load_state_dict(flat.state_dict())


@every_way
def test_existing_gradients_are_kept(way: dict[str, bool]) -> None:
    params = parameters(shapes=[(5,), (4, 3), (6,)])
    give_gradients(params[:2], 0)
    gradients = [p.grad for p in params]
    buffer = FlatBuffer(params, **way)
    for index, p in enumerate(params[:2]):
        assert p.grad is not None
        assert same_bits(p.grad, gradient(p, 0, index))
    if buffer.has_gradients:
        assert all(is_inside(p.grad, buffer.grads) for p in params)
        assert not params[2].grad.any()
    else:
        assert all(p.grad is g for p, g in zip(params, gradients, strict=True))
        assert buffer.grads == []


def test_frozen_parameters_have_no_gradients_and_none_are_stored_for_them() -> None:
    params = parameters(shapes=[(16,), (1600,), (32,)])
    params[1].requires_grad_(False)
    buffer = FlatBuffer(params)
    assert params[1].grad is None
    assert [data.numel() for data in buffer.data] == [1648]
    assert [grad.numel() for grad in buffer.grads] == [48]


def test_each_dtype_has_a_buffer_of_its_own_with_zeros_in_the_gaps() -> None:
    params = [p for dtype in DTYPES for p in parameters(dtype, [(3,), (16,), (2, 9)])]
    buffer = FlatBuffer(params[::-1])
    for flats in (buffer.data, buffer.grads):
        assert [flat.dtype for flat in flats] == list(DTYPES[::-1])
        assert all(flat.dim() == 1 and flat.data_ptr() % 64 == 0 for flat in flats)
    for flat in buffer.data:
        own = [p for p in params if p.dtype == flat.dtype]
        assert flat.numel() > 37
        assert (flat != 0).sum() == 37
        assert sorted(flat[flat != 0].abs().tolist()) == sorted(
            x for p in own for x in p.abs().flatten().tolist()
        )


def test_parameters_listed_twice_are_moved_once() -> None:
    params = sixteens()
    buffer = FlatBuffer([*params, *params[::-1]])
    assert sum(data.numel() for data in buffer.data) == 16 + 96 + 96


def test_a_model_of_full_lines_is_one_segment() -> None:
    params = sixteens()
    frozen = Parameter(torch.ones(32), requires_grad=False)
    FlatBuffer([params[0], frozen, *params[1:]])
    opt = flatstep.Adam([params[0], frozen, *params[1:]])
    opt.step()
    assert opt._table.plan.segments == 1
    opt.add_param_group({"params": parameters(shapes=[(16,)]), "lr": 0.5})
    train(opt, [0])
    assert opt._table.plan.segments > 1


def test_states_made_before_the_buffer_are_one_segment_after_it() -> None:
    params = sixteens()
    opt = flatstep.Adam(params)
    train(opt, [0])
    FlatBuffer(params)
    opt.step()
    assert opt._table.plan.segments == 1


# ---- training


@every_way
def test_training_has_the_bits_of_training_without(case: Case, way: dict[str, bool]) -> None:
    plain, flat = net(), net()
    buffer = flatten_(flat, **way)
    opts = case.ours(plain.parameters()), case.ours(flat.parameters())
    fit(plain, opts[0], range(4))
    fit(flat, opts[1], range(4))
    assert_same_model(flat, plain)
    assert_unchanged(opts[1], tensors_of(opts[0]))
    buffer.check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@rich
def test_every_dtype_has_the_bits_of_training_without(case: Case, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    plain, flat = case.ours(clones(params)), case.ours(params)
    FlatBuffer(params)
    for step in range(3):
        train(plain, [step])
        for index, p in enumerate(params):
            p.grad.copy_(gradient(p, step, index))
        flat.step()
    assert_unchanged(flat, tensors_of(plain))


shapes = st.lists(st.lists(st.integers(0, 20), max_size=3).map(tuple), min_size=1, max_size=10)


@rich
@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    shapes=shapes,
    way=st.sampled_from(list(WAYS.values())),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3),
    order=st.randoms(use_true_random=False),
)
def test_any_shapes_dtypes_and_order_give_the_same_bits_flat_and_not(
    case: Case,
    shapes: list[tuple[int, ...]],
    way: dict[str, bool],
    dtypes: list[torch.dtype],
    order: Any,
) -> None:
    params = [p for dtype in dtypes for p in parameters(dtype, shapes)]
    plain, flat = case.ours(clones(params)), case.ours(params)
    shuffled = params[:]
    order.shuffle(shuffled)
    FlatBuffer(shuffled, **way)
    for step in range(2):
        for opt in (plain, flat):
            opt.zero_grad()
            own = opt.param_groups[0]["params"]
            loss = sum(
                (p * gradient(p, step, i)).sum().real.to(torch.float64) for i, p in enumerate(own)
            )
            loss.backward()
            opt.step()
    assert_unchanged(flat, tensors_of(plain))


@rich
def test_a_buffer_made_in_the_middle_of_training_changes_no_bit(case: Case) -> None:
    plain, flat = net(), net()
    opts = case.ours(plain.parameters()), case.ours(flat.parameters())
    fit(plain, opts[0], range(2))
    fit(flat, opts[1], range(2))
    flatten_(flat)
    fit(plain, opts[0], range(2, 4))
    fit(flat, opts[1], range(2, 4))
    assert_same_model(flat, plain)


@rich
def test_a_backward_through_an_outdated_flat_parameter_is_caught(case: Case) -> None:
    params = parameters(shapes=[(5,), (4, 3)])
    FlatBuffer(params)
    opt = case.ours(params)
    loss = sum((p**2).sum() for p in params)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_parameter_that_backward_does_not_reach_has_a_zero_gradient() -> None:
    """As with `zero_grad(set_to_none=False)` in torch."""
    used, unused = parameters(shapes=[(5,), (4, 3)])
    theirs = clones([used, unused])
    FlatBuffer([used, unused])
    opts = flatstep.AdamW([used, unused]), torch.optim.AdamW(theirs)
    theirs[1].grad = torch.zeros(4, 3)
    for opt in opts:
        for _ in range(3):
            opt.zero_grad(set_to_none=False)
            opt.param_groups[0]["params"][0].sum().backward()
            opt.step()
    assert_same_run(*opts)


@rich
@flat_gradients
def test_gradients_accumulate(case: Case, way: dict[str, bool]) -> None:
    plain, flat = net(), net()
    flatten_(flat, **way)
    opts = case.ours(plain.parameters()), case.ours(flat.parameters())
    for model, opt in zip((plain, flat), opts, strict=True):
        for step in range(3):
            opt.zero_grad()
            for part in range(3):
                loss_of(model, 10 * step + part).backward()
            opt.step()
    assert_same_model(flat, plain)


# ---- clearing


@flat_gradients
def test_zero_grad_clears_in_place(way: dict[str, bool]) -> None:
    params = sixteens()
    buffer = FlatBuffer(params, **way)
    opt = flatstep.SGD(params)
    gradients = [p.grad for p in params]
    for set_to_none in (True, False):
        buffer.grads[0].fill_(1)
        opt.zero_grad(set_to_none=set_to_none)
        assert all(p.grad is g for p, g in zip(params, gradients, strict=True))
        assert not buffer.grads[0].any()


def test_the_gradient_is_only_read_unless_clearing_is_asked_for(case: Case) -> None:
    params = sixteens()
    buffer = FlatBuffer(params)
    buffer.grads[0].fill_(1)
    opt = case.ours(params)
    opt.step()
    assert (buffer.grads[0] == 1).all()


def test_a_clearing_step_leaves_zeros_and_zero_grad_nothing_to_do(case: Case) -> None:
    model = net()
    buffer = flatten_(model, clear_gradients=True)
    opt = case.ours(model.parameters())
    (flat,) = buffer.grads
    for step in range(3):
        loss_of(model, step).backward()
        assert flat.any()
        before = flat._version
        opt.step()
        assert not flat.any()
        assert flat._version > before
        before = flat._version
        opt.zero_grad()
        buffer.zero_grad()
        assert flat._version == before
        assert all(is_inside(p.grad, [flat]) for p in model.parameters() if p.requires_grad)


def test_zero_grad_clears_what_a_backward_has_added_since_the_clearing_step() -> None:
    model = net()
    buffer = flatten_(model, clear_gradients=True)
    opt = flatstep.Adam(model.parameters())
    fit(model, opt, range(2))
    loss_of(model, 2).backward()
    assert buffer.grads[0].any()
    opt.zero_grad()
    assert not buffer.grads[0].any()


@rich
def test_a_loop_without_zero_grad_is_right_where_the_step_clears(case: Case) -> None:
    plain, flat = net(), net()
    flatten_(flat, clear_gradients=True)
    opts = case.ours(plain.parameters()), case.ours(flat.parameters())
    fit(plain, opts[0], range(4))
    for step in range(4):
        loss_of(flat, step).backward()
        opts[1].step()
    assert_same_model(flat, plain)


def test_a_clearing_step_clears_what_it_updates_through_torch() -> None:
    params = sixteens()
    buffer = FlatBuffer(params, clear_gradients=True)
    opt = flatstep.SGD(params, momentum=0.9)
    opt.step()
    _foreign_state(params[1], opt)
    before = params[1].detach().clone()
    buffer.grads[0].fill_(1)
    opt.step()
    assert not torch.equal(params[1], before)
    assert not buffer.grads[0].any()


def _replaced(p: Parameter, opt: Optimizer) -> None:
    p.grad = torch.ones(p.shape)


def _replaced_data(p: Parameter, opt: Optimizer) -> None:
    p.grad.data = torch.ones(p.shape)


def _no_gradient(p: Parameter, opt: Optimizer) -> None:
    p.grad = None


def _foreign_state(p: Parameter, opt: Optimizer) -> None:
    state = opt.state[p]
    state["momentum_buffer"] = state["momentum_buffer"].double()


def _strided_gradient(p: Parameter, opt: Optimizer) -> None:
    p.grad.data = torch.ones(1).expand(p.shape)


ODDITIES = [_replaced, _replaced_data, _no_gradient, _foreign_state, _strided_gradient]


@pytest.mark.parametrize("oddity", ODDITIES)
@flat_gradients
def test_no_stale_gradient_is_left_where_one_parameter_goes_its_own_way(
    way: dict[str, bool], oddity: Callable[[Parameter, Optimizer], None]
) -> None:
    """Whatever the step cleared, zero_grad() brings all gradients home, and zero."""
    case = case_of("SGD", "momentum")
    params = sixteens()
    buffer = FlatBuffer(params, **way)
    ours, theirs = case.ours(params), case.torchs(clones(params))
    for step in range(3):
        for opt in (ours, theirs):
            opt.zero_grad()
            own = opt.param_groups[0]["params"]
            sum((p * gradient(p, step, i)).sum() for i, p in enumerate(own)).backward()
            if step == 1 and (opt is ours or oddity is not _foreign_state):
                oddity(own[1], opt)
            opt.step()
    ours.zero_grad()
    assert all(is_inside(p.grad, buffer.grads) for p in params)
    assert not any(p.grad.any() for p in params)
    for p, q in zip(params, theirs.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-5)


def test_a_gradient_that_was_set_aside_during_a_clearing_step_is_still_cleared() -> None:
    params = sixteens()
    FlatBuffer(params, clear_gradients=True)
    opt = flatstep.SGD(params)
    opt.step()
    aside = params[1].grad
    aside.fill_(1)
    params[1].grad = None
    opt.step()
    params[1].grad = aside
    opt.zero_grad()
    assert not aside.any()


@rich
@flat_gradients
def test_a_zero_grad_of_the_model_may_come_in_between(case: Case, way: dict[str, bool]) -> None:
    """It sets the gradients to None; the optimizer's puts the flat ones back."""
    plain, flat = net(), net()
    buffer = flatten_(flat, **way)
    opts = case.ours(plain.parameters()), case.ours(flat.parameters())
    for model, opt in zip((plain, flat), opts, strict=True):
        for step in range(4):
            (model if step in (1, 2) else opt).zero_grad()
            loss_of(model, step).backward()
            opt.step()
    assert_same_model(flat, plain)
    flat.zero_grad()
    with pytest.raises(RuntimeError, match=r"gradient of parameter 'embed\.weight' has left"):
        buffer.grads  # noqa: B018
    opts[1].zero_grad()
    assert all(is_inside(p.grad, buffer.grads) for p in flat.parameters() if p.requires_grad)


@flat_gradients
def test_a_parameter_frozen_later_is_left_alone_and_one_thawed_later_is_trained(
    way: dict[str, bool],
) -> None:
    plain, flat = net(), net()
    flatten_(flat, **way)
    opts = flatstep.AdamW(plain.parameters()), flatstep.AdamW(flat.parameters())
    for model, opt in zip((plain, flat), opts, strict=True):
        fit(model, opt, range(2))
        opt.zero_grad()
        model.conv.requires_grad_(False)
        model.frozen.requires_grad_(True)
        fit(model, opt, range(2, 5))
        opt.zero_grad()
        model.conv.requires_grad_(True)
        fit(model, opt, range(5, 7))
    assert_same_model(flat, plain)


@flat_gradients
def test_an_optimizer_clears_the_gradients_of_its_own_parameters_only(
    way: dict[str, bool],
) -> None:
    params = sixteens()
    buffer = FlatBuffer(params, **way)
    first, second = flatstep.SGD(params[:1]), flatstep.SGD(params[1:])
    clearing = buffer.clears_gradients
    for p in params:
        p.grad.fill_(1)
    first.step()
    assert [bool(p.grad.any()) for p in params] == [not clearing, True, True]
    first.zero_grad()
    assert [bool(p.grad.any()) for p in params] == [False, True, True]
    second.zero_grad()
    assert not any(p.grad.any() for p in params)


@rich
@flat_gradients
def test_two_optimizers_share_a_buffer(case: Case, way: dict[str, bool]) -> None:
    plain, flat = net(), net()
    flatten_(flat, **way)
    for model in (plain, flat):
        params = list(model.parameters())
        opts = [case.ours(params[:3]), case.ours(params[3:], lr=0.01)]
        for step in range(3):
            for opt in opts:
                opt.zero_grad()
            loss_of(model, step).backward()
            for opt in opts:
                opt.step()
    assert_same_model(flat, plain)


@flat_gradients
def test_parameters_outside_the_buffer_are_cleared_as_in_torch(way: dict[str, bool]) -> None:
    inside, outside = sixteens(), sixteens()
    FlatBuffer(inside, **way)
    opt = flatstep.SGD([*inside, *outside])
    give_gradients(outside, 0)
    opt.zero_grad(set_to_none=False)
    assert all(p.grad is not None and not p.grad.any() for p in outside)
    opt.zero_grad()
    assert all(p.grad is None for p in outside)
    opt.param_groups[0]["params"][0] = outside[0]  # in the same list
    give_gradients(outside, 0)
    opt.zero_grad()
    assert outside[0].grad is None


# ---- GradScaler, checkpoints


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])
@flat_gradients
@cases(["Adam", "AdamW", "SGD"], ["default", "momentum", "all", "nesterov_all"])
def test_a_scaled_run_has_the_bits_of_one_without(
    case: Case, way: dict[str, bool], fused: bool
) -> None:
    plain, flat = net(), net()
    buffer = flatten_(flat, **way)
    for model in (plain, flat):
        opt = case.ours(model.parameters(), fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
        for step in range(5):
            opt.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            if step in (0, 3):
                model.norm.weight.grad[0] = math.inf
            scaler.step(opt)
            scaler.update()
        assert scaler.get_scale() == 256.0
    assert_same_model(flat, plain)
    assert buffer.grads[0].isfinite().all()


@every_way
@pytest.mark.parametrize("to_flat", [True, False], ids=["from_torch", "to_torch"])
@rich
def test_a_checkpoint_goes_on_in_the_other_library(
    case: Case, to_flat: bool, way: dict[str, bool]
) -> None:
    plain, flat = net(), net()
    flatten_(flat, **way)
    theirs, ours = case.torchs(plain.parameters()), case.ours(flat.parameters())
    (before, first), (after, second) = (
        ((plain, theirs), (flat, ours)) if to_flat else ((flat, ours), (plain, theirs))
    )
    fit(before, first, range(3))
    after.load_state_dict(before.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    fit(before, first, range(3, 5))
    fit(after, second, range(3, 5))
    for p, q in zip(plain.parameters(), flat.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-5)


def test_loading_by_assignment_takes_the_module_out_of_the_buffer() -> None:
    plain, flat = net(), net()
    buffer = flatten_(flat)
    flat.load_state_dict(net().state_dict(), assign=True)
    flat.out.weight = flat.embed.weight
    plain.out.weight = plain.embed.weight
    assert not is_inside(flat.embed.weight, buffer.data)
    opts = flatstep.Adam(plain.parameters()), flatstep.Adam(flat.parameters())
    fit(plain, opts[0], range(3))
    fit(flat, opts[1], range(3))
    assert_same_model(flat, plain)


# ---- moves after flattening

MOVES: dict[str, Callable[[nn.Module], Any]] = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "to_float64": lambda model: model.to(torch.float64),
    "data": lambda model: [setattr(p, "data", p.data.clone()) for p in model.parameters()],
    "one_data": lambda model: setattr(model.out.bias, "data", model.out.bias.data.clone()),
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
}


def small() -> nn.Module:
    torch.manual_seed(5)
    model = nn.Module()
    model.conv = nn.Conv2d(2, 4, 3, padding=1)
    model.out = nn.Linear(4, 3)
    model.forward = lambda x: model.out(model.conv(x).mean((2, 3)))
    return model


def fit_small(model: nn.Module, opt: Optimizer, steps: Iterable[int], zero: bool = True) -> None:
    for step in steps:
        if zero:
            opt.zero_grad()
        x = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(step))
        model.forward(x.to(model.out.bias.dtype)).square().mean().backward()
        opt.step()


@pytest.mark.parametrize("move", MOVES)
@every_way
@rich
def test_a_model_moved_out_of_its_buffer_is_followed_or_refused_by_name(
    case: Case, way: dict[str, bool], move: str
) -> None:
    plain, flat = small(), small()
    buffer = flatten_(flat, **way)
    opts = case.ours(plain.parameters()), case.ours(flat.parameters())
    fit_small(plain, opts[0], range(2))
    fit_small(flat, opts[1], range(2))
    for model, opt in zip((plain, flat), opts, strict=True):
        opt.zero_grad()
        MOVES[move](model)
        fit_small(model, opt, [2], zero=False)
    assert_same_model(flat, plain)
    with pytest.raises(RuntimeError, match=r"parameter '\w+\.\w+' has left its FlatBuffer"):
        buffer.check()
    if buffer.has_gradients:
        with pytest.raises(RuntimeError, match=r"parameter '\w+\.\w+' has left its FlatBuffer"):
            opts[1].zero_grad()
    flatten_(flat, **way)
    fit_small(plain, opts[0], range(3, 5))
    fit_small(flat, opts[1], range(3, 5))
    assert_same_model(flat, plain)


def test_a_model_that_was_moved_before_its_first_zero_grad_is_refused_by_name() -> None:
    model = small()
    flatten_(model)
    fit_small(model, flatstep.SGD(model.parameters()), [0], zero=False)
    model.bfloat16()
    opt = flatstep.SGD(model.parameters())
    with pytest.raises(RuntimeError, match=r"parameter 'conv\.weight' has left its FlatBuffer"):
        opt.zero_grad()
    flatten_(model)
    opt.zero_grad()
    assert not any(p.grad.any() for p in model.parameters())


@every_way
def test_a_move_that_moves_nothing_is_none(way: dict[str, bool]) -> None:
    model = net()
    buffer = flatten_(model, **way)
    opt = flatstep.Adam(model.parameters())
    fit(model, opt, range(2))
    model.float().cpu().to("cpu", torch.float32)
    fit(model, opt, range(2))
    buffer.check()


@pytest.mark.skipif(not hasattr(torch.Tensor, "share_memory_"), reason="no shared memory")
@flat_gradients
def test_a_buffer_moves_to_shared_memory_whole(way: dict[str, bool]) -> None:
    plain, flat = net(), net()
    buffer = flatten_(flat, **way)
    opts = flatstep.Adam(plain.parameters()), flatstep.Adam(flat.parameters())
    fit(plain, opts[0], range(2))
    fit(flat, opts[1], range(2))
    flat.share_memory()
    assert all(p.is_shared() for p in flat.parameters())
    fit(plain, opts[0], range(2, 4))
    fit(flat, opts[1], range(2, 4))
    assert_same_model(flat, plain)
    buffer.check()


@every_way
def test_swapping_other_weights_in_and_out_again_is_no_move(way: dict[str, bool]) -> None:
    """As averaged weights are, for an evaluation."""
    model = net()
    buffer = flatten_(model, **way)
    opt = flatstep.Adam(model.parameters())
    fit(model, opt, range(2))
    own = [p.data for p in model.parameters()]
    for p in model.parameters():
        p.data = torch.zeros_like(p.data)
    for p, data in zip(model.parameters(), own, strict=True):
        p.data = data
    fit(model, opt, range(2))
    buffer.check()


# ---- several buffers


@flat_gradients
def test_a_newer_buffer_takes_over(way: dict[str, bool]) -> None:
    plain, flat = net(), net()
    opts = flatstep.Adam(plain.parameters()), flatstep.Adam(flat.parameters())
    old = flatten_(flat)
    fit(plain, opts[0], range(2))
    fit(flat, opts[1], range(2))
    loss_of(plain, 9).backward()
    loss_of(flat, 9).backward()
    new = FlatBuffer(list(flat.parameters())[:4], **way)  # the rest stays
    assert is_inside(flat.embed.weight.grad, new.grads)
    opts[0].step()
    opts[1].step()
    fit(plain, opts[0], range(2, 5))
    fit(flat, opts[1], range(2, 5))
    assert_same_model(flat, plain)
    new.check()
    old.zero_grad()
    with pytest.raises(RuntimeError, match=r"parameter 'embed\.weight' has left"):
        old.data  # noqa: B018


def test_a_buffer_lives_exactly_as_long_as_its_parameters() -> None:
    model = net()
    buffer = flatten_(model, clear_gradients=True)
    data, dead = weakref.ref(buffer.data[0]), weakref.ref(buffer)
    opt = flatstep.Adam(model.parameters())
    fit(model, opt, range(2))
    del buffer
    gc.collect()
    assert dead() is not None
    fit(model, opt, range(2, 4))
    del model, opt
    gc.collect()
    assert dead() is None
    assert data() is None


def test_an_older_buffer_is_freed_when_a_newer_one_takes_over() -> None:
    params = sixteens()
    opt = flatstep.Adam(params)
    old = weakref.ref(FlatBuffer(params, clear_gradients=True))
    opt.step()
    opt.zero_grad()
    FlatBuffer(params)
    opt.step()
    opt.zero_grad()
    gc.collect()
    assert old() is None


# ---- copies


class Holder(nn.Module):
    """A module that keeps its buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()
        self.buffer = flatten_(self, clear_gradients=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)


def through_a_file(x: Any) -> Any:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "torch_save": through_a_file,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@rich
def test_a_copied_model_and_optimizer_go_on_alone(case: Case, copied: Callable[[Any], Any]) -> None:
    model = net()
    flatten_(model, clear_gradients=True)
    opt = case.ours(model.parameters())
    fit(model, opt, range(2))
    before = snapshot(opt)
    twin, twin_opt = copied((model, opt))
    fit(twin, twin_opt, range(2, 4))
    assert_unchanged(opt, before)
    fit(model, opt, range(2, 4))
    assert_same_model(twin, model)
    assert twin.out.weight is twin.embed.weight


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copied_buffer_is_one_of_the_copied_parameters(copied: Callable[[Any], Any]) -> None:
    model = Holder()
    opt = flatstep.Adam(model.parameters())
    fit(model, opt, range(2))
    twin, twin_opt = copied((model, opt))
    assert is_inside(twin.net.embed.weight, twin.buffer.data)
    assert twin.buffer.clears_gradients
    fit(twin, twin_opt, range(2, 4))
    assert not twin.buffer.grads[0].any()
    fit(model, opt, range(2, 4))
    assert_same_model(twin, model)


def test_a_saved_model_holds_the_buffer_once() -> None:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(8)])
    sizes = []
    for _ in range(2):
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        sizes.append(file.tell())
        flatten_(model)
    assert sizes[1] <= sizes[0] + 4096


def test_a_buffer_made_under_inference_mode_can_be_trained() -> None:
    model = net()
    with torch.inference_mode():
        flatten_(model)
    fit(model, flatstep.Adam(model.parameters()), range(2))


# ---- refusals


class Tagged(torch.Tensor):
    """A subclass that adds nothing."""


def _freed() -> Parameter:
    p = Parameter(torch.ones(4, 2))
    p.untyped_storage().resize_(0)
    return p


def _made_under_inference_mode() -> Parameter:
    with torch.inference_mode():
        return Parameter(torch.ones(4, 2))


def _with_gradient(change: Callable[[Tensor], Tensor]) -> Callable[[], Parameter]:
    def make() -> Parameter:
        p = Parameter(torch.ones(4, 2))
        p.grad = change(torch.ones(4, 2))
        return p

    return make


def _with_gradient_dtype() -> Parameter:
    p = Parameter(torch.ones(4, 2))
    set_grad_dtype(p, torch.float8_e4m3fn)
    return p


UNUSABLE: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "expanded": (ValueError, "share memory", lambda: Parameter(torch.ones(1).expand(4, 2))),
    "partly_overlapping": (
        ValueError,
        "share memory",
        lambda: Parameter(torch.ones(20).as_strided((4, 2), (1, 1))),
    ),
    "sparse": (TypeError, "strided", lambda: torch.ones(4, 2).to_sparse()),
    "meta": (TypeError, "on meta", lambda: Parameter(torch.ones(4, 2, device="meta"))),
    "fake": (TypeError, "FakeTensor", lambda: FakeTensorMode().from_tensor(torch.ones(4, 2))),
    "integer": (TypeError, "int64", lambda: torch.ones(4, 2, dtype=torch.int64)),
    "subclass": (TypeError, "Tagged", lambda: torch.ones(4, 2).as_subclass(Tagged)),
    "functional": (TypeError, "Tensor", lambda: torch._to_functional_tensor(torch.ones(4, 2))),
    "non_leaf": (TypeError, "leaf", lambda: Parameter(torch.ones(4, 2)) * 2),
    "negative": (TypeError, "plain memory", lambda: torch._neg_view(torch.ones(4, 2))),
    "conjugate": (
        TypeError,
        "plain memory",
        lambda: torch.ones(4, 2, dtype=torch.complex64).conj(),
    ),
    "freed": (ValueError, "no memory", _freed),
    "inference": (ValueError, "inference_mode", _made_under_inference_mode),
    "no_tensor": (TypeError, "str", lambda: "weight"),
    "sparse_gradient": (TypeError, "sparse_coo", _with_gradient(lambda g: g.to_sparse())),
    "subclass_gradient": (TypeError, "gradient", _with_gradient(lambda g: g.as_subclass(Tagged))),
    "gradient_dtype": (TypeError, "float8_e4m3fn", _with_gradient_dtype),
}


@pytest.mark.parametrize("named", [True, False], ids=["named", "numbered"])
@pytest.mark.parametrize("fault", UNUSABLE)
def test_an_unusable_parameter_is_named_and_none_is_moved(fault: str, named: bool) -> None:
    error, words, make = UNUSABLE[fault]
    params = parameters(torch.float64, [(3,)]) + parameters(shapes=[(5,), (6,)])
    give_gradients(params, 0)
    before = [(p.data_ptr(), p.grad) for p in params]
    odd = make()
    given: list[Any] = [*params[:2], odd, params[2]]
    if named:
        given = list(zip(("first", "second", "layer.odd", "last"), given, strict=True))
    with pytest.raises(error, match=words) as refusal:
        FlatBuffer(given)
    assert ("parameter 'layer.odd'" if named else "parameter 2 ") in str(refusal.value)
    assert all(
        p.data_ptr() == at and p.grad is g for p, (at, g) in zip(params, before, strict=True)
    )


@pytest.mark.parametrize("overlap", [(0, 8), (4, 12)], ids=["wholly", "partly"])
def test_parameters_that_share_memory_are_named_and_not_moved(overlap: tuple[int, int]) -> None:
    storage = torch.rand(12)
    first, second = Parameter(storage[:8]), Parameter(storage[slice(*overlap)])
    third = Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"'a', 'c' share memory"):
        FlatBuffer([("a", first), ("b", third), ("c", second)])
    assert first.data_ptr() == storage.data_ptr()


def test_gradients_that_do_not_fit_stay_where_only_parameters_move() -> None:
    p = _with_gradient(lambda g: g.to_sparse())()
    buffer = FlatBuffer([p], gradients=False)
    assert p.grad.is_sparse
    assert is_inside(p, buffer.data)


def test_a_buffer_needs_parameters_and_gradients_to_clear() -> None:
    with pytest.raises(ValueError, match="FlatBuffer got no parameters"):
        FlatBuffer([])
    with pytest.raises(TypeError, match="an iterable of parameters, not one tensor"):
        FlatBuffer(torch.ones(3, 4))
    with pytest.raises(ValueError, match="clear_gradients needs gradients=True"):
        FlatBuffer(sixteens(), gradients=False, clear_gradients=True)


def test_a_sparse_gradient_lands_in_the_flat_one() -> None:
    """Autograd adds it there; the update is that of a dense gradient."""
    dense, flat = nn.Embedding(7, 3), nn.Embedding(7, 3, sparse=True)
    flat.load_state_dict(dense.state_dict())
    flatten_(flat)
    for model in (dense, flat):
        opt = flatstep.SGD(model.parameters(), momentum=0.9)
        for step in range(3):
            opt.zero_grad()
            model(torch.tensor([step, 5, 5])).square().sum().backward()
            opt.step()
    assert_same_model(flat, dense)
