"""What a step does beside torch's update, and the sequence of torch calls that each replaces."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.swa_utils import get_ema_multi_avg_fn

import flatstep
from flatstep.optim import extras
from flatstep.optim.base import Optimizer
from flatstep.profiling.implementations import build_named, parameter
from flatstep.profiling.limit import Moved, Pages, Traffic
from flatstep.profiling.workloads import Shape
from flatstep.subjects import Subject

F32, BF16 = torch.float32, torch.bfloat16
OPTIMIZER = "adamw"
EMA_DECAY = 0.999
LOSS_SCALE = 4.0  # while results are checked

TORCH, TENSORS, FLAT = "torch", "flatstep", "flatstep flat"


@dataclass(frozen=True, eq=False)
class Work:
    """Something that a step does beside torch's update, with AdamW's.

    Attributes:
        name: As it is chosen.
        title: What is done, in words.
        calls: The torch calls that it replaces, in words.
        options: Of flatstep's optimizer.
        dtype: Of the parameters.
        grad_dtype: Of the gradients.
        clips: Whether the gradients are scaled down to half of their norm.
        scales: Whether a GradScaler makes the step.
        only_norm: Whether there is no update.
        wide: What torch needs in float32 for its fused update: nothing, a copy of the gradients,
            master weights, or a copy of the parameters at each step.
        beside: Other options of flatstep's, to be raced too, and their name.
        in_parts: Whether each of torch's calls is measured alone, too.
    """

    name: str
    title: str
    calls: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = F32
    grad_dtype: torch.dtype = F32
    clips: bool = False
    scales: bool = False
    only_norm: bool = False
    wide: Literal["nothing", "gradients", "masters", "copies"] = "nothing"
    beside: tuple[str, dict[str, Any]] | None = None
    in_parts: bool = False

    @property
    def norm_type(self) -> float:
        """The norm of the gradients that is computed, if any is."""
        return float(self.options.get("norm_type", 2))

    @property
    def reads_twice(self) -> bool:
        """Whether the gradients are read before the update."""
        return self.clips or self.scales or self.skips

    @property
    def skips(self) -> bool:
        """Whether a norm that is not finite skips the update."""
        return bool(self.options.get("skip_nonfinite"))

    @property
    def writes_gradients(self) -> bool:
        """Whether flatstep's update writes them."""
        return bool(self.options.get("write_unscaled_grads"))

    @property
    def averages(self) -> bool:
        """Whether there is an average of the weights."""
        return "ema_decay" in self.options

    @property
    def by_chance(self) -> bool:
        """Whether parameters are rounded by chance."""
        return self.options.get("rounding") == "stochastic"


MIXED: dict[str, Any] = {"dtype": BF16, "grad_dtype": BF16}
MASTERS = "gradients to float32, AdamW(fused) on float32 masters, copy_ to bfloat16"

#: Every option of a step that a pass measures, by its name.
WORKS: dict[str, Work] = {
    work.name: work
    for work in [
        Work("norm", "norm of the gradients, f32", "get_total_norm", clips=True, only_norm=True),
        Work(
            "norm-inf",
            "largest gradient, f32",
            "get_total_norm(inf)",
            {"norm_type": math.inf},
            clips=True,
            only_norm=True,
        ),
        Work("step", "AdamW alone, f32", "AdamW(fused)"),
        Work("clip", "clip + AdamW, f32", "clip_grad_norm_, AdamW(fused)", clips=True),
        Work(
            "skip",
            "AdamW if the norm is finite, f32",
            "get_total_norm, isfinite, AdamW(fused)",
            {"skip_nonfinite": True},
        ),
        Work(
            "ema",
            "AdamW + average, f32",
            "AdamW(fused), swa_utils' EMA",
            {"ema_decay": EMA_DECAY},
        ),
        Work(
            "clip-ema",
            "clip + AdamW + average, f32",
            "clip_grad_norm_, AdamW(fused), swa_utils' EMA",
            {"ema_decay": EMA_DECAY},
            clips=True,
        ),
        Work(
            "scaler-clip",
            "GradScaler: clip + AdamW, f32",
            "unscale_, clip_grad_norm_, GradScaler.step of AdamW(fused)",
            clips=True,
            scales=True,
        ),
        Work(
            "scaler",
            "GradScaler: AdamW, f32",
            "GradScaler.step of AdamW(fused)",
            scales=True,
        ),
        Work(
            "scaler-writes",
            "the same, gradients written, f32",
            "GradScaler.step of AdamW(fused)",
            {"write_unscaled_grads": True},
            scales=True,
        ),
        Work(
            "whole",
            "GradScaler: clip + AdamW + average, f32",
            "unscale_, clip_grad_norm_, GradScaler.step of AdamW(fused), swa_utils' EMA",
            {"ema_decay": EMA_DECAY},
            clips=True,
            scales=True,
            in_parts=True,
        ),
        Work(
            "bf16-grads",
            "AdamW, f32, bf16 gradients",
            "gradients to float32, AdamW(fused)",
            grad_dtype=BF16,
            wide="gradients",
        ),
        Work(
            "f32-states",
            "AdamW, bf16, f32 states",
            "parameters and gradients to float32, AdamW(fused), copy_ to bfloat16",
            {"state_dtype": F32},
            **MIXED,
            wide="copies",
        ),
        Work(
            "f32-master",
            "AdamW, bf16, f32 master, f32 states",
            MASTERS,
            {"master": "float32", "state_dtype": F32},
            **MIXED,
            wide="masters",
        ),
        Work(
            "split",
            "AdamW, bf16, split master, f32 states",
            MASTERS,
            {"master": "split", "state_dtype": F32},
            **MIXED,
            wide="masters",
        ),
        Work(
            "split-bf16-states",
            "the same, bf16 states (torch's: f32)",
            MASTERS,
            {"master": "split", "state_dtype": BF16},
            **MIXED,
            wide="masters",
        ),
        Work(
            "stochastic",
            "all bf16, stochastic (torch's: f32)",
            "parameters and gradients to float32, AdamW(fused), random bits added, copy_",
            {"rounding": "stochastic"},
            **MIXED,
            wide="copies",
            beside=("flatstep to nearest", {}),
        ),
    ]
}


