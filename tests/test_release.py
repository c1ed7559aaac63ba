"""Updates during backward: the same bits, and never all gradients at a time."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import flatstep

SETTINGS: dict[str, tuple[Any, torch.dtype, dict[str, Any]]] = {
    "Adam": (flatstep.Adam, torch.float32, {"amsgrad": True}),
    "AdamW": (flatstep.AdamW, torch.float32, {"ema_decay": 0.9}),
    "RMSprop": (flatstep.RMSprop, torch.float32, {"momentum": 0.9}),
    "SGD": (flatstep.SGD, torch.float32, {"momentum": 0.9, "dampening": 0.5}),
    "chance": (flatstep.SGD, torch.bfloat16, {"rounding": "stochastic", "seed": 5}),
    "split": (flatstep.AdamW, torch.bfloat16, {"master": "split", "state_dtype": torch.float32}),
    "copy": (flatstep.AdamW, torch.bfloat16, {"master": "float32"}),
}


def model_of(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 33), nn.Tanh(), nn.Linear(33, 7), nn.Linear(7, 1)).to(dtype)


def backward(model: nn.Module, step: int) -> None:
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
    model(x.to(next(model.parameters()).dtype)).square().sum().backward()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_in_backward_has_the_bits_of_step(name: str) -> None:
    cls, dtype, options = SETTINGS[name]
    model, other = model_of(dtype), model_of(dtype)
    opt = cls(model.parameters(), lr=0.01, **options)
    plain = cls(other.parameters(), lr=0.01, **options)
    schedulers = [torch.optim.lr_scheduler.StepLR(of, 1, 0.5) for of in (opt, plain)]
    with opt.step_in_backward():
        for step in range(3):
            backward(model, step)
            assert all(param.grad is None for param in model.parameters())
            opt.step()
            backward(other, step)
            plain.step()
            plain.zero_grad()
            for scheduler in schedulers:
                scheduler.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert opt.state[a].keys() == plain.state[b].keys()
        assert all(torch.equal(value, plain.state[b][key]) for key, value in opt.state[a].items())
    saved = copy.deepcopy(opt.state_dict())
    backward(model, 9)
    assert all(param.grad is not None for param in model.parameters())
    opt.step()
    plain.load_state_dict(saved)
    backward(other, 9)
    plain.step()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_a_loaded_state_is_gone_on_from() -> None:
    model, other = model_of(), model_of()
    opt, plain = (flatstep.AdamW(m.parameters(), lr=0.01) for m in (model, other))
    release = opt.step_in_backward()
    backward(model, 0)
    backward(other, 0)
    plain.step()
    plain.zero_grad()
    opt.load_state_dict(copy.deepcopy(plain.state_dict()))
    backward(model, 1)
    backward(other, 1)
    plain.step()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )
    release.remove()


def test_only_one_gradient_is_in_memory_at_a_time() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(8)))
    params = list(model.parameters())
    opt = flatstep.SGD(params, lr=0.01)
    most = 0

    def count(_: torch.Tensor) -> None:
        nonlocal most
        most = max(most, sum(param.grad is not None for param in params))

    for param in params:
        param.register_post_accumulate_grad_hook(count)
    with opt.step_in_backward():
        model(torch.randn(4, 64)).sum().backward()
    assert most == 1


def test_what_needs_all_gradients_is_refused() -> None:
    model = model_of()
    for options, name in (
        ({"max_grad_norm": 1.0}, "max_grad_norm"),
        ({"skip_nonfinite": True}, "skip_nonfinite"),
        ({"fused": True}, "fused=True"),
        ({"differentiable": True}, "differentiable=True"),
    ):
        opt = flatstep.AdamW(model.parameters(), **options)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"{name}.* and step_in_backward"):
            opt.step_in_backward()
    opt = flatstep.AdamW(model.parameters())
    with opt.step_in_backward():
        opt.param_groups[0]["max_grad_norm"] = 1.0
        with pytest.raises(ValueError, match="max_grad_norm and step_in_backward"):
            backward(model, 0)
        del opt.param_groups[0]["max_grad_norm"]
        for param in model.parameters():
            param.grad = None
    buffer = flatstep.FlatBuffer(model.parameters())
    with pytest.raises(ValueError, match="gradients=False"):
        flatstep.AdamW(model.parameters()).step_in_backward()
    del buffer
