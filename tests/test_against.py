"""`flatstep profile --against`: anybody's optimizer is raced, and none takes the tool down."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import typer
from torch.nn import Parameter
from typer.testing import CliRunner

from flatstep import profiling
from flatstep.profiling import memory, probe, text, training
from flatstep.profiling.command import profile as command
from flatstep.profiling.device import Cpu
from flatstep.profiling.implementations import build_named, hyperparameters
from flatstep.profiling.measure import Race
from flatstep.profiling.workloads import WORKLOADS
from flatstep.subjects import Subject, subject_of

TINY = profiling.Workload("tiny", "Tiny", ((40, 30), (257,), (1,)))
APP = typer.Typer()
APP.command()(command)

MODULE = '''
import os
import torch

class SlowAdam(torch.optim.Adam):
    """Right, and with states of its own."""
    def step(self, closure=None):
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            self.state[p]["scratch"] = object()

class WrongAdam(torch.optim.Adam):
    def step(self, closure=None):
        super().step(closure)
        self.param_groups[0]["params"][0].data.view(-1)[0] += 0.01

class NoAdam:
    def __init__(self, params, lr):
        raise OSError("no libcudart")

class ExitingAdam(torch.optim.Adam):
    def step(self, closure=None):
        raise SystemExit(3)

class CrashingAdam(torch.optim.Adam):
    def step(self, closure=None):
        os.abort()

class LeavingAdam(torch.optim.Adam):
    def step(self, closure=None):
        os._exit(0 if len(self.param_groups[0]["params"]) > 4 else 7)

class TiredAdam(torch.optim.Adam):
    """Right while it is checked."""
    steps = 0
    def step(self, closure=None):
        self.steps += 1
        if self.steps > 2:
            raise RuntimeError("out of luck")
        return super().step(closure)

class VandalAdam(torch.optim.Adam):
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.grad.fill_(float("nan"))
            p.data.fill_(float("inf"))
            p.grad = None
            p.data = torch.zeros(())

class SlowAdamW(torch.optim.AdamW):
    pass

class WrongAdamW(torch.optim.AdamW):
    def step(self, closure=None):
        super().step(closure)
        self.param_groups[0]["params"][0].data.view(-1)[0] += 0.01

class VandalAdamW(torch.optim.AdamW):
    step = VandalAdam.step

class WastefulAdam(torch.optim.Adam):
    def step(self, closure=None):
        torch.ones(100_000_000, dtype=torch.uint8)
        return super().step(closure)
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of optimizers in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "optimizers_of_mine.py").write_text(MODULE)
    monkeypatch.delitem(sys.modules, "optimizers_of_mine", raising=False)
    return "optimizers_of_mine"


def report(
    subjects: Sequence[Subject], workload: profiling.Workload = TINY, optimizer: str = "adam"
) -> profiling.Report:
    return profiling.run(
        [profiling.Task(workload, optimizer, "float32")],
        against=subjects,
        rounds=2,
        slow_paths=False,
        whole_step=False,
    )


def invoke(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(APP, list(args), env={"COLUMNS": "300", "NO_COLOR": "1"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture(autouse=True)
def _untried(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process for every optimizer of every test would take minutes."""
    if "tried" not in request.keywords:
        monkeypatch.setattr(probe, "tried", lambda subject, device: subject)


# ---- what is named


@pytest.mark.parametrize(
    ("text", "rule", "options"),
    [
        ("torch.optim:AdamW", "adamw", {}),
        ("torch.optim:AdamW,fused=True", "adamw", {"fused": True}),
        (
            "torch.optim:Adam, betas=(0.8, 0.9), lr=0.1",
            "adam",
            {"betas": (0.8, 0.9), "lr": 0.1},
        ),
        ("adam=torch.optim:NAdam,eps=1e-6", "adam", {"eps": 1e-6}),
    ],
)
def test_one_word_names_a_class_its_options_and_its_rule(
    text: str, rule: str, options: dict[str, object]
):
    found = subject_of(text)
    assert (found.rule, found.options) == (rule, options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("torch.optim:LBFGS", "say it before, as in RULE=torch.optim:LBFGS, one of adamw"),
        ("lion=torch.optim:Adam", "no rule 'lion'"),
        ("torch.optim:Adam,fused", "'fused' is not of the form name=value"),
        ("torch.optim:Atom", "torch.optim:Atom cannot be found"),
    ],
)
def test_what_cannot_be_read_is_answered_with_what_can(text: str, message: str):
    with pytest.raises(ValueError, match=message):
        subject_of(text)


