"""The optimizers: drop-in replacements for those of :mod:`torch.optim`."""

from flatstep.optim.adam import Adam, AdamW
from flatstep.optim.rmsprop import RMSprop
from flatstep.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "RMSprop"]
