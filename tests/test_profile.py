"""`flatstep profile`: its figures follow from each other, and no wrong result gets a time."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import typer
from torch import Tensor
from typer.testing import CliRunner

import flatstep
from flatstep import _core, profiling, reference
from flatstep._torch import HUGE_PAGE, zeros_flat
from flatstep.optim import extras, table
from flatstep.profiling import command as commands
from flatstep.profiling import limit, measure, memory, passes, results, text, training, works
from flatstep.profiling.command import profile as command
from flatstep.profiling.device import DEVICES, Cpu, Cuda
from flatstep.profiling.implementations import (
    OPTIMIZERS,
    TORCH_PATHS,
    Implementation,
    parameter,
)
from flatstep.profiling.limit import (
    COPIED_AT_ONCE,
    Copies,
    Mix,
    Moved,
    Pages,
    Streams,
    bytes_moved,
    huge_page_share,
)
from flatstep.profiling.measure import Race, Timing, on_the_gpu
from flatstep.profiling.workloads import WORKLOADS

TINY = profiling.Workload("tiny", "Tiny", ((40, 30), (257,), (), (1,)))
ROOT = Path(__file__).parents[1]
APP = typer.Typer()
APP.command()(command)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(WORKLOADS, "tiny", TINY)
    return


def report(optimizer: str = "adam", dtype: str = "float32", **more: object) -> profiling.Report:
    options = {"rounds": 2, "whole_step": False, **more}
    return profiling.run([profiling.Task(TINY, optimizer, dtype)], **options)


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


def test_no_gradient_is_near_zero(monkeypatch: pytest.MonkeyPatch):
    """Of 16 bits, torch 2.11 draws zeros, too; float16's Adam would divide them by zero."""
    monkeypatch.setattr(Tensor, "uniform_", lambda self, low, high: self.zero_())
    grad = parameter((3,), torch.float16, torch.device("cpu")).grad
    assert grad.tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(1.5e-6, "1.50 µs"), (9.9951e-5, "100 µs"), (1e-3 - 1e-12, "1.00 ms"), (0.25, "250 ms")],
)
def test_a_time_has_the_unit_of_what_is_shown(seconds: float, said: str):
    assert text.format_time(seconds) == said


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
    assert sizes["llama-3.2-1b"] == (146, 1_235_814_400)


@pytest.mark.parametrize(("device", "left_out"), [("cpu", {"llama-3.2-1b"}), ("cuda", set())])
def test_the_default_is_what_fits_the_device_and_bfloat16_on_the_large_ones(
    device: str, left_out: set[str]
):
    tasks = profiling.plan(device=device)
    assert {t.workload.name for t in tasks} == set(WORKLOADS) - left_out
    large = {"gpt2", "flat", "llama-3.2-1b"} - left_out
    assert {t.workload.name for t in tasks if t.dtype == "bfloat16"} == large
    assert [t.dtype for t in profiling.plan(["gpt2"], ["adam"], device=device)] == ["float32"]


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


def test_torch_s_paths_share_their_states_but_not_their_counts_of_steps():
    params = [torch.nn.Parameter(torch.ones(3))]
    params[0].grad = torch.ones(3)
    first, second, failed = (
        Implementation(name, torch.optim.Adam(params), params) for name in ("1", "2", "3")
    )
    first.optimizer.step()
    count = first.optimizer.state[params[0]]["step"]
    first.drop_states()
    assert list(first.optimizer.state[params[0]]) == ["step"]
    second.optimizer.step()
    first.share_states(second)
    mine, other = (which.optimizer.state[params[0]] for which in (first, second))
    assert mine["exp_avg"] is other["exp_avg"]
    assert mine["step"] is count
    first.optimizer.step()
    first.drop_states()
    first.share_states(failed)
    first.optimizer.step()
    assert set(first.states()) == {"exp_avg", "exp_avg_sq"}


