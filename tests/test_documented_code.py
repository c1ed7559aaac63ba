"""The Python on the pages runs, and the states that it moves go on to the same bits."""

from __future__ import annotations

import copy
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Case, assert_same_run, cases, clones, parameters, train

import flatstep

DOCS = Path(__file__).parent.parent / "docs"
MODEL = torch.nn.Linear(3, 2)

# What a page takes for granted.
GIVEN: dict[str, dict[str, Any]] = {
    "start.md": {},
    "flat-buffers.md": {},
    "frameworks.md": {"torch": torch, "opt": flatstep.AdamW(MODEL.parameters())},
}


def blocks(page: str) -> list[str]:
    found = re.findall(
        r"^( *)```python\n(.*?)^\1```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL
    )
    return [textwrap.dedent(code) for _, code in found]


def run(code: str, page: str, names: dict[str, Any]) -> None:
    exec(compile(code, page, "exec"), names)


@pytest.mark.parametrize("page", GIVEN)
def test_the_python_of_a_page_runs(page: str) -> None:
    names = dict(GIVEN[page])
    with torch.random.fork_rng():
        for code in blocks(page):
            run(code, page, names)


Saved = dict[str, Any]


def as_apex(saved: Saved) -> None:
    for state in saved["state"].values():
        step = state.pop("step")
    saved["param_groups"][0]["step"] = int(step)


def as_deepspeed(saved: Saved) -> None:
    for state in saved["state"].values():
        state["step"] = int(state["step"])


def as_bitsandbytes(saved: Saved) -> None:
    for index, (step, *moments) in enumerate(map(dict.values, saved["state"].values())):
        kept = {f"state{number}": moment for number, moment in enumerate(moments, start=1)}
        saved["state"][index] = {"step": int(step), "__bnb_optimizer_quant_state__": kept}


LIBRARIES = [as_apex, as_deepspeed, as_bitsandbytes]  # in the order of the page


@pytest.mark.parametrize("as_theirs", LIBRARIES)
@cases(["AdamW"], ["default"])
def test_the_states_of_another_library_go_on(
    case: Case, as_theirs: Callable[[Saved], None]
) -> None:
    params = parameters(shapes=[(5,), (4, 3)])
    before = case.ours(params)
    train(before, range(4))
    old = copy.deepcopy(before.state_dict())
    as_theirs(old)
    model = torch.nn.ParameterList(clones(params))
    names: dict[str, Any] = {"model": model, "old": old}
    adopt, *of_libraries = blocks("migration.md")
    for code in (adopt, of_libraries[LIBRARIES.index(as_theirs)]):
        run(code, "migration.md", names)
    for opt in (before, names["opt"]):
        train(opt, range(4, 8))
    assert_same_run(names["opt"], before)
