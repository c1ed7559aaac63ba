"""A whole profile: every case and the whole step, within a given time."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from time import perf_counter

import torch

import flatstep
from flatstep._torch import DTYPES
from flatstep.cli import processor
from flatstep.profiling import memory, passes, training
from flatstep.profiling.case import measure
from flatstep.profiling.check import Sample
from flatstep.profiling.device import Device, device_named
from flatstep.profiling.implementations import Tensors, optimizer_named, states_kept, torch_paths
from flatstep.profiling.limit import bytes_moved
from flatstep.profiling.measure import LEAST_TURNS, Timing
from flatstep.profiling.passes import PassTask, plan_passes
from flatstep.profiling.results import Case, Machine, Pass, Report, Training
from flatstep.profiling.workloads import WORKLOADS, Workload, workload_named, workload_of_model

OPTIMIZERS_BY_DEFAULT = ("adam", "sgd", "rmsprop")
LARGE_WORKLOADS = ("gpt2", "flat", "llama-3.2-1b")
SECONDS_BY_DEFAULT = 150.0
TRAINING_WEIGHT = 12.0
BUSY_LOAD = 0.5  # of the cores
BUSY_SPREAD = 0.1  # between the quartiles, of the median
LARGE = 64 << 20  # bytes moved: what is smaller varies by itself


@dataclass(frozen=True)
class Task:
    """A case to measure."""

    workload: Workload
    optimizer: str
    dtype: str

    def weight(self, device: Device) -> float:
        """Its share of the time: about the seconds that it takes."""
        arrays = 2 + states_kept(self.optimizer)
        gigabytes = arrays * self.workload.parameters * DTYPES[self.dtype].itemsize / 1e9
        return 2 + device.seconds_per_gigabyte * gigabytes + len(self.workload.shapes) / 2500

    def case(self) -> Case:
        """The case, before it is measured."""
        states = states_kept(self.optimizer)
        size = self.workload.parameters * DTYPES[self.dtype].itemsize
        return Case(
            workload=self.workload.name,
            title=self.workload.title,
            optimizer=self.optimizer,
            dtype=self.dtype,
            tensors=len(self.workload.shapes),
            parameters=self.workload.parameters,
            states=states,
            bytes_moved=bytes_moved(size, states),
        )


def plan(
    workloads: Sequence[str] | None = None,
    optimizers: Sequence[str] | None = None,
    dtype: str | None = None,
    model: str | None = None,
    device: str = "cpu",
) -> list[Task]:
    """The cases to measure, workload by workload.

    Args:
        workloads: Names in :data:`WORKLOADS`; None for those that ``device`` measures by default,
            or for none with ``model``.
        optimizers: Names such as "adam"; None for adam, sgd (with momentum) and rmsprop.
        dtype: A name in :data:`DTYPES`; None for float32, and where ``optimizers`` is None too,
            for adam in bfloat16 on the large workloads besides.
        model: "package.module:callable", whose model is a workload too.
        device: A name in :data:`~flatstep.profiling.device.DEVICES`.

    Raises:
        ValueError: An unknown name, with those that there are.
    """
    by_default = [name for name, workload in WORKLOADS.items() if device in workload.devices]
    chosen = [workload_named(name) for name in workloads or ([] if model else by_default)]
    if model:
        chosen.append(workload_of_model(model))
    names = list(dict.fromkeys(optimizers or OPTIMIZERS_BY_DEFAULT))
    for name in names:
        optimizer_named(name)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"no dtype '{dtype}'; there are {', '.join(DTYPES)}")
    tasks = []
    for workload in dict.fromkeys(chosen):
        tasks += [Task(workload, name, dtype or "float32") for name in names]
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
    device: str = "cpu",
    threads: int | None = None,
    rounds: int | None = None,
    seconds: float = SECONDS_BY_DEFAULT,
    slow_paths: bool = True,
    whole_step: bool | None = None,
    on_case: Callable[[Case], object] = lambda case: None,
    on_passes: Callable[[list[Pass]], object] = lambda passes: None,
    on_training: Callable[[Training], object] = lambda training: None,
    on_progress: Callable[[float, str], object] = lambda done, label: None,
) -> Report:
    """Measures updates against the machine's limit and against torch's own.

    Args:
        tasks: What to measure, as from :func:`plan`; None for the default.
        passes: The options of a step to measure beside the torch calls that they replace, as from
            :func:`plan_passes`; only on the CPU. None for all where ``tasks`` is None too, else for
            none.
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
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads or threads_before)
    session = _Session(tasks, passes, place, rounds, seconds, whole_step, on_progress)
    try:
        session.measure_cases(slow_paths, on_case)
        session.measure_passes(on_passes)
        if whole_step:
            session.measure_training(on_training)
    except KeyboardInterrupt:
        session.report.interrupted = True
    finally:
        torch.set_num_threads(threads_before)
    session.finish()
    return session.report


