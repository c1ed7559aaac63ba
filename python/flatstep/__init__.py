"""Optimizers that update a model's parameters in one trip through memory.

Change ``torch.optim`` to ``flatstep`` in the import: :class:`Adam`, :class:`AdamW`,
:class:`RMSprop` and :class:`SGD` take the place of torch's. :class:`FlatBuffer` makes a model one
piece of memory. ``flatstep.functional`` updates arrays that you own, ``flatstep.reference`` is the
definition in NumPy, ``flatstep verify`` and ``flatstep profile`` prove the bits and the speed.
:func:`profile` records the steps of a training.

The environment variable ``FLATSTEP_ISA`` chooses the instruction set instead of the processor's
widest.
"""

import os
from importlib.metadata import version

from flatstep import _core, _torch, functional, reference
from flatstep.flat import FlatBuffer, flatten_
from flatstep.optim import SGD, Adam, AdamW, RMSprop
from flatstep.optim.extras import Extras
from flatstep.optim.scaler import GradScaler
from flatstep.recording import profile

__version__ = version("flatstep")
__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Extras",
    "FlatBuffer",
    "GradScaler",
    "RMSprop",
    "cpu_isa",
    "flatten_",
    "functional",
    "profile",
    "reference",
]


def cpu_isa() -> str:
    """The instruction set in use: "avx512", "avx2", "neon" or "scalar"."""
    return _core.isa()


def _choose_isa(name: str | None) -> None:
    if name:
        try:
            _core.use_isa(name)
        except ValueError as error:
            raise RuntimeError(f"FLATSTEP_ISA={name}: {error}") from None


_torch.connect()
_choose_isa(os.environ.get("FLATSTEP_ISA"))
