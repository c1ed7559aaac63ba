"""A step inside ``torch.compile``'s graph: custom operations in place of the plan's one call.

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

from flatstep import _core, flat, reference
from flatstep._torch import connect_dtensor, increment_version
from flatstep.optim import clipping, extras, states
from flatstep.optim.finding import VARIANTS
from flatstep.optim.routes import (
    Found,
    Route,
    in_order_of,
    is_plain,
    is_resolved,
    layout_of,
    overlapping,
)
from flatstep.optim.weights import reconcile

if TYPE_CHECKING:
    from flatstep.optim.base import Optimizer

# Older releases follow less of Python; there, a step breaks the graph.
_IS_KNOWN = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)

_library = torch.library.Library("flatstep", "DEF")
_library.define(
    "update_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor(c!)[] steps, "
    "Tensor(d!)[] fresh, Tensor[] tensors, Tensor? norm, str rule, int flags, float[] numbers, "
    "float sign, float max_norm, float average_decay, int seed, int[] firsts) -> ()"
)
_library.define("norm(Tensor[] params, Tensor[] grads, float norm_type) -> Tensor")


def _update(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    of_all: list[torch.Tensor],
    steps: list[torch.Tensor],
    fresh: list[torch.Tensor],
    tensors: list[torch.Tensor],
    norm: torch.Tensor | None,
    rule: str,
    flags: int,
    numbers: list[float],
    sign: float,
    max_norm: float,
    average_decay: float,
    seed: int,
    firsts: list[int],
) -> None:
    """Updates the parameters of a group, as the plan's one call would.

    Args:
        params: Those with a gradient.
        grads: Their gradients, only read.
        of_all: The states of the first parameter, then those of the second, and so on.
        steps: How many steps each has had, or none where nobody counts.
        fresh: Whether each step is the first, for a rule that does not count.
        tensors: The hyper-parameters that are tensors.
        norm: The norm of all gradients, where they are clipped.
        rule: The rule's name.
        flags: Its flags and the extras.
        numbers: The hyper-parameters; NaN stands for the next of the tensors.
        sign: -1 goes up the gradient.
        max_norm: Of the gradients; negative where there is no limit.
        average_decay: Of the averages.
        seed: Of stochastic rounding, as a signed number.
        firsts: Each parameter's first element among all, for chance.
    """
    rest = iter(tensors)
    hyper = [float(next(rest)) if math.isnan(number) else number for number in numbers]
    if norm is not None and max_norm >= 0:
        sign *= reference.clip_factor(float(norm), max_norm)
    counts = [int(step) + 1 for step in steps] or [1] * len(params)
    of_rule = [2 - int(first) for first in fresh] or counts
    each = len(of_all) // len(params)
    of_one = [of_all[at * each : (at + 1) * each] for at in range(len(params))]
    width = len(VARIANTS[rule][flags & extras.RULE_FLAGS])
    is_master = bool(flags & (_core.EXTRAS["master_copy"] | _core.EXTRAS["master_split"]))
    if flags & _core.EXTRAS["master_copy"]:
        reconcile((param, own[width]) for param, own in zip(params, of_one, strict=True))
    copied: list[tuple[torch.Tensor, torch.Tensor]] = []
    flat_grads, flat_states, layouts = [], [], []
    for param, grad, own in zip(params, grads, of_one, strict=True):
        ordered = [in_order_of(state, param) for state in own]
        copied += [(a, b) for a, b in zip(own, ordered, strict=True) if a is not b]
        flat_states.append(ordered)
        flat_grads.append(in_order_of(grad, param))
        layout = layout_of(param, grad, own[0].dtype if width else None)
        layouts.append(-1 if layout is None else layout)  # which the kernels refuse
    increment_version([*params, *of_all])
    _core.updates(
        rule,
        flags,
        layouts,
        [param.data_ptr() for param in params],
        [grad.data_ptr() for grad in flat_grads],
        [state.data_ptr() for own in flat_states for state in own[:width]],
        [param.numel() * (2 if param.is_complex() else 1) for param in params],
        hyper,
        of_rule,
        sign,
        torch.get_num_threads(),
        [own[width].data_ptr() for own in flat_states] if is_master else [],
        [own[-1].data_ptr() for own in flat_states] if flags & _core.EXTRAS["average"] else [],
        average_decay,
        seed % 2**64,
        counts,
        firsts,
    )
    for tensor, copy in copied:
        tensor.copy_(copy)
    if steps:
        torch._foreach_add_(steps, 1)
    if fresh:
        torch._foreach_zero_(fresh)


def _norm(params: list[torch.Tensor], grads: list[torch.Tensor], norm_type: float) -> torch.Tensor:
    """The norm of all gradients together, 0-dim, in float64."""
    largest = norm_type == math.inf
    memories = [in_order_of(grad, param) for param, grad in zip(params, grads, strict=True)]
    norm = reference.norm_of(clipping.total_of(memories, largest), norm_type, 1.0)
    return torch.tensor(norm, dtype=torch.float64)


def _fake_update(*_: Any) -> None:
    return None


def _fake_norm(params: list[torch.Tensor], *_: Any) -> torch.Tensor:
    return params[0].new_empty((), dtype=torch.float64)


for _name, _run, _fake in (("update_", _update, _fake_update), ("norm", _norm, _fake_norm)):
    _library.impl(_name, _run, "CPU")
    torch.library.register_fake(f"flatstep::{_name}", _fake, lib=_library)


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
    if not _IS_KNOWN:
        return f"torch is {torch.__version__}, older than 2.13"
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
    with torch.no_grad():
        firsts = states.complete(
            {
                found: optimizer.state[found.param]
                for found, of in wanted.items()
                if of.names or optimizer._counts(found)
            },
            wanted,
            dict.fromkeys(wanted, Route.KERNEL),
            step_device=optimizer._step_device,
            gather=optimizer._gather,
        )
    optimizer._gather = False
    for found in wanted:
        state = optimizer.state.get(found.param, {})
        for name, tensor in state.items():
            if isinstance(tensor, torch.Tensor) and not _has_its_own_memory(tensor):
                state[name] = tensor.clone()
    if not optimizer.counts_steps:
        for found in wanted:
            optimizer._fresh[found.param] = torch.tensor(found in firsts)


# As torch.compiler.assume_constant_result does, which would load all of Dynamo.
_prepare._dynamo_marked_constant = True  # type: ignore[attr-defined]


def in_graph(step: Callable[..., Any]) -> Callable[..., Any]:
    """What Dynamo is to follow in place of an optimizer's step.

    Args:
        step: The step outside a graph, for what no graph can have.
    """

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
            options.append([group.get(name, value) for name, value in extras.DEFAULTS.items()])
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
    norm = None
    params = [param for group in optimizer.param_groups for param in group["params"]]
    params = [param for param in params if param.grad is not None]
    if prepared.norm_type is not None and params:
        grads = [param.grad for param in params]
        norm = torch.ops.flatstep.norm(params, grads, prepared.norm_type)
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
        if not isinstance(hyper[0], torch.Tensor):
            # As a tensor, a learning rate that changes is not another graph each time.
            hyper[0] = torch.ones((), dtype=torch.float64) * hyper[0]
        torch.ops.flatstep.update_(
            params,
            [param.grad for param in params],
            [own[name] for own in state for name in of.names],
            [own["step"] for own in state] if of.counts else [],
            [optimizer._fresh[param] for param in params] if may_be_first else [],
            [value for value in hyper if isinstance(value, torch.Tensor)],
            norm,
            optimizer.rule,
            flags[index] | of.bits,
            [math.nan if isinstance(value, torch.Tensor) else value for value in hyper],
            -1.0 if group["maximize"] else 1.0,
            of.max_norm,
            of.decay,
            of.seed,
            firsts,
        )


def zero_grad(optimizer: Optimizer, set_to_none: bool) -> None:
    """Clears gradients as Dynamo can follow it; torch's own way breaks the graph."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if any(map(_holds_gradient, params)):
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