class _Session:
    """The report of one :func:`run`, and its time."""

    def __init__(
        self,
        tasks: Sequence[Task],
        pass_tasks: Sequence[PassTask],
        device: Device,
        rounds: int | None,
        seconds: float,
        whole_step: bool,
        on_progress: Callable[[float, str], object],
    ):
        self.tasks = tasks
        self.pass_tasks = pass_tasks
        self.device = device
        self.rounds = rounds
        self.on_progress = on_progress
        self.report = Report(_machine(device), left_out=list(device.left_out))
        self.start = perf_counter()
        self.deadline = self.start + seconds
        self.all = sum(task.weight(device) for task in tasks) + whole_step * TRAINING_WEIGHT
        self.all += sum(task.weight for task in pass_tasks)
        self.left = self.all
        load, cores = os.getloadavg()[0], self.report.machine.cores
        if load > BUSY_LOAD * cores:
            self.report.warnings.append(
                f"the machine was busy at the start (load average {load:.1f} on {cores} cores): "
                "if something still runs, the times are too high"
            )

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

    def measure_cases(self, slow_paths: bool, on_case: Callable[[Case], object]) -> None:
        """Measures every case."""
        for (workload, dtype), tasks in groupby(self.tasks, lambda t: (t.workload, t.dtype)):
            self._measure_workload(workload, DTYPES[dtype], list(tasks), slow_paths, on_case)
            self.device.tidy()

    def _measure_workload(
        self,
        workload: Workload,
        dtype: torch.dtype,
        tasks: list[Task],
        slow_paths: bool,
        on_case: Callable[[Case], object],
    ) -> None:
        """Measures the cases of one workload and dtype, which share its tensors."""
        device = self.device
        refusals = [memory.refusal(workload, task.optimizer, dtype, device) for task in tasks]
        tensors: Tensors | None = None
        limit = device.traffic(workload.parameters * dtype.itemsize)
        sample = Sample(workload.shapes)
        for task, refused in zip(tasks, refusals, strict=True):
            case = task.case()
            case.refused = refused
            self.report.cases.append(case)
            try:
                with self._turn(task.weight(device), str(case)) as (until, tell):
                    if refused is None:
                        tensors = tensors or Tensors(workload, dtype, device.where)
                        paths = torch_paths(task.optimizer, slow=slow_paths)
                        measure(
                            case, device, tensors, limit, sample, paths, until, self.rounds, tell
                        )
                        device.tidy()
            finally:
                if case.refused or case.results:
                    on_case(case)

    def measure_passes(self, on_passes: Callable[[list[Pass]], object]) -> None:
        """Measures every pass; those that share their tensors are neighbours."""
        try:
            for _, group in groupby(
                self.pass_tasks, lambda t: (t.workload, t.work.dtype, t.work.grad_dtype)
            ):
                self._measure_stage(list(group))
                self.device.tidy()
        finally:
            begun = [p for p in self.report.passes if p.refused or p.results]
            if begun:
                on_passes(begun)

    def _measure_stage(self, tasks: list[PassTask]) -> None:
        refusals = [task.refusal() for task in tasks]
        fitting = [task for task, refused in zip(tasks, refusals, strict=True) if not refused]
        stage: passes.Stage | None = None
        for task, refused in zip(tasks, refusals, strict=True):
            result = task.result()
            result.refused = refused
            self.report.passes.append(result)
            with self._turn(task.weight, str(result)) as (until, tell):
                if refused is None:
                    stage = stage or passes.Stage(fitting)
                    passes.measure(result, task.work, stage, until, self.rounds, tell)
                    self.device.tidy()

    def measure_training(self, on_training: Callable[[Training], object]) -> None:
        """Measures the whole step."""
        model = training.SmallGPT()
        needed, available = training.bytes_needed(model), memory.bytes_available()
        if available is not None and needed > available:
            self.report.warnings.append(
                f"the whole step was left out: it needs {needed / 1e9:.3g} GB of memory, and "
                f"{available / 1e9:.3g} GB are available"
            )
            return
        measured = self.report.training = training.new(model)
        try:
            with self._turn(TRAINING_WEIGHT, "whole step") as (until, tell):
                training.measure(measured, model, until, self.rounds, tell)
        finally:
            if measured.results:
                on_training(measured)

    def finish(self) -> None:
        """Adds what only the end shows."""
        self.report.seconds = perf_counter() - self.start
        if self.rounds is None:
            self._warn(
                lambda timing: timing.rounds < LEAST_TURNS,
                f"some paths had fewer than {LEAST_TURNS} turns: give --seconds more",
            )
        self._warn(
            lambda timing: timing.spread > BUSY_SPREAD,
            f"times vary by more than {BUSY_SPREAD:.0%}: something else was running",
        )

    def _warn(self, is_bad: Callable[[Timing], bool], message: str) -> None:
        """Warns of what is large and has a bad timing."""
        where = [
            str(case)
            for case in (*self.report.cases, *self.report.passes)
            if case.bytes_moved > LARGE
            and any(result.timing and is_bad(result.timing) for result in case.results)
        ]
        if where:
            self.report.warnings.append(f"{message} ({'; '.join(where)})")


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
