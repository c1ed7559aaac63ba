"""The other side of the pipe: runs cases, each in a process of its own.

``python -m flatstep.conformance.child`` reads requests from its standard input, a line of JSON
each, and answers each with a line on its standard output. It imports torch and an optimizer's
module once, and forks for every case, before torch has started any thread. With ``--alone`` it runs
one case in its own process and ends, for systems that cannot fork.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import selectors
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

from flatstep.conformance import cases as _  # noqa: F401 - fills the registry
from flatstep.conformance.lab import IgnoredError, Lab, NotOfferedError, RaisedError, WrongError
from flatstep.conformance.registry import CASES, Case
from flatstep.conformance.results import Evidence, Outcome
from flatstep.subjects import Subject, subject

CLEAR = (ValueError, TypeError, RuntimeError, NotImplementedError)
Say = Callable[[dict[str, Any]], None]


def main(arguments: list[str]) -> None:
    """Serves requests until the input ends, or one with ``--alone``."""
    # What an optimizer prints must not get between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    _warm_up()
    if arguments == ["--alone"]:
        request = json.loads(sys.stdin.readline())
        with _refusing(say):
            run(_subject(request), request, say)
        return
    for line in iter(sys.stdin.buffer.readline, b""):
        request = json.loads(line)
        with _refusing(say):
            say(in_a_fork(_subject(request), request, answers.fileno()))


def _subject(request: dict[str, Any]) -> Subject:
    return subject(request["optimizer"], request["options"], request["rule"])


@contextlib.contextmanager
def _refusing(say: Say) -> Iterator[None]:
    """Says so where an optimizer cannot be found here."""
    try:
        yield
    except ValueError as error:
        say({"refused": str(error)})


def _warm_up() -> None:
    """Makes torch load what its optimizers load at their first step, which takes it seconds."""
    torch.set_num_threads(1)
    param = torch.nn.Parameter(torch.ones(1))
    param.grad = torch.ones(1)
    torch.optim.SGD([param]).step()


def in_a_fork(under_test: Subject, request: dict[str, Any], answers: int) -> dict[str, Any]:
    """Runs a case in a forked process, and waits until it ends or its time is over."""
    read, write = os.pipe()
    with tempfile.TemporaryFile() as output:
        process = os.fork()
        if process == 0:
            os.close(read)
            os.close(answers)  # so that its end shows if this process outlives the other
            os.setpgid(0, 0)
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            _be_the_child(under_test, request, write)
        os.close(write)
        text, in_time = _read_until(read, time.monotonic() + request["timeout"])
        os.close(read)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        output.seek(0)
        printed = output.read().decode(errors="replace")
    messages = [json.loads(line) for line in text.decode().splitlines()]
    return {"messages": messages, "status": status, "in_time": in_time, "output": printed[-2000:]}


def _read_until(source: int, end: float) -> tuple[bytes, bool]:
    """What a process writes until it ends; False where it had not by ``end``."""
    text = b""
    with selectors.DefaultSelector() as selector:
        selector.register(source, selectors.EVENT_READ)
        selector.register(0, selectors.EVENT_READ)
        while (left := end - time.monotonic()) > 0:
            for key, _events in selector.select(left):
                if key.fd == 0:  # nothing is asked while a case runs: the input ended
                    return text, False
                if not (new := os.read(source, 1 << 16)):
                    return text, True
                text += new
    return text, False


def _be_the_child(under_test: Subject, request: dict[str, Any], write: int) -> None:
    """Runs a case, and ends this process whatever happens."""
    code = 1
    try:
        with os.fdopen(write, "w") as messages:

            def say(message: dict[str, Any]) -> None:
                messages.write(json.dumps(message) + "\n")
                messages.flush()

            run(under_test, request, say)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def run(under_test: Subject, request: dict[str, Any], say: Say) -> None:
    """Runs one case, and says how far it got and how it ended."""
    faulthandler.enable()
    with contextlib.suppress(ImportError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    say({"result": judge(under_test, CASES[request["case"]], request, say)})


def judge(under_test: Subject, case: Case, request: dict[str, Any], say: Say) -> dict[str, Any]:
    """The outcome of a case, over its sizes in ascending order, until one is not fine."""
    dtype: torch.dtype = getattr(torch, request["dtype"])
    worst, at = 0, {"size": 0, "step": 0}

    def on_step(step: int) -> None:
        at["step"] = step
        say({"at": at})

    def ended(outcome: Outcome, evidence: Evidence | None = None) -> dict[str, Any]:
        found = dataclasses.asdict(evidence) if evidence else None
        return {"outcome": outcome.value, "ulp": worst, "size": at["size"], "evidence": found}

    for size in request["sizes"]:
        at.update(size=size, step=0)
        say({"at": at})
        lab = Lab(under_test, dtype, size, on_step)
        try:
            case.check(lab)
        except NotOfferedError as error:
            return ended(Outcome.NOT_OFFERED, Evidence(str(error)))
        except IgnoredError as error:
            return ended(Outcome.IGNORED, error.evidence)
        except WrongError as error:
            return ended(Outcome.WRONG, error.evidence)
        except RaisedError as error:
            return ended(*_judge_error(case, error))
        except Exception as error:
            traceback.print_exc()
            what = f"the case ended with {type(error).__name__}: {error}"
            return ended(Outcome.ERROR, Evidence(what, at["step"]))
        worst = max(worst, lab.ulp)
    return ended(Outcome.CLOSE if worst else Outcome.SAME)


def _judge_error(case: Case, error: RaisedError) -> tuple[Outcome, Evidence]:
    """Whether an exception is a clear refusal, and one that the case allows."""
    message = str(error.cause).strip()
    name = type(error.cause).__name__
    said = f"{name}: {message.splitlines()[0] if message else 'no message'}"
    names_it = any(word.lower() in message.lower() for word in case.refusal)
    if case.refusal and names_it and isinstance(error.cause, CLEAR) and error.unchanged:
        return Outcome.REFUSED, Evidence(said, error.step)
    faults = []
    if not case.refusal:
        faults.append("there is nothing to refuse")
    elif not isinstance(error.cause, CLEAR) or not names_it:
        faults.append(f"not clear: it says nothing of '{case.refusal[0]}'")
    if not error.unchanged:
        faults.append("not clean: parameters or states are half updated")
    what = f"{error.doing} raised {said} ({'; '.join(faults)})"
    return Outcome.ERROR, Evidence(what, error.step)


if __name__ == "__main__":
    main(sys.argv[1:])
