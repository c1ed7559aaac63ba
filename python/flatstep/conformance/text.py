"""A result in lines of text."""

from __future__ import annotations

from flatstep.conformance.registry import CASES
from flatstep.conformance.results import Result
from flatstep.verify.results import Value


def describe(result: Result) -> list[str]:
    """What was seen, in lines of text, without the values."""
    evidence = result.evidence
    if evidence is None:
        return []
    where = []
    if evidence.shape is not None:
        where.append(f"shape {tuple(evidence.shape)}, strides {tuple(evidence.stride or ())}")
    if evidence.index is not None:
        where.append(f"index {tuple(evidence.index)}")
    if evidence.step:
        where.append(f"step {evidence.step}")
    if evidence.count > 1:
        where.append(f"{evidence.count:,} elements")
    if evidence.allowed is not None:
        where.append(f"at most {evidence.allowed:.2g} off is allowed")
    if result.size is not None:
        where.append(f"size {result.size}")
    return [evidence.what, "; ".join(where)]


def explain(result: Result) -> str:
    """All of a result as text, with what repeats it."""
    lines = [f"{result.case} ({result.dtype}): {result.text}", *describe(result)]
    evidence = result.evidence
    values: list[tuple[str, Value | None]] = []
    if evidence is not None:
        values = [("expected", evidence.expected), ("got", evidence.got)]
    lines += [f"{name:8}  {x.hex}  {x.value}" for name, x in values if x is not None]
    lines += [CASES[result.case].advice, f"repeat: {result.command}"]
    return "\n".join(line for line in lines if line)
