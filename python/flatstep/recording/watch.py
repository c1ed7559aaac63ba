"""What happens while a step is recorded: clocks are read, and numbers put aside for later."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from operator import is_
from time import perf_counter
from typing import Any, NamedTuple, cast

import torch
from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]
from torch.autograd.profiler import record_function

from flatstep import _core
from flatstep.optim.base import Optimizer
from flatstep.optim.gpu import Inputs, is_being_captured
from flatstep.optim.table import Table
from flatstep.recording.traffic import Traffic, count

NORM, UPDATE = "flatstep::norm", "flatstep::update"
INPUTS = 3  # the place of what GPUs read among an update's arguments
AT_ONCE = 1024  # steps are put away
NONE = -1.0  # in place of a time, a norm or a number that there is not


class Record(NamedTuple):
    """The numbers of one step: moments in seconds of ``perf_counter``.

    Attributes:
        begin: Of the step, after a closure.
        end: Of the step.
        norm_begin: Of the norm's call, or :data:`NONE`.
        norm_end: Of the norm's call.
        update_begin: Of the update's call; :data:`NONE` where the step was skipped.
        update_end: Of the update's call.
        grad_norm: The gradients' norm, or :data:`NONE`.
        traffic: The place in :attr:`Watch.traffics`, or :data:`NONE`.
    """

    begin: float
    end: float
    norm_begin: float
    norm_end: float
    update_begin: float
    update_end: float
    grad_norm: float
    traffic: float


Events = list[tuple[torch.cuda.Event, torch.cuda.Event]]  # before and after, on each GPU


@dataclass
class OnGpu:
    """What is known of a step only once the GPU has made it.

    Attributes:
        norm: Around the norm's kernels.
        update: Around the update's.
        found_inf: Whether the update was left out, as GradScaler says.
        grad_norm: The gradients' norm, where the host does not know it.
        skips: Whether the update was left out where this is not finite.
    """

    norm: Events = field(default_factory=list)
    update: Events = field(default_factory=list)
    found_inf: torch.Tensor | None = None
    grad_norm: torch.Tensor | None = None
    skips: bool = False

    def was_skipped(self) -> bool:
        """Whether the update was left out; waits for the GPU."""
        if self.found_inf is not None and bool(self.found_inf):
            return True
        return self.skips and self.grad_norm is not None and not self.grad_norm.isfinite()


def seconds_between(events: Events) -> float:
    """The GPUs' seconds, added up; waits for them."""
    for _, after in events:
        after.synchronize()
    milliseconds: float = sum(before.elapsed_time(after) for before, after in events)
    return milliseconds / 1e3


class Watch(ABC):
    """One optimizer under observation."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.traffics: list[Traffic] = []
        self.on_gpu: dict[int, OnGpu] = {}  # by the place of the record
        self._latest: list[tuple[float, ...]] = []
        self._numbers = array("d")  # of those before: a fifth of the memory
        self._begin = NONE

    @abstractmethod
    def attach(self) -> None:
        """From now on steps are recorded."""

    @abstractmethod
    def detach(self) -> None:
        """From now on the optimizer is as it was before."""

    def __len__(self) -> int:
        """How many steps there are."""
        return len(self._numbers) // len(Record._fields) + len(self._latest)

    def records(self, first: int = 0) -> Iterator[Record]:
        """The steps, from a place on."""
        self._put_away()
        width = len(Record._fields)
        for place in range(first * width, len(self._numbers), width):
            yield Record(*self._numbers[place : place + width])

    def _put_away(self) -> None:
        self._numbers.extend(chain.from_iterable(self._latest))
        self._latest.clear()

    def _timed(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """A step's arguments, with a closure that says when it is done."""
        closure = kwargs.get("closure") if len(args) < 2 else args[1]
        if closure is None:
            return args, kwargs

        def timed() -> Any:
            loss = closure()
            self._begin = perf_counter()
            return loss

        return args[:1], {**kwargs, "closure": timed}