def work_named(name: str) -> Work:
    """One of :data:`WORKS`.

    Raises:
        ValueError: For another name, with those that there are.
    """
    if name not in WORKS:
        raise ValueError(f"no pass '{name}'; there are {', '.join(WORKS)}")
    return WORKS[name]


class Arrays:
    """Parameters and gradients, as tensors and flat, that can be set back to where they began."""

    def __init__(self, shapes: Sequence[Shape], dtype: torch.dtype, grad_dtype: torch.dtype):
        """Fills them as every other workload's."""
        cpu = torch.device("cpu")
        self.separate = [parameter(shape, dtype, cpu) for shape in shapes]
        self.flat = [Parameter(torch.empty(shape, dtype=dtype)) for shape in shapes]
        if grad_dtype != dtype:
            for param, flat in zip(self.separate, self.flat, strict=True):
                grad = gradient(param).to(grad_dtype)
                for one in (param, flat):
                    one.grad = None
                    one.grad_dtype = grad_dtype
                    one.grad = grad
        self.buffer = flatstep.FlatBuffer(self.flat, gradients=grad_dtype == dtype)
        self.params = [param.detach().clone() for param in self.separate]
        self.grads = [gradient(param).clone() for param in self.separate]

    def reset(self, params: Sequence[Parameter], *, only_gradients: bool = False) -> None:
        """Sets one or the other back."""
        torch._foreach_copy_([gradient(param) for param in params], self.grads)
        if not only_gradients:
            torch._foreach_copy_([param.detach() for param in params], self.params)

    def beside(self) -> Arrays:
        """The same for an optimizer that nobody knows: what it breaks, nobody else has."""
        other = copy.copy(self)
        for name in ("apart", "wide", "wide_grads"):
            other.__dict__.pop(name, None)
        other.separate = [Parameter(param.clone()) for param in self.params]
        for param, grad in zip(other.separate, self.grads, strict=True):
            if grad.dtype != param.dtype:
                param.grad_dtype = grad.dtype
            param.grad = grad.clone()
        return other

    @cached_property
    def apart(self) -> list[Parameter]:
        """Parameters for torch alone to write: masters of flatstep's would have to follow them."""
        params = [Parameter(param.clone()) for param in self.params]
        for param, other in zip(params, self.separate, strict=True):
            param.grad = gradient(other)
        return params

    @cached_property
    def wide(self) -> list[Tensor]:
        """Parameters in float32, for torch."""
        return [param.float() for param in self.params]

    @cached_property
    def wide_grads(self) -> list[Tensor]:
        """Gradients in float32, for torch."""
        return [grad.float() for grad in self.grads]

    @cached_property
    def norms(self) -> dict[float, float]:
        """The two norms of the gradients that all begins with, computed in double."""
        squares = (float(torch.linalg.vector_norm(g, dtype=torch.float64)) for g in self.grads)
        largest = max(float(grad.abs().max()) for grad in self.grads if grad.numel())
        return {2.0: math.sqrt(sum(x * x for x in squares)), math.inf: largest}


