"""Flat buffers: a model's parameters and gradients as one piece of memory each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import NamedTuple

import torch
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from flatstep._torch import STORED, increment_version, zeros_flat
from flatstep.optim.routes import (
    dense_stride,
    is_plain,
    is_resolved,
    overlapping,
    overlaps_itself,
)

_ALIGNMENT = 64  # bytes

Named = list[tuple[str | int, torch.Tensor]]


class _Kind(NamedTuple):
    """What parameters of one buffer have in common."""

    dtype: torch.dtype
    grad_dtype: torch.dtype
    device: torch.device


def _grad_dtype(param: torch.Tensor) -> torch.dtype:
    """The dtype that torch wants a parameter's gradients to have; before 2.9, the parameter's."""
    return getattr(param, "grad_dtype", None) or param.dtype


def _kind(param: torch.Tensor) -> _Kind:
    return _Kind(param.dtype, _grad_dtype(param), param.device)


@dataclass(eq=False, slots=True)
class _Home:
    """Where a parameter and its gradient live in a buffer."""

    param: TensorWeakRef
    name: str | int
    data: torch.Tensor
    grad_memory: torch.Tensor | None
    grad: torch.Tensor | None = None  # the view of it that the parameter carries

    def has(self, param: torch.Tensor) -> bool:
        return param.data_ptr() == self.data.data_ptr() and param.dtype == self.data.dtype

    def has_gradient(self, param: torch.Tensor) -> bool:
        """Whether it is the view, and an assignment to `.data` has not moved the view itself."""
        grad, memory = self.grad, self.grad_memory
        if grad is None or memory is None or param.grad is not grad:
            return False
        return grad.data_ptr() == memory.data_ptr()

    def attach_gradient(self, param: torch.Tensor) -> None:
        if self.grad_memory is not None:
            self.grad = param.grad = self.grad_memory.detach()


# The last buffer that each parameter was moved into.
_places: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_generation = 0


class FlatBuffer:
    """Moves parameters, and their gradients, into one buffer per dtype and device.

    Gradients have the dtype that ``param.grad_dtype`` names, the parameter's unless it was set.

    Each parameter becomes a view into the buffer, at a multiple of 64 bytes, in its own shape and
    memory order; the objects stay the same, so that modules, tied parameters, ``state_dict`` and
    optimizers go on as before. The buffers are 64-byte aligned and lie on 2 MiB pages where the
    system grants them. An update of neighbours in a buffer is one walk over memory. Frozen
    parameters come last and have no gradients here.

    Flat gradients have a price outside the update: autograd adds into a view where it would hand
    over its own tensor, and clearing them is a pass of its own. ``zero_grad()`` of the optimizer
    clears them in place in one call; with ``clear_gradients=True`` the step clears each gradient
    just after reading it, and ``zero_grad()`` costs nothing. A parameter with a flat gradient
    always has one, so that it is updated also where ``backward()`` did not reach it, as with
    ``zero_grad(set_to_none=False)`` in torch.

    ``torch.save`` writes a buffer once. Plain ``pickle`` writes the whole buffer for every view,
    and ``torch.save`` of a few of the parameters writes all of it, as with any views in torch:
    clone the tensors first.

    Args:
        params: The parameters, or (name, parameter) pairs. Move the model to its device and dtype
            first: a parameter that is moved afterwards leaves the buffer.
        gradients: Whether to house the gradients too.
        clear_gradients: Whether ``step()`` of a flatstep optimizer leaves the gradients zero.

    Raises:
        TypeError: A parameter is not a plain, strided tensor of a dtype that flatstep updates,
            or its gradient is not one of the dtype that it should have.
        ValueError: No parameters, a parameter without memory of its own, or ``clear_gradients``
            without ``gradients``. Nothing has been moved.

    Example:
        >>> model = torch.nn.Linear(64, 64)
        >>> buffer = flatstep.FlatBuffer(model.parameters())
        >>> opt = flatstep.AdamW(model.parameters())
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[tuple[str | int, torch.Tensor]],
        gradients: bool = True,
        *,
        clear_gradients: bool = False,
    ) -> None:
        global _generation
        if clear_gradients and not gradients:
            raise ValueError("clear_gradients needs gradients=True: there is nothing else to clear")
        named = _named(params)
        _check(named, gradients)
        # Neighbours are updated in one walk; what is frozen would stand between them.
        named.sort(key=lambda item: not item[1].requires_grad)
        self._clear_gradients = clear_gradients
        self._clean: list[int] = []
        self._data: list[torch.Tensor] = []
        self._grads: list[torch.Tensor] = []
        self._homes: list[_Home] = []
        kinds = dict.fromkeys(map(_kind, (param for _, param in named)))
        with torch.inference_mode(False), torch.no_grad():
            for kind in kinds:
                self._furnish([(n, p) for n, p in named if _kind(p) == kind], kind, gradients)
            for home in self._homes:
                self._move(home)
        self._gradient_count = sum(home.grad is not None for home in self._homes)
        _generation += 1

    def _furnish(self, named: Named, kind: _Kind, gradients: bool) -> None:
        """Makes the buffers of a kind, with copies of everything in its place."""
        step = _ALIGNMENT // min(kind.dtype.itemsize, kind.grad_dtype.itemsize)
        starts, end, grads_end = [], 0, 0
        for _, param in named:
            starts.append((end + step - 1) // step * step)
            end = starts[-1] + param.numel()
            grads_end = end if gradients and param.requires_grad else grads_end
        data = zeros_flat(end, kind.dtype, kind.device)
        grads = zeros_flat(grads_end, kind.grad_dtype, kind.device)
        for (name, param), start in zip(named, starts, strict=True):
            stride = dense_stride(param)
            view = data.as_strided(param.shape, stride, start).copy_(param)
            grad = None
            if gradients and param.requires_grad:
                grad = grads.as_strided(param.shape, stride, start)
                if param.grad is not None:
                    grad.copy_(param.grad)
            self._homes.append(_Home(TensorWeakRef(param), name, view, grad))
        self._data.append(data)
        if gradients:
            self._grads.append(grads)

    def _move(self, home: _Home) -> None:
        param = home.param()
        grad = param.grad
        param.grad = None
        param.data = home.data
        param.grad = grad
        home.attach_gradient(param)
        _places[param] = (self, home)

    def __reduce__(self) -> tuple[object, ...]:
        """Copies and pickles of a buffer are new ones, of the copies of its parameters."""
        named = [(home.name, param) for param, home in self._residents()]
        return _make, (named, self.has_gradients, self.clears_gradients)

    def _residents(self) -> list[tuple[torch.Tensor, _Home]]:
        """The parameters that have not been moved into another buffer."""
        residents = []
        for home in self._homes:
            param = home.param()
            if param is not None and _places[param][0] is self:
                residents.append((param, home))
        return residents

    @property
    def has_gradients(self) -> bool:
        """Whether the gradients live here too."""
        return bool(self._grads)

    @property
    def clears_gradients(self) -> bool:
        """Whether steps are to clear the gradients."""
        return self._clear_gradients

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
        for param, home in self._residents():
            if home.grad is not None and param.requires_grad and not home.has_gradient(param):
                raise RuntimeError(
                    f"the gradient of parameter {home.name!r} has left its FlatBuffer (replaced by "
                    "zero_grad() of the model or an assignment to .grad); zero_grad() of the "
                    "optimizer or of the buffer puts it back"
                )
        return self._grads

    def check(self) -> None:
        """Makes sure that every parameter still lives here.

        Raises:
            RuntimeError: One does not, after ``.to()``, ``.half()``, an assignment to ``.data`` or
                a move into another buffer.
        """
        for home in self._homes:
            param = home.param()
            if param is not None and not home.has(param):
                raise _has_left(home)

    def zero_grad(self) -> None:
        """Sets every gradient to zero in place, and puts back those that were replaced.

        Raises:
            RuntimeError: A parameter has left its buffer.
        """
        residents = [(p, home) for p, home in self._residents() if home.grad_memory is not None]
        self.restore(residents)
        self.clear(residents)

    def restore(self, residents: list[tuple[torch.Tensor, _Home]]) -> None:
        """Puts back gradients that were replaced; a parameter frozen by now is left without."""
        for param, home in residents:
            if not home.has(param):
                raise _has_left(home)
            if not param.requires_grad:
                param.grad = None
            elif not home.has_gradient(param):
                home.attach_gradient(param)
                self._clean = []

    def clear(self, residents: list[tuple[torch.Tensor, _Home]]) -> None:
        """Sets the gradients of some of the parameters to zero, unless a step has just done so."""
        if [grad._version for grad in self._grads] == self._clean:
            return
        if len(residents) == self._gradient_count:
            for grad in self._grads:
                grad.zero_()
        else:
            torch._foreach_zero_([h.grad_memory for _, h in residents if h.grad_memory is not None])

    def mark_cleared(self, count: int) -> None:
        """Notes that a step has just cleared this many gradients."""
        increment_version(self._grads)
        if count == self._gradient_count:
            self._clean = [grad._version for grad in self._grads]


def flatten_(
    module: torch.nn.Module, gradients: bool = True, *, clear_gradients: bool = False
) -> FlatBuffer:
    """Moves a module's parameters into a :class:`FlatBuffer`, in place.

    The buffer lives as long as its parameters; keep the result only where you want to use it.
    """
    return FlatBuffer(module.named_parameters(), gradients, clear_gradients=clear_gradients)


class _Residents:
    """Some of a buffer's parameters, with what a glance at all of them should find."""

    def __init__(self) -> None:
        self.homes: list[tuple[torch.Tensor, _Home]] = []
        self._expected: (
            tuple[list[torch.Tensor], list[int], list[torch.Tensor], list[int]] | None
        ) = None  # until each has been looked at

    def note(self) -> None:
        """Takes the present state for the one that is to be."""
        params = [param for param, _ in self.homes]
        grads = [home.grad for _, home in self.homes if home.grad is not None]
        self._expected = (params, _addresses(params), grads, _addresses(grads))

    def are_in_place(self) -> bool:
        """Whether nothing has moved since: a look for thousands, without a step of Python each."""
        if self._expected is None:
            return False
        params, addresses, grads, grad_addresses = self._expected
        return (
            len(grads) == len(params)
            and all(map(_requires_grad, params))
            and all(map(is_, map(_gradient, params), grads))
            and _addresses(params) == addresses
            and _addresses(grads) == grad_addresses
        )


class Housed:
    """The parameters of an optimizer, by the buffer that holds their gradients."""

    def __init__(self, params: list[torch.Tensor]) -> None:
        self._params = params
        self._generation = _generation
        self._inside: dict[FlatBuffer, _Residents] = {}
        self.outside: list[torch.Tensor] = []
        for param in {id(param): param for param in params}.values():
            buffer, home = _places.get(param, (None, None))
            if home is None or home.grad_memory is None:
                self.outside.append(param)
            else:
                self._inside.setdefault(buffer, _Residents()).homes.append((param, home))

    def __bool__(self) -> bool:
        return bool(self._inside)

    def is_of(self, params: list[torch.Tensor]) -> bool:
        """Whether these are the parameters, and no buffer has been made since."""
        return (
            self._generation == _generation
            and len(params) == len(self._params)
            and all(map(is_, params, self._params))
        )

    def zero_grad(self) -> None:
        """Sets their gradients, and no others, to zero in place."""
        for buffer, residents in self._inside.items():
            if not residents.are_in_place():
                buffer.restore(residents.homes)
                residents.note()
            buffer.clear(residents.homes)


_gradient = attrgetter("grad")
_requires_grad = attrgetter("requires_grad")


def _addresses(tensors: list[torch.Tensor]) -> list[int]:
    return list(map(torch.Tensor.data_ptr, tensors))


def holds_gradient(param: torch.Tensor) -> bool:
    """Whether a buffer houses the parameter's gradient."""
    _, home = _places.get(param, (None, None))
    return home is not None and home.grad_memory is not None


def clearing_buffer(param: torch.Tensor) -> FlatBuffer | None:
    """The buffer that wants steps to clear the parameter's gradient, if any."""
    if not _generation:
        return None
    buffer, home = _places.get(param, (None, None))
    clears = home is not None and buffer.clears_gradients and home.has_gradient(param)
    return buffer if clears else None


def _make(named: Named, gradients: bool, clear_gradients: bool) -> FlatBuffer:
    return FlatBuffer(named, gradients, clear_gradients=clear_gradients)


def _has_left(home: _Home) -> RuntimeError:
    return RuntimeError(
        f"parameter {home.name!r} has left its FlatBuffer (moved by .to(), .half(), an assignment "
        "to .data or another FlatBuffer); make a new FlatBuffer after such a move"
    )


def _named(
    params: Iterable[torch.Tensor] | Iterable[tuple[str | int, torch.Tensor]],
) -> Named:
    if isinstance(params, torch.Tensor):
        raise TypeError("FlatBuffer takes an iterable of parameters, not one tensor")
    named: Named = []
    seen: set[int] = set()
    for place, item in enumerate(params):
        name, param = item if isinstance(item, tuple) else (place, item)
        if not isinstance(param, torch.Tensor):
            raise TypeError(
                f"parameter {name!r} is {type(param).__name__}; FlatBuffer takes tensors"
            )
        if id(param) not in seen:
            seen.add(id(param))
            named.append((name, param))
    if not named:
        raise ValueError("FlatBuffer got no parameters")
    return named


def _check(named: Named, gradients: bool) -> None:
    for name, param in named:
        if not (is_plain(param) and is_resolved(param) and param.is_leaf):
            raise TypeError(
                f"parameter {name!r} is a {type(param).__name__} of {param.dtype} on "
                f"{param.device}; FlatBuffer takes leaf tensors with plain memory: strided, on the "
                "CPU or a GPU, float32, float64, bfloat16, float16, complex64 or complex128"
            )
        if param.is_inference():
            raise ValueError(
                f"parameter {name!r} was made under torch.inference_mode() and cannot be trained; "
                "clone it outside"
            )
        if param.numel() and not param.data_ptr():
            raise ValueError(
                f"parameter {name!r} has no memory (its storage was freed or never allocated); "
                "restore it first"
            )
        if overlaps_itself(param):
            raise ValueError(
                f"parameter {name!r} has elements that share memory (strides {param.stride()}); "
                "clone it first"
            )
        if gradients and param.requires_grad:
            _check_gradient(name, param)
    clash = overlapping([param for _, param in named])
    if clash:
        labels = ", ".join(repr(named[place][0]) for place in sorted(clash))
        raise ValueError(
            f"parameters {labels} share memory, or lie in each other's gaps; FlatBuffer keeps tied "
            "parameters tied only where they are one object: tie them by assigning the same "
            "Parameter, or clone them"
        )


def _check_gradient(name: str | int, param: torch.Tensor) -> None:
    grad, dtype = param.grad, _grad_dtype(param)
    if dtype.is_complex != param.is_complex() or dtype not in STORED:
        raise TypeError(
            f"parameter {name!r} of {param.dtype} wants gradients of {dtype}, which no kernel "
            "takes; set its grad_dtype to float32, bfloat16 or float16, or pass gradients=False"
        )
    if grad is not None and not (
        is_plain(grad) and grad.dtype == dtype and grad.shape == param.shape
    ):
        raise TypeError(
            f"the gradient of parameter {name!r} ({grad.layout}, {grad.dtype}, "
            f"{tuple(grad.shape)}) is not as it should be ({dtype}, {tuple(param.shape)}); clear "
            "it first, or pass gradients=False"
        )
