"""The example of docs/adding-an-optimizer.md fits the tree as it is."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "adding-an-optimizer.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.skipif(not shutil.which("git"), reason="git is absent")
def test_the_changes_to_files_apply() -> None:
    diff = "".join(blocks("diff"))
    assert diff.count("+++ ") == 4
    found = subprocess.run(
        ["git", "apply", "--check", "-"],
        input=diff,
        text=True,
        capture_output=True,
        cwd=ROOT,
        check=False,
    )
    assert found.returncode == 0, found.stderr


def test_kernel_and_reference_have_the_same_names() -> None:
    (kernel,) = blocks("cpp")
    reference = next(block for block in blocks("diff") if "reference.py" in block)
    scalars = re.search(r"struct Scalars \{\s*T ([^;]*);", kernel)
    assert scalars is not None
    names = re.split(r",\s*", scalars[1])
    assert names == re.findall(r'^\+        "(\w+)":', reference, re.MULTILINE)
    (hyper,) = re.findall(r"kHyperNames\[\] = \{(.*)\}", kernel)
    assert set(re.findall(r'h\["(\w+)"\]', reference)) <= set(re.findall(r'"(\w+)"', hyper))


def test_the_class_imports_what_there_is_from_where_it_is_defined() -> None:
    (text,) = blocks("python")
    imports = [node for node in ast.parse(text).body if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if (node.module or "").startswith("flatstep.")]
    assert len(ours) == 3
    for node in ours:
        module = importlib.import_module(node.module or "")
        for name in node.names:
            assert getattr(module, name.name).__module__ == node.module
