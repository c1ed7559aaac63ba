"""Training with flatstep gives what training with torch's for-loop gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import (
    GRADIENT_LAYOUTS,
    LAYOUT_SHAPE,
    LAYOUTS,
    Case,
    assert_same_run,
    case_of,
    cases,
    clones,
    give_gradients,
    gradient,
    parameters,
    rich,
    same_bits,
    train,
)
from torch import Tensor
from torch.nn import Parameter
from torch_versions import (
    NEWER_KEYS,
    needs_decoupled,
    needs_gradient_by_lr,
    needs_lr_of_one_dimension,
    needs_tensor_betas,
    set_grad_dtype,
)

import flatstep

STEPS = 20
LARGE_LR = 0.03  # at 1e-3 most bfloat16 parameters would not move


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128], ids=str
)
def test_twenty_steps_agree_with_torch(case: Case, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    ours, theirs = case.ours(params), case.torchs(clones(params))
    train(ours, range(STEPS))
    train(theirs, range(STEPS))
    assert_same_run(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_computed_in_float32_and_rounded_once(
    case: Case, dtype: torch.dtype
) -> None:
    """torch's formula in float32 on rounded storage; its own bf16 path rounds every operation."""
    params = parameters(dtype)
    ours = case.ours(params, lr=LARGE_LR)
    shadows = [Parameter(p.detach().float()) for p in params]
    theirs = case.torchs(shadows, lr=LARGE_LR)
    largest_move = 0.0
    for step in range(STEPS):
        train(ours, [step])
        for index, (p, shadow) in enumerate(zip(params, shadows, strict=True)):
            shadow.grad = gradient(p, step, index).float()
        before = torch.cat([s.detach().reshape(-1) for s in shadows])
        theirs.step()
        after = torch.cat([s.detach().reshape(-1) for s in shadows])
        largest_move = max(largest_move, float((after - before).abs().max()))
        with torch.no_grad():
            for shadow in shadows:
                shadow.copy_(shadow.to(dtype))
                for key, state in theirs.state[shadow].items():
                    if key != "step":
                        state.copy_(state.to(dtype))
    ours_flat = torch.cat([p.detach().float().reshape(-1) for p in params])
    theirs_flat = torch.cat([s.detach().reshape(-1) for s in shadows])
    ulp = torch.finfo(dtype).eps * theirs_flat.abs().clamp_min(largest_move)
    assert ((ours_flat - theirs_flat).abs() <= 2 * ulp).all()
    assert (ours_flat == theirs_flat).float().mean() > 0.97
    for p, shadow in zip(params, shadows, strict=True):
        assert list(ours.state.get(p, {})) == list(theirs.state.get(shadow, {}))
        for key, state in ours.state.get(p, {}).items():
            assert state.dtype == (torch.float32 if key == "step" else dtype)
            if state.numel() > 100:
                assert (state.float() == theirs.state[shadow][key]).float().mean() > 0.97


