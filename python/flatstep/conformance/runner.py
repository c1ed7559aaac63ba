"""Runs the cases, each in a process of its own, and gathers what they found."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from flatstep.conformance import cases as _  # noqa: F401 - fills the registry
from flatstep.conformance.registry import CASES, FLOATS, Case
from flatstep.conformance.results import Evidence, Outcome, Report, Result
from flatstep.subjects import RULES_BY_NAME, Subject, subject
from flatstep.verify.runner import OnProgress

TIMEOUT = 60.0  # seconds for one case

# Forking a process that has loaded Apple's frameworks is not safe.
CAN_FORK = hasattr(os, "fork") and sys.platform != "darwin"


@dataclass(frozen=True)
class Plan:
    """What to run.

    Attributes:
        subject: The optimizer under test.
        options: Of the subject, each as "name=value".
        rows: The cases, each with a dtype.
        sizes: In place of each case's own; empty: their own.
        timeout: Seconds for one case.
    """

    subject: Subject
    options: tuple[str, ...]
    rows: tuple[tuple[Case, str], ...]
    sizes: tuple[int, ...] = ()
    timeout: float = TIMEOUT

    def sizes_of(self, case: Case) -> tuple[int, ...]:
        """The sizes that a case is run for, in ascending order."""
        return self.sizes or case.sizes

    def command(self, case: Case, dtype: str, size: int | None) -> str:
        """What repeats one case."""
        path, rule = self.subject.path, self.subject.rule
        name = path.rpartition(":")[2].lower()
        says_rule = next((r for part, r in RULES_BY_NAME if part in name), None) == rule
        options = [word for option in self.options for word in ("--with", option)]
        return shlex.join(
            [
                *("flatstep", "verify", "--optimizer", path, *options),
                *(() if says_rule else ("--rule", rule)),
                *("--case", case.name, "--dtype", dtype),
                *(() if size is None else ("--size", str(size))),
            ]
        )


def plan(
    path: str,
    options: Sequence[str] = (),
    rule: str | None = None,
    *,
    cases: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    sizes: Sequence[int] = (),
    timeout: float = TIMEOUT,
) -> Plan:
    """What to run for an optimizer; empty sequences take everything.

    Raises:
        ValueError: There is no such optimizer, case or dtype, or nothing is left to run.
    """
    for name in cases:
        if name not in CASES:
            raise ValueError(f"no case '{name}'; --list-cases lists them")
    for name in dtypes:
        if name not in FLOATS:
            raise ValueError(f"no dtype '{name}'; there are {', '.join(FLOATS)}")
    if any(size < 1 for size in sizes):
        raise ValueError("a size is at least 1")
    if timeout <= 0:
        raise ValueError("the timeout is a number of seconds above zero")
    found = subject(path, options, rule)
    rows = tuple(
        (case, dtype)
        for case in CASES.values()
        if (not cases or case.name in cases) and found.rule in case.rules
        for dtype in case.dtypes
        if not dtypes or dtype in dtypes
    )
    if not rows:
        raise ValueError(
            f"nothing to run: no case of these names is for {found.rule} and these dtypes; "
            "--list-cases says what each is for"
        )
    return Plan(found, tuple(options), rows, tuple(sorted(set(sizes))), timeout)


def run(plan: Plan, *, jobs: int | None = None, on_progress: OnProgress | None = None) -> Report:
    """Runs a plan; Ctrl-C leaves what was found so far.

    Args:
        plan: What to run.
        jobs: How many processes at a time; None: one for each core, four at most.
        on_progress: Called after each case with how many are done, of how many, and its name.

    Raises:
        RuntimeError: The optimizer cannot be imported in another process.
    """
    report = Report(plan.subject.path, list(plan.options), plan.subject.rule, len(plan.rows))
    began = time.monotonic()
    results: dict[int, Result] = {}
    count = min(jobs or min(4, os.cpu_count() or 1), len(plan.rows))
    with contextlib.ExitStack() as stack:
        idle: SimpleQueue[Worker] = SimpleQueue()
        pool = stack.enter_context(ThreadPoolExecutor(count))
        workers = [stack.enter_context(contextlib.closing(Worker())) for _ in range(count)]
        for worker in workers:
            idle.put(worker)

        def one(row: tuple[Case, str]) -> Result:
            worker = idle.get()
            try:
                return run_case(worker, plan, *row)
            finally:
                idle.put(worker)

        try:
            pending = {pool.submit(one, row): place for place, row in enumerate(plan.rows)}
            waiting = set(pending)
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    results[pending[future]] = future.result()
                    if on_progress is not None:
                        on_progress(len(results), len(plan.rows), future.result().name)
        except BaseException as error:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.close()
            if not isinstance(error, KeyboardInterrupt):
                raise
            report.interrupted = True
    report.results = [results[place] for place in sorted(results)]
    report.seconds = time.monotonic() - began
    return report


def run_case(worker: Worker, plan: Plan, case: Case, dtype: str) -> Result:
    """Runs one case; if it fails, again for fewer elements, to find out how few show it."""
    began = time.monotonic()
    result = _result(case, dtype, worker.ask(plan, case, dtype, plan.sizes_of(case)))
    if not result.outcome.is_fine:
        result = _smallest(worker, plan, case, result)
        result.command = plan.command(case, dtype, result.size)
    result.seconds = time.monotonic() - began
    return result


def _smallest(worker: Worker, plan: Plan, case: Case, result: Result) -> Result:
    """The failure at a smaller size, by halves; without a size if it comes with none alone."""
    if result.outcome is Outcome.HANG or result.size is None:  # each try would take as long
        return result

    def alone(size: int) -> Result | None:
        again = _result(case, result.dtype, worker.ask(plan, case, result.dtype, (size,)))
        return again if again.outcome is result.outcome else None

    smaller = [size for size in plan.sizes_of(case) if size < result.size]
    fails, passes = result.size, max(smaller, default=result.size - 1)
    if (found := alone(fails)) is None:
        result.size = None
        return result
    while not plan.sizes and fails - passes > 1:
        middle = (fails + passes) // 2
        if (again := alone(middle)) is None:
            passes = middle
        else:
            fails, found = middle, again
    return found


def _result(case: Case, dtype: str, answer: dict[str, Any]) -> Result:
    at: dict[str, int] = {}
    for message in answer["messages"]:
        at = message.get("at", at)
        if found := message.get("result"):
            evidence = Evidence.of(found["evidence"]) if found["evidence"] else None
            outcome = Outcome(found["outcome"])
            output = "" if outcome.is_fine else answer["output"]
            return Result(
                case.name, dtype, outcome, found["ulp"], found["size"], evidence, "", output
            )
    outcome = Outcome.CRASH if answer["in_time"] else Outcome.HANG
    return Result(
        case.name,
        dtype,
        outcome,
        size=at.get("size"),
        evidence=Evidence(_how_it_ended(answer), at.get("step", 0)),
        output=answer["output"],
    )


def _how_it_ended(answer: dict[str, Any]) -> str:
    status = answer["status"]
    if not answer["in_time"]:
        return "it did not end in the time that a case has; --timeout gives more"
    if status is None:
        return "it took the process down that starts the cases"
    if status >= 0:
        return f"the process ended on its own, with exit code {status}"
    with contextlib.suppress(ValueError):
        return f"the process was ended by {signal.Signals(-status).name}"
    return f"the process was ended by signal {-status}"


class Worker:
    """A process that imports torch and optimizers once, and runs each case in a fork of itself.

    Where a process cannot fork, every case starts a new one.

    Args:
        forks: Whether it may fork.
    """

    def __init__(self, *, forks: bool = CAN_FORK) -> None:
        self.forks = forks
        self._closed = False
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - close() closes it
        self._process = self._start() if forks else None

    def _start(self, *flags: str) -> subprocess.Popen[bytes]:
        path = os.pathsep.join(part or os.getcwd() for part in sys.path)
        return subprocess.Popen(
            [sys.executable, "-m", "flatstep.conformance.child", *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            # NumPy's library must not start threads before a fork.
            env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,  # so that Ctrl-C comes to this process alone
        )

    def ask(self, plan: Plan, case: Case, dtype: str, sizes: Sequence[int]) -> dict[str, Any]:
        """The messages of one case's process, and how it ended.

        Raises:
            RuntimeError: The optimizer cannot be imported there.
        """
        request = {
            "optimizer": plan.subject.path,
            "options": list(plan.options),
            "rule": plan.subject.rule,
            "case": case.name,
            "dtype": dtype,
            "sizes": list(sizes),
            "timeout": plan.timeout,
        }
        line = json.dumps(request).encode() + b"\n"
        answer = self._ask_fork(line) if self.forks else self._ask_alone(line, plan.timeout)
        for message in (answer, *answer.get("messages", ())):
            if "refused" in message:
                raise RuntimeError(message["refused"])
        return answer

    def _ask_fork(self, line: bytes) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(BrokenPipeError, ValueError):
            process.stdin.write(line)
            process.stdin.flush()
            if answer := process.stdout.readline():
                return dict(json.loads(answer))
        printed = self._printed()
        if not self._closed:
            self._end(process)
            self._process = self._start()
        return {"messages": [], "status": None, "in_time": True, "output": printed}

    def _ask_alone(self, line: bytes, timeout: float) -> dict[str, Any]:
        self._errors.seek(0)
        self._errors.truncate()
        with self._start("--alone") as process:
            in_time = True
            try:
                text, _none = process.communicate(line, timeout)
            except subprocess.TimeoutExpired:
                in_time = False
                process.kill()
                text, _none = process.communicate()
        return {
            "messages": [json.loads(part) for part in text.splitlines()],
            "status": process.returncode,
            "in_time": in_time,
            "output": self._printed(),
        }

    def _printed(self) -> str:
        if self._errors.closed:
            return ""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace").strip()[-2000:]

    @staticmethod
    def _end(process: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(BrokenPipeError):
            assert process.stdin is not None
            process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        with contextlib.suppress(ValueError):
            assert process.stdout is not None
            process.stdout.close()

    def close(self) -> None:
        """Ends the process, and a case that it is running."""
        if self._closed:
            return
        self._closed = True
        if self._process is not None:
            self._end(self._process)
        self._errors.close()
