"""What a parameter must be: the reference's bits, and the exact result with its bound."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatstep import _core, reference
from flatstep.conformance.bounds import Bounded, BoundedMath
from flatstep.verify import ulp
from flatstep.verify.cases import FORMATS, Bits
from flatstep.verify.results import Value

# The rule that a subject follows, by the reference's name.
FAMILY = {"adam": "adam", "adamw": "adam", "rmsprop": "rmsprop", "sgd": "sgd"}

_BOTH = {"lr": 1e-3, "weight_decay": 0.0, "maximize": False}
_ADAM = _BOTH | {
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "amsgrad": False,
    "decoupled_weight_decay": False,
}
# Every option that is part of a rule, as torch's class has it where nothing is said.
DEFAULTS: dict[str, dict[str, Any]] = {
    "adam": _ADAM,
    "adamw": _ADAM | {"weight_decay": 1e-2, "decoupled_weight_decay": True},
    "rmsprop": _BOTH | {"lr": 1e-2, "alpha": 0.99, "eps": 1e-8, "momentum": 0.0, "centered": False},
    "sgd": _BOTH | {"momentum": 0.0, "dampening": 0.0, "nesterov": False},
}

STATES = {
    rule["name"]: sorted({name for _, states in rule["variants"] for name in states})
    for rule in _core.rules()
}


@dataclass(frozen=True)
class Asked:
    """What options ask of a rule: the reference's flags, hyper-parameters and gradient's scale."""

    flags: dict[str, bool]
    hyper: dict[str, float]
    scale: float

    @staticmethod
    def of(rule: str, options: Mapping[str, Any]) -> Asked:
        """Of options by torch's names; those that are not part of the rule are left out."""
        all_options = {**DEFAULTS[rule], **options}
        hyper = {
            name: float(value)
            for name, value in all_options.items()
            if name in DEFAULTS[rule] and name != "betas"
        }
        if "betas" in all_options:
            hyper["beta1"], hyper["beta2"] = map(float, all_options["betas"])
        decay, momentum = hyper["weight_decay"] != 0, hyper.get("momentum", 0.0) != 0
        flags = {
            "adam": {
                "amsgrad": bool(hyper.get("amsgrad")),
                "l2": decay and rule == "adam" and not hyper["decoupled_weight_decay"],
            },
            "rmsprop": {"momentum": momentum, "centered": bool(hyper.get("centered")), "l2": decay},
            "sgd": {
                "momentum": momentum,
                "nesterov": momentum and bool(hyper.get("nesterov")),
                "l2": decay,
            },
        }
        return Asked(flags[FAMILY[rule]], hyper, -1.0 if hyper["maximize"] else 1.0)


def name_of(dtype: torch.dtype) -> str:
    """As in ``float32``."""
    return str(dtype).removeprefix("torch.")


def bits_of(x: Tensor) -> Bits:
    """The bits of a tensor's elements, in the order of its indices."""
    form = FORMATS[name_of(x.dtype)]
    integer = {16: torch.int16, 32: torch.int32, 64: torch.int64}[form.bits]
    flat: Bits = x.detach().cpu().contiguous().reshape(-1).view(integer).numpy()
    return flat.view(form.unsigned).copy()


def value_of(x: Tensor) -> Value:
    """A tensor of one element, for people."""
    (bits,) = bits_of(x)
    digits = FORMATS[name_of(x.dtype)].bits // 4
    return Value(f"0x{int(bits):0{digits}x}", f"{float(x):.9g}")


@dataclass(frozen=True)
class Distance:
    """How a parameter differs from what it must be.

    Attributes:
        ulp: The largest distance from the reference's bits.
        wrong: The places, in the order of the indices, of the elements that are out of bounds.
        allowed: The bound at the first of them; None where it is one of NaN or infinity.
    """

    ulp: int
    wrong: list[int]
    allowed: float | None


class Truth:
    """One parameter's way through the steps that it is given."""

    def __init__(self, rule: str, param: Tensor) -> None:
        self.rule = rule
        self.dtype = name_of(param.dtype)
        self.count = 0
        self.stored = self._storage(param)
        names = STATES[FAMILY[rule]]
        self.states = {name: np.zeros_like(self.stored) for name in names}
        self._exact = self._wide(param)
        zero = self._wide(torch.zeros_like(param))
        self._exact_states = dict.fromkeys(names, zero)

    def _storage(self, x: Tensor) -> Bits:
        return bits_of(x).view(FORMATS[self.dtype].storage)

    def _wide(self, x: Tensor) -> Bounded:
        info = torch.finfo(x.dtype)
        least = info.smallest_normal * info.eps
        return Bounded(x.detach().double().cpu().reshape(-1).numpy().copy(), 0.0, info.eps, least)

    def advance(self, grad: Tensor, options: Mapping[str, Any]) -> None:
        """Makes a step, in place."""
        asked = Asked.of(self.rule, options)
        self.count += 1
        reference.update(
            FAMILY[self.rule],
            asked.flags,
            asked.hyper,
            self.stored,
            self._storage(grad),
            self.states,
            step=self.count,
            scale=asked.scale,
            dtype=self.dtype,
        )
        rule = reference.RULES[FAMILY[self.rule]]
        with np.errstate(all="ignore"):
            scalars = rule.prepare(
                self._scalars(asked.hyper), self.count, asked.scale, BoundedMath.root
            )
            self._exact = rule.update(
                self._exact,
                self._wide(grad),
                self._exact_states,
                SimpleNamespace(**scalars),
                **asked.flags,
                xp=BoundedMath,
            )

    def _scalars(self, hyper: Mapping[str, float]) -> dict[str, Any]:
        """Hyper-parameters in float32 (float64 beside float64); zero and one are exact."""
        info = np.finfo(np.float64 if self.dtype == "float64" else np.float32)
        unit, least = float(info.eps), float(info.smallest_subnormal)
        return {
            name: x if x in (0.0, 1.0) else Bounded(x, unit * abs(x), unit, least)
            for name, x in hyper.items()
        }

    def distance(self, param: Tensor) -> Distance:
        """How a parameter differs from what it must be now."""
        got, expected = bits_of(param), self.stored.view(FORMATS[self.dtype].unsigned)
        wide = param.detach().double().cpu().reshape(-1).numpy()
        with np.errstate(all="ignore"):
            off = np.abs(wide - self._exact.value)
        finite = np.isfinite(self._exact.value)
        wrong = np.where(finite, ~(off <= self._exact.error), np.isfinite(wide))
        apart = ulp.distance(got, expected, self.dtype)
        apart = apart[np.isfinite(wide) & finite]
        places = np.flatnonzero(wrong).tolist()
        first = float(self._exact.error[places[0]]) if places else math.nan
        worst = int(apart.max()) if apart.size else 0
        return Distance(worst, places, first if math.isfinite(first) else None)

    def expected(self) -> Tensor:
        """The reference's parameter, flat."""
        return self._tensor(self.stored)

    def state(self, name: str) -> Tensor:
        """The reference's state, flat."""
        return self._tensor(self.states[name])

    def _tensor(self, stored: Bits) -> Tensor:
        integer = {16: np.int16, 32: np.int32, 64: np.int64}[FORMATS[self.dtype].bits]
        dtype: torch.dtype = getattr(torch, self.dtype)
        return torch.from_numpy(stored.view(integer).copy()).view(dtype)
