"""The matrix that ``flatstep verify`` walks over, and the data of each case.

Everything of a case follows from its names and numbers, so that the same filters draw the same
bits again.
"""

from __future__ import annotations

import functools
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from flatstep import _core, reference
from flatstep._torch import LAYOUT

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


# Of a case whose arrays are of several types, or with more than the rule: those with a vector and
# a part of one, on either side of a few.
MIXED_QUICK_SIZES = (0, 1, 33, 69, 4097)
MIXED_FULL_SIZES = (0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 69, 4097, MANY)
NORM = "norm"  # in place of a rule's name
NORM_TYPES = (2.0, math.inf)

FORMATS = {
    "float32": Format(32, 23, np.float32),
    "float64": Format(64, 52, np.float64),
    "bfloat16": Format(16, 7, np.uint16),
    "float16": Format(16, 10, np.float16),
}


# The further bits of a split master: no number of their own.
BITS = Format(16, 15, np.uint16)


def format_of(dtype: str) -> Format:
    """How a stored type lies in memory; of "int16" too."""
    return FORMATS.get(dtype, BITS)


@dataclass(frozen=True)
class Form:
    """The stored types of a case's arrays, and what is done beside the rule.

    Attributes:
        param: Of the parameter, as are ``grad`` and ``state`` of theirs.
        master: "copy", "split" or "".
        chance: Whether the parameter is rounded by chance.
        average: Whether there is an average of the weights.
        writes_grad: Whether the gradient is stored back.
    """

    param: str
    grad: str
    state: str
    master: str = ""
    chance: bool = False
    average: bool = False
    writes_grad: bool = False

    @property
    def is_uniform(self) -> bool:
        """Whether there is one type, and nothing beside the rule."""
        return {self.param} == {self.grad, self.state} and not self.extras

    @property
    def extras(self) -> dict[str, bool]:
        """What is done beside the rule, by the kernels' names."""
        asked = {
            "master_copy": self.master == "copy",
            "master_split": self.master == "split",
            "stochastic": self.chance,
            "average": self.average,
            "writes_grad": self.writes_grad,
        }
        return {name: True for name, is_asked in asked.items() if is_asked}

    @property
    def bits(self) -> int:
        """The same as bits of a variant."""
        return sum(_core.EXTRAS[name] for name in self.extras)

    @property
    def name(self) -> str:
        """As in ``bfloat16``, or ``bfloat16/bfloat16/float32+master_split+average``."""
        types = [self.param, self.grad, self.state]
        return "+".join([types[0] if self.is_uniform else "/".join(types), *self.extras])

    @property
    def label(self) -> str:
        """What a table calls it, together with those like it."""
        return self.param if self.is_uniform else f"{self.param}, mixed"

    def arrays(self, states: Sequence[str]) -> dict[str, str]:
        """The dtype of every array of a case, by name."""
        found = {"param": self.param, "grad": self.grad, **dict.fromkeys(states, self.state)}
        if self.master:
            found["master"] = "float32" if self.master == "copy" else "int16"
        if self.average:
            found["average"] = "float64" if self.param == "float64" else "float32"
        return found


