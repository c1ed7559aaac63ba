"""Two steps from a common start, held against torch's for-loop and against the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from flatstep import reference
from flatstep.optim.base import Optimizer
from flatstep.optim.rules import RULES
from flatstep.profiling.implementations import Implementation, build_torch
from flatstep.profiling.workloads import Shape

STEPS = 2  # the first one creates the states and differs in SGD
MOST_ELEMENTS = 1 << 15
MOST_TENSORS = 256


class Sample:
    """Elements that stand for a workload: the ends of its tensors and others by chance."""

    def __init__(self, shapes: Sequence[Shape]):
        count = min(len(shapes), MOST_TENSORS)
        chosen = sorted({round(i * (len(shapes) - 1) / max(1, count - 1)) for i in range(count)})
        chance = torch.Generator().manual_seed(0)
        self.places: list[tuple[int, Tensor]] = []
        for index in chosen:
            size = math.prod(shapes[index])
            share = max(2, MOST_ELEMENTS // count)
            if size <= share:
                elements = torch.arange(size)
            else:
                elements = torch.randint(size, (share,), generator=chance).unique()
                elements[0], elements[-1] = 0, size - 1
            self.places.append((index, elements))

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The sampled elements of a workload's tensors, as one new tensor on the CPU."""
        found = []
        for index, elements in self.places:
            tensor = tensors[index].detach().reshape(-1)
            found.append(tensor[elements.to(tensor.device)])
        return torch.cat(found).cpu()


@dataclass(frozen=True)
class Values:
    """A parameter, its gradient and its states at the sampled places."""

    param: Tensor
    grad: Tensor
    states: dict[str, Tensor]

    @staticmethod
    def of(implementation: Implementation, sample: Sample) -> Values:
        """What an implementation has in memory now."""
        grads = [p.grad for p in implementation.params if p.grad is not None]
        states = implementation.states()
        return Values(
            sample.of(implementation.params),
            sample.of(grads),
            {name: sample.of(tensors) for name, tensors in states.items()},
        )

    def tensors(self) -> dict[str, Tensor]:
        """What a step changes, by name."""
        return {"parameters": self.param, **self.states}


def check(implementation: Implementation, name: str, before: Values, after: Values) -> str | None:
    """What is wrong with the values after the first steps, or None.

    Args:
        implementation: Whose steps they were. Of one that was named, only the parameters are looked
            at: its states may be of any kind.
        name: The optimizer's.
        before: The values before the first step, without states.
        after: The values after :data:`STEPS` steps.
    """
    found = after.tensors()
    expected = _torch_steps(name, before).tensors()
    if implementation.named:
        expected = {"parameters": expected["parameters"]}
    change = expected["parameters"] - before.param
    for what, wanted in expected.items():
        slack = change if what == "parameters" else wanted
        if not close(found[what], wanted, slack):
            return f"wrong result: {what} unlike those of torch's for-loop"
    if implementation.ours and isinstance(implementation.optimizer, Optimizer):
        for what, wanted in _reference_steps(implementation.optimizer, before).tensors().items():
            if not torch.equal(found[what].view(torch.uint8), wanted.view(torch.uint8)):
                return f"wrong result: {what} unlike the reference's"
    return None


def _torch_steps(name: str, before: Values) -> Values:
    param = Parameter(before.param.clone())
    param.grad = before.grad
    optimizer = build_torch("torch for-loop", name, [param])
    for _ in range(STEPS):
        optimizer.step()
    states = Implementation(name, optimizer, [param]).states()
    return Values(param.detach(), before.grad, {key: value for key, [value] in states.items()})


def close(found: Tensor, wanted: Tensor, change: Tensor, coarsest: float = 0.0) -> bool:
    """Whether two results of one update differ by their roundings only.

    Allowed are a few roundings of the value, and more of the change that led to it: torch rounds
    after each operation.

    Args:
        found: One result.
        wanted: The other.
        change: What the update has added.
        coarsest: The relative error of what the change was computed from, where it is more than a
            rounding of the result.
    """
    epsilon = torch.finfo(found.dtype).eps
    found, wanted, change = found.double(), wanted.double(), change.double()
    allowed = 4 * epsilon * wanted.abs() + 16 * max(epsilon, coarsest) * change.abs()
    return bool(((found - wanted).abs() <= allowed).all())


def _reference_steps(optimizer: Optimizer, before: Values) -> Values:
    rule, (flags, hyper) = RULES[optimizer.rule], optimizer.variant(optimizer.param_groups[0])
    states = {key: torch.zeros_like(before.param) for key in dict(rule["variants"])[flags]}
    exact = Values(before.param.clone(), before.grad, states)
    for step in range(1, STEPS + 1):
        reference.update(
            optimizer.rule,
            reference.flag_names(optimizer.rule, flags, rule["flags"]),
            dict(zip(rule["hyper"], map(float, hyper), strict=True)),
            _array(exact.param),
            _array(exact.grad),
            {key: _array(value) for key, value in states.items()},
            step=step,
            dtype=str(before.param.dtype).removeprefix("torch."),
        )
    return exact


def _array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as the reference takes it."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
