"""The way of a step: what every optimizer here shares."""

from __future__ import annotations

import copy
import math
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, overload

import torch
from torch.compiler import is_dynamo_compiling
from torch.optim.optimizer import ParamsT
from typing_extensions import Self

from flatstep import _core, flat, reference
from flatstep._torch import connect_dtensor, increment_version
from flatstep.optim import (
    checkpoints,
    clipping,
    compiled,
    extras,
    gpu,
    release,
    sharding,
    torch_ops,
)
from flatstep.optim.extras import Extras
from flatstep.optim.finding import Finding
from flatstep.optim.hooks import with_hooks
from flatstep.optim.release import Release
from flatstep.optim.routes import (
    Route,
    grad_of,
    is_on_gpu,
    local_of,
    update_alone,
)
from flatstep.optim.table import Other, Table
from flatstep.optim.weights import Weights

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


class Variant(NamedTuple):
    """What a group asks for: the rule's flags, and its hyper-parameters in the rule's order."""

    flags: int
    hyper: list[Any]


class Optimizer(Weights, Finding, torch.optim.Optimizer):
    """An optimizer of :mod:`torch.optim` whose update is one pass over memory.

    A subclass names its rule, validates a group's options and turns them into a variant. The rest
    is here: finding each parameter's way (``flatstep.optim.routes``), keeping the table of the
    kernel's memory (``_core.Plan``), creating states, and making one call a step.
    """

    _watch: Any = None  # what records the steps
    _releases = 0  # how many handles of step_in_backward() are in force
    later_options: ClassVar[dict[str, Any]]  # what a checkpoint of an older torch may lack

    def __init__(self, params: ParamsT, defaults: dict[str, Any], options: Extras) -> None:
        unknown = [name for name in options if name not in extras.DEFAULTS]
        if unknown:
            raise TypeError(
                f"{type(self).__name__}() got an unexpected keyword argument '{unknown[0]}'"
            )
        defaults = {**defaults, **options}
        self._validate(defaults)
        self._turn = threading.Lock()
        self._table: Table | None = None
        self._gather = False
        self._housed: flat.Housed | None = None
        self._clipped = clipping.Outcome()
        self._fresh: dict[torch.Tensor, torch.Tensor] = {}
        self._loading: dict[str, Any] | None = None
        super().__init__(params, defaults)
        if defaults.get("fused"):
            self._step_supports_amp_scaling = True

    @staticmethod
    def validate(options: dict[str, Any]) -> None:
        """Raises torch's errors for options that are out of range."""
        raise NotImplementedError

    def _validate(self, options: dict[str, Any]) -> None:
        self.validate(options)
        extras.validate(options)

    def variant(self, group: dict[str, Any]) -> Variant:
        """The variant of the rule that a group's options ask for."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, as :meth:`torch.optim.Optimizer.add_param_group`."""
        if isinstance(param_group, dict):
            self._validate({**self.defaults, **param_group})
        super().add_param_group(param_group)
        try:
            index = len(self.param_groups) - 1
            for place, param in enumerate(self.param_groups[index]["params"]):
                extras.validate_param(self.param_groups[index], param, self._label(index, place))
        except ValueError:
            self.param_groups.pop()
            raise

    @property
    def grad_norm(self) -> torch.Tensor | None:
        """The norm of all gradients at the last step that computed one, before clipping, 0-dim."""
        return self._clipped.as_tensor()

    @property
    def skipped_steps(self) -> int:
        """How many steps ``skip_nonfinite`` has left out."""
        return self._clipped.count_skipped()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Takes over pickled or loaded state; options that older torch lacks get their defaults."""
        super().__setstate__(state)
        options = {name: self.defaults[name] for name in extras.DEFAULTS if name in self.defaults}
        for group in self.param_groups:
            for name, value in {**self.later_options, **options}.items():
                group.setdefault(name, value)
        loading = self.__dict__.get("_loading")
        if loading is not None:
            self._keep_dtypes(loading)
        if any(group.get("fused") for group in self.param_groups):
            self._step_supports_amp_scaling = True
        self._turn = threading.Lock()
        self._table = None
        self._housed = None
        self._fresh = {}
        self._loading = None
        self._clipped = self.__dict__.get("_clipped") or clipping.Outcome()
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
        else:
            self._clipped.ahead = None
        return loss

    def step_in_backward(self) -> Release:
        """Updates each parameter in ``backward()``, as soon as its gradient is complete.

        The gradient is freed there, so that the gradients of a model are never all in memory.
        ``step()`` then finds nothing to do, and may stay where it is. Every ``backward()`` steps:
        gradients cannot be accumulated over several.

        Returns:
            A handle whose ``remove()`` ends it; also a context manager.

        Raises:
            ValueError: An option needs all gradients at a time (``max_grad_norm``, GradScaler with
                ``fused=True``), they are in a :class:`flatstep.FlatBuffer`, or
                :func:`flatstep.profile` is recording.
        """
        release.refuse(self)
        return Release(self)

    def for_one(self, group: int, place: int, before: int) -> Self:
        """An optimizer like this one, of one of its parameters, with so many elements before it."""
        alone = copy.copy(self)
        param = self.param_groups[group]["params"][place]
        alone._elements_before = before
        alone.state = defaultdict(dict)
        alone.param_groups = [{**self.param_groups[group], "params": [param]}]
        return alone

    def step_alone(self) -> None:
        """An update without closure, hooks or scaling."""
        self._update()

    def is_on_gpu(self) -> bool:
        """Whether any parameter is on a GPU."""
        return any(found.param.device.type == "cuda" for found in self._find())

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`torch.optim.Optimizer.state_dict`, in types that collectives can carry.

        A ``state_dtype`` is there by its name, and ``master_low`` as bfloat16 of the same bits.
        """
        return checkpoints.pack(super().state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`torch.optim.Optimizer.load_state_dict`, but states keep their dtype.

        torch's casts them all to the parameter's. Where the options, which are loaded too, ask for
        another (``state_dtype``, masters, averages), they have that one.
        """

        def note(_: torch.optim.Optimizer, found: dict[str, Any]) -> dict[str, Any]:
            self._loading = checkpoints.unpack(found)
            return self._loading

        # After the hooks of others, which may change what is loaded.
        hook = self.register_load_state_dict_pre_hook(note)
        try:
            super().load_state_dict(state_dict)
        finally:
            hook.remove()
            self._loading = None

    def _keep_dtypes(self, saved: dict[str, Any]) -> None:
        """Takes from a state_dict again what torch has cast to the parameter's dtype."""
        ids = [index for group in saved["param_groups"] for index in group["params"]]
        params = [(group, param) for group in self.param_groups for param in group["params"]]
        for index, (group, param) in zip(ids, params, strict=True):
            for name, value in saved["state"].get(index, {}).items():
                if not isinstance(value, torch.Tensor) or name == "step":
                    continue
                dtype = extras.dtype_of(name, group, param)
                if dtype not in (None, param.dtype):
                    self.state[param][name] = value.to(param.device, dtype)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears gradients, as :meth:`torch.optim.Optimizer.zero_grad`.

        Gradients in a :class:`flatstep.FlatBuffer` are set to zero in place, all at once.
        """
        if is_dynamo_compiling():
            compiled.zero_grad(self, set_to_none)
            return
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
        grad_scale = getattr(self, "grad_scale", None)
        found_inf = getattr(self, "found_inf", None)
        flags = [variant.flags for variant in variants]
        clipped = None
        asks = any(map(extras.are_in, groups))  # for more than torch's update
        if asks:
            unscales = grad_scale is not None
            bits = [extras.bits(group, unscales=unscales) for group in groups]
            flags = [rule | beside for rule, beside in zip(flags, bits, strict=True)]
            clipped = clipping.asked(groups)
        table, is_new = self._table, False
        if (
            table is None
            or not table.plan.matches(groups, self.state, flags)
            or self._others_moved(table)
        ):
            if clipped is not None and clipped.clips:
                self._clipped.warn_of_trainer(self)
            table, is_new = self._build(flags), True
            if not table.plan.matches(groups, self.state, flags):
                raise RuntimeError("the parameters changed while step() was looking at them")
        plan, gpus = table.plan, table.gpus
        deferred = (
            table.only_gpus
            and (self.counts_steps or found_inf is None)
            and (clipped is None or self._leaves_norm_there(table, clipped))
        )
        if gpus and not deferred:
            if found_inf is not None and float(found_inf):
                return
            if clipped is not None and gpu.is_being_captured():
                raise RuntimeError(
                    "a graph is being captured, but the host would have to wait for the norm of "
                    "the gradients: leave out error_if_nonfinite, have all parameters on one GPU, "
                    "and with skip_nonfinite let capturable=True count the steps there"
                )
        unscale = 1.0 if grad_scale is None or deferred else 1.0 / float(grad_scale)
        scales = [-unscale if group["maximize"] else unscale for group in groups]
        if clipped is not None and not deferred:
            norm = self._clip(table, clipped, unscale, is_new=is_new)
            if norm is None:
                return
            scales = [
                scale * clipping.factor(group, norm)
                for scale, group in zip(scales, groups, strict=True)
            ]
        hyper = [
            [0.0] * len(values)
            if group["differentiable"]
            else gpu.numbers(values, deferred=deferred)
            for group, (_, values) in zip(groups, variants, strict=True)
        ]
        inputs: Any = {}
        if gpus:
            reader = gpu.Reader(gpus)  # holds what the addresses belong to
            on_gpu = self._clipped.on(gpus[0]) if clipped is not None and deferred else None
            inputs = reader.inputs(
                [values for _, values in variants],
                grad_scale,
                found_inf,
                deferred=deferred,
                norm=on_gpu,
                skips=clipped is not None and clipped.skips,
            )
            if on_gpu is not None and clipped is not None:
                of_gpu = inputs[on_gpu.gpu]
                self._clipped.leave_there(plan, clipped, of_gpu, on_gpu, table.is_double)
        updated = plan.updated()
        numbers: list[tuple[float, float, int, float]] = []
        if asks:
            numbers = [
                (*extras.numbers(group, unscale), clipping.most_of(group)) for group in groups
            ]
            table.follow_masters()
            if any(variant & extras.WRITES_GRAD for variant in flags):
                increment_version([param.grad for param in updated])
        # Before, not after: now torch's objects are in the caches.
        increment_version(updated + table.written)
        plan.step(hyper, scales, torch.get_num_threads(), inputs, numbers)
        # Whether there was an update.
        known = not deferred or (found_inf is None and not (clipped and clipped.skips))
        for buffer, count in table.cleared.items():
            buffer.mark_cleared(count if known and len(updated) == table.rows else 0)
        for other in table.others:
            if other.found.param.grad is not None:
                index = other.found.group
                variant = Variant(flags[index], variants[index].hyper)
                beside = extras.numbers(self.param_groups[index], unscale)
                self._update_other(other, variant, scales[index], beside)
        for other in table.others:
            grad = other.found.param.grad
            if grad is not None and flat.clearing_buffer(other.found.param):
                grad.zero_()
        if asks:
            table.note_masters()

    def _leaves_norm_there(self, table: Table, clipped: clipping.Asked) -> bool:
        """Whether nobody has to wait for the norm of gradients on a GPU."""
        counted_there = self.counts_steps and all(
            group.get("capturable") or group.get("fused") for group in self.param_groups
        )
        may_skip = not clipped.skips or counted_there
        return table.one_gpu is not None and not clipped.raises and may_skip

    def _clip(
        self, table: Table, clipped: clipping.Asked, unscale: float, *, is_new: bool
    ) -> float | None:
        """The gradients' norm, or None where the step is to be skipped for it."""
        goes_on = False
        total = self._clipped.take_ahead(clipped.largest)
        try:
            if total is None:
                total = table.total(clipped.largest, self._clipped)
            elif isinstance(total, gpu.Norm):
                total = total.total
            norm = reference.norm_of(total, clipped.norm_type, unscale)
            goes_on = self._clipped.judge(norm, clipped, table.is_double)
        finally:
            if not goes_on:
                self._undo(table, is_new=is_new)
        return norm if goes_on else None

    def check_gradients(self) -> torch.Tensor | None:
        """Whether a gradient is not finite, as 1 or 0, in one pass that only reads.

        Where gradients are clipped, the pass is the one that the next step needs, and is not made
        again. For :class:`flatstep.GradScaler`, directly before a step.

        Returns:
            A 0-dim float32 tensor, where the gradients are; None where torch is to find out, as on
            several GPUs.
        """
        clipped = clipping.asked(self.param_groups)
        largest = clipped is None or clipped.largest
        table, total = self._table, None
        self._clipped.ahead = None
        if table is not None and table.plan.matches(self.param_groups, self.state, table.flags):
            if table.one_gpu is not None:
                norm = self._clipped.on(table.one_gpu)
                overflow = torch.empty((), dtype=torch.float32, device=norm.found.device)
                norm.add_up(table.plan, largest=largest, overflow=overflow)
                table.plan.release()
                if clipped is not None:
                    self._clipped.ahead = (norm, largest)
                return overflow
            if not table.gpus:
                total = table.total(largest, self._clipped)
            table.plan.release()
        elif not self.is_on_gpu():
            connect_dtensor()
            total = sharding.total([found.param for found in self._find()], largest)
        if total is None:
            return None
        if clipped is not None:
            self._clipped.ahead = (total, largest)
        return torch.tensor(0.0 if math.isfinite(total) else 1.0)

    def _undo(self, table: Table, *, is_new: bool) -> None:
        """Takes back what was made for a step that then changes nothing."""
        table.plan.release()
        if is_new:
            for found in table.new:
                self.state.pop(found.param, None)
            self._table = None

    def _update_other(
        self, other: Other, variant: Variant, scale: float, beside: tuple[float, float, int]
    ) -> None:
        found, param = other.found, other.found.param
        grad, group = grad_of(param), self.param_groups[found.group]
        differentiable = group["differentiable"]
        rule_flags = variant.flags & extras.RULE_FLAGS
        with torch.set_grad_enabled(differentiable):
            hyper = variant.hyper if differentiable else [float(x) for x in variant.hyper]
            names = dict(zip(RULES[self.rule]["hyper"], hyper, strict=True))
            flags = {name: bool(rule_flags & bit) for name, bit in flag_bits(self.rule).items()}
            counts = self._counts(found)
            state = self.state[param] if other.states.names or counts else {}
            tensors = {name: state[name] for name in other.states.rule}
            count = int(state["step"]) + 1 if counts else 1
            step = count if self.counts_steps else 2 - other.first_step
            unscale, decay, seed = beside
            if other.route is Route.SPARSE:
                torch_ops.update_sparse(names, flags, param, grad, self.state, scale)
            elif other.route is Route.ALONE:
                kept = {
                    place: state[name]
                    for name, place in extras.PLACES.items()
                    if name in other.states.names
                }
                update_alone(
                    self.rule,
                    variant.flags & ~extras.WRITES_GRAD,
                    hyper,
                    local_of(param),
                    local_of(grad),
                    [local_of(tensor) for tensor in tensors.values()],
                    step,
                    scale,
                    beside={place: local_of(tensor) for place, tensor in kept.items()},
                    average_decay=decay,
                    seed=seed,
                    count_of_step=count,
                    first=found.first % 2**32,
                )
                increment_version([param, *tensors.values(), *kept.values()])
            else:
                torch_ops.update(self.rule, flags, names, param, grad, tensors, step, scale)
        with torch.no_grad():
            if variant.flags & extras.WRITES_GRAD:
                grad.mul_(unscale)
            if counts:
                state["step"].add_(1)
        other.first_step = False