@rich
@pytest.mark.parametrize("gradient_layout", GRADIENT_LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_of_parameter_and_gradient(
    case: Case, layout: str, gradient_layout: str
) -> None:
    (start,) = parameters(shapes=[LAYOUT_SHAPE])
    runs = []
    for make in (case.ours, case.torchs):
        p = Parameter(LAYOUTS[layout](start.detach()))
        opt = make([p])
        for step in range(3):
            p.grad = GRADIENT_LAYOUTS[gradient_layout](gradient(p, step))
            opt.step()
        runs.append(opt)
    assert_same_run(*runs)


@rich
def test_strides_may_change_from_step_to_step(case: Case) -> None:
    (start,) = parameters(shapes=[LAYOUT_SHAPE])
    runs = []
    for make in (case.ours, case.torchs):
        p = Parameter(start.detach().clone())
        opt = make([p])
        for step, layout in enumerate(GRADIENT_LAYOUTS):
            p.grad = GRADIENT_LAYOUTS[layout](gradient(p, step))
            if step == 2:
                p.data = p.data.clone(memory_format=torch.channels_last)
            opt.step()
        runs.append(opt)
    assert_same_run(*runs)


@rich
def test_mixed_dtypes_in_one_group(case: Case) -> None:
    dtypes = (torch.float32, torch.float64, torch.complex64, torch.float32)
    params = [p for d in dtypes for p in parameters(d, [(5,), (3, 4)])]
    ours, theirs = case.ours(params), case.torchs(clones(params))
    train(ours, range(5))
    train(theirs, range(5))
    assert_same_run(ours, theirs)


@rich
def test_a_gradient_of_another_dtype_is_taken_at_its_value(case: Case) -> None:
    params = parameters(torch.float32, [(9,), (4, 5)])
    ours, theirs = case.ours(params), case.torchs(clones(params))
    for step in range(3):
        for i, (p, q) in enumerate(zip(params, theirs.param_groups[0]["params"], strict=True)):
            g = gradient(p, step, i).bfloat16()
            set_grad_dtype(p, torch.bfloat16)
            p.grad, q.grad = g, g.float()
        ours.step()
        theirs.step()
    assert_same_run(ours, theirs)


@pytest.mark.parametrize("overlap", [(0, 8), (4, 12)], ids=["wholly", "partly"])
@rich
def test_parameters_that_share_storage_are_updated_one_after_the_other(
    case: Case, overlap: tuple[int, int]
) -> None:
    start = torch.rand(12) + 0.5
    runs = []
    for make in (case.ours, case.torchs):
        storage = start.clone()
        first, second = Parameter(storage[:8]), Parameter(storage[slice(*overlap)])
        opt = make([first, second])
        train(opt, range(4))
        runs.append(opt)
    assert_same_run(*runs)


@rich
def test_a_parameter_listed_twice_is_updated_twice_as_in_torch(case: Case) -> None:
    runs = []
    for make in (case.ours, case.torchs):
        p = Parameter(torch.linspace(0.5, 1, 9))
        with pytest.warns(UserWarning, match="duplicate parameters"):
            opt = make([p, p])
        train(opt, range(3))
        runs.append(opt)
    assert_same_run(*runs)


@rich
def test_a_late_first_gradient_starts_its_own_count(case: Case) -> None:
    params = parameters(shapes=[(5,), (4, 3), (6,)])
    ours, theirs = case.ours(params), case.torchs(clones(params))
    for opt in (ours, theirs):
        for step in range(6):
            group = opt.param_groups[0]["params"]
            give_gradients(group, step)
            if step < 3:
                group[1].grad = None
            if step == 4:
                group[0].grad = None
            opt.step()
            if step < 3:
                assert not opt.state.get(group[1])
    assert_same_run(ours, theirs)


@rich
def test_no_gradients_at_all_is_a_step_that_does_nothing(case: Case) -> None:
    params = parameters()
    before = clones(params)
    opt = case.ours(params)
    opt.step()
    assert all(same_bits(p, q) for p, q in zip(params, before, strict=True))
    assert not any(opt.state.get(p) for p in params)


def test_the_gradient_is_only_read(case: Case) -> None:
    params = parameters()
    opt = case.ours(params)
    train(opt, range(2))
    for index, p in enumerate(params):
        assert p.grad is not None
        assert same_bits(p.grad, gradient(p, 1, index))


@rich
def test_groups_obey_their_own_options(case: Case) -> None:
    params = parameters(shapes=[(5,), (4, 3), (6,)])
    runs = []
    for make in (case.ours, case.torchs):
        a, b, c = clones(params)
        groups = [{"params": [a], "lr": 0.02}, {"params": [b], "weight_decay": 0.0}]
        opt = make([*groups, {"params": [c], "maximize": False}])
        train(opt, range(5))
        runs.append(opt)
    assert_same_run(*runs)


CHANGES: dict[str, list[dict[str, Any]]] = {
    "Adam": [
        {"lr": 0.01},
        {"betas": (0.6, 0.8)},
        {"eps": 0.1},
        {"weight_decay": 0.3},
        {"maximize": True},
        {"decoupled_weight_decay": True, "weight_decay": 0.3},
    ],
    "AdamW": [{"lr": 0.01}, {"betas": (0.6, 0.8)}, {"eps": 0.1}, {"weight_decay": 0.3}],
    "RMSprop": [{"lr": 0.001}, {"alpha": 0.5}, {"eps": 0.1}, {"weight_decay": 0.3}],
    "SGD": [
        {"lr": 0.01},
        {"momentum": 0.7},
        {"weight_decay": 0.3},
        {"maximize": True},
        {"momentum": 0.7, "dampening": 0.4},
        {"momentum": 0.7, "nesterov": True},
    ],
}


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        pytest.param(rule, change, marks=[needs_decoupled] if NEWER_KEYS & change.keys() else [])
        for rule, changes in CHANGES.items()
        for change in changes
    ],
    ids=str,
)
def test_a_change_between_steps_is_obeyed_by_the_next(rule: str, change: dict[str, Any]) -> None:
    case = case_of(rule)
    params = parameters(shapes=[(9,), (4, 3)])
    runs = []
    for make in (case.ours, case.torchs):
        opt = make(clones(params))
        train(opt, range(3))
        opt.param_groups[0].update(change)
        train(opt, range(3, 6))
        runs.append(opt)
    assert_same_run(*runs)
    unchanged = case.ours(clones(params))
    train(unchanged, range(6))
    moved = unchanged.param_groups[0]["params"], runs[0].param_groups[0]["params"]
    assert any(not torch.equal(p, q) for p, q in zip(*moved, strict=True))