def test_a_named_class_is_built_to_do_what_torchs_does():
    built: list[dict[str, object]] = []

    class Other(torch.optim.AdamW):
        def __init__(self, params: object, lr: float = 0.5, betas: tuple[float, float] = (0, 0)):
            built.append({"lr": lr, "betas": betas})
            super().__init__(params, lr=lr, betas=betas)

    class Any(torch.optim.SGD):
        def __init__(self, params: object, **more: object):
            built.append(more)
            super().__init__(params, **more)

    param = Parameter(torch.zeros(1))
    for cls, rule, options in [(Other, "adamw", {"lr": 0.25}), (Any, "sgd", {})]:
        subject = Subject("", rule, options)
        subject.__dict__["build"] = cls
        build_named(subject, rule, [param])
    assert built == [{"lr": 0.25, "betas": (0.9, 0.999)}, {"momentum": 0.9}]
    assert hyperparameters(subject_of("torch.optim:RMSprop"), "rmsprop") == {
        "lr": 0.01,
        "alpha": 0.99,
        "eps": 1e-8,
        "weight_decay": 0,
        "momentum": 0,
    }


# ---- the race


@pytest.mark.tried
@pytest.mark.parametrize(
    ("name", "how"), [("CrashingAdam", "with SIGABRT"), ("LeavingAdam", "with exit code 7")]
)
def test_an_optimizer_that_ends_its_process_does_not_end_this_one(mine: str, name: str, how: str):
    [case] = report([subject_of(f"{mine}:{name}"), subject_of(f"{mine}:SlowAdam")]).measured
    *_, crashed, right = case.results
    assert crashed.timing is None
    assert crashed.problem is not None
    assert f"3 steps over 4 small tensors ended its process {how}" in crashed.problem
    assert f"`flatstep verify --optimizer {mine}:{name}`" in crashed.problem
    assert right.problem is None


@pytest.mark.tried
def test_an_optimizer_that_hangs_is_not_waited_for(mine: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probe, "MOST_SECONDS", 0.1)
    found = probe.tried(subject_of(f"{mine}:SlowAdam"), "cpu")
    with pytest.raises(RuntimeError, match="did not end within 0 s"):
        found([])


def test_a_named_optimizer_is_raced_where_its_rule_is(mine: str):
    subjects = [subject_of(f"{mine}:SlowAdam,foreach=False"), subject_of("torch.optim:SGD")]
    [case] = report(subjects).measured
    names = ["flatstep flat", "flatstep", "torch fused", f"{mine}.SlowAdam, foreach=False"]
    assert [result.implementation for result in case.results] == names
    *_, torchs, named = case.results
    assert named.problem is None
    assert named.to_torch == pytest.approx(named.timing.median / torchs.timing.median)
    assert named.of_limit == pytest.approx(case.limits[0].timing.median / named.timing.median)
    assert case.torch_best() is torchs
    assert not named.ours
    assert not named.of_torch


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("WrongAdam", "wrong result: parameters unlike those of torch's for-loop (built with lr="),
        ("NoAdam", "failed: OSError: no libcudart (built with lr=0.001)"),
        ("ExitingAdam", "failed: SystemExit: 3"),
        ("TiredAdam", "failed: out of luck"),
        ("VandalAdam", "failed: "),
    ],
)
def test_a_broken_optimizer_gets_no_time_and_takes_nobody_down(mine: str, name: str, problem: str):
    found = report([subject_of(f"{mine}:{name}"), subject_of("torch.optim:Adam")])
    [case] = found.measured
    broken = case.result(f"{mine}.{name}")
    assert (broken.problem or "").startswith(problem)
    assert broken.timing is None
    others = [result for result in case.results if result is not broken]
    assert len(others) == 4
    assert all(result.problem is None and result.timing is not None for result in others)
    assert not found.failed
    assert found.exit_code == 0


def test_flatsteps_own_class_with_options_is_a_named_one():
    [case] = report([subject_of("flatstep:Adam,state_dtype=torch.bfloat16")]).measured
    named = case.results[-1]
    assert not named.ours
    assert case.result("flatstep").problem is None


def test_a_call_that_raises_drops_out_of_a_race():
    turns: list[str] = []

    def raises() -> None:
        if len(turns) > 40:
            raise RuntimeError("enough")

    race = Race({"good": lambda: turns.append("good"), "bad": raises, "worse": lambda: 1 / 0})
    race.run(0.0, 3, lambda done: None)
    assert race.failures["worse"] == "failed: ZeroDivisionError: division by zero"
    assert set(race.timings()) == {"good"}
    race = Race({"worse": lambda: 1 / 0})
    race.run(0.0, 3, lambda done: None)
    assert race.timings() == {}


