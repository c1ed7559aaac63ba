"""A whole profile: every case and the whole step, within a given time."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from time import perf_counter

import torch

import flatstep
from flatstep._torch import DTYPES
from flatstep.cli import processor
from flatstep.profiling import memory, passes, probe, training
from flatstep.profiling.case import Ground, bytes_of, measure
from flatstep.profiling.device import Device, device_named
from flatstep.profiling.implementations import Rivals, optimizer_named, states_kept
from flatstep.profiling.measure import LEAST_TURNS, Timing
from flatstep.profiling.passes import PassTask, plan_passes
from flatstep.profiling.results import (
    Bucket,
    Case,
    Machine,
    Measured,
    Overhead,
    Pass,
    Report,
    Sweep,
    Training,
)
from flatstep.profiling.sweeps import SweepTask, overheads
from flatstep.profiling.workloads import WORKLOADS, Workload, size_classes, workload_named
from flatstep.profiling.works import OPTIMIZER
from flatstep.subjects import Subject

OPTIMIZERS_BY_DEFAULT = ("adam", "sgd", "rmsprop")
LARGE_WORKLOADS = ("gpt2", "flat", "llama-3.2-1b")
SECONDS_BY_DEFAULT = 150.0
TRAINING_WEIGHT = 12.0
BUSY_LOAD = 0.5  # of the cores
BUSY_SPREAD = 0.1  # between the quartiles, of the median
BUSY_OTHERS = 0.1  # of the processors' time
STAT = Path("/proc/stat")
LARGE = 64 << 20  # bytes moved: what is smaller varies by itself


@dataclass(frozen=True)
class Task:
    """A case to measure."""

    workload: Workload
    optimizer: str
    dtype: str

    def weight(self, device: Device) -> float:
        """About the seconds that it takes, which is its share of the time."""
        return weight_of(self.workload, self.optimizer, self.dtype, device)

    def case(self) -> Case:
        """The case, before it is measured."""
        return Case(
            workload=self.workload.name,
            title=self.workload.title,
            optimizer=self.optimizer,
            dtype=self.dtype,
            tensors=len(self.workload.shapes),
            parameters=self.workload.parameters,
            states=states_kept(self.optimizer),
            bytes_moved=bytes_of(self.workload, self.optimizer, DTYPES[self.dtype]),
        )

    def buckets(self) -> list[tuple[Workload, Bucket]]:
        """Its size classes, before they are measured."""
        found = []
        for classed in size_classes(self.workload):
            sizes = [math.prod(shape) for shape in classed.shapes]
            bucket = Bucket(
                smallest=min(sizes),
                largest=max(sizes),
                tensors=len(sizes),
                parameters=classed.parameters,
                bytes_moved=bytes_of(classed, self.optimizer, DTYPES[self.dtype]),
            )
            found.append((classed, bucket))
        return found


def weight_of(workload: Workload, optimizer: str, dtype: str, device: Device) -> float:
    """The share of the time that a race over a workload gets: about the seconds that it takes."""
    arrays = 2 + states_kept(optimizer)
    gigabytes = arrays * workload.parameters * DTYPES[dtype].itemsize / 1e9
    return 2 + device.seconds_per_gigabyte * gigabytes + len(workload.shapes) / 2500


def plan(
    workloads: Sequence[str | Workload] | None = None,
    optimizers: Sequence[str] | None = None,
    dtype: str | None = None,
    device: str = "cpu",
) -> list[Task]:
    """The cases to measure, workload by workload.

    Args:
        workloads: Names in :data:`~flatstep.profiling.workloads.WORKLOADS`, or workloads, as from
            :func:`~flatstep.profiling.workloads.workload_of_model`; None for those that ``device``
            measures by default.
        optimizers: Names such as "adam"; None for adam, sgd (with momentum) and rmsprop.
        dtype: A name such as "float32"; None for the workload's own or float32, and where
            ``optimizers`` is None too, for adam in bfloat16 on the large workloads besides.
        device: "cpu" or "cuda".

    Raises:
        ValueError: An unknown name, with those that there are.
    """
    by_default = [name for name, workload in WORKLOADS.items() if device in workload.devices]
    chosen = [workload_named(name) for name in workloads or by_default]
    names = list(dict.fromkeys(optimizers or OPTIMIZERS_BY_DEFAULT))
    for name in names:
        optimizer_named(name)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"no dtype '{dtype}'; there are {', '.join(DTYPES)}")
    tasks = []
    for workload in dict.fromkeys(chosen):
        tasks += [Task(workload, name, dtype or workload.dtype or "float32") for name in names]
        if dtype is None and not optimizers and workload.name in LARGE_WORKLOADS:
            tasks.append(Task(workload, "adam", "bfloat16"))
    return tasks


def device_for(
    name: str,
    threads: int | None,
    whole_step: bool | None,
    pass_tasks: Sequence[PassTask] | None = None,
) -> Device:
    """The device for a :func:`run` with these arguments.

    Raises:
        ValueError: There is no such device, or what is asked for makes no sense there.
    """
    device = device_named(name)
    if name != "cpu" and (threads is not None or whole_step or pass_tasks):
        wrong = "whole_step" if whole_step else "passes" if pass_tasks else "threads"
        raise ValueError(f"{wrong} is for device 'cpu': leave it out with device '{name}'")
    return device


def run(
    tasks: Sequence[Task] | None = None,
    *,
    passes: Sequence[PassTask] | None = None,
    sweeps: Sequence[SweepTask] = (),
    buckets: bool = False,
    against: Sequence[Subject] = (),
    device: str = "cpu",
    threads: int | None = None,
    rounds: int | None = None,
    seconds: float = SECONDS_BY_DEFAULT,
    slow_paths: bool = True,
    whole_step: bool | None = None,
    on_case: Callable[[Case], object] = lambda case: None,
    on_passes: Callable[[list[Pass]], object] = lambda passes: None,
    on_training: Callable[[Training], object] = lambda training: None,
    on_sweep: Callable[[Sweep, list[Overhead]], object] = lambda sweep, overheads: None,
    on_progress: Callable[[float, str], object] = lambda done, label: None,
) -> Report:
    """Measures updates against the machine's limit and against torch's own.

    Args:
        tasks: What to measure, as from :func:`plan`; None for the default.
        passes: The options of a step to measure beside the torch calls that they replace, as from
            :func:`plan_passes`; only on the CPU. None for all where ``tasks`` is None too, else for
            none.
        sweeps: The sweeps to measure, as from :func:`plan_sweeps`.
        buckets: Whether each case is measured over its tensors of each size alone, too.
        against: Optimizers to race wherever their rule is measured: in cases, passes, sweeps and
            the whole step. One with another result, or that fails, gets no time; one that takes a
            process down is not raced.
        device: Where: "cpu", or "cuda" for torch's current GPU.
        threads: How many threads of the CPU to use; None for as many as torch does.
        rounds: How often each implementation takes its turn; None for as often as time allows.
        seconds: How long it should take in all; a least number of rounds may take longer.
        slow_paths: Whether to measure torch's for-loop and foreach where it has a fused path.
        whole_step: Whether to measure backward, step and zero_grad of a real model too; only on
            the CPU, where None means yes.
        on_case: Called with each case when it is done.
        on_passes: Called with all passes when they are done.
        on_training: Called with the whole step's results.
        on_sweep: Called with each sweep when it is done, and what a step and a tensor cost by it.
        on_progress: Called with the share of the work that is done, and what is next.

    Returns:
        The report; after an interrupt from the keyboard, of what was measured so far.

    Raises:
        ValueError: There is no such device, or what is asked for makes no sense there.
    """
    place = device_for(device, threads, whole_step, passes)
    if whole_step is None:
        whole_step = device == "cpu"
    if passes is None:
        passes = plan_passes() if tasks is None and device == "cpu" else []
    if tasks is None:
        tasks = plan(device=device)
    for subject in against:
        on_progress(0.0, f"{subject.label}, in a process of its own")
    rivals = Rivals(slow_paths, tuple(probe.tried(subject, device) for subject in against))
    session = _Session(place, rivals, rounds, seconds, buckets, on_progress)
    session.weigh(tasks, passes, sweeps, whole_step)
    try:
        with thread_count(threads):
            session.report.machine.threads = torch.get_num_threads()
            session.measure_cases(tasks, on_case)
            session.measure_passes(passes, on_passes)
            if whole_step:
                session.measure_training(on_training)
            session.measure_sweeps(sweeps, on_sweep)
    except KeyboardInterrupt:
        session.report.interrupted = True
    session.finish()
    return session.report


@contextmanager
def thread_count(threads: int | None) -> Iterator[None]:
    """Torch's number of threads, for a while; None for the one that it has."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Session:
    """The report of one :func:`run`, and its time."""

    def __init__(
        self,
        device: Device,
        rivals: Rivals,
        rounds: int | None,
        seconds: float,
        buckets: bool,
        on_progress: Callable[[float, str], object],
    ):
        self.device = device
        self.rivals = rivals
        self.rounds = rounds
        self.buckets = buckets
        self.on_progress = on_progress
        self.report = Report(_machine(device), left_out=list(device.left_out))
        self.start, self.others = perf_counter(), seconds_of_others()
        self.deadline = self.start + seconds
        self.all = self.left = 0.0
        load, cores = os.getloadavg()[0], self.report.machine.cores
        if load > BUSY_LOAD * cores:
            self.report.warnings.append(
                f"the machine was busy at the start (load average {load:.1f} on {cores} cores): "
                "if something still runs, the times are too high: end it and measure again"
            )

    def weigh(
        self,
        tasks: Sequence[Task],
        pass_tasks: Sequence[PassTask],
        sweep_tasks: Sequence[SweepTask],
        whole_step: bool,
    ) -> None:
        """Adds up what shares the time."""
        races = [(task.workload, task.optimizer, task.dtype) for task in tasks]
        if self.buckets:
            races += [
                (classed, task.optimizer, task.dtype)
                for task in tasks
                for classed in size_classes(task.workload)
            ]
        races += [
            (place.workload, task.optimizer, task.dtype)
            for task in sweep_tasks
            for place in task.places()
        ]
        self.all = sum(weight_of(*race, self.device) for race in races)
        self.all += sum(task.weight for task in pass_tasks) + whole_step * TRAINING_WEIGHT
        self.left = self.all

    @contextmanager
    def _turn(self, weight: float, label: str) -> Iterator[tuple[float, Callable[[float], object]]]:
        """A share of the time that is left: when it ends, and how to tell the progress."""

        def tell(done: float) -> None:
            self.on_progress((self.all - self.left + weight * done) / self.all, label)

        tell(0)
        now = perf_counter()
        yield now + (self.deadline - now) * weight / self.left, tell
        tell(1)
        self.left -= weight

    def measure_cases(self, tasks: Sequence[Task], on_case: Callable[[Case], object]) -> None:
        """Measures every case; those of one workload and dtype share its tensors."""
        for (workload, dtype), group in groupby(tasks, lambda t: (t.workload, t.dtype)):
            alike = list(group)
            refusals = {
                task: memory.refusal(
                    workload, task.optimizer, DTYPES[dtype], self.device, self._named(task)
                )
                for task in alike
            }
            ground: Ground | None = None
            for task in alike:
                case = task.case()
                case.refused = refusals[task]
                self.report.cases.append(case)
                try:
                    with self._turn(task.weight(self.device), str(case)) as (until, tell):
                        if case.refused is None:
                            ground = ground or Ground.of(workload, DTYPES[dtype], self.device)
                            self._race(case, task.optimizer, ground, self.rivals, until, tell)
                    if self.buckets:
                        self._measure_buckets(case, task)
                finally:
                    case.buckets = [bucket for bucket in case.buckets if bucket.says_something]
                    if case.refused or case.results:
                        on_case(case)
            del ground
            self.device.tidy()

    def _measure_buckets(self, case: Case, task: Task) -> None:
        """Measures a case over its tensors of each size alone, beside torch's fastest path."""
        for workload, bucket in task.buckets():
            weight = weight_of(workload, task.optimizer, task.dtype, self.device)
            label = f"{case}, tensors of {bucket.smallest:,} to {bucket.largest:,}"
            case.buckets.append(bucket)
            with self._turn(weight, label) as (until, tell):
                bucket.refused = case.refused or self._shortage(workload, task)
                if bucket.refused is None:
                    self._race(
                        bucket,
                        task.optimizer,
                        Ground.of(workload, DTYPES[task.dtype], self.device),
                        replace(self.rivals, slow_paths=False),
                        until,
                        tell,
                    )

    def _shortage(self, workload: Workload, task: Task | SweepTask) -> str | None:
        dtype, named = DTYPES[task.dtype], self._named(task)
        return memory.shortage(workload, task.optimizer, dtype, self.device, named)

    def _named(self, task: Task | SweepTask) -> int:
        return len(self.rivals.following(task.optimizer))

    def _race(
        self,
        measured: Measured,
        optimizer: str,
        ground: Ground,
        rivals: Rivals,
        until: float,
        tell: Callable[[float], object],
    ) -> None:
        measure(measured, optimizer, ground, rivals, until, self.rounds, tell)
        self.device.tidy()

    def measure_sweeps(
        self,
        tasks: Sequence[SweepTask],
        on_sweep: Callable[[Sweep, list[Overhead]], object],
    ) -> None:
        """Measures every sweep, beside torch's fastest path."""
        for task in tasks:
            sweep = task.result()
            self.report.sweeps.append(sweep)
            try:
                self._measure_points(task, sweep)
            finally:
                sweep.points = [point for point in sweep.points if point.says_something]
                found = overheads(sweep) if sweep.axis == "tensors" else []
                self.report.overheads += found
                if sweep.points:
                    on_sweep(sweep, found)

    def _measure_points(self, task: SweepTask, sweep: Sweep) -> None:
        rivals = replace(self.rivals, slow_paths=False)
        for workload, group in groupby(task.places(), lambda place: place.workload):
            refused = self._shortage(workload, task)
            ground: Ground | None = None
            for place in group:
                point = task.point(place)
                point.refused = refused
                sweep.points.append(point)
                weight = weight_of(workload, task.optimizer, task.dtype, self.device)
                label = f"{sweep}: {place.x:,}"
                with self._turn(weight, label) as (until, tell), thread_count(place.threads):
                    if refused is None:
                        ground = ground or Ground.of(workload, DTYPES[task.dtype], self.device)
                        self._race(point, task.optimizer, ground, rivals, until, tell)
            del ground
            self.device.tidy()

    def measure_passes(
        self, tasks: Sequence[PassTask], on_passes: Callable[[list[Pass]], object]
    ) -> None:
        """Measures every pass; those that share their tensors are neighbours."""
        try:
            for _, group in groupby(tasks, lambda t: (t.workload, t.work.dtype, t.work.grad_dtype)):
                self._measure_stage(list(group))
                self.device.tidy()
        finally:
            begun = [p for p in self.report.passes if p.refused or p.results]
            if begun:
                on_passes(begun)

    def _measure_stage(self, tasks: list[PassTask]) -> None:
        named = self.rivals.following(OPTIMIZER)
        refusals = [task.refusal(len(named)) for task in tasks]
        fitting = [task for task, refused in zip(tasks, refusals, strict=True) if not refused]
        stage: passes.Stage | None = None
        for task, refused in zip(tasks, refusals, strict=True):
            result = task.result()
            result.refused = refused
            self.report.passes.append(result)
            with self._turn(task.weight, str(result)) as (until, tell):
                if refused is None:
                    stage = stage or passes.Stage(fitting)
                    passes.measure(result, task.work, stage, named, until, self.rounds, tell)
                    self.device.tidy()

    def measure_training(self, on_training: Callable[[Training], object]) -> None:
        """Measures the whole step."""
        model = training.SmallGPT()
        named = self.rivals.following(training.OPTIMIZER)
        needed, available = training.bytes_needed(model, len(named)), memory.bytes_available()
        if available is not None and needed > available:
            self.report.warnings.append(
                f"the whole step was left out: it needs {needed / 1e9:.3g} GB of memory, and "
                f"{available / 1e9:.3g} GB are available"
            )
            return
        measured = self.report.training = training.new(model)
        try:
            with self._turn(TRAINING_WEIGHT, "whole step") as (until, tell):
                training.measure(measured, model, named, until, self.rounds, tell)
        finally:
            if measured.results:
                on_training(measured)

    def finish(self) -> None:
        """Adds what only the end shows."""
        self.report.seconds = perf_counter() - self.start
        others = seconds_of_others() - self.others
        share = others / self.report.machine.cores / self.report.seconds
        if share > BUSY_OTHERS:
            self.report.warnings.append(
                f"others took {share:.0%} of the processors' time meanwhile: end them and measure "
                "again"
            )
        if self.rounds is None:
            self._warn(
                lambda timing: timing.rounds < LEAST_TURNS,
                f"some paths had fewer than {LEAST_TURNS} turns: give --seconds more",
            )
        self._warn(
            lambda timing: timing.spread > BUSY_SPREAD,
            f"times vary by more than {BUSY_SPREAD:.0%}: something else was running; end it and "
            "measure again",
        )

    def _warn(self, is_bad: Callable[[Timing], bool], message: str) -> None:
        """Warns of what is large and has a bad timing."""
        where = [
            name
            for name, measured in self.report.races()
            if measured.bytes_moved > LARGE
            and any(result.timing and is_bad(result.timing) for result in measured.results)
        ]
        if where:
            self.report.warnings.append(f"{message} ({'; '.join(where)})")


def seconds_of_others() -> float:
    """How long the machine's processors have run something else than this process, in all.

    Linux counts it, also what a virtual machine's host has taken away; elsewhere it is nothing.
    """
    try:
        fields = STAT.read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return 0.0
    user, nice, system, _idle, _waiting, *interrupts_and_stolen = map(int, fields)
    busy = (user + nice + system + sum(interrupts_and_stolen)) / os.sysconf("SC_CLK_TCK")
    return busy - sum(os.times()[:4])


def _machine(device: Device) -> Machine:
    return Machine(
        cpu=processor(),
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        isa=flatstep.cpu_isa(),
        flatstep=flatstep.__version__,
        torch=torch.__version__,
        system=f"{platform.system()} {platform.release()}",
        device=device.name,
        gpu=device.title,
        cuda=torch.version.cuda,
    )
