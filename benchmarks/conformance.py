"""The conformance suite over every implementation that is installed: the README's table.

    python benchmarks/conformance.py --json FILE

Runs `flatstep verify --optimizer` for flatstep's four classes, torch's for-loop, foreach and fused
paths, and, where they are installed, DeepSpeed's and bitsandbytes' optimizers. `--only NAME`,
repeatable, runs a part; figures that the file has already of others stay in it. Prints the table.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from flatstep import conformance
from flatstep.cli import facts
from flatstep.conformance import Outcome, Report

CLASSES = ("Adam", "AdamW", "RMSprop", "SGD")
TORCH_PATHS = {"for-loop": "foreach=False", "foreach": "foreach=True", "fused": "fused=True"}
DEEPSPEED = "deepspeed.ops.adam:DeepSpeedCPUAdam"
BITSANDBYTES = {"Adam": "Adam32bit", "AdamW": "AdamW32bit", "RMSprop": "RMSprop32bit"}


class Entrant(NamedTuple):
    """A class as the suite takes it, and where it stands in the table."""

    name: str
    package: str
    of: str
    path: str
    options: tuple[str, ...] = ()
    rule: str | None = None


def entrants() -> Iterator[Entrant]:
    """Everything that is installed."""
    for of in CLASSES:
        yield Entrant("flatstep", "flatstep", of, f"flatstep:{of}")
    for path, option in TORCH_PATHS.items():
        for of in CLASSES:
            if (path, of) != ("fused", "RMSprop"):  # which torch does not have
                yield Entrant(f"torch {path}", "torch", of, f"torch.optim:{of}", (option,))
    if importlib.util.find_spec("deepspeed"):
        for of in ("Adam", "AdamW"):
            mode = f"adamw_mode={of == 'AdamW'}"
            yield Entrant("DeepSpeedCPUAdam", "deepspeed", of, DEEPSPEED, (mode,), of.lower())
    if importlib.util.find_spec("bitsandbytes"):
        name = "bitsandbytes, 32-bit"
        for of, cls in {**BITSANDBYTES, "SGD": "SGD32bit"}.items():
            yield Entrant(name, "bitsandbytes", of, f"bitsandbytes.optim:{cls}")


def figures(entrant: Entrant, report: Report) -> dict[str, Any]:
    """What is kept of a run: how many cases ended how, and those that failed."""
    return {
        "name": entrant.name,
        "of": entrant.of,
        "version": version(entrant.package),
        "optimizer": report.optimizer,
        "options": report.options,
        "rule": report.rule,
        "outcomes": report.to_dict()["outcomes"],
        "most_ulp": max((r.ulp for r in report.results if r.outcome.is_fine), default=0),
        "failures": [
            {
                "case": failure.case,
                "dtype": failure.dtype,
                "outcome": failure.outcome.value,
                "size": failure.size,
                "what": failure.evidence.what if failure.evidence else "",
            }
            for failure in report.failures
        ],
    }


def cell(found: dict[str, Any]) -> str:
    """How many of the cases that a class offers are right, and what the others are."""
    outcomes = {Outcome(name): count for name, count in found["outcomes"].items()}
    offered = sum(outcomes.values()) - outcomes.get(Outcome.NOT_OFFERED, 0)
    wrong = {name: count for name, count in outcomes.items() if not name.is_fine}
    if not wrong:
        return f"{offered} of {offered}"
    said = ", ".join(f"{count} {name.value}" for name, count in wrong.items())
    return f"{offered - sum(wrong.values())} of {offered}: {said}"


def table(found: list[dict[str, Any]]) -> str:
    """The kept figures as Markdown."""
    rows = [f"| | {' | '.join(CLASSES)} |", f"|---{'|---' * len(CLASSES)}|"]
    for name in dict.fromkeys(entry["name"] for entry in found):
        own = {entry["of"]: entry for entry in found if entry["name"] == name}
        number = next(iter(own.values()))["version"]
        cells = [cell(own[of]) if of in own else "–" for of in CLASSES]
        rows.append(f"| {name} {number} | {' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", metavar="NAME", help="a row; repeatable")
    parser.add_argument("--of", action="append", choices=CLASSES, help="a column; repeatable")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds for a case")
    parser.add_argument("--json", type=Path, metavar="FILE", required=True)
    options = parser.parse_args()
    everything = list(entrants())
    names = {entrant.name for entrant in everything}
    if unknown := set(options.only or ()) - names:
        parser.error(f"no {', '.join(unknown)}; there are {', '.join(sorted(names))}")
    kept: dict[str, dict[str, Any]] = {}
    if options.json.exists():
        for entry in json.loads(options.json.read_text())["found"]:
            kept[f"{entry['name']} {entry['of']}"] = entry
    for entrant in everything:
        if options.only and entrant.name not in options.only:
            continue
        if options.of and entrant.of not in options.of:
            continue
        plan = conformance.plan(
            entrant.path, entrant.options, entrant.rule, timeout=options.timeout
        )
        report = conformance.run(plan)
        if report.interrupted:
            break
        key = f"{entrant.name} {entrant.of}"
        kept[key] = figures(entrant, report)
        print(f"{key}: {cell(kept[key])}", flush=True)
        order = [f"{one.name} {one.of}" for one in everything]
        found = sorted(kept.values(), key=lambda e: order.index(f"{e['name']} {e['of']}"))
        written = {"environment": facts(), "found": found}
        options.json.write_text(json.dumps(written, indent=2) + "\n")
    print(table(list(kept.values())))


if __name__ == "__main__":
    main()
