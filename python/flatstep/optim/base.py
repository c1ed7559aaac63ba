"""What every optimizer here shares: torch's interface, around a step of our own."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any, ClassVar, overload

import torch
from torch.compiler import is_dynamo_compiling
from torch.optim.optimizer import ParamsT
from typing_extensions import Self

from flatstep import flat
from flatstep.optim import checkpoints, clipping, compiled, ending, extras, release
from flatstep.optim.extras import Extras
from flatstep.optim.hooks import with_hooks
from flatstep.optim.release import Release
from flatstep.optim.routes import is_on_gpu
from flatstep.optim.table import Table
from flatstep.optim.updating import Updating
from flatstep.optim.weights import Weights


def validate_implementation(options: dict[str, Any]) -> None:
    """Raises torch's errors for implementations that exclude each other."""
    if options["fused"] and options["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`")
    if options["fused"] and options["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


class Optimizer(Weights, Updating, torch.optim.Optimizer):
    """An optimizer of :mod:`torch.optim` whose update is one pass over memory.

    A subclass names its rule, validates a group's options and turns them into a variant. The rest
    is here, or in what it is made of: finding each parameter's way and creating states
    (``optim.finding``), one call a step (``optim.updating``), the weights behind the parameters.
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
        self._turn = ending.Turn()
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
        self._turn = ending.Turn()
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
            lock = self._turn.lock
            if lock.acquire(blocking=False):
                try:
                    self._update()
                finally:
                    lock.release()
            elif ending.may_go_on(self._turn):
                self._update()
            else:
                raise RuntimeError("step() of this optimizer is running in another thread")
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
