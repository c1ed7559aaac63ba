"""What of an optimizer's state_dict is written otherwise than it is kept.

Distributed checkpoints send a state_dict from rank to rank. There is no collective of int16, in
gloo or in NCCL, and ``full_state_dict`` refuses a dtype among a group's options.
"""

from __future__ import annotations

from typing import Any

import torch

from flatstep.optim.extras import MASTER_LOW
from flatstep.optim.routes import bits_as


def pack(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The same with dtypes by their names, and the bits of int16 under another dtype."""
    groups = [
        {
            name: str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
            for name, value in group.items()
        }
        for group in state_dict["param_groups"]
    ]
    return _with(state_dict, groups, torch.int16, torch.bfloat16)


def unpack(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`pack`; what was not packed stays as it is."""
    groups = [
        {
            name: getattr(torch, value)
            if name == "state_dtype" and isinstance(value, str)
            else value
            for name, value in group.items()
        }
        for group in state_dict["param_groups"]
    ]
    return _with(state_dict, groups, torch.bfloat16, torch.int16)


def _with(
    state_dict: dict[str, Any], groups: list[dict[str, Any]], old: torch.dtype, new: torch.dtype
) -> dict[str, Any]:
    states = {}
    for index, state in state_dict["state"].items():
        low = state.get(MASTER_LOW) if isinstance(state, dict) else None
        if isinstance(low, torch.Tensor) and low.dtype == old:
            state = {**state, MASTER_LOW: bits_as(low, new)}
        states[index] = state
    return {**state_dict, "state": states, "param_groups": groups}
