"""The trainings, and how far each is from the truth."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from flatstep._torch import STORED
from flatstep.accuracy.implementations import Implementation, implementations
from flatstep.accuracy.results import Distances, Report, Run
from flatstep.accuracy.truth import (
    CLASSES,
    OPTIONS,
    Arrays,
    follow,
    gradients,
    known_dtypes,
)
from flatstep.conformance.truth import Asked
from flatstep.subjects import Subject
from flatstep.verify import ulp

STEPS = (1, 20, 1000)
# Called with the runs done, the runs in all, and what runs now.
OnProgress = Callable[[int, int, str], None]


def measure(
    rules: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    subjects: Sequence[Subject] = (),
    steps: Sequence[int] = STEPS,
    on_progress: OnProgress | None = None,
) -> Report:
    """Trains with every implementation on this machine, on one thread.

    What an implementation raises is kept as the error of its run. Ctrl-C ends the measurement: the
    report then has the runs that came to an end, and says so.

    Args:
        rules: Of "adam", "adamw", "rmsprop", "sgd"; None for those of ``subjects``, or all.
        dtypes: Names such as "bfloat16"; None for all.
        subjects: Optimizers to measure besides.
        steps: After how many distances are taken.
        on_progress: Called with the runs done, their number, and the name of the next.

    Raises:
        ValueError: There is no such rule or dtype, or a number of steps is below 1.
    """
    plan = _plan(rules, dtypes, subjects)
    if not steps or min(steps) < 1:
        raise ValueError(f"steps must be at least 1, not {min(steps, default='none')}")
    stops = sorted(set(steps))
    report = Report(steps=stops, elements=gradients("float32", 1).numel(), planned=len(plan))
    threads, began = torch.get_num_threads(), time.perf_counter()
    torch.set_num_threads(1)
    truths: dict[str, dict[int, Arrays]] = {}
    try:
        for done, (dtype, implementation) in enumerate(plan):
            if on_progress is not None:
                on_progress(done, len(plan), f"{dtype} {implementation.name}")
            report.runs.append(_run(implementation, dtype, stops, truths))
            module = sys.modules.get(implementation.package)
            report.versions[implementation.package] = str(getattr(module, "__version__", "unknown"))
        if on_progress is not None:
            on_progress(len(plan), len(plan), "")
    except KeyboardInterrupt:
        report.interrupted = True
    finally:
        torch.set_num_threads(threads)
        report.seconds = time.perf_counter() - began
    return report


def _plan(
    rules: Sequence[str] | None, chosen: Sequence[str] | None, subjects: Sequence[Subject]
) -> list[tuple[str, Implementation]]:
    if rules is None:
        rules = [rule for rule in CLASSES if not subjects or rule in {s.rule for s in subjects}]
    found = known_dtypes()
    for name, given, known in (("rule", rules, CLASSES), ("dtype", chosen or (), found)):
        for one in given:
            if one not in known:
                raise ValueError(f"no {name} '{one}'; there are {', '.join(known)}")
    for subject in subjects:
        if subject.rule not in rules:
            raise ValueError(f"{subject.path} follows {subject.rule}: name that rule too")
    return [
        (dtype, implementation)
        for dtype in found
        if chosen is None or dtype in chosen
        for rule in CLASSES
        if rule in rules
        for implementation in implementations(rule, dtype, subjects)
    ]


def _run(
    implementation: Implementation,
    dtype: str,
    stops: Sequence[int],
    truths: dict[str, dict[int, Arrays]],
) -> Run:
    subject = implementation.subject
    options = {**OPTIONS[subject.rule], **subject.options}
    run = Run(subject.rule, dtype, implementation.name, subject.path, {})
    try:
        asked = Asked.of(subject.rule, options)
        key = f"{subject.rule} {dtype} {asked}"
        if key not in truths:
            arrays = follow(subject.rule, asked, dtype, stops)
            truths[key] = dict(zip(stops, arrays, strict=True))
        taken = {
            name: value
            for name, value in options.items()
            if name in subject.options or subject.accepts(name)
        }
        run.options = {name: str(value) for name, value in taken.items()}
        for stop, params, states in _train(subject, taken, dtype, stops):
            truth = truths[key][stop]
            run.distances.append(_distances(stop, "param", params, truth["param"]))
            run.distances += [
                _distances(stop, name, states(name), truth[name])
                for name in truth
                if name != "param" and states(name)
            ]
    except Exception as error:  # an implementation that fails is a result too
        run.error = f"{type(error).__name__}: {error}".partition("\n")[0]
    return run


def _train(
    subject: Subject, options: dict[str, Any], dtype: str, stops: Sequence[int]
) -> Iterator[tuple[int, list[Tensor], Callable[[str], list[Tensor]]]]:
    params = [Parameter(weight) for weight in ulp.weights(dtype)]
    opt = subject.build(params, **options)
    sizes = [p.numel() for p in params]

    def states(name: str) -> list[Tensor]:
        """The state of every parameter; none where it is missing or of another kind."""
        found = []
        for p in params:
            state = opt.state.get(p)
            tensor = state.get(name) if isinstance(state, Mapping) else None
            if isinstance(tensor, Tensor) and tensor.dtype in STORED and tensor.shape == p.shape:
                found.append(tensor)
        return found if len(found) == len(params) else []

    for step, row in enumerate(gradients(dtype, max(stops)), 1):
        for p, gradient in zip(params, row.split(sizes), strict=True):
            p.grad = gradient.reshape(p.shape).clone()
        opt.step()
        if step in stops:
            yield step, [p.detach() for p in params], states


def _distances(steps: int, array: str, tensors: list[Tensor], truth: Any) -> Distances:
    dtype = STORED[tensors[0].dtype]
    found = ulp.bits_of(tensors, dtype)
    finite = ulp.is_finite(found, dtype)
    apart = ulp.distance(found[finite], ulp.round_to(truth[finite], dtype), dtype)
    return Distances.of(steps, array, dtype, apart, int((~finite).sum()))
