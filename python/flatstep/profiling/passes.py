"""The options of a step against the machine's limit and beside the torch calls they replace."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import torch
from torch import Tensor

from flatstep import _core, reference
from flatstep._torch import STORED
from flatstep.optim import extras
from flatstep.optim.base import Optimizer
from flatstep.optim.rules import RULES
from flatstep.optim.weights import join
from flatstep.profiling import memory
from flatstep.profiling.case import fill_in, limit_name
from flatstep.profiling.check import STEPS, Sample, close
from flatstep.profiling.limit import Mix, Moved, Pages, Streams
from flatstep.profiling.measure import FAILURES, Race, failure, on_the_host
from flatstep.profiling.results import Limit, Pass, Result
from flatstep.profiling.workloads import Workload, workload_named
from flatstep.profiling.works import (
    LOSS_SCALE,
    TENSORS,
    TORCH,
    WORKS,
    Arrays,
    Contender,
    Work,
    contenders,
    gradient,
    max_norm,
    named_contender,
    total_norm,
    work_named,
)
from flatstep.subjects import Subject

WORKLOAD_BY_DEFAULT = "resnet50"  # whose passes take a fifth of the time of GPT-2's
ALL = "all"
PROBE = 64  # elements
CHECKS = 0.5  # of a pass's time, roughly

Outcome = dict[str, Tensor]


@dataclass(frozen=True)
class PassTask:
    """A pass to measure."""

    workload: Workload
    work: Work

    @property
    def weight(self) -> float:
        """About the seconds that it takes, which is its share of the time."""
        gigabytes = _size(self.work).moved * self.workload.parameters / 1e9
        return 1.0 + 1.5 * gigabytes + len(self.workload.shapes) / 2500

    def result(self) -> Pass:
        """The pass, before it is measured."""
        return Pass(
            name=self.work.name,
            title=self.work.title,
            calls=self.work.calls,
            workload=self.workload.name,
            parameters=self.workload.parameters,
            bytes_moved=round(_size(self.work).moved * self.workload.parameters),
        )

    def refusal(self, named: int = 0) -> str | None:
        """Why it cannot be measured and what would help, or None where it can.

        Args:
            named: How many named optimizers are raced, too.
        """
        if self.work.grad_dtype != self.work.dtype and not hasattr(torch.Tensor, "grad_dtype"):
            return (
                f"torch {torch.__version__} has no Tensor.grad_dtype, which gives a parameter a "
                "gradient of another dtype: install a newer torch"
            )
        each = _size(self.work).needed + named * _size(self.work).named
        needed = each * self.workload.parameters
        available = memory.bytes_available()
        if available is None or needed <= available:
            return None
        most = available / each
        return (
            f"needs {needed / 1e9:.3g} GB of memory, and {available / 1e9:.3g} GB are available; "
            f"what fits: --workload of up to {most / 1e6:.3g} M parameters with --pass "
            f"{self.work.name}"
        )


def plan_passes(
    names: Sequence[str] | None = None, workloads: Sequence[str | Workload] | None = None
) -> list[PassTask]:
    """The passes to measure, workload by workload.

    Args:
        names: Names in :data:`~flatstep.profiling.works.WORKS`; None, or "all" in it, for all.
        workloads: Names in :data:`~flatstep.profiling.workloads.WORKLOADS`, or workloads; None for
            ResNet-50's.

    Raises:
        ValueError: An unknown name, with those that there are.
    """
    if names is None or ALL in names:
        names = list(WORKS)
    works = [work_named(name) for name in dict.fromkeys(names)]
    # Passes of the same dtypes are neighbours: they share their parameters and gradients.
    works.sort(key=lambda work: list(WORKS).index(work.name))
    chosen = [workload_named(name) for name in dict.fromkeys(workloads or [WORKLOAD_BY_DEFAULT])]
    return [PassTask(workload, work) for workload in chosen for work in works]


class Stage:
    """What the passes of one workload and of the same dtypes share."""

    def __init__(self, tasks: Sequence[PassTask]):
        """Makes the parameters and gradients of tasks that are alike in that."""
        workload, work = tasks[0].workload, tasks[0].work
        self.arrays = Arrays(workload.shapes, work.dtype, work.grad_dtype)
        self.sample = Sample(workload.shapes)
        self.states: dict[tuple[str, torch.dtype], list[dict[str, Tensor]]] = {}
        self.streams = Streams(max(_most_streams(task) for task in tasks))
        ends = np.cumsum([0, *(math.prod(shape) for shape in workload.shapes)])
        # The number of each sampled element among all.
        self.numbers = np.concatenate(
            [ends[index] + elements.numpy() for index, elements in self.sample.places]
        )


def measure(
    result: Pass,
    work: Work,
    stage: Stage,
    named: Sequence[Subject],
    until: float,
    rounds: int | None,
    on_progress: Callable[[float], object],
) -> None:
    """Fills in a pass's limits and results; an interrupt leaves those that there are so far.

    Args:
        result: The pass, with neither.
        work: What it does.
        stage: What it shares with others.
        named: Optimizers to take the place of torch's, too.
        until: When it should end, by time.perf_counter.
        rounds: How many rounds to run, in place of those that fit into the time.
        on_progress: Called with the share that is done.
    """
    arrays, streams = stage.arrays, stage.streams
    arrays.reset(arrays.separate)  # of which torch's masters and averages are copies
    ways = contenders(work, arrays)
    for way in ways:
        if not work.only_norm:
            way.adopt(stage.states.get(way.kind, []))
    entrants: list[Contender | Subject] = [*ways, *([] if work.only_norm else named)]
    right: list[Contender] = []
    wanted: Outcome | None = None
    for place, entrant in enumerate(entrants):
        found = Result(entrant.label if isinstance(entrant, Subject) else entrant.name)
        result.results.append(found)
        try:
            if isinstance(entrant, Subject):
                way = named_contender(work, arrays, entrant)
            else:
                way = entrant
            outcome = _run(way, work, stage)
        except FAILURES as error:
            found.problem = failure(error)
            continue
        if way.ours:
            found.problem = _problem(way, work, stage, outcome, wanted)
        elif way.named:
            found.problem = _problem_of_named(work, stage, outcome, wanted)
        else:
            wanted = outcome
        if found.problem is None:
            right.append(way)
        on_progress(CHECKS * (place + 1) / len(entrants))
    for way in right:
        arrays.reset(way.params)
        if way.scaler is not None:
            # torch writes the gradients: under any other scale they would fade away, turn by turn.
            # Those that it clips keep, after their first turn, the norm that they are clipped to.
            way.scaler.update(1.0)

    pages = {way.name: way.pages(streams) for way in right}
    limits: dict[Pages, str] = {}
    calls: dict[str, Callable[[], object]] = {}
    parts = {part: call for way in right for part, call in way.parts.items()}
    for way in right:
        kind = pages[way.name]
        if way.ours and kind not in limits:
            limits[kind] = limit_name(kind)
            calls[limits[kind]] = streams.walks(way.walks(work), kind)
    calls |= {way.name: way.call for way in right}
    race = Race({**calls, **parts}, on_the_host)
    try:
        if right:
            race.run(
                max(0.0, until - perf_counter()),  # the first one has made the tensors of all
                rounds,
                lambda done: on_progress(CHECKS + (1 - CHECKS) * done),
            )
    finally:
        timings = race.timings()
        for kind, name in limits.items():
            if timing := timings.get(name):
                rate = result.rate(timing)
                result.limits.append(Limit(str(kind), streams.granted(kind), timing, rate))
        for found in result.results:
            found.problem = race.failures.get(found.implementation, found.problem)
            if timing := timings.get(found.implementation):
                fill_in(found, result, timing, pages[found.implementation])
        result.parts += [Result(part, timing=timings[part]) for part in parts if part in timings]
        result.compare()
        for way in ways:
            if states := way.rule_states():
                stage.states[way.kind] = states


def _most_streams(task: PassTask) -> int:
    count = task.workload.parameters
    whole = [Moved(*(count * share for share in walk)) for walk in _size(task.work).walks]
    return max(Mix.of(walk).nbytes for walk in whole)


@dataclass(frozen=True)
class _Size:
    """Bytes for each parameter.

    Attributes:
        moved: What flatstep reads and writes.
        needed: What a pass takes at once at most.
        named: What each named optimizer takes beside it.
        walks: The same, walk by walk.
    """

    moved: float
    needed: float
    named: float
    walks: tuple[Moved, ...]


@functools.cache
def _size(work: Work) -> _Size:
    """The sizes of a pass, counted from the arrays of a small one."""
    chance = torch.random.get_rng_state()
    if work.grad_dtype != work.dtype and not hasattr(torch.Tensor, "grad_dtype"):
        return _Size(0, 0, 0, ())
    arrays = Arrays([(PROBE,)], work.dtype, work.grad_dtype)
    ways = contenders(work, arrays)
    for way in ways:
        way.call()
    torch.random.set_rng_state(chance)
    ours = next(way for way in ways if way.name == TENSORS)
    torchs = next(way for way in ways if way.name == TORCH)
    walks = ours.walks(work)
    mixes = [Mix.of(walk) for walk in walks]
    # On two kinds of pages: parameters and gradients are on both, states on one.
    limit = max(mix.size * (2 * (mix.params + mix.grads) + mix.states) for mix in mixes)
    tensors = 3 * (work.dtype.itemsize + work.grad_dtype.itemsize)  # apart, flat, to begin with
    tensors += work.dtype.itemsize if work.wide == "masters" else 0  # torch's own
    own = work.dtype.itemsize * (2 if work.wide == "masters" else 1) + work.grad_dtype.itemsize
    # Random bits, and what they are added to.
    temporaries = 8 if work.by_chance else 0
    return _Size(
        moved=sum(map(sum, walks)) / PROBE,
        needed=tensors + (sum(way.nbytes() for way in ways) + limit) / PROBE + temporaries,
        named=own + torchs.nbytes() / PROBE,
        walks=tuple(Moved(*(share / PROBE for share in walk)) for walk in walks),
    )


def _run(way: Contender, work: Work, stage: Stage) -> Outcome:
    """The steps that are checked, from the start, each with the gradients of the start."""
    arrays, sample = stage.arrays, stage.sample
    arrays.reset(way.params)
    if work.only_norm:
        found = way.call()
        if isinstance(way.optimizer, Optimizer):
            way.optimizer.step()  # with the norm that was computed ahead of it
            found = way.optimizer.grad_norm
        assert isinstance(found, Tensor)
        return {"norm": found}
    for step in range(STEPS):
        if step:
            arrays.reset(way.params, only_gradients=True)
        way.call()
    states = {name: sample.of(tensors) for name, tensors in way.states().items()}
    params = sample.of(way.params)
    outcome = {"parameters": params, **states}
    if work.writes_gradients or way.ours:
        outcome["gradients"] = sample.of([gradient(param) for param in way.params])
    if work.wide == "masters":
        outcome["weights"] = sample.of(way.wide) if way.wide else _weights(params, states)
    if way.ours and isinstance(way.optimizer, Optimizer) and way.optimizer.grad_norm is not None:
        outcome["norm"] = way.optimizer.grad_norm
    return outcome


def _weights(params: Tensor, states: Outcome) -> Tensor:
    if extras.MASTER_LOW in states:
        return join(params, states[extras.MASTER_LOW])
    return states[extras.MASTER]


def _problem_of_named(
    work: Work, stage: Stage, found: Outcome, torchs: Outcome | None
) -> str | None:
    """What is wrong with the parameters after a named optimizer's steps, or None."""
    if torchs is None:
        return "not checked: torch's own calls failed"
    wanted = torchs["parameters"]
    change = wanted.double() - stage.sample.of(stage.arrays.params).double()
    if not close(found["parameters"], wanted, change):
        return f"wrong result: parameters unlike those of {work.calls}"
    return None