# ---- memory


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "bytes_available", lambda: 500_000_000)
    found = profiling.run(profiling.plan(["flat"], ["sgd"]), whole_step=False)
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
    needed = memory.bytes_needed(WORKLOADS["flat"], "adam", torch.float32, Cpu())
    monkeypatch.setattr(memory, "bytes_available", lambda: int(0.6 * needed))
    refused = memory.refusal(WORKLOADS["flat"], "adam", torch.float32, Cpu())
    assert refused is not None
    assert "--dtype bfloat16" in refused
    assert memory.refusal(WORKLOADS["flat"], "adam", torch.bfloat16, Cpu()) is None


def least_share(code: str) -> float:
    """What a program prints; the least of a few: a busy machine gives memory back late."""
    shares: list[float] = []
    while len(shares) < 4 and not (shares and min(shares) < 1.1):
        run = [sys.executable, "-c", code]
        shares.append(float(subprocess.run(run, check=True, capture_output=True, text=True).stdout))
    return min(shares)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_more_memory_is_taken_than_was_asked_for():
    code = """
import re, torch
from flatstep import profiling
from flatstep.profiling import memory
from flatstep.profiling.device import Cpu
workload = profiling.Workload("", "", ((1 << 22,),) * 2)
torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], fused=True).step()
most = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = most()
report = profiling.run([profiling.Task(workload, "adam", "float32")], rounds=1, whole_step=False)
assert not report.problems, report.problems
print((most() - before) * 1024 / memory.bytes_needed(workload, "adam", torch.float32, Cpu()))
"""
    assert 0.5 < least_share(code) < 1.1


# ---- the whole step


def test_the_whole_step_is_the_sum_of_its_phases():
    model = training.SmallGPT(width=24, depth=1, vocabulary=32, length=8)
    measured = training.new(model)
    training.measure(measured, model, [], 0.0, 3, lambda done: None)
    assert [r.way for r in measured.results] == list(training.WAYS)
    for result in measured.results:
        assert result.problem is None
        phases = (result.backward, result.step, result.zero_grad)
        assert result.total.least <= sum(p.most for p in phases)
        assert result.total.most >= sum(p.least for p in phases)
        assert result.to_torch == result.total.median / measured.results[0].total.median


# ---- the passes


def tiny_passes(*names: str, **more: object) -> profiling.Report:
    tasks = [profiling.PassTask(TINY, profiling.WORKS[name]) for name in names or profiling.WORKS]
    return profiling.run([], passes=tasks, **{"rounds": 1, "whole_step": False, **more})


#: What a step reads and writes of each parameter, counted by hand.
PASS_BYTES = {
    "norm": 4,
    "norm-inf": 4,
    "step": 28,
    "clip": 4 + 28,
    "skip": 4 + 28,
    "ema": 36,
    "clip-ema": 4 + 36,
    "scaler-clip": 4 + 28,
    "scaler": 4 + 28,
    "scaler-writes": 4 + 32,
    "whole": 4 + 36,
    "bf16-grads": 8 + 2 + 16,
    "f32-states": 4 + 2 + 16,
    "f32-master": 2 + 8 + 2 + 16,
    "split": 4 + 4 + 2 + 16,
    "split-bf16-states": 4 + 4 + 2 + 8,
    "stochastic": 4 + 2 + 8,
}


def test_every_pass_is_right_and_its_figures_follow_from_its_times():
    found = tiny_passes()
    assert not found.problems
    assert {p.name: p.bytes_per_parameter for p in found.passes} == PASS_BYTES
    for measured in found.measured_passes:
        assert (measured.workload, measured.parameters) == ("tiny", 1459)
        seconds = {r.implementation: r.timing.median for r in measured.results}
        names = {"torch", "flatstep", "flatstep flat"}
        assert set(seconds) == names | ({"flatstep to nearest"} & set(seconds))
        assert ("flatstep to nearest" in seconds) == (measured.name == "stochastic")
        for result in measured.results:
            name = result.implementation
            assert result.to_torch == pytest.approx(seconds[name] / seconds["torch"])
            assert result.gb_per_s == pytest.approx(measured.bytes_moved / seconds[name] / 1e9)
            if result.ours:
                [limit] = [x for x in measured.limits if x.pages == result.pages]
                assert result.of_limit == pytest.approx(limit.timing.median / seconds[name])
    assert found.exit_code == 0
    assert len(found.passes) == len(profiling.WORKS)


