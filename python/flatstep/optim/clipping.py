"""The norm of all gradients, and what a step makes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from flatstep import _core, reference
from flatstep._torch import STORED
from flatstep.optim import extras, gpu
from flatstep.optim.routes import grad_of, in_order_of, is_dense, is_plain, local_of
from flatstep.optim.trainers import Suspicion, warn_of_trainer


class Asked(NamedTuple):
    """What the groups want to be done about the norm."""

    norm_type: float
    raises: bool
    skips: bool
    clips: bool

    @property
    def largest(self) -> bool:
        """Whether the norm is the largest magnitude."""
        return self.norm_type == math.inf


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
        any(extras.option(group, "max_grad_norm") is not None for group in wanting),
    )


def _needs_norm(group: Mapping[str, Any]) -> bool:
    return extras.option(group, "max_grad_norm") is not None or bool(
        extras.option(group, "error_if_nonfinite") or extras.option(group, "skip_nonfinite")
    )


def factor(group: Mapping[str, Any], norm: float) -> float:
    """What a group's gradients are multiplied by."""
    most = most_of(group)
    return 1.0 if most < 0 else reference.clip_factor(norm, most)


def most_of(group: Mapping[str, Any]) -> float:
    """The norm that a group's gradients may have; negative where there is no limit."""
    most = extras.option(group, "max_grad_norm")
    return -1.0 if most is None else float(most)


@dataclass
class Outcome:
    """What became of an optimizer's norms.

    Attributes:
        norm: The last one, or the one on the GPU, or a compiled graph's, or None.
        is_double: Whether there are float64 parameters.
        skipped: How many steps the host has left out.
        ahead: What the next step is to use in place of a pass of its own: the sum of squares or the
            largest magnitude of the gradients, or the one on the GPU, and whether it is the latter.
        there: The norm on a GPU, once there has been one.
        suspicion: What looks for clipping by others at the first steps.
        knows_trainer: Whether it has been asked who else clips.
    """

    norm: float | gpu.Norm | torch.Tensor | None = None
    is_double: bool = False
    skipped: int = 0
    ahead: tuple[float | gpu.Norm, bool] | None = None
    there: gpu.Norm | None = None
    suspicion: Suspicion | None = field(default_factory=Suspicion)
    knows_trainer: bool = False

    def as_tensor(self) -> torch.Tensor | None:
        """The last norm, 0-dim, in float32, or float64 where there are float64 parameters."""
        dtype = torch.float64 if self.is_double else torch.float32
        if isinstance(self.norm, gpu.Norm):
            return self.norm.as_tensor(dtype)
        if isinstance(self.norm, torch.Tensor):
            return self.norm.to(dtype)
        return None if self.norm is None else torch.tensor(self.norm, dtype=dtype)

    def count_skipped(self) -> int:
        """How many steps were left out, on the host and on a GPU."""
        return self.skipped + (0 if self.there is None else self.there.skipped)

    def on(self, index: int) -> gpu.Norm:
        """The norm on a GPU."""
        if self.there is None or self.there.gpu != index:
            self.skipped = self.count_skipped()
            self.there = gpu.Norm(index)
        return self.there

    def take_ahead(self, largest: bool) -> float | gpu.Norm | None:
        """What was computed ahead of this step, if it is of the wanted kind."""
        ahead, self.ahead = self.ahead, None
        return ahead[0] if ahead is not None and ahead[1] == largest else None

    def warn_of_trainer(self, optimizer: object) -> None:
        """Warns, once, where the trainer that calls this optimizer clips as well."""
        if not self.knows_trainer:
            self.knows_trainer = True
            if warn_of_trainer(optimizer):
                self.suspicion = None

    def leave_there(
        self, plan: _core.Plan, of: Asked, inputs: gpu.Inputs, norm: gpu.Norm, is_double: bool
    ) -> None:
        """Finds the norm on a GPU, which makes of it what the host would."""
        if self.take_ahead(of.largest) is not norm:
            norm.add_up(plan, largest=of.largest)
        norm.judge(inputs, largest=of.largest)
        self.norm, self.is_double = norm, is_double

    def judge(self, norm: float, of: Asked, is_double: bool) -> bool:
        """Whether the step may go on.

        Raises:
            RuntimeError: The norm is not finite, and a group asked for that, in torch's words.
        """
        self.norm, self.is_double = norm, is_double
        if math.isfinite(norm):
            if self.suspicion is not None and of.clips and not self.suspicion.look(norm):
                self.suspicion = None
            return True
        if of.raises:
            raise RuntimeError(
                f"The total norm of order {of.norm_type} for gradients from `parameters` is "
                "non-finite, so it cannot be clipped. To disable this error and scale the "
                "gradients by the non-finite norm anyway, set `error_if_nonfinite=False`"
            )
        self.skipped += of.skips
        return not of.skips


