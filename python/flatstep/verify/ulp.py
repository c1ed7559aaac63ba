"""Distances in units in the last place (ULP), and data for which they mean something."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flatstep import reference
from flatstep._torch import DTYPES
from flatstep.verify.cases import FORMATS, Bits

SHAPES = ((64, 32), (64,), (16, 64), (1001,))
_SIGNED = {16: torch.int16, 32: torch.int32, 64: torch.int64}


def distance(a: Bits, b: Bits, dtype: str) -> npt.NDArray[np.uint64]:
    """How many values of ``dtype`` apart two values are: 1 for neighbours."""
    sign = np.uint64(FORMATS[dtype].sign)
    a, b = a.astype(np.uint64), b.astype(np.uint64)
    size_a, size_b = a & ~sign, b & ~sign
    apart = np.maximum(size_a, size_b) - np.minimum(size_a, size_b)
    return np.where((a ^ b) & sign, size_a + size_b, apart)


def is_finite(bits: Bits, dtype: str) -> npt.NDArray[np.bool_]:
    """Which values are neither infinite nor NaN."""
    form = FORMATS[dtype]
    return np.asarray((bits & form.unsigned.type(form.sign - 1)) < form.infinity)


def bits_of(tensors: list[Tensor], dtype: str) -> Bits:
    """The elements of tensors of ``dtype``, one tensor after the other."""
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    form = FORMATS[dtype]
    return flat.view(_SIGNED[form.bits]).numpy().view(form.unsigned)


def round_to(x: npt.NDArray[Any], dtype: str) -> Bits:
    """The values of ``dtype`` that are nearest to float64, or longer, ones: ties to even.

    Rounded once. A bfloat16 is the upper half of a float32, so the value is first cut to a float32
    whose last bit says whether something was cut off, which its second rounding cannot mistake.
    """
    form = FORMATS[dtype]
    if dtype != "bfloat16":
        with np.errstate(over="ignore", under="ignore"):
            return x.astype(form.storage).view(form.unsigned)
    nearest = x.astype(np.float32)
    inexact = nearest.astype(x.dtype) != x
    towards_zero = np.where(np.abs(nearest.astype(x.dtype)) > np.abs(x), 1, 0).astype(np.uint32)
    odd = (nearest.view(np.uint32) - towards_zero) | inexact.astype(np.uint32)
    return np.asarray(reference.narrow(odd.view(np.float32), dtype))


def draw(seed: int, kind: Callable[..., Tensor]) -> list[Tensor]:
    """Random float64 tensors of :data:`SHAPES`."""
    generator = torch.Generator().manual_seed(seed)
    return [kind(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def weights(dtype: str) -> list[Tensor]:
    """Weights between 0.1 and 1 in size, of both signs: near zero an ULP says little."""
    return [
        (torch.where(sign < 0, -1, 1) * (0.1 + 0.9 * size)).to(DTYPES[dtype])
        for sign, size in zip(draw(0, torch.randn), draw(1, torch.rand), strict=True)
    ]
