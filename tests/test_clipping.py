"""Clipping, overflow and loss scaling inside the update."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from conftest import EMULATED
from reference_run import ReferenceRun, stored
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

import flatstep
from flatstep import reference
from flatstep._torch import STORED
from flatstep.optim import clipping
from flatstep.optim.table import Table

CLASSES = [flatstep.Adam, flatstep.AdamW, flatstep.RMSprop, flatstep.SGD]
every_class = pytest.mark.parametrize("cls", CLASSES)
both_norms = pytest.mark.parametrize("norm_type", [2.0, math.inf])
SCALE = 1024.0


def make(seed: int = 0, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(65, 33), (5000,), (), (7, 3)]
    params = [Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(dtype)
    return params


def options_of(cls: Any) -> dict[str, Any]:
    return {"lr": 0.01, "momentum": 0.9} if cls in (flatstep.SGD, flatstep.RMSprop) else {}


def expected_norm(params: list[Parameter], norm_type: float, unscale: float = 1.0) -> float:
    grads = [(stored(param.grad), STORED[param.grad.dtype]) for param in params]  # type: ignore
    return reference.norm(grads, norm_type, unscale)


def grads_of(params: list[Parameter]) -> list[Tensor]:
    return [param.grad.clone() for param in params if param.grad is not None]


# ---- clipping


@every_class
@both_norms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_clipping_is_torchs_within_rounding_and_the_references_to_the_bit(
    cls: Any, norm_type: float, dtype: torch.dtype
) -> None:
    ours, theirs = make(dtype=dtype), make(dtype=dtype)
    opt = cls(ours, **options_of(cls), max_grad_norm=0.5, norm_type=norm_type)
    plain = cls(theirs, **options_of(cls))
    expected = ReferenceRun(opt)
    for _ in range(3):
        before = grads_of(ours)
        expected.step()
        opt.step()
        expected.assert_same()
        assert opt.grad_norm is not None
        assert float(opt.grad_norm) == pytest.approx(expected.norm, rel=1e-7)
        assert all(torch.equal(a, b) for a, b in zip(before, grads_of(ours), strict=True))
        kept = grads_of(theirs)
        norm = clip_grad_norm_(theirs, 0.5, norm_type)
        plain.step()
        for param, grad in zip(theirs, kept, strict=True):
            param.grad = grad
        loose = {torch.float32: 1e-5, torch.float64: 1e-9}.get(dtype, 2e-2)
        assert float(norm) == pytest.approx(float(opt.grad_norm), rel=loose)
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, rtol=loose, atol=loose)


def test_gradients_below_the_norm_are_left_as_they_are() -> None:
    ours, theirs = make(), make()
    flatstep.AdamW(ours, max_grad_norm=1e6).step()
    flatstep.AdamW(theirs).step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@both_norms
def test_one_norm_is_over_all_groups_wherever_their_gradients_lie(norm_type: float) -> None:
    params = make()
    params[0].grad = params[0].grad.t().contiguous().t()  # type: ignore[union-attr]
    table = Parameter(torch.zeros(4, 3))
    table.grad = torch.eye(4, 3).to_sparse()
    late = Parameter(torch.zeros(3))
    groups = [{"params": params[:2]}, {"params": [*params[2:], table, late], "max_grad_norm": 0.1}]
    opt = flatstep.SGD(groups, lr=1.0, norm_type=norm_type)
    before = [param.detach().clone() for param in params]
    opt.step()
    dense = Parameter(torch.zeros(4, 3))
    dense.grad = torch.eye(4, 3)
    norm = expected_norm([*params, dense], norm_type)
    assert float(opt.grad_norm) == pytest.approx(norm, rel=1e-6)  # type: ignore[arg-type]
    for place, (param, was) in enumerate(zip(params, before, strict=True)):
        factor = 1.0 if place < 2 else reference.clip_factor(norm, 0.1)
        assert torch.allclose(was - param, factor * param.grad, rtol=1e-4, atol=1e-5)  # type: ignore


@both_norms
def test_neither_threads_nor_buffers_change_the_norm(norm_type: float) -> None:
    runs = []
    before = torch.get_num_threads()
    for threads, is_flat in ((1, False), (3, False), (2, True)):
        params = make()
        if is_flat:
            flatstep.FlatBuffer(params)
        opt = flatstep.SGD(params, lr=0.1, max_grad_norm=0.1, norm_type=norm_type)
        torch.set_num_threads(threads)
        opt.step()
        torch.set_num_threads(before)
        runs.append([opt.grad_norm, *params])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))  # type: ignore


def test_there_is_no_norm_before_one_was_asked_for() -> None:
    opt = flatstep.SGD(make(), lr=0.1)
    opt.step()
    assert opt.grad_norm is None
    assert opt.skipped_steps == 0


def test_groups_with_different_norms_are_refused() -> None:
    a, b = make(), make(1)
    groups = [{"params": a}, {"params": b, "norm_type": math.inf}]
    opt = flatstep.SGD(groups, lr=0.1, max_grad_norm=1.0)
    with pytest.raises(ValueError, match="norm_type differs"):
        opt.step()


# ---- norms that are not finite


@every_class
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("first", [True, False])
def test_a_norm_that_is_not_finite_raises_or_skips_and_changes_nothing(
    cls: Any, bad: float, first: bool
) -> None:
    for option in ("error_if_nonfinite", "skip_nonfinite"):
        params = make()
        opt = cls(params, **options_of(cls), max_grad_norm=1.0, ema_decay=0.9, **{option: True})
        if not first:
            opt.step()
        before = copy.deepcopy([opt.state_dict()["state"], params])
        params[1].grad[17] = bad  # type: ignore[index]
        if option == "error_if_nonfinite":
            with pytest.raises(RuntimeError, match="gradients from `parameters` is non-finite"):
                opt.step()
            assert opt.skipped_steps == 0
        else:
            opt.step()
            assert opt.skipped_steps == 1
        assert not math.isfinite(float(opt.grad_norm))
        state, was = before
        assert all(torch.equal(a, b) for a, b in zip(params, was, strict=True))
        assert opt.state_dict()["state"].keys() == state.keys()
        for index, values in opt.state_dict()["state"].items():
            assert all(torch.equal(value, state[index][key]) for key, value in values.items())
        params[1].grad[17] = 0.0  # type: ignore[index]
        fresh, clean = cls(was, **options_of(cls), ema_decay=0.9, max_grad_norm=1.0), params
        fresh.load_state_dict({**opt.state_dict(), "state": copy.deepcopy(state)})
        for param, other in zip(clean, was, strict=True):
            other.grad = param.grad.clone()  # type: ignore[union-attr]
        opt.step()
        fresh.step()
        assert all(torch.equal(a, b) for a, b in zip(params, was, strict=True))


def test_without_an_option_it_goes_through_as_in_torch() -> None:
    params = make()
    params[1].grad[17] = math.nan  # type: ignore[index]
    opt = flatstep.SGD(params, lr=0.1, max_grad_norm=1.0)
    opt.step()
    assert all(param.isnan().all() for param in params)


# ---- loss scaling


def scaled(params: list[Parameter]) -> None:
    for param in params:
        param.grad.mul_(SCALE)  # type: ignore[union-attr]


SCALERS = [torch.amp.GradScaler, flatstep.GradScaler]
every_scaler = pytest.mark.parametrize("make_scaler", SCALERS, ids=["torch", "flatstep"])


@every_class
@every_scaler
@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("writes", [False, True])
def test_a_scale_is_undone_inside(cls: Any, make_scaler: Any, clips: bool, writes: bool) -> None:
    options = {"max_grad_norm": 0.5} if clips else {}
    ours, theirs = make(), make()
    scaler = make_scaler("cpu", init_scale=SCALE)
    scaler.scale(torch.tensor(1.0))
    opt = cls(ours, fused=True, write_unscaled_grads=writes, **options_of(cls), **options)
    plain = cls(theirs, **options_of(cls), **options)
    for _ in range(2):
        scaled(ours)
        before = grads_of(ours)
        scaler.step(opt)
        scaler.update()
        plain.step()
        for own, other, grad in zip(ours, theirs, before, strict=True):
            assert torch.equal(own, other)  # a power of two rounds nothing
            expected = other.grad if writes else grad
            assert torch.equal(own.grad, expected)  # type: ignore[arg-type]
        if not writes:
            for param in ours:
                param.grad.div_(SCALE)  # type: ignore[union-attr]
        if clips:
            assert torch.equal(opt.grad_norm, plain.grad_norm)


@every_class
@every_scaler
@pytest.mark.parametrize("first", [True, False])
def test_an_overflow_changes_nothing_but_the_scale(cls: Any, make_scaler: Any, first: bool) -> None:
    params = make()
    scaler = make_scaler("cpu", init_scale=SCALE)
    scaler.scale(torch.tensor(1.0))
    opt = cls(params, fused=True, **options_of(cls), max_grad_norm=1.0)
    if not first:
        scaler.step(opt)
        scaler.update()
    before = copy.deepcopy([opt.state_dict()["state"], params])
    params[0].grad[3, 3] = math.inf  # type: ignore[index]
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == SCALE / 2
    assert all(torch.equal(a, b) for a, b in zip(params, before[1], strict=True))
    state = opt.state_dict()["state"]
    if EMULATED and first:  # the host does not know of the overflow
        assert not any(tensor.any() for of in state.values() for tensor in of.values())
    else:
        assert state.keys() == before[0].keys()
    params[0].grad[3, 3] = 1.0  # type: ignore[index]
    scaler.step(opt)
    assert not torch.equal(params[0], before[1][0])


def test_the_scaler_leaves_other_optimizers_to_torch() -> None:
    params, others = make(), make()
    scaler = flatstep.GradScaler("cpu", init_scale=SCALE)
    scaler.scale(torch.tensor(1.0))
    opt, plain = torch.optim.AdamW(params, fused=True), torch.optim.AdamW(others, fused=True)
    scaled(params)
    scaler.step(opt)
    plain.step()
    assert all(torch.allclose(a, b) for a, b in zip(params, others, strict=True))


@pytest.mark.skipif(EMULATED, reason="a GPU's sum is another function")
def test_the_scaler_reads_the_gradients_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def watch(owner: Any, name: str) -> None:
        real = owner.total

        def total(*args: Any) -> float:
            calls.append(name)
            return real(*args)  # type: ignore[no-any-return]

        monkeypatch.setattr(owner, "total", total)

    watch(Table, "plan")
    watch(clipping, "tensors")
    params = make()
    scaler = flatstep.GradScaler("cpu", init_scale=SCALE)
    scaler.scale(torch.tensor(1.0))
    opt = flatstep.AdamW(params, fused=True, max_grad_norm=1.0)
    for _ in range(3):
        scaler.step(opt)
        scaler.update()
    assert calls == ["tensors", "plan", "plan"]
