"""A suite that holds any optimizer class against its rule.

>>> from flatstep import conformance
>>> plan = conformance.plan("flatstep:SGD", cases=["sliced"], dtypes=["float32"])
>>> conformance.run(plan).ok
True
"""

from flatstep.conformance.registry import CASES, Case
from flatstep.conformance.results import Evidence, Outcome, Report, Result
from flatstep.conformance.runner import Plan, plan, run

__all__ = ["CASES", "Case", "Evidence", "Outcome", "Plan", "Report", "Result", "plan", "run"]
