"""How far implementations of an optimizer are from what exact arithmetic would give.

:func:`measure` trains with each implementation on this machine and counts how many values of its
dtype lie between what it found and the truth: the same rule, gradients and start in float64.
"""

from flatstep.accuracy.results import Distances, Report, Run
from flatstep.accuracy.run import measure

__all__ = ["Distances", "Report", "Run", "measure"]
