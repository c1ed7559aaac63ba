"""Update throughput against the machine's limit and beside torch's own: ``flatstep profile``.

>>> from flatstep import profile
>>> report = profile.run(profile.plan(["resnet50"], ["adam"]))
>>> report.as_dict()
"""

from flatstep.profile.passes import PassTask, plan_passes
from flatstep.profile.results import Case, Limit, Pass, Report, Result, Training, TrainingResult
from flatstep.profile.run import Task, plan, run
from flatstep.profile.workloads import WORKLOADS, Workload
from flatstep.profile.works import WORKS, Work

__all__ = [
    "WORKLOADS",
    "WORKS",
    "Case",
    "Limit",
    "Pass",
    "PassTask",
    "Report",
    "Result",
    "Task",
    "Training",
    "TrainingResult",
    "Work",
    "Workload",
    "plan",
    "plan_passes",
    "run",
]
