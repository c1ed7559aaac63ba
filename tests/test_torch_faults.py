"""What torch's own fused CPU path gets wrong and flatstep gets right.

Each test fails with `torch.optim` in place of `flatstep` (2.13.0; 2.15 mended the last).
"""

from __future__ import annotations

import math

import pytest
import torch
from conftest import Case, assert_same_run, case_of, cases, give_gradients, gradient
from torch.nn import Parameter

MOMENTUM = ["momentum", "dampening_all", "nesterov_all"]
fused = cases(["Adam", "AdamW", "SGD"], ["all", "nesterov_all", "default"])


@fused
def test_nothing_is_written_beside_a_sliced_parameter(case: Case) -> None:
    runs = []
    for make, flag in ((case.ours, {"fused": True}), (case.torchs, {})):
        storage = torch.full((12, 9), 7.0)
        storage[2:10, 3:6] = torch.linspace(0.5, 1, 24).view(8, 3)
        p = Parameter(storage[2:10, 3:6])
        opt = make([p], **flag)
        for step in range(3):
            p.grad = gradient(p, step)
            opt.step()
        outside = torch.ones(12, 9, dtype=torch.bool)
        outside[2:10, 3:6] = False
        assert (storage[outside] == 7).all()
        runs.append(opt)
    assert_same_run(*runs)


@fused
def test_a_gradient_with_other_strides_meets_the_right_elements(case: Case) -> None:
    runs = []
    for make, flag in ((case.ours, {"fused": True}), (case.torchs, {})):
        p = Parameter(torch.linspace(0.5, 1, 24).view(4, 6))
        opt = make([p], **flag)
        for step in range(3):
            p.grad = gradient(p, step).t().contiguous().t()
            opt.step()
        runs.append(opt)
    assert_same_run(*runs)


@cases(["SGD"], MOMENTUM)
def test_an_overflow_on_the_first_step_leaves_no_uninitialised_momentum(case: Case) -> None:
    runs = []
    for make, flag in ((case.ours, {"fused": True}), (case.torchs, {})):
        p = Parameter(torch.linspace(0.5, 1, 4096))
        opt = make([p], **flag)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step, poison in enumerate((math.inf, 0.0, 0.0)):
            factor = gradient(p, step)
            factor[0] += poison
            opt.zero_grad()
            scaler.scale((p * factor).sum()).backward()
            junk = [torch.full((4096,), 1e30) for _ in range(8)]  # what `empty` finds afterwards
            del junk
            scaler.step(opt)
            scaler.update()
            assert step or not opt.state.get(p)
        runs.append(opt)
    assert_same_run(*runs)


@cases(["SGD"], MOMENTUM)
def test_momentum_takes_a_parameter_whose_first_gradient_comes_late(case: Case) -> None:
    runs = []
    for make, flag in ((case.ours, {"fused": True}), (case.torchs, {})):
        params = [Parameter(torch.ones(5)), Parameter(torch.ones(7))]
        opt = make(params, **flag)
        for step in range(4):
            give_gradients(params, step)
            if step < 2:
                params[1].grad = None
            opt.step()
        runs.append(opt)
    assert_same_run(*runs)


@cases(["SGD"], MOMENTUM)
def test_equal_elements_stay_equal_between_vector_body_and_tail(case: Case) -> None:
    params = [Parameter(torch.full((69,), value)) for value in torch.rand(16).tolist()]
    opt = case.ours(params, fused=True)
    for _ in range(10):
        for p in params:
            p.grad = torch.randn(1).repeat(69)
        opt.step()
    assert all((p == p[0]).all() for p in params)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_every_low_precision_element_is_updated(dtype: torch.dtype, momentum: float) -> None:
    p = Parameter(torch.ones(10_007, dtype=dtype))
    opt = case_of("SGD").ours([p], lr=0.25, momentum=momentum, fused=True)
    p.grad = torch.ones_like(p)
    opt.step()
    assert (p == 0.75).all()
    opt.step()
    assert (p == (0.5 if momentum == 0 else torch.tensor(0.75 - 0.25 * 1.9).to(dtype))).all()