@dataclass
class Contender:
    """A way to do a work.

    Attributes:
        name: Of the way.
        call: Does it once.
        params: The parameters of the workload.
        optimizer: Where the states are.
        updated: What the optimizer updates, where it is something else.
        wide: torch's float32 copies of the parameters.
        averages: torch's averages.
        temporaries: Other memory of torch's.
        scaler: What makes the step, if not the optimizer.
        parts: Calls that are measured alone, too.
        named: Whether the optimizer was named with ``--against``.
    """

    name: str
    call: Callable[[], object]
    params: list[Parameter]
    optimizer: torch.optim.Optimizer
    updated: list[Parameter]
    wide: list[Tensor] = field(default_factory=list)
    averages: list[Tensor] = field(default_factory=list)
    temporaries: list[Tensor] = field(default_factory=list)
    scaler: torch.amp.GradScaler | None = None
    parts: dict[str, Callable[[], object]] = field(default_factory=dict)
    named: bool = False

    @property
    def ours(self) -> bool:
        """Whether it is flatstep's, and not named."""
        return isinstance(self.optimizer, Optimizer) and not self.named

    def states(self) -> dict[str, list[Tensor]]:
        """The tensors of each state, but the count of steps, and torch's averages."""
        state = {} if self.named else self.optimizer.state
        names = [name for name in state.get(self.updated[0], {}) if name != "step"]
        found = {name: [state[param][name] for param in self.updated] for name in names}
        return {**found, extras.AVERAGE: self.averages} if self.averages else found

    @property
    def kind(self) -> tuple[str, torch.dtype]:
        """Ways of one kind can have each other's states, one after the other."""
        dtype = self.optimizer.param_groups[0].get("state_dtype") or self.updated[0].dtype
        return self.name, dtype

    def rule_states(self) -> list[dict[str, Tensor]]:
        """What every AdamW keeps, parameter by parameter; nothing where there is no AdamW."""
        if self.named:
            return []
        names = ("step", "exp_avg", "exp_avg_sq")
        states = [self.optimizer.state.get(param, {}) for param in self.updated]
        if not all(set(names) <= set(state) for state in states):
            return []
        return [{name: state[name] for name in names} for state in states]

    def adopt(self, states: list[dict[str, Tensor]]) -> None:
        """Begins with another one's :meth:`rule_states`, set to zero, instead of new memory."""
        for param, state in zip(self.updated, states, strict=False):
            torch._foreach_zero_(list(state.values()))
            self.optimizer.state[param] = state

    def nbytes(self) -> int:
        """Of all memory but that of the parameters and their gradients."""
        states = [tensor for tensors in self.states().values() for tensor in tensors]
        own = [*states, *self.wide, *self.temporaries]
        return sum(tensor.nbytes for tensor in own)

    def pages(self, traffic: Traffic) -> Pages:
        """The pages that its memory lies on."""
        own = [*self.params, *(gradient(param) for param in self.params)]
        states = [tensor for tensors in self.states().values() for tensor in tensors]
        found = traffic.pages(own, states or own)
        assert found is not None
        return found

    def walks(self, work: Work) -> list[Moved]:
        """The bytes that flatstep's way moves, by the arrays that it has."""
        grads = sum(gradient(param).nbytes for param in self.params)
        first = [Moved(grads=grads)] if work.reads_twice else []
        if work.only_norm:
            return first
        params = sum(param.nbytes for param in self.params)
        # Behind a float32 copy a parameter is only written.
        params *= 1 if work.options.get("master") == "float32" else 2
        states = 2 * sum(tensor.nbytes for tensors in self.states().values() for tensor in tensors)
        if work.writes_gradients:
            return [*first, Moved(params + 2 * grads, 0, states)]
        return [*first, Moved(params, grads, states)]


def contenders(work: Work, arrays: Arrays) -> list[Contender]:
    """The way of torch, whose results are the measure of the others, and those of flatstep."""
    found = [
        _torch(work, arrays),
        _ours(TENSORS, work, work.options, arrays.separate, arrays),
        _ours(FLAT, work, work.options, arrays.flat, arrays),
    ]
    if work.beside is not None:
        name, options = work.beside
        found.append(_ours(name, work, options, arrays.separate, arrays))
    return found


def named_contender(work: Work, arrays: Arrays, subject: Subject) -> Contender:
    """The way of torch with a named optimizer in place of torch's."""
    build = partial(build_named, subject, OPTIMIZER)
    return replace(_torch(work, arrays.beside(), build), name=subject.label, parts={}, named=True)


def max_norm(work: Work, arrays: Arrays) -> float:
    """What the gradients are clipped to, while results are checked and, at most, afterwards."""
    return arrays.norms[work.norm_type] / 2 / (LOSS_SCALE if work.scales else 1)


