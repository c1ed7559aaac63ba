"""The rules in NumPy: the definition that every kernel matches to the last bit.

A rule has two functions. ``prepare_*`` turns hyper-parameters into the step's scalars, in Python
floats (IEEE doubles). The function named after the rule updates arrays: each operation is rounded
on its own in the compute type (float32; float64 for float64 parameters), each scalar is rounded
to that type once, and the order of the operations is the order on the page. ``csrc/rules`` has
the same names in the same order.

``update`` runs a rule on stored arrays in place: widen, update, narrow once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

# Arrays of one compute type; written so that the rules also run on torch tensors.
Array = Any
Scalar = Any


class NumpyMath:
    """The functions that are more than an operator, on NumPy arrays."""

    @staticmethod
    def root(x: Array) -> Array:
        """The square root, correctly rounded."""
        return np.sqrt(x)

    @staticmethod
    def maximum(a: Array, b: Array) -> Array:
        """The larger one; NaN where either is NaN; ``b`` where they compare equal."""
        return np.where((a > b) | np.isnan(a), a, b)

    @staticmethod
    def snap(x: Array) -> Array:
        """Zero in place of a subnormal, which would never reach zero and slows every step."""
        return np.where(np.abs(x) < np.finfo(x.dtype).tiny, x.dtype.type(0), x)


def power(base: Scalar, exponent: int) -> Scalar:
    """``base ** exponent`` by squaring: only multiplications, so the same bits everywhere."""
    result = 1.0
    while exponent > 0:
        if exponent & 1:
            result = result * base
        base = base * base
        exponent >>= 1
    return result


def lerp(start: Array, end: Array, weight: Scalar, side: Scalar) -> Array:
    """``torch.lerp``: from the nearer end, so that weight 1 gives ``end`` exactly."""
    return (end if side else start) + weight * (end - start)


def _lerp_scalars(weight: Scalar) -> dict[str, Scalar]:
    if weight < 0.5:
        return {"lerp_weight": weight, "lerp_side": 0.0}
    return {"lerp_weight": weight - 1, "lerp_side": 1.0}


def prepare_adam(
    h: Mapping[str, Scalar], step: int, scale: Scalar, root: Callable[[Any], Any] = math.sqrt
) -> dict[str, Scalar]:
    """The scalars of Adam's ``step``, which counts from 1; ``scale`` multiplies the gradient."""
    return {
        "scale": scale,
        "weight_decay": h["weight_decay"],
        "decay": 1 - h["lr"] * h["weight_decay"],
        **_lerp_scalars(1 - h["beta1"]),
        "beta2": h["beta2"],
        "grad_sq_weight": 1 - h["beta2"],
        "step_size": h["lr"] / (1 - power(h["beta1"], step)),
        "root_scale": 1 / root(1 - power(h["beta2"], step)),
        "eps": h["eps"],
    }


def adam(
    p: Array, g: Array, s: dict[str, Array], k: Any, *, amsgrad: bool, l2: bool, xp: Any
) -> Array:
    """Adam and AdamW (Kingma and Ba, 2015; Reddi et al., 2018; Loshchilov and Hutter, 2019).

    Without ``l2`` the decay is decoupled: a factor on the parameter, 1 where there is none.
    """
    g = k.scale * g
    if l2:
        g = g + k.weight_decay * p
    else:
        p = k.decay * p
    s["exp_avg"] = xp.snap(lerp(s["exp_avg"], g, k.lerp_weight, k.lerp_side))
    s["exp_avg_sq"] = xp.snap(k.beta2 * s["exp_avg_sq"] + k.grad_sq_weight * g * g)
    v = s["exp_avg_sq"]
    if amsgrad:
        v = s["max_exp_avg_sq"] = xp.snap(xp.maximum(s["max_exp_avg_sq"], v))
    return p - k.step_size * s["exp_avg"] / (xp.root(v) * k.root_scale + k.eps)


def prepare_rmsprop(
    h: Mapping[str, Scalar], step: int, scale: Scalar, root: Callable[[Any], Any] = math.sqrt
) -> dict[str, Scalar]:
    """The scalars of RMSprop, the same at every step; ``scale`` multiplies the gradient."""
    return {
        "scale": scale,
        "weight_decay": h["weight_decay"],
        "alpha": h["alpha"],
        "grad_sq_weight": 1 - h["alpha"],
        **_lerp_scalars(1 - h["alpha"]),
        "eps": h["eps"],
        "momentum": h["momentum"],
        "lr": h["lr"],
        "zero": 0.0,
    }


