"""The norm of all gradients, and what a step makes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from flatstep import _core, reference
from flatstep._torch import STORED
from flatstep.optim import extras
from flatstep.optim.routes import in_order_of, is_dense, is_plain, local_of


class Asked(NamedTuple):
    """What the groups want to be done about the norm."""

    norm_type: float
    raises: bool
    skips: bool


def asked(groups: Sequence[Mapping[str, Any]]) -> Asked | None:
    """What the groups want, or None where no norm is needed.

    Raises:
        ValueError: The groups differ in what their one norm is.
    """
    wanting = [group for group in groups if extras.are_in(group) and _needs_norm(group)]
    if not wanting:
        return None
    norm_types = {float(extras.option(group, "norm_type")) for group in wanting}
    if len(norm_types) > 1:
        raise ValueError(
            f"the groups' norm_type differs ({sorted(norm_types)}), but one norm is over all their "
            "gradients; set the same in each"
        )
    return Asked(
        norm_types.pop(),
        any(extras.option(group, "error_if_nonfinite") for group in wanting),
        any(extras.option(group, "skip_nonfinite") for group in wanting),
    )


def _needs_norm(group: Mapping[str, Any]) -> bool:
    return extras.option(group, "max_grad_norm") is not None or bool(
        extras.option(group, "error_if_nonfinite") or extras.option(group, "skip_nonfinite")
    )


def factor(group: Mapping[str, Any], norm: float) -> float:
    """What a group's gradients are multiplied by."""
    most = extras.option(group, "max_grad_norm")
    return 1.0 if most is None else reference.clip_factor(norm, float(most))


@dataclass
class Outcome:
    """What became of an optimizer's norms.

    Attributes:
        norm: The last one, or None.
        is_double: Whether there are float64 parameters.
        skipped: How many steps it has left out.
        ahead: What the next step is to use in place of a pass of its own: the sum of squares or the
            largest magnitude of the gradients, and whether it is the latter.
    """

    norm: float | None = None
    is_double: bool = False
    skipped: int = 0
    ahead: tuple[float, bool] | None = None

    def as_tensor(self) -> torch.Tensor | None:
        """The last norm, 0-dim, in float32, or float64 where there are float64 parameters."""
        if self.norm is None:
            return None
        return torch.tensor(self.norm, dtype=torch.float64 if self.is_double else torch.float32)

    def take_ahead(self, largest: bool) -> float | None:
        """What was computed ahead of this step, if it is of the wanted kind."""
        ahead, self.ahead = self.ahead, None
        return ahead[0] if ahead is not None and ahead[1] == largest else None

    def judge(self, norm: float, of: Asked, is_double: bool) -> bool:
        """Whether the step may go on.

        Raises:
            RuntimeError: The norm is not finite, and a group asked for that, in torch's words.
        """
        self.norm, self.is_double = norm, is_double
        if math.isfinite(norm):
            return True
        if of.raises:
            raise RuntimeError(
                f"The total norm of order {of.norm_type} for gradients from `parameters` is "
                "non-finite, so it cannot be clipped. To disable this error and scale the "
                "gradients by the non-finite norm anyway, set `error_if_nonfinite=False`"
            )
        self.skipped += of.skips
        return not of.skips


def memory_of(grad: torch.Tensor, param: torch.Tensor) -> torch.Tensor | None:
    """A local gradient, or a copy, as memory in its parameter's order that a kernel can walk over.

    None where it cannot.
    """
    if grad.layout != torch.strided or not is_plain(grad) or grad.device.type != "cpu":
        return None
    return in_order_of(
        grad, param if is_plain(param) and is_dense(param) else torch.empty_like(param)
    )


def piece_of(memory: torch.Tensor) -> tuple[int, str, int]:
    """The address, type and size of such memory, in numbers: a complex one is two."""
    count = memory.numel() * (2 if memory.is_complex() else 1)
    return memory.data_ptr(), STORED[memory.dtype], count


def part(param: torch.Tensor, largest: bool) -> float | torch.Tensor:
    """The sum of squares, or the largest magnitude, of a gradient in its parameter's order.

    What no kernel reads, such as a gradient on a GPU, goes through torch's operations, and is not
    waited for.
    """
    assert param.grad is not None
    grad = local_of(param.grad)
    memory = memory_of(grad, local_of(param))
    if memory is None:
        return part_elsewhere(grad, largest)
    return _core.norm(*piece_of(memory), largest, torch.get_num_threads())


def part_elsewhere(grad: torch.Tensor, largest: bool) -> torch.Tensor:
    """The same of a local gradient through torch's operations."""
    if grad.layout != torch.strided:
        grad = grad.coalesce().values()
    values = torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad
    order = math.inf if largest else 2
    norm: torch.Tensor = torch.linalg.vector_norm(values.detach(), order, dtype=torch.float64)
    return norm if largest else norm * norm


def numbers(parts: Sequence[float | torch.Tensor]) -> list[float]:
    """The numbers in their places; each device is waited for once."""
    devices = {x.device for x in parts if isinstance(x, torch.Tensor)}
    waited = {
        device: iter(
            torch.stack(
                [x for x in parts if isinstance(x, torch.Tensor) and x.device == device]
            ).tolist()
        )
        for device in devices
    }
    return [next(waited[x.device]) if isinstance(x, torch.Tensor) else x for x in parts]


def total(params: Sequence[torch.Tensor], largest: bool) -> float:
    """The same of all gradients that there are."""
    found = 0.0
    for own in numbers([part(param, largest) for param in params if param.grad is not None]):
        if largest:
            found = found if found > own or found != found else own
        else:
            found += own
    return found
