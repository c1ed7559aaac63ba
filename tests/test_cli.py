"""The command line says what it found, what to do next, and the right exit code."""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import flatstep
from flatstep import _core, cli

RULES = ", ".join(rule["name"] for rule in _core.rules())


class Result(NamedTuple):
    code: object
    out: str
    err: str


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """Runs a command line in this process, on a wide terminal."""
    monkeypatch.setenv("COLUMNS", "300")

    def run_it(line: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["flatstep", *shlex.split(line)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Result(ended.value.code, *capsys.readouterr())

    return run_it


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the scalar kernel of float32 SGD flip a bit of element 17."""
    real = _core.update

    def update(*args: Any) -> None:
        real(*args)
        if _core.isa() == "scalar" and args[0] == "sgd" and args[2] == 0 and args[6] > 17:
            ctypes.c_uint8.from_address(args[3] + 17 * 4).value ^= 1

    monkeypatch.setattr(_core, "update", update)


def test_help_lists_the_commands(run: Callable[..., Result]) -> None:
    result = run("--help")
    assert result.code == 0
    assert all(command in result.out for command in ("profile", "compare", "verify", "info"))


@pytest.mark.parametrize("tool", cli.TOOLS)
def test_a_missing_tool_is_named_with_the_way_to_get_it(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tool: str
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == tool else find_spec(name)
    )
    result = run("info")
    assert result == (2, "", f"This needs {tool}: pip install 'flatstep[tools]'\n")


def test_info_says_what_is_in_use(run: Callable[..., Result]) -> None:
    result = run("info")
    assert result.code == 0
    for said in (flatstep.__version__, flatstep.cpu_isa(), "torch", "threads", "huge pages"):
        assert said in result.out


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("always [madvise] never\n", "madvise (large buffers ask for them)"),
        ("[always] madvise never\n", "always (all memory gets them)"),
        ("always madvise [never]\n", "echo madvise | sudo tee "),
        (None, "this system does not say"),
    ],
)
def test_info_says_what_the_system_grants(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: str | None, said: str
) -> None:
    path = tmp_path / "enabled"
    if setting is not None:
        path.write_text(setting)
    monkeypatch.setattr(cli, "HUGE_PAGES", path)
    assert said in cli.facts()["huge pages"]


def test_verify_succeeds_and_writes_its_report(run: Callable[..., Result], tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    result = run(f"verify --quick --rule sgd --rule adam --dtype float16 --size 9 --json {path}")
    assert result.code == 0
    report = json.loads(path.read_text())
    assert report["ok"] is True
    assert report["environment"]["flatstep"] == flatstep.__version__
    assert {tally["rule"] for tally in report["tallies"]} == {"sgd", "adam"}
    assert f"All {report['cases']:,} cases have the reference's bytes" in result.out
    assert "torch for-loop" in result.out


@pytest.mark.usefixtures("broken")
def test_verify_shows_the_first_difference_and_how_to_see_it_again(
    run: Callable[..., Result], tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    result = run(f"verify --size 16 --size 33 --dtype float32 --no-torch --seed 7 --json {path}")
    assert result.code == 1
    report = json.loads(path.read_text())
    first = report["mismatches"][0]
    assert (first["rule"], first["isa"], first["size"]) == ("sgd", "scalar", 33)
    assert (first["array"], first["index"]) == ("param", 17)
    said = (first["expected"]["hex"], first["got"]["hex"], first["command"], "param[17]")
    assert all(text in result.out for text in said)
    assert f"{report['mismatched']:,} of {report['cases']:,} cases differ" in result.out
    assert "flatstep info" in result.out

    program, repeat = first["command"].split(maxsplit=1)
    assert program == "flatstep"
    again = run(f"{repeat} --json {path}")
    assert again.code == 1
    repeated = json.loads(path.read_text())
    assert repeated["cases"] == repeated["mismatched"] == 1
    assert repeated["mismatches"] == [first]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--rule adamm", f"those that exist: {RULES}"),
        ("--dtype int8", "those that exist: float32, float64, bfloat16, float16"),
        ("--isa mmx", "those that this build has and this processor runs: scalar"),
        ("--size -1", "size must be at least 0"),
        ("--json /no/such/report.json", "there is no directory /no/such"),
        ("--quik", "--quick"),
    ],
)
def test_verify_refuses_what_does_not_exist(
    run: Callable[..., Result], options: str, said: str
) -> None:
    result = run(f"verify {options}")
    assert result.code == 2
    assert said in result.err


def test_ctrl_c_leaves_what_was_found(
    run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "report.json"
    real, calls = _core.update, iter(range(1000))

    def update(*args: Any) -> None:
        if next(calls) == 500:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setattr(_core, "update", update)
    result = run(f"verify --quick --json {path}")
    assert result.code == 130
    report = json.loads(path.read_text())
    assert report["interrupted"] is True
    assert 0 < report["cases"] < report["planned"]
    assert f"Interrupted after {report['cases']:,} of {report['planned']:,} cases" in result.out


def test_ctrl_c_is_heard_from_the_keyboard() -> None:
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "  # if ignored
        "from flatstep.cli import main; main()"
    )
    command = [sys.executable, "-u", "-c", code, "verify"]
    environment = {**os.environ, "COLUMNS": "100"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None
            assert "cases on" in process.stdout.readline()
            process.send_signal(signal.SIGINT)
            out, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Interrupted after" in out