def test_every_option_of_a_step_has_a_pass():
    asked = set().union(*(work.options for work in profiling.WORKS.values()))
    asked |= {"max_grad_norm"} if any(work.clips for work in profiling.WORKS.values()) else set()
    # What chance starts from and what is raised cost nothing.
    assert asked == set(extras.DEFAULTS) - {"seed", "error_if_nonfinite"}


@pytest.mark.parametrize("name", [name for name in PASS_BYTES if not name.startswith("norm")])
def test_a_pass_with_a_wrong_result_gets_no_time(monkeypatch: pytest.MonkeyPatch, name: str):
    right = flatstep.AdamW.step

    def wrong(self: torch.optim.Optimizer) -> None:
        right(self)
        param: Tensor = self.param_groups[0]["params"][0]
        bits = param.data.view(-1).view({2: torch.int16, 4: torch.int32}[param.itemsize])
        bits[7] += 1

    monkeypatch.setattr(flatstep.AdamW, "step", wrong)
    found = tiny_passes(name)
    [measured] = found.passes
    for result in measured.results:
        assert (result.timing is None) == result.ours
        assert (result.problem or "").startswith("wrong result: " if result.ours else "")
    assert found.failed
    assert found.exit_code == 1


@pytest.mark.parametrize("name", ["norm", "norm-inf", "clip", "skip", "scaler-clip"])
def test_a_wrong_norm_is_seen(monkeypatch: pytest.MonkeyPatch, name: str):
    right = reference.norm_of
    monkeypatch.setattr(reference, "norm_of", lambda *args: 1.0001 * right(*args))
    [measured] = tiny_passes(name).passes
    problems = {r.problem for r in measured.results if r.ours}
    assert problems == {"wrong result: norm unlike the one in double precision"}


def test_a_pass_without_its_work_is_seen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reference, "clip_factor", lambda norm, most: 1.0)
    for name, place in {"clip": "exp_avg", "scaler-clip": "exp_avg"}.items():
        [measured] = tiny_passes(name).passes
        problems = {(r.problem or "").partition(" unlike")[0] for r in measured.results if r.ours}
        assert problems == {f"wrong result: {place}"}


def test_torch_s_calls_do_the_same_work_at_every_turn():
    arrays = works.Arrays(TINY.shapes, torch.float32, torch.float32)
    for name in ("clip", "scaler-clip", "scaler"):
        arrays.reset(arrays.separate)
        torchs, _, _ = works.contenders(profiling.WORKS[name], arrays)
        if torchs.scaler is not None:
            torchs.scaler.scale(torch.zeros(()))
            torchs.scaler.update(1.0)
        norms = []
        for _ in range(20):
            torchs.call()
            norms.append(float(works.total_norm([p.grad for p in arrays.separate], 2)))
        assert norms[-1] == pytest.approx(norms[0], rel=1e-5)
        clips = profiling.WORKS[name].clips
        wanted = works.max_norm(profiling.WORKS[name], arrays) if clips else arrays.norms[2]
        assert norms[0] == pytest.approx(wanted, rel=1e-5)


def test_no_master_has_to_follow_what_torch_writes(monkeypatch: pytest.MonkeyPatch):
    followed: list[int] = []
    right = table.reconcile
    monkeypatch.setattr(table, "reconcile", lambda masters: followed.append(1) or right(masters))
    assert not tiny_passes("f32-master", rounds=1).problems  # the first of all counts bytes, too
    followed.clear()
    counts = []
    for rounds in (1, 9):
        assert not tiny_passes("f32-master", rounds=rounds).problems
        counts.append(len(followed))
        followed.clear()
    assert counts[0] == counts[1]


