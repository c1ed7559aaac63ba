"""The states of an optimizer: views into flat buffers, kept in torch's ``opt.state``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any, NamedTuple

import torch

from flatstep._torch import zeros_flat
from flatstep.optim.extras import AVERAGE, MASTER, MASTER_LOW
from flatstep.optim.routes import (
    Found,
    Route,
    as_placed,
    bits_as,
    dense_stride,
    is_aligned,
    is_plain,
    is_resolved,
    local_of,
    same_order,
)

_ALIGNMENT = 64  # bytes


class Wanted(NamedTuple):
    """The states that a parameter is to have: the rule's and those beside it.

    ``always`` are those without which no state of the rule is whole, the step's count among them.
    """

    rule: tuple[str, ...]
    names: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    always: tuple[str, ...] = ()


class Before:
    """The states of parameters as they are now, for a step that then is not made."""

    def __init__(
        self, states: Mapping[torch.Tensor, dict[str, Any]], params: Iterable[torch.Tensor]
    ) -> None:
        self._params = list(params)
        own = [(param, states[param]) for param in self._params if param in states]
        self._kept = {param: (state, dict(state)) for param, state in own}

    def put_back(self, states: MutableMapping[torch.Tensor, dict[str, Any]]) -> None:
        """Makes the states what they were: the same tensors, and none where there was none."""
        for param in self._params:
            if param not in self._kept:
                states.pop(param, None)
                continue
            state, tensors = self._kept[param]
            state.clear()
            state.update(tensors)


def zeros_like_all(
    params: Iterable[torch.Tensor], dtypes: Iterable[torch.dtype]
) -> list[torch.Tensor]:
    """Zeros of a dtype for each plain parameter, in its memory order, out of one buffer a kind.

    Neighbours in the parameters' memory become neighbours in the buffer, so that an update walks
    over them as one piece; others begin at a multiple of 64 bytes.
    """
    params, dtypes = list(params), list(dtypes)
    starts: list[int] = []
    # The last parameter's end, in its own memory and in the buffer of its kind.
    ends: dict[tuple[torch.dtype, torch.device], tuple[int, int]] = {}
    for param, dtype in zip(params, dtypes, strict=True):
        kind = (dtype, param.device)
        step = _ALIGNMENT // dtype.itemsize
        memory_end, end = ends.get(kind, (0, 0))
        if param.data_ptr() != memory_end:
            end = (end + step - 1) // step * step
        starts.append(end)
        ends[kind] = (param.data_ptr() + param.nbytes, end + param.numel())
    buffers = {kind: zeros_flat(end, *kind) for kind, (_, end) in ends.items()}
    views = []
    for param, dtype, start in zip(params, dtypes, starts, strict=True):
        buffer = buffers[dtype, param.device]
        views.append(buffer.as_strided(param.shape, dense_stride(param), start))
    return views


def check(state: dict[str, Any], found: Found, wanted: Wanted) -> None:
    """Raises where a parameter's state cannot be its own: TypeError, ValueError."""
    param = found.param
    for name in wanted.names:
        tensor = state.get(name)
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(
                f"state '{name}' of {found.name} is a {type(tensor).__name__}, not a tensor"
            )
        if (tensor.shape, tensor.device) != (param.shape, param.device):
            raise ValueError(
                f"state '{name}' of {found.name} has shape {tuple(tensor.shape)} on "
                f"{tensor.device}, but the parameter has {tuple(param.shape)} on {param.device}; "
                "load a state that belongs to it"
            )
    step = state.get("step")
    if step is not None and not 0 <= float(step) < 2**53:
        raise ValueError(f"state 'step' of {found.name} is {float(step)}; it must count from 0")
    there = [name for name in wanted.always if state.get(name) is not None]
    lacking = [name for name in wanted.always if name not in there]
    is_begun = bool(there) and (there != ["step"] or float(state["step"]) > 0)
    if lacking and is_begun:
        raise ValueError(
            f"the state of {found.name} has {sorted(state)}, but no '{lacking[0]}': it is not "
            "whole, or of another library; give its tensors torch's names before you load it, or "
            "empty it to start anew"
        )


def dtype_of(state: dict[str, Any], found: Found, names: tuple[str, ...]) -> torch.dtype:
    """The dtype of the rule's states that are there, else the parameter's."""
    there = [state[name].dtype for name in names if isinstance(state.get(name), torch.Tensor)]
    return functools.reduce(torch.promote_types, there) if there else found.param.dtype


