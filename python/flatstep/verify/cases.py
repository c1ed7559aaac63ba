"""The matrix that ``flatstep verify`` walks over, and the data of each case.

Everything of a case follows from its names and numbers, so that the same filters draw the same
bits again.
"""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from flatstep import _core, reference

Bits = npt.NDArray[Any]  # values as unsigned integers of their size
Name = TypeVar("Name", str, int)

UPDATES = 3
MANY = 70_003  # elements: enough for three threads, and odd
QUICK_SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 69, 4097, MANY)
FULL_SIZES = (*range(71), 127, 128, 129, 255, 256, 257, 1000, 4095, 4096, 4097, MANY, 262_147)


@dataclass(frozen=True)
class Format:
    """How a stored type lies in memory."""

    bits: int
    fraction: int  # bits after the point
    storage: type[Any]  # the NumPy type that flatstep.reference takes

    @property
    def unsigned(self) -> np.dtype[Any]:
        """The unsigned integer of the same size."""
        return np.dtype(f"u{self.bits // 8}")

    @property
    def sign(self) -> int:
        """The sign bit."""
        return 1 << (self.bits - 1)

    @property
    def infinity(self) -> int:
        """The bits of infinity; magnitudes above it are NaN."""
        return self.sign - (1 << self.fraction)


FORMATS = {
    "float32": Format(32, 23, np.float32),
    "float64": Format(64, 52, np.float64),
    "bfloat16": Format(16, 7, np.uint16),
    "float16": Format(16, 10, np.float16),
}


@dataclass(frozen=True)
class Setup:
    """The numbers of a case: the first step, the gradient's scale, the hyper-parameters.

    ``shift`` is how many elements each array begins after the place of the one before it, counted
    from an aligned address: 0 aligns them all.
    """

    step: int
    scale: float
    shift: int
    hyper: Mapping[str, float]

    def values(self, names: Sequence[str]) -> list[float]:
        """The hyper-parameters of a rule; one that is not listed here is a half."""
        return [self.hyper.get(name, 0.5) for name in names]


USUAL = {
    "lr": 1e-3,
    "beta1": 0.9,
    "beta2": 0.999,
    "alpha": 0.99,
    "eps": 1e-8,
    "weight_decay": 0.01,
    "momentum": 0.9,
    "dampening": 0.0,
}


def _setup(step: int, scale: float, shift: int, **hyper: float) -> Setup:
    return Setup(step, scale, shift, USUAL | hyper)


SETUPS = (
    _setup(1, 1.0, 0),
    _setup(2, -1.0, 1, lr=0.1, beta1=0.3, beta2=0.9, alpha=0.3, eps=0, dampening=0.5),
    _setup(100_000, 1 / 65536, 3, lr=0, weight_decay=0.1),
    _setup(10, 1 / 3, 1, lr=3e-3, beta1=0.3, alpha=0.9, eps=1e-3, weight_decay=0, momentum=0.5),
    _setup(1, 1.0, 5, beta1=0, beta2=0, alpha=0, eps=1, momentum=0, dampening=1),
    _setup(10, 65536.0, 1, lr=1e4, beta1=0.999, beta2=0.9999, weight_decay=10, momentum=1.5),
    _setup(1, -1 / 3, 2, lr=1, eps=0, weight_decay=1, dampening=0.3),
    _setup(100_000, 1e-30, 7, lr=1e-30, beta1=0.5, alpha=0.5, eps=1e-30, weight_decay=1e-30),
)


@dataclass(frozen=True)
class Variant:
    """A rule with one choice of its flags."""

    rule: str
    number: int
    flags: Mapping[str, bool]
    hyper: tuple[str, ...]
    states: tuple[str, ...]

    @property
    def name(self) -> str:
        """The flags that are on, as in ``amsgrad+l2``."""
        return "+".join(flag for flag, on in self.flags.items() if on) or "plain"


def all_variants() -> list[Variant]:
    """Every variant of every rule that the kernels have."""
    return [
        Variant(
            rule["name"],
            number,
            reference.flag_names(rule["name"], number, rule["flags"]),
            rule["hyper"],
            states,
        )
        for rule in _core.rules()
        for number, states in rule["variants"]
    ]


def all_dtypes() -> list[str]:
    """The stored types, in the order of the kernels' layouts."""
    return [param for param, grad, state in _core.layouts() if param == grad == state]


GPU = "cuda"


def supported_isas() -> list[str]:
    """The instruction sets that this build has and this processor runs, the narrowest first."""
    isas = [name for name, supported in reversed(_core.isas()) if supported]
    return [*isas, GPU] if _core.gpu_count() > 0 and torch.cuda.is_available() else isas


def default_threads() -> list[int]:
    """One, two, and one more than there are cores."""
    return sorted({1, 2, (os.cpu_count() or 1) + 1})


@dataclass(frozen=True)
class Case:
    """What the reference is computed for once, whatever the instruction set and the threads."""

    variant: Variant
    dtype: str
    size: int
    setup: int
    seed: int

    @property
    def numbers(self) -> Setup:
        """The setup that ``setup`` counts."""
        return SETUPS[self.setup]

    @property
    def layout(self) -> int:
        """The number of the kernels' layout."""
        return all_dtypes().index(self.dtype)