def _problem(
    way: Contender, work: Work, stage: Stage, found: Outcome, torchs: Outcome | None
) -> str | None:
    """What is wrong with flatstep's outcome, or None."""
    arrays, sample = stage.arrays, stage.sample
    slack = 0.0
    if work.clips or work.skips:
        exact = arrays.norms[work.norm_type]
        unscale = 1 / LOSS_SCALE if work.scales else 1.0
        norm = torch.tensor(exact * unscale, dtype=found["norm"].dtype)
        if not close(found["norm"], norm, norm):
            return "wrong result: norm unlike the one in double precision"
        # torch adds squares in float32, and is as far from the truth as its own norm is.
        slack = abs(float(total_norm(arrays.grads, work.norm_type)) / exact - 1)
    if work.only_norm:
        if torchs is not None and not close(found["norm"], torchs["norm"], norm, slack):
            return "wrong result: norm unlike torch's"
        return None
    before = sample.of(arrays.params)
    states = [found[name] for name in ("exp_avg", "exp_avg_sq")]
    coarsest = max(slack, *(torch.finfo(state.dtype).eps for state in states))
    for name, wanted in (torchs or {}).items():
        if name not in found:
            continue
        is_weight = name in ("parameters", "weights", extras.AVERAGE)
        change = wanted.double() - before.double() if is_weight else wanted
        if not close(found[name], wanted, change, coarsest):
            return f"wrong result: {name} unlike those of {work.calls}"
    for name, exact_values in _reference(way, work, stage).items():
        if _stored(found[name]).tobytes() != exact_values.tobytes():
            return f"wrong result: {name} unlike the reference's"
    return None


