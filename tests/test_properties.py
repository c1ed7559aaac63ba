"""What holds for any arrays: hypothesis looks for ones for which it does not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import Case, rich, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    DTYPES,
    ISAS,
    VARIANTS,
    Arrays,
    Update,
    Variant,
    assert_same,
    bits,
    copies,
    instruction_set,
    ordinary_arrays,
    random_arrays,
)
from torch import Tensor
from torch.nn import Parameter

import flatstep
from flatstep import reference

settings.register_profile("flatstep", deadline=None, max_examples=100, derandomize=True)
settings.load_profile("flatstep")

variants = st.sampled_from(VARIANTS)
dtypes = st.sampled_from(DTYPES)
isas = st.sampled_from(ISAS)
counts = st.integers(0, 150)
seeds = st.integers(0, 2**32).map(str)
steps = st.integers(1, 10**6)


# ---- through the kernels


@given(
    of=variants,
    dtype=dtypes,
    isa=isas,
    seed=seeds,
    step=steps,
    threads=st.integers(1, 4),
    pieces=st.lists(st.tuples(counts, st.integers(0, 17)), max_size=8),
    data=st.data(),
)
def test_any_split_order_and_alignment_gives_the_same_bits(
    of: Variant,
    dtype: str,
    isa: str,
    seed: str,
    step: int,
    threads: int,
    pieces: list[tuple[int, int]],
    data: st.DataObject,
) -> None:
    update = Update(of, dtype, of.hyper(), step)
    before = random_arrays(of, dtype, sum(count for count, _ in pieces), seed)
    whole, parts = copies(before), copies(before)
    ends = np.cumsum([count for count, _ in pieces])
    order = data.draw(st.permutations(range(len(pieces))))
    with instruction_set(isa):
        update.by_core(whole)
        for place in order:
            count, lead = pieces[place]
            span = slice(ends[place] - count, ends[place])
            moved = {
                name: np.concatenate([np.zeros(lead, x.dtype), x[span]])[lead:]
                for name, x in parts.items()
            }
            update.by_core(moved, threads)
            for name, x in moved.items():
                parts[name][span] = x
    assert_same(parts, whole, before)


@given(of=variants, dtype=dtypes, isa=isas, count=counts, seed=seeds, step=steps)
def test_maximizing_is_minimizing_with_the_gradient_negated(
    of: Variant, dtype: str, isa: str, count: int, seed: str, step: int
) -> None:
    before = random_arrays(of, dtype, count, seed)
    up, down = copies(before), copies(before)
    down["g"] = down["g"] ^ np.uint16(0x8000) if dtype == "bfloat16" else -down["g"]
    with instruction_set(isa):
        Update(of, dtype, of.hyper(), step, scale=-1.0).by_core(up)
        Update(of, dtype, of.hyper(), step).by_core(down)
    down["g"] = before["g"]
    assert_same(up, down, before)


@given(
    of=variants,
    dtype=dtypes,
    isa=isas,
    count=counts,
    seed=seeds,
    exponent=st.integers(0, 4),
)
def test_scaling_by_a_power_of_two_and_back_is_exact(
    of: Variant, dtype: str, isa: str, count: int, seed: str, exponent: int
) -> None:
    before = ordinary_arrays(of, dtype, count, seed)
    plain, scaled = copies(before), copies(before)
    wide = reference.widen(before["g"], dtype) * np.float32(2.0**exponent)
    scaled["g"] = reference.narrow(wide, dtype)
    with instruction_set(isa):
        Update(of, dtype, of.hyper()).by_core(plain)
        Update(of, dtype, of.hyper(), scale=2.0**-exponent).by_core(scaled)
    scaled["g"] = before["g"]
    assert_same(scaled, plain, before)


@given(
    of=variants,
    dtype=dtypes,
    isa=isas,
    count=counts,
    seed=seeds,
    step=steps,
    decay=st.floats(0, 1e6),
    scale=st.floats(-2, 2),
)
def test_a_learning_rate_of_zero_leaves_the_parameters(
    of: Variant,
    dtype: str,
    isa: str,
    count: int,
    seed: str,
    step: int,
    decay: float,
    scale: float,
) -> None:
    before = ordinary_arrays(of, dtype, count, seed)
    found = copies(before)
    hyper = of.hyper(lr=0.0, weight_decay=decay)
    with instruction_set(isa):
        Update(of, dtype, hyper, step, scale).by_core(found)
    wide = (reference.widen(arrays["p"], dtype) for arrays in (found, before))
    np.testing.assert_array_equal(*wide)  # as numbers: -0 may become 0


@given(of=variants, dtype=dtypes, isa=isas, count=counts, seed=seeds, step=steps)
def test_without_gradient_decay_and_momentum_nothing_moves(
    of: Variant, dtype: str, isa: str, count: int, seed: str, step: int
) -> None:
    before = random_arrays(of, dtype, count, seed)
    before["p"][~np.isfinite(reference.widen(before["p"], dtype))] = 0
    for name in ("g", *of.states):
        before[name][:] = 0
    found = copies(before)
    with instruction_set(isa):
        Update(of, dtype, of.hyper(weight_decay=0.0), step).by_core(found)
    assert_same(found, before, before)


@given(
    of=st.sampled_from([v for v in VARIANTS if v.states]),
    dtype=dtypes,
    isa=isas,
    count=counts,
    seed=seeds,
    step=st.integers(2, 10**6),
)
def test_without_a_gradient_every_state_only_shrinks(
    of: Variant, dtype: str, isa: str, count: int, seed: str, step: int
) -> None:
    before = ordinary_arrays(of, dtype, count, seed)
    before["g"][:] = 0
    if "max_exp_avg_sq" in before:
        before["exp_avg_sq"] = np.minimum(before["exp_avg_sq"], before["max_exp_avg_sq"])
    found = copies(before)
    with instruction_set(isa):
        Update(of, dtype, of.hyper(weight_decay=0.0), step).by_core(found)
    for name in of.states:
        old, new = (np.abs(reference.widen(x[name], dtype)) for x in (before, found))
        assert np.all(new <= old), name


@given(dtype=dtypes, isa=isas, count=counts, seed=seeds, decay=st.floats(0, 1))
def test_decoupled_decay_without_a_gradient_is_one_multiplication(
    dtype: str, isa: str, count: int, seed: str, decay: float
) -> None:
    of = next(v for v in VARIANTS if str(v) == "adam")
    before = ordinary_arrays(of, dtype, count, seed)
    for name in ("g", *of.states):
        before[name][:] = 0
    found = copies(before)
    hyper = of.hyper(lr=0.5, weight_decay=decay)
    with instruction_set(isa):
        Update(of, dtype, hyper).by_core(found)
    wide = reference.widen(before["p"], dtype)
    expected = reference.narrow(wide * wide.dtype.type(1 - 0.5 * decay), dtype)
    np.testing.assert_array_equal(bits(found["p"]), bits(expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of", [v for v in VARIANTS if v.states], ids=str)
def test_states_without_gradients_reach_zero_and_are_never_subnormal(
    of: Variant, dtype: str
) -> None:
    halving = dict.fromkeys(["beta1", "beta2", "alpha", "momentum"], 0.5)
    hyper = of.hyper(**halving, weight_decay=0.0)
    found: Arrays = ordinary_arrays(of, dtype, 33)
    found["g"][:] = 0
    Update(of, dtype, hyper, 2).by_core(found)
    lasting = copies(found)  # a maximum or a sum stays as it is
    tiny = np.finfo(np.float64 if dtype == "float64" else np.float32).tiny
    for step in range(3, 1100 if dtype == "float64" else 160):
        Update(of, dtype, hyper, step).by_core(found)
        for name in of.states:
            size = np.abs(reference.widen(found[name], dtype))
            assert not ((size > 0) & (size < tiny)).any()
    for name in of.states:
        lasts = (bits(found[name]) == bits(lasting[name])).all()
        assert lasts or not bits(found[name]).any(), name  # +0


# ---- through the optimizers

shapes = st.lists(st.lists(st.integers(0, 12), max_size=3).map(tuple), min_size=1, max_size=12)


@rich
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=15)
@given(shapes=shapes, flat=st.booleans(), adjacent=st.booleans(), seed=st.integers(0, 2**32))
def test_a_model_of_any_shapes_has_the_bits_of_one_flat_tensor(
    case: Case,
    dtype: torch.dtype,
    shapes: list[tuple[int, ...]],
    flat: bool,
    adjacent: bool,
    seed: int,
) -> None:
    sizes = [int(np.prod(shape)) for shape in shapes]
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return torch.randn(sum(sizes), generator=generator).to(dtype)

    start = draw()
    whole = Parameter(start.clone())
    pieces = start.clone().split(sizes)
    params = [
        Parameter((piece if adjacent else piece.clone()).view(shape))
        for piece, shape in zip(pieces, shapes, strict=True)
    ]
    if flat:
        flatstep.FlatBuffer(params)
    one, many = case.ours([whole]), case.ours(params)
    for _ in range(3):
        whole.grad = draw()
        for param, grad in zip(params, whole.grad.split(sizes), strict=True):
            if flat:
                param.grad.copy_(grad.view(param.shape))
            else:
                param.grad = grad.view(param.shape).clone()
        one.step()
        many.step()
    assert same_bits(torch.cat([param.detach().reshape(-1) for param in params]), whole)
    for name, state in one.state[whole].items():
        if name != "step":
            found = torch.cat([many.state[param][name].reshape(-1) for param in params])
            assert same_bits(found, state), name