def rmsprop(
    p: Array,
    g: Array,
    s: dict[str, Array],
    k: Any,
    *,
    momentum: bool,
    centered: bool,
    l2: bool,
    xp: Any,
) -> Array:
    """RMSprop (Hinton, 2012), with eps outside the root as in torch; centered: Graves, 2013.

    The centered variance is clamped at zero, where rounding can take torch's below it and to NaN.
    """
    g = k.scale * g
    if l2:
        g = g + k.weight_decay * p
    s["square_avg"] = xp.snap(k.alpha * s["square_avg"] + k.grad_sq_weight * g * g)
    variance = s["square_avg"]
    if centered:
        s["grad_avg"] = xp.snap(lerp(s["grad_avg"], g, k.lerp_weight, k.lerp_side))
        variance = xp.maximum(variance - s["grad_avg"] * s["grad_avg"], k.zero)
    average = xp.root(variance) + k.eps
    if momentum:
        s["momentum_buffer"] = xp.snap(k.momentum * s["momentum_buffer"] + g / average)
        return p - k.lr * s["momentum_buffer"]
    return p - k.lr * g / average


def prepare_sgd(
    h: Mapping[str, Scalar], step: int, scale: Scalar, root: Callable[[Any], Any] = math.sqrt
) -> dict[str, Scalar]:
    """The scalars of SGD; at step 1 the buffer becomes the gradient, whatever the dampening."""
    first = step == 1
    return {
        "scale": scale,
        "weight_decay": h["weight_decay"],
        "kept": 0.0 if first else h["momentum"],
        "added": 1.0 if first else 1 - h["dampening"],
        "momentum": h["momentum"],
        "lr": h["lr"],
    }


def sgd(
    p: Array,
    g: Array,
    s: dict[str, Array],
    k: Any,
    *,
    momentum: bool,
    nesterov: bool,
    l2: bool,
    xp: Any,
) -> Array:
    """SGD with momentum in torch's form; Nesterov: Sutskever et al., 2013."""
    g = k.scale * g
    if l2:
        g = g + k.weight_decay * p
    if momentum:
        s["momentum_buffer"] = xp.snap(k.kept * s["momentum_buffer"] + k.added * g)
        g = g + k.momentum * s["momentum_buffer"] if nesterov else s["momentum_buffer"]
    return p - k.lr * g


class Rule(NamedTuple):
    """A rule's two functions."""

    prepare: Callable[..., dict[str, Scalar]]
    update: Callable[..., Array]


RULES: dict[str, Rule] = {
    "adam": Rule(prepare_adam, adam),
    "rmsprop": Rule(prepare_rmsprop, rmsprop),
    "sgd": Rule(prepare_sgd, sgd),
}


def widen(x: np.ndarray, dtype: str) -> np.ndarray:
    """Stored values of ``dtype`` in the compute type, exactly. bfloat16 is stored as uint16."""
    if dtype == "bfloat16":
        return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return x.astype(np.float64 if dtype == "float64" else np.float32)


def narrow(x: np.ndarray, dtype: str) -> np.ndarray:
    """Rounds computed values to ``dtype``: nearest, ties to even, one NaN in 16 bits."""
    if dtype == "bfloat16":
        bits = x.view(np.uint32)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        rounded = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
        return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)
    if dtype == "float16":
        with np.errstate(over="ignore", under="ignore"):
            rounded = x.astype(np.float16)
        return np.where(np.isnan(x), np.uint16(0x7E00).view(np.float16), rounded)
    return x


def update(
    rule: str,
    flags: Mapping[str, bool],
    hyper: Mapping[str, float],
    p: np.ndarray,
    g: np.ndarray,
    states: Mapping[str, np.ndarray],
    *,
    step: int,
    scale: float = 1.0,
    dtype: str = "float32",
) -> None:
    """One update in place.

    Args:
        rule: A name in :data:`RULES`.
        flags: Every flag of the rule, as its function takes them.
        hyper: Every hyper-parameter that the rule's ``prepare`` reads.
        p: Parameters, any shape, stored as ``dtype`` (bfloat16 as uint16).
        g: Gradients, likewise; not written.
        states: The states that the flags call for, by torch's names, likewise.
        step: The number of this step, from 1.
        scale: Multiplies the gradient: -1 to maximize, 1 / s to undo a loss scale s.
        dtype: "float32", "float64", "bfloat16" or "float16".
    """
    compute = np.float64 if dtype == "float64" else np.float32
    prepared = RULES[rule].prepare(hyper, step, scale)
    wide = {name: widen(x, dtype) for name, x in states.items()}
    with np.errstate(all="ignore"):
        k = SimpleNamespace(**{name: compute(x) for name, x in prepared.items()})
        new_p = RULES[rule].update(widen(p, dtype), widen(g, dtype), wide, k, **flags, xp=NumpyMath)
    p[...] = narrow(new_p, dtype)
    for name, x in states.items():
        x[...] = narrow(wide[name], dtype)


def flag_names(rule: str, flags: int, names: Sequence[str]) -> dict[str, bool]:
    """The flags of a variant's number, by name."""
    return {name: bool(flags >> bit & 1) for bit, name in enumerate(names)}
