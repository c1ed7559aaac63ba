"""The rules in NumPy: the definition that every kernel matches to the last bit.

A rule has two functions. ``prepare_*`` turns hyper-parameters into the step's scalars, in Python
floats (IEEE doubles). The function named after the rule updates arrays: each operation is rounded
on its own in the compute type (float32; float64 for float64 parameters), each scalar is rounded
to that type once, and the order of the operations is the order on the page. ``csrc/rules`` has
the same names in the same order.

``update`` runs a rule on stored arrays in place: widen, update, narrow once. ``norm`` is the norm
of gradients that are clipped together, ``clip_factor`` what they are multiplied by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

#: Arrays of one compute type; written so that the rules also run on torch tensors.
Array = Any
#: A number, or a tensor of one element.
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


#: Each rule by its name.
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


def split(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 values as the nearest bfloat16 (uint16) and the lower half of their bits (uint16).

    The second, as a signed number, is how far the value is from the first. An even upper half and a
    lower one of exactly a half would take one number more than there are (an even bfloat16 is the
    nearest to 65,537 values): it becomes the next value towards zero.
    """
    bits = np.where(np.isnan(x), np.uint32(0x7FC00000), x.view(np.uint32))
    bits = bits - ((bits & np.uint32(0x1FFFF)) == 0x8000).astype(np.uint32)
    high = (bits + np.uint32(0x8000)) >> np.uint32(16)
    return high.astype(np.uint16), bits.astype(np.uint16)


