"""What a step on GPUs reads there, so that the host need not wait for it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from flatstep import _core, reference

# A GPU's stream, the addresses of the gradients' scale and overflow (0: none), of each group's
# hyper-parameters the address (0: the host knows the number) and whether it is of a double, the
# address of the gradients' norm (0: none), and whether the step is left out where it is not finite.
Inputs = tuple[int, int, int, list[list[tuple[int, bool]]], int, bool]


def device(index: int) -> torch.device:
    """One of the GPUs, by its number."""
    return torch.device("cuda", index)


def stream_of(index: int) -> int:
    """The address of torch's current stream on a GPU."""
    stream: int = torch.cuda.current_stream(index).cuda_stream
    return stream


def is_being_captured() -> bool:
    """Whether the work of a GPU goes into a graph now."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@functools.cache
def warn_if_absent() -> None:
    """Says, once, that there are no kernels for the GPU that parameters are on, and why."""
    if _core.gpu_count() == 0:
        warnings.warn(
            "parameters on a GPU are updated through torch's operations, rightly but slowly: "
            + _core.gpu_absence(),
            stacklevel=6,
        )


def is_there(value: Any) -> bool:
    """Whether a number is on a GPU."""
    return isinstance(value, torch.Tensor) and value.device.type == "cuda"


def numbers(values: Sequence[Any], *, deferred: bool) -> list[float]:
    """The numbers that the host knows; 0 for those whose reading is left to the GPU."""
    return [0.0 if deferred and is_there(value) else float(value) for value in values]


class Norm:
    """The norm of all gradients on a GPU, where steps read it and nobody waits for it.

    Attributes:
        gpu: Which.
        found: What the norm is made of, the norm, and how many steps it has left out; in double.
    """

    def __init__(self, gpu: int) -> None:
        self.gpu = gpu
        self.found = torch.zeros(3, dtype=torch.float64, device=device(gpu))

    def add_up(
        self, plan: _core.Plan, *, largest: bool, overflow: torch.Tensor | None = None
    ) -> None:
        """Makes the sum of squares, or the largest magnitude, of the gradients that a plan found.

        Args:
            plan: All of its parameters are on this GPU.
            largest: Which of the two.
            overflow: A float32 that becomes 1 where it is not finite, and 0 where it is.
        """
        # Of the stream's memory, or of a graph's that is being captured.
        room = torch.empty(plan.norm_room(self.gpu), dtype=torch.float64, device=self.found.device)
        plan.norm_on_gpu(
            self.gpu,
            largest,
            stream_of(self.gpu),
            room.data_ptr(),
            self.found.data_ptr(),
            0 if overflow is None else overflow.data_ptr(),
        )

    def judge(self, inputs: Inputs, *, largest: bool) -> None:
        """Makes the norm of it, and counts the step that will be left out for it."""
        stream, scale, inf, _, _, skips = inputs
        _core.judge_norm_on_gpu(self.gpu, stream, self.found.data_ptr(), largest, skips, scale, inf)

    @property
    def total(self) -> float:
        """The sum of squares, or the largest magnitude; waits for it."""
        return self.found[0].item()

    def as_tensor(self, dtype: torch.dtype) -> torch.Tensor:
        """The norm, as it is now."""
        return self.found[1].to(dtype, copy=True)

    @property
    def skipped(self) -> int:
        """How many steps it has left out; waits for them."""
        return int(self.found[2].item())


def norms(
    addresses: Sequence[int], kinds: Sequence[str], counts: Sequence[int], largest: bool, index: int
) -> list[float]:
    """What ``_core.norms`` says of gradients, of those on a GPU; waits for it."""
    found: list[float] = _norms(addresses, kinds, counts, largest, index)[-len(counts) :].tolist()
    return found


def tile_norms(
    addresses: Sequence[int], kinds: Sequence[str], counts: Sequence[int], largest: bool, index: int
) -> np.ndarray:
    """The same of each tile of them."""
    return _norms(addresses, kinds, counts, largest, index)[: -len(counts)].cpu().numpy()


def _norms(
    addresses: Sequence[int], kinds: Sequence[str], counts: Sequence[int], largest: bool, index: int
) -> torch.Tensor:
    """Those of the tiles, then those of the gradients."""
    size = sum(map(reference.tile_count, counts)) + len(counts)
    room, found = (
        torch.empty(size, dtype=torch.float64, device=device(index)) for size in (size, 3)
    )
    _core.norms_on_gpu(
        addresses,
        kinds,
        counts,
        largest,
        index,
        stream_of(index),
        room.data_ptr(),
        found.data_ptr(),
    )
    return room


class Reader:
    """What a step reads on each GPU, and the tensors that it is the addresses of.

    Args:
        gpus: Which they are.
        hyper: Of each group, its hyper-parameters.
        grad_scale: What GradScaler has multiplied the gradients with.
        found_inf: Whether it found an overflow.
        deferred: Whether these are read there; else there is nothing to read but the stream.
        norm: Of the gradients, where it is read there.
        skips: Whether the step is left out where it is not finite.

    Attributes:
        inputs: By the GPUs.
    """

    def __init__(
        self,
        gpus: Sequence[int],
        hyper: Sequence[Sequence[Any]],
        grad_scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
        *,
        deferred: bool,
        norm: Norm | None = None,
        skips: bool = False,
    ) -> None:
        self._kept: list[torch.Tensor] = []  # memory is given back in the order of the stream
        self.inputs: dict[int, Inputs] = {}
        at = 0 if norm is None else norm.found.data_ptr()
        for index in gpus:
            scale, inf = (
                self._copy(value, index, torch.float32).data_ptr()
                if deferred and value is not None
                else 0
                for value in (grad_scale, found_inf)
            )
            addresses = [
                [
                    self._number(value, index) if deferred and is_there(value) else (0, False)
                    for value in values
                ]
                for values in hyper
            ]
            self.inputs[index] = (stream_of(index), scale, inf, addresses, at, skips)

    def _number(self, value: torch.Tensor, gpu: int) -> tuple[int, bool]:
        exact = value.dtype in (torch.float32, torch.float64)
        there = self._copy(value, gpu, value.dtype if exact else torch.float64)
        return there.data_ptr(), there.dtype == torch.float64

    def _copy(self, value: torch.Tensor, gpu: int, dtype: torch.dtype) -> torch.Tensor:
        there = value.detach().to(device(gpu), dtype, non_blocking=True)
        self._kept.append(there)
        return there
