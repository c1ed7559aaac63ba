"""How far from the exact result a careful implementation of a rule may be.

The functions of :mod:`flatstep.reference` run on :class:`Bounded` numbers: values in double
precision, each with a bound of its error. Every operation on the page may be wrong by one unit in
the last place of the type that it is computed in. A correctly rounded operation is wrong by half a
unit. The other half is for an approximate root, and for the same formula in another form, as
``b * m + (1 - b) * g`` for ``m + (1 - b) * (g - m)``. From there errors grow as the rule lets
them: a bound is large where the rule cancels, and small where it does not. It is an absolute
distance, so a parameter near zero is judged like any other.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

Array = Any


class Bounded:
    """A number, or an array of numbers, with a bound of the error of each.

    Args:
        value: The exact result, as far as double precision has it.
        error: How far a computed result may be from it.
        unit: One unit in the last place, relative to the value.
        least: The smallest distance of two values.
    """

    __array_ufunc__: ClassVar = None  # so that NumPy's numbers leave the operators to this class

    def __init__(self, value: Array, error: Array, unit: float, least: float) -> None:
        self.value = np.asarray(value, np.float64)
        self.error = np.asarray(error, np.float64)
        self.unit = unit
        self.least = least

    def _like(self, other: Any) -> Bounded:
        return other if isinstance(other, Bounded) else Bounded(other, 0.0, 0.0, 0.0)

    def _rounded(self, other: Bounded, value: Array, error: Array, exact: Array = False) -> Bounded:
        unit, least = max(self.unit, other.unit), max(self.least, other.least)
        rounding = np.where(exact, 0.0, np.maximum(unit * np.abs(value), least))
        return Bounded(value, error + rounding, unit, least)

    @property
    def _is_zero(self) -> Array:
        return (self.value == 0) & (self.error == 0)

    def __add__(self, other: Any) -> Bounded:
        b = self._like(other)
        exact = self._is_zero | b._is_zero
        return self._rounded(b, self.value + b.value, self.error + b.error, exact)

    def __sub__(self, other: Any) -> Bounded:
        b = self._like(other)
        return self + Bounded(-b.value, b.error, b.unit, b.least)

    def __rsub__(self, other: Any) -> Bounded:
        return self._like(other) - self

    def __mul__(self, other: Any) -> Bounded:
        b = self._like(other)
        error = np.abs(self.value) * b.error + np.abs(b.value) * self.error + self.error * b.error
        exact = (b.error == 0) & np.isin(b.value, (-1, 0, 1))
        return self._rounded(b, self.value * b.value, error, exact)

    def __truediv__(self, other: Any) -> Bounded:
        b = self._like(other)
        quotient = self.value / b.value
        room = np.maximum(np.abs(b.value) - b.error, 0)
        error = np.where(self._is_zero, 0.0, (self.error + np.abs(quotient) * b.error) / room)
        return self._rounded(b, quotient, error)

    def __rtruediv__(self, other: Any) -> Bounded:
        return self._like(other) / self

    def __lt__(self, other: float) -> bool:
        return bool(self.value < other)

    __radd__ = __add__
    __rmul__ = __mul__


class BoundedMath:
    """The functions that are more than an operator, as in :class:`flatstep.reference.NumpyMath`."""

    TINY: ClassVar[float] = float(np.finfo(np.float32).tiny)

    @staticmethod
    def root(x: Any) -> Any:
        """The square root."""
        if not isinstance(x, Bounded):
            return math.sqrt(x)
        value = np.sqrt(x.value)
        down = value - np.sqrt(np.maximum(x.value - x.error, 0))
        up = np.sqrt(x.value + x.error) - value
        return x._rounded(x, value, np.maximum(down, up))

    @staticmethod
    def maximum(a: Bounded, b: Any) -> Bounded:
        """The larger one."""
        b = a._like(b)
        return Bounded(np.maximum(a.value, b.value), np.maximum(a.error, b.error), a.unit, a.least)

    @classmethod
    def snap(cls, x: Bounded) -> Bounded:
        """Subnormal states may be kept or lost."""
        return Bounded(x.value, x.error + cls.TINY, x.unit, x.least)
