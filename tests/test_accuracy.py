"""`flatstep verify --accuracy` measures distances that are known."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

import flatstep
from flatstep import reference
from flatstep.accuracy import Distances, Report, measure, plot, truth
from flatstep.accuracy import implementations as implementations_of
from flatstep.accuracy import report as terminal
from flatstep.accuracy.results import bucket
from flatstep.conformance.truth import Asked
from flatstep.subjects import Subject
from flatstep.verify import ulp
from flatstep.verify.cases import FORMATS
from flatstep.verify.command import verify

HERE = __name__
USED = {
    "adam": ["exp_avg", "exp_avg_sq"],
    "adamw": ["exp_avg", "exp_avg_sq"],
    "rmsprop": ["square_avg"],
    "sgd": ["momentum_buffer"],
}
APP = typer.Typer()
APP.command()(verify)


class Nudged(flatstep.SGD):
    """Every parameter is `values` of its dtype too far from zero."""

    def __init__(self, params: Any, values: int = 1, **options: Any):
        super().__init__(params, **options)
        self.values = values

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for p in self.param_groups[0]["params"]:
            p.detach().view(torch.int32).add_(self.values)


class EpsInsideAdam(torch.optim.Optimizer):
    """Adam with eps inside the root, as some papers have it."""

    def __init__(self, params: Any, lr: float, betas: Any, eps: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})
        self.count = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.count += 1
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                m, v = self.state[p] or (torch.zeros_like(p), torch.zeros_like(p))  # not a dict
                m.lerp_(p.grad, 1 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                self.state[p] = (m, v)
                root = (v / (1 - beta2**self.count) + group["eps"]).sqrt()
                p.sub_(group["lr"] / (1 - beta1**self.count) * m / root)


class RaisingSGD(flatstep.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise RuntimeError("no kernel for this\nsecond line")


class InterruptedSGD(flatstep.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise KeyboardInterrupt


class NanSGD(flatstep.SGD):
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        self.param_groups[0]["params"][0].detach()[0] = float("nan")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only flatstep and the subjects are measured."""
    monkeypatch.setattr(implementations_of, "MODES", {})
    monkeypatch.setattr(implementations_of, "paths_of", lambda _: {})
    monkeypatch.setattr(implementations_of, "PEERS", {rule: {} for rule in truth.CLASSES})


def subject(cls: type, rule: str = "sgd", **options: Any) -> Subject:
    return Subject(f"{HERE}:{cls.__name__}", rule, options)


def run_of(report: Report, name: str) -> Any:
    (run,) = [run for run in report.runs if run.implementation.endswith(name)]
    return run


def the(report: Report, name: str, steps: int, array: str = "param") -> Distances:
    run = run_of(report, name)
    assert not run.error
    found: Distances = run.after(steps, array)
    return found