def test_streams_stand_for_the_arrays_of_a_pass():
    # AdamW's in float32, exactly: parameters and both states are written too.
    assert Mix.of(Moved(8, 4, 16)) == Mix(1, 1, 2, 4)
    assert Mix.of(Moved(8, 4, 24)) == Mix(1, 1, 3, 4)
    for moved in (Moved(4, 2, 20), Moved(0, 4, 0), Moved(2, 2, 24), Moved(800, 200, 1600)):
        mix = Mix.of(moved)
        assert mix.params + mix.grads + mix.states <= 5
        streams = 2 * mix.params + mix.grads + 2 * mix.states
        assert abs(mix.size * streams - sum(moved)) <= streams / 2
    walks = [Moved(grads=1 << 16), Moved(1 << 16, 0, 1 << 17)]
    streams = Streams(max(Mix.of(walk).nbytes for walk in walks))
    streams.walks(walks, Pages())()
    with pytest.raises(RuntimeError, match="exceeds"):
        streams.walks([Moved(1 << 17, 0, 1 << 17)], Pages())
    assert all(not array.any() for array in streams._arrays[False])


def test_a_pass_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "bytes_available", lambda: 500_000_000)
    found = profiling.run([], passes=profiling.plan_passes(["clip"], ["gpt2"]), whole_step=False)
    [measured] = found.passes
    assert measured.refused is not None
    assert measured.refused.endswith(
        "0.5 GB are available; what fits: --workload of up to 6.94 M parameters with --pass clip"
    )
    assert found.exit_code == 2
    code, output = invoke("--pass", "clip")
    assert code == 2
    assert "resnet50, pass clip: refused: needs" in output


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["clip-ema", "stochastic"])
def test_a_pass_takes_no_more_memory_than_was_asked_for(name: str):
    code = f"""
import re, torch
from flatstep import profiling
from flatstep.profiling.passes import _size
workload = profiling.Workload("", "", ((1 << 22,),) * 2)
torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], fused=True).step()
most = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
task = profiling.PassTask(workload, profiling.WORKS["{name}"])
needed = _size(task.work).needed * workload.parameters
before = most()
report = profiling.run([], passes=[task], rounds=1, whole_step=False)
assert not report.problems, report.problems
print((most() - before) * 1024 / needed)
"""
    assert 0.5 < least_share(code) < 1.1


@pytest.mark.usefixtures("tiny")
def test_the_command_measures_the_passes_that_are_asked_for(tmp_path: Path):
    kept = tmp_path / "profile.json"
    chosen = ["--workload", "tiny", "--rounds", "1"]
    asked = ["--pass", "stochastic", "--pass", "norm"]
    code, output = invoke(*chosen, *asked, "--json", str(kept))
    assert code == 0
    for said in (
        "One pass, beside the torch calls that it replaces",
        "norm of the gradients, f32",
        "÷ flatstep to nearest",
        " bytes ",
    ):
        assert said in output
    found = profiling.Report.from_dict(json.loads(kept.read_text()))
    assert [p.name for p in found.passes] == ["norm", "stochastic"]
    assert not found.cases
    assert found.training is None
    assert found.as_dict() == json.loads(kept.read_text())
    assert invoke("--load", str(kept)) == (0, output)
    assert "norm of the gradients, f32" in text.plain_passes(found.passes)
    code, output = invoke(*chosen, "--pass", "norm", "--optimizer", "sgd")
    assert code == 0
    assert "Tiny × sgd" in output
    assert "norm of the gradients" in output


def test_the_passes_are_measured_where_nothing_else_is_chosen(monkeypatch: pytest.MonkeyPatch):
    asked: list[list[str]] = []

    def run(tasks: object, *, passes: list[profiling.PassTask], **_: object) -> profiling.Report:
        asked.append([task.work.name for task in passes])
        return profiling.Report(results.Machine("", 1, 1, "", "", "", ""))

    monkeypatch.setattr(commands, "run", run)
    for options in (
        [],
        ["--no-passes"],
        ["--workload", "mlp"],
        ["--workload", "mlp", "--pass", "all"],
    ):
        invoke(*options)
    assert asked == [list(profiling.WORKS), [], [], list(profiling.WORKS)]