class StepWatch(Watch):
    """An optimizer of flatstep: it hands its steps over, and its plan is a :class:`TimedPlan`."""

    optimizer: Optimizer

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        self.norm_begin = self.norm_end = NONE
        self.update_begin = self.update_end = NONE
        self.updated: list[torch.Tensor] = []
        self.may_be_seen = False
        self._on_gpu: OnGpu | None = None
        self._norm = optimizer._clipped.norm
        # What the last traffic was counted for.
        self._table: Table | None = None
        self._counted: list[torch.Tensor] = []
        self._whole = -1  # how many they were, where they were all that the table has
        self._place = -1

    def attach(self) -> None:
        """As :meth:`Watch.attach`."""
        opt = self.optimizer
        opt._watch = self
        opt._make_plan = lambda rule: self._watched(_core.Plan(rule))
        if opt._table is not None:
            opt._table.plan = self._watched(opt._table.plan)

    def detach(self) -> None:
        """As :meth:`Watch.detach`."""
        opt = self.optimizer
        del opt._watch, opt._make_plan
        if opt._table is not None:
            opt._table.plan = cast(TimedPlan, opt._table.plan).plan
        self._table = None

    def _watched(self, plan: _core.Plan) -> _core.Plan:
        return cast(_core.Plan, TimedPlan(plan, self))

    def step(self, step: Callable[..., Any], args: Any, kwargs: Any, may_be_seen: bool) -> Any:
        """Makes a step and records it; one that raises is not recorded.

        Args:
            step: The way of the step.
            args: Its arguments.
            kwargs: Its arguments by name.
            may_be_seen: Whether a profiler of torch's may be running.
        """
        if kwargs or len(args) > 1:
            args, kwargs = self._timed(args, kwargs)
        self.may_be_seen = may_be_seen
        self.norm_begin = self.update_begin = NONE
        self._on_gpu = None
        self._begin = perf_counter()
        loss = step(*args, **kwargs)
        end = perf_counter()
        table, norm = self.optimizer._table, self.optimizer._clipped.norm
        if (
            table is not self._table
            or self.update_begin == NONE
            or len(self.updated) != self._whole
        ):
            self._count(table)
        latest = self._latest
        latest.append(
            (
                self._begin,
                end,
                self.norm_begin,
                self.norm_end,
                self.update_begin,
                self.update_end,
                # Each norm that the host knows is an object of its own.
                norm if norm is not self._norm and type(norm) is float else NONE,
                self._place,
            )
        )
        self._norm = norm
        if self._on_gpu is not None:
            self.on_gpu[len(self) - 1] = self._on_gpu
        if len(latest) == AT_ONCE:
            self._put_away()
        return loss

    def note_on_gpu(self, name: str, events: Events, inputs: Mapping[int, Inputs]) -> None:
        """Keeps the events of a call of this step, and what else only the GPU knows.

        Args:
            name: :data:`NORM` or :data:`UPDATE`.
            events: Around the call.
            inputs: What an update reads on each GPU.
        """
        now = self._on_gpu = self._on_gpu or OnGpu()
        if name == NORM:
            now.norm += events
            return
        now.update += events
        now.found_inf = getattr(self.optimizer, "found_inf", None)
        there = self.optimizer._clipped.there
        if there is not None and there.gpu in inputs:
            *_, norm, now.skips = inputs[there.gpu]
            if norm:
                now.grad_norm = there.found[1].clone()  # the next step writes over it

    def _count(self, table: Table | None) -> None:
        """Finds the traffic of a step, where it may be another than the last one's."""
        updated = self.updated
        if table is None or self.update_begin == NONE:  # skipped: nothing but, maybe, a norm
            return
        same = len(updated) == len(self._counted) and all(map(is_, updated, self._counted))
        if table is not self._table or not same:
            traffic = count(self.optimizer, table, updated)
            if traffic not in self.traffics:
                self.traffics.append(traffic)
            self._place = self.traffics.index(traffic)
            self._table, self._counted = table, updated
            self._whole = table.rows if len(updated) == table.rows else -1


