"""The way of a parameter on a GPU, on an emulated one whose memory is the host's.

Run by tools/emulate_gpu.sh; no GPU is involved. What a GPU has run is in docs/gpu.md.
"""

from __future__ import annotations

import math
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
from reference_run import stored
from torch.nn import Parameter

import flatstep
from flatstep import _core, reference
from flatstep._torch import STORED
from flatstep.optim import gpu
from flatstep.verify.cases import FORMATS, draw

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


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [[1, 0, 31, 33, 16384, 40001], [7] * 130], ids=["few", "many"])
def test_the_norm_of_gradients_on_a_gpu_has_the_reference_s_bits(
    sizes: list[int], dtype: torch.dtype, norm_type: float
) -> None:
    params = parameters(dtype, [(size,) for size in sizes])
    give_gradients(params, 0)
    opt = flatstep.SGD(params, max_grad_norm=1.0, norm_type=norm_type)
    opt.step()
    grads = [(stored(param.grad), STORED[dtype]) for param in params if param.grad is not None]
    there = opt._clipped.there
    assert there is not None
    assert there.found[1].item() == reference.norm(grads, norm_type)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(opt.grad_norm, there.found[1].to(wide))  # type: ignore[arg-type]


def test_several_norms_have_the_reference_s_bits() -> None:
    sizes = {"float32": 20_000, "float64": 0, "bfloat16": 17, "float16": 16_384}
    arrays = {kind: draw(kind, size, 1, 0).grads[0] for kind, size in sizes.items()}
    stored_as = {kind: array.view(FORMATS[kind].storage) for kind, array in arrays.items()}
    for norm_type in (2.0, math.inf):
        found = gpu.norms(
            [array.ctypes.data for array in arrays.values()],
            list(sizes),
            list(sizes.values()),
            norm_type == math.inf,
            0,
        )
        for norm, (kind, array) in zip(found, stored_as.items(), strict=True):
            expected = reference.norm_total([(array, kind)], norm_type)
            assert norm == expected or (math.isnan(norm) and math.isnan(expected)), kind


def test_a_check_for_overflow_makes_no_norm() -> None:
    params = parameters(shapes=SHAPES)
    give_gradients(params, 0)
    opt = flatstep.AdamW(params, fused=True)
    opt.step()
    assert float(opt.check_gradients()) == 0.0  # type: ignore[arg-type]
    params[0].grad[0, 0] = math.nan  # type: ignore[index]
    assert float(opt.check_gradients()) == 1.0  # type: ignore[arg-type]
    assert opt.grad_norm is None


@pytest.mark.parametrize("norm_type", [2.0, math.inf])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_norm_on_a_gpu_is_what_its_gradients_are(bad: float, norm_type: float) -> None:
    params = parameters(shapes=SHAPES)
    give_gradients(params, 0)
    params[3].grad[-1] = bad  # type: ignore[index]
    opt = flatstep.SGD(params, max_grad_norm=1.0, norm_type=norm_type)
    opt.step()
    assert opt.grad_norm is not None
    torch.testing.assert_close(opt.grad_norm, torch.tensor(bad), equal_nan=True)


def test_a_step_is_left_out_on_the_gpu_and_counted_there() -> None:
    ours = parameters(shapes=SHAPES)
    others = clones(ours)
    options: Any = {"fused": True, "max_grad_norm": 0.5, "ema_decay": 0.5}
    mine = flatstep.AdamW(ours, skip_nonfinite=True, **options)
    other = flatstep.AdamW(others, **options)
    for step, is_bad in enumerate([True, False, True, True, False]):
        give_gradients(ours, step)
        if is_bad:
            ours[0].grad[0, 0] = math.nan  # type: ignore[index]
        else:
            give_gradients(others, step)
            other.step()
        mine.step()
    assert mine.skipped_steps == 3
    assert mine._clipped.skipped == 0  # by the host
    for a, b in zip(ours, others, strict=True):
        assert torch.equal(a, b)
        for name, state in other.state[b].items():
            assert torch.equal(mine.state[a][name], state), name


def test_where_the_host_counts_the_steps_it_waits_for_the_norm() -> None:
    params = parameters(shapes=SHAPES)
    before = clones(params)
    give_gradients(params, 0)
    params[0].grad[0, 0] = math.inf  # type: ignore[index]
    opt = flatstep.SGD(params, lr=0.1, momentum=0.9, max_grad_norm=1.0, skip_nonfinite=True)
    opt.step()
    assert opt._clipped.skipped == opt.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))
    assert not opt.state
    opt = flatstep.SGD(params, lr=0.1, error_if_nonfinite=True)
    with pytest.raises(RuntimeError, match="non-finite"):
        opt.step()


def test_the_scaler_s_check_is_the_pass_that_the_norm_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes: list[bool] = []
    real = gpu.Norm.add_up

    def add_up(norm: gpu.Norm, plan: Any, **options: Any) -> None:
        passes.append(options.get("overflow") is not None)
        real(norm, plan, **options)

    monkeypatch.setattr(gpu.Norm, "add_up", add_up)
    params = parameters(shapes=SHAPES)
    scaler = flatstep.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.tensor(1.0))
    opt = flatstep.AdamW(params, fused=True, max_grad_norm=1.0)
    for step in range(4):
        give_gradients(params, step)
        if step == 2:
            params[1].grad[0] = math.inf  # type: ignore[index]
        scaler.step(opt)
        scaler.update()
    assert opt.grad_norm is not None
    assert passes == [False, True, True, True]  # the first check is before there is a table
    assert scaler.get_scale() == 512.0
    assert opt.state[params[0]]["step"].item() == 3


def test_a_device_that_is_not_there_is_refused() -> None:
    of = VARIANTS[0]
    hyper = [0.0] * len(of.hyper_names)
    for device in (-1, 1):
        with pytest.raises(ValueError, match="no GPU"):
            _core.update_on_gpu(
                of.rule, of.flags, 0, 64, 64, [64] * len(of.states), 1, hyper, 1, 1.0, device, 0
            )
        with pytest.raises(ValueError, match="no GPU"):
            _core.norms_on_gpu([64], ["float32"], [1], False, device, 0, 64, 64)
        with pytest.raises(ValueError, match="no GPU"):
            _core.judge_norm_on_gpu(device, 0, 64, False, False, 0, 0)
