"""What a command line asks for, as tasks: for ``flatstep profile`` and for its plain lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flatstep.profiling.passes import ALL, PassTask, plan_passes
from flatstep.profiling.run import Task, device_for, plan
from flatstep.profiling.sweeps import SweepTask, plan_sweeps
from flatstep.profiling.workloads import Workload
from flatstep.subjects import Subject, subject_of


@dataclass(frozen=True)
class Choices:
    """What is to be measured, once all that was asked for makes sense together."""

    tasks: list[Task]
    passes: list[PassTask]
    sweeps: list[SweepTask]
    against: list[Subject]
    device: str
    threads: int | None
    whole_step: bool


def choose(
    *,
    workloads: Sequence[str | Workload] | None = None,
    optimizers: Sequence[str] | None = None,
    dtype: str | None = None,
    against: Sequence[str] | None = None,
    passes: Sequence[str] | None = None,
    no_passes: bool = False,
    sweeps: Sequence[str] | None = None,
    sweeps_by_default: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    whole_step: bool | None = None,
) -> Choices:
    """What the options ask for: the updates, the passes, the sweeps and the whole step.

    Where neither workloads, optimizers and dtype nor passes and sweeps are chosen, everything that
    the device has is measured; but sweeps only with ``sweeps_by_default``.

    Raises:
        ValueError: An unknown name, with those that there are, or options that exclude each other.
    """
    if passes and no_passes:
        raise ValueError("--pass and --no-passes exclude each other: drop one")
    chooses_updates = bool(optimizers or dtype)
    named = [subject_of(text) for text in dict.fromkeys(against or [])]
    optimizers = optimizers or list(dict.fromkeys(subject.rule for subject in named)) or None
    for subject in named:
        if subject.rule not in (optimizers or []):
            raise ValueError(
                f"{subject.path} follows {subject.rule}, which is not measured: "
                f"choose --optimizer {subject.rule} too"
            )
    everything = not (workloads or optimizers or dtype or passes or sweeps)
    if everything and device == "cpu" and not no_passes:
        passes = [ALL]
    if everything and sweeps_by_default:
        sweeps = [ALL]
    if whole_step is None:
        whole_step = everything and device == "cpu"
    updates = (
        everything
        or not (passes or sweeps)
        or any(isinstance(workload, Workload) for workload in workloads or [])
        or bool(passes and chooses_updates)
        or bool(sweeps and workloads)
    )
    choices = Choices(
        tasks=plan(workloads, optimizers, dtype, device) if updates else [],
        passes=plan_passes(passes, workloads) if passes else [],
        sweeps=plan_sweeps(sweeps or [], optimizers, dtype, device),
        against=named,
        device=device,
        threads=threads,
        whole_step=whole_step,
    )
    device_for(device, threads, whole_step, choices.passes)
    return choices
