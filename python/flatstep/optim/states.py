"""The states of an optimizer: views into flat buffers, kept in torch's ``opt.state``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from flatstep._torch import empty_flat
from flatstep.optim.routes import Found, dense_stride, local_of

_ALIGNMENT = 64  # bytes


def zeros_like_all(params: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Zeros for each plain parameter, in its shape and memory order, out of one buffer a dtype.

    Neighbours in the parameters' memory become neighbours in the buffer, so that an update walks
    over them as one piece; others begin at a multiple of 64 bytes.
    """
    params = list(params)
    starts: list[int] = []
    ends: dict[torch.dtype, tuple[int, int]] = {}  # the last parameter's end, in both places
    for param in params:
        size = param.element_size()
        step = _ALIGNMENT // size
        memory_end, end = ends.get(param.dtype, (0, 0))
        if param.data_ptr() != memory_end:
            end = (end + step - 1) // step * step
        starts.append(end)
        ends[param.dtype] = (param.data_ptr() + param.numel() * size, end + param.numel())
    buffers = {dtype: empty_flat(end, dtype).zero_() for dtype, (_, end) in ends.items()}
    views = []
    for param, start in zip(params, starts, strict=True):
        views.append(buffers[param.dtype].as_strided(param.shape, dense_stride(param), start))
    return views


def like(param: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """The local tensor as a DTensor where the parameter is one."""
    if local_of(param) is param:
        return local
    sharded: torch.Tensor = type(param).from_local(  # type: ignore[attr-defined]
        local,
        param.device_mesh,  # type: ignore[attr-defined]
        param.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=param.shape,
        stride=param.stride(),
    )
    return sharded


def create(
    missing: list[tuple[Found, dict[str, Any], str]], is_plain: Callable[[Found], bool]
) -> None:
    """Puts zeros in place of each missing state: (parameter, its dict, name)."""
    for name in dict.fromkeys(name for _, _, name in missing):
        wanting = [(found, state) for found, state, of in missing if of == name]
        plain = [(found, state) for found, state in wanting if is_plain(found)]
        views = zeros_like_all(local_of(found.param) for found, _ in plain)
        for (found, state), view in zip(plain, views, strict=True):
            state[name] = like(found.param, view)
        for found, state in wanting:
            if not is_plain(found):
                state[name] = torch.zeros_like(found.param, memory_format=torch.preserve_format)


def create_steps(missing: list[tuple[Found, dict[str, Any]]]) -> None:
    """Counts each of the states from zero, or from the number that an old checkpoint left."""
    if not missing:
        return
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    counts = torch.zeros(len(missing), dtype=dtype)
    for count, (_, state) in zip(counts.unbind(), missing, strict=True):
        if state.get("step") is not None:
            count.fill_(float(state["step"]))
        rest = {name: value for name, value in state.items() if name != "step"}
        state.clear()
        state["step"] = count
        state.update(rest)
