"""The operations that stand for a step in ``torch.compile``'s graph, on plain tensors on the CPU.

``flatstep::update_`` and ``flatstep::norm`` declare what they write, and have fake implementations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from flatstep import _core, reference
from flatstep._torch import increment_version
from flatstep.optim import clipping
from flatstep.optim.routes import in_order_of
from flatstep.optim.weights import reconcile

_library = torch.library.Library("flatstep", "DEF")
_library.define(
    "update_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor(c!)[] steps, "
    "Tensor(d!)[] fresh, Tensor[] tensors, str rule, int flags, float[] numbers, "
    "Tensor? norm=None, float sign=1.0, float max_norm=-1.0, float average_decay=0.0, int seed=0, "
    "int[] firsts=[]) -> ()"
)
_library.define("norm(Tensor[] params, Tensor[] grads, float norm_type) -> Tensor")


def _update(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    states: list[torch.Tensor],
    steps: list[torch.Tensor],
    fresh: list[torch.Tensor],
    tensors: list[torch.Tensor],
    rule: str,
    flags: int,
    numbers: list[float],
    norm: torch.Tensor | None = None,
    sign: float = 1.0,
    max_norm: float = -1.0,
    average_decay: float = 0.0,
    seed: int = 0,
    firsts: Sequence[int] = (),
) -> None:
    """Updates the parameters of a group, as the plan's one call would.

    Args:
        params: Those with a gradient.
        grads: Their gradients, only read.
        states: Of the first parameter, then of the second, and so on.
        steps: How many steps each has had, or none where nobody counts.
        fresh: Not 0 where a step is the first, for a rule that does not count.
        tensors: The hyper-parameters that are tensors.
        rule: The rule's name.
        flags: Its flags and the extras.
        numbers: The hyper-parameters; NaN stands for the next of the tensors.
        norm: The norm of all gradients, where they are clipped.
        sign: -1 goes up the gradient.
        max_norm: Of the gradients; negative where there is no limit.
        average_decay: Of the averages.
        seed: Of stochastic rounding, as a signed number.
        firsts: Each parameter's first element among all, for chance, or none.
    """
    if tensors:
        rest = iter(tensors)
        numbers = [float(next(rest)) if math.isnan(number) else number for number in numbers]
    if norm is not None and max_norm >= 0:
        sign *= reference.clip_factor(float(norm), max_norm)
    each = len(states) // len(params)
    if flags & _core.EXTRAS["master_copy"]:
        place = each - 2 if flags & _core.EXTRAS["average"] else each - 1
        reconcile(zip(params, states[place::each], strict=True))
    increment_version([*params, *states, *steps])
    options = (
        *(steps, fresh, numbers, sign, torch.get_num_threads()),
        *(average_decay, seed % 2**64, firsts),
    )
    if _core.update_group(rule, flags, params, grads, states, *options):
        return
    ordered_grads = [in_order_of(grad, param) for grad, param in zip(grads, params, strict=True)]
    ordered = [in_order_of(state, params[at // each]) for at, state in enumerate(states)]
    if not _core.update_group(rule, flags, params, ordered_grads, ordered, *options):
        raise RuntimeError("a parameter's memory cannot be updated in place; clone it first")
    for state, copy in zip(states, ordered, strict=True):
        if copy is not state:
            state.copy_(copy)


def _norm(params: list[torch.Tensor], grads: list[torch.Tensor], norm_type: float) -> torch.Tensor:
    """The norm of all gradients together, 0-dim, in float64."""
    largest = norm_type == math.inf
    memories = [in_order_of(grad, param) for param, grad in zip(params, grads, strict=True)]
    norm = reference.norm_of(clipping.total_of(memories, largest), norm_type, 1.0)
    return torch.tensor(norm, dtype=torch.float64)


def _fake_update(*_: Any) -> None:
    return None


def _fake_norm(params: list[torch.Tensor], *_: Any) -> torch.Tensor:
    return params[0].new_empty((), dtype=torch.float64)


for _name, _run, _fake in (("update_", _update, _fake_update), ("norm", _norm, _fake_norm)):
    _library.impl(_name, _run, "CPU")
    torch.library.register_fake(f"flatstep::{_name}", _fake, lib=_library)

update = torch.ops.flatstep.update_
norm = torch.ops.flatstep.norm