def _reference(way: Contender, work: Work, stage: Stage) -> dict[str, np.ndarray]:
    """The reference's steps from the start, at the sampled places, as stored values."""
    optimizer, arrays = way.optimizer, stage.arrays
    assert isinstance(optimizer, Optimizer)
    group = optimizer.param_groups[0]
    rule, (flags, hyper) = RULES[optimizer.rule], optimizer.variant(group)
    dtype, grad_dtype = STORED[work.dtype], STORED[work.grad_dtype]
    state_dtype = extras.option(group, "state_dtype") or work.dtype
    by_chance = extras.option(group, "rounding") == "stochastic"
    unscale = 1 / LOSS_SCALE if work.scales else 1.0
    scale = unscale
    if work.clips:
        norm = reference.norm_of(_total(arrays, work.norm_type), work.norm_type, unscale)
        scale *= reference.clip_factor(norm, max_norm(work, arrays))

    param, grad = stage.sample.of(arrays.params), stage.sample.of(arrays.grads)
    states = {
        name: _stored(torch.zeros_like(param, dtype=state_dtype))
        for name in dict(rule["variants"])[flags]
    }
    masters = {
        "float32": {extras.MASTER: param.float().numpy().copy()},
        "split": {extras.MASTER_LOW: np.zeros(param.numel(), np.uint16)},
    }
    master = masters.get(extras.option(group, "master"), {})
    average = {extras.AVERAGE: param.float().numpy().copy()} if work.averages else {}
    params, grads = _stored(param), _stored(grad)
    for step in range(1, STEPS + 1):
        grads = _stored(grad)
        exact = reference.widen(params, dtype).copy() if by_chance else None
        reference.update(
            optimizer.rule,
            reference.flag_names(optimizer.rule, flags, rule["flags"]),
            dict(zip(rule["hyper"], map(float, hyper), strict=True)),
            params,
            grads,
            states,
            step=step,
            scale=scale,
            dtype=dtype,
            grad_dtype=grad_dtype,
            state_dtype=STORED[state_dtype],
            extras=reference.Extras(
                master=exact if exact is not None else next(iter(master.values()), None),
                average=average.get(extras.AVERAGE),
                average_decay=group.get("ema_decay") or 0.0,
                unscale=unscale if work.writes_gradients else None,
            ),
        )
        if exact is not None:
            # Its own chance numbers neighbours, and these are not.
            numbers = stage.numbers.astype(np.uint32)
            halves = reference.random_halves(numbers, extras.option(group, "seed"), step)
            params = reference.round_by_chance(exact, halves)
    return {"parameters": params, "gradients": grads, **states, **master, **average}


def _total(arrays: Arrays, norm_type: float) -> float:
    """What the norm of the gradients at the start is the root of."""
    largest = norm_type == math.inf
    total = 0.0
    for grad in arrays.grads:
        kind, threads = STORED[grad.dtype], torch.get_num_threads()
        [own] = _core.norms([grad.data_ptr()], [kind], [grad.numel()], largest, threads)
        total = max(total, own) if largest else total + own
    return total


def _stored(tensor: Tensor) -> np.ndarray:
    """A copy of the values as the reference takes them."""
    tensor = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    array = tensor.numpy().copy()
    return array.view(np.uint16) if array.dtype == np.int16 else array
