"""What is installed: the types, the version, the names, and an import that stays small."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata, resources
from pathlib import Path

import pytest

import flatstep
from flatstep.cli import TOOLS

TRAINERS = ("transformers", "lightning", "tensorboard")


@pytest.mark.parametrize("name", ["py.typed", "_core.pyi"])
def test_the_types_are_installed(name: str) -> None:
    assert (resources.files("flatstep") / name).is_file()


def test_the_version_is_the_installed_one() -> None:
    assert flatstep.__version__ == metadata.version("flatstep")


def test_nothing_but_the_package_is_installed() -> None:
    files = metadata.files("flatstep")
    if files is None or any("editable" in str(file) for file in files):
        pytest.skip("not installed from a wheel")
    own = ("flatstep/", f"flatstep-{flatstep.__version__}.dist-info/")
    strays = [str(file) for file in files if not str(file).startswith(own)]
    assert all(Path(stray).parts[-2:] == ("bin", "flatstep") for stray in strays), strays
    kinds = {file.suffix for file in files if str(file).startswith(own[0])}
    page = {".html", ".css", ".js"}
    assert {".py", ".pyi", ".typed"} | page < kinds
    assert kinds <= {".py", ".pyc", ".pyi", ".typed", ".so"} | page


def test_every_public_name_exists() -> None:
    assert len(set(flatstep.__all__)) == len(flatstep.__all__)
    assert [name for name in flatstep.__all__ if not hasattr(flatstep, name)] == []


def test_the_import_leaves_the_tools_alone() -> None:
    # torch may import some of these itself: only what flatstep adds counts.
    code = (
        "import sys, torch; before = set(sys.modules); import flatstep; "
        f"print({{*{TOOLS}, *{TRAINERS}, 'flatstep.profiling'}} & (set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