@pytest.mark.parametrize(
    "lr",
    [torch.tensor(0.01), pytest.param(torch.tensor([0.01]), marks=needs_lr_of_one_dimension)],
    ids=["0-dim", "1-dim"],
)
@pytest.mark.parametrize("rule", ["Adam", "AdamW", "RMSprop", "SGD"])
def test_a_tensor_learning_rate_is_read_at_every_step(rule: str, lr: Tensor) -> None:
    case = case_of(rule)
    params = parameters(shapes=[(9,), (4, 3)])
    runs = []
    for make in (case.ours, case.torchs):
        own = lr.clone()
        opt = make(clones(params), lr=own)
        train(opt, range(3))
        own.fill_(0.002)
        train(opt, range(3, 6))
        assert opt.param_groups[0]["lr"] is own
        runs.append(opt)
    assert_same_run(*runs)


@needs_tensor_betas
@pytest.mark.parametrize("rule", ["Adam", "AdamW"])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    # torch takes powers of float32 betas in float32: 1 - 0.99**t is off by 6e-6 of itself
    [(torch.float64, 1.0), (torch.float32, 100.0)],
    ids=["float64", "float32"],
)
def test_tensor_betas(rule: str, dtype: torch.dtype, scale: float) -> None:
    case = case_of(rule)
    params = parameters(shapes=[(9,), (4, 3)])
    betas = (torch.tensor(0.9, dtype=dtype), torch.tensor([0.99], dtype=dtype))
    ours, theirs = (make(clones(params), betas=betas) for make in (case.ours, case.torchs))
    train(ours, range(6))
    train(theirs, range(6))
    assert_same_run(ours, theirs, scale)


# ---- capturable, foreach, fused: other ways to the same numbers


@cases(["Adam", "AdamW", "RMSprop"], ["all"])
def test_capturable_on_the_cpu_gives_the_same_run(case: Case) -> None:
    params = parameters()
    ours, theirs = case.ours(params, capturable=True), case.torchs(clones(params))
    train(ours, range(STEPS))
    train(theirs, range(STEPS))
    assert_same_run(ours, theirs, scale=2.0)  # bias corrections may be tensor arithmetic


