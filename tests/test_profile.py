"""`flatstep profile`: its figures follow from each other, and no wrong result gets a time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from torch import Tensor
from typer.testing import CliRunner

import flatstep
from flatstep import profile, reference
from flatstep._torch import HUGE_PAGE, zeros_flat
from flatstep.profile import measure, memory, training
from flatstep.profile.command import profile as command
from flatstep.profile.implementations import OPTIMIZERS, TORCH_PATHS
from flatstep.profile.limit import Pages, Streams, huge_page_share
from flatstep.profile.measure import Race, Timing
from flatstep.profile.workloads import WORKLOADS

TINY = profile.Workload("tiny", "Tiny", ((40, 30), (257,), (), (1,)))
APP = typer.Typer()
APP.command()(command)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(WORKLOADS, "tiny", TINY)
    return


def report(optimizer: str = "adam", dtype: str = "float32", **more: object) -> profile.Report:
    options = {"rounds": 2, "whole_step": False, **more}
    return profile.run([profile.Task(TINY, optimizer, dtype)], **options)


def invoke(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(APP, list(args), env={"COLUMNS": "300", "NO_COLOR": "1"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


# ---- figures


def test_the_figures_follow_from_the_times():
    [case] = report("rmsprop").measured
    assert (case.tensors, case.parameters, case.states) == (4, 1459, 1)
    assert case.bytes_moved == 4 * 1459 * (3 + 2)
    best = min(r.timing.median for r in case.results if not r.ours)
    for result in case.results:
        seconds = result.timing.median
        assert result.timing.least <= result.timing.lower_quartile <= seconds
        assert seconds <= result.timing.upper_quartile <= result.timing.most
        assert result.ns_per_parameter == pytest.approx(1e9 * seconds / 1459)
        assert result.gb_per_s == pytest.approx(case.bytes_moved / seconds / 1e9)
        assert result.to_torch == pytest.approx(seconds / best)
        assert result.of_limit == pytest.approx(case.limits[0].timing.median / seconds)
        assert result.first_step > 0


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_right_result_passes_the_check(optimizer: str, dtype: str):
    found = report(optimizer, dtype, rounds=1)
    wrong_in_torch = {"torch fused"} if (optimizer, dtype) in FAULTS_OF_TORCH else set()
    [case] = found.cases
    assert {r.implementation for r in case.results if r.problem} <= wrong_in_torch
    assert not found.failed
    paths = set(TORCH_PATHS) - ({"torch fused"} if optimizer == "rmsprop" else set())
    assert {r.implementation for r in case.results} == {"flatstep", "flatstep flat"} | paths


#: torch 2.13 leaves most elements as they were
FAULTS_OF_TORCH = {("sgd", "bfloat16"), ("sgd", "float16")}


def test_the_workloads_have_the_shapes_of_the_real_models():
    sizes = {name: (len(w.shapes), w.parameters) for name, w in WORKLOADS.items()}
    assert sizes["gpt2"] == (148, 124_439_808)
    assert sizes["resnet50"] == (161, 25_557_032)
    assert sizes["mlp"] == (6, 10_306)
    assert sizes["many"] == (10_000, 2_560_000)
    assert sizes["flat"] == (1, 1 << 26)


def test_the_default_is_every_workload_and_bfloat16_on_the_large_ones():
    tasks = profile.plan()
    assert {t.workload.name for t in tasks} == set(WORKLOADS)
    assert {t.workload.name for t in tasks if t.dtype == "bfloat16"} == {"gpt2", "flat"}
    assert [t.dtype for t in profile.plan(["gpt2"], ["adam"])] == ["float32"]


def test_the_slow_paths_can_be_left_out():
    names = {r.implementation for r in report(slow_paths=False).cases[0].results}
    assert names == {"flatstep", "flatstep flat", "torch fused"}
    names = {r.implementation for r in report("rmsprop", slow_paths=False).cases[0].results}
    assert names == {"flatstep", "flatstep flat", "torch foreach", "torch for-loop"}


def test_the_number_of_threads_is_put_back():
    assert report(threads=1).machine.threads == 1
    assert torch.get_num_threads() == 2


# ---- timing


def test_a_timing_is_a_median_with_quartiles():
    timing = Timing.of([3.0, 1.0, 2.0, 5.0, 4.0])
    assert (timing.least, timing.lower_quartile, timing.median) == (1, 2, 3)
    assert (timing.upper_quartile, timing.most, timing.rounds) == (4, 5, 5)
    assert Timing.of([2.0]).spread == 0


def test_every_call_takes_its_turn_and_slow_ones_fewer():
    race = Race({"fast": lambda: sum(range(1000)), "slow": lambda: sum(range(1_000_000))})
    race.run(0.5, None, lambda done: None)
    rounds = {name: timing.rounds for name, timing in race.timings().items()}
    assert rounds["fast"] > rounds["slow"] >= 3
    race = Race(race.calls)
    race.run(0.0, 2, lambda done: None)
    assert {timing.rounds for timing in race.timings().values()} == {2}


def test_a_race_that_takes_far_too_long_is_broken_off(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "PATIENCE", 0.0)
    race = Race({name: lambda: time.sleep(0.01) for name in ("one", "other")})
    race.run(0.0, None, lambda done: None)
    assert {timing.rounds for timing in race.timings().values()} == {1}


# ---- the limit


def test_the_limit_moves_zeros_and_leaves_zeros():
    streams = Streams(1 << 16)
    streams.traffic(2, Pages())()
    assert all(not array.any() for array in streams._arrays[False])
    assert len(streams._arrays[False]) == 4


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says what it granted")
def test_huge_pages_are_seen_where_they_are_granted():
    small, large = (zeros_flat(16 << 20, torch.uint8, huge_pages=huge) for huge in (False, True))
    small.zero_()
    large.zero_()
    assert huge_page_share([small]) == 0
    assert 0 <= huge_page_share([small, large]) <= 0.5
    assert huge_page_share([large]) in (0, pytest.approx(1, abs=2 * HUGE_PAGE / large.nbytes))


# ---- wrong results


def spoil(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every step of flatstep's wrong in one element."""
    right = flatstep.Adam.step

    def wrong(self: torch.optim.Optimizer) -> None:
        right(self)
        param: Tensor = self.param_groups[0]["params"][0]
        param.data.view(-1)[0] += 0.01

    monkeypatch.setattr(flatstep.Adam, "step", wrong)


