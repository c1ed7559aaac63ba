"""Training under observation: ``with flatstep.profile(opt) as prof``.

:mod:`flatstep.recording.huggingface` and :mod:`flatstep.recording.lightning` have a callback each
for Hugging Face's Trainer and for Lightning; they import these libraries, this package does not.
"""

from flatstep.recording.recorder import Recorder, profile
from flatstep.recording.rows import Row

__all__ = ["Recorder", "Row", "profile"]
