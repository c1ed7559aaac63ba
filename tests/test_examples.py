"""The examples run, and show what they are there to show."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    for package in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location("digits", EXAMPLES / "digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "rmsprop", "sgd"])
def test_digits_trains_alike_with_both(
    digits: ModuleType, optimizer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs, ours = digits.main(["--optimizer", optimizer, "--epochs", "3"])
    assert len(ours.losses) == 3
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-3)
    for outcome in (theirs, ours):
        assert outcome.losses[0] > outcome.losses[1] > outcome.losses[2]
        assert outcome.accuracy > 0.8
    printed = capsys.readouterr().out
    assert f"{ours.losses[-1]:.6f}" in printed
    assert "test accuracy" in printed


def test_digits_draws_its_losses(
    digits: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    picture = tmp_path / "digits.png"
    digits.main(["--epochs", "3", "--plot", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("line", [["--epochs", "0"], ["--plot", "no/such/folder/digits.png"]])
def test_digits_refuses_before_it_trains(
    digits: ModuleType, line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        digits.main(line)
    assert ended.value.code == 2
    assert line[0] in capsys.readouterr().err
