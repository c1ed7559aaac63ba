"""What a step on GPUs reads there, so that the host need not wait for it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from flatstep import _core

# A GPU's stream, the addresses of the gradients' scale and overflow (0: none), and of each group's
# hyper-parameters the address (0: the host knows the number) and whether it is of a double.
Inputs = tuple[int, int, int, list[list[tuple[int, bool]]]]


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


class Reader:
    """The inputs of each GPU, and the tensors that they are the addresses of."""

    def __init__(self, gpus: Sequence[int]) -> None:
        self._gpus = gpus
        self._kept: list[torch.Tensor] = []  # memory is given back in the order of the stream

    def inputs(
        self,
        hyper: Sequence[Sequence[Any]],
        grad_scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
        *,
        deferred: bool,
    ) -> dict[int, Inputs]:
        """What to read on each GPU; where nothing is deferred, only its stream."""
        everything = {}
        for index in self._gpus:
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
            stream = torch.cuda.current_stream(index).cuda_stream
            everything[index] = (stream, scale, inf, addresses)
        return everything

    def _number(self, value: torch.Tensor, gpu: int) -> tuple[int, bool]:
        exact = value.dtype in (torch.float32, torch.float64)
        there = self._copy(value, gpu, value.dtype if exact else torch.float64)
        return there.data_ptr(), there.dtype == torch.float64

    def _copy(self, value: torch.Tensor, gpu: int, dtype: torch.dtype) -> torch.Tensor:
        there = value.detach().to(torch.device("cuda", gpu), dtype, non_blocking=True)
        self._kept.append(there)
        return there
