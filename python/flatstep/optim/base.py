"""The way of a step: what every optimizer here shares."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, ParamSpec, TypeVar, overload

import torch
from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]
from torch.optim.optimizer import (
    ParamsT,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

from flatstep import _core, flat
from flatstep._torch import connect_dtensor, increment_version
from flatstep.optim import gpu, states, torch_ops
from flatstep.optim.routes import (
    Found,
    Route,
    is_on_gpu,
    local_of,
    overlapping,
    route_of,
    update_alone,
)

RULES: dict[str, Any] = {rule["name"]: rule for rule in _core.rules()}


def flag_bits(rule: str) -> dict[str, int]:
    """The bit of each of a rule's flags."""
    return {name: 1 << bit for bit, name in enumerate(RULES[rule]["flags"])}


def validate_implementation(options: dict[str, Any]) -> None:
    """Raises torch's errors for implementations that exclude each other."""
    if options["fused"] and options["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`")
    if options["fused"] and options["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


_P = ParamSpec("_P")
_R = TypeVar("_R")


def with_hooks(step: Callable[_P, _R]) -> Callable[_P, _R]:
    """What torch wraps around a step: hooks and the profiler's range, paid for where wanted.

    torch's own wrapper takes 10 µs at every step, as long as the update of a small model.
    """
    watched = torch.optim.Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        self: Any = args[0]
        if type(self).step is not wrapper:  # torch has wrapped the subclass's, which calls this one
            return step(*args, **kwargs)
        if (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or _profiler_enabled()
        ):
            return watched(*args, **kwargs)
        out = step(*args, **kwargs)
        self._optimizer_step_code()
        return out

    wrapper.hooked = True  # type: ignore[attr-defined]
    return wrapper


class Variant(NamedTuple):
    """What a group asks for: the rule's flags, and its hyper-parameters in the rule's order."""

    flags: int
    hyper: list[Any]


@dataclass
class Other:
    """A parameter that the plan's one call does not update."""

    found: Found
    route: Route
    states: tuple[str, ...]
    first_step: bool


class Optimizer(torch.optim.Optimizer):
    """An optimizer of :mod:`torch.optim` whose update is one pass over memory.

    A subclass names its rule, validates a group's options and turns them into a variant. The rest
    is here: finding each parameter's way (:mod:`flatstep.optim.routes`), keeping the table of the
    kernel's memory (``_core.Plan``), creating states, and making one call a step.
    """

    rule: ClassVar[str]
    sparse_message: ClassVar[str | None]  # of the error; None where sparse gradients are fine
    later_options: ClassVar[dict[str, Any]]  # what a checkpoint of an older torch may lack
    counts_steps: ClassVar[bool] = True  # whether torch's state has a "step"

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self.validate(defaults)
        self._turn = threading.Lock()
        self._plan: _core.Plan | None = None
        self._gather = False
        self._housed: flat.Housed | None = None
        super().__init__(params, defaults)
        if defaults.get("fused"):
            self._step_supports_amp_scaling = True

    @staticmethod
    def validate(options: dict[str, Any]) -> None:
        """Raises torch's errors for options that are out of range."""
        raise NotImplementedError

    def variant(self, group: dict[str, Any]) -> Variant:
        """The variant of the rule that a group's options ask for."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as :meth:`torch.optim.Optimizer.add_param_group`."""
        if isinstance(param_group, dict):
            self.validate({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes over pickled or loaded state; options that older torch lacks get their defaults."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.later_options.items():
                group.setdefault(name, value)
        if any(group.get("fused") for group in self.param_groups):
            self._step_supports_amp_scaling = True
        self._turn = threading.Lock()
        self._plan = None
        self._housed = None
        # Loaded states lie apart; the next step gathers them into flat buffers.
        self._gather = True

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @with_hooks
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Updates every parameter that has a gradient.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            ValueError, RuntimeError: Where a parameter cannot be updated; its name is in the
                message, and nothing has changed.
        """
        self._check_graph_capture()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf = getattr(self, "found_inf", None)
        # What is on a GPU is read there, if it can be. SGD has no step on a GPU that would tell its
        # first from one after an overflow.
        left_to_gpu = found_inf is not None and self.counts_steps and is_on_gpu(found_inf)
        if found_inf is None or left_to_gpu or not float(found_inf):
            if not self._turn.acquire(blocking=False):
                raise RuntimeError("step() of this optimizer is running in another thread")
            try:
                self._update()
            finally:
                self._turn.release()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears gradients, as :meth:`torch.optim.Optimizer.zero_grad`.

        Gradients in a :class:`flatstep.FlatBuffer` are set to zero in place, all at once.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        if self._housed is None or not self._housed.is_of(params):
            self._housed = flat.Housed(params)
        if not self._housed:
            super().zero_grad(set_to_none)
            return
        self._housed.zero_grad()
        for param in self._housed.outside:
            if set_to_none:
                param.grad = None
            elif param.grad is not None:
                param.grad = param.grad.detach().zero_()

    def _check_graph_capture(self) -> None:
        if "capturable" in self.defaults and torch.cuda.is_available():
            name = "_accelerator_graph_capture_health_check"  # of torch 2.9 and newer
            check = getattr(self, name, None) or self._cuda_graph_capture_health_check
            check()

    def _update(self) -> None:
        groups = self.param_groups
        variants = [self.variant(group) for group in groups]
        flags = [variant.flags for variant in variants]
        plan = self._plan
        if plan is None or not plan.matches(groups, self.state, flags) or self._others_moved():
            plan = self._build(flags)
            if not plan.matches(groups, self.state, flags):
                raise RuntimeError("the parameters changed while step() was looking at them")
        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        deferred = self._only_gpus and (self.counts_steps or found_inf is None)
        if self._gpus and not deferred and found_inf is not None and float(found_inf):
            return
        unscale = 1.0 if grad_scale is None or deferred else 1.0 / float(grad_scale)
        scales = [-unscale if group["maximize"] else unscale for group in groups]
        hyper = [
            [0.0] * len(values)
            if group["differentiable"]
            else gpu.numbers(values, deferred=deferred)
            for group, (_, values) in zip(groups, variants, strict=True)
        ]
        inputs: Any = {}
        if self._gpus:
            reader = gpu.Reader(self._gpus)  # holds what the addresses belong to
            inputs = reader.inputs(
                [values for _, values in variants], grad_scale, found_inf, deferred=deferred
            )
        updated = plan.updated()
        # Before, not after: now torch's objects are in the caches.
        increment_version(updated + self._written)
        plan.step(hyper, scales, torch.get_num_threads(), inputs)
        known = not deferred or found_inf is None  # whether there was an update
        for buffer, count in self._cleared.items():
            buffer.mark_cleared(count if known and len(updated) == self._rows else 0)
        for other in self._others:
            if other.found.param.grad is not None:
                self._update_other(other, variants[other.found.group], scales[other.found.group])
        for other in self._others:
            grad = other.found.param.grad
            if grad is not None and flat.clearing_buffer(other.found.param):
                grad.zero_()

    def _label(self, group: int, place: int) -> str:
        names = self.param_groups[group].get("param_names")
        if names:
            return f"parameter '{names[place]}'"
        return f"parameter {place} of group {group}"

    def _find(self) -> list[Found]:
        return [
            Found(param, self._label(index, place), index)
            for index, group in enumerate(self.param_groups)
            for place, param in enumerate(group["params"])
        ]

    def _route(self, found: Found) -> Route:
        route = route_of(found, differentiable=self.param_groups[found.group]["differentiable"])
        if route is Route.SPARSE and self.sparse_message is not None:
            raise RuntimeError(self.sparse_message)
        return route

    def _step_device(self, found: Found) -> torch.device:
        """Where torch keeps the parameter's step: on its GPU where nobody may wait for it."""
        group = self.param_groups[found.group]
        device = found.param.device
        on_gpu = device.type == "cuda" and (group.get("capturable") or group.get("fused"))
        return device if on_gpu else torch.device("cpu")

    def _others_moved(self) -> bool:
        return any(
            self._route(other.found) not in (other.route, Route.KERNEL)
            or (
                other.route is Route.ALONE
                and states.are_foreign(
                    self.state.get(other.found.param, {}), other.found, other.states
                )
            )
            for other in self._others
            if other.found.param.grad is not None
        )

    def _build(self, flags: list[int]) -> _core.Plan:
        """Finds every parameter's way and fills the plan. Raises before anything has changed."""
        self._plan = None
        connect_dtensor()
        everything = self._find()
        if any(found.param.device.type == "cuda" for found in everything):
            gpu.warn_if_absent()
        routes = {found: self._route(found) for found in everything if found.param.grad is not None}
        plain = [found for found, route in routes.items() if route in (Route.KERNEL, Route.ALONE)]
        for place in overlapping([local_of(found.param) for found in plain]):
            routes[plain[place]] = Route.ALONE  # one after the other, as torch would
        variants = dict(RULES[self.rule]["variants"])
        wanted: dict[Found, tuple[str, ...]] = {
            found: variants[flags[found.group]]
            for found, route in routes.items()
            if route is not Route.SPARSE
        }
        for found, names in wanted.items():
            states.check(self.state.get(found.param, {}), found, names)
            if routes[found] is not Route.TORCH and states.are_foreign(
                self.state.get(found.param, {}), found, names
            ):
                routes[found] = Route.TORCH
        with torch.no_grad():
            firsts = states.complete(
                {
                    found: self.state[found.param]
                    for found, names in wanted.items()
                    if names or self.counts_steps
                },
                wanted,
                routes,
                step_device=self._step_device if self.counts_steps else None,
                gather=self._gather,
            )
        plan = _core.Plan(self.rule)
        plan.begin(flags)
        self._others: list[Other] = []
        self._rows = 0
        self._cleared: dict[flat.FlatBuffer, int] = {}  # of each buffer, how many gradients
        written: dict[int, torch.Tensor] = {}  # one of each storage stands for all its views
        for found in everything:
            route, names = routes.get(found), wanted.get(found, ())
            if route is not Route.KERNEL:
                plan.add_other(found.group, found.param, route is None)
                if route is not None:
                    self._others.append(Other(found, route, names, found in firsts))
                continue
            state = self.state[found.param] if names or self.counts_steps else {}
            step = state["step"] if self.counts_steps else None
            buffer = flat.clearing_buffer(found.param)
            if buffer:
                self._cleared[buffer] = self._cleared.get(buffer, 0) + 1
            tensors = [state[name] for name in names]
            grad = found.param.grad if buffer else None
            self._rows += 1
            plan.add(found.group, found.param, tensors, step, found in firsts, grad)
            for tensor in [*tensors, *([step] if self.counts_steps else [])]:
                written[local_of(tensor).untyped_storage().data_ptr()] = local_of(tensor)
        plan.end(self.state)
        devices = plan.devices()
        self._gpus = [device for device in devices if device >= 0]
        self._only_gpus = bool(devices) and self._gpus == devices and not self._others
        self._written = list(written.values())
        self._plan = plan
        self._gather = False
        return plan

    def _update_other(self, other: Other, variant: Variant, scale: float) -> None:
        found, param = other.found, other.found.param
        grad = param.grad
        assert grad is not None
        differentiable = self.param_groups[found.group]["differentiable"]
        with torch.set_grad_enabled(differentiable):
            hyper = variant.hyper if differentiable else [float(x) for x in variant.hyper]
            names = dict(zip(RULES[self.rule]["hyper"], hyper, strict=True))
            flags = {name: bool(variant.flags & bit) for name, bit in flag_bits(self.rule).items()}
            state = self.state[param] if other.states or self.counts_steps else {}
            tensors = {name: state[name] for name in other.states}
            step = int(state["step"]) + 1 if self.counts_steps else 2 - other.first_step
            if other.route is Route.SPARSE:
                torch_ops.update_sparse(names, flags, param, grad, self.state, scale)
            elif other.route is Route.ALONE:
                update_alone(
                    self.rule,
                    variant.flags,
                    hyper,
                    local_of(param),
                    local_of(grad),
                    [local_of(tensor) for tensor in tensors.values()],
                    step,
                    scale,
                )
                increment_version([param, *tensors.values()])
            else:
                torch_ops.update(self.rule, flags, names, param, grad, tensors, step, scale)
        if self.counts_steps:
            with torch.no_grad():
                state["step"].add_(1)
        other.first_step = False
