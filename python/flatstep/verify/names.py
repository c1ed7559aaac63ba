"""The names: what the kernels call a rule's parts, the reference must call alike."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np

from flatstep import reference
from flatstep.verify.cases import Variant, all_variants


class _Recorder(dict[str, Any]):
    """Has every name, and remembers those that were asked for or set."""

    def __init__(self, value: Any):
        super().__init__()
        self.value = value
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self.asked.add(name)
        return self.get(name, self.value)

    def __setitem__(self, name: str, value: Any) -> None:
        self.asked.add(name)
        super().__setitem__(name, value)


def disagreements() -> list[str]:
    """One sentence for each name that only the kernels or only the reference has."""
    variants = all_variants()
    found = _compare("the rules", (variant.rule for variant in variants), reference.RULES)
    for variant in variants:
        if variant.rule in reference.RULES:
            found += _disagreements_of(variant)
    return found


def _disagreements_of(variant: Variant) -> list[str]:
    rule = reference.RULES[variant.rule]
    of = f"of {variant.rule} {variant.name}"
    parameters = inspect.signature(rule.update).parameters.values()
    flags = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {"xp"}
    found = _compare(f"the flags {of}", variant.flags, flags)
    hyper = _Recorder(0.5)
    _, scalars = (rule.prepare(hyper, step, 1.0) for step in (1, 2))
    found += _compare(f"the hyper-parameters {of}", variant.hyper, hyper.asked)
    if not found:
        one = np.ones(1, np.float32)
        states = _Recorder(one)
        k = SimpleNamespace(**{name: np.float32(x) for name, x in scalars.items()})
        rule.update(one, one, states, k, **variant.flags, xp=reference.NumpyMath)
        found += _compare(f"the states {of}", variant.states, states.asked)
    return found


def _compare(what: str, kernels: Iterable[str], definition: Iterable[str]) -> list[str]:
    ours, theirs = set(kernels), set(definition)
    if ours == theirs:
        return []
    here, there = (", ".join(sorted(names)) or "none" for names in (ours, theirs))
    return [f"{what} are {here} in the kernels, {there} in reference.py: give them the same names"]