@dataclass(frozen=True)
class Selection:
    """What to verify."""

    variants: list[Variant]
    dtypes: list[str]
    isas: list[str]
    threads: list[int]
    sizes: list[int]
    setups: list[int]
    seed: int
    quick: bool

    def cases(self) -> Iterator[Case]:
        """Every case of the selection, the large sizes spread so that the time left shows true."""
        for dtype in self.dtypes:
            for setup in self.setups:
                for size in self.sizes:
                    if setup in self._setups_of(size):
                        for variant in self.variants:
                            yield Case(variant, dtype, size, setup, self.seed)

    def count(self) -> int:
        """How many comparisons a run makes."""
        setups = sum(len(self._setups_of(size)) for size in self.sizes)
        kernels = len(self.variants) * len(self.dtypes) * len(self.isas)
        return setups * kernels * len(self.threads)

    def _setups_of(self, size: int) -> list[int]:
        """In a quick run the sizes that take the time have a third of the setups."""
        return self.setups[::3] if self.quick and size >= MANY else self.setups


def select(
    *,
    quick: bool = True,
    rules: Sequence[str] | None = None,
    variants: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    isas: Sequence[str] | None = None,
    threads: Sequence[int] | None = None,
    sizes: Sequence[int] | None = None,
    setups: Sequence[int] | None = None,
    seed: int = 0,
) -> Selection:
    """Checks the names and numbers and fills in what was not given.

    Raises:
        ValueError: A name or number does not exist. The message lists what does.
    """
    every = all_variants()
    chosen = _choose("rule", rules, list(dict.fromkeys(v.rule for v in every)))
    every = [v for v in every if v.rule in chosen]
    names = _choose("variant", variants, list(dict.fromkeys(v.name for v in every)))
    for what, numbers, least in (("threads", threads, 1), ("size", sizes, 0), ("seed", [seed], 0)):
        for number in numbers or ():
            if number < least:
                raise ValueError(f"{what} must be at least {least}, not {number}")
    return Selection(
        variants=[v for v in every if v.name in names],
        dtypes=_choose("dtype", dtypes, all_dtypes()),
        isas=_choose("isa", isas, supported_isas(), "that this build has and this processor runs"),
        threads=list(threads or default_threads()),
        sizes=list(sizes or (QUICK_SIZES if quick else FULL_SIZES)),
        setups=_choose("setup", setups, list(range(len(SETUPS)))),
        seed=seed,
        quick=quick,
    )


def _choose(
    what: str, given: Sequence[Name] | None, existing: list[Name], which: str = "that exist"
) -> list[Name]:
    for name in given or ():
        if name not in existing:
            listed = ", ".join(map(str, existing))
            raise ValueError(f"there is no {what} {name!r}; those {which}: {listed}")
    return [name for name in existing if not given or name in given]


@dataclass(frozen=True)
class Data:
    """The bits that a case begins with: one row for each array."""

    param: Bits
    grads: list[Bits]  # one for each update
    states: list[Bits]
    ordinary: npt.NDArray[np.bool_]  # the elements without any special value


@functools.lru_cache(maxsize=1)
def draw(dtype: str, size: int, setup: int, seed: int) -> Data:
    """Realistic values, and in two elements of five something special in some arrays."""
    rng = np.random.default_rng([seed, size, setup, zlib.crc32(dtype.encode())])
    ordinary = rng.random(size) < 0.6
    form = FORMATS[dtype]
    most_states = max(len(variant.states) for variant in all_variants())

    def row() -> Bits:
        wide = rng.standard_normal(size) * 10.0 ** rng.uniform(-4, 1, size)
        compute = np.float64 if dtype == "float64" else np.float32
        bits = reference.narrow(wide.astype(compute), dtype).view(form.unsigned)
        return np.where(ordinary | (rng.random(size) < 0.5), bits, _special(rng, form, size))

    param, *rows = [row() for _ in range(1 + UPDATES + most_states)]
    return Data(param, rows[:UPDATES], rows[UPDATES:], ordinary)


def _special(rng: np.random.Generator, form: Format, size: int) -> Bits:
    """Zeros, limits, infinities and NaN; subnormals; and any bits at all."""
    normal, quiet = 1 << form.fraction, 1 << (form.fraction - 1)
    one = (form.sign >> 1) - normal
    inf = form.infinity
    edges = [0, 1, normal - 1, normal, normal + 1, one - 1, one, one + 1, inf - 1, inf, inf + quiet]
    known = np.array([bits | sign for sign in (0, form.sign) for bits in edges], form.unsigned)
    random = rng.integers(0, 2 * form.sign, size, form.unsigned, endpoint=False)
    subnormal = random & form.unsigned.type(form.sign | (normal - 1))
    kind = rng.integers(0, 3, size)
    return np.choose(kind, [rng.choice(known, size), subnormal, random])