@pytest.mark.parametrize("flag", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@rich
def test_foreach_and_fused_change_no_bit(case: Case, flag: dict[str, bool]) -> None:
    params = parameters()
    plain, flagged = case.ours(params), case.ours(clones(params), **flag)
    train(plain, range(4))
    train(flagged, range(4))
    for p, q in zip(
        plain.param_groups[0]["params"], flagged.param_groups[0]["params"], strict=True
    ):
        assert same_bits(p, q)


# ---- sparse gradients


@cases(["SGD"], ["default", "maximize", "momentum"])
@pytest.mark.parametrize("coalesced", [True, False])
def test_sgd_takes_sparse_gradients(case: Case, coalesced: bool) -> None:
    start = torch.rand(6, 3)
    runs = []
    for make in (case.ours, case.torchs):
        p, dense = Parameter(start.clone()), Parameter(start.clone())
        opt = make([p, dense])
        for step in range(3):
            rows = torch.tensor([[1, 4, 1]])
            g = torch.sparse_coo_tensor(
                rows, gradient(start[:3], step), (6, 3), check_invariants=True
            )
            p.grad = g.coalesce() if coalesced else g
            dense.grad = p.grad.to_dense()
            opt.step()
        assert torch.equal(p[[0, 2, 3, 5]], start[[0, 2, 3, 5]])
        torch.testing.assert_close(p, dense, rtol=0, atol=1e-6)
        runs.append(p)
    torch.testing.assert_close(*runs, rtol=0, atol=1e-6)


# ---- differentiable


def _one_differentiable_step(make: Any, options: dict[str, Any], lr: Tensor | float) -> Any:
    """Gradients of a step's results with respect to everything that went into it."""
    generator = torch.Generator().manual_seed(1)

    def leaf() -> Tensor:
        x = torch.rand(5, dtype=torch.float64, generator=generator) + 0.5
        return x.requires_grad_()

    start, grad, sources = leaf(), leaf(), {}
    p = start.clone()
    p.grad = grad
    opt = make([p], lr=lr, differentiable=True)
    rule = type(opt).__name__
    if rule != "SGD":
        opt.state[p]["step"] = torch.tensor(7.0, dtype=torch.float64)
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        if rule.startswith("Adam") and (key != "max_exp_avg_sq" or "amsgrad" in options):
            sources[key] = leaf()
    if rule == "RMSprop":
        sources["square_avg"] = leaf()
        if options.get("momentum"):
            sources["momentum_buffer"] = leaf()
        if options.get("centered"):
            sources["grad_avg"] = leaf()
            with torch.no_grad():
                sources["square_avg"] += 4
    if rule == "SGD" and options.get("momentum"):
        sources["momentum_buffer"] = leaf()
    for key, source in sources.items():
        opt.state[p][key] = source.clone()
    opt.step()
    results = [p, *(s for k, s in opt.state[p].items() if k != "step")]
    inputs = [start, grad, *sources.values()]
    if isinstance(lr, Tensor) and lr.requires_grad:
        inputs.append(lr)
    weights = torch.linspace(0.5, 2, 5, dtype=torch.float64)
    total = sum((r * weights * (i + 1)).sum() for i, r in enumerate(results))
    return results, torch.autograd.grad(total, inputs, allow_unused=True)


@pytest.mark.parametrize("hyper", ["float", pytest.param("tensor", marks=needs_gradient_by_lr)])
def test_a_differentiable_step_has_torchs_gradients(case: Case, hyper: str) -> None:
    if hyper == "tensor" and case.rule == "RMSprop":
        pytest.skip("torch's RMSprop does not differentiate by its learning rate")
    found = []
    for make in (case.ours, case.torchs):
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        found.append(_one_differentiable_step(make, case.options, lr if hyper == "tensor" else 0.1))
    (our_results, our_grads), (their_results, their_grads) = found
    torch.testing.assert_close(our_results, their_results)
    for ours, theirs in zip(our_grads, their_grads, strict=True):
        torch.testing.assert_close(
            torch.zeros(()) if ours is None else ours, torch.zeros(()) if theirs is None else theirs
        )


@needs_gradient_by_lr
@pytest.mark.parametrize("rule", ["Adam", "AdamW", "SGD"])
def test_the_gradient_by_the_learning_rate_flows_through_many_steps(rule: str) -> None:
    torch.set_default_dtype(torch.float64)  # torch's count, and with it its bias corrections
    found = []
    for library in (flatstep, torch.optim):
        lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
        p = torch.linspace(0.5, 1, 4, dtype=torch.float64, requires_grad=True).clone()
        opt = getattr(library, rule)([p], lr=lr, differentiable=True)
        for _ in range(3):
            seen = p.clone()  # the step writes p, backward needs the value it saw
            (p.grad,) = torch.autograd.grad((seen**3).sum(), seen, create_graph=True)
            opt.step()
        found.append(torch.autograd.grad((p**2).sum(), lr)[0])
    assert found[1] != 0
    torch.testing.assert_close(*found)


# ---- where we leave torch on purpose


@pytest.mark.parametrize(
    ("dtype", "steps"), [(torch.float32, 1400), (torch.bfloat16, 200)], ids=["float32", "bfloat16"]
)
def test_centered_rmsprop_stays_finite_where_torch_reaches_nan(
    dtype: torch.dtype, steps: int
) -> None:
    """`sa - ga * ga` of a constant gradient cancels to below zero; ours is clamped."""
    p = Parameter(torch.ones(1000, dtype=dtype))
    p.grad = torch.linspace(0.01, 3, 1000).to(dtype)
    opt = flatstep.RMSprop([p], lr=1e-6, centered=True)
    for _ in range(steps):
        opt.step()
    assert all(t.isfinite().all() for t in (p, *opt.state[p].values()))
