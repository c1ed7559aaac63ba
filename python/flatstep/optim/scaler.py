"""Loss scaling without a pass of its own."""

from __future__ import annotations

from typing import Any

import torch

from flatstep.optim.base import Optimizer


class GradScaler(torch.amp.GradScaler):
    """torch's ``GradScaler``, whose check for overflow only reads the gradients of our optimizers.

    torch's reads and writes them in a pass of its own before a fused optimizer's step. Here it is
    the pass that the norm needs anyway, made once, at the memory's speed. Everything else, and
    every other optimizer, is as in :class:`torch.amp.GradScaler`, with its arguments.
    """

    def _check_inf_per_device(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        overflow = optimizer.check_gradients() if isinstance(optimizer, Optimizer) else None
        found: dict[Any, Any]
        if overflow is None:
            found = super()._check_inf_per_device(optimizer)
        else:
            found = {overflow.device: overflow}
            self._per_optimizer_states[id(optimizer)]["found_inf_per_device"] = found
        return found
