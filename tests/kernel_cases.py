"""What the kernel tests share: every variant and layout, hard values, one update by either side.

It walks over the registry: a new rule, flag or layout is tested without a change here.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from flatstep import _core, reference

# A stored value's type in NumPy; bfloat16 is its bits.
STORED = {
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
    "bfloat16": np.dtype(np.uint16),
    "float16": np.dtype(np.float16),
}
BITS = {2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64)}
MANTISSA = {"float32": 23, "float64": 52, "bfloat16": 7, "float16": 10}

LAYOUTS = {
    param: index for index, (param, *others) in enumerate(_core.layouts()) if {param} == {*others}
}
DTYPES = tuple(LAYOUTS)
ISAS = tuple(name for name, supported in _core.isas() if supported)

# Hyper-parameters by name: usual ones, and ones that take the other branch of lerp. A rule with a
# hyper-parameter of a new name gets 0.25.
SETTINGS: dict[str, dict[str, float]] = {
    "usual": {
        "lr": 1e-3,
        "beta1": 0.9,
        "beta2": 0.999,
        "alpha": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.01,
        "momentum": 0.9,
        "dampening": 0.1,
    },
    "unusual": {
        "lr": 0.3,
        "beta1": 0.1,
        "beta2": 0.4,
        "alpha": 0.3,
        "eps": 1e-30,
        "weight_decay": 0.7,
        "momentum": 0.6,
        "dampening": 0.2,
    },
}

# The arrays of an update, in the order of the call: "p", "g", then the states by name.
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Variant:
    """A rule with its flags."""

    rule: str
    flags: int
    flag_names: tuple[str, ...]
    hyper_names: tuple[str, ...]
    states: tuple[str, ...]

    @property
    def options(self) -> dict[str, bool]:
        return reference.flag_names(self.rule, self.flags, self.flag_names)

    @property
    def arrays(self) -> tuple[str, ...]:
        return ("p", "g", *self.states)

    def hyper(self, **values: float) -> dict[str, float]:
        """The usual hyper-parameters, but for the values given."""
        usual = SETTINGS["usual"] | values
        return {name: usual.get(name, 0.25) for name in self.hyper_names}

    def __str__(self) -> str:
        return "-".join([self.rule, *(name for name, on in self.options.items() if on)])


VARIANTS = tuple(
    Variant(rule["name"], flags, rule["flags"], rule["hyper"], states)
    for rule in _core.rules()
    for flags, states in rule["variants"]
)


def variant(name: str) -> Variant:
    return next(v for v in VARIANTS if str(v) == name)


@dataclass(frozen=True)
class Update:
    """One update but for its arrays; the step is not the first, which some rules treat apart."""

    variant: Variant
    dtype: str
    hyper: Mapping[str, float]
    step: int = 3
    scale: float = 1.0
    layout: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layout", LAYOUTS[self.dtype])

    def by_reference(self, arrays: Arrays) -> Arrays:
        """The arrays afterwards, as new ones."""
        p, g, *states = (arrays[name].copy() for name in self.variant.arrays)
        reference.update(
            self.variant.rule,
            self.variant.options,
            self.hyper,
            p,
            g,
            dict(zip(self.variant.states, states, strict=True)),
            step=self.step,
            scale=self.scale,
            dtype=self.dtype,
        )
        return dict(zip(self.variant.arrays, [p, g, *states], strict=True))

    def by_core(self, arrays: Arrays, threads: int = 1) -> None:
        """In place, with the instruction set in use."""
        p, g, *states = (address(arrays[name]) for name in self.variant.arrays)
        _core.update(
            self.variant.rule,
            self.variant.flags,
            self.layout,
            p,
            g,
            states,
            arrays["p"].size,
            [self.hyper[name] for name in self.variant.hyper_names],
            self.step,
            self.scale,
            threads,
        )

    def __str__(self) -> str:
        return f"{self.variant}-{self.dtype}-step{self.step}-scale{self.scale:g}"


def updates(of: Variant, dtype: str) -> Iterator[Update]:
    """A few updates of a variant that differ in hyper-parameters, step and scale."""
    yield Update(of, dtype, of.hyper(), step=1)
    yield Update(of, dtype, of.hyper(), step=1000, scale=-1.0)
    yield Update(of, dtype, of.hyper(**SETTINGS["unusual"]), step=2, scale=2.0**-10)


def plain_sgd(dtype: str, lr: float) -> Update:
    """p - lr * g, computed in float32 for a 16-bit type."""
    of = variant("sgd")
    return Update(of, dtype, of.hyper(lr=lr))


def narrowing_factors() -> list[float]:
    """Factors that take products with 16-bit values to ties, to subnormals and to infinity."""
    near_one = [1 + 2.0**-n for n in (7, 8, 9, 10, 11, 12)]
    small = [2.0**-n for n in (3, 8, 14, 20, 30, 100, 126)]
    rng = np.random.default_rng(0)
    return [*near_one, *small, 3 * 2.0**-16, 0.999, 3.0, 1e4, 2.0**100, *rng.uniform(0.5, 2, 16)]


# ---- arrays


def is_of_squares(name: str) -> bool:
    """Whether a state is a mean or a sum of squares, never negative."""
    return "sq" in name or "sum" in name


def address(x: np.ndarray) -> int:
    return x.__array_interface__["data"][0]


def every_value(dtype: str) -> np.ndarray:
    """The 65536 values of a 16-bit type."""
    return np.arange(1 << 16, dtype=np.uint32).astype(np.uint16).view(STORED[dtype])


def special_values(dtype: str) -> np.ndarray:
    """Zeros, subnormals, the smallest and largest normals, infinities and NaN, of both signs."""
    stored = STORED[dtype]
    mantissa, width = MANTISSA[dtype], 8 * stored.itemsize
    one_ulp, sign = 1 << mantissa, 1 << width - 1
    infinity = sign - one_ulp
    sizes = [0, 1, 2, one_ulp - 1, one_ulp, one_ulp + 1, infinity - 1, infinity]
    sizes += [infinity + 1, infinity + one_ulp // 2, sign - 1]  # NaN: signalling, quiet, full
    sizes += [infinity // one_ulp // 2 * one_ulp, infinity // 2]  # about one
    return np.array([s | x for s in (0, sign) for x in sizes], BITS[stored.itemsize]).view(stored)


def ordinary_values(dtype: str, count: int, rng: np.random.Generator) -> np.ndarray:
    """Normal values of sizes from 1e-6 to 10."""
    values = rng.standard_normal(count) * 10.0 ** rng.uniform(-6, 1, count)
    wide = values.astype(np.float64 if dtype == "float64" else np.float32)
    return reference.narrow(wide, dtype)


def random_arrays(of: Variant, dtype: str, count: int, seed: str = "") -> Arrays:
    """Half ordinary elements (in every array at once), half special values and random bits."""
    rng = np.random.default_rng(zlib.crc32(f"{of}-{dtype}-{count}-{seed}".encode()))
    stored = STORED[dtype]
    unsigned = BITS[stored.itemsize]
    ordinary = rng.random(count) < 0.5
    arrays = {}
    for name in of.arrays:
        bits = ordinary_values(dtype, count, rng).view(unsigned)
        if is_of_squares(name):
            bits = bits & unsigned.type(np.iinfo(unsigned).max // 2)
        special = rng.choice(special_values(dtype).view(unsigned), count)
        noise = rng.integers(0, np.iinfo(unsigned).max, count, unsigned, endpoint=True)
        odd = np.where(rng.random(count) < 0.5, special, noise)
        arrays[name] = np.where(ordinary, bits, odd).view(stored)
    return arrays


def ordinary_arrays(of: Variant, dtype: str, count: int, seed: str = "") -> Arrays:
    """Elements as in training."""
    rng = np.random.default_rng(zlib.crc32(f"{of}-{dtype}-{count}-{seed}".encode()))
    arrays = {name: ordinary_values(dtype, count, rng) for name in of.arrays}
    for name, x in arrays.items():
        if is_of_squares(name):
            arrays[name] = reference.narrow(np.abs(reference.widen(x, dtype)), dtype)
    return arrays


def copies(arrays: Arrays) -> Arrays:
    return {name: x.copy() for name, x in arrays.items()}


# ---- comparison


def bits(x: np.ndarray) -> np.ndarray:
    """The bits of stored values; NaN is NaN, but in 16 bits there is one NaN and it is exact."""
    unsigned = BITS[x.itemsize]
    if x.itemsize > 2:
        x = np.where(np.isnan(x), x.dtype.type(np.nan), x)
    return np.ascontiguousarray(x).view(unsigned)


def first_difference(found: Arrays, expected: Arrays, before: Arrays) -> str:
    """The first element that differs in any array, with its inputs; empty where none does."""
    for name, x in expected.items():
        unlike = np.flatnonzero(bits(found[name]) != bits(x))
        if unlike.size:
            at = unlike[0]
            size = 2 * x.itemsize
            inputs = {n: f"{b.view(BITS[b.itemsize])[at]:#0{size + 2}x}" for n, b in before.items()}
            return (
                f"{name}[{at}] of {x.size} is {bits(found[name])[at]:#0{size + 2}x}, "
                f"the reference {bits(x)[at]:#0{size + 2}x}, from {inputs} "
                f"({unlike.size} elements differ)"
            )
    return ""


def assert_same(found: Arrays, expected: Arrays, before: Arrays, where: object = "") -> None:
    difference = first_difference(found, expected, before)
    assert not difference, f"{where}: {difference}"


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    before = _core.isa()
    _core.use_isa(name)
    try:
        yield
    finally:
        _core.use_isa(before)