@functools.cache
def all_forms() -> dict[str, Form]:
    """Every form by its name, first those of one type, in the order of the kernels' layouts."""
    forms = []
    for param, grad, state in _core.layouts():
        ways: list[tuple[str, bool]] = [("", False)]
        if param in ("bfloat16", "float16"):
            ways.append(("copy", False))
        if param == "bfloat16":
            ways += [("split", False), ("", True)]
        forms += [
            Form(param, grad, state, master, chance, average, writes_grad)
            for master, chance in ways
            for average in (False, True)
            for writes_grad in (False, True)
        ]
    forms.sort(key=lambda form: not form.is_uniform)
    return {form.name: form for form in forms}


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
    """The forms of one type, in the order of the kernels' layouts."""
    return [name for name, form in all_forms().items() if form.is_uniform]


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
    dtype: str  # the name of its form
    size: int
    setup: int
    seed: int

    @property
    def numbers(self) -> Setup:
        """The setup that ``setup`` counts."""
        return SETUPS[self.setup]

    @property
    def drawn(self) -> tuple[int, int, int]:
        """What its values are drawn by, whatever their dtype."""
        return self.size, self.setup, self.seed

    @property
    def form(self) -> Form:
        """The form that ``dtype`` names."""
        return all_forms()[self.dtype]

    @property
    def layout(self) -> int:
        """The number of the kernels' layout."""
        return LAYOUT[self.form.param, self.form.grad, self.form.state]


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
    sizes_are_given: bool
    with_norms: bool

    def cases(self) -> Iterator[Case]:
        """Every case of the selection, the large sizes spread so that the time left shows true."""
        for dtype in self.dtypes:
            for setup in self.setups:
                for size in self._sizes_of(dtype):
                    if setup in self._setups_of(dtype, size):
                        for variant in self.variants:
                            yield Case(variant, dtype, size, setup, self.seed)

    def count(self) -> int:
        """How many comparisons a run makes."""
        of_a_variant = sum(
            len(self._setups_of(dtype, size)) * len(self.isas)
            for dtype in self.dtypes
            for size in self._sizes_of(dtype)
        )
        of_norms = len(list(self.norms())) * len(self.isas)
        return (of_a_variant * len(self.variants) + of_norms) * len(self.threads)

    def norms(self) -> Iterator[tuple[str, int, int, float]]:
        """The dtype, size, setup and type of each norm of the selection."""
        for dtype in self.dtypes if self.with_norms else ():
            if all_forms()[dtype].is_uniform:
                for setup in self.setups:
                    for size in self.sizes:
                        if setup in self._setups_of(dtype, size):
                            yield from ((dtype, size, setup, of) for of in NORM_TYPES)

    def _sizes_of(self, dtype: str) -> Sequence[int]:
        if self.sizes_are_given or all_forms()[dtype].is_uniform:
            return self.sizes
        return MIXED_QUICK_SIZES if self.quick else MIXED_FULL_SIZES

    def _setups_of(self, dtype: str, size: int) -> list[int]:
        """In a quick run what takes the time has a part of the setups."""
        if self.quick and not all_forms()[dtype].is_uniform:
            return self.setups[list(all_forms()).index(dtype) % 4 :: 4] or self.setups[:1]
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
    chosen = _choose("rule", rules, [*dict.fromkeys(v.rule for v in every), NORM])
    every = [v for v in every if v.rule in chosen]
    names = _choose("variant", variants, list(dict.fromkeys(v.name for v in every)))
    for what, numbers, least in (("threads", threads, 1), ("size", sizes, 0), ("seed", [seed], 0)):
        for number in numbers or ():
            if number < least:
                raise ValueError(f"{what} must be at least {least}, not {number}")
    return Selection(
        variants=[v for v in every if v.name in names],
        dtypes=_choose("dtype", dtypes, list(all_forms())),
        isas=_choose("isa", isas, supported_isas(), "that this build has and this processor runs"),
        threads=list(threads or default_threads()),
        sizes=list(sizes or (QUICK_SIZES if quick else FULL_SIZES)),
        setups=_choose("setup", setups, list(range(len(SETUPS)))),
        seed=seed,
        quick=quick,
        sizes_are_given=bool(sizes),
        with_norms=NORM in chosen and not variants,
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


@functools.lru_cache(maxsize=4)
def draw(dtype: str, size: int, setup: int, seed: int) -> Data:
    """Realistic values, and in two elements of five something special in some arrays."""
    ordinary = np.random.default_rng([seed, size, setup]).random(size) < 0.6
    rng = np.random.default_rng([seed, size, setup, zlib.crc32(dtype.encode())])
    form = FORMATS[dtype]
    most_states = max(len(variant.states) for variant in all_variants())

    def row() -> Bits:
        wide = rng.standard_normal(size) * 10.0 ** rng.uniform(-4, 1, size)
        compute = np.float64 if dtype == "float64" else np.float32
        bits = reference.narrow(wide.astype(compute), dtype).view(form.unsigned)
        return np.where(ordinary | (rng.random(size) < 0.5), bits, _special(rng, form, size))

    param, *rows = [row() for _ in range(1 + UPDATES + most_states)]
    return Data(param, rows[:UPDATES], rows[UPDATES:], ordinary)


def draw_bits(size: int, setup: int, seed: int) -> Bits:
    """16 bits of any kind; a half and its neighbours, where rounding turns, in one of three."""
    rng = np.random.default_rng([seed, size, setup, 16])
    turn = rng.integers(0x7FFF, 0x8002, size, np.uint16)
    return np.where(rng.random(size) < 0.3, turn, rng.integers(0, 1 << 16, size, np.uint16))


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