def test_a_wrong_result_gets_no_time(monkeypatch: pytest.MonkeyPatch):
    spoil(monkeypatch)
    found = report()
    [case] = found.cases
    for result in case.results:
        if result.ours:
            assert result.timing is None
            assert result.problem == "wrong result: parameters unlike those of torch's for-loop"
        else:
            assert result.timing is not None
    assert found.failed
    assert found.measured == [case]
    assert len(found.problems) == 2


def test_one_bit_away_from_the_reference_is_wrong(monkeypatch: pytest.MonkeyPatch):
    right = reference.update

    def another(*args: object, **more: object) -> None:
        right(*args, **more)
        args[3].view("uint32")[5] ^= 1

    monkeypatch.setattr(reference, "update", another)
    [case] = report().cases
    problems = {r.problem for r in case.results if r.ours}
    assert problems == {"wrong result: parameters unlike the reference's"}


def test_a_failing_step_is_said(monkeypatch: pytest.MonkeyPatch):
    def fail(self: torch.optim.Optimizer) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(flatstep.Adam, "step", fail)
    [case] = report().cases
    assert case.result("flatstep").problem == "failed: no such kernel"


@pytest.mark.usefixtures("tiny")
def test_the_command_shows_a_wrong_result_and_fails(monkeypatch: pytest.MonkeyPatch):
    spoil(monkeypatch)
    code, output = invoke("--workload", "tiny", "--optimizer", "adam", "--rounds", "1")
    assert code == 1
    assert "wrong result: parameters unlike" in output


# ---- memory


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "bytes_available", lambda: 500_000_000)
    found = profile.run(profile.plan(["flat"], ["sgd"]), whole_step=False)
    [case] = found.cases
    assert case.refused == (
        "needs 4.03 GB of memory, and 0.5 GB are available; what fits: "
        "a model of up to 8.33 M parameters, --workload mlp or many"
    )
    assert not found.measured
    code, output = invoke("--workload", "gpt2", "--optimizer", "adam")
    assert code == 2
    assert "refused: needs" in output


