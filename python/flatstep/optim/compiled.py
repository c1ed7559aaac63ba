"""A step inside ``torch.compile``'s graph: :mod:`flatstep.optim.operations` in place of the plan.

Dynamo follows :func:`in_graph`'s function, which only collects tensors. What it could not follow,
:func:`_prepare`, runs while it traces: it creates states and judges whether the graph can have the
step at all. What is read from tensors (steps, learning rates) is read when the graph runs.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch._compile import _disable_dynamo

from flatstep import _core, flat
from flatstep._torch import VERSION, connect_dtensor
from flatstep.optim import clipping, extras, operations, states
from flatstep.optim.finding import VARIANTS
from flatstep.optim.routes import Found, Route, is_plain, is_resolved, layout_of, overlapping

if TYPE_CHECKING:
    from flatstep.optim.base import Optimizer

# Older releases follow less of Python; there, a step breaks the graph.
_IS_KNOWN = VERSION >= (2, 13)


class _Group(NamedTuple):
    """What the graph holds of a group's options.

    Attributes:
        bits: The extras' bits.
        names: The states of each parameter.
        counts: Whether these have a count of steps.
        decay: Of the averages.
        seed: Of stochastic rounding, as a signed number.
        max_norm: Of the gradients; negative where there is no limit.
    """

    bits: int
    names: tuple[str, ...]
    counts: bool
    decay: float
    seed: int
    max_norm: float


class _Prepared(NamedTuple):
    """What the graph holds of an optimizer.

    Attributes:
        refusal: Why the graph cannot have the step, or None.
        groups: Of each group.
        norm_type: Of the norm, or None where none is needed.
        is_double: Whether there are float64 parameters.
    """

    refusal: str | None
    groups: tuple[_Group, ...] = ()
    norm_type: float | None = None
    is_double: bool = False


def _has_its_own_memory(tensor: torch.Tensor) -> bool:
    """Whether the storage is the tensor's alone.

    The compiler copies all of a storage, twice, for each view into it that an operation writes.
    """
    return tensor.untyped_storage().nbytes() == tensor.nbytes


def _refusal(optimizer: Optimizer, found: list[Found]) -> str | None:
    """Why the graph cannot have this step, or None."""
    groups = optimizer.param_groups
    asked = clipping.asked(groups)
    if any(group["differentiable"] for group in groups):
        return "autograd is to follow it (differentiable=True)"
    if asked is not None and asked.skips:
        return "it may be left out (skip_nonfinite=True)"
    if asked is not None and asked.raises:  # a graph that raises leaves autograd switched off
        return "it may raise (error_if_nonfinite=True)"
    if getattr(optimizer, "found_inf", None) is not None:
        return "it undoes a loss scale (GradScaler with fused=True)"
    if any(isinstance(group["weight_decay"], torch.Tensor) for group in groups):
        return "weight_decay is a tensor"
    for each in found:
        param = each.param
        if param.device.type != "cpu" or not is_plain(param) or not is_resolved(param):
            return f"{each.name} is no plain tensor on the CPU"
        if not _has_its_own_memory(param):
            return f"{each.name} is a view into a larger tensor, such as a FlatBuffer"
    shared = overlapping([each.param for each in found])
    if shared:
        return f"{found[min(shared)].name} shares memory with another"
    return None


def _prepare(
    optimizer: Optimizer,
    dtypes: tuple[tuple[torch.dtype | None, ...], ...],
    flags: tuple[int, ...],
    *options: Any,
) -> _Prepared:
    """Creates the states that a step needs.

    Args:
        optimizer: Whose step is traced.
        dtypes: Of each group's gradients; None where there is none.
        flags: Each group's flags of the rule.
        options: Whatever else another graph is needed for.
    """
    connect_dtensor()
    everything = optimizer._find()
    of_all = zip(everything, itertools.chain.from_iterable(dtypes), strict=True)
    found = {each: grad_dtype for each, grad_dtype in of_all if grad_dtype is not None}
    try:
        refusal = _refusal(optimizer, list(found))
        if refusal is not None:
            return _Prepared(refusal)
        wanted = {each: optimizer._wanted(each, flags[each.group]) for each in found}
        for each, grad_dtype in found.items():
            refusal = _refusal_of_states(optimizer, each, wanted[each], grad_dtype)
            if refusal is not None:
                return _Prepared(refusal)
    except (TypeError, ValueError, RuntimeError) as error:
        return _Prepared(str(error))  # which the step outside the graph raises
    _create_states(optimizer, wanted)
    groups = []
    for group, rule_flags in zip(optimizer.param_groups, flags, strict=True):
        _, decay, seed = extras.numbers(group, 1.0)
        groups.append(
            _Group(
                extras.bits(group, unscales=False),
                (*VARIANTS[optimizer.rule][rule_flags], *extras.names(group)),
                optimizer.counts_steps or extras.counts_steps(group),
                decay,
                (seed + 2**63) % 2**64 - 2**63,
                clipping.most_of(group),
            )
        )
    asked = clipping.asked(optimizer.param_groups)
    return _Prepared(
        None,
        tuple(groups),
        None if asked is None else asked.norm_type,
        any(each.param.dtype == torch.float64 for each in everything),
    )


def _refusal_of_states(
    optimizer: Optimizer, found: Found, wanted: states.Wanted, grad_dtype: torch.dtype
) -> str | None:
    """Why the graph cannot have a parameter's update, or None; raises as a step would."""
    param, group = found.param, optimizer.param_groups[found.group]
    state = optimizer.state.get(param, {})
    states.check(state, found, wanted)
    extras.validate_param(group, param, found.name)
    grad = torch.empty(0, dtype=grad_dtype)
    layout = layout_of(param, grad, wanted.dtypes[0] if wanted.rule else None)
    if states.are_foreign(state, wanted) or layout is None:
        return f"{found.name} is updated by torch's operations"
    return None


