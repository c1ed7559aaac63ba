"""What a case is: a function with a name, and what it applies to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from flatstep.conformance.lab import Lab
from flatstep.subjects import RULES

FLOATS = ("float32", "float64", "bfloat16", "float16")
USUAL_SIZES = (1, 5, 16, 33)


@dataclass(frozen=True)
class Case:
    """A small declaration: one thing that an optimizer has to get right.

    Attributes:
        name: On the command line.
        group: What the report lists it under.
        title: What it checks, for people.
        advice: Where to look if it fails.
        check: Raises what it finds, for one size.
        sizes: In ascending order, so that the first that fails is the smallest.
        dtypes: Of the parameters.
        rules: That it applies to.
        refusal: Words of which a refusal has to have one; none: the optimizer must not refuse.
    """

    name: str
    group: str
    title: str
    advice: str
    check: Callable[[Lab], None]
    sizes: tuple[int, ...]
    dtypes: tuple[str, ...]
    rules: tuple[str, ...]
    refusal: tuple[str, ...]


CASES: dict[str, Case] = {}


def case(
    group: str,
    title: str,
    advice: str,
    *,
    name: str = "",
    sizes: tuple[int, ...] = USUAL_SIZES,
    dtypes: tuple[str, ...] = ("float32",),
    rules: tuple[str, ...] = RULES,
    refusal: tuple[str, ...] = (),
) -> Callable[[Callable[[Lab], None]], Callable[[Lab], None]]:
    """Enters a function into :data:`CASES`, by its own name if none is given."""

    def enter(check: Callable[[Lab], None]) -> Callable[[Lab], None]:
        key = name or check.__name__.replace("_", "-")
        CASES[key] = Case(key, group, title, advice, check, sizes, dtypes, rules, refusal)
        return check

    return enter
