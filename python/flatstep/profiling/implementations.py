"""What is compared: flatstep on tensors and on a flat buffer, and torch's own paths."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Parameter

import flatstep
from flatstep import optim
from flatstep.optim.base import Optimizer
from flatstep.optim.rules import RULES
from flatstep.profiling.limit import Pages, Traffic
from flatstep.profiling.workloads import Shape, Workload
from flatstep.subjects import Subject
from flatstep.torch_paths import PATHS, paths_of

OPTIMIZERS: dict[str, type[Optimizer]] = {
    name.lower(): getattr(optim, name) for name in optim.__all__
}
# Without momentum SGD keeps no state, and nobody trains with it.
OPTIONS: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}}

FUSED = "torch fused"
# The quickest first.
TORCH_PATHS = {f"torch {path}": options for path, options in reversed(PATHS.items())}


def optimizer_named(name: str) -> type[Optimizer]:
    """One of :data:`OPTIMIZERS`.

    Raises:
        ValueError: For another name, with those that there are.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"no optimizer '{name}'; there are {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]


def torch_optimizer(name: str) -> type[torch.optim.Optimizer]:
    """The class of torch's that flatstep's takes the place of."""
    cls: type[torch.optim.Optimizer] = getattr(torch.optim, optimizer_named(name).__name__)
    return cls


def torch_paths(name: str, *, slow: bool = True) -> list[str]:
    """The paths that torch has for an optimizer; without the slow ones only where one is fused."""
    paths = [f"torch {path}" for path in reversed(paths_of(torch_optimizer(name)))]
    return paths if slow or FUSED not in paths else [FUSED]


def build_torch(path: str, name: str, params: list[Parameter]) -> torch.optim.Optimizer:
    """An optimizer of torch's that takes one of its paths."""
    build: Any = torch_optimizer(name)
    optimizer: torch.optim.Optimizer = build(params, **OPTIONS.get(name, {}), **TORCH_PATHS[path])
    return optimizer


def hyperparameters(subject: Subject, name: str) -> dict[str, Any]:
    """What a named optimizer is built with, so that it does what torch's does.

    They are the values that torch's has, of those options that the subject's signature names, and
    before them the subject's own.
    """
    build: Any = torch_optimizer(name)
    defaults = build([Parameter(torch.zeros(1))], **OPTIONS.get(name, {})).defaults
    rule = RULES[optimizer_named(name).rule]
    shared = [key for key in defaults if key in (*rule["hyper"], "lr", "betas")]
    named: Mapping[str, inspect.Parameter] = {}
    with contextlib.suppress(TypeError, ValueError):  # of something compiled
        named = inspect.signature(subject.build).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in named.values())
    told = {key for key in shared if key in named or (takes_any and key in OPTIONS.get(name, {}))}
    return {**{key: defaults[key] for key in shared if key in told}, **subject.options}


def build_named(subject: Subject, name: str, params: list[Parameter]) -> torch.optim.Optimizer:
    """A named optimizer that is to do what torch's does."""
    return subject(params, **hyperparameters(subject, name))


@dataclass
class Implementation:
    """An optimizer over the parameters of a workload.

    Attributes:
        name: Of the way that the update goes.
        optimizer: What makes the steps.
        params: What they are made on.
        named: Whether it is an optimizer that was named with ``--against``.
    """

    name: str
    optimizer: torch.optim.Optimizer
    params: list[Parameter]
    named: bool = False

    @property
    def ours(self) -> bool:
        """Whether it is flatstep's, and not named."""
        return isinstance(self.optimizer, Optimizer) and not self.named

    @property
    def of_torch(self) -> bool:
        """Whether it is one of torch's paths."""
        return not (self.ours or self.named)

    def states(self) -> dict[str, list[torch.Tensor]]:
        """The tensors of each state but the count of steps, parameter by parameter."""
        if self.named:
            return {}  # whatever they are, they are not known
        names = [name for name in self.optimizer.state.get(self.params[0], {}) if name != "step"]
        return {name: [self.optimizer.state[p][name] for p in self.params] for name in names}

    def pages(self, traffic: Traffic) -> Pages | None:
        """The pages that its memory lies on, where the limit depends on them."""
        grads = [param.grad for param in self.params if param.grad is not None]
        kept = getattr(self.optimizer, "state", None)
        states = [
            tensor
            for state in (kept.values() if isinstance(kept, Mapping) else [])
            for tensor in (state.values() if isinstance(state, Mapping) else [])
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
        ]
        return traffic.pages([*self.params, *grads], states)

    def drop_states(self) -> None:
        """Gives the states back, but not the counts of steps."""
        for state in self.optimizer.state.values():
            for name in [name for name in state if name != "step"]:
                del state[name]

    def share_states(self, other: Implementation) -> None:
        """Takes another's states for its own, but not the counts of steps.

        Those of a fused path on a GPU are there, and those of the others on the host. Where the
        other has no states, because it failed, the next step makes new ones.
        """
        if not other.states():
            self.optimizer.state.clear()
        for param, state in other.optimizer.state.items():
            shared = {name: tensor for name, tensor in state.items() if name != "step"}
            self.optimizer.state[param].update(shared)


