"""`flatstep compare`: a change counts beside the machine of its own run, and beyond the noise."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from flatstep.profiling.compare import Comparison, Row, compare, share_of
from flatstep.profiling.compare_command import compare_profiles
from flatstep.profiling.measure import Timing
from flatstep.profiling.results import (
    Bucket,
    Case,
    Limit,
    Machine,
    Pass,
    Point,
    Report,
    Result,
    Sweep,
    Training,
    TrainingResult,
)

APP = typer.Typer()
APP.command()(compare_profiles)
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
MACHINE = Machine("A CPU", 2, 2, "avx2", "0.1.0", "2.13.0", "Linux 6")
SIZE = {"parameters": 1000, "bytes_moved": 28_000}


def timing(seconds: float, noise: float = 0.01, rounds: int = 20) -> Timing:
    low, high = seconds * (1 - noise), seconds * (1 + noise)
    return Timing(seconds, low, high, low, high, rounds)


def result(name: str, seconds: float, noise: float = 0.01, rounds: int = 20) -> Result:
    return Result(name, pages="4 KiB", timing=timing(seconds, noise, rounds))


def limit(seconds: float, pages: str | None = "4 KiB") -> Limit:
    return Limit(pages, True, timing(seconds), 28e-6 / seconds)


def case(*results: Result, limits: float = 1.0, name: str = "gpt2", buckets=()) -> Case:
    return Case(
        workload=name,
        title=name,
        optimizer="adam",
        dtype="float32",
        tensors=3,
        states=2,
        limits=[limit(limits)],
        results=list(results),
        buckets=list(buckets),
        **SIZE,
    )


def report(*cases: Case, **more: object) -> Report:
    return Report(MACHINE, list(cases), **more)


def only_row(comparison: Comparison) -> Row:
    [row] = comparison.rows
    return row


def files(folder: Path, *reports: Report) -> list[str]:
    paths = [folder / f"{name}.json" for name in "ab"]
    for path, each in zip(paths, reports, strict=True):
        path.write_text(json.dumps(each.as_dict()))
    return [str(path) for path in paths]


def invoke(*args: str, columns: int = 300) -> tuple[int, str]:
    environment = {"COLUMNS": str(columns), "NO_COLOR": "1"}
    result = CliRunner().invoke(APP, list(args), env=environment)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.replace("│", " ").split())


# ---- verdicts


@pytest.mark.parametrize(
    ("seconds", "noise", "verdict", "too_slow"),
    [
        (1.20, 0.01, "slower", True),
        (0.80, 0.01, "faster", False),
        (1.03, 0.01, "within noise", False),
        (1.20, 0.20, "within noise", False),
        (1.045, 0.001, "slower", False),
    ],
)
def test_a_change_counts_beyond_the_noise_and_fails_past_the_threshold(
    seconds: float, noise: float, verdict: str, too_slow: bool
):
    before = report(case(result("flatstep", 1.0, noise)))
    after = report(case(result("flatstep", seconds, noise)))
    row = only_row(compare(before, after, threshold=0.05))
    assert (row.verdict, row.past_threshold) == (verdict, too_slow)
    assert row.change == pytest.approx(seconds - 1)
    assert row.a is not None
    assert row.a.noise == pytest.approx(noise + 0.01, abs=1e-3)  # and that of the limit


def test_a_slower_machine_is_not_a_slower_step():
    before = report(case(result("flatstep", 2.0), limits=1.0))
    after = report(case(result("flatstep", 3.0), limits=1.5))
    comparison = compare(before, after)
    row = only_row(comparison)
    assert (row.verdict, row.unit) == ("within noise", "limit")
    assert row.change == pytest.approx(0)
    assert comparison.limits == pytest.approx(0.5)


def test_a_slower_step_is_seen_on_a_faster_machine():
    before = report(case(result("flatstep", 2.0), limits=1.0))
    after = report(case(result("flatstep", 2.0), limits=0.5))
    assert only_row(compare(before, after)).verdict == "slower"


def test_a_loss_of_huge_pages_is_held_against_the_fastest_limit():
    both = [limit(1.0, "2 MiB"), limit(2.0, "4 KiB")]
    before, after = (case(result("flatstep", seconds)) for seconds in (1.0, 2.0))
    before.results[0].pages = "2 MiB"
    before.limits, after.limits = both, both
    row = only_row(compare(report(before), report(after)))
    assert row.verdict == "slower"
    assert row.change == pytest.approx(1.0)


def test_training_is_held_against_torch():
    def trained(torch: float, ours: float) -> Report:
        ways = [
            TrainingResult("torch fused", total=timing(torch)),
            TrainingResult("flatstep", total=timing(ours)),
        ]
        return report(training=Training("GPT", 10, "adam", ways))

    comparison = compare(trained(1.0, 1.0), trained(2.0, 2.4))
    assert [row.verdict for row in comparison.rows] == ["yardstick", "slower"]
    assert comparison.rows[1].change == pytest.approx(0.2)


def test_without_a_limit_and_torch_the_time_itself_counts():
    lone = [case(result("flatstep", seconds)) for seconds in (1.0, 2.0)]
    for each in lone:
        each.limits = []
    row = only_row(compare(*(report(each) for each in lone)))
    assert (row.unit, row.verdict) == ("nothing", "slower")


def test_few_turns_give_no_verdict():
    before, after = (report(case(result("flatstep", s, rounds=2))) for s in (1.0, 9.0))
    comparison = compare(before, after)
    assert only_row(comparison).verdict == "unsure"
    assert comparison.exit_code == 0
    assert comparison.blind == comparison.rows


def test_what_has_failed_is_no_missing_row():
    before = report(case(result("flatstep", 1.0), result("torch fused", 2.0)))
    after = report(case(Result("flatstep", "wrong result: p"), result("torch fused", 2.0)))
    comparison = compare(before, after)
    assert [row.verdict for row in comparison.rows] == ["fails in B", "within noise"]
    assert comparison.exit_code == 1


def test_what_only_one_run_has_is_no_change():
    before = report(case(result("flatstep", 1.0), name="gpt2"))
    after = report(case(result("flatstep", 9.0), name="mlp"))
    comparison = compare(before, after)
    assert [row.verdict for row in comparison.rows] == ["only in A", "only in B"]
    assert comparison.exit_code == 2


def test_a_workload_of_another_size_is_another():
    before, after = (case(result("flatstep", seconds)) for seconds in (1.0, 9.0))
    after.parameters = 2000
    assert not compare(report(before), report(after)).compared


def test_torch_that_became_slower_is_shown_but_no_failure():
    before, after = (report(case(result("torch fused", s))) for s in (1.0, 2.0))
    comparison = compare(before, after)
    assert only_row(comparison).verdict == "slower"
    assert comparison.exit_code == 0


def test_points_buckets_and_passes_are_matched_by_what_they_are():
    def found(factor: float) -> Report:
        race = {"limits": [limit(1.0)], "results": [result("flatstep", factor)], **SIZE}
        sweep = Sweep("threads", "Threads", "adam", "float32", [Point(x=2, **race)])
        norm = Pass(name="norm", title="norm", calls="norm", workload="gpt2", **race)
        bucket = Bucket(smallest=1, largest=9, tensors=2, **race)
        return report(case(buckets=[bucket]), passes=[norm], sweeps=[sweep])

    comparison = compare(found(1.0), found(2.0))
    assert [row.verdict for row in comparison.rows] == ["slower"] * 3
    assert all(row.again for row in comparison.rows)


# ---- the command


def test_it_says_what_became_slower_and_how_to_measure_it_again(tmp_path: Path):
    before = report(case(result("flatstep", 1.0), result("torch fused", 2.0)))
    after = report(case(result("flatstep", 1.2), result("torch fused", 2.0)))
    kept = tmp_path / "comparison.json"
    code, out = invoke(*files(tmp_path, before, after), "--json", str(kept))
    assert code == 1
    assert "+20.0%" in out
    assert "slower by more than 5% beyond the noise, or fails, once" in out
    assert "flatstep profile --workload gpt2 --optimizer adam --dtype float32" in out
    written = json.loads(kept.read_text())
    assert written["exit_code"] == 1
    assert [row["verdict"] for row in written["rows"]] == ["slower", "within noise"]


def test_a_larger_threshold_lets_it_pass(tmp_path: Path):
    before, after = (report(case(result("flatstep", s))) for s in (1.0, 1.2))
    code, out = invoke(*files(tmp_path, before, after), "--threshold", "25%")
    assert code == 0
    assert "nothing became slower by more than 25% beyond the noise" in out


def test_an_optimizer_that_was_named_is_judged_too():
    def named(seconds: float) -> Report:
        return report(case(result("flatstep", 1.0), result("my.MyAdam, eps=0.1", seconds)))

    assert compare(named(1.0), named(1.2), 0.05).exit_code == 1
    assert compare(named(1.2), named(1.0), 0.05).exit_code == 0


def test_noise_above_the_threshold_is_said(tmp_path: Path):
    before, after = (report(case(result("flatstep", 1.0, noise=0.2))) for _ in range(2))
    code, out = invoke(*files(tmp_path, before, after))
    assert code == 0
    assert "once the noise is larger than that" in out
    assert "--seconds" in out


def test_other_machines_and_warnings_come_first(tmp_path: Path):
    before, after = (report(case(result("flatstep", 1.0)), warnings=["busy"]) for _ in range(2))
    after.machine = Machine("B CPU", 2, 2, "avx2", "0.1.0", "2.14.0", "Linux 6")
    code, out = invoke(*files(tmp_path, before, after))
    assert code == 0
    said = "the runs differ in more than time: cpu: A CPU in A, B CPU in B; torch: 2.13.0 in A"
    assert out.index("A: warning: busy") < out.index(said) < out.index("gpt2 × adam")


def test_nothing_in_common_is_said(tmp_path: Path):
    before = report(case(result("flatstep", 1.0), name="gpt2"))
    after = report(case(result("flatstep", 1.0), name="mlp"))
    code, out = invoke(*files(tmp_path, before, after))
    assert code == 2
    assert "only in A: gpt2 × adam, float32" in out
    assert "nothing to compare" in out


def test_names_are_no_markup(tmp_path: Path):
    before, after = (
        report(case(result("flatstep [red]x", 1.0), name="[bold]m[/]")) for _ in range(2)
    )
    code, out = invoke(*files(tmp_path, before, after))
    assert code == 0
    assert "flatstep [red]x" in out
    assert "[bold]m[/] × adam" in out


@pytest.mark.parametrize("columns", [80, 120])
def test_no_figure_is_cut_off(tmp_path: Path, columns: int):
    before, after = (
        report(case(result("flatstep flat", s), result("torch for-loop", s))) for s in (0.1, 0.12)
    )
    code, out = invoke(*files(tmp_path, before, after), columns=columns)
    assert code == 1
    assert "…" not in out


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '"machine"', '{"machine": 1}', '{"cases": []}', "\x00\xff"]
)
def test_a_broken_file_is_refused(tmp_path: Path, text: str):
    good, _ = files(tmp_path, report(), report())
    bad = tmp_path / "bad.json"
    bad.write_text(text)
    code, out = invoke(good, str(bad))
    assert code == 2
    assert "cannot be loaded" in out


def test_a_word_in_place_of_a_time_is_refused(tmp_path: Path):
    values = report(case(result("flatstep", 1.0))).as_dict()
    values["cases"][0]["results"][0]["timing"]["median"] = "<b>1</b>"
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps(values))
    code, out = invoke(str(bad), str(bad))
    assert code == 2
    assert "stands where a float should" in out


@pytest.mark.parametrize("options", [("--threshold", "0.05"), ("--json", "/no/such/file.json")])
def test_a_wrong_option_is_refused_before_anything_is_read(options: tuple[str, str]):
    code, out = invoke("none.json", "none.json", *options)
    assert code == 2
    assert "none.json" not in out
    assert "write it as in 5%" in out or "there is no directory /no/such" in out


@pytest.mark.parametrize(("text", "share"), [("5%", 0.05), ("0.5 %", 0.005), ("100%", 1.0)])
def test_a_threshold_is_a_share_in_per_cent(text: str, share: float):
    assert share_of(text) == pytest.approx(share)


@pytest.mark.parametrize("name", ["cpu-amd-epyc-2", "one-pass-cpu-amd-epyc"])
def test_figures_of_an_earlier_version_can_be_compared(name: str):
    code, out = invoke(str(RESULTS / f"{name}.json"), str(RESULTS / f"{name}-second-run.json"))
    assert code in (0, 1)
    assert "→ measured:" in out
