"""An optimizer's run in NumPy: what `flatstep.reference` makes of the same gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatstep import _core, reference
from flatstep._torch import STORED
from flatstep.optim.extras import DEFAULTS

RULES = {rule["name"]: rule for rule in _core.rules()}


def stored(tensor: Tensor) -> np.ndarray:
    """A copy of a tensor's values, flat, as the reference takes them."""
    flat = tensor.detach().contiguous().reshape(-1).clone()
    if flat.dtype == torch.bfloat16:
        return flat.view(torch.int16).numpy().view(np.uint16)
    return flat.numpy()


class ReferenceRun:
    """Follows an optimizer, whose parameters it takes over as they are, in NumPy."""

    def __init__(self, opt: Any) -> None:
        self.opt = opt
        self.params = [param for group in opt.param_groups for param in group["params"]]
        self.groups = [group for group in opt.param_groups for _ in group["params"]]
        self.p = [stored(param) for param in self.params]
        self.states: list[dict[str, np.ndarray]] = [{} for _ in self.params]
        self.beside: list[dict[str, np.ndarray]] = [{} for _ in self.params]
        self.steps = 0
        self.norm: float | None = None

    def option(self, place: int, name: str) -> Any:
        return self.groups[place].get(name, DEFAULTS[name])

    def step(self, unscale: float = 1.0) -> None:
        """One step with the parameters' gradients, which stay as they are."""
        self.steps += 1
        grads = [stored(param.grad) for param in self.params]
        dtypes = [STORED[param.grad.dtype] for param in self.params]
        kinds = {self.option(place, "norm_type") for place in range(len(grads))}
        clips = any(self.option(i, "max_grad_norm") is not None for i in range(len(grads)))
        if clips:
            pairs = list(zip(grads, dtypes, strict=True))
            self.norm = reference.norm(pairs, kinds.pop(), unscale)
        first = 0
        for place, param in enumerate(self.params):
            self._update(place, param, grads[place], first, unscale)
            first += param.numel()

    def _update(
        self, place: int, param: Tensor, grad: np.ndarray, first: int, unscale: float
    ) -> None:
        group, size = self.groups[place], param.numel()
        flags, hyper = self.opt.variant(group)
        rule = RULES[self.opt.rule]
        names = dict(rule["variants"])[flags]
        dtype = STORED[param.dtype]
        state_dtype = STORED[self.option(place, "state_dtype") or param.dtype]
        kind = {"bfloat16": np.uint16, "float16": np.float16, "float64": np.float64}
        for name in names:
            zeros = np.zeros(size, kind.get(state_dtype, np.float32))
            self.states[place].setdefault(name, zeros)
        beside = self.beside[place]
        wide = reference.widen(self.p[place], dtype)
        if self.option(place, "master") == "float32":
            beside.setdefault("master", wide.copy())
        if self.option(place, "master") == "split":
            beside.setdefault("master", np.zeros(size, np.uint16))
        if self.option(place, "ema_decay") is not None:
            beside.setdefault("average", wide.copy())
        scale = -unscale if group["maximize"] else unscale
        if self.norm is not None and self.option(place, "max_grad_norm") is not None:
            scale *= reference.clip_factor(self.norm, self.option(place, "max_grad_norm"))
        reference.update(
            self.opt.rule,
            reference.flag_names(self.opt.rule, flags, rule["flags"]),
            dict(zip(rule["hyper"], (float(x) for x in hyper), strict=True)),
            self.p[place],
            grad,
            {name: self.states[place][name] for name in names},
            step=self.steps,
            scale=scale,
            dtype=dtype,
            grad_dtype=STORED[param.grad.dtype],
            state_dtype=state_dtype,
            extras=reference.Extras(
                master=beside.get("master"),
                stochastic=self.option(place, "rounding") == "stochastic",
                seed=self.option(place, "seed"),
                step_count=self.steps,
                first=first,
                average=beside.get("average"),
                average_decay=self.option(place, "ema_decay") or 0.0,
            ),
        )

    def assert_same(self) -> None:
        """The optimizer's parameters and states have the reference's bits."""
        places = {"master": "master", "master_low": "master", "average": "average"}
        for place, param in enumerate(self.params):
            np.testing.assert_array_equal(stored(param), self.p[place], strict=True)
            state = self.opt.state[param]
            wanted = {**self.states[place]}
            for name, of in places.items():
                if name in state:
                    wanted[name] = self.beside[place][of]
            assert set(wanted) == set(state) - {"step"}
            for name, bits in wanted.items():
                found = stored(state[name])
                assert found.view(f"u{found.itemsize}").tolist() == (
                    bits.view(f"u{bits.itemsize}").tolist()
                ), name