class HookedWatch(Watch):
    """An optimizer of someone else's, of which torch's hooks tell the wall time."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer)
        self._hooks: list[Any] = []

    def attach(self) -> None:
        """As :meth:`Watch.attach`."""
        self._hooks = [
            self.optimizer.register_step_pre_hook(self._before),
            self.optimizer.register_step_post_hook(self._after),
        ]

    def detach(self) -> None:
        """As :meth:`Watch.detach`."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, _: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any]:
        args, kwargs = self._timed(args, kwargs)
        self._begin = perf_counter()
        return args, kwargs

    def _after(self, *_: Any) -> None:
        nothing = [NONE] * (len(Record._fields) - 2)
        self._latest.append((self._begin, perf_counter(), *nothing))
        if len(self._latest) == AT_ONCE:
            self._put_away()


class TimedPlan:
    """A ``_core.Plan`` whose calls that move memory are timed, and are ranges for a profiler."""

    def __init__(self, plan: _core.Plan, watch: StepWatch) -> None:
        self.plan = plan
        self.matches, self.release = plan.matches, plan.release
        self._norm, self._step, self._updated = plan.norm, plan.step, plan.updated
        self._watch = watch
        self._gpus = self._find_gpus()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.plan, name)

    def end(self, state: Any) -> None:
        """Ends the filling of ``_core.Plan``."""
        self.plan.end(state)
        self._gpus = self._find_gpus()

    def updated(self) -> list[torch.Tensor]:
        """Those of ``_core.Plan``, which the watch counts afterwards."""
        self._watch.updated = updated = self._updated()
        return updated

    def norm(self, largest: bool, others: Any, threads: int) -> float:
        """The norm of ``_core.Plan``."""
        watch, call = self._watch, self._norm
        if watch.may_be_seen or self._gpus:
            call = partial(self._visibly, NORM, call)
        watch.norm_begin = perf_counter()
        norm = call(largest, others, threads)
        watch.norm_end = perf_counter()
        return norm

    def step(self, hyper: Any, scales: Any, threads: int, inputs: Any, numbers: Any) -> None:
        """The update of ``_core.Plan``."""
        watch, call = self._watch, self._step
        if watch.may_be_seen or self._gpus:
            call = partial(self._visibly, UPDATE, call)
        watch.update_begin = perf_counter()
        call(hyper, scales, threads, inputs, numbers)
        watch.update_end = perf_counter()

    def norm_on_gpu(self, *args: Any) -> None:
        """The norm of ``_core.Plan`` on a GPU."""
        watch = self._watch
        watch.norm_begin = perf_counter()
        self._visibly(NORM, self.plan.norm_on_gpu, *args)
        watch.norm_end = perf_counter()

    def write_norms(self, *args: Any) -> list[int]:
        """The norms of ``_core.Plan`` of shards; what the ranks then send is not among its time."""
        watch = self._watch
        watch.norm_begin = perf_counter()
        found: list[int] = self._visibly(NORM, self.plan.write_norms, *args)
        watch.norm_end = perf_counter()
        return found

    def _find_gpus(self) -> list[int]:
        return [device for device in self.plan.devices() if device >= 0]

    def _visibly(self, name: str, call: Callable[..., Any], *args: Any) -> Any:
        """A call inside a range of torch.profiler and, on GPUs, of NVTX and between two events."""
        if not self._gpus:
            with record_function(name) if _profiler_enabled() else nullcontext():
                return call(*args)
        # Events in a graph have no time, and its replays are no steps.
        captured = is_being_captured()
        streams = [] if captured else [torch.cuda.current_stream(gpu) for gpu in self._gpus]
        with record_function(name), torch.cuda.nvtx.range(name):
            before = [stream.record_event(_event()) for stream in streams]
            found = call(*args)
            after = [stream.record_event(_event()) for stream in streams]
        if not captured:
            inputs = args[INPUTS] if name == UPDATE else {}
            self._watch.note_on_gpu(name, list(zip(before, after, strict=True)), inputs)
        return found


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