def are_foreign(state: dict[str, Any], wanted: Wanted) -> bool:
    """Whether a state is there that no kernel can take, such as a subclass."""
    tensors = [local_of(state[name]) for name in wanted.names if state.get(name) is not None]
    return not all(is_plain(tensor) or tensor.dtype == torch.int16 for tensor in tensors)


def complete(
    states: dict[Found, dict[str, Any]],
    wanted: dict[Found, Wanted],
    routes: dict[Found, Route],
    *,
    step_device: Callable[[Found], torch.device | None],
    gather: bool,
) -> set[Found]:
    """Creates the states that are missing, and puts the others where a kernel can take them.

    Where it raises, as for lack of memory, no state has changed.

    Args:
        states: Each parameter's state.
        wanted: The states that each parameter's variant uses.
        routes: Each parameter's way.
        step_device: Where the "step" of a parameter counts, or None where it has none.
        gather: Whether to move all states into new flat buffers.

    Returns:
        The parameters that had none of the rule's states before.
    """
    firsts = set()
    missing, moved, dense, uncounted = [], [], [], []
    for found, state in states.items():
        names = wanted[found]
        low = state.get(MASTER_LOW)
        if low is not None and low.dtype == torch.bfloat16:  # put here as state_dict() has it
            state[MASTER_LOW] = bits_as(low, torch.int16)
        step, device = state.get("step"), step_device(found)
        if device is not None and not (
            isinstance(step, torch.Tensor)
            and step.is_floating_point()
            and step.numel() == 1
            and step.device == device
        ):
            uncounted.append((found, device))
        if all(state.get(name) is None for name in names.rule):
            firsts.add(found)
        for name, dtype in zip(names.names, names.dtypes, strict=True):
            tensor = state.get(name)
            if tensor is None:
                missing.append((found, name, dtype))
            elif tensor.layout != torch.strided:
                dense.append((found, name, tensor.to_dense()))
            elif routes[found] is not Route.TORCH and (
                gather or not _fits(found.param, tensor, dtype)
            ):
                moved.append((found, name, dtype, tensor))
    created = _create(missing + [(found, name, dtype) for found, name, dtype, _ in moved], routes)
    for found, name, _ in missing:
        if name in (MASTER, AVERAGE):
            local_of(created[found, name]).copy_(local_of(found.param))
    for found, name, _, tensor in moved:
        local_of(created[found, name]).copy_(local_of(tensor))
    counts = _create_steps([(states[found], device) for found, device in uncounted])
    # Nothing has changed so far: there may not have been the memory for all of it.
    for (found, _), count in zip(uncounted, counts, strict=True):
        rest = {name: value for name, value in states[found].items() if name != "step"}
        states[found].clear()
        states[found].update({"step": count, **rest})
    for found, name, tensor in dense:
        states[found][name] = tensor
    for (found, name), tensor in created.items():
        states[found][name] = tensor
    return firsts


def _fits(param: torch.Tensor, state: torch.Tensor, dtype: torch.dtype) -> bool:
    local = local_of(state)
    return (
        local.dtype == dtype
        and same_order(local, local_of(param))
        and is_resolved(local)
        and is_aligned(local)
    )


def _create(
    missing: list[tuple[Found, str, torch.dtype]], routes: dict[Found, Route]
) -> dict[tuple[Found, str], torch.Tensor]:
    created = {}
    for name in dict.fromkeys(name for _, name, _ in missing):
        wanting = [(found, dtype) for found, of, dtype in missing if of == name]
        plain = [(found, dtype) for found, dtype in wanting if routes[found] is not Route.TORCH]
        views = zeros_like_all(
            (local_of(found.param) for found, _ in plain), (dtype for _, dtype in plain)
        )
        for (found, _), view in zip(plain, views, strict=True):
            created[found, name] = as_placed(view, found.param)
        for found, dtype in wanting:
            if routes[found] is Route.TORCH:
                created[found, name] = torch.zeros_like(
                    found.param, dtype=dtype, memory_format=torch.preserve_format
                )
    return created


def _create_steps(uncounted: list[tuple[dict[str, Any], torch.device]]) -> list[torch.Tensor]:
    """A count for each of the states, from zero or from the number that a checkpoint left."""
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    counts = {
        device: iter(
            torch.zeros(
                sum(on == device for _, on in uncounted), dtype=dtype, device=device
            ).unbind()
        )
        for device in dict.fromkeys(device for _, device in uncounted)
    }
    found = [next(counts[device]) for _, device in uncounted]
    for count, (state, _) in zip(found, uncounted, strict=True):
        if state.get("step") is not None:
            count.fill_(float(state["step"]))
    return found