# ---- the measure


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_truth_is_rounded_once(dtype: str) -> None:
    form = FORMATS[dtype]
    bits = np.arange(form.infinity // 2, form.infinity // 2 + 999, dtype=form.unsigned)  # about 1
    wide = np.longdouble if dtype == "float64" else np.float64
    here, there = (
        reference.widen(b.view(form.storage), dtype).astype(wide) for b in (bits, bits + 1)
    )
    middle = (here + there) / 2
    # In float32 the middle itself, which a second rounding would take to even.
    little = (there - here) * wide(2) ** (-8 if dtype == "float64" else -28)
    for sign, sign_bit in ((1, 0), (-1, form.sign)):
        for value, up in (
            (here, 0),
            (middle - little, 0),
            (middle, bits & 1),
            (middle + little, 1),
            (there, 1),
        ):
            found = ulp.round_to(sign * value, dtype)
            assert np.array_equal(found, bits + up | form.unsigned.type(sign_bit))


def test_distances_are_summed_up() -> None:
    apart = np.array([0, 0, 1, 2, 3, 4, 5, 8, 9, 1 << 40], np.uint64)
    found = Distances.of(20, "param", "float64", apart, not_finite=2)
    assert (found.worst, found.mean) == (1 << 40, (32 + (1 << 40)) / 10)
    assert found.histogram == [2, 1, 1, 2, 2, 1, *[0] * 35, 1]
    assert [bucket(place) for place in range(6)] == ["0", "1", "2", "3–4", "5–8", "9–16"]
    assert (found.elements, found.exact) == (12, 2 / 12)
    assert found.percentiles == {"50": 4, "90": 1 << 40, "99": 1 << 40}


def test_no_weight_and_no_state_comes_near_zero() -> None:
    for rule, options in truth.OPTIONS.items():
        for arrays in truth.follow(rule, Asked.of(rule, options), "float32", (1, 20, 1000)):
            for name in {"param", *USED[rule]}:
                array = arrays[name]
                assert np.abs(array).min() > (0.09 if name == "param" else 6e-6), (rule, name)


# ---- the implementations


@pytest.mark.usefixtures("alone")
def test_a_known_distance_is_found() -> None:
    nudged = [subject(Nudged, values=values) for values in (0, 1, 3, 700)]
    report = measure(["sgd"], ["float32"], nudged, steps=[1])
    exact = the(report, "values=0", 1)
    for values in (1, 3, 700):
        found = the(report, f"values={values}", 1)
        assert found.worst <= values + exact.worst
        assert found.percentiles["50"] == values
        assert abs(found.mean - values) <= exact.mean * (1 + 1e-9)


def test_a_step_of_adam_is_the_rounded_truth_and_many_are_the_reference() -> None:
    report = measure(["adam"], ["float32"], steps=[1, 20])
    assert the(report, "flatstep", 1).worst == 0
    after = the(report, "flatstep", 20)
    p = ulp.bits_of(ulp.weights("float32"), "float32").view(np.float32).copy()
    states = {name: np.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
    rows = truth.gradients("float32", 20).numpy()
    hyper = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
    for step, row in enumerate(rows, 1):
        flags = {"amsgrad": False, "l2": False}
        reference.update("adam", flags, hyper, p, row, states, step=step)
    (arrays,) = truth.follow("adam", Asked.of("adam", truth.OPTIONS["adam"]), "float32", [20])
    for name, array in {"param": p, **states}.items():
        apart = ulp.distance(
            array.view(np.uint32), ulp.round_to(arrays[name], "float32"), "float32"
        )
        assert Distances.of(20, name, "float32", apart, 0) == the(report, "flatstep", 20, name)
    assert 0 < after.mean < 2


@pytest.mark.usefixtures("alone")
def test_an_eps_inside_the_root_shows_in_the_right_size() -> None:
    eps = 1e-4
    inside = subject(EpsInsideAdam, "adam", eps=eps)
    found = the(measure(["adam"], ["float32"], [inside], steps=[1]), f"eps={eps}", 1)
    g = truth.gradients("float32", 1)[0].double().numpy()
    p = ulp.bits_of(ulp.weights("float32"), "float32").view(np.float32).astype(np.float64)
    right, wrong = (p - 1e-3 * g / root for root in (np.abs(g) + eps, np.sqrt(g * g + eps)))
    spacing = np.spacing(np.abs(right).astype(np.float32)).astype(np.float64)
    expected = np.abs(wrong - right) / spacing
    assert found.worst == pytest.approx(expected.max(), rel=1e-2)
    assert found.mean == pytest.approx(expected.mean(), rel=1e-2)


def test_options_that_are_numbers_of_the_rule_hold_for_the_truth_too() -> None:
    options = {"lr": 0.25, "momentum": 0.5, "nesterov": True, "maximize": True, "foreach": True}
    other = Subject("torch.optim:SGD", "sgd", options)
    report = measure(None, ["float32"], [other], steps=[20])
    assert {run.rule for run in report.runs} == {"sgd"}
    assert the(report, "foreach=True", 20).mean < 2
    assert run_of(report, "foreach=True").options == {k: str(v) for k, v in options.items()}


def test_masters_keep_bfloat16_near_the_truth() -> None:
    report = measure(["adam"], ["bfloat16"], steps=[1, 200])
    plain = next(run for run in report.runs if run.implementation == "flatstep").after(200)
    split, chance = (the(report, name, 200) for name in ("split, f32", "stochastic, f32"))
    assert plain is not None
    assert split.exact > 0.99
    assert split.mean < chance.mean < plain.mean
    assert the(report, "split, f32", 200, "exp_avg").dtype == "float32"


@pytest.mark.skipif(not truth.LONG, reason="no type is longer than float64 here")
def test_the_truth_of_float64_is_longer_than_float64() -> None:
    found = the(measure(["sgd"], ["float64"], steps=[1, 20]), "for-loop", 20)
    assert found.dtype == "float64"
    assert 0 < found.mean < 2


# ---- what goes wrong


@pytest.mark.usefixtures("alone")
def test_what_an_implementation_raises_is_its_row() -> None:
    missing = Subject("nowhere:SGD", "sgd")
    report = measure(None, ["float32"], [subject(RaisingSGD), missing, subject(Nudged)], [1])
    assert run_of(report, "RaisingSGD").error == "RuntimeError: no kernel for this"
    assert "nowhere:SGD cannot be found" in run_of(report, "nowhere.SGD").error
    assert the(report, "Nudged", 1).worst
    assert len(report.failed) == 2
    text = shown(report, 120)
    assert "RuntimeError: no kernel for this" in text
    assert "2 failed as said above" in text


def test_what_is_not_finite_is_counted() -> None:
    found = the(measure(None, ["float32"], [subject(NanSGD)], [1, 2]), "NanSGD", 2)
    assert found.not_finite == 32  # a row
    assert found.worst < 10
    assert found.elements == 4137


@pytest.mark.usefixtures("alone")
def test_an_interruption_leaves_what_was_measured() -> None:
    threads = torch.get_num_threads()
    report = measure(None, ["float32"], [subject(Nudged), subject(InterruptedSGD)], [1])
    assert report.interrupted
    assert [run.path for run in report.runs] == ["flatstep:SGD", f"{HERE}:Nudged"]
    assert torch.get_num_threads() == threads
    assert "Interrupted after 2 of 3 runs" in shown(report, 80)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rules": ["lamb"]}, "no rule 'lamb'; there are adam, adamw, rmsprop, sgd"),
        ({"dtypes": ["int8"]}, "no dtype 'int8'"),
        ({"steps": [0, 3]}, "steps must be at least 1, not 0"),
        (
            {"rules": ["adam"], "subjects": [subject(Nudged)]},
            "Nudged follows sgd: name that rule too",
        ),
        ({"steps": []}, "steps must be at least 1, not none"),
    ],
)
def test_what_does_not_exist_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(**arguments)