def test_passes_are_neighbours_where_they_share_their_tensors():
    tasks = profiling.plan_passes(["split", "norm", "bf16-grads", "clip"], ["mlp", "many"])
    names = ["norm", "clip", "bf16-grads", "split"]
    assert [task.work.name for task in tasks] == 2 * names
    assert {task.workload.name for task in profiling.plan_passes()} == {passes.WORKLOAD_BY_DEFAULT}


def test_an_unknown_pass_is_answered_with_the_known_ones():
    code, output = invoke("--pass", "lion")
    assert code == 2
    assert f"no pass 'lion'; there are {', '.join(profiling.WORKS)}" in output
    code, output = invoke("--pass", "norm", "--no-passes")
    assert code == 2
    assert "exclude each other" in output


# ---- on a GPU: no test here runs anything on one; a stand-in takes its place, or a virtual clock


class VirtualEvent:
    """An event of a stream that works through what was launched, by a clock of its own."""

    now = 0.0  # seconds
    log: ClassVar[list[str]] = []

    def __init__(self, enable_timing: bool):
        assert enable_timing
        self.time: float | None = None
        self.waited = False

    def record(self) -> None:
        self.log.append("record")
        self.time = VirtualEvent.now

    def synchronize(self) -> None:
        self.log.append("synchronize")
        self.waited = True

    def elapsed_time(self, end: VirtualEvent) -> float:
        assert end.waited
        return 1e3 * (end.time - self.time)


@pytest.fixture
def virtual_clock(monkeypatch: pytest.MonkeyPatch) -> type[VirtualEvent]:
    monkeypatch.setattr(VirtualEvent, "now", 0.0)
    monkeypatch.setattr(VirtualEvent, "log", [])
    monkeypatch.setattr(torch.cuda, "Event", VirtualEvent)
    return VirtualEvent


def launch(name: str, seconds: float) -> Callable[[], None]:
    def run() -> None:
        VirtualEvent.log.append(name)
        VirtualEvent.now += seconds

    return run


def test_a_gpu_s_time_is_that_between_two_events(virtual_clock: type[VirtualEvent]):
    assert on_the_gpu(launch("step", 0.003), 4) == pytest.approx(0.003)
    assert virtual_clock.log == ["record", *["step"] * 4, "record", "synchronize"]


def test_a_race_on_a_gpu_takes_turns_by_its_clock(virtual_clock: type[VirtualEvent]):
    race = Race({"one": launch("one", 0.004), "other": launch("other", 0.002)}, on_the_gpu)
    race.run(0.0, 6, lambda done: None)
    samples = " ".join(virtual_clock.log).split("synchronize")
    turns = [sample.split()[1] for sample in samples if sample][-12:]  # the first ones calibrate
    rounds = list(zip(turns[::2], turns[1::2], strict=True))
    assert set(rounds) == {("one", "other"), ("other", "one")}
    timings = race.timings()
    assert timings["one"].median == pytest.approx(0.004)
    assert timings["other"].median == pytest.approx(0.002)
    assert {timing.rounds for timing in timings.values()} == {6}


class HostEvent:
    """An event of a device that has done everything when it is asked."""

    recorded = 0

    def __init__(self, enable_timing: bool):
        self.time = 0.0

    def record(self) -> None:
        HostEvent.recorded += 1
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: HostEvent) -> float:
        return 1e3 * (end.time - self.time)


class StandIn(Cuda):
    """Goes the way of a GPU, with tensors on the host and torch's answers made up."""

    def __init__(self) -> None:
        super().__init__()
        self.where = torch.device("cpu")

    @staticmethod
    def absence() -> None:
        """None: it is there."""


GIVEN = {
    "current_device": 0,
    "get_device_name": "Stand-in",
    "mem_get_info": (10_000_000_000, 20_000_000_000),
    "memory_reserved": 3000,
    "memory_allocated": 1000,
    "max_memory_allocated": 13_672,
    "reset_peak_memory_stats": None,
    "empty_cache": None,
}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, answer in GIVEN.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(HostEvent, "recorded", 0)
    monkeypatch.setattr(torch.cuda, "Event", HostEvent)
    monkeypatch.setattr(torch.version, "cuda", "99.0")
    monkeypatch.setitem(DEVICES, "cuda", StandIn)


