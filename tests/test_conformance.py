"""The conformance suite passes good optimizers, and finds every fault where it begins."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from flatstep import cli, conformance
from flatstep.conformance import CASES, Outcome, Result
from flatstep.conformance.lab import USUAL, Lab
from flatstep.conformance.registry import FLOATS
from flatstep.conformance.runner import Worker, run_case
from flatstep.conformance.truth import Distance, Truth
from flatstep.subjects import RULES, Subject

pytest_plugins = ["pytester"]

HERE = Path(__file__).parent
needs_fork = pytest.mark.skipif(sys.platform == "darwin", reason="a process a case is slow")


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with closing(Worker()) as found:
        yield found


def hold(worker: Worker, optimizer: str, case: str, dtype: str = "float32", **more: Any) -> Result:
    path = optimizer if ":" in optimizer else f"broken_optimizers:{optimizer}"
    rules = {"Adam": "adam", "RMSprop": "rmsprop"}
    rule = next((rule for name, rule in rules.items() if name in optimizer), "sgd")
    if optimizer in ("WrongBiasCorrection", "StopsCounting", "DividesZeroByZero"):
        rule = "adam"
    plan = conformance.plan(
        path, more.pop("options", ()), rule, cases=[case], dtypes=[dtype], **more
    )
    return run_case(worker, plan, CASES[case], dtype)


class Fault(NamedTuple):
    case: str
    optimizer: str
    outcome: Outcome
    size: int
    what: str = "a parameter is not what the rule says"


WRONG, IGNORED, ERROR = Outcome.WRONG, Outcome.IGNORED, Outcome.ERROR
OUTSIDE = "writes outside the parameter"
NOTHING = "is taken, and changes nothing"

# The fault that each case is there to find, and the fewest elements that show it.
FAULTS = [
    Fault("sizes", "DropsTheTail", WRONG, 9),
    Fault("sizes", "WrongBiasCorrection", WRONG, 1),
    Fault("thirty-steps", "StopsCounting", WRONG, 1),
    Fault("tail", "RoundsTheTailOtherwise", WRONG, 9, "elements that were equal"),
    Fault("not-finite", "SkipsNotFinite", WRONG, 3),
    Fault("zero-lr", "DecaysAtZeroLr", WRONG, 1, "lr = 0 changed a parameter"),
    Fault("frozen-rows", "DividesZeroByZero", WRONG, 2),
    Fault("sliced", "WritesOutside", WRONG, 2, OUTSIDE),
    Fault("misaligned", "WritesBeyond", WRONG, 1, OUTSIDE),
    Fault("interleaved", "UpdatesACopy", WRONG, 2),
    Fault("transposed", "PairsIndexWithMemory", WRONG, 2),
    Fault("other-strides", "PairsByMemory", WRONG, 2),
    Fault("channels-last", "PairsIndexWithMemory", WRONG, 2),
    Fault("expanded-gradient", "PairsByMemory", WRONG, 1),
    Fault("gradient-is-kept", "ChangesTheGradient", WRONG, 1, "changed the gradient"),
    Fault("empty", "NeedsAnElement", ERROR, 1, "step() raised IndexError"),
    Fault("late", "KnowsItsFirstGradients", ERROR, 1, "step() raised KeyError"),
    Fault("absent", "MovesWithoutGradient", WRONG, 1),
    Fault("groups", "ReadsDefaults", WRONG, 1),
    Fault("added-group", "KnowsItsFirstGroups", WRONG, 1),
    Fault("mixed-dtypes", "ComputesInOneDtype", WRONG, 1),
    Fault("closure", "DropsTheLoss", WRONG, 1, "step(closure) returned None"),
    Fault("option-lr", "SGDIgnores_lr", IGNORED, 5, f"'lr=0.125' {NOTHING}"),
    Fault("option-weight-decay", "SGDIgnores_weight_decay", IGNORED, 5, NOTHING),
    Fault("option-momentum", "SGDIgnores_momentum", IGNORED, 5, NOTHING),
    Fault("option-momentum", "RMSpropIgnores_momentum", IGNORED, 5, NOTHING),
    Fault("option-dampening", "SGDIgnores_dampening", IGNORED, 5, NOTHING),
    Fault("option-nesterov", "SGDIgnores_nesterov", IGNORED, 5, NOTHING),
    Fault("option-maximize", "SGDIgnores_maximize", IGNORED, 5, NOTHING),
    Fault("option-betas", "AdamIgnores_betas", IGNORED, 5, NOTHING),
    Fault("option-eps", "AdamIgnores_eps", IGNORED, 5, NOTHING),
    Fault("option-amsgrad", "AdamIgnores_amsgrad", IGNORED, 5, NOTHING),
    Fault("option-alpha", "RMSpropIgnores_alpha", IGNORED, 5, NOTHING),
    Fault("option-centered", "RMSpropIgnores_centered", IGNORED, 5, NOTHING),
    Fault("misspelled-option", "SwallowsOptions", IGNORED, 1, NOTHING),
    Fault("negative-lr", "TakesAnyLr", WRONG, 1, "lr=-1.0 is taken"),
    Fault("tensor-lr", "KeepsItsFirstLr", WRONG, 1),
    Fault("scheduled-lr", "KeepsItsFirstLr", WRONG, 1),
    Fault("scheduled-momentum", "KeepsItsFirstMomentum", WRONG, 1),
    Fault("scaled", "IgnoresTheScale", WRONG, 1),
    Fault("first-overflow", "LeavesJunkOnOverflow", WRONG, 1),
    Fault("later-overflow", "DecaysStatesOnOverflow", WRONG, 1, "changed state 'momentum_buffer'"),
    Fault("resumed", "HidesItsState", WRONG, 1),
    Fault("copied", "HidesItsState", WRONG, 1),
    Fault("from-torch", "HasOwnNames", WRONG, 1),
    Fault("to-torch", "HasOwnNames", WRONG, 1),
    Fault("threads", "DependsOnThreads", WRONG, 1, "the number of threads changes the result"),
    Fault("repeated", "DiffersEachTime", WRONG, 1, "the same run has another result"),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.case}-{fault.optimizer}")
def test_a_case_finds_its_fault_in_the_smallest_input(worker: Worker, fault: Fault) -> None:
    found = hold(worker, fault.optimizer, fault.case)
    assert found.evidence is not None, found
    assert (found.outcome, found.size) == (fault.outcome, fault.size), found
    assert fault.what in found.evidence.what


def test_every_case_has_a_fault_that_it_finds() -> None:
    assert {fault.case for fault in FAULTS} == set(CASES)


# ---- the bound


def after_a_step(rule: str, dtype: str) -> tuple[torch.Tensor, Truth]:
    lab = Lab(Subject("", rule), getattr(torch, dtype), 1001)
    param = lab.param()
    truth = Truth(rule, param)
    truth.advance(lab.gradient(param, 0), USUAL[rule])
    return param.detach(), truth


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rule", RULES)
def test_the_reference_is_within_the_bound_and_a_step_left_out_is_not(
    rule: str, dtype: str
) -> None:
    before, truth = after_a_step(rule, dtype)
    assert truth.distance(truth.expected()) == Distance(0, [], None)
    assert len(truth.distance(before).wrong) > 500


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rule", RULES)
def test_the_bound_of_a_step_is_a_few_ulp(rule: str, dtype: str) -> None:
    _before, truth = after_a_step(rule, dtype)
    right = truth.expected()
    # Adam's 1 - beta2 has a hundred times the error that beta2 may have in float32: of the update,
    # a twentieth of the parameter at most, and so does the correction: half of both go through the
    # root, five units each way. The other operations have a few units more.
    off = right * (1 + 12 * torch.finfo(right.dtype).eps)
    assert truth.distance(off).wrong == list(range(1001))


# ---- good optimizers


def hold_all(worker: Worker, path: str, dtypes: Sequence[str] = ()) -> list[Result]:
    plan = conformance.plan(path, dtypes=dtypes)
    return [run_case(worker, plan, case, dtype) for case, dtype in plan.rows]


@pytest.mark.parametrize(
    ("path", "dtypes"),
    [("flatstep:AdamW", ("float32", "bfloat16")), ("flatstep:RMSprop", ("float32",))],
)
def test_an_optimizer_of_flatstep_has_the_same_bits_in_every_case(
    worker: Worker, path: str, dtypes: tuple[str, ...]
) -> None:
    refusals = {"misspelled-option", "negative-lr"}
    for result in hold_all(worker, path, dtypes):
        expected = Outcome.REFUSED if result.case in refusals else Outcome.SAME
        if result.case == "to-torch":  # whose last steps are torch's
            assert result.outcome.is_fine
        else:
            assert result.outcome is expected, result


def test_a_plain_optimizer_passes_every_case(worker: Worker) -> None:
    for result in hold_all(worker, "broken_optimizers:SGD", ["float32"]):
        assert result.outcome in (Outcome.SAME, Outcome.CLOSE, Outcome.REFUSED), result


@pytest.mark.parametrize("options", [(), ("foreach=True",)], ids=["for-loop", "foreach"])
@pytest.mark.parametrize("path", ["torch.optim:Adam", "torch.optim:RMSprop"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_torchs_optimizers_are_within_the_bound(
    worker: Worker, path: str, options: tuple[str, ...], dtype: str
) -> None:
    found = hold(worker, path, "sizes", dtype, options=options)
    assert found.outcome in (Outcome.SAME, Outcome.CLOSE)
    assert found.ulp < 10


@pytest.mark.parametrize(
    ("case", "option"),
    [("option-momentum", "momentum"), ("option-nesterov", "nesterov")],
)
def test_an_option_that_is_not_in_the_signature_is_not_offered(
    worker: Worker, case: str, option: str
) -> None:
    found = hold(worker, "HasNoMomentum", case)
    assert found.outcome is Outcome.NOT_OFFERED
    assert found.evidence is not None
    assert option in found.evidence.what or "momentum" in found.evidence.what


def test_an_optimizer_without_the_usual_options_is_held_against_the_rule_without_them(
    worker: Worker,
) -> None:
    assert hold(worker, "HasNoMomentum", "sizes").outcome is Outcome.SAME


# ---- torch's fused path


@pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="faults of torch 2.13")
@pytest.mark.parametrize(
    ("path", "case", "dtype", "outcome"),
    [
        ("torch.optim:AdamW", "sliced", "float32", WRONG),
        ("torch.optim:SGD", "sliced", "float32", WRONG),
        ("torch.optim:AdamW", "other-strides", "float32", WRONG),
        ("torch.optim:SGD", "other-strides", "float32", WRONG),
        ("torch.optim:SGD", "first-overflow", "float32", WRONG),
        ("torch.optim:SGD", "late", "float32", ERROR),
        ("torch.optim:SGD", "tail", "float32", WRONG),
        ("torch.optim:SGD", "sizes", "bfloat16", WRONG),
        ("torch.optim:SGD", "sizes", "float16", WRONG),
    ],
)
def test_every_fault_of_torchs_fused_path_is_found(
    worker: Worker, path: str, case: str, dtype: str, outcome: Outcome
) -> None:
    assert hold(worker, path, case, dtype, options=["fused=True"]).outcome is outcome


# ---- errors and ends


@pytest.mark.parametrize(
    ("optimizer", "outcome", "what"),
    [
        ("RefusesStrides", Outcome.REFUSED, "parameter 0 is not contiguous"),
        ("RefusesUnclearly", ERROR, "not clear: it says nothing of 'contiguous'"),
        ("RefusesAfterItsState", ERROR, "not clean: parameters or states are half updated"),
        ("RefusesTooLate", ERROR, "not clean: parameters or states are half updated"),
    ],
)
def test_a_refusal_is_fine_if_it_is_clear_and_nothing_has_changed(
    worker: Worker, optimizer: str, outcome: Outcome, what: str
) -> None:
    found = hold(worker, optimizer, "sliced")
    assert found.outcome is outcome
    assert found.evidence is not None
    assert what in found.evidence.what


@needs_fork
@pytest.mark.parametrize(
    ("optimizer", "size", "what"),
    [
        ("Aborts", 4, "SIGABRT"),
        ("ReadsNull", 1, "SIGSEGV"),
        ("Exits", 1, "ended on its own, with exit code 0"),
    ],
)
def test_a_crash_is_a_row_with_its_cause_and_the_smallest_input(
    worker: Worker, optimizer: str, size: int, what: str
) -> None:
    found = hold(worker, optimizer, "sizes")
    assert (found.outcome, found.size) == (Outcome.CRASH, size)
    assert found.evidence is not None
    assert what in found.evidence.what
    assert found.evidence.step == 1
    assert hold(worker, "SGD", "sizes").outcome is Outcome.SAME, "the next case runs as ever"


@needs_fork
def test_a_hang_is_ended_when_its_time_is_over(worker: Worker) -> None:
    found = hold(worker, "Hangs", "sizes", timeout=0.5)
    assert found.outcome is Outcome.HANG
    assert found.evidence is not None
    assert "--timeout" in found.evidence.what


@needs_fork
def test_an_optimizer_that_ends_the_process_of_all_cases_is_a_row_too() -> None:
    with closing(Worker()) as alone:
        assert hold(alone, "EndsItsParent", "late").outcome is Outcome.CRASH
        assert hold(alone, "SGD", "late").outcome is Outcome.SAME


def test_what_an_optimizer_prints_does_not_disturb(worker: Worker) -> None:
    assert hold(worker, "PrintsMuch", "late").outcome is Outcome.SAME


def test_cases_run_without_fork_too() -> None:
    with closing(Worker(forks=False)) as fresh:
        assert hold(fresh, "SGD", "late").outcome is Outcome.SAME
        plan = conformance.plan("broken_optimizers:Aborts", rule="sgd", cases=["late"])
        answer = fresh.ask(plan, CASES["late"], "float32", [1, 4])
        assert answer["status"] == -signal.SIGABRT
        assert answer["messages"][-1] == {"at": {"size": 4, "step": 1}}


# ---- the command


class Ran(NamedTuple):
    code: object
    out: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.setenv("COLUMNS", "80")

    def run_it(line: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["flatstep", *shlex.split(line)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return Ran(ended.value.code, printed.out + printed.err)

    return run_it


def test_the_command_says_what_is_wrong_and_writes_reports(run: Any, tmp_path: Path) -> None:
    found = run(
        "verify --optimizer broken_optimizers:WritesOutside --rule sgd --case sliced --case late "
        f"--jobs 1 --dtype float32 --json {tmp_path / 'r.json'} --junit {tmp_path / 'r.xml'}"
    )
    assert found.code == 1
    assert max(len(line) for line in found.out.splitlines() if "repeat:" not in line) <= 80
    assert "writes outside the parameter" in found.out
    assert "1 of 2 cases fail" in found.out
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["ok"] is False
    assert report["environment"]["torch"] == torch.__version__
    (late, sliced) = sorted(report["results"], key=lambda result: result["case"])
    assert (late["outcome"], sliced["outcome"]) == ("same bits", "wrong")
    assert sliced["evidence"]["shape"] == [6, 9]
    suite = ET.parse(tmp_path / "r.xml").getroot()
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("2", "1", "0")
    (failure,) = suite.iter("failure")
    assert "repeat: flatstep verify" in str(failure.text)
    # The command that it gives repeats what it says.
    again = run(sliced["command"].removeprefix("flatstep ") + " --jobs 1")
    assert again.code == 1
    assert sliced["evidence"]["got"]["hex"] in again.out


def test_the_command_succeeds_where_all_is_fine(run: Any) -> None:
    found = run("verify --optimizer flatstep:SGD --with momentum=0.5 --case groups --jobs 1")
    assert found.code == 0
    assert "flatstep.SGD, momentum=0.5: 1 case, against sgd" in found.out
    assert "It follows sgd" in found.out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--optimizer no.such:Adam", "no.such:Adam cannot be found"),
        ("--optimizer torch.optim:LBFGS", "say it with --rule"),
        ("--optimizer flatstep:SGD --case slice", "no case 'slice'; --list-cases lists them"),
        ("--optimizer flatstep:SGD --dtype int8", "no dtype 'int8'; there are float32"),
        ("--optimizer flatstep:SGD --case late --dtype float16", "nothing to run"),
        ("--optimizer flatstep:SGD --size 0", "a size is at least 1"),
        ("--optimizer flatstep:SGD --timeout 0", "above zero"),
        ("--optimizer flatstep:SGD --with momentum", "not of the form name=value"),
        ("--optimizer flatstep:SGD --rule sgd --rule adam", "give --rule once"),
        ("--optimizer flatstep:SGD --isa scalar", "--isa is for flatstep's kernels"),
        ("--optimizer flatstep:SGD --quick", "--quick is for flatstep's kernels"),
        ("--optimizer flatstep:SGD --junit no/such/place.xml", "there is no directory no/such"),
        ("--case sliced", "--case needs --optimizer"),
        ("--with fused=True", "--with needs --optimizer"),
    ],
)
def test_what_makes_no_sense_is_refused(
    run: Any, monkeypatch: pytest.MonkeyPatch, line: str, message: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    found = run(f"verify {line}")
    assert found.code == 2
    assert message in found.out


def test_the_list_and_the_documentation_have_every_case(run: Any) -> None:
    listed = run("verify --list-cases").out
    text = (HERE.parent / "docs" / "verify.md").read_text()
    for name, case in CASES.items():
        assert name in listed
        assert f"| `{name}` | {case.title} |" in text


@needs_fork
def test_ctrl_c_leaves_what_was_found_so_far(tmp_path: Path) -> None:
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from flatstep.cli import main; main()"
    )
    line = "verify --optimizer broken_optimizers:Hangs --rule sgd --jobs 1"
    cases = "--case misspelled-option --case scheduled-lr"
    hangs = tmp_path / "hangs"
    with subprocess.Popen(
        [sys.executable, "-c", code, *shlex.split(f"{line} {cases}")],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
            "FLATSTEP_TEST_HANGS": str(hangs),
        },
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        while not hangs.exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out = process.communicate(timeout=60)[0]
    assert process.returncode == 130
    assert "misspelled-option   refused" in out
    assert "Interrupted after 1 of 2 cases" in out


# ---- the plugin


SUITE = """
from flatstep.testing import conformance
from broken_optimizers import SGD, HasNoMomentum, WritesOutside