def test_a_package_that_is_not_there_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    peers = {"there": ("torch.optim:SGD", {}), "not there": ("no_such_package.optim:SGD", {})}
    monkeypatch.setitem(implementations_of.PEERS, "sgd", peers)
    names = [i.name for i in implementations_of.implementations("sgd", "float32")]
    assert "there" in names
    assert "not there" not in names


# ---- what is written


def shown(report: Report, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    terminal.show(report, console)
    return console.export_text()


def test_a_report_comes_back_from_json() -> None:
    report = measure(["sgd"], ["bfloat16"], [subject(RaisingSGD)], steps=[1, 2])
    kept = json.loads(json.dumps({"environment": {}, **report.to_dict()}, allow_nan=False))
    assert Report.from_dict(kept) == report


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_says_what_was_found(width: int) -> None:
    report = measure(["sgd"], ["float32"], steps=[1, 2])
    text = shown(report, width)
    assert all(run.implementation in text for run in report.runs)
    assert ("momentum_buffer" in text) == (width == 120)
    assert f"flatstep {flatstep.__version__}, torch {torch.__version__}" in text


def test_the_command_writes_the_table_the_figures_and_the_picture(tmp_path: Any) -> None:
    kept, picture = tmp_path / "a.json", tmp_path / "a.svg"
    arguments = ["--accuracy", "--quick", "--rule", "sgd", "--dtype", "float32"]
    arguments += ["--optimizer", f"{HERE}:Nudged", "--with", "values=3"]
    found = CliRunner().invoke(APP, [*arguments, "--json", str(kept), "--plot", str(picture)])
    assert found.exit_code == 0, found.output
    report = Report.from_dict(json.loads(kept.read_text()))
    assert report.steps == [1, 20]
    assert the(report, "Nudged, values=3", 20).mean > 3
    assert "</svg>" in picture.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--isa", "scalar"], "--isa does not go with --accuracy"),
        (["--plot", "a.gif"], "a plot's name ends in .png, .svg, .pdf"),
        (["--optimizer", "nowhere:SGD"], "nowhere:SGD cannot be found"),
        (["--rule", "lamb"], "no rule 'lamb'"),
        (["--json", "nowhere/a.json"], "there is no directory nowhere"),
    ],
)
def test_a_wrong_command_says_what_to_do(arguments: list[str], message: str) -> None:
    found = CliRunner().invoke(APP, ["--accuracy", *arguments])
    assert found.exit_code == 2
    assert message in " ".join(found.output.replace("│", " ").split())


def test_the_picture_has_a_bar_for_each_run(tmp_path: Any) -> None:
    report = measure(["sgd"], ["float32"], [subject(NanSGD)], steps=[1])
    plot.draw(report, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
