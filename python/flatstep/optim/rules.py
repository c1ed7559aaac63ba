"""The rules as the kernels know them, and what a group asks of one."""

from __future__ import annotations

from typing import Any, NamedTuple

from flatstep import _core

RULES: dict[str, Any] = {rule["name"]: rule for rule in _core.rules()}


def flag_bits(rule: str) -> dict[str, int]:
    """The bit of each of a rule's flags."""
    return {name: 1 << bit for bit, name in enumerate(RULES[rule]["flags"])}


class Variant(NamedTuple):
    """What a group asks for: the rule's flags, and its hyper-parameters in the rule's order."""

    flags: int
    hyper: list[Any]
