"""The reference itself: against textbook formulas, exact rationals and torch's own conversions."""

from __future__ import annotations

import inspect
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import (
    SETTINGS,
    VARIANTS,
    Arrays,
    Update,
    Variant,
    every_value,
    is_of_squares,
    ordinary_arrays,
    random_arrays,
)

from flatstep import _core, reference

every_variant = pytest.mark.parametrize("of", VARIANTS, ids=str)
half_types = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16}
HAS_LONG_DOUBLE = np.finfo(np.longdouble).eps < np.finfo(np.float64).eps


# ---- the formulas

Result = tuple[np.ndarray, Arrays]  # the parameter's change and the new states


class Textbook:
    """The formulas with the letters of the papers, for the arithmetic of longer floats."""

    @staticmethod
    def adam(p: Any, g: Any, s: Arrays, h: Any, t: int, *, amsgrad: bool, l2: bool) -> Result:
        if l2:
            g = g + h["weight_decay"] * p
        m = h["beta1"] * s["exp_avg"] + (1 - h["beta1"]) * g
        v = h["beta2"] * s["exp_avg_sq"] + (1 - h["beta2"]) * g**2
        new = {"exp_avg": m, "exp_avg_sq": v}
        if amsgrad:
            v = new["max_exp_avg_sq"] = np.maximum(s["max_exp_avg_sq"], v)
        m_hat = m / (1 - h["beta1"] ** t)
        v_hat = v / (1 - h["beta2"] ** t)
        change = h["lr"] * m_hat / (np.sqrt(v_hat) + h["eps"])
        return change if l2 else change + h["lr"] * h["weight_decay"] * p, new

    @staticmethod
    def rmsprop(
        p: Any, g: Any, s: Arrays, h: Any, t: int, *, momentum: bool, centered: bool, l2: bool
    ) -> Result:
        if l2:
            g = g + h["weight_decay"] * p
        r = h["alpha"] * s["square_avg"] + (1 - h["alpha"]) * g**2
        new = {"square_avg": r}
        if centered:
            mean = new["grad_avg"] = h["alpha"] * s["grad_avg"] + (1 - h["alpha"]) * g
            r = r - mean**2
        change = g / (np.sqrt(r) + h["eps"])
        if momentum:
            change = new["momentum_buffer"] = h["momentum"] * s["momentum_buffer"] + change
        return h["lr"] * change, new

    @staticmethod
    def sgd(
        p: Any, g: Any, s: Arrays, h: Any, t: int, *, momentum: bool, nesterov: bool, l2: bool
    ) -> Result:
        if l2:
            g = g + h["weight_decay"] * p
        new = {}
        if momentum:
            b = g if t == 1 else h["momentum"] * s["momentum_buffer"] + (1 - h["dampening"]) * g
            new["momentum_buffer"] = b
            g = g + h["momentum"] * b if nesterov else b
        return h["lr"] * g, new


@every_variant
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(
    ("dtype", "step"),
    # Later, the rounding of beta ** step shows in float64.
    [("float32", 1), ("float32", 2), ("float32", 1000), ("float64", 1), ("float64", 2)],
)
def test_an_update_is_the_textbook_s_but_for_a_few_roundings(
    of: Variant, setting: str, dtype: str, step: int
) -> None:
    if dtype == "float64" and not HAS_LONG_DOUBLE:
        pytest.skip("needs a type longer than float64")
    if not hasattr(Textbook, of.rule):
        pytest.skip(f"the textbook has no {of.rule} yet")
    hyper, scale = of.hyper(**SETTINGS[setting]), -0.5
    # In each element all terms have one sign, so that no difference magnifies a rounding error.
    before = {name: np.abs(x) for name, x in ordinary_arrays(of, dtype, 2000).items()}
    before["g"] *= -1
    if "grad_avg" in before:
        before["square_avg"] += 2 * before["grad_avg"] ** 2
    sign = np.where(np.arange(2000) % 2, -1, 1).astype(before["p"].dtype)
    before = {name: x if is_of_squares(name) else sign * x for name, x in before.items()}

    found = Update(of, dtype, hyper, step, scale).by_reference(before)
    wide = {name: x.astype(np.longdouble) for name, x in before.items()}
    states = {name: wide[name] for name in of.states}
    formula = getattr(Textbook, of.rule)
    change, new = formula(wide["p"], scale * wide["g"], states, hyper, step, **of.options)

    assert set(new) == set(of.states)
    _assert_close(found["p"], wide["p"] - change, np.abs(wide["p"]) + np.abs(change))
    for name, x in new.items():
        _assert_close(found[name], x, np.abs(x))


def _assert_close(found: np.ndarray, truth: np.ndarray, size: np.ndarray) -> None:
    """Within six units in the last place of `size`."""
    error = np.abs(found - truth) / (size * np.finfo(found.dtype).eps)
    at = int(np.argmax(error))
    assert error[at] <= 6, f"element {at} is {found[at]!r}, not {truth[at]!r}"


def test_a_centered_variance_below_zero_counts_as_zero() -> None:
    """The one deviation from torch, whose root is then NaN."""
    of = next(v for v in VARIANTS if v.options.get("centered"))
    one = np.ones(1, np.float32)
    before = {"p": one, "g": 3 * one, "square_avg": 9 * one * (1 - 1e-6), "grad_avg": 3 * one}
    before = {name: before.get(name, 0 * one) for name in of.arrays}
    hyper = of.hyper(lr=1.0, eps=2.0, alpha=0.5)
    found = Update(of, "float32", hyper).by_reference(before)
    assert found["square_avg"] < found["grad_avg"] ** 2
    assert found["p"] == 1 - 3 / 2


