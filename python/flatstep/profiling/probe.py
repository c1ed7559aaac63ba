"""Whether an optimizer that was named survives some steps: tried in a process of its own."""

from __future__ import annotations

import contextlib
import pickle
import signal
import subprocess
import sys
from dataclasses import dataclass, fields
from typing import Any

import torch

from flatstep.profiling.implementations import build_named, parameter
from flatstep.subjects import Subject

SHAPES = ((130, 3), (64,), (7,), ())
STEPS = 3
MOST_SECONDS = 300.0  # some compile their kernels first


@dataclass(frozen=True)
class Unusable(Subject):
    """An optimizer that takes its process with it: instead of being built, it says so."""

    problem: str = ""

    def __call__(self, params: Any, **options: Any) -> torch.optim.Optimizer:
        """Raises RuntimeError."""
        raise RuntimeError(self.problem)


def tried(subject: Subject, device: str) -> Subject:
    """The optimizer itself, if its process is alive after a few steps; what they raised or not."""
    request = pickle.dumps((subject.path, subject.rule, dict(subject.options), device))
    command = [sys.executable, "-m", "flatstep.profiling.probe"]
    try:
        code = subprocess.run(
            command, input=request, capture_output=True, timeout=MOST_SECONDS, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        return _unusable(subject, f"did not end within {MOST_SECONDS:.0f} s")
    if code == 0:
        return subject
    how = f"with {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
    return _unusable(subject, f"ended its process {how}")


def _unusable(subject: Subject, what: str) -> Unusable:
    known = {field.name: getattr(subject, field.name) for field in fields(subject)}
    problem = (
        f"{STEPS} steps over {len(SHAPES)} small tensors {what}; "
        f"`flatstep verify --optimizer {subject.path}` says where"
    )
    return Unusable(**known, problem=problem)


def main() -> None:
    """Makes the steps; the exit code is 0 where the process is alive after them."""
    path, rule, options, device = pickle.load(sys.stdin.buffer)
    # What it raises is the profile's to report.
    with contextlib.suppress(Exception, SystemExit):
        params = [parameter(shape, torch.float32, torch.device(device)) for shape in SHAPES]
        optimizer = build_named(Subject(path, rule, options), rule, params)
        for _ in range(STEPS):
            optimizer.step()


if __name__ == "__main__":
    main()
