"""What torch wraps around a step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]
from torch.compiler import is_dynamo_compiling
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from flatstep.optim.compiled import in_graph

_P = ParamSpec("_P")
_R = TypeVar("_R")


def with_hooks(step: Callable[_P, _R]) -> Callable[_P, _R]:
    """What torch wraps around a step: hooks and the profiler's range, paid for where wanted.

    torch's own wrapper takes 10 µs at every step, as long as the update of a small model.
    """
    watched = torch.optim.Optimizer.profile_hook_step(step)
    traced: Callable[_P, _R] = in_graph(step)
    watched_and_traced = torch.optim.Optimizer.profile_hook_step(traced)

    @functools.wraps(step)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        self: Any = args[0]
        is_outermost = type(self).step is wrapper  # torch wraps a subclass's, which calls this one
        has_hooks = is_outermost and (
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
        )
        if is_dynamo_compiling():
            return (watched_and_traced if has_hooks else traced)(*args, **kwargs)
        run = step
        if has_hooks or (is_outermost and _profiler_enabled()):
            run = watched
        out: _R
        if self._watch is None:
            out = run(*args, **kwargs)
        else:
            out = self._watch.step(run, args, kwargs, run is watched or not is_outermost)
        if is_outermost and run is step:
            self._optimizer_step_code()
        return out

    wrapper.hooked = True  # type: ignore[attr-defined]
    return wrapper
