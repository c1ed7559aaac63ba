"""What tools/compatibility.sh has found: into a file, and as the rows of docs/compatibility.md.

python tools/compatibility.py record WORK RESULT.json
python tools/compatibility.py rows
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
KEPT = ("flatstep", "torch", "numpy", "python", "processor", "instruction set", "pool", "tensors")


def read_tests(folder: Path) -> dict[str, Any]:
    """How the tests ended: each file's counts, the reasons of the skipped, the failed by name."""
    files: dict[str, dict[str, int]] = {}
    reasons: Counter[str] = Counter()
    failed: dict[str, str] = {}
    first = ""
    for result in sorted(folder.glob("*.xml")):
        counts = Counter({"passed": 0, "failed": 0, "skipped": 0})
        suite = ElementTree.parse(result).getroot()[0]
        first = min(first or suite.attrib["timestamp"], suite.attrib["timestamp"])
        for case in suite.iter("testcase"):
            problem = case.find("failure")
            if problem is None:
                problem = case.find("error")
            skipped = case.find("skipped")
            if problem is not None:
                counts["failed"] += 1
                lines = problem.attrib.get("message", "").strip().splitlines()
                failed[f"{result.stem}::{case.attrib['name']}"] = (lines or [""])[0][:200]
            elif skipped is not None:
                counts["skipped"] += 1
                # A module that is skipped while it is collected has its place before the reason.
                reason = skipped.attrib["message"] or (skipped.text or "")
                reasons[reason.removeprefix("collection skipped")] += 1
            else:
                counts["passed"] += 1
        files[result.stem] = dict(counts)
    absent = sorted({path.stem for path in ROOT.glob("tests/test_*.py")} - set(files))
    total = sum((Counter(counts) for counts in files.values()), Counter())
    return {
        "date": first[:10] or f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "tests": {name: total[name] for name in ("passed", "failed", "skipped")},
        "failures": failed,
        "skipped because": dict(reasons.most_common()),
        "files": files,
        "files not run": absent,
    }


def record(work: Path, result: Path) -> int:
    """Puts together what was found in a folder of tools/compatibility.sh.

    Returns:
        The exit code: 1 where something failed or has not run.
    """
    from flatstep.cli import facts

    found = facts()
    verified = work / "verify.json"
    report = {
        "environment": {name: found[name] for name in KEPT},
        **read_tests(work / "junit"),
        "verify --quick": read_verify(json.loads(verified.read_text()))
        if verified.exists()
        else {},
    }
    result.write_text(json.dumps(report, indent=2) + "\n")
    print(rows())
    verified_all = report["verify --quick"].get("failed") == 0
    return 0 if verified_all and not (report["failures"] or report["files not run"]) else 1


def read_verify(report: dict[str, Any]) -> dict[str, int]:
    """How many cases `flatstep verify` had, and how many differed."""
    return {"cases": report["cases"], "failed": report["mismatched"]}


def version_of(report: dict[str, Any]) -> tuple[int, ...]:
    """The version of torch, to sort by."""
    return tuple(map(int, report["environment"]["torch"].split("+")[0].split(".")))


def rows() -> str:
    """The table of docs/compatibility.md."""
    lines = [
        "| torch | tests: passed | failed | skipped | `verify --quick`: cases | failed "
        "| Python | NumPy | date |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    reports = [json.loads(path.read_text()) for path in RESULTS.glob("compatibility-torch-*.json")]
    for report in sorted(reports, key=version_of, reverse=True):
        tests, verify, where = report["tests"], report["verify --quick"], report["environment"]
        cells = [
            where["torch"],
            *(f"{tests[name]:,}" for name in ("passed", "failed", "skipped")),
            *(f"{verify[name]:,}" if verify else "–" for name in ("cases", "failed")),
            where["python"],
            where["numpy"],
            report["date"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["record"] and len(sys.argv) == 4:
        sys.exit(record(Path(sys.argv[2]), Path(sys.argv[3])))
    elif sys.argv[1:] == ["rows"]:
        print(rows())
    else:
        sys.exit((__doc__ or "").strip())
