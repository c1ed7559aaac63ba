"""The data that all implementations are given, and what exact arithmetic makes of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import flatstep
from flatstep import reference
from flatstep._torch import DTYPES
from flatstep.conformance.truth import FAMILY, STATES, Asked
from flatstep.optim.base import Optimizer
from flatstep.verify import ulp

CLASSES: dict[str, type[Optimizer]] = {
    "adam": flatstep.Adam,
    "adamw": flatstep.AdamW,
    "rmsprop": flatstep.RMSprop,
    "sgd": flatstep.SGD,
}
# What every implementation is told, whatever its own defaults are.
OPTIONS: dict[str, dict[str, Any]] = {
    "adam": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
    "adamw": {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2},
    "rmsprop": {"lr": 1e-3, "alpha": 0.99, "eps": 1e-8},
    "sgd": {"lr": 1e-3, "momentum": 0.9},
}
LONG = np.finfo(np.longdouble).nmant > np.finfo(np.float64).nmant

Arrays = dict[str, npt.NDArray[Any]]


def known_dtypes() -> list[str]:
    """Those whose truth this machine can compute: float64 needs a longer type than itself."""
    return ["float32", "bfloat16", "float16", *(["float64"] if LONG else [])]


@functools.cache
def _pushes() -> Tensor:
    """How large gradients are about, and away from zero, where the weights are."""
    away = [-weight.sign() for weight in ulp.weights("float64")]
    sizes = [10 ** (size - 0.5) for size in ulp.draw(2, torch.rand)]
    return torch.cat([(a * size).reshape(-1) for a, size in zip(away, sizes, strict=True)])


@functools.lru_cache(maxsize=1)
def gradients(dtype: str, steps: int) -> Tensor:
    """One row of gradients for each step, all in one direction: from 0.08 to 5.5 in size.

    The directions take every weight away from zero, and with it every state. So no figure is about
    an ULP that has become tiny.
    """
    generator = torch.Generator().manual_seed(3)
    shape = (steps, _pushes().numel())
    noise = 1.5 * torch.rand(shape, generator=generator, dtype=torch.float64) - 0.75
    return (_pushes() * (1 + noise)).to(DTYPES[dtype])


def follow(rule: str, asked: Asked, dtype: str, stops: Sequence[int]) -> Iterator[Arrays]:
    """The parameters, as "param", and the states in exact arithmetic, or nearly.

    Float64 for parameters of 16 and 32 bits, the processor's longer type for those of 64; gradients
    and first weights are values of ``dtype``.

    Yields:
        The arrays at each stop, a number of steps.
    """
    wide = np.longdouble if dtype == "float64" else np.float64
    definition = reference.RULES[FAMILY[rule]]
    hyper = {name: wide(value) for name, value in asked.hyper.items()}
    p = torch.cat([w.reshape(-1) for w in ulp.weights(dtype)]).double().numpy().astype(wide)
    states = {name: np.zeros_like(p) for name in STATES[FAMILY[rule]]}
    for step, row in enumerate(gradients(dtype, max(stops)), 1):
        k = SimpleNamespace(**definition.prepare(hyper, step, wide(asked.scale), np.sqrt))
        grad = row.double().numpy().astype(wide)
        p = definition.update(p, grad, states, k, **asked.flags, xp=reference.NumpyMath)
        if step in stops:
            yield {"param": p, **states}
