"""The rules through torch's operations, for tensors that have no plain memory to walk over.

The functions of :mod:`flatstep.reference` run unchanged: the same operations in the same order,
in float32 (float64 for float64), rounded once on the store. torch's own root and its kernels'
choice of instructions may differ in the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableMapping
from types import SimpleNamespace
from typing import Any

import torch

from flatstep import reference


class TorchMath:
    """What :class:`flatstep.reference.NumpyMath` is for NumPy."""

    @staticmethod
    def root(x: torch.Tensor) -> torch.Tensor:
        """The square root."""
        return x.sqrt()

    @staticmethod
    def maximum(a: torch.Tensor, b: torch.Tensor | float) -> torch.Tensor:
        """The larger one; NaN where either is NaN."""
        return torch.maximum(a, b if isinstance(b, torch.Tensor) else torch.full_like(a, b))

    @staticmethod
    def snap(x: torch.Tensor) -> torch.Tensor:
        """Zero in place of a subnormal."""
        return torch.where(x.abs() < torch.finfo(x.dtype).tiny, torch.zeros_like(x), x)


def _root(x: Any) -> Any:
    return x.sqrt() if isinstance(x, torch.Tensor) else math.sqrt(x)


def _widen(x: torch.Tensor) -> torch.Tensor:
    if x.is_complex():
        x = torch.view_as_real(x.resolve_conj())
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def _store(to: torch.Tensor, x: torch.Tensor) -> None:
    to.copy_(torch.view_as_complex(x) if to.is_complex() else x)


def update(
    rule: str,
    flags: Mapping[str, bool],
    hyper: Mapping[str, Any],
    param: torch.Tensor,
    grad: torch.Tensor,
    states: Mapping[str, torch.Tensor],
    step: int,
    scale: float,
) -> None:
    """One update in place; differentiable in the hyper-parameters that are tensors."""
    prepare, rule_update = reference.RULES[rule]
    k = SimpleNamespace(**prepare(hyper, step, scale, root=_root))
    # Clones: what autograd saves of these must outlive the stores below.
    wide = {name: _widen(state.clone()) for name, state in states.items()}
    new = rule_update(_widen(param.clone()), _widen(grad), wide, k, **flags, xp=TorchMath)
    _store(param, new)
    for name, state in states.items():
        _store(state, wide[name])


def update_sparse(
    hyper: Mapping[str, float],
    flags: Mapping[str, bool],
    param: torch.Tensor,
    grad: torch.Tensor,
    states: MutableMapping[torch.Tensor, dict[str, Any]],
    scale: float,
) -> None:
    """SGD with a sparse gradient, as torch's for-loop does it: the buffer is sparse too."""
    if scale != 1:
        grad = grad * scale
    if flags["l2"]:
        grad = grad.add(param, alpha=hyper["weight_decay"])
    if flags["momentum"]:
        buffer = states[param].get("momentum_buffer")
        if buffer is None:
            buffer = states[param]["momentum_buffer"] = grad.clone().detach()
        else:
            buffer.mul_(hyper["momentum"]).add_(grad, alpha=1 - hyper["dampening"])
        grad = grad.add(buffer, alpha=hyper["momentum"]) if flags["nesterov"] else buffer
    param.add_(grad, alpha=-hyper["lr"])
