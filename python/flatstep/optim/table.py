"""What an optimizer knows of its memory between two steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flatstep import _core, flat
from flatstep.optim import clipping
from flatstep.optim.routes import Found, Route
from flatstep.optim.sharding import Norms
from flatstep.optim.states import Before, Wanted
from flatstep.optim.weights import reconcile


@dataclass
class Other:
    """A parameter that the plan's one call does not update."""

    found: Found
    route: Route
    states: Wanted
    first_step: bool


@dataclass
class Table:
    """An optimizer's memory, as found when the plan was filled.

    Attributes:
        plan: The kernels' part of it.
        flags: Each group's variant: the rule's flags and the extras.
        others: The parameters that the plan's one call does not update.
        before: The states as they were, until the first step is made.
        written: A tensor of each storage that a step writes beside the parameters.
        masters: The 16-bit parameters, each with the float32 copy that it follows.
        cleared: Of each buffer whose gradients a step clears, how many there are.
        rows: How many parameters the plan has.
        gpus: The GPUs that some of them are on.
        only_gpus: Whether there are no others.
        is_double: Whether any parameter is float64.
        params: All parameters, in the order of the groups.
        norms: Those of gradients that are sharded over ranks, where any are.
        seen: The masters' parameters' versions after the last step.
    """

    plan: _core.Plan
    flags: list[int]
    others: list[Other]
    before: Before | None
    written: list[torch.Tensor]
    masters: list[tuple[torch.Tensor, torch.Tensor]]
    cleared: dict[flat.FlatBuffer, int]
    rows: int
    gpus: list[int]
    only_gpus: bool
    is_double: bool
    params: list[torch.Tensor]
    norms: Norms | None
    seen: int = -1

    def follow_masters(self) -> None:
        """Makes masters follow parameters that something else has written since the last step."""
        if self.masters and self._versions() != self.seen:
            reconcile(self.masters)

    def note_masters(self) -> None:
        """Remembers the parameters as a step has left them."""
        if self.masters:
            self.seen = self._versions()

    @property
    def one_gpu(self) -> int | None:
        """The GPU that all gradients are on, if there is one and they are not shards."""
        alone = self.only_gpus and len(self.gpus) == 1 and self.norms is None
        return self.gpus[0] if alone else None

    def total(self, largest: bool, clipped: clipping.Outcome) -> float:
        """The sum of squares, or the largest magnitude, of the gradients that the plan found."""
        if self.norms is not None:
            return self.norms.total(largest, None if self.gpus else self.plan)
        if self.one_gpu is not None:
            norm = clipped.on(self.one_gpu)
            norm.add_up(self.plan, largest=largest)
            return norm.total
        if self.gpus:
            return clipping.total(self.params, largest)
        others = [other.found.param for other in self.others]
        parts = clipping.parts([param for param in others if param.grad is not None], largest)
        return self.plan.norm(largest, parts, torch.get_num_threads())

    def _versions(self) -> int:
        return sum(param._version for param, _ in self.masters)