def join(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """The float32 values that :func:`split` made two halves of."""
    offset = low.view(np.int16).astype(np.int32).view(np.uint32)
    return ((high.astype(np.uint32) << np.uint32(16)) + offset).view(np.float32)


_WORD = (1 << 64) - 1


def spread(x: int) -> int:
    """splitmix64's function on 64 bits (Steele, Lea and Flood, 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _WORD
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _WORD
    return x ^ (x >> 31)


def random_halves(numbers: np.ndarray, seed: int, count: int) -> np.ndarray:
    """16 random bits for each number (uint32) of an element, in step ``count`` from a seed.

    An integer hash (lowbias32, C. Wellons, 2018) with a key before each multiplication.
    """
    key = spread((spread(seed & _WORD) + count) & _WORD)
    x = numbers ^ np.uint32(key & 0xFFFFFFFF)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = x ^ (x >> np.uint32(15)) ^ np.uint32(key >> 32)
    return (x * np.uint32(0x846CA68B)) >> np.uint32(16)


def round_by_chance(x: np.ndarray, random: np.ndarray) -> np.ndarray:
    """bfloat16 (uint16): up with a probability of what lies below the last bit, else down."""
    rounded = ((x.view(np.uint32) + random) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


class Extras(NamedTuple):
    """What a pass does beside the rule.

    Attributes:
        master: float32, the weights, of which the parameters are the roundings; or uint16, 16 more
            bits of bfloat16 parameters, as :func:`split` makes them. None: the parameters are the
            weights.
        stochastic: Whether bfloat16 parameters are rounded by chance.
        seed: Of chance.
        step_count: The number of the step, for chance.
        first: The number of the first element, for chance.
        average: Exponential moving averages of the weights, in the compute type, or None.
        average_decay: Their decay.
        unscale: The factor of the gradients that are stored back; None: they are not.
    """

    master: np.ndarray | None = None
    stochastic: bool = False
    seed: int = 0
    step_count: int = 1
    first: int = 0
    average: np.ndarray | None = None
    average_decay: float = 0.0
    unscale: float | None = None


def _weights(p: np.ndarray, dtype: str, master: np.ndarray | None) -> np.ndarray:
    if master is None:
        return widen(p, dtype)
    return master if master.dtype == np.float32 else join(p, master)


def _store_weights(p: np.ndarray, dtype: str, weights: np.ndarray, extras: Extras) -> None:
    master = extras.master
    if master is not None and master.dtype != np.float32:
        p[...], master[...] = split(weights)
        return
    if master is not None:
        master[...] = weights
    if extras.stochastic:
        numbers = extras.first + np.arange(p.size, dtype=np.uint64).reshape(p.shape)
        random = random_halves(numbers.astype(np.uint32), extras.seed, extras.step_count)
        p[...] = round_by_chance(weights, random)
    else:
        p[...] = narrow(weights, dtype)


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
    grad_dtype: str | None = None,
    state_dtype: str | None = None,
    extras: Extras | None = None,
) -> None:
    """One update in place.

    Args:
        rule: A name in :data:`RULES`.
        flags: Every flag of the rule, as its function takes them.
        hyper: Every hyper-parameter that the rule's ``prepare`` reads.
        p: Parameters, any shape, stored as ``dtype`` (bfloat16 as uint16).
        g: Gradients, likewise; written only where the extras say so.
        states: The states that the flags call for, by torch's names, likewise.
        step: The number of this step, from 1.
        scale: Multiplies the gradient: -1 to maximize, 1 / s to undo a loss scale s.
        dtype: "float32", "float64", "bfloat16" or "float16".
        grad_dtype: Of the gradients; None: ``dtype``.
        state_dtype: Of the states; None: ``dtype``.
        extras: What else is done; None: nothing.
    """
    extras = extras or Extras()
    grad_dtype, state_dtype = grad_dtype or dtype, state_dtype or dtype
    compute = np.float64 if dtype == "float64" else np.float32
    prepared = RULES[rule].prepare(hyper, step, scale)
    wide = {name: widen(x, state_dtype) for name, x in states.items()}
    grad = widen(g, grad_dtype)
    with np.errstate(all="ignore"):
        k = SimpleNamespace(**{name: compute(x) for name, x in prepared.items()})
        weights = _weights(p, dtype, extras.master)
        new = RULES[rule].update(weights, grad, wide, k, **flags, xp=NumpyMath)
        _store_weights(p, dtype, new, extras)
        for name, x in states.items():
            x[...] = narrow(wide[name], state_dtype)
        if extras.average is not None:
            weights = _weights(p, dtype, extras.master)
            towards = _lerp_scalars(1 - extras.average_decay)
            weight, side = compute(towards["lerp_weight"]), towards["lerp_side"]
            extras.average[...] = NumpyMath.snap(lerp(extras.average, weights, weight, side))
        if extras.unscale is not None:
            g[...] = narrow(compute(extras.unscale) * grad, grad_dtype)


#: Elements in a tile of a norm.
TILE = 16384
#: Sums in a tile that are added up side by side.
LANES = 32


def norm(
    gradients: Sequence[tuple[np.ndarray, str]], norm_type: float = 2.0, unscale: float = 1.0
) -> float:
    """The norm of all gradients as one vector, in double, in one order of additions.

    Each gradient is cut into tiles of 16,384 elements from its start. In a tile, squares are added
    in 32 lanes, element by element, and the lanes by halves; then tile is added to tile, and
    gradient to gradient.

    Args:
        gradients: (stored values, dtype) of each gradient, as in :func:`update`.
        norm_type: 2, or infinity for the largest magnitude.
        unscale: Multiplies the norm: 1 / s to undo a loss scale s.
    """
    return norm_of(norm_total(gradients, norm_type), norm_type, unscale)


def norm_total(gradients: Sequence[tuple[np.ndarray, str]], norm_type: float) -> float:
    """The sum of squares, or the largest magnitude, that :func:`norm` is made of."""
    total = np.float64(0)
    with np.errstate(all="ignore"):
        for stored, dtype in gradients:
            own = np.float64(0)
            x = widen(stored.reshape(-1), dtype).astype(np.float64)
            for at in range(0, x.size, TILE):
                own = _add(own, _tile_norm(x[at : at + TILE], norm_type), norm_type)
            total = _add(total, own, norm_type)
    return float(total)


def tile_count(count: int) -> int:
    """How many tiles a gradient of so many numbers has."""
    return -(-count // TILE)


def norm_of(total: float, norm_type: float, unscale: float) -> float:
    """The norm that a sum of squares, or a largest magnitude, is of."""
    return (total if norm_type == math.inf else math.sqrt(total)) * unscale


def _add(a: Array, b: Array, norm_type: float) -> Array:
    return np.maximum(a, b) if norm_type == math.inf else a + b


def _tile_norm(x: np.ndarray, norm_type: float) -> Array:
    sizes = np.abs(x) if norm_type == math.inf else x * x
    rows = np.pad(sizes, (0, -x.size % LANES)).reshape(-1, LANES)
    lanes = np.zeros(LANES)
    for row in rows:
        lanes = _add(lanes, row, norm_type)
    while lanes.size > 1:
        half = lanes.size // 2
        lanes = _add(lanes[:half], lanes[half:], norm_type)
    return lanes[0]


def clip_factor(norm: float, max_norm: float) -> float:
    """What gradients of that norm are multiplied by, as ``torch.nn.utils.clip_grad_norm_`` does."""
    factor = max_norm / (norm + 1e-6)
    return 1.0 if factor > 1 else factor


def flag_names(rule: str, flags: int, names: Sequence[str]) -> dict[str, bool]:
    """The flags of a variant's number, by name."""
    return {name: bool(flags >> bit & 1) for bit, name in enumerate(names)}
