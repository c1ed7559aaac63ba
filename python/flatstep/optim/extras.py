"""What a step does beside torch's update: the options that :mod:`torch.optim` does not have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, TypedDict

import torch

from flatstep import _core

_BITS = _core.EXTRAS
RULE_FLAGS = 0xFF  # of a variant's bits, those of the rule; extras are above
WRITES_GRAD = _BITS["writes_grad"]


class Extras(TypedDict, total=False):
    """Options of every optimizer here, of all groups or of one.

    Attributes:
        state_dtype: Of the states: ``torch.float32``, ``torch.bfloat16``, or None for the
            parameter's, which is torch's rule.
        master: Where the weights of 16-bit parameters are kept: ``"float32"``, a copy in the state;
            ``"split"``, 16 more bits beside each bfloat16; None, in the parameter alone.
        rounding: ``"nearest"``, or ``"stochastic"``: bfloat16 parameters without a master are
            rounded up with a probability of what lies below their last bit.
        seed: Of stochastic rounding, from 0; with the step and the element it decides every bit.
        max_grad_norm: The gradients of all groups together are scaled down to this norm, inside the
            update; they are not written.
        norm_type: 2 or infinity, the same in all groups.
        error_if_nonfinite: Whether a norm that is not finite raises RuntimeError.
        skip_nonfinite: Whether a step with such a norm changes nothing, and is counted.
        ema_decay: Decay of an exponential moving average of the weights, kept in the state.
        write_unscaled_grads: Whether a step that undoes a loss scale stores the gradients back
            without it, as torch's fused optimizers do.
    """

    state_dtype: torch.dtype | None
    master: Literal["float32", "split"] | None
    rounding: Literal["nearest", "stochastic"]
    seed: int
    max_grad_norm: float | None
    norm_type: float
    error_if_nonfinite: bool
    skip_nonfinite: bool
    ema_decay: float | None
    write_unscaled_grads: bool


DEFAULTS: dict[str, Any] = {
    "state_dtype": None,
    "master": None,
    "rounding": "nearest",
    "seed": 0,
    "max_grad_norm": None,
    "norm_type": 2.0,
    "error_if_nonfinite": False,
    "skip_nonfinite": False,
    "ema_decay": None,
    "write_unscaled_grads": False,
}
_NAMES = frozenset(DEFAULTS)

AVERAGE = "average"
MASTER = "master"
MASTER_LOW = "master_low"
# What the kernels call the states beside the rule's.
PLACES = {MASTER: "master", MASTER_LOW: "master", AVERAGE: "average"}


def are_in(group: Mapping[str, Any]) -> bool:
    """Whether a group has any of these options, be it at its default."""
    return not _NAMES.isdisjoint(group)


def option(group: Mapping[str, Any], name: str) -> Any:
    """One of these options of a group."""
    return group.get(name, DEFAULTS[name])


def validate(options: Mapping[str, Any]) -> None:
    """Raises ValueError for options that are out of range or exclude each other."""
    if not are_in(options):
        return
    of = {name: option(options, name) for name in DEFAULTS}
    for name, allowed in {
        "state_dtype": (None, torch.float32, torch.bfloat16),
        "master": (None, "float32", "split"),
        "rounding": ("nearest", "stochastic"),
        "norm_type": (2, math.inf),
    }.items():
        if of[name] not in allowed:
            choices = " or ".join(repr(choice) for choice in allowed)
            raise ValueError(f"Invalid {name} value: {of[name]!r}; use {choices}")
    seed = of["seed"]
    if not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"Invalid seed value: {seed!r}; use an integer from 0 to 2**64 - 1")
    if of["max_grad_norm"] is not None and not of["max_grad_norm"] >= 0:
        raise ValueError(f"Invalid max_grad_norm value: {of['max_grad_norm']}; use 0 or more")
    if of["ema_decay"] is not None and not 0 <= of["ema_decay"] <= 1:
        raise ValueError(f"Invalid ema_decay value: {of['ema_decay']}; use 0 to 1")
    if of["rounding"] == "stochastic" and of["master"] is not None:
        raise ValueError(
            f"rounding='stochastic' and master={of['master']!r} exclude each other: a master keeps "
            "what rounding would lose; drop one of them"
        )
    if of["error_if_nonfinite"] and of["skip_nonfinite"]:
        raise ValueError(
            "error_if_nonfinite and skip_nonfinite exclude each other; choose what a norm that is "
            "not finite should do"
        )
    beside = [name for name in ("state_dtype", "master", "ema_decay") if of[name] is not None]
    beside += ["rounding"] if of["rounding"] != "nearest" else []
    if options.get("differentiable") and beside:
        raise ValueError(
            f"differentiable and {beside[0]} exclude each other: autograd follows torch's "
            f"operations, which have no {beside[0]}; drop one of them"
        )


def validate_param(options: Mapping[str, Any], param: torch.Tensor, name: str) -> None:
    """Raises ValueError where a parameter's dtype and an option exclude each other."""
    master, rounding = option(options, "master"), option(options, "rounding")
    dtype = param.dtype
    what = f"{name} has dtype {dtype}: "
    if master is not None and dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"{what}master={master!r} is for bfloat16 and float16 parameters, others are their own "
            "master; put this one into a group with master=None"
        )
    if master == "split" and dtype != torch.bfloat16:
        raise ValueError(
            f"{what}master='split' is for bfloat16, the upper half of a float32; use "
            "master='float32'"
        )
    if rounding == "stochastic" and dtype != torch.bfloat16:
        raise ValueError(
            f"{what}rounding='stochastic' is for bfloat16; use rounding='nearest' in its group"
        )
    state_dtype = option(options, "state_dtype")
    if state_dtype is not None and (dtype == torch.float64 or dtype.is_complex):
        raise ValueError(
            f"{what}state_dtype={state_dtype} is for float32, bfloat16 and float16 parameters; use "
            "state_dtype=None in its group"
        )