def parts(params: Sequence[torch.Tensor], largest: bool) -> list[float]:
    """The sum of squares, or the largest magnitude, of each gradient, in its parameter's order.

    What no kernel reads goes through torch's operations. Each GPU is waited for.
    """
    by_kernels: dict[torch.device, dict[int, torch.Tensor]] = {}
    by_torch: dict[torch.device, dict[int, torch.Tensor]] = {}
    for place, param in enumerate(params):
        grad = local_of(grad_of(param))
        memory = memory_of(grad, local_of(param))
        kind, tensor = (
            (by_torch, by_operations(grad, largest)) if memory is None else (by_kernels, memory)
        )
        kind.setdefault(tensor.device, {})[place] = tensor
    found: dict[int, float] = {}
    for device, memories in by_kernels.items():
        norms = _by_kernels([*memories.values()], largest, device)
        found.update(zip(memories, norms, strict=True))
    for there in by_torch.values():
        found.update(zip(there, torch.stack([*there.values()]).tolist(), strict=True))
    return [found[place] for place in range(len(params))]


def memory_of(grad: torch.Tensor, param: torch.Tensor) -> torch.Tensor | None:
    """A local gradient in its parameter's order, where a kernel reads it."""
    if grad.layout != torch.strided or not is_plain(grad):
        return None
    dense = param if is_plain(param) and is_dense(param) else torch.empty_like(param)
    return in_order_of(grad, dense)


def _pieces(memories: Sequence[torch.Tensor]) -> tuple[list[int], list[str], list[int]]:
    addresses = [memory.data_ptr() for memory in memories]
    kinds = [STORED[memory.dtype] for memory in memories]
    counts = [memory.numel() * (2 if memory.is_complex() else 1) for memory in memories]
    return addresses, kinds, counts


def _by_kernels(
    memories: Sequence[torch.Tensor], largest: bool, device: torch.device
) -> list[float]:
    if device.type == "cpu":
        return _core.norms(*_pieces(memories), largest, torch.get_num_threads())
    return gpu.norms(*_pieces(memories), largest, device.index)


def tiles_of(
    memories: Sequence[torch.Tensor], largest: bool, device: torch.device
) -> tuple[np.ndarray, list[int]]:
    """The same of each tile of memory on one device, in order, and how many tiles each has."""
    addresses, kinds, counts = _pieces(memories)
    if device.type == "cpu":
        threads = torch.get_num_threads()
        tiles = np.frombuffer(_core.tile_norms(addresses, kinds, counts, largest, threads))
    else:
        tiles = gpu.tile_norms(addresses, kinds, counts, largest, device.index)
    return tiles, [reference.tile_count(count) for count in counts]


def by_operations(grad: torch.Tensor, largest: bool) -> torch.Tensor:
    """The same of a local gradient through torch's operations, 0-dim, where it is."""
    if grad.layout != torch.strided:
        grad = grad.coalesce().values()
    values = torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad
    order = math.inf if largest else 2
    norm: torch.Tensor = torch.linalg.vector_norm(values.detach(), order, dtype=torch.float64)
    return norm if largest else norm * norm


def total(params: Sequence[torch.Tensor], largest: bool) -> float:
    """The same of all gradients that there are."""
    return _sum(parts([param for param in params if param.grad is not None], largest), largest)


def total_of(memories: Sequence[torch.Tensor], largest: bool) -> float:
    """The same of gradients on the CPU that kernels can read, each in its parameter's order."""
    return _sum(_by_kernels(memories, largest, torch.device("cpu")), largest)


def _sum(each: Sequence[float], largest: bool) -> float:
    found = 0.0
    for own in each:
        if largest:
            found = found if found > own or found != found else own
        else:
            found += own
    return found
