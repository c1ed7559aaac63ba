"""Optimizers for the tests of the conformance suite: a good one, and one fault each.

Faults that show in the numbers alone are one ULP, so that only the case that is about them fails.
"""

from __future__ import annotations

import ctypes
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class SGD(torch.optim.Optimizer):
    """A plain one without a fault."""

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
    ) -> None:
        if not lr >= 0:
            raise ValueError(f"Invalid learning rate: {lr}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, self.state[p], group)
        return loss

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        g = -g if group["maximize"] else g
        g = g + group["weight_decay"] * p if group["weight_decay"] else g
        if group["momentum"]:
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = g.clone()
            else:
                buffer = group["momentum"] * state["momentum_buffer"]
                state["momentum_buffer"] = buffer + (1 - group["dampening"]) * g
            buffer = state["momentum_buffer"]
            g = g + group["momentum"] * buffer if group["nesterov"] else buffer
        self.move(p, float(group["lr"]) * g, group)

    def move(self, p: Tensor, by: Tensor, group: dict[str, Any]) -> None:
        p.sub_(by)


def nudge(x: Tensor) -> None:
    """To the next value."""
    x.copy_(torch.nextafter(x, torch.full_like(x, math.inf)))


# ---- numbers


class DropsTheTail(SGD):
    def move(self, p: Tensor, by: Tensor, group: dict[str, Any]) -> None:
        whole = p.numel() // 8 * 8 or p.numel()
        p.view(-1)[:whole].sub_(by.view(-1)[:whole])


class WrongBiasCorrection(torch.optim.Adam):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if "step" in self.state[p]:
                    self.state[p]["step"].zero_()
        return super().step(closure)


class StopsCounting(torch.optim.Adam):
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if "step" in self.state[p]:
                    self.state[p]["step"].clamp_(max=10)
        return super().step(closure)


class RoundsTheTailOtherwise(SGD):
    def move(self, p: Tensor, by: Tensor, group: dict[str, Any]) -> None:
        p.sub_(by)
        self.moves = getattr(self, "moves", 0) + 1
        if self.moves == 30:  # by then, an ULP is within the bound
            nudge(p[8:])


class SkipsNotFinite(SGD):
    def move(self, p: Tensor, by: Tensor, group: dict[str, Any]) -> None:
        if torch.isfinite(by).all():
            p.sub_(by)


class DecaysAtZeroLr(SGD):
    def move(self, p: Tensor, by: Tensor, group: dict[str, Any]) -> None:
        p.sub_(by)
        if group["lr"] == 0:
            p.mul_(0.999)


class DividesZeroByZero(torch.optim.Adam):
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.data[self.state[p]["exp_avg_sq"] == 0] = math.nan
        return loss


# ---- memory


def in_memory(x: Tensor) -> Tensor:
    """As many elements as a tensor has, one after the other from its first."""
    return x.as_strided((x.numel(),), (1,))


class WritesOutside(SGD):
    def move(self, p: Tensor, by: Tensor, group: dict[str, Any]) -> None:
        in_memory(p).sub_(by.reshape(-1))


class WritesBeyond(SGD):
    def move(self, p: Tensor, by: Tensor, group: dict[str, Any]) -> None:
        p.sub_(by)
        end = p.storage_offset() + p.numel()
        if p.dim() == 1 and p.is_contiguous() and end * p.itemsize < p.untyped_storage().nbytes():
            p.as_strided((1,), (1,), end).add_(1)


class UpdatesACopy(SGD):
    def move(self, p: Tensor, by: Tensor, group: dict[str, Any]) -> None:
        p.contiguous().sub_(by)


class PairsIndexWithMemory(SGD):
    def move(self, p: Tensor, by: Tensor, group: dict[str, Any]) -> None:
        in_memory(p).sub_(by.contiguous().view(-1))


class PairsByMemory(SGD):
    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        super().update(p, in_memory(g).view(p.shape), state, group)


class ChangesTheGradient(SGD):
    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        super().update(p, g, state, group)
        g.mul_(0.5)


class NeedsAnElement(SGD):
    def move(self, p: Tensor, by: Tensor, group: dict[str, Any]) -> None:
        p.view(-1)[0].item()
        p.sub_(by)


# ---- gradients and groups


class KnowsItsFirstGradients(SGD):
    def step(self, closure: Any = None) -> Any:
        given = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.known = getattr(self, "known", dict.fromkeys(given, True))
        for p in given:
            self.known[p]
        return super().step(closure)


class MovesWithoutGradient(SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    self.move(p, float(group["lr"]) * p, group)
        return super().step(closure)


class ReadsDefaults(SGD):
    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        super().update(p, g, state, self.defaults)


class KnowsItsFirstGroups(SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.first = getattr(self, "first", list(self.param_groups))
        every, self.param_groups = self.param_groups, self.first
        try:
            return super().step(closure)
        finally:
            self.param_groups = every


class ComputesInOneDtype(SGD):
    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        dtype = group["params"][0].dtype
        super().update(p, g.to(dtype), state, group)
        p.copy_(p.to(dtype))


class DropsTheLoss(SGD):
    def step(self, closure: Any = None) -> Any:
        super().step(closure)


# ---- options


def ignoring(base: Any, option: str) -> Any:
    """A class that takes an option and does nothing with it."""

    class Ignoring(base):  # type: ignore[misc]
        def __init__(self, params: Any, **options: Any) -> None:
            options.pop(option, None)
            super().__init__(params, **options)

    return Ignoring


SGDs = {
    name: ignoring(SGD, name)
    for name in ("lr", "weight_decay", "momentum", "dampening", "nesterov", "maximize")
}
Adams = {name: ignoring(torch.optim.Adam, name) for name in ("betas", "eps", "amsgrad")}
RMSprops = {name: ignoring(torch.optim.RMSprop, name) for name in ("alpha", "centered", "momentum")}
for _prefix, _classes in (("SGD", SGDs), ("Adam", Adams), ("RMSprop", RMSprops)):
    globals().update({f"{_prefix}Ignores_{name}": made for name, made in _classes.items()})


class SwallowsOptions(SGD):
    def __init__(self, params: Any, lr: Any = 1e-3, momentum: float = 0.0, **options: Any) -> None:
        super().__init__(params, lr, momentum)


class TakesAnyLr(SGD):
    def __init__(self, params: Any, lr: Any = 1e-3, momentum: float = 0.0) -> None:
        super().__init__(params, abs(lr), momentum)


class KeepsItsFirstLr(SGD):
    def move(self, p: Tensor, by: Tensor, group: dict[str, Any]) -> None:
        self.first = getattr(self, "first", float(group["lr"]))
        p.sub_(by / float(group["lr"]) * self.first if group["lr"] else by)


class KeepsItsFirstMomentum(SGD):
    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        self.first = getattr(self, "first", group["momentum"])
        super().update(p, g, state, {**group, "momentum": self.first})


# ---- GradScaler


class Scaling(SGD):
    """Leaves unscaling and overflows to the step, without a fault."""

    _step_supports_amp_scaling = True

    def step(self, closure: Any = None) -> Any:
        if getattr(self, "found_inf", None):
            return self.overflow()
        return super().step(closure)

    def overflow(self) -> None:
        pass

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        scale = getattr(self, "grad_scale", None)
        super().update(p, g if scale is None else g / scale, state, group)


class IgnoresTheScale(Scaling):
    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        SGD.update(self, p, g, state, group)


class LeavesJunkOnOverflow(Scaling):
    def overflow(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("momentum_buffer", torch.full_like(p, 1e30))


class DecaysStatesOnOverflow(Scaling):
    def overflow(self) -> None:
        for state in self.state.values():
            state["momentum_buffer"].mul_(0.9)


# ---- checkpoints


class HidesItsState(SGD):
    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        self.hidden = getattr(self, "hidden", {})
        super().update(p, g, self.hidden.setdefault(id(p), {}), group)


class HasOwnNames(SGD):
    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        own = {"momentum_buffer": state["own"]} if "own" in state else {}
        super().update(p, g, own, group)
        state.update({"own": own["momentum_buffer"]} if own else {})


# ---- repetition


class DependsOnThreads(SGD):
    def move(self, p: Tensor, by: Tensor, group: dict[str, Any]) -> None:
        p.sub_(by)
        if torch.get_num_threads() > 2:
            nudge(p[..., -1])


class DiffersEachTime(SGD):
    made = 0

    def __init__(self, params: Any, lr: Any = 1e-3, momentum: float = 0.0) -> None:
        super().__init__(params, lr, momentum)
        DiffersEachTime.made += 1

    def move(self, p: Tensor, by: Tensor, group: dict[str, Any]) -> None:
        p.sub_(by)
        if DiffersEachTime.made > 2:
            nudge(p)


# ---- errors and ends


class Aborts(SGD):
    def move(self, p: Tensor, by: Tensor, group: dict[str, Any]) -> None:
        if p.numel() > 3:
            os.abort()
        p.sub_(by)


class ReadsNull(SGD):
    def move(self, p: Tensor, by: Tensor, group: dict[str, Any]) -> None:
        ctypes.string_at(0)


class Exits(SGD):
    def move(self, p: Tensor, by: Tensor, group: dict[str, Any]) -> None:
        os._exit(0)


class EndsItsParent(SGD):
    def move(self, p: Tensor, by: Tensor, group: dict[str, Any]) -> None:
        os.kill(os.getppid(), 9)
        os._exit(0)


class Hangs(SGD):
    """Makes the file that FLATSTEP_TEST_HANGS names, so that a test knows when."""

    def move(self, p: Tensor, by: Tensor, group: dict[str, Any]) -> None:
        if name := os.environ.get("FLATSTEP_TEST_HANGS"):
            Path(name).touch()
        time.sleep(600)


class PrintsMuch(SGD):
    def move(self, p: Tensor, by: Tensor, group: dict[str, Any]) -> None:
        print("{}\n" * 100_000, flush=True)
        p.sub_(by)


class RefusesStrides(SGD):
    message = "parameter 0 is not contiguous: call contiguous() on it first"

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not p.is_contiguous():
            raise ValueError(self.message)
        super().update(p, g, state, group)


class RefusesUnclearly(RefusesStrides):
    message = "no"


class RefusesAfterItsState(SGD):
    def move(self, p: Tensor, by: Tensor, group: dict[str, Any]) -> None:
        if not p.is_contiguous():
            raise ValueError(RefusesStrides.message)
        p.sub_(by)


class RefusesTooLate(RefusesStrides):
    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        SGD.update(self, p, g, state, group)
        if not p.is_contiguous():
            raise ValueError(self.message)


class HasNoMomentum(torch.optim.Optimizer):
    """A good one with no option but lr."""

    def __init__(self, params: Any, lr: Any = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(float(group["lr"]) * p.grad)