def _ours(
    name: str, work: Work, options: dict[str, Any], params: list[Parameter], arrays: Arrays
) -> Contender:
    options = dict(options)
    if work.clips:
        options["max_grad_norm"] = max_norm(work, arrays)
    if work.only_norm:
        # Without states: nothing but gradients is looked at.
        norm = flatstep.SGD(params, **options)
        return Contender(name, norm.check_gradients, params, norm, params)
    optimizer = flatstep.AdamW(params, fused=work.scales or None, **options)
    if not work.scales:
        return Contender(name, optimizer.step, params, optimizer, params)
    scaler = _scaler(flatstep.GradScaler)
    call = _all(partial(scaler.step, optimizer), scaler.update)
    return Contender(name, call, params, optimizer, params, scaler=scaler)


def _torch(
    work: Work,
    arrays: Arrays,
    build: Callable[[list[Parameter]], torch.optim.Optimizer] | None = None,
) -> Contender:
    separate = arrays.apart if work.wide == "masters" else arrays.separate
    params = [param.detach() for param in separate]
    grads = [gradient(param) for param in separate]
    if work.only_norm:
        nothing = torch.optim.SGD(arrays.separate)
        call = partial(total_norm, grads, work.norm_type)
        return Contender(TORCH, call, arrays.separate, nothing, arrays.separate)
    before: list[Callable[[], object]] = []
    after: list[Callable[[], object]] = []
    weights, own_grads = params, grads
    if work.wide != "nothing":
        own_grads = arrays.wide_grads
        before.append(partial(torch._foreach_copy_, own_grads, grads))
    if work.wide in ("masters", "copies"):
        weights = arrays.wide
        torch._foreach_copy_(weights, arrays.params)
    if work.wide == "copies":
        before.append(partial(torch._foreach_copy_, weights, params))
    updated = [Parameter(weight) for weight in weights]
    for param, grad in zip(updated, own_grads, strict=True):
        param.grad = grad
    optimizer = build(updated) if build else torch.optim.AdamW(updated, fused=True)
    step: Callable[[], object] = optimizer.step
    parts: dict[str, Callable[[], object]] = {}
    scaler = None
    if work.scales:
        scaler = _scaler(torch.amp.GradScaler)
        step = partial(scaler.step, optimizer)
        after.append(scaler.update)
        if work.clips:
            before.append(partial(scaler.unscale_, optimizer))
            # Without an update of the scale it refuses the next one.
            parts["unscale_"] = _all(before[-1], scaler.update)
    if work.clips:
        clip = torch.nn.utils.clip_grad_norm_
        before.append(partial(clip, updated, max_norm(work, arrays), work.norm_type))
        parts["clip_grad_norm_"] = before[-1]
    parts["AdamW(fused)"] = optimizer.step
    if work.skips:
        step = partial(_step_if_finite, optimizer, own_grads)
    averages = [weight.clone() for weight in weights] if work.averages else []
    if work.averages:
        average: Any = get_ema_multi_avg_fn(EMA_DECAY)
        after.append(partial(average, averages, weights, None))
        parts["swa_utils' EMA"] = after[-1]
    if work.by_chance:
        after.append(partial(_round_by_chance, params, weights))
    elif weights is not params:
        after.append(partial(torch._foreach_copy_, params, weights))
    return Contender(
        TORCH,
        _all(*before, step, *after),
        separate,
        optimizer,
        updated,
        wide=[] if weights is params else weights,
        averages=averages,
        temporaries=[] if own_grads is grads else own_grads,
        scaler=scaler,
        parts=parts if work.in_parts else {},
    )


def gradient(param: Tensor) -> Tensor:
    """A parameter's gradient, which is there."""
    assert param.grad is not None
    return param.grad


def total_norm(grads: Sequence[Tensor], norm_type: float) -> Tensor:
    """The norm by torch of all gradients, also of a torch that has not made it public."""
    if hasattr(torch.nn.utils, "get_total_norm"):
        norm: Tensor = torch.nn.utils.get_total_norm(grads, norm_type)
    else:
        norms = torch.stack(torch._foreach_norm(list(grads), norm_type))
        norm = torch.linalg.vector_norm(norms, norm_type)
    return norm


def _step_if_finite(optimizer: torch.optim.Optimizer, grads: Sequence[Tensor]) -> None:
    if torch.isfinite(total_norm(grads, 2)):
        optimizer.step()


def _round_by_chance(params: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """As bfloat16 trainers do it: random bits below the last one, which are then cut off."""
    for param, weight in zip(params, weights, strict=True):
        bits = torch.randint(1 << 16, weight.shape, dtype=torch.int32)
        bits.add_(weight.view(torch.int32)).bitwise_and_(-1 << 16)
        param.copy_(bits.view(F32))


def _scaler(cls: type[torch.amp.GradScaler]) -> torch.amp.GradScaler:
    scaler = cls("cpu", init_scale=LOSS_SCALE, growth_interval=1 << 30)
    scaler.scale(torch.zeros(()))  # which makes its tensors
    return scaler


def _all(*calls: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        for call in calls:
            call()

    return run