def _create_states(optimizer: Optimizer, wanted: dict[Found, states.Wanted]) -> None:
    """Creates what is missing, each with memory of its own.

    As torch's optimizers do, it has Dynamo ask at each step whether they are the same objects, and
    not about the shape, strides and so on of each, which takes longer than a small model's update.
    """
    from torch._dynamo import mark_static_address  # loaded by now, as it is not with flatstep

    firsts = optimizer._complete(wanted, dict.fromkeys(wanted, Route.KERNEL))
    optimizer._gather = False
    for found in wanted:
        state = optimizer.state.get(found.param, {})
        for name, tensor in state.items():
            if isinstance(tensor, torch.Tensor):
                if not _has_its_own_memory(tensor):
                    state[name] = tensor.clone()
                mark_static_address(state[name], guard=True)
    if not optimizer.counts_steps:
        for found in wanted:
            fresh = optimizer._fresh.setdefault(found.param, torch.empty((), dtype=torch.float32))
            fresh.fill_(found in firsts)
            mark_static_address(fresh, guard=True)


# As torch.compiler.assume_constant_result does, which would load all of Dynamo.
_prepare._dynamo_marked_constant = True  # type: ignore[attr-defined]


def in_graph(step: Callable[..., Any]) -> Callable[..., Any]:
    """What Dynamo is to follow in place of an optimizer's step.

    Args:
        step: The step outside a graph, for what no graph can have.
    """
    if not _IS_KNOWN:
        outside: Callable[..., Any] = _disable_dynamo(step)
        return outside

    @_disable_dynamo
    def step_outside(optimizer: Optimizer) -> None:
        step(optimizer)

    @functools.wraps(step)
    def step_inside(optimizer: Any, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        dtypes, flags, options, hypers = [], [], [], []
        for group in optimizer.param_groups:
            variant = optimizer.variant(group)
            flags.append(variant.flags)
            hypers.append(variant.hyper)
            grads = [param.grad for param in group["params"]]
            dtypes.append(tuple([None if grad is None else grad.dtype for grad in grads]))
            options.append([group.get(name) for name in extras.DEFAULTS])
        unscales = hasattr(optimizer, "found_inf")  # set by GradScaler for one step
        prepared = _prepare(optimizer, tuple(dtypes), tuple(flags), options, unscales)
        if prepared.refusal is not None:
            torch._dynamo.graph_break(msg=f"flatstep's step is no graph's: {prepared.refusal}")
            step_outside(optimizer)
            return loss
        with torch.no_grad():
            _trace(optimizer, prepared, flags, hypers)
        return loss

    return step_inside


def _trace(
    optimizer: Optimizer, prepared: _Prepared, flags: list[int], hypers: list[list[Any]]
) -> None:
    """Puts one operation for each group, and one for the norm, into the graph."""
    from torch.fx.experimental.symbolic_shapes import has_static_value  # loaded by now

    norm = None
    params = [param for group in optimizer.param_groups for param in group["params"]]
    params = [param for param in params if param.grad is not None]
    if prepared.norm_type is not None and params:
        grads = [param.grad for param in params]
        norm = operations.norm(params, grads, prepared.norm_type)
        optimizer._clipped.norm = norm
        optimizer._clipped.is_double = prepared.is_double
    first = optimizer._elements_before
    for index, group in enumerate(optimizer.param_groups):
        of = prepared.groups[index]
        params, firsts = [], []
        for param in group["params"]:
            if param.grad is not None:
                params.append(param)
                firsts.append(first % 2**32)
            first += param.numel()
        if not params:
            continue
        state = [optimizer.state[param] for param in params] if of.names or of.counts else []
        may_be_first = of.names and not optimizer.counts_steps
        hyper = hypers[index]
        if not isinstance(hyper[0], torch.Tensor) and not has_static_value(hyper[0]):
            # As a tensor, a learning rate that changes is not another graph each time.
            hyper[0] = torch.ones((), dtype=torch.float64) * hyper[0]
        operations.update(
            params,
            [param.grad for param in params],
            [own[name] for own in state for name in of.names],
            [own["step"] for own in state] if of.counts else [],
            [optimizer._fresh[param] for param in params] if may_be_first else [],
            [value for value in hyper if isinstance(value, torch.Tensor)],
            optimizer.rule,
            flags[index] | of.bits,
            [math.nan if isinstance(value, torch.Tensor) else value for value in hyper],
            norm,
            -1.0 if group["maximize"] else 1.0,
            of.max_norm,
            of.decay,
            of.seed,
            firsts if of.bits & _core.EXTRAS["stochastic"] else [],
        )


def zero_grad(optimizer: Optimizer, set_to_none: bool) -> None:
    """Clears gradients as Dynamo can follow it; torch's own way breaks the graph."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if not _IS_KNOWN or any(map(_holds_gradient, params)):
        _zero_grad_outside(optimizer, set_to_none)
        return
    for param in params:
        if set_to_none:
            param.grad = None
        elif param.grad is not None:
            param.grad = param.grad.detach().zero_()


def _holds_gradient(param: torch.Tensor) -> bool:
    return flat.holds_gradient(param)


_holds_gradient._dynamo_marked_constant = True  # type: ignore[attr-defined]


@_disable_dynamo
def _zero_grad_outside(optimizer: Optimizer, set_to_none: bool) -> None:
    optimizer.zero_grad(set_to_none)