@pytest.mark.usefixtures("stand_in")
def test_the_figures_of_a_gpu_follow_from_its_times_and_its_copies():
    found = report(device="cuda", whole_step=None, rounds=3)
    assert HostEvent.recorded >= 2 * (5 + 6 + 6 * 3)  # first steps, calibrations, turns
    assert (found.machine.device, found.machine.gpu, found.machine.cuda) == (
        "cuda",
        "Stand-in",
        "99.0",
    )
    assert found.training is None
    assert [what.partition(":")[0] for what in found.left_out] == [
        "the whole step",
        "the passes",
        "threads and pages",
    ]
    [case] = found.measured
    [limit] = case.limits
    assert (limit.pages, limit.granted) == (None, True)
    assert limit.gb_per_s == pytest.approx(case.bytes_moved / limit.timing.median / 1e9)
    assert {r.implementation for r in case.results} == {"flatstep", "flatstep flat", *TORCH_PATHS}
    for result in case.results:
        assert result.problem is None
        assert result.of_limit == pytest.approx(limit.timing.median / result.timing.median)
        assert result.most_bytes == 12_672
        assert result.pages is None


@pytest.mark.usefixtures("stand_in")
def test_a_wrong_result_on_a_gpu_gets_no_time(monkeypatch: pytest.MonkeyPatch):
    spoil(monkeypatch)
    [case] = report(device="cuda").cases
    assert {r.implementation for r in case.results if r.timing is None} == {
        "flatstep",
        "flatstep flat",
    }


@pytest.mark.usefixtures("stand_in")
def test_what_does_not_fit_on_a_gpu_is_refused():
    [case] = profiling.run(profiling.plan(["llama-3.2-1b"], ["adam"]), device="cuda").cases
    assert case.refused is not None
    needed = 4 * 12 * case.parameters + 2 * COPIED_AT_ONCE
    assert f"needs {needed / 1e9:.3g} GB of memory, and 10 GB are available" in case.refused
    available = (GIVEN["mem_get_info"][0] + 2000 - 2 * COPIED_AT_ONCE) // (4 * 12)
    assert f"a model of up to {available / 1e6:.3g} M parameters, --workload gpt2" in case.refused


@pytest.mark.usefixtures("stand_in")
def test_what_is_for_the_cpu_is_refused_on_a_gpu():
    norm = profiling.plan_passes(["norm"], ["mlp"])
    for wrong, value in {"threads": 1, "whole_step": True, "passes": norm}.items():
        with pytest.raises(ValueError, match=f"{wrong} is for device 'cpu': leave it out"):
            report(**{"device": "cuda", wrong: value})


@pytest.mark.parametrize(
    ("cuda", "is_there", "kernels", "advice"),
    [
        (None, False, 0, "is built without CUDA: install a build with it"),
        ("13.0", False, 1, "torch finds no GPU here: see that nvidia-smi lists one"),
        ("13.0", True, 0, "-C cmake.define.FLATSTEP_CUDA=ON insists on it"),
    ],
)
def test_a_missing_gpu_is_answered_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, is_there: bool, kernels: int, advice: str
):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_there)
    monkeypatch.setattr(_core, "gpu_count", lambda: kernels)
    with pytest.raises(ValueError, match="device 'cuda' cannot be measured") as raised:
        report(device="cuda")
    assert advice in str(raised.value)
    code, output = invoke("--device", "cuda")
    assert code == 2
    assert "cannot be measured" in output


