"""How far torch's own optimizers are from the reference: said, not judged."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import flatstep
from flatstep import reference
from flatstep._torch import DTYPES
from flatstep.optim.base import Optimizer
from flatstep.optim.rules import RULES
from flatstep.torch_paths import paths_of
from flatstep.verify import ulp
from flatstep.verify.cases import FORMATS, Bits
from flatstep.verify.results import Distance

STEPS = 20
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
    for path, choice in paths_of(torchs).items():
        # Older torch lacks some paths for some dtypes.
        with contextlib.suppress(RuntimeError):
            trained[path] = _train(torchs, options | choice, dtype)
    label = " ".join(f"{key}={value}" for key, value in options.items()) or "defaults"
    found = []
    for implementation, bits in trained.items():
        finite = ulp.is_finite(bits, dtype)
        apart = ulp.distance(bits[finite], definition[finite], dtype)
        worst, mean = (int(apart.max()), float(apart.mean())) if apart.size else (0, 0.0)
        lost = float(1 - finite.mean())
        found.append(Distance(name, label, dtype, implementation, worst, mean, lost))
    return found


@functools.cache
def _gradients(step: int, dtype: str) -> list[Tensor]:
    """Gradients with a steady part and a noisy one, from 1e-4 to 1 in size."""
    sizes, steady = ulp.draw(2, torch.rand), ulp.draw(3, torch.randn)
    noisy = ulp.draw(4 + step, torch.randn)
    return [
        (10 ** (-4 * size) * (a + b) / 2).to(DTYPES[dtype])
        for size, a, b in zip(sizes, steady, noisy, strict=True)
    ]


def _train(optimizer: Any, options: dict[str, Any], dtype: str) -> Bits:
    params = ulp.weights(dtype)
    opt = optimizer(params, **options)
    for step in range(STEPS):
        for p, gradient in zip(params, _gradients(step, dtype), strict=True):
            p.grad = gradient.clone()
        opt.step()
    return ulp.bits_of(params, dtype)


def _train_reference(optimizer: type[Optimizer], options: dict[str, Any], dtype: str) -> Bits:
    form = FORMATS[dtype]
    params = ulp.weights(dtype)
    opt: Any = optimizer(params, **options)
    group = opt.param_groups[0]
    flags, values = opt.variant(group)
    rule = RULES[opt.rule]
    p = ulp.bits_of(params, dtype).copy()
    states = {name: np.zeros_like(p) for name in dict(rule["variants"])[flags]}
    for step in range(STEPS):
        reference.update(
            opt.rule,
            reference.flag_names(opt.rule, flags, rule["flags"]),
            dict(zip(rule["hyper"], map(float, values), strict=True)),
            p.view(form.storage),
            ulp.bits_of(_gradients(step, dtype), dtype).view(form.storage),
            {name: bits.view(form.storage) for name, bits in states.items()},
            step=step + 1,
            scale=-1.0 if group["maximize"] else 1.0,
            dtype=dtype,
        )
    return p