def test_a_named_optimizer_trains_the_model_too(mine: str):
    model = training.SmallGPT(width=24, depth=1, vocabulary=32, length=8)
    measured = training.new(model)
    named = [subject_of(f"{mine}:{name}") for name in ("SlowAdam", "WrongAdam", "NoAdam")]
    training.measure(measured, model, named, 0.0, 2, lambda done: None)
    by_way = {result.way: result for result in measured.results}
    assert list(by_way) == [*training.WAYS, *(subject.label for subject in named)]
    assert by_way[named[0].label].to_torch is not None
    assert by_way[named[1].label].problem == "wrong result: parameters unlike torch's"
    assert by_way[named[2].label].problem == "failed: OSError: no libcudart"
    assert by_way["torch fused"].forward.median > 0


@pytest.mark.parametrize("name", ["step", "clip-ema", "whole", "f32-master"])
def test_a_named_adamw_takes_the_place_of_torchs_in_a_pass(mine: str, name: str):
    named = ["SlowAdamW", "WrongAdamW", "VandalAdamW"]
    found = profiling.run(
        [],
        passes=[profiling.PassTask(TINY, profiling.WORKS[name])],
        against=[subject_of(f"{mine}:{each}") for each in named],
        rounds=2,
        whole_step=False,
    )
    [measured] = found.passes
    for each in ("torch", "flatstep", "flatstep flat", f"{mine}.SlowAdamW"):
        assert measured.result(each).problem is None
        assert measured.result(each).timing is not None
    assert measured.result(f"{mine}.WrongAdamW").problem.startswith("wrong result: parameters")
    assert measured.result(f"{mine}.VandalAdamW").problem.startswith("failed: ")
    assert found.exit_code == 0
    assert f"with {mine}.SlowAdamW" in text.plain_passes(found.passes)
    assert {part.implementation for part in measured.parts} == (
        {"unscale_", "clip_grad_norm_", "AdamW(fused)", "swa_utils' EMA"}
        if name == "whole"
        else set()
    )


def test_what_goes_wrong_everywhere_is_said_once(mine: str):
    passes = [profiling.PassTask(TINY, profiling.WORKS[name]) for name in ("step", "ema", "clip")]
    against = [subject_of(f"{mine}:VandalAdamW")]
    found = profiling.run([], passes=passes, against=against, rounds=1, whole_step=False)
    assert len(found.problems) == 3
    [line] = text.problem_lines(found)
    assert line.startswith(f"tiny, pass step, {mine}.VandalAdamW: failed: ")
    assert line.endswith("; and so in 2 other races")


# ---- memory


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_what_a_step_takes_and_gives_back_is_seen(mine: str):
    workload = profiling.Workload("", "", ((1 << 22,),))
    plain, wasteful = (subject_of(f"{mine}:{name}") for name in ("SlowAdam", "WastefulAdam"))
    [case] = report([plain, wasteful], workload).measured
    states = 2 * 4 * workload.parameters
    taken = {result.implementation: result.most_bytes for result in case.results}
    for name in ("flatstep", "flatstep flat"):
        assert 0.9 * states < taken[name] < 1.4 * states
    more = taken[wasteful.label] - taken[plain.label]
    # The waste is over before the states are made, so those that come with the first step hide it.
    assert taken[wasteful.label] > 100_000_000
    assert more > 100_000_000 - 2 * states


def test_the_tensors_of_named_optimizers_are_asked_for():
    alone = memory.bytes_needed(TINY, "adam", torch.float32, Cpu())
    beside = memory.bytes_needed(TINY, "adam", torch.float32, Cpu(), named=2)
    assert beside - alone == 2 * (2 + 2) * 4 * TINY.parameters


# ---- the command


def test_the_command_races_what_is_named(mine: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(WORKLOADS, "tiny", TINY)
    options = ["--workload", "tiny", "--rounds", "1", "--against", f"{mine}:WrongAdam"]
    code, output = invoke(*options, "--against", "torch.optim:AdamW,foreach=True")
    assert code == 0
    for said in (
        "Tiny × adam, float32",
        "Tiny × adamw, float32",
        "torch.optim.AdamW, foreach=True",
        f"tiny × adam, float32, {mine}.WrongAdam: wrong result: parameters unlike",
    ):
        assert said in output
    assert "rmsprop" not in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--against", "torch.optim"], "is not of the form package.module:callable"),
        (["--against", "torch.optim:LBFGS"], "say it before, as in RULE=torch.optim:LBFGS"),
        (
            ["--against", "torch.optim:SGD", "--optimizer", "adam"],
            "torch.optim:SGD follows sgd, which is not measured: choose --optimizer sgd too",
        ),
    ],
)
def test_what_cannot_be_raced_is_said_before_anything_runs(options: list[str], message: str):
    code, output = invoke(*options)
    assert code == 2
    assert message in output
