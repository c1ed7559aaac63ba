"""Update throughput against the machine's limit and beside torch's own: ``flatstep profile``.

>>> from flatstep import profile
>>> report = profile.run(profile.plan(["resnet50"], ["adam"]))
>>> report.as_dict()
"""

from flatstep.profile.results import Case, Limit, Report, Result, Training, TrainingResult
from flatstep.profile.run import Task, plan, run
from flatstep.profile.workloads import WORKLOADS, Workload

__all__ = [
    "WORKLOADS",
    "Case",
    "Limit",
    "Report",
    "Result",
    "Task",
    "Training",
    "TrainingResult",
    "Workload",
    "plan",
    "run",
]