def test_a_smaller_dtype_is_proposed_where_it_fits(monkeypatch: pytest.MonkeyPatch):
    needed = memory.bytes_needed(WORKLOADS["flat"], "adam", torch.float32)
    monkeypatch.setattr(memory, "bytes_available", lambda: int(0.6 * needed))
    refused = memory.refusal(WORKLOADS["flat"], "adam", torch.float32)
    assert refused is not None
    assert "--dtype bfloat16" in refused
    assert memory.refusal(WORKLOADS["flat"], "adam", torch.bfloat16) is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_more_memory_is_taken_than_was_asked_for():
    code = """
import re, torch
from flatstep import profile
from flatstep.profile import memory
workload = profile.Workload("", "", ((1 << 22,),) * 2)
torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], fused=True).step()
most = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = most()
report = profile.run([profile.Task(workload, "adam", "float32")], rounds=1, whole_step=False)
assert not report.problems, report.problems
print((most() - before) * 1024 / memory.bytes_needed(workload, "adam", torch.float32))
"""
    run = [sys.executable, "-c", code]
    share = float(subprocess.run(run, check=True, capture_output=True, text=True).stdout)
    assert 0.5 < share < 1.1


# ---- the whole step


def test_the_whole_step_is_the_sum_of_its_phases():
    model = training.SmallGPT(width=24, depth=1, vocabulary=32, length=8)
    measured = training.new(model)
    training.measure(measured, model, 0.0, 3, lambda done: None)
    assert [r.way for r in measured.results] == list(training.WAYS)
    for result in measured.results:
        assert result.problem is None
        phases = (result.backward, result.step, result.zero_grad)
        assert result.total.least <= sum(p.most for p in phases)
        assert result.total.most >= sum(p.least for p in phases)
        assert result.to_torch == result.total.median / measured.results[0].total.median


# ---- interrupts


def test_an_interrupt_leaves_what_was_measured():
    def interrupt(done: float, label: str) -> None:
        if done > 0.7:
            raise KeyboardInterrupt

    tasks = [profile.Task(TINY, "adam", "float32"), profile.Task(TINY, "sgd", "float32")]
    shown: list[profile.Case] = []
    found = profile.run(
        tasks, rounds=1, whole_step=False, on_progress=interrupt, on_case=shown.append
    )
    assert found.interrupted
    assert found.measured[0].optimizer == "adam"
    assert shown == found.cases


# ---- the command


@pytest.mark.usefixtures("tiny")
def test_the_command_prints_keeps_and_draws(tmp_path: Path):
    kept, drawn = tmp_path / "profile.json", tmp_path / "bars.png"
    options = ["--workload", "tiny", "--rounds", "2", "--json", str(kept), "--plot", str(drawn)]
    code, output = invoke(*options)
    assert code == 0
    for name in ("flatstep flat", "torch fused", "torch for-loop", "limit", "tiny × rmsprop"):
        assert name in output
    found = json.loads(kept.read_text())
    assert [case["optimizer"] for case in found["cases"]] == ["adam", "sgd", "rmsprop"]
    assert found["cases"][0]["results"][0]["timing"]["rounds"] == 2
    assert found["machine"]["isa"] == flatstep.cpu_isa()
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert drawn.stat().st_size > 10_000


def test_the_command_takes_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models_of_mine.py").write_text(
        "import torch\ndef small(): return torch.nn.Linear(20, 10)\nnumber = 3\n"
        "def nothing(): return torch.nn.ReLU()\ndef broken(): raise OSError('no weights')\n"
    )
    code, output = invoke(
        "--model", "models_of_mine:small", "--optimizer", "adamw", "--rounds", "1"
    )
    assert code == 0
    assert "2 tensors, 210 parameters" in output
    for wrong, message in {
        "models_of_mine": "not of the form package.module:callable",
        "models_of_mine:number": "'int' object is not callable",
        "models_of_mine:nothing": "no parameters that are trained",
        "models_of_mine:broken": "OSError: no weights",
        "no_such_module:small": "No module named 'no_such_module'",
    }.items():
        code, output = invoke("--model", wrong)
        assert code == 2
        assert message in output


@pytest.mark.parametrize(
    ("options", "known"),
    [
        (["--workload", "gpt3"], "gpt2, resnet50, mlp, many, flat"),
        (["--optimizer", "lion"], ", ".join(OPTIMIZERS)),
        (["--dtype", "int8"], "float32, float64, bfloat16, float16"),
        (["--plot", "bars.xyz"], ".png"),
        (["--json", "no/such/folder.json"], "there is no directory"),
    ],
)
def test_unknown_names_are_answered_with_the_known_ones(options: list[str], known: str):
    code, output = invoke(*options)
    assert code == 2
    assert known in output


def test_profile_needs_no_tools_to_be_imported():
    code = (
        "import sys, flatstep.profile; "
        "sys.exit(bool({'rich', 'typer', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
