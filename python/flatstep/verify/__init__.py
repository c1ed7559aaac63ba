"""Proof that the kernels have the bits of :mod:`flatstep.reference`, on this machine.

>>> from flatstep import verify
>>> verify.run(rules=["sgd"], dtypes=["float32"]).ok
True
"""

from flatstep.verify.results import Distance, Mismatch, Report, Tally, Value
from flatstep.verify.runner import run

__all__ = ["Distance", "Mismatch", "Report", "Tally", "Value", "run"]
