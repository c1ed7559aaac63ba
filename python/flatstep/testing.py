"""A pytest plugin: the cases of ``flatstep verify --optimizer`` as tests of your own suite.

Say ``pytest_plugins = ["flatstep.testing"]`` in the top ``conftest.py``, or ``-p flatstep.testing``
on the command line, and in a test module:

>>> from flatstep.testing import conformance
>>> test_conformance = conformance("torch.optim:AdamW", weight_decay=0.1)

The plugin is not loaded on its own, because it would import torch in every run of pytest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest

from flatstep.conformance import Case, Outcome, plan
from flatstep.conformance.runner import TIMEOUT, Worker, run_case
from flatstep.conformance.text import explain
from flatstep.subjects import option

__all__ = ["conformance", "flatstep_worker"]

UNLOADED = (
    "the plugin is not loaded: say pytest_plugins = ['flatstep.testing'] in the top conftest.py, "
    "or run pytest with -p flatstep.testing"
)


def conformance(
    optimizer: str | type,
    /,
    *,
    rule: str | None = None,
    cases: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    timeout: float = TIMEOUT,
    **options: Any,
) -> Callable[..., None]:
    """A test for every case that an optimizer class has to stand.

    Each runs in a process of its own. An option that the class does not have skips its case.

    Args:
        optimizer: The class, or its name as "package.module:Class".
        rule: "adam", "adamw", "rmsprop" or "sgd"; None: as the class's name says.
        cases: Names of cases, as ``flatstep verify --list-cases`` lists them; empty: all.
        dtypes: Names of dtypes; empty: those that each case is for.
        timeout: Seconds for one case.
        **options: What the optimizer is built with, as numbers, strings and the like.

    Returns:
        A test function, to be given a name that begins with ``test``.

    Raises:
        ValueError: There is no such class, case or dtype, or an option cannot be written as text.
    """
    texts = [_as_text(name, value) for name, value in options.items()]
    path = optimizer if isinstance(optimizer, str) else _path(optimizer)
    selected = plan(path, texts, rule, cases=cases, dtypes=dtypes, timeout=timeout)

    @pytest.mark.parametrize(
        ("case", "dtype"),
        selected.rows,
        ids=[f"{case.name}-{dtype}" for case, dtype in selected.rows],
    )
    def test(case: Case, dtype: str, request: pytest.FixtureRequest) -> None:
        try:
            worker: Worker = request.getfixturevalue("flatstep_worker")
        except pytest.FixtureLookupError:
            pytest.fail(UNLOADED, pytrace=False)
        result = run_case(worker, selected, case, dtype)
        if result.outcome is Outcome.NOT_OFFERED:
            pytest.skip(result.evidence.what if result.evidence else "not offered")
        if not result.outcome.is_fine:
            pytest.fail(explain(result), pytrace=False)

    return test


@pytest.fixture(scope="session")
def flatstep_worker() -> Iterator[Worker]:
    """The process that runs the cases."""
    with closing(Worker()) as worker:
        yield worker


def _path(optimizer: type) -> str:
    if "<locals>" in optimizer.__qualname__:
        raise ValueError(
            f"{optimizer.__qualname__} is made inside a function, where another process cannot "
            "find it: put it at the top of a module"
        )
    return f"{optimizer.__module__}:{optimizer.__qualname__}"


def _as_text(name: str, value: Any) -> str:
    text = f"{name}={value!r}"
    try:
        understood = option(text)[1]
    except ValueError:
        understood = None
    if type(understood) is not type(value) or understood != value:
        raise ValueError(
            f"{text} cannot be handed to another process: give a number, a string, a tuple of such "
            "or a dtype"
        )
    return text
