"""`flatstep profile --sweep`, `--buckets` and `--config`: sizes, threads, tensors and shapes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from flatstep import profiling
from flatstep.profiling import command as commands
from flatstep.profiling import memory, sweeps, text
from flatstep.profiling.command import profile as command
from flatstep.profiling.device import Cpu
from flatstep.profiling.measure import Timing
from flatstep.profiling.results import Overhead, Point, Result, Sweep
from flatstep.profiling.sweeps import SweepTask, plan_sweeps
from flatstep.profiling.workloads import WORKLOADS, size_classes, workload_of_file

runs = sys.modules["flatstep.profiling.run"]  # whose name in the package is the function's
MIXED = profiling.Workload("mixed", "Mixed", ((3,), (40, 30), (257,), (2, 4), ()))
APP = typer.Typer()
APP.command()(command)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sweeps, "SIZES", (100, 1000))
    monkeypatch.setattr(sweeps, "TENSORS", (1, 4, 16))
    monkeypatch.setattr(sweeps, "cores", lambda: 2)
    monkeypatch.setitem(WORKLOADS, sweeps.THREADS_WORKLOAD, MIXED)
    monkeypatch.setitem(WORKLOADS, "mixed", MIXED)
    return


def swept(*names: str, **more: object) -> profiling.Report:
    options = {"rounds": 2, "whole_step": False, **more}
    return profiling.run([], sweeps=plan_sweeps(names or ["all"]), **options)


def invoke(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(APP, list(args), env={"COLUMNS": "300", "NO_COLOR": "1"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


# ---- sweeps


def test_every_sweep_has_its_points_and_their_figures_follow_from_the_times():
    found = swept()
    axes = {sweep.axis: [point.x for point in sweep.points] for sweep in found.sweeps}
    assert axes == {"parameters": [100, 1000], "threads": [1, 2], "tensors": [1, 4, 16]}
    assert not found.problems
    assert found.exit_code == 0
    for sweep in found.sweeps:
        for point in sweep.points:
            assert point.bytes_moved == 28 * point.parameters
            names = [result.implementation for result in point.results]
            assert names == ["flatstep flat", "flatstep", "torch fused"]
            for result in point.results:
                limit, seconds = point.best_limit().timing.median, result.timing.median
                assert result.of_limit == pytest.approx(limit / seconds)
    sizes, _, tensors = found.sweeps
    assert [point.parameters for point in sizes.points] == [100, 1000]
    assert [point.parameters for point in tensors.points] == [256, 1024, 4096]


def test_a_sweep_of_threads_uses_them_and_puts_them_back(monkeypatch: pytest.MonkeyPatch):
    used: list[int] = []
    monkeypatch.setattr(runs, "measure", lambda *args: used.append(torch.get_num_threads()))
    swept("threads", threads=2)
    assert used == [1, 2]
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("most", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_threads_are_powers_of_two_and_all(most: int, counts: list[int]):
    assert sweeps.thread_counts(most) == counts


def test_a_wrong_result_at_a_point_gets_no_time_there(monkeypatch: pytest.MonkeyPatch):
    right = runs.measure

    def spoil(point: Point, *args: object) -> None:
        right(point, *args)
        if point.x == 1000:
            point.results[0].problem = "wrong result: made up"
            point.results[0].timing = None

    monkeypatch.setattr(runs, "measure", spoil)
    found = swept("sizes")
    assert found.exit_code == 1
    assert list(found.problems) == ["sweep of parameters, adam, float32, 1,000, flatstep flat"]
    assert " wrong " in text.plain_sweep(found.sweeps[0], [])


def test_a_size_that_does_not_fit_is_refused_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch,
):
    most = memory.bytes_needed(sweeps._sizes()[0].workload, "adam", torch.float32, Cpu())
    monkeypatch.setattr(memory, "bytes_available", lambda: most)
    [sweep] = swept("sizes").sweeps
    fits, refused = sweep.points
    assert fits.refused is None
    assert fits.is_timed
    assert (refused.refused or "").startswith("needs ")
    assert not refused.results
    said = text.plain_sweep(sweep, [])
    assert "1,000 parameters: refused: needs" in said
    assert "choose a smaller --dtype" in said


def test_an_interrupt_leaves_the_points_that_were_measured():
    def interrupt(done: float, label: str) -> None:
        if label.endswith(": 16") and done > 0.7:  # in its first steps
            raise KeyboardInterrupt

    shown: list[Sweep] = []
    found = swept("tensors", on_progress=interrupt, on_sweep=lambda sweep, _: shown.append(sweep))
    assert found.interrupted
    assert shown == found.sweeps
    assert [point.x for point in found.sweeps[0].points] == [1, 4]
    assert found.overheads == []


def test_a_busy_machine_is_seen_at_the_points_of_a_sweep(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(runs, "LARGE", 28 * 500)
    monkeypatch.setattr(runs, "BUSY_SPREAD", -1.0)
    [warning] = [line for line in swept("sizes").warnings if "times vary" in line]
    assert "end it and measure again" in warning
    assert warning.endswith("(sweep of parameters, adam, float32, 1,000)")


def test_what_others_do_meanwhile_is_said(monkeypatch: pytest.MonkeyPatch):
    taken = iter([100.0, 1e6, 100.0, 100.0])
    monkeypatch.setattr(runs, "seconds_of_others", lambda: next(taken))
    assert any("of the processors' time meanwhile" in line for line in swept("sizes").warnings)
    assert not any("meanwhile" in line for line in swept("sizes").warnings)


def test_the_time_of_others_is_what_is_neither_idle_nor_our_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    stat = tmp_path / "stat"
    stat.write_text("cpu  100000 1000 2000 500000 50 10 20 30 7 0\ncpu0 1 2 3 4 5 6 7 8 9 0\n")
    monkeypatch.setattr(runs, "STAT", stat)
    own = sum(os.times()[:4])
    ticks = os.sysconf("SC_CLK_TCK")
    assert runs.seconds_of_others() == pytest.approx(103_060 / ticks - own, abs=1)
    monkeypatch.setattr(runs, "STAT", tmp_path / "nothing")
    assert runs.seconds_of_others() == 0


# ---- what a tensor costs


def timed(implementation: str, seconds: float) -> Result:
    return Result(implementation, timing=Timing.of([seconds]))


def test_the_line_finds_what_a_step_and_a_tensor_cost():
    counts = [1, 10, 100, 1000, 10_000]
    step, tensor, spread = sweeps.fit_line(counts, [5e-6 + 2e-8 * n for n in counts])
    assert (step, tensor) == (pytest.approx(5e-6), pytest.approx(2e-8))
    assert spread == pytest.approx(0, abs=1e-9)
    _, _, spread = sweeps.fit_line(counts, [5e-6, 6e-6, 5e-6, 30e-6, 200e-6])
    assert 0.05 < spread < 0.5


def enumerate_powers(seconds: list[float]) -> list[tuple[int, float]]:
    return list(zip([1, 10, 100], seconds, strict=True))


def test_no_cost_is_negative_however_noisy_the_times_are():
    for seconds in ([1e-6, 3e-5, 4e-4], [4e-4, 3e-5, 1e-5]):
        step, tensor, spread = sweeps.fit_line([1, 10, 100], seconds)
        assert step >= 0
        assert tensor >= 0
        off = [(step + tensor * n) / took - 1 for n, took in enumerate_powers(seconds)]
        assert spread == pytest.approx((sum(x * x for x in off) / 3) ** 0.5)
        for other in (1.05, 0.95):
            worse = [(other * x + other - 1) for x in off]
            assert spread <= (sum(x * x for x in worse) / 3) ** 0.5


def test_overheads_are_of_each_implementation_with_enough_times():
    sweep = Sweep("tensors", "", "adam", "float32")
    for n in (1, 10, 100):
        results = [timed("flatstep", 1e-6 + n * 1e-8), timed("torch fused", 1e-5 + n * 1e-6)]
        results += [timed("mine.Adam", 1.0)] if n < 100 else [Result("mine.Adam", "failed: x")]
        sweep.points.append(Point(x=n, parameters=n, bytes_moved=n, results=results))
    found = sweeps.overheads(sweep)
    assert [(each.implementation, each.optimizer) for each in found] == [
        ("flatstep", "adam"),
        ("torch fused", "adam"),
    ]
    assert found[1].per_tensor == pytest.approx(1e-6)


def test_a_sweep_of_tensors_leaves_overheads_of_the_limit_too():
    found = swept("tensors")
    names = {"limit", "flatstep", "flatstep flat", "torch fused"}
    assert {overhead.implementation for overhead in found.overheads} == names
    assert all(isinstance(overhead, Overhead) for overhead in found.overheads)


# ---- size classes


def test_a_workload_falls_into_powers_of_ten():
    classes = [workload.shapes for workload in size_classes(MIXED)]
    assert classes == [((3,), (2, 4), ()), ((257,),), ((40, 30),)]
    assert size_classes(profiling.Workload("", "", ((10,), (99,)))) == []


def test_each_size_class_has_a_time_of_its_own():
    task = profiling.Task(MIXED, "sgd", "float32")
    found = profiling.run([task], buckets=True, rounds=1, whole_step=False)
    [case] = found.cases
    assert [(b.smallest, b.largest, b.tensors, b.parameters) for b in case.buckets] == [
        (1, 8, 3, 12),
        (257, 257, 1, 257),
        (1200, 1200, 1, 1200),
    ]
    for bucket in case.buckets:
        assert bucket.bytes_moved == 20 * bucket.parameters
        assert bucket.result("flatstep").timing is not None
    said = text.plain_case(case)
    assert "1 to 8" in said
    assert "82%" in said


# ---- shapes from a file


def test_shapes_are_read_from_a_file(tmp_path: Path):
    path = tmp_path / "mine.json"
    path.write_text('{"name": "net", "shapes": [[4, 3], [[5], 2], [], [0, 7]], "dtype": "float64"}')
    found = workload_of_file(path)
    assert (found.name, found.title, found.dtype) == ("net", "net", "float64")
    assert found.shapes == ((4, 3), (5,), (5,), ())
    assert {task.dtype for task in profiling.plan([found])} == {"float64"}
    assert {task.dtype for task in profiling.plan([found], dtype="bfloat16")} == {"bfloat16"}
    path.write_text('{"shapes": [[1]]}')
    assert workload_of_file(path).name == "mine"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "is not JSON"),
        ("[[1]]", "holds a list; it has to hold"),
        ('{"name": "x"}', "has no 'shapes'"),
        ('{"shapes": [[1]], "size": 3}', "an unknown key 'size'"),
        ('{"shapes": 5}', "'shapes' in .* is 5, not a list"),
        ('{"shapes": []}', "has no parameters"),
        ('{"shapes": [[0]]}', "has no parameters"),
        ('{"shapes": [[1], [2, -3]]}', r"shapes\[1\] in .* is \[2, -3\]; a shape is a list"),
        ('{"shapes": [7]}', r"shapes\[0\] in .* is 7; a shape"),
        ('{"shapes": [[1.5]]}', r"shapes\[0\]"),
        ('{"shapes": [[true]]}', r"shapes\[0\]"),
        ('{"shapes": [[[3], 2.0]]}', r"shapes\[0\]"),
        ('{"shapes": [[1]], "dtype": "int8"}', "'dtype' in .* is 'int8'; there are float32"),
        ('{"shapes": [[1]], "name": 3}', "'name' in .* is 3, not a text"),
    ],
)
def test_a_file_of_anything_else_is_answered_with_what_it_has_to_hold(
    tmp_path: Path, content: str, message: str
):
    path = tmp_path / "shapes.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        workload_of_file(path)


# ---- the command


@pytest.mark.parametrize(
    ("options", "measured"),
    [
        ([], {"cases", "passes", "training"}),
        (["--html", "page.html"], {"cases", "passes", "training", "sweeps"}),
        (["--html", "page.html", "--workload", "mlp"], {"cases"}),
        (["--sweep", "sizes", "--optimizer", "sgd"], {"sweeps"}),
        (["--sweep", "sizes", "--workload", "mlp"], {"cases", "sweeps"}),
        (["--sweep", "sizes", "--pass", "step"], {"sweeps", "passes"}),
        (["--pass", "step", "--dtype", "bfloat16"], {"cases", "passes"}),
        (["--pass", "step", "--against", "torch.optim:AdamW"], {"passes"}),
        (["--against", "torch.optim:AdamW"], {"cases"}),
    ],
)
def test_sweeps_are_measured_where_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, options: list[str], measured: set[str]
):
    asked: set[str] = set()

    def run(tasks: object, **more: object) -> profiling.Report:
        kinds = {"cases": tasks, "training": more["whole_step"]}
        kinds |= {kind: more[kind] for kind in ("passes", "sweeps")}
        asked.update(kind for kind, chosen in kinds.items() if chosen)
        raise typer.Exit

    monkeypatch.setattr(commands, "run", run)
    invoke(*options)
    assert asked == measured


def test_the_command_sweeps_keeps_and_shows_again(tmp_path: Path):
    kept = tmp_path / "sweeps.json"
    code, output = invoke("--sweep", "all", "--rounds", "1", "--json", str(kept))
    assert code == 0
    for said in ("One tensor", "threads", "What a step and a tensor cost", "ns a tensor", "µs"):
        assert said in output
    found = json.loads(kept.read_text())
    assert found["cases"] == found["passes"] == []
    assert profiling.Report.from_dict(found).as_dict() == found
    assert invoke("--load", str(kept)) == (0, output)


def test_the_command_measures_the_shapes_of_a_file_with_their_size_classes(tmp_path: Path):
    path = tmp_path / "shapes.json"
    path.write_text('{"name": "of mine", "shapes": [[40, 30], [[8], 4]]}')
    options = ["--config", str(path), "--optimizer", "adam", "--buckets", "--rounds", "1"]
    code, output = invoke(*options)
    assert code == 0
    for said in ("of mine × adam, float32", "28 bytes a parameter", "tensors of", "1,200", "97%"):
        assert said in output
    code, output = invoke(*options, "--pass", "step", "--pass", "whole")
    assert code == 0
    assert "of mine, 1,232 parameters" in output
    for part in ("unscale_ alone", "clip_grad_norm_ alone", "swa_utils' EMA alone"):
        assert part in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sweep", "speeds"], "no sweep 'speeds'; there are sizes, threads, tensors and all"),
        (["--sweep", "sizes", "--optimizer", "lion"], "no optimizer 'lion'"),
        (["--sweep", "sizes", "--dtype", "int8"], "no dtype 'int8'"),
        (["--config", "nothing.json"], "nothing.json cannot be read: No such file"),
        (["--load", "x.json", "--sweep", "all"], "--load measures nothing"),
    ],
)
def test_what_makes_no_sense_is_said_before_anything_runs(options: list[str], message: str):
    code, output = invoke(*options)
    assert code == 2
    assert message in output


def test_a_gpu_has_no_sweep_of_threads():
    with pytest.raises(ValueError, match="choose sizes or tensors with 'cuda'"):
        plan_sweeps(["threads"], device="cuda")
    tasks = plan_sweeps(["all"], ["sgd"], device="cuda")
    assert tasks == [SweepTask("sizes", "sgd"), SweepTask("tensors", "sgd")]
