"""Update throughput against the machine's limit and beside torch's own: ``flatstep profile``.

>>> from flatstep import profiling
>>> report = profiling.run(profiling.plan(["resnet50"], ["adam"]))
>>> report.as_dict()
"""

from flatstep.profiling.passes import PassTask, plan_passes
from flatstep.profiling.results import (
    Bucket,
    Case,
    Limit,
    Overhead,
    Pass,
    Point,
    Report,
    Result,
    Sweep,
    Training,
    TrainingResult,
)
from flatstep.profiling.run import Task, plan, run
from flatstep.profiling.sweeps import SweepTask, plan_sweeps
from flatstep.profiling.workloads import WORKLOADS, Workload
from flatstep.profiling.works import WORKS, Work

__all__ = [
    "WORKLOADS",
    "WORKS",
    "Bucket",
    "Case",
    "Limit",
    "Overhead",
    "Pass",
    "PassTask",
    "Point",
    "Report",
    "Result",
    "Sweep",
    "SweepTask",
    "Task",
    "Training",
    "TrainingResult",
    "Work",
    "Workload",
    "plan",
    "plan_passes",
    "plan_sweeps",
    "run",
]
