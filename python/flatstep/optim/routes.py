"""Which way a parameter is updated, judged from the tensors themselves."""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from flatstep import _core
from flatstep._torch import LAYOUT, STORED, Arguments, is_dtensor, update_memory


class Route(enum.Enum):
    """The ways of an update."""

    KERNEL = enum.auto()  # plain memory, in the one call for all
    ALONE = enum.auto()  # through the kernel in a call of its own, copying what is strided
    TORCH = enum.auto()  # through torch's operations
    SPARSE = enum.auto()  # SGD with sparse gradients, through torch's operations


@dataclass(eq=False)  # compared and hashed by identity: cheap for thousands
class Found:
    """A parameter, and where it was found."""

    param: torch.Tensor
    name: str
    group: int
    first: int  # element of what is here, among those of all parameters


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill a piece of memory, in whatever order, each once."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 0:
            return True
        if size > 1:
            if stride != expected:
                return False
            expected *= size
    return True


def dense_stride(tensor: torch.Tensor) -> tuple[int, ...]:
    """The strides of a dense tensor like this one: its own, where it is dense itself."""
    return tensor.stride() if is_dense(tensor) else torch.empty_like(tensor, device="meta").stride()


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements may be the same memory, as in an expanded tensor."""
    if tensor.is_contiguous():
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def same_order(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors of one shape lie in memory in the same order."""
    return a.stride() == b.stride() or all(
        size <= 1 or x == y for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


def is_wrapped(tensor: torch.Tensor) -> bool:
    """Whether the tensor stands for others, in a way that its class does not show."""
    wrapped: bool = torch._is_functional_tensor(
        tensor
    ) or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return wrapped


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """The local tensor of a DTensor, and any other tensor itself."""
    if is_dtensor(tensor):
        return tensor._local_tensor  # type: ignore[attr-defined, no-any-return]
    return tensor


def as_placed(local: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A local tensor, as a DTensor placed like the other where that is one.

    It shares the local one's memory, wherever that is: ``DTensor.from_local`` would move it to the
    device of the mesh, and with it the states of parameters that are offloaded to the CPU.
    """
    if not is_dtensor(like):
        return local
    spec: Any = like._spec  # type: ignore[attr-defined]
    meta = spec.tensor_meta._replace(dtype=local.dtype)
    of_local = dataclasses.replace(spec, tensor_meta=meta)
    placed: torch.Tensor = type(like)(local, of_local, requires_grad=False)  # type: ignore[call-overload]
    return placed


def bits_as(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same bits as another dtype of their size; ``DTensor.view`` would not keep them."""
    return as_placed(local_of(tensor).view(dtype), tensor)


def grad_of(param: torch.Tensor) -> torch.Tensor:
    """The gradient of a parameter that has one."""
    grad = param.grad
    assert grad is not None
    return grad


def is_on_gpu(tensor: torch.Tensor) -> bool:
    """Whether the tensor is on a GPU that this build has kernels for."""
    return tensor.device.type == "cuda" and _core.gpu_count() > 0


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor's address and strides are all there is to its data."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and (tensor.device.type == "cpu" or is_on_gpu(tensor))
        and tensor.dtype in STORED
        and not is_wrapped(tensor)
    )


def is_aligned(tensor: torch.Tensor) -> bool:
    """Whether the elements' addresses are multiples of their size."""
    size = tensor.element_size() // (2 if tensor.is_complex() else 1)
    return tensor.data_ptr() % size == 0


def is_resolved(tensor: torch.Tensor) -> bool:
    """Whether memory holds the values themselves, not their negatives or conjugates."""
    return not tensor.is_neg() and not tensor.is_conj()


def _refuse(found: Found, grad: torch.Tensor) -> None:
    """Raises where a parameter cannot be updated, or only wrongly."""
    param, name = found.param, found.name
    if not (param.is_floating_point() or param.is_complex()):
        raise TypeError(f"{name} has dtype {param.dtype}; flatstep updates floats and complex")
    if isinstance(param, FakeTensor) or isinstance(grad, FakeTensor):
        raise TypeError(f"{name} or its gradient is a fake tensor, which has no data to update")
    if param.shape != grad.shape:
        raise ValueError(
            f"{name} has shape {tuple(param.shape)}, but its gradient has {tuple(grad.shape)}; "
            "clear the gradient after changing a parameter's data"
        )
    if is_dtensor(param) and any(p.is_partial() for p in param.placements):  # type: ignore[attr-defined]
        raise ValueError(
            f"{name} has placements {param.placements}: an update of what is to be summed up over "  # type: ignore[attr-defined]
            "ranks is not the sum of updates; redistribute it to Shard or Replicate"
        )
    if param.layout == grad.layout and is_dtensor(param) != is_dtensor(grad):
        which, other = ("", " not") if is_dtensor(param) else (" not", "")
        raise ValueError(
            f"{name} is{which} a DTensor, but its gradient is{other}; make both DTensors or neither"
        )
    if param.device != grad.device:
        raise ValueError(f"{name} is on {param.device}, but its gradient is on {grad.device}")


def _refuse_memory(found: Found, param: torch.Tensor, grad: torch.Tensor) -> None:
    """Raises where plain memory cannot be updated in place."""
    if param.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{found.name} was made under torch.inference_mode() and cannot be updated outside it; "
            "clone it to get one that can"
        )
    if overlaps_itself(param):
        raise ValueError(
            f"{found.name} has elements that share memory (shape {tuple(param.shape)}, strides "
            f"{param.stride()}), so that no update in place is right; clone it first"
        )
    if param.numel() and not (param.data_ptr() and grad.data_ptr()):
        raise ValueError(
            f"{found.name} or its gradient has no memory (its storage was freed or never "
            "allocated); restore it before step()"
        )


