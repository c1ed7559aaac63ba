"""The Python on the pages names what there is and runs, and moved states go on to the same bits."""

from __future__ import annotations

import ast
import builtins
import copy
import importlib
import inspect
import re
import symtable
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Case, assert_same_run, cases, clones, parameters, train
from markdown_it import MarkdownIt

import flatstep

ROOT = Path(__file__).parent.parent
MODEL = torch.nn.Linear(3, 2)

# Pages whose blocks follow one another, and what they take for granted.
GIVEN: dict[str, dict[str, Any]] = {
    "docs/start.md": {},
    "docs/flat-buffers.md": {},
    "docs/frameworks.md": {"torch": torch, "opt": flatstep.AdamW(MODEL.parameters())},
}
MIGRATION = "docs/migration.md"


def blocks(text: Path) -> dict[int, str]:
    """A text's blocks of Python, by their lines."""
    return {
        token.map[0] + 1: token.content
        for token in MarkdownIt("commonmark").parse(text.read_text(encoding="utf-8"))
        if token.type == "fence" and token.info.strip() == "python" and token.map
    }


PAGES = {
    str(text.relative_to(ROOT)): blocks(text)
    for text in [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md"))]
}
BLOCKS = {(page, line): code for page, found in PAGES.items() for line, code in found.items()}


def run(code: str, page: str, names: dict[str, Any]) -> None:
    exec(compile(code, page, "exec"), names)


@pytest.mark.parametrize(("page", "line"), BLOCKS)
def test_a_block_of_python_names_what_there_is(page: str, line: int) -> None:
    for node in ast.walk(ast.parse(BLOCKS[page, line])):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flatstep":
            module = importlib.import_module(node.module or "")
            for alias in node.names:
                assert hasattr(module, alias.name) or find_spec(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Call):
            called = named(node.func)
            for keyword in node.keywords:
                assert called is None or keyword.arg in arguments_of(called), keyword.arg
        elif isinstance(node, ast.Attribute):
            named(node)


def named(node: ast.AST) -> Any:
    """What a name such as `flatstep.functional.adam_` stands for; None where it is another's."""
    if isinstance(node, ast.Name):
        return flatstep if node.id == "flatstep" else None
    if isinstance(node, ast.Attribute):
        owner = named(node.value)
        return None if owner is None else getattr(owner, node.attr)
    return None


def arguments_of(called: Any) -> set[str | None]:
    found: set[str | None] = {None, *inspect.signature(called).parameters}
    return found | set(flatstep.Extras.__annotations__) if "options" in found else found


def is_whole(code: str) -> bool:
    """Whether a block takes no name from what stands before it, and runs at once and anywhere."""
    table = symtable.symtable(code, "block", "exec")
    symbols = [*table.get_symbols()]
    for child in table.get_children():
        symbols += [symbol for symbol in child.get_symbols() if symbol.is_global()]
    bound = {
        symbol.get_name() for symbol in symbols if symbol.is_assigned() or symbol.is_imported()
    }
    names = {symbol.get_name() for symbol in symbols if symbol.is_referenced()}
    imports = re.findall(r"^(?:from|import) ([\w.]+)", code, re.MULTILINE)
    return (
        names <= bound | set(dir(builtins))
        and {name.split(".")[0] for name in imports} <= {"flatstep", "math", "numpy", "torch"}
        and "profiling" not in bound  # it measures for minutes
    )


WHOLE = [
    (page, line) for (page, line), code in BLOCKS.items() if page not in GIVEN and is_whole(code)
]


@pytest.mark.parametrize(("page", "line"), WHOLE)
def test_a_block_that_is_whole_runs(
    page: str, line: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(BLOCKS[page, line], f"{page}:{line}", {"__name__": "__main__"})


@pytest.mark.parametrize("page", GIVEN)
def test_the_python_of_a_page_runs(page: str) -> None:
    names = dict(GIVEN[page])
    with torch.random.fork_rng():
        for code in PAGES[page].values():
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
    adopt, *of_libraries = PAGES[MIGRATION].values()
    for code in (adopt, of_libraries[LIBRARIES.index(as_theirs)]):
        run(code, MIGRATION, names)
    for opt in (before, names["opt"]):
        train(opt, range(4, 8))
    assert_same_run(names["opt"], before)
