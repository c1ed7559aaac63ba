"""How far torch's own optimizers are from the reference: said, not judged."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

import flatstep
from flatstep import reference
from flatstep._torch import DTYPES
from flatstep.optim.base import RULES, Optimizer
from flatstep.verify.cases import FORMATS, Bits
from flatstep.verify.results import Distance

STEPS = 20
SHAPES = ((64, 32), (64,), (16, 64), (1001,))
PATHS: dict[str, dict[str, bool]] = {
    "for-loop": {"foreach": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "Adam": [{}, {"weight_decay": 0.1, "amsgrad": True}, {"maximize": True}],
    "AdamW": [{}, {"weight_decay": 0.1, "amsgrad": True}, {"maximize": True}],
    "RMSprop": [
        {"lr": 1e-3},
        {"lr": 1e-4, "momentum": 0.9, "centered": True, "weight_decay": 0.1},
    ],
    "SGD": [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}],
}


def measure(
    rules: Collection[str], dtypes: Collection[str]
) -> Iterator[tuple[int, int, list[Distance]]]:
    """Trains with each optimizer of flatstep and each path of torch's namesake.

    Yields:
        How many runs are done, of how many, and the distances of the latest.
    """
    runs = [
        (name, options, dtype)
        for name, optimizer in optimizers().items()
        if optimizer.rule in rules
        for dtype in dtypes
        for options in OPTIONS.get(name, [{}])
    ]
    for done, (name, options, dtype) in enumerate(runs, 1):
        yield done, len(runs), _distances(name, options, dtype)


def optimizers() -> dict[str, type[Optimizer]]:
    """The optimizers of flatstep that stand for one of torch's."""
    return {
        name: optimizer
        for name, optimizer in sorted(vars(flatstep).items())
        if isinstance(optimizer, type)
        and issubclass(optimizer, Optimizer)
        and hasattr(torch.optim, name)
    }


def _distances(name: str, options: dict[str, Any], dtype: str) -> list[Distance]:
    definition = _train_reference(optimizers()[name], options, dtype)
    trained = {"flatstep": _train(getattr(flatstep, name), options, dtype)}
    torchs = getattr(torch.optim, name)
    accepted = inspect.signature(torchs).parameters
    for path, choice in PATHS.items():
        if choice.keys() <= accepted.keys():
            # Older torch lacks some paths for some dtypes.
            with contextlib.suppress(RuntimeError):
                trained[path] = _train(torchs, options | choice, dtype)
    label = " ".join(f"{key}={value}" for key, value in options.items()) or "defaults"
    found = []
    for implementation, bits in trained.items():
        finite = _is_finite(bits, dtype)
        ulp = ulp_distance(bits[finite], definition[finite], dtype)
        worst, mean = (int(ulp.max()), float(ulp.mean())) if ulp.size else (0, 0.0)
        lost = float(1 - finite.mean())
        found.append(Distance(name, label, dtype, implementation, worst, mean, lost))
    return found


def _is_finite(bits: Bits, dtype: str) -> npt.NDArray[np.bool_]:
    form = FORMATS[dtype]
    return np.asarray((bits & form.unsigned.type(form.sign - 1)) < form.infinity)


def ulp_distance(a: Bits, b: Bits, dtype: str) -> npt.NDArray[np.uint64]:
    """How many values of ``dtype`` apart two values are: 1 for neighbours."""
    sign = np.uint64(FORMATS[dtype].sign)
    a, b = a.astype(np.uint64), b.astype(np.uint64)
    size_a, size_b = a & ~sign, b & ~sign
    apart = np.maximum(size_a, size_b) - np.minimum(size_a, size_b)
    return np.where((a ^ b) & sign, size_a + size_b, apart)


def _draw(seed: int, kind: Callable[..., Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [kind(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def _parameters(dtype: str) -> list[Tensor]:
    """Weights between 0.1 and 1 in size: none crosses zero, where an ULP says little."""
    return [
        (torch.where(sign < 0, -1, 1) * (0.1 + 0.9 * size)).to(DTYPES[dtype])
        for sign, size in zip(_draw(0, torch.randn), _draw(1, torch.rand), strict=True)
    ]


@functools.cache
def _gradients(step: int, dtype: str) -> list[Tensor]:
    """Gradients with a steady part and a noisy one, from 1e-4 to 1 in size."""
    sizes, steady, noisy = _draw(2, torch.rand), _draw(3, torch.randn), _draw(4 + step, torch.randn)
    return [
        (10 ** (-4 * size) * (a + b) / 2).to(DTYPES[dtype])
        for size, a, b in zip(sizes, steady, noisy, strict=True)
    ]


def _bits(params: list[Tensor], dtype: str) -> Bits:
    flat = torch.cat([p.detach().reshape(-1) for p in params])
    integer = {16: torch.int16, 32: torch.int32, 64: torch.int64}[FORMATS[dtype].bits]
    return flat.view(integer).numpy().view(FORMATS[dtype].unsigned)


def _train(optimizer: Any, options: dict[str, Any], dtype: str) -> Bits:
    params = _parameters(dtype)
    opt = optimizer(params, **options)
    for step in range(STEPS):
        for p, gradient in zip(params, _gradients(step, dtype), strict=True):
            p.grad = gradient.clone()
        opt.step()
    return _bits(params, dtype)


def _train_reference(optimizer: type[Optimizer], options: dict[str, Any], dtype: str) -> Bits:
    form = FORMATS[dtype]
    params = _parameters(dtype)
    opt: Any = optimizer(params, **options)
    group = opt.param_groups[0]
    flags, values = opt.variant(group)
    rule = RULES[opt.rule]
    p = _bits(params, dtype).copy()
    states = {name: np.zeros_like(p) for name in dict(rule["variants"])[flags]}
    for step in range(STEPS):
        reference.update(
            opt.rule,
            reference.flag_names(opt.rule, flags, rule["flags"]),
            dict(zip(rule["hyper"], map(float, values), strict=True)),
            p.view(form.storage),
            _bits(_gradients(step, dtype), dtype).view(form.storage),
            {name: bits.view(form.storage) for name, bits in states.items()},
            step=step + 1,
            scale=-1.0 if group["maximize"] else 1.0,
            dtype=dtype,
        )
    return p