@dataclass(frozen=True)
class Rivals:
    """What is raced beside flatstep.

    Attributes:
        slow_paths: Whether torch's for-loop and foreach are, where it has a fused path.
        named: Optimizers that were named with ``--against``.
    """

    slow_paths: bool = True
    named: tuple[Subject, ...] = ()

    def following(self, optimizer: str) -> list[Subject]:
        """The named ones that follow an optimizer's rule."""
        return [subject for subject in self.named if subject.rule == optimizer]


@dataclass(frozen=True)
class Entrant:
    """An implementation before it is built.

    Attributes:
        name: Of the implementation.
        params: Gives what its steps are made on.
        build: Makes the optimizer.
        subject: What was named with ``--against``, if it was.
    """

    name: str
    params: Callable[[], list[Parameter]]
    build: Callable[[list[Parameter]], torch.optim.Optimizer]
    subject: Subject | None = None

    @property
    def of_torch(self) -> bool:
        """Whether it is one of torch's paths."""
        return self.name in TORCH_PATHS


class Tensors:
    """The parameters and gradients of a workload: some as tensors, some in a flat buffer."""

    def __init__(self, workload: Workload, dtype: torch.dtype, where: torch.device):
        """Fills them with values for which every path of torch's is accurate."""
        self.separate = [parameter(shape, dtype, where) for shape in workload.shapes]
        self.flat = [
            Parameter(torch.empty(shape, dtype=dtype, device=where)) for shape in workload.shapes
        ]
        self.buffer = flatstep.FlatBuffer(self.flat)
        with torch.no_grad():
            for param, flat in zip(self.separate, self.flat, strict=True):
                assert param.grad is not None
                assert flat.grad is not None
                flat.copy_(param)
                flat.grad.copy_(param.grad)

    def entrants(self, name: str, rivals: Rivals) -> list[Entrant]:
        """The two of flatstep, the paths of torch, and those optimizers that follow the rule."""
        ours = functools.partial(optimizer_named(name), **OPTIONS.get(name, {}))
        return [
            Entrant("flatstep flat", lambda: self.flat, ours),
            Entrant("flatstep", lambda: self.separate, ours),
            *(
                Entrant(path, lambda: self.separate, functools.partial(build_torch, path, name))
                for path in torch_paths(name, slow=rivals.slow_paths)
            ),
            *(
                Entrant(
                    subject.label,
                    self.apart,
                    functools.partial(build_named, subject, name),
                    subject,
                )
                for subject in rivals.following(name)
            ),
        ]

    def apart(self) -> list[Parameter]:
        """A copy for an optimizer that nobody knows: what it breaks, nobody else has."""
        params = [Parameter(param.detach().clone()) for param in self.separate]
        for param, other in zip(params, self.separate, strict=True):
            assert other.grad is not None
            param.grad = other.grad.clone()
        return params


def parameter(shape: Shape, dtype: torch.dtype, where: torch.device) -> Parameter:
    """A parameter with a gradient, of values for which every path of torch's is accurate."""
    param = Parameter(torch.empty(shape, dtype=dtype, device=where).uniform_(-0.1, 0.1))
    # Away from zero, whose square float16 cannot hold; zeros among them.
    grad = torch.empty(shape, dtype=dtype, device=where).uniform_(-1, 1)
    param.grad = grad.add_(torch.full_like(grad, 0.5).copysign_(grad))
    return param


@functools.cache
def states_kept(name: str) -> int:
    """The number of states that an optimizer keeps for each parameter."""
    probe = Parameter(torch.zeros(1))
    probe.grad = torch.zeros(1)
    optimizer = optimizer_named(name)([probe], **OPTIONS.get(name, {}))
    optimizer.step()
    return sum(key != "step" for key in optimizer.state[probe])