@pytest.mark.parametrize("of", [v for v in VARIANTS if v.states], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_state_is_never_subnormal_nor_minus_zero(of: Variant, dtype: str) -> None:
    before = random_arrays(of, dtype, 5000)
    tiny = np.finfo(dtype).tiny
    small = np.random.default_rng(0).uniform(-4, 4, 2500).astype(dtype) * tiny
    for name, x in before.items():
        x[::2] = 0 if name in "pg" else np.abs(small) if "sq" in name else small
    found = Update(of, dtype, of.hyper()).by_reference(before)
    for name in of.states:
        snapped = np.abs(found[name]) < tiny
        assert snapped[::2].any()
        assert not snapped[::2].all()
        assert not found[name][snapped].view(f"u{found[name].itemsize}").any()


# ---- the scalars


@pytest.mark.parametrize("base", [0.0, 0.1, 0.5, 0.9, 0.95, 0.999, 0.9999999, 1.0])
@pytest.mark.parametrize("exponent", [0, 1, 2, 3, 10, 99, 1000, 4095, 4096])
def test_power_is_the_exact_one_but_for_its_roundings(base: float, exponent: int) -> None:
    exact = Fraction(base) ** exponent
    found = Fraction(reference.power(base, exponent))
    # Each of the factors that the squarings stand for carries one rounding at the most.
    assert abs(found - exact) <= exact * exponent / 2**53 + Fraction(2) ** -1000


@pytest.mark.parametrize("weight", [0.0, 0.001, 0.1, 0.4999, 0.5, 0.9, 0.999, 1.0])
def test_lerp_is_torch_s(weight: float) -> None:
    rng = np.random.default_rng(0)
    start, end = rng.standard_normal((2, 10_000)).astype(np.float32)
    scalars = reference._lerp_scalars(weight)
    found = reference.lerp(
        start, end, np.float32(scalars["lerp_weight"]), np.float32(scalars["lerp_side"])
    )
    torchs = torch.lerp(torch.from_numpy(start), torch.from_numpy(end), weight).numpy()
    size = np.maximum(np.abs(start), np.abs(end))
    assert np.all(np.abs(found - torchs) <= size * np.finfo(np.float32).eps)
    if weight in (0, 1):
        np.testing.assert_array_equal(found, end if weight else start)


# ---- the conversions


@half_types
def test_widening_is_torch_s_for_every_value(dtype: str) -> None:
    values = every_value(dtype)
    torchs = torch.from_numpy(values.view(np.int16)).view(TORCH[dtype]).float().numpy()
    found = reference.widen(values, dtype)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(found), np.isnan(torchs))
    numbers = ~np.isnan(found)
    np.testing.assert_array_equal(found[numbers].view(np.uint32), torchs[numbers].view(np.uint32))


@half_types
def test_narrowing_is_torch_s(dtype: str) -> None:
    """Random bits; every tie between 16-bit neighbours, and the float32 beside it on each side."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 1 << 32, 1_000_000, np.uint32)
    below = np.sort(reference.widen(every_value(dtype), dtype))
    below = below[np.isfinite(below)].astype(np.float64)
    with np.errstate(over="ignore"):
        ties = ((below[1:] + below[:-1]) / 2).astype(np.float32).view(np.uint32)
    x = np.concatenate([noise, ties - 1, ties, ties + 1]).view(np.float32)
    x = np.concatenate([x, np.float32([65504, 65519.996, 65520, 3.4e38, np.inf, 0])])
    x = x[~np.isnan(x)]
    x = np.concatenate([x, -x])
    found = reference.narrow(x, dtype).view(np.int16)
    torchs = torch.from_numpy(x).to(TORCH[dtype]).view(torch.int16).numpy()
    np.testing.assert_array_equal(found, torchs)


@half_types
def test_every_nan_narrows_to_one(dtype: str) -> None:
    bits = np.array([0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF], np.uint32)
    found = reference.narrow(bits.view(np.float32), dtype).view(np.uint16)
    assert set(found.tolist()) == {0x7FC0 if dtype == "bfloat16" else 0x7E00}


# ---- its names


def test_the_rules_are_those_of_the_kernels() -> None:
    assert list(reference.RULES) == [rule["name"] for rule in _core.rules()]


@pytest.mark.parametrize("rule", _core.rules(), ids=lambda rule: rule["name"])
def test_flags_hyper_parameters_and_states_have_the_kernels_names(rule: dict[str, Any]) -> None:
    prepare, update = reference.RULES[rule["name"]]
    parameters = inspect.signature(update).parameters.values()
    flags = [x.name for x in parameters if x.kind is x.KEYWORD_ONLY and x.name != "xp"]
    assert flags == list(rule["flags"])

    hyper = Recorder.fromkeys(rule["hyper"], 0.5)
    scalars = SimpleNamespace(**prepare(hyper, 2, 1.0))
    assert hyper.read == set(rule["hyper"])

    one = np.ones(1, np.float32)
    for flags, names in rule["variants"]:
        states = Recorder.fromkeys(rule["states"], one)
        options = reference.flag_names(rule["name"], flags, rule["flags"])
        update(one, one, states, scalars, **options, xp=reference.NumpyMath)
        assert states.read == set(names)


class Recorder(dict[str, Any]):
    """Remembers which keys were read."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)


@every_variant
def test_the_gradient_is_not_written(of: Variant) -> None:
    before = random_arrays(of, "float32", 100)
    found = Update(of, "float32", of.hyper()).by_reference(before)
    np.testing.assert_array_equal(found["g"].view(np.uint32), before["g"].view(np.uint32))
