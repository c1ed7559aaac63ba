"""Exponential moving averages of the weights, kept by the step."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter
from torch_versions import named_or_not

import flatstep

CLASSES = [flatstep.Adam, flatstep.AdamW, flatstep.RMSprop, flatstep.SGD]
DECAY = 0.9


def model_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(33, 17), nn.Tanh(), nn.Linear(17, 5)).to(dtype)


def train(model: nn.Module, opt: Any, steps: int) -> None:
    generator = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        opt.step()


@pytest.mark.parametrize("cls", CLASSES)
def test_an_average_follows_the_weights(cls: Any) -> None:
    model = model_of()
    opt = cls(model.parameters(), lr=0.01, ema_decay=DECAY)
    averages = [param.detach().clone() for param in model.parameters()]
    for _ in range(5):
        train(model, opt, 1)
        torch._foreach_lerp_(averages, [p.detach() for p in model.parameters()], 1 - DECAY)
    for param, average in zip(model.parameters(), averages, strict=True):
        assert torch.allclose(opt.state[param]["average"], average, rtol=1e-6, atol=1e-7)
        assert not torch.allclose(param, average, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_model_has_the_averages_inside_and_its_weights_again_outside(
    dtype: torch.dtype,
) -> None:
    model = model_of(dtype)
    opt = flatstep.AdamW(model.parameters(), lr=0.01, ema_decay=DECAY)
    train(model, opt, 3)
    before = [param.detach().clone() for param in model.parameters()]
    with opt.average_parameters():
        for param, was in zip(model.parameters(), before, strict=True):
            assert torch.equal(param, opt.state[param]["average"].to(dtype))
            assert not torch.equal(param, was)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    with pytest.raises(ZeroDivisionError), opt.average_parameters():
        1 / 0  # noqa: B018
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    other, fresh = copy.deepcopy((opt, model))
    train(model, opt, 1)
    train(fresh, other, 1)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), fresh.parameters(), strict=True)
    )


def test_masters_do_not_take_the_averages_for_weights() -> None:
    model = model_of(torch.bfloat16)
    opt = flatstep.AdamW(model.parameters(), lr=0.01, ema_decay=DECAY, master="float32")
    train(model, opt, 3)
    before = [master.clone() for master in opt.master_parameters()]
    with opt.average_parameters():
        pass
    opt.param_groups[0]["lr"] = 0.0
    train(model, opt, 1)
    assert all(torch.equal(p, q) for p, q in zip(opt.master_parameters(), before, strict=True))


@named_or_not
def test_averages_go_into_another_module(named: bool) -> None:
    model = model_of()
    frozen = copy.deepcopy(model)
    params: Any = reversed(list(model.named_parameters())) if named else model.parameters()
    opt = flatstep.SGD(params, lr=0.1, ema_decay=DECAY)
    train(model, opt, 3)
    opt.copy_average_to(frozen)
    for param, copied in zip(model.parameters(), frozen.parameters(), strict=True):
        assert torch.equal(copied, opt.state[param]["average"])
    if named:
        with pytest.raises(ValueError, match=r"the module has no parameter '2\.bias'"):
            opt.copy_average_to(nn.Linear(33, 17))
    else:
        with pytest.raises(ValueError, match=r"construct it with model\.named_parameters"):
            opt.copy_average_to(nn.Linear(33, 17))


def test_a_parameter_that_never_had_a_gradient_is_its_own_average() -> None:
    a, b = Parameter(torch.ones(3)), Parameter(torch.full((2,), 5.0))
    opt = flatstep.SGD([a, b], lr=0.1, ema_decay=DECAY)
    a.grad = torch.ones(3)
    opt.step()
    with opt.average_parameters():
        assert torch.equal(b, torch.full((2,), 5.0))
    other = nn.ParameterList([torch.zeros(3), torch.zeros(2)])
    opt.copy_average_to(other)
    assert torch.equal(other[1], b)


def test_without_averages_it_says_what_to_do() -> None:
    opt = flatstep.SGD([Parameter(torch.ones(3))], lr=0.1)
    with pytest.raises(RuntimeError, match="construct the optimizer with ema_decay"):
        opt.copy_average_to(nn.Linear(1, 1))
    with pytest.raises(RuntimeError, match="no averages"), opt.average_parameters():
        pass
