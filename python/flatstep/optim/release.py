"""Updates during backward: each parameter as soon as its gradient is complete."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from flatstep import flat
from flatstep.optim import clipping, extras

if TYPE_CHECKING:
    from flatstep.optim.base import Optimizer


class Release:
    """The handle of updates in backward; :meth:`remove` ends them.

    :meth:`~flatstep.optim.base.Optimizer.step_in_backward` returns it.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._alone: dict[torch.Tensor, Optimizer] = {}
        self._hooks = []
        self._in_force = True
        before = 0  # elements
        for index, group in enumerate(optimizer.param_groups):
            for place, param in enumerate(group["params"]):
                if param.requires_grad:
                    step = partial(self._step, index, place, before)
                    self._hooks.append(param.register_post_accumulate_grad_hook(step))
                before += param.numel()
        optimizer._releases += 1

    def remove(self) -> None:
        """Updates no longer happen in backward."""
        if not self._in_force:
            return
        self._in_force = False
        self._optimizer._releases -= 1
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> Release:
        """Nothing more: backward steps already."""
        return self

    def __exit__(self, *_: object) -> None:
        """As :meth:`remove`."""
        self.remove()

    def _step(self, index: int, place: int, before: int, param: torch.Tensor) -> None:
        whole = self._optimizer
        refuse_options(whole)
        group = whole.param_groups[index]
        alone = self._alone.get(param)
        if alone is None:
            alone = self._alone[param] = whole.for_one(index, place, before)
        alone.param_groups[0] = {**group, "params": [param]}
        if "param_names" in group:
            alone.param_groups[0]["param_names"] = [group["param_names"][place]]
        if alone.state.get(param) is not whole.state.get(param):
            alone.state.pop(param, None)
            if param in whole.state:
                alone.state[param] = whole.state[param]
        with torch.no_grad():
            alone.step_alone()
        if param in alone.state:
            whole.state[param] = alone.state[param]
        param.grad = None


def refuse(optimizer: Optimizer) -> None:
    """Raises ValueError where a step needs more than one gradient at a time, or none is freed."""
    if optimizer._watch is not None:
        raise ValueError(
            "flatstep.profile() and step_in_backward() exclude each other: there is no step to "
            "record; leave the `with flatstep.profile(...)` first"
        )
    refuse_options(optimizer)
    for group in optimizer.param_groups:
        if any(map(flat.holds_gradient, group["params"])):
            raise ValueError(
                "a FlatBuffer's gradients and step_in_backward() exclude each other: they are "
                "never freed; make it with FlatBuffer(..., gradients=False)"
            )


def refuse_options(optimizer: Optimizer) -> None:
    """The part of :func:`refuse` that can change between steps, and is cheap to ask."""
    asked = clipping.asked(optimizer.param_groups)
    if asked is not None:
        names = ("max_grad_norm", "error_if_nonfinite", "skip_nonfinite")
        name = next(
            name
            for name in names
            for group in optimizer.param_groups
            if extras.option(group, name) not in (None, False)
        )
        raise ValueError(
            f"{name} and step_in_backward() exclude each other: a norm is of all gradients, which "
            f"are never there together; drop {name}, or call step() after backward"
        )
    if getattr(optimizer, "grad_scale", None) is not None or any(
        group.get("fused") for group in optimizer.param_groups
    ):
        raise ValueError(
            "fused=True (which lets GradScaler leave its work to the step) and step_in_backward() "
            "exclude each other: an overflow is known after backward, when the parameters are "
            "updated already; drop fused=True and GradScaler, or call step() after backward"
        )
    if any(group["differentiable"] for group in optimizer.param_groups):
        raise ValueError("differentiable=True and step_in_backward() exclude each other; drop one")
