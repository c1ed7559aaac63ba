"""The way of a parameter on a GPU, on an emulated one whose memory is the host's.

Run by tools/emulate_gpu.sh; no GPU is involved. What a GPU has run is in docs/gpu.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import EMULATED, Case, clones, parameters, rich
from kernel_cases import (
    DTYPES,
    VARIANTS,
    Update,
    Variant,
    address,
    assert_same,
    copies,
    random_arrays,
)
from torch.nn import Parameter

import flatstep
from flatstep import _core

pytestmark = pytest.mark.skipif(not EMULATED, reason="not built with FLATSTEP_CUDA=EMULATED")

SHAPES = [(3, 5), (64,), (7,), (1000,), (), (0, 4), (130, 3)]
MANY = [(1 + place % 5,) for place in range(120)]


def give_gradients(params: list[Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


def assert_like_torch(ours: list[Parameter], torchs: list[Parameter]) -> None:
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_updates_go_through_the_gpu_s_loop() -> None:
    params = parameters(shapes=SHAPES)
    give_gradients(params, 0)
    opt = flatstep.Adam(params)
    opt.step()
    assert opt._table is not None
    assert opt._table.plan.devices() == [0]
    assert opt._table.plan.segments == 0


@rich
@pytest.mark.parametrize("shapes", [SHAPES, MANY], ids=["few", "many"])
def test_every_rule_follows_torch(case: Case, shapes: list[tuple[int, ...]]) -> None:
    ours = parameters(shapes=shapes)
    torchs = clones(ours)
    mine, theirs = case.ours(ours), case.torchs(torchs)
    for step in range(4):
        give_gradients(ours, step)
        give_gradients(torchs, step)
        if step == 2:  # without a gradient nothing is updated
            ours[1].grad = torchs[1].grad = None
        mine.step()
        theirs.step()
    assert_like_torch(ours, torchs)


@pytest.mark.parametrize("flat", [False, True])
def test_steps_on_the_device_are_counted_there(flat: bool) -> None:
    params = parameters(shapes=SHAPES)
    if flat:
        flatstep.FlatBuffer(params)
    opt = flatstep.AdamW(params, fused=True)
    for step in range(3):
        for param in params:
            grad = torch.full(param.shape, 0.1 * (step + 1))
            param.grad = grad if param.grad is None else param.grad.copy_(grad)
        opt.step()
    assert [opt.state[param]["step"].item() for param in params] == [3.0] * len(params)


def test_a_flat_model_is_one_row_and_has_the_bits_of_tensors() -> None:
    apart = parameters(shapes=SHAPES)
    flat = clones(apart)
    flatstep.FlatBuffer(flat)
    for params in (apart, flat):
        opt = flatstep.RMSprop(params, momentum=0.9, centered=True)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for param in params:
                grad = torch.randn(param.shape, generator=generator)
                param.grad = grad if param.grad is None else param.grad.copy_(grad)
            opt.step()
    for a, b in zip(apart, flat, strict=True):
        assert np.array_equal(a.detach().numpy(), b.detach().numpy())


def test_a_learning_rate_on_the_device_is_read_there() -> None:
    ours = parameters(shapes=SHAPES)
    torchs = clones(ours)
    lr = torch.tensor(0.01)
    mine = flatstep.Adam(ours, lr=lr, fused=True, capturable=True)
    theirs = torch.optim.Adam(torchs, lr=0.01)
    for step in range(3):
        lr.fill_(0.01 * (step + 1))
        theirs.param_groups[0]["lr"] = 0.01 * (step + 1)
        for opt, params in ((mine, ours), (theirs, torchs)):
            give_gradients(params, step)
            opt.step()
    assert_like_torch(ours, torchs)


def test_a_gradient_s_scale_and_an_overflow_are_read_on_the_device() -> None:
    ours = parameters(shapes=SHAPES)
    torchs = clones(ours)
    mine: Any = flatstep.Adam(ours, fused=True)
    theirs = torch.optim.Adam(torchs)
    for step, overflow in enumerate([0.0, 1.0, 0.0]):
        give_gradients(ours, step)
        for param in ours:
            assert param.grad is not None
            param.grad.mul_(1024)
        mine.grad_scale, mine.found_inf = torch.tensor(1024.0), torch.tensor(overflow)
        mine.step()
        if not overflow:
            give_gradients(torchs, step)
            theirs.step()
    assert_like_torch(ours, torchs)
    assert mine.state[ours[0]]["step"].item() == 2


def test_an_overflow_at_the_first_step_of_sgd_leaves_it_the_first() -> None:
    ours = parameters(shapes=SHAPES)
    torchs = clones(ours)
    options: Any = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    mine: Any = flatstep.SGD(ours, fused=True, **options)
    theirs = torch.optim.SGD(torchs, **options)
    for step, overflow in enumerate([1.0, 0.0, 0.0]):
        give_gradients(ours, step)
        mine.found_inf = torch.tensor(overflow)
        mine.step()
        if not overflow:
            give_gradients(torchs, step)
            theirs.step()
    assert_like_torch(ours, torchs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of", VARIANTS, ids=str)
def test_one_update_has_the_reference_s_bytes(of: Variant, dtype: str) -> None:
    update = Update(of, dtype, of.hyper())
    before = random_arrays(of, dtype, 300)
    found = copies(before)
    p, g, *states = (address(found[name]) for name in of.arrays)
    hyper = [update.hyper[name] for name in of.hyper_names]
    _core.update_on_gpu(
        of.rule, of.flags, update.layout, p, g, states, 300, hyper, update.step, 1.0, 0, 0
    )
    assert_same(found, update.by_reference(before), before, update)


def test_a_device_that_is_not_there_is_refused() -> None:
    of = VARIANTS[0]
    hyper = [0.0] * len(of.hyper_names)
    for device in (-1, 1):
        with pytest.raises(ValueError, match="no GPU"):
            _core.update_on_gpu(
                of.rule, of.flags, 0, 64, 64, [64] * len(of.states), 1, hyper, 1, 1.0, device, 0
            )