def test_copies_move_half_an_update_s_bytes_each_way(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(limit, "COPIED_AT_ONCE", 1000)
    copies = Copies(size=600, where=torch.device("cpu"))
    moved: list[int] = []
    real = Tensor.copy_

    def copy_(self: Tensor, other: Tensor) -> Tensor:
        assert self.data_ptr() != other.data_ptr()
        moved.append(self.nbytes)
        return real(self, other)

    monkeypatch.setattr(Tensor, "copy_", copy_)
    copies.traffic(2)()
    assert moved == [1000, 1000, 100]
    assert 2 * sum(moved) == bytes_moved(600, 2) == 7 * 600


@pytest.mark.usefixtures("tiny", "stand_in")
def test_the_command_names_the_gpu_in_all_that_it_leaves(tmp_path: Path):
    kept, drawn = tmp_path / "profile.json", tmp_path / "bars.svg"
    chosen = ["--device", "cuda", "--workload", "tiny", "--optimizer", "adam", "--rounds", "1"]
    code, output = invoke(*chosen, "--json", str(kept), "--plot", str(drawn))
    assert code == 0
    for said in ("Stand-in, CUDA 99.0", "peak MB", "left out on cuda: the whole step", "limit"):
        assert said in output
    assert "pages   " not in output
    assert json.loads(kept.read_text())["machine"]["gpu"] == "Stand-in"
    assert "this GPU's memory" in drawn.read_text()
    assert "Stand-in" in drawn.read_text()


@pytest.mark.usefixtures("tiny")
def test_kept_figures_are_shown_and_drawn_elsewhere(tmp_path: Path):
    kept, drawn = tmp_path / "profile.json", tmp_path / "bars.png"
    chosen = ["--workload", "tiny", "--optimizer", "adam", "--rounds", "1"]
    code, first = invoke(*chosen, "--json", str(kept))
    assert code == 0
    code, again = invoke("--load", str(kept), "--plot", str(drawn))
    assert (code, again) == (0, first)
    assert drawn.read_bytes().startswith(b"\x89PNG")
    report = profiling.Report.from_dict(json.loads(kept.read_text()))
    assert report.as_dict() == json.loads(kept.read_text())
    kept.write_text('{"figures": []}')
    for wrong, message in {
        (): "these are not the figures of a profile",
        ("--workload", "tiny"): "--load measures nothing",
    }.items():
        code, output = invoke("--load", str(kept), *wrong)
        assert code == 2
        assert message in output


def test_figures_kept_by_an_earlier_version_can_be_shown():
    kept = list((ROOT / "benchmarks" / "results").glob("cpu-*.json"))
    assert kept
    for path in kept:
        found = profiling.Report.from_dict(json.loads(path.read_text()))
        assert found.machine.device == "cpu"
        assert found.measured


def test_plain_lines_need_no_tools(tmp_path: Path):
    kept = tmp_path / "profile.json"
    code = (
        "import sys, runpy; "
        "sys.modules.update(dict.fromkeys(['rich', 'typer', 'matplotlib'])); "
        "runpy.run_module('flatstep.profiling', run_name='__main__')"
    )
    chosen = ["--workload", "mlp", "--optimizer", "sgd", "--rounds", "1", "--no-slow-paths"]
    chosen += ["--pass", "norm"]
    run = [sys.executable, "-c", code, *chosen, "--json", str(kept)]
    done = subprocess.run(run, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for said in (
        "Small MLP × sgd, float32",
        "torch fused",
        "of limit",
        "norm of the gradients, f32",
        flatstep.__version__,
    ):
        assert said in done.stdout
    assert profiling.Report.from_dict(json.loads(kept.read_text())).measured


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
@pytest.mark.parametrize(
    "command",
    [
        ["-m", "flatstep.profiling", "--device", "cuda"],
        [str(ROOT / "benchmarks" / "gpu_targets.py")],
        [str(ROOT / "benchmarks" / "gpu_forms.py")],
    ],
    ids=["profile", "targets", "forms"],
)
def test_without_a_gpu_the_commands_say_so(command: list[str]):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    assert done.returncode == 2
    assert "device 'cuda' cannot be measured" in done.stderr


# ---- interrupts


def test_an_interrupt_leaves_what_was_measured():
    def interrupt(done: float, label: str) -> None:
        if done > 0.7:
            raise KeyboardInterrupt

    tasks = [profiling.Task(TINY, "adam", "float32"), profiling.Task(TINY, "sgd", "float32")]
    shown: list[profiling.Case] = []
    found = profiling.run(
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
        (["--device", "tpu"], "cpu, cuda"),
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
        "import sys, flatstep.profiling; "
        "sys.exit(bool({'rich', 'typer', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