few = ["sliced", "late", "option-nesterov"]
test_good = conformance(SGD, rule="sgd", cases=few, dtypes=["float32"], weight_decay=0.1)
test_small = conformance(HasNoMomentum, rule="sgd", cases=few[1:])
test_broken = conformance("broken_optimizers:WritesOutside", rule="sgd", cases=few[:1])
"""


def test_the_plugin_makes_a_test_of_every_case(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\n")
    pytester.makepyfile(SUITE)
    pytester.syspathinsert(HERE)
    result = pytester.runpytest_inprocess("-p", "flatstep.testing", "-rs", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=4, skipped=1, failed=2)
    result.stdout.fnmatch_lines(
        [
            "*sliced (float32): wrong*",
            "*it writes outside the parameter*",
            "repeat: flatstep verify --optimizer broken_optimizers:WritesOutside --rule sgd*",
        ]
    )
    result.stdout.fnmatch_lines(["*SKIPPED*it has no option 'momentum'*"])


def test_without_the_plugin_a_test_says_how_to_load_it(pytester: pytest.Pytester) -> None:
    pytester.makeini("[pytest]\n")
    pytester.makepyfile(
        "from flatstep.testing import conformance\n"
        "test_it = conformance('flatstep:SGD', cases=['late'])\n"
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["the plugin is not loaded: say pytest_plugins =*"])


def test_what_another_process_cannot_be_told_is_refused() -> None:
    from flatstep.testing import conformance as tests

    class Local(torch.optim.SGD):
        pass

    with pytest.raises(ValueError, match="put it at the top of a module"):
        tests(Local)
    with pytest.raises(ValueError, match=r"lr=tensor\(.* cannot be handed to another process"):
        tests(torch.optim.SGD, lr=torch.tensor(0.5))