def route_of(found: Found, *, differentiable: bool) -> Route:
    """The route of one parameter with a gradient.

    Raises:
        TypeError, ValueError: Where the parameter cannot be updated, or only wrongly.
    """
    param, grad = found.param, found.param.grad
    assert grad is not None
    _refuse(found, grad)
    if grad.layout != torch.strided:
        return Route.SPARSE
    local_param, local_grad = local_of(param), local_of(grad)
    if (
        differentiable
        or (local_param is not param and param.placements != grad.placements)  # type: ignore[attr-defined]
        or not is_plain(local_param)
        or not is_plain(local_grad)
        or local_param.is_complex() != local_grad.is_complex()
        or not is_resolved(local_param)
    ):
        return Route.TORCH
    _refuse_memory(found, local_param, local_grad)
    if (
        is_dense(local_param)
        and same_order(local_param, local_grad)
        and is_resolved(local_grad)
        and is_aligned(local_param)
        and is_aligned(local_grad)
    ):
        return Route.KERNEL
    return Route.ALONE


def overlapping(tensors: list[torch.Tensor]) -> set[int]:
    """The places in the list of those whose memory may overlap another's."""
    spans = []
    for place, tensor in enumerate(tensors):
        if tensor.numel():
            reach = sum(
                stride * (size - 1)
                for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
            )
            start = tensor.data_ptr()
            spans.append((start, start + (reach + 1) * tensor.element_size(), place))
    spans.sort()
    found: set[int] = set()
    last_end, last_place = 0, -1
    for start, end, place in spans:
        if start < last_end:
            found |= {last_place, place}
        if end > last_end:
            last_end, last_place = end, place
    return found


def layout_of(
    param: torch.Tensor, grad: torch.Tensor, state_dtype: torch.dtype | None = None
) -> int | None:
    """The kernels' layout of plain tensors, or None; None for the states means none there are."""
    types = (param.dtype, grad.dtype, state_dtype or param.dtype)
    if any(dtype not in STORED for dtype in types):
        return None
    if len({dtype.is_complex for dtype in types}) > 1:
        return None
    stored = (STORED[types[0]], STORED[types[1]], STORED[types[2]])
    return LAYOUT.get(stored)


def in_order_of(tensor: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it, in the memory order of a dense parameter."""
    if same_order(tensor, param) and is_resolved(tensor) and is_aligned(tensor):
        return tensor
    return torch.empty_like(param, dtype=tensor.dtype).copy_(tensor)


def update_alone(
    rule: str,
    variant: int,
    hyper: list[float],
    param: torch.Tensor,
    grad: torch.Tensor,
    states: list[torch.Tensor],
    step: int,
    scale: float,
    *,
    beside: dict[str, torch.Tensor] | None = None,
    **numbers: Any,
) -> None:
    """Updates one plain parameter, whatever its strides and the gradient's.

    What the kernel cannot walk over in one order is copied into the parameter's order first; a
    parameter or state with gaps is copied back, so that nothing in the gaps is touched.

    Args:
        rule: The rule's name.
        variant: Its flags and the extras.
        hyper: Its hyper-parameters.
        param: The parameter.
        grad: Its gradient, only read.
        states: Those of the rule.
        step: The number of the step.
        scale: Multiplies the gradient.
        beside: The "master" and the "average", where the extras call for them.
        numbers: The extras' numbers, as ``_core.update`` takes them.
    """
    usable = is_dense(param) and is_aligned(param)
    flat = param if usable else torch.empty_like(param).copy_(param)
    flat_grad = in_order_of(grad, flat)
    flat_states = [in_order_of(state, flat) for state in states]
    flat_beside = {name: in_order_of(tensor, flat) for name, tensor in (beside or {}).items()}
    layout = layout_of(flat, flat_grad, states[0].dtype if states else None)
    assert layout is not None
    arguments: Arguments = (
        rule,
        variant,
        layout,
        flat.data_ptr(),
        flat_grad.data_ptr(),
        [state.data_ptr() for state in flat_states],
        flat.numel() * (2 if flat.is_complex() else 1),
        hyper,
        step,
        scale,
    )
    addresses = {name: tensor.data_ptr() for name, tensor in flat_beside.items()}
    update_memory(flat.device, arguments, **addresses, **numbers)
    for tensor, copy in zip(
        [param, *states, *(beside or {}).values()],
        [flat, *flat_states, *flat_beside.values()],
        strict=True,
    ):
        if copy is not tensor:
            tensor.copy_(copy)