def bits(group: Mapping[str, Any], *, unscales: bool) -> int:
    """What a group asks of its pass, as bits above the rule's flags."""
    if not are_in(group):
        return 0
    found = 0
    if option(group, "master") is not None:
        found |= _BITS["master_copy" if group["master"] == "float32" else "master_split"]
    if option(group, "rounding") == "stochastic":
        found |= _BITS["stochastic"]
    if option(group, "ema_decay") is not None:
        found |= _BITS["average"]
    if unscales and option(group, "write_unscaled_grads"):
        found |= _BITS["writes_grad"]
    return found


def names(group: Mapping[str, Any]) -> tuple[str, ...]:
    """The states that a group's options call for, after the rule's."""
    if not are_in(group):
        return ()
    master = {None: (), "float32": (MASTER,), "split": (MASTER_LOW,)}[option(group, "master")]
    average = () if option(group, "ema_decay") is None else (AVERAGE,)
    return (*master, *average)


def dtype_of(name: str, group: Mapping[str, Any], param: torch.Tensor) -> torch.dtype | None:
    """The dtype that a state must have; None where the options leave it open."""
    if name == MASTER:
        return torch.float32
    if name == MASTER_LOW:
        return torch.int16
    if name == AVERAGE:
        return average_dtype(param)
    found: torch.dtype | None = option(group, "state_dtype")
    return found


def average_dtype(param: torch.Tensor) -> torch.dtype:
    """The dtype of a parameter's average: the one that its update is computed in."""
    if param.dtype.is_complex or param.dtype == torch.float64:
        return param.dtype
    return torch.float32


def numbers(group: Mapping[str, Any], unscale: float) -> tuple[float, float, int]:
    """What the kernel is told: the gradients' factor, the averages' decay, the seed."""
    if not are_in(group):
        return (1.0, 0.0, 0)
    return (unscale, float(option(group, "ema_decay") or 0.0), option(group, "seed"))


def counts_steps(group: Mapping[str, Any]) -> bool:
    """Whether a group needs a count of its steps, whatever its rule."""
    return bool(option(group, "rounding") == "stochastic")


def refuse(group: Mapping[str, Any], name: str) -> None:
    """Raises ValueError where torch's operations are to do what only a kernel does."""
    asked = [what for what in ("master", "ema_decay") if option(group, what) is not None]
    asked += ["rounding"] if option(group, "rounding") != "nearest" else []
    if asked:
        raise ValueError(
            f"{name} cannot be updated by a kernel (it or its gradient is sparse, a subclass, or "
            f"on a device or of a dtype without kernels), and {asked[0]} needs one; put it into a "
            f"group without {asked[0]}"
        )
