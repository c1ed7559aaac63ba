"""Flat buffers: a model's parameters and gradients as one piece of memory each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from flatstep._torch import empty_flat, increment_version
from flatstep.optim.routes import (
    dense_stride,
    is_plain,
    is_resolved,
    overlapping,
    overlaps_itself,
)

_ALIGNMENT = 64  # bytes


class _Home(NamedTuple):
    """Where a parameter and its gradient live in a buffer."""

    param: TensorWeakRef
    name: str
    data: torch.Tensor
    grad: torch.Tensor | None


_buffers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_generation = 0


def buffer_of(param: torch.Tensor) -> FlatBuffer | None:
    """The buffer that the parameter was moved into last, if any."""
    buffer: FlatBuffer | None = _buffers.get(param)
    return buffer


def generation() -> int:
    """How many buffers have been made: what was learned of them before may be out of date."""
    return _generation


class FlatBuffer:
    """Moves parameters, and their gradients, into one buffer per dtype and device.

    Each parameter becomes a view into the buffer, at a multiple of 64 bytes, in its own shape and
    memory order; the objects stay the same, so that modules, tied parameters, ``state_dict`` and
    optimizers go on as before. The buffers are 64-byte aligned and lie on 2 MiB pages where the
    system grants them. An update of neighbours in a buffer is one walk over memory.

    Flat gradients have a price outside the update: autograd adds into a view where it would hand
    over its own tensor, and clearing them is a pass of its own. ``zero_grad()`` of the optimizer
    clears them in place in one call; with ``clear_gradients=True`` the step clears each gradient
    just after reading it, and ``zero_grad()`` costs nothing. A parameter with a flat gradient
    always has one, so that it is updated also where ``backward()`` did not reach it, as with
    ``zero_grad(set_to_none=False)`` in torch.

    Args:
        params: The parameters, or (name, parameter) pairs. Move the model to its device and dtype
            first: a parameter that is moved afterwards leaves the buffer.
        gradients: Whether to house the gradients too.
        clear_gradients: Whether ``step()`` of a flatstep optimizer leaves the gradients zero.

    Raises:
        TypeError: A parameter is not a plain, strided CPU tensor of a dtype that flatstep updates.
        ValueError: No parameters, a parameter that overlaps itself or another one, or
            ``clear_gradients`` without ``gradients``. Nothing has been moved.

    Example:
        >>> model = torch.nn.Linear(64, 64)
        >>> buffer = flatstep.FlatBuffer(model.parameters())
        >>> opt = flatstep.AdamW(model.parameters())
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
        gradients: bool = True,
        *,
        clear_gradients: bool = False,
    ) -> None:
        global _generation
        if clear_gradients and not gradients:
            raise ValueError("clear_gradients needs gradients=True: there is nothing else to clear")
        named = _named(params)
        _check(named)
        self._clear_gradients = clear_gradients
        self._clean: list[int] = []
        self._data: list[torch.Tensor] = []
        self._grads: list[torch.Tensor] = []
        self._homes: list[_Home] = []
        self._grad_of = WeakTensorKeyDictionary()
        kinds = dict.fromkeys((param.dtype, param.device) for _, param in named)
        with torch.no_grad():
            for dtype, device in kinds:
                self._house(
                    [(n, p) for n, p in named if (p.dtype, p.device) == (dtype, device)],
                    dtype,
                    device,
                    gradients,
                )
        _generation += 1

    def _house(
        self,
        named: list[tuple[str, torch.Tensor]],
        dtype: torch.dtype,
        device: torch.device,
        gradients: bool,
    ) -> None:
        step = _ALIGNMENT // dtype.itemsize
        starts, end = [], 0
        for _, param in named:
            starts.append((end + step - 1) // step * step)
            end = starts[-1] + param.numel()
        data = empty_flat(end, dtype, device).zero_()
        grads = empty_flat(end, dtype, device).zero_() if gradients else None
        for (name, param), start in zip(named, starts, strict=True):
            stride = dense_stride(param)
            view = data.as_strided(param.shape, stride, start).copy_(param)
            grad = None
            if grads is not None and param.requires_grad:
                grad = grads.as_strided(param.shape, stride, start)
                if param.grad is not None:
                    grad.copy_(param.grad)
                param.grad = None  # a gradient must fit the data that it had
            param.data = view
            if grad is not None:
                param.grad = grad
                self._grad_of[param] = grad
            self._homes.append(_Home(TensorWeakRef(param), name, view, grad))
            _buffers[param] = self
        self._data.append(data)
        if grads is not None:
            self._grads.append(grads)

    @property
    def has_gradients(self) -> bool:
        """Whether the gradients live here too."""
        return bool(self._grads)

    @property
    def data(self) -> list[torch.Tensor]:
        """The parameters' buffers, 1-D, one per dtype and device; zeros fill the gaps.

        Raises:
            RuntimeError: A parameter has left its buffer.
        """
        self.check()
        return self._data

    @property
    def grads(self) -> list[torch.Tensor]:
        """The gradients' buffers, likewise; empty without gradients.

        Raises:
            RuntimeError: A parameter or gradient has left its buffer.
        """
        self.check()
        return self._grads

    def check(self) -> None:
        """Makes sure that every parameter still lives here.

        Raises:
            RuntimeError: One does not, after ``.to()``, ``.half()`` or an assignment to ``.data``.
        """
        for home in self._homes:
            param = home.param()
            if param is not None and (
                param.data_ptr() != home.data.data_ptr() or param.dtype != home.data.dtype
            ):
                raise RuntimeError(
                    f"{home.name} has left its FlatBuffer (moved by .to(), .half() or an "
                    "assignment to .data); make a new FlatBuffer after such a move"
                )

    def zero_grad(self) -> None:
        """Sets every gradient to zero in place, and puts back those that were replaced.

        Raises:
            RuntimeError: A parameter has left its buffer.
        """
        self.check()
        for home in self._homes:
            param = home.param()
            if param is not None and home.grad is not None and param.grad is not home.grad:
                param.grad = home.grad
                self._clean = []
        if [grad._version for grad in self._grads] == self._clean:
            return
        for grad in self._grads:
            grad.zero_()

    def clears(self, param: torch.Tensor) -> bool:
        """Whether a step is to clear the parameter's gradient: asked for, and still at home."""
        return self._clear_gradients and self._grad_of.get(param) is param.grad

    def mark_clean(self) -> None:
        """Notes that a step has just cleared the gradients."""
        increment_version(self._grads)
        self._clean = [grad._version for grad in self._grads]


def flatten_(
    module: torch.nn.Module, gradients: bool = True, *, clear_gradients: bool = False
) -> FlatBuffer:
    """Moves a module's parameters into a :class:`FlatBuffer`, in place.

    The buffer lives as long as its parameters; keep the result only where you want to use it.
    """
    return FlatBuffer(module.named_parameters(), gradients, clear_gradients=clear_gradients)


def _named(
    params: Iterable[torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
) -> list[tuple[str, torch.Tensor]]:
    named: list[tuple[str, torch.Tensor]] = []
    seen: set[int] = set()
    for place, item in enumerate(params):
        name, param = item if isinstance(item, tuple) else (str(place), item)
        label = f"parameter '{name}'" if isinstance(item, tuple) else f"parameter {name}"
        if not isinstance(param, torch.Tensor):
            raise TypeError(f"{label} is {type(param).__name__}; FlatBuffer takes tensors")
        if id(param) not in seen:
            seen.add(id(param))
            named.append((label, param))
    if not named:
        raise ValueError("FlatBuffer got no parameters")
    return named


def _check(named: list[tuple[str, torch.Tensor]]) -> None:
    for label, param in named:
        if not (is_plain(param) and is_resolved(param) and param.is_leaf):
            raise TypeError(
                f"{label} is a {type(param).__name__} of {param.dtype} on {param.device}; "
                "FlatBuffer takes leaf tensors with plain memory: strided, on the CPU, float32, "
                "float64, bfloat16, float16, complex64 or complex128"
            )
        if overlaps_itself(param):
            raise ValueError(
                f"{label} has elements that share memory (strides {param.stride()}); clone it first"
            )
    clash = overlapping([param for _, param in named])
    if clash:
        labels = ", ".join(named[place][0] for place in sorted(clash))
        raise ValueError(
            f"{labels} share memory; FlatBuffer keeps tied parameters tied only where they are "
            "one object: tie them by assigning the same Parameter"
        )
