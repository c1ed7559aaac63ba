"""The examples run, and show what they are there to show."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch_versions import import_transformers, needs_fully_shard, set_grad_dtype

import flatstep

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


def example(name: str) -> ModuleType:
    for package in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    return example("digits")


@pytest.fixture(scope="module")
def precision() -> ModuleType:
    return example("precision")


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


def test_precision_stalls_without_what_keeps_small_updates(
    precision: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    threads = torch.get_num_threads()
    picture = tmp_path / "precision.svg"
    digits, characters = precision.main(["--steps", "40", "--plot", str(picture)])
    assert torch.get_num_threads() == threads
    for outcomes in (digits, characters):
        held = [outcome.bytes_held for outcome in outcomes.values()]
        assert held == [16, 8, 12, 12, 16, 14, 10]
        assert all(len(outcome.losses) == 40 for outcome in outcomes.values())
        wide = outcomes["f32"]
        assert wide.final() < wide.losses[0]
        for name in list(outcomes)[3:]:
            assert outcomes[name].final() == pytest.approx(wide.final(), abs=0.02), name
    assert digits["bf16"].final() > digits["f32"].final() + 0.02
    assert "<svg" in picture.read_text()
    printed = capsys.readouterr().out
    assert f"{digits['bf16'].final():.4f}" in printed
    assert str(picture) in "".join(printed.split())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_precision_measures_memory(
    precision: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    precision.main(["--memory", "2", "64"])
    printed = capsys.readouterr().out
    assert "2 × Linear(64, 64)" in printed
    assert all(re.search(rf"{re.escape(way)} +\d+ MB", printed) for way in precision.WAYS)


@pytest.mark.parametrize("line", [["--steps", "0"], ["--plot", "no/such/folder/precision.svg"]])
def test_precision_refuses_before_it_trains(
    precision: ModuleType, line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        precision.main(line)
    assert ended.value.code == 2
    assert line[0] in capsys.readouterr().err


def test_profile_training_writes_what_it_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace, lines = tmp_path / "trace.json", tmp_path / "steps.csv"
    prof = example("profile_training").main(
        ["--steps", "4", "--trace", str(trace), "--csv", str(lines)]
    )
    assert "AdamW: 4 steps of 6 tensors, 263,424 parameters" in capsys.readouterr().out
    assert len(lines.read_text().splitlines()) == 1 + len(prof.rows()) == 5
    assert len(json.loads(trace.read_text())["traceEvents"]) > 12


@pytest.mark.parametrize("line", [["--steps", "0"], ["--csv", "no/such/folder/steps.csv"]])
def test_profile_training_refuses_before_it_trains(
    line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        example("profile_training").main(line)
    assert ended.value.code == 2
    assert line[0] in capsys.readouterr().err


def test_gpt_trains_alike_in_all_three(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MPLBACKEND", "Agg")
    gpt = example("gpt")
    monkeypatch.setattr(gpt, "LAYERS", 1)
    picture = tmp_path / "gpt.svg"
    theirs, ours, split = gpt.main(["--steps", "8", "--out", str(picture)]).values()
    assert len(ours.losses) == 8
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-4)
    assert split.losses == pytest.approx(theirs.losses, abs=0.05)
    assert ours.held_out < ours.losses[0]
    assert "<svg" in picture.read_text()
    printed = capsys.readouterr().out
    assert f"{ours.milliseconds('update'):.2f} ms" in printed
    assert f"{split.held_out:.4f}" in printed


@pytest.mark.parametrize("line", [["--steps", "1"], ["--out", "no/such/folder/gpt.svg"]])
def test_gpt_refuses_before_it_trains(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        example("gpt").main(line)
    assert ended.value.code == 2
    assert line[0] in capsys.readouterr().err


# The packages that they need, and the shortest training.
LOOPS = {
    "huggingface": (["transformers", "accelerate"], "--steps", 10),
    "accelerate_loop": (["accelerate"], "--epochs", 2),
    "lightning_module": (["lightning"], "--epochs", 2),
    "titan_loop": ([], "--steps", 20),
}


@pytest.fixture
def importable(name: str) -> None:
    for package in LOOPS[name][0]:
        pytest.importorskip(package)
    if name == "huggingface":
        import_transformers()


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("name", LOOPS)
def test_loops_of_others_learn_and_go_on_from_a_checkpoint(name: str) -> None:
    _, option, length = LOOPS[name]
    # Accelerate and Lightning keep a state for the whole process. On one thread: on a busy machine,
    # steps as small as these wait for each other's threads longer than they take.
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), option, str(length)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    printed = done.stdout
    assert "clipped twice" not in done.stderr
    first, last = re.findall(r"loss: (\S+) at first, (\S+) at last", printed)[0]
    assert float(last) < float(first)
    assert "the same bits" in printed


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("name", LOOPS)
def test_loops_of_others_refuse_before_they_train(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, option, _ = LOOPS[name]
    with pytest.raises(SystemExit) as ended:
        example(name).main([option, "1"])
    assert ended.value.code == 2
    assert option in capsys.readouterr().err


F32, BF16 = torch.float32, torch.bfloat16
# Parameter, gradient, options: the rows of the README's table of bytes per parameter.
ROWS: dict[str, tuple[torch.dtype, torch.dtype, dict[str, Any]]] = {
    "float32": (F32, F32, {}),
    "float32, bfloat16 gradients": (F32, BF16, {}),
    "float32, bfloat16 states": (F32, F32, {"state_dtype": BF16}),
    "bfloat16": (BF16, BF16, {}),
    "bfloat16, float32 states": (BF16, BF16, {"state_dtype": F32}),
    "bfloat16, float32 states, float32 master": (
        BF16,
        BF16,
        {"state_dtype": F32, "master": "float32"},
    ),
    "bfloat16, float32 states, split master": (
        BF16,
        BF16,
        {"state_dtype": F32, "master": "split"},
    ),
    "bfloat16, split master": (BF16, BF16, {"master": "split"}),
}


def bytes_held_and_moved(
    dtype: torch.dtype, grad_dtype: torch.dtype, options: dict[str, Any]
) -> tuple[int, int]:
    """Per parameter, from the arrays that a step leaves behind."""
    param = torch.nn.Parameter(torch.ones(64, dtype=dtype))
    if grad_dtype != dtype:
        set_grad_dtype(param, grad_dtype)
    param.grad = torch.ones(64, dtype=grad_dtype)
    opt = flatstep.AdamW([param], **options)
    opt.step()
    states = [value for value in opt.state[param].values() if value.dim()]
    held = sum(array.element_size() for array in (param, param.grad, *states))
    # All but the gradient is read and written; of a parameter with a copy, the copy is read.
    unread = param.element_size() if options.get("master") == "float32" else 0
    return held, 2 * held - param.grad.element_size() - unread


def test_the_readme_says_how_many_bytes_a_mode_holds_and_moves() -> None:
    readme = (ROOT / "README.md").read_text()
    table = re.findall(r"^\| ([^|]+) \|[^|]*\| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", readme, re.M)
    said = {name: tuple(map(int, rest)) for name, *rest in table}
    found = {
        name: bytes_held_and_moved(dtype, grad, options)
        + bytes_held_and_moved(dtype, grad, {**options, "ema_decay": 0.99})
        for name, (dtype, grad, options) in ROWS.items()
    }
    assert said == found


@needs_fully_shard
def test_fsdp2_trains_as_one_process_does_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    kept = tmp_path / "losses.pt"
    line = [sys.executable, str(EXAMPLES / "fsdp2.py"), "--steps", "12", "--save", str(kept)]
    ended = subprocess.run(line, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    losses = torch.load(kept)
    assert len(losses["alone"]) == len(losses["sharded"]) == 12
    assert losses["sharded"] == pytest.approx(losses["alone"], rel=0.02)
    assert losses["sharded"][-1] < 0.75 * losses["sharded"][0]
    assert "Warning" not in ended.stderr
    assert f"{losses['sharded'][-1]:.4f}" in ended.stdout
    assert "from step 7 on" in ended.stdout


@needs_fully_shard
@pytest.mark.parametrize("line", [["--steps", "1"], ["--save", "no/such/folder/losses.pt"]])
def test_fsdp2_refuses_before_it_trains(
    line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        example("fsdp2").main(line)
    assert ended.value.code == 2
    assert line[0] in capsys.readouterr().err
