"""A recording says what the steps of a training took, and leaves them as they are."""

from __future__ import annotations

import copy
import csv
import json
import math
import pickle
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import assert_same_run, give_gradients, train
from torch.nn import Parameter

import flatstep
from flatstep import _core
from flatstep.optim import sharding
from flatstep.recording import Recorder, Row, summary, traffic, watch
from flatstep.recording.watch import AT_ONCE, TimedPlan

F32, BF16 = torch.float32, torch.bfloat16
LIMIT = 50.0  # GB/s


def params_of(sizes: Iterable[int] = (64, 33), dtype: torch.dtype = F32) -> list[Parameter]:
    return [Parameter(torch.linspace(-1, 1, size).to(dtype)) for size in sizes]


def record(opt: torch.optim.Optimizer, steps: int = 3) -> Recorder:
    with flatstep.profile(opt, limit=LIMIT) as prof:
        train(opt, range(steps))
    return prof


# ---- the rows


def test_a_row_says_what_a_step_took() -> None:
    opt = flatstep.AdamW(params_of())
    rows = record(opt).rows()
    assert [row.step for row in rows] == [1, 2, 3]
    begin = 0.0
    for row in rows:
        assert row.start_s >= begin
        begin = row.start_s + row.wall_s
        assert row.kernel_s is not None
        assert row.wall_s > row.kernel_s > 0
        assert row.bytes_moved == 7 * 4 * 97
        assert row.gb_per_s == pytest.approx(row.bytes_moved / row.kernel_s / 1e9)
        assert row.of_limit == pytest.approx(row.gb_per_s / LIMIT)
        assert row.optimizer == "AdamW"
        assert (row.norm_s, row.grad_norm, row.skipped) == (None, None, False)


@pytest.mark.parametrize("cls", [flatstep.Adam, flatstep.AdamW, flatstep.RMSprop, flatstep.SGD])
def test_a_recorded_step_has_the_bits_of_another(cls: Any) -> None:
    recorded, plain = (cls(params_of(), lr=0.01, max_grad_norm=1.0) for _ in range(2))
    train(plain, range(4))
    train(recorded, [0])
    with flatstep.profile(recorded):
        train(recorded, [1, 2])
    train(recorded, [3])
    assert_same_run(recorded, plain, scale=0.0)


BYTES: dict[str, tuple[Any, torch.dtype, dict[str, Any], int]] = {
    "sgd": (flatstep.SGD, F32, {}, 3 * 4),
    "momentum": (flatstep.SGD, F32, {"momentum": 0.9}, 5 * 4),
    "rmsprop": (flatstep.RMSprop, F32, {}, 5 * 4),
    "adam": (flatstep.Adam, F32, {}, 7 * 4),
    "amsgrad": (flatstep.Adam, F32, {"amsgrad": True}, 9 * 4),
    "float64": (flatstep.Adam, torch.float64, {}, 7 * 8),
    "clipped": (flatstep.Adam, F32, {"max_grad_norm": 1.0}, 8 * 4),
    "average": (flatstep.Adam, F32, {"ema_decay": 0.9}, 9 * 4),
    "bfloat16": (flatstep.Adam, BF16, {}, 7 * 2),
    "states": (flatstep.Adam, BF16, {"state_dtype": F32}, 3 * 2 + 4 * 4),
    "copy": (flatstep.Adam, BF16, {"state_dtype": F32, "master": "float32"}, 2 * 2 + 6 * 4),
    "split": (flatstep.Adam, BF16, {"state_dtype": F32, "master": "split"}, 5 * 2 + 4 * 4),
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_are_those_that_the_rule_moves(name: str) -> None:
    cls, dtype, options, each = BYTES[name]
    opt = cls(params_of(dtype=dtype), **options)
    assert {row.bytes_moved for row in record(opt).rows()} == {each * 97}


def test_gradients_that_a_step_clears_are_written_too() -> None:
    params = params_of((64,))
    buffer = flatstep.FlatBuffer(params, clear_gradients=True)
    opt = flatstep.AdamW(params)
    with flatstep.profile(opt, limit=LIMIT) as prof:
        buffer.grads[0].fill_(1.0)
        opt.step()
    assert prof.rows()[0].bytes_moved == 8 * 4 * 64


def test_only_what_is_updated_is_counted() -> None:
    params = params_of((64, 33, 64))
    opt = flatstep.AdamW(params)
    with flatstep.profile(opt, limit=LIMIT) as prof:
        for missing in (None, 0, 1, 2, None):
            give_gradients(params, 0)
            if missing is not None:
                params[missing].grad = None
            opt.step()
    assert [row.bytes_moved for row in prof.rows()] == [
        28 * count for count in (161, 97, 128, 97, 161)
    ]


def test_the_norm_is_that_of_the_step() -> None:
    params = params_of()
    opt = flatstep.AdamW(params, max_grad_norm=1.0)
    wanted = []
    with flatstep.profile(opt, limit=LIMIT) as prof:
        for step in range(3):
            train(opt, [step])
            wanted.append(float(opt.grad_norm))
        opt.param_groups[0]["max_grad_norm"] = None
        train(opt, [3])
    *rows, last = prof.rows()
    assert [row.grad_norm for row in rows] == pytest.approx(wanted)
    assert all(row.kernel_s > row.norm_s > 0 for row in rows)
    assert (last.grad_norm, last.norm_s) == (None, None)


def test_the_norm_of_shards_is_timed_and_seen_and_has_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a rank that has all of each shard; one of them goes another way than through the plan."""

    def shards() -> list[Parameter]:
        return [*params_of((64, 40_000)), Parameter(torch.linspace(-1, 1, 66)[::2])]

    plain, opt = (flatstep.AdamW(shards(), max_grad_norm=1.0) for _ in range(2))
    train(plain, range(3))
    monkeypatch.setattr(sharding, "norms_of", sharding.Norms)
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen,
        flatstep.profile(opt, limit=LIMIT) as prof,
    ):
        train(opt, range(3))
    rows = prof.rows()
    assert len(rows) == 3
    for row in rows:
        assert row.norm_s is not None
        assert row.kernel_s is not None
        assert row.kernel_s > row.norm_s > 0
    assert rows[-1].grad_norm == pytest.approx(float(plain.grad_norm))
    assert {event.key: event.count for event in seen.key_averages()}["flatstep::norm"] == 3
    assert_same_run(opt, plain, scale=0.0)


def test_a_skipped_step_is_told_from_others() -> None:
    params = params_of()
    opt = flatstep.AdamW(params, skip_nonfinite=True)
    with flatstep.profile(opt, limit=LIMIT) as prof:
        for step in range(4):
            give_gradients(params, step)
            if step in (0, 2):
                params[0].grad[5] = math.inf
            opt.step()
    rows = prof.rows()
    assert [row.skipped for row in rows] == [True, False, True, False]
    assert [row.grad_norm for row in rows if row.skipped] == [math.inf, math.inf]
    assert rows[2].bytes_moved == 4 * 97
    assert "4 steps of 2 tensors, 97 parameters, 3.1 kB a step; 2 skipped" in said(prof)


def test_a_step_that_grad_scaler_stops_is_skipped() -> None:
    params = params_of()
    opt = flatstep.AdamW(params, fused=True)
    scaler = flatstep.GradScaler("cpu", init_scale=8.0)
    with flatstep.profile(opt, limit=LIMIT) as prof:
        for worst in (math.inf, 1.0):
            opt.zero_grad()
            scaler.scale(sum(p.sum() for p in params) * worst).backward()
            scaler.step(opt)
            scaler.update()
    assert [row.skipped for row in prof.rows()] == [True, False]


@pytest.mark.parametrize("cls", [flatstep.AdamW, torch.optim.AdamW])
def test_the_time_of_a_closure_is_not_the_steps(cls: Any) -> None:
    opt = cls(params_of())
    moments = []

    def closure() -> float:
        give_gradients(opt.param_groups[0]["params"], 0)
        moments.append(perf_counter())
        return 1.5

    with flatstep.profile(opt, limit=LIMIT) as prof:
        assert opt.step(closure) == 1.5
        assert opt.step(closure=closure) == 1.5
    assert prof.began is not None
    for row, moment in zip(prof.rows(), moments, strict=True):
        assert prof.began + row.start_s >= moment


def test_a_step_that_raises_is_not_recorded() -> None:
    params = params_of()
    opt = flatstep.AdamW(params, error_if_nonfinite=True)
    with flatstep.profile(opt, limit=LIMIT) as prof:
        train(opt, [0])
        give_gradients(params, 1)
        params[0].grad[0] = math.nan
        with pytest.raises(RuntimeError, match="non-finite"):
            opt.step()
        train(opt, [1])
    assert [row.step for row in prof.rows()] == [1, 2]


def test_more_steps_than_are_kept_at_once_are_all_there() -> None:
    opt = flatstep.SGD(params_of((4,)))
    give_gradients(opt.param_groups[0]["params"], 0)
    steps = AT_ONCE + 3
    with flatstep.profile(opt, limit=LIMIT) as prof:
        for _ in range(steps):
            opt.step()
    rows = prof.rows()
    assert [row.step for row in rows] == list(range(1, steps + 1))
    assert all(row.wall_s > row.kernel_s > 0 for row in rows)
    assert all(a.start_s < b.start_s for a, b in pairwise(rows))


# ---- what else happens while it runs


def test_nothing_stays_of_a_recording() -> None:
    opt = flatstep.AdamW(params_of())
    train(opt, [0])
    before = dict(opt.__dict__)
    record(opt)
    assert opt.__dict__.keys() == before.keys()
    assert type(opt._table.plan) is _core.Plan


def test_an_exception_ends_the_recording_and_keeps_it() -> None:
    opt = flatstep.AdamW(params_of())
    prof = flatstep.profile(opt, limit=LIMIT)

    def fail() -> None:
        with prof:
            train(opt, [0, 1])
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    train(opt, [2])
    assert len(prof.rows()) == 2
    assert opt._watch is None


def test_a_recording_goes_on_where_it_is_entered_again() -> None:
    opt = flatstep.AdamW(params_of())
    prof = flatstep.profile(opt, limit=LIMIT)
    for _ in range(2):
        with prof:
            train(opt, [0, 1])
        train(opt, [2])
    assert [row.step for row in prof.rows()] == [1, 2, 3, 4]


def test_one_optimizer_has_one_recording_at_a_time() -> None:
    opt, other = flatstep.AdamW(params_of()), flatstep.SGD(params_of())
    with flatstep.profile(opt, limit=LIMIT) as prof:
        with pytest.raises(ValueError, match="AdamW is being recorded already"):
            flatstep.profile(other, opt).start()
        assert other._watch is None
        with pytest.raises(ValueError, match="running already"):
            prof.start()
        train(opt, [0])
    assert len(prof.rows()) == 1
    record(opt)


def test_several_optimizers_are_told_apart() -> None:
    first, second, third = (
        flatstep.AdamW(params_of((8,))),
        flatstep.SGD(params_of((16,))),
        flatstep.AdamW(params_of((32,))),
    )
    with flatstep.profile(first, second, third, limit=LIMIT) as prof:
        for step in range(2):
            for opt in (second, first, third):
                train(opt, [step])
    rows = prof.rows()
    assert [row.optimizer for row in rows] == ["SGD", "AdamW 1", "AdamW 2"] * 2
    assert [row.step for row in rows] == [1, 1, 1, 2, 2, 2]
    assert [row.bytes_moved for row in rows[:3]] == [12 * 16, 28 * 8, 28 * 32]
    assert prof.since_last().keys() >= {"SGD/wall_ms", "AdamW 1/wall_ms", "AdamW 2/kernel_ms"}


def test_copies_of_a_recorded_optimizer_are_not_recorded() -> None:
    opt = flatstep.AdamW(params_of())
    with flatstep.profile(opt, limit=LIMIT) as prof:
        train(opt, [0])
        for copied in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
            train(copied, [1])
            assert copied._watch is None
            assert type(copied._table.plan) is _core.Plan
        train(opt, [1])
    assert len(prof.rows()) == 2


def test_a_recording_goes_on_after_a_checkpoint_is_loaded() -> None:
    opt = flatstep.AdamW(params_of())
    with flatstep.profile(opt, limit=LIMIT) as prof:
        train(opt, [0])
        opt.load_state_dict(opt.state_dict())
        train(opt, [1])
        opt.add_param_group({"params": params_of((3,))})
        train(opt, [2])
    assert all(row.kernel_s for row in prof.rows())
    assert [row.bytes_moved for row in prof.rows()] == [28 * 97, 28 * 97, 28 * 100]


def test_hooks_schedulers_and_subclasses_are_served_as_ever() -> None:
    class Own(flatstep.AdamW):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    seen: list[str] = []
    for cls in (flatstep.AdamW, Own):
        seen.clear()
        opt = cls(params_of(), lr=1.0)
        opt.register_step_pre_hook(lambda *_: seen.append("before"))
        opt.register_step_post_hook(lambda *_: seen.append("after"))
        with flatstep.profile(opt, limit=LIMIT) as prof:
            schedule = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
            train(opt, [0])
            schedule.step()
            train(opt, [1])
        train(opt, [2])
        assert seen == ["before", "after"] * 3
        assert len(prof.rows()) == 2
        assert opt.param_groups[0]["lr"] == 0.5


def test_a_hook_may_end_the_recording() -> None:
    opt = flatstep.AdamW(params_of())
    prof = flatstep.profile(opt, limit=LIMIT)
    opt.register_step_post_hook(lambda *_: prof.stop())
    prof.start()
    train(opt, [0, 1])
    assert len(prof.rows()) == 1
    assert opt._watch is None


def test_steps_in_backward_and_a_recording_refuse_each_other() -> None:
    opt = flatstep.AdamW(params_of())
    with opt.step_in_backward(), pytest.raises(ValueError, match="no step to record"):
        flatstep.profile(opt).start()
    with flatstep.profile(opt), pytest.raises(ValueError, match="exclude each other"):
        opt.step_in_backward()
    release = opt.step_in_backward()
    release.remove()
    release.remove()
    record(opt)


def test_an_optimizer_of_torchs_has_its_wall_time() -> None:
    opt = torch.optim.AdamW(params_of())
    prof = record(opt)
    train(opt, [3])
    rows = prof.rows()
    assert len(rows) == 3
    for row in rows:
        assert row.wall_s > 0
        assert (row.kernel_s, row.bytes_moved, row.gb_per_s, row.of_limit) == (None,) * 4
    assert "Only the time of step() is known" in said(prof)


def test_a_wrapped_optimizer_is_found() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    opt = flatstep.AdamW(params_of())
    with flatstep.profile(Wrapper(Wrapper(opt)), limit=LIMIT) as prof:
        train(opt, [0])
    assert len(prof.rows()) == 1


def test_what_cannot_be_recorded_is_refused() -> None:
    opt = flatstep.AdamW(params_of())
    with pytest.raises(ValueError, match="needs an optimizer"):
        flatstep.profile()
    with pytest.raises(TypeError, match=r"not list; .* flatstep.profile\(\*optimizers\)"):
        flatstep.profile([opt])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the same optimizer twice"):
        flatstep.profile(opt, opt)
    with pytest.raises(ValueError, match="Invalid limit: 0"):
        flatstep.profile(opt, limit=0)


# ---- what it costs


def calls_of(call: Callable[[], object]) -> int:
    """How many functions are called, of Python and of C."""
    found = 0

    def note(_: Any, event: str, __: Any) -> None:
        nonlocal found
        found += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize(("options", "most"), [({}, 12), ({"max_grad_norm": 1.0}, 15)])
def test_a_recorded_step_makes_few_calls_more(options: dict[str, Any], most: int) -> None:
    opt = flatstep.AdamW(params_of(), **options)
    train(opt, [0])
    plain = calls_of(opt.step)
    with flatstep.profile(opt):
        opt.step()
        recorded = calls_of(opt.step)
    assert plain < recorded <= plain + most
    assert calls_of(opt.step) == plain


class Gpu:
    """Stands in for torch's view of a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waited = 0
        self.ranges: list[str] = []
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def synchronize(self) -> None:
                gpu.waited += 1

            def elapsed_time(self, _: Any) -> float:
                return 2.0

        stream = SimpleNamespace(record_event=lambda event: event)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
        monkeypatch.setattr(
            torch.cuda.nvtx, "range", lambda name: nullcontext(self.ranges.append(name))
        )
        monkeypatch.setattr(TimedPlan, "_find_gpus", lambda _: [0])


def test_a_recording_waits_for_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    opt = flatstep.AdamW(params_of())
    with flatstep.profile(opt, limit=LIMIT) as prof:
        train(opt, [0, 1])
    assert gpu.ranges == ["flatstep::update"] * 2
    assert gpu.waited == 0
    assert [row.kernel_s for row in prof.rows()] == [0.002, 0.002]
    assert gpu.waited == 2


def test_what_a_gpu_skipped_is_known_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    opt = flatstep.AdamW(params_of())
    found = torch.zeros(3, dtype=torch.float64)

    def step(_: Any) -> None:
        """A step as on a GPU: its norm and what follows from it stay there."""
        plan: Any = opt._make_plan(opt.rule)
        plan.plan = SimpleNamespace(norm_on_gpu=lambda *_: None)
        plan._step = lambda *_: None
        opt._clipped.norm = opt._clipped.there = SimpleNamespace(gpu=0, found=found)
        plan.norm_on_gpu(0, False, 0, 0, 0, 0)
        plan.step([], [], 1, {0: (0, 0, 0, [], 1, True)}, [])

    with flatstep.profile(opt, limit=LIMIT) as prof:
        for norm, inf in ((1.5, 0.0), (math.nan, 0.0), (2.5, 1.0)):
            found[1], opt.found_inf = norm, torch.tensor(inf)
            opt._watch.step(step, (opt,), {}, False)
    del opt.found_inf
    assert gpu.ranges == ["flatstep::norm", "flatstep::update"] * 3
    assert gpu.waited == 0
    rows = prof.rows()
    assert [row.skipped for row in rows] == [False, True, True]
    assert [row.grad_norm for row in rows] == pytest.approx([1.5, math.nan, 2.5], nan_ok=True)
    assert [(row.norm_s, row.kernel_s) for row in rows] == [(0.002, 0.004)] * 3


def test_a_step_in_a_graph_has_no_time_of_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = Gpu(monkeypatch)
    monkeypatch.setattr(watch, "is_being_captured", lambda: True)
    opt = flatstep.AdamW(params_of())
    with flatstep.profile(opt, limit=LIMIT) as prof:
        train(opt, [0])
    assert len(prof.rows()) == 1
    assert gpu.waited == 0


# ---- where it shows


def test_the_ranges_show_in_torchs_profiler() -> None:
    opt = flatstep.AdamW(params_of(), max_grad_norm=1.0)
    train(opt, [0])
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen,
        flatstep.profile(opt, limit=LIMIT) as prof,
    ):
        train(opt, [1, 2])
    ranges = {event.key: event.count for event in seen.key_averages()}
    assert ranges["Optimizer.step#AdamW.step"] == 2
    assert ranges["flatstep::norm"] == 2
    assert ranges["flatstep::update"] == 2
    assert len(prof.rows()) == 2


def test_a_csv_file_has_every_row(tmp_path: Path) -> None:
    prof = record(flatstep.AdamW(params_of(), max_grad_norm=1.0))
    path = tmp_path / "steps.csv"
    prof.to_csv(path)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == Row._fields
    for line, row in zip(lines, prof.rows(), strict=True):
        assert float(line["wall_s"]) == row.wall_s
        assert float(line["grad_norm"]) == row.grad_norm
        assert line["skipped"] == "0"
    plain = record(flatstep.AdamW(params_of()), 1)
    plain.to_csv(path)
    with path.open(newline="") as file:
        assert next(csv.DictReader(file))["grad_norm"] == ""


def test_a_trace_has_ranges_inside_the_steps(tmp_path: Path) -> None:
    params = params_of()
    opt = flatstep.AdamW(params, max_grad_norm=1.0, skip_nonfinite=True)
    other = torch.optim.SGD(params_of())
    with flatstep.profile(opt, other, limit=LIMIT) as prof:
        train(opt, [0])
        give_gradients(params, 1)
        params[0].grad[0] = math.nan
        opt.step()
        train(other, [0])
    path = tmp_path / "trace.json"
    prof.to_chrome_trace(path)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    trace = json.loads(path.read_text(), parse_constant=refuse)
    events = trace["traceEvents"]
    assert all({"ph", "name", "pid"} <= event.keys() for event in events)
    ranges = [event for event in events if event["ph"] == "X"]
    assert [event["name"] for event in ranges] == [
        "AdamW.step",
        "flatstep::norm",
        "flatstep::update",
        "AdamW.step",
        "flatstep::norm",
        "SGD.step",
    ]
    whole = None
    for event in ranges:
        assert event["dur"] > 0
        if event["name"].endswith(".step"):
            whole = event
        else:
            assert event["tid"] == whole["tid"]
            assert event["ts"] >= whole["ts"]
            assert event["ts"] + event["dur"] <= whole["ts"] + whole["dur"] + 1e-3
    assert ranges[0]["args"]["bytes_moved"] == 32 * 97
    assert ranges[3]["args"]["grad_norm"] == "nan"
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {1: "AdamW", 2: "SGD"}
    counters = [event for event in events if event["ph"] == "C"]
    assert {event["name"] for event in counters} == {"AdamW: GB/s", "AdamW: gradient norm"}


def test_tensorboard_has_every_step(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    prof = record(flatstep.AdamW(params_of(), max_grad_norm=1.0))
    prof.to_tensorboard(tmp_path / "folder")
    with SummaryWriter(str(tmp_path / "writer")) as writer:
        prof.to_tensorboard(writer)
    for name in ("folder", "writer"):
        found = EventAccumulator(str(tmp_path / name))
        found.Reload()
        scalars = found.Scalars("flatstep/grad_norm")
        assert [scalar.step for scalar in scalars] == [1, 2, 3]
        wanted = [row.grad_norm for row in prof.rows()]
        assert [scalar.value for scalar in scalars] == pytest.approx(wanted)
        assert scalars[0].wall_time == pytest.approx(prof.began_at + prof.rows()[0].start_s)


def test_without_tensorboard_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    prof = record(flatstep.AdamW(params_of()))
    with pytest.raises(ImportError, match="pip install tensorboard"):
        prof.to_tensorboard(tmp_path)


def test_a_dict_is_fit_for_json() -> None:
    prof = record(flatstep.AdamW(params_of()))
    found = json.loads(json.dumps(prof.as_dict()))
    assert found["limits_gb_per_s"] == {"AdamW": LIMIT}
    assert [Row(**row) for row in found["rows"]] == prof.rows()


def test_a_log_hears_of_each_step_once() -> None:
    opt = flatstep.AdamW(params_of(), max_grad_norm=1.0)
    with flatstep.profile(opt) as prof:
        train(opt, [0, 1])
        figures = prof.since_last()
        assert figures.keys() == {"wall_ms", "kernel_ms", "gb_per_s", "grad_norm", "skipped"}
        assert figures["grad_norm"] == pytest.approx(float(opt.grad_norm))
        assert prof.since_last() == {}
        train(opt, [2])
        last = prof.since_last()
    assert last["wall_ms"] == pytest.approx(prof.rows()[-1].wall_s * 1e3)


# ---- the limit and the summary


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}, {"ema_decay": 0.9}])
def test_the_limit_is_measured_once(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic, "SECONDS", 0.01)
    opt = flatstep.AdamW(params_of((4096,)), **options)
    with flatstep.profile(opt) as prof:
        train(opt, [0, 1])
        assert prof.since_last()
        assert prof._limits == {}
    limit = prof.limit("AdamW")
    assert limit is not None
    assert limit > 0
    rows = prof.rows()
    assert rows[1].of_limit == pytest.approx(rows[1].gb_per_s / limit)
    assert prof.limit("AdamW") == limit


@pytest.mark.parametrize("count", [1, 3])
def test_a_handful_of_numbers_has_a_limit_too(count: int) -> None:
    param = Parameter(torch.zeros(count))
    param.grad = torch.ones(count)
    opt = flatstep.AdamW([param], max_grad_norm=1.0)
    with flatstep.profile(opt) as prof:
        opt.step()
    [row] = prof.rows()
    assert row.of_limit is not None
    assert row.of_limit > 0


def test_the_limits_arrays_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "SECONDS", 0.01)
    monkeypatch.setattr(traffic, "MOST_BYTES", 1 << 16)
    opt = flatstep.AdamW(params_of((1 << 16,)))
    assert record(opt, 1).traffic("AdamW").update == 28 << 16
    with flatstep.profile(opt) as prof:
        train(opt, [0])
    assert prof.limit("AdamW") > 0


def said(prof: Recorder) -> str:
    """The summary, however its lines are broken."""
    return " ".join(prof.summary().split())


def test_a_summary_has_medians_and_the_first_step() -> None:
    lines = record(flatstep.AdamW(params_of(), max_grad_norm=1.0), 4).summary().splitlines()
    assert lines[0] == "AdamW: 4 steps of 2 tensors, 97 parameters, 3.1 kB a step"
    assert lines[1].split() == ["median", "25", "%", "75", "%", "least", "most", "first"]
    names = ["step()", "kernels", "norm", "GB/s", "of limit", "grad norm"]
    assert [line[1:11].strip() for line in lines[2:8]] == names
    assert lines[8] == " limit: 50.0 GB/s"
    assert len(lines) > 9
    assert max(map(len, lines)) < 80


def test_a_summary_of_nothing_says_what_is_missing() -> None:
    opt = flatstep.AdamW(params_of())
    with flatstep.profile(opt) as prof:
        pass
    assert prof.summary() == (
        "AdamW: 0 steps\nNothing was recorded: call step() of this optimizer inside the `with`."
    )
    assert prof.rows() == []


def advice_on(
    monkeypatch: pytest.MonkeyPatch, opt: flatstep.AdamW, *, wall: float, kernel: float
) -> str:
    """The advice on steps that took these seconds."""
    prof = record(opt)
    (watched,) = prof.watches.values()
    record_of = next(watched.records())
    times = record_of._replace(
        end=record_of.begin + wall,
        update_begin=record_of.begin,
        update_end=record_of.begin + kernel,
    )
    monkeypatch.setattr(watched, "records", lambda first=0: iter([times] * 3))
    return said(prof).partition("limit: 50.0 GB/s ")[2]


def test_the_advice_fits_what_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    many = flatstep.AdamW(params_of([4] * 40))
    assert "try flatstep.flatten_(model)" in advice_on(monkeypatch, many, wall=1e-3, kernel=1e-4)
    flat = params_of([4] * 40)
    buffer = flatstep.FlatBuffer(flat)
    advice = advice_on(monkeypatch, flatstep.AdamW(flat), wall=2e-3, kernel=1e-3)
    assert "1.00 ms of 2.00 ms pass outside the kernels, in Python" in advice
    del buffer
    few = flatstep.AdamW(params_of())
    assert "in Python and hooks" in advice_on(monkeypatch, few, wall=1e-3, kernel=1e-4)
    assert "The update is small" in advice_on(monkeypatch, few, wall=1e-3, kernel=9e-4)
    moved = 28 * 97 / 1e9
    advice = advice_on(monkeypatch, few, wall=moved / 60, kernel=moved / 60)
    assert advice.startswith("The steps were faster than the limit")
    monkeypatch.setattr(summary, "LARGE", 0)
    advice = advice_on(monkeypatch, few, wall=moved / 49, kernel=moved / 49)
    assert advice.startswith("The update runs near this machine's limit")
    cores = torch.get_num_threads()
    monkeypatch.setattr("os.cpu_count", lambda: cores)
    advice = advice_on(monkeypatch, few, wall=moved / 10, kernel=moved / 10)
    assert "compare with `flatstep profile`" in advice
    monkeypatch.setattr("os.cpu_count", lambda: 4 * cores)
    advice = advice_on(monkeypatch, few, wall=moved / 10, kernel=moved / 10)
    assert "torch.set_num_threads()" in advice


def test_the_advice_names_what_goes_another_way() -> None:
    params = [*params_of(), Parameter(torch.zeros(8, 8).t()[::2])]
    assert "1 parameter cannot go through the one call" in said(record(flatstep.AdamW(params)))


def test_the_advice_names_gradients_that_are_not_finite() -> None:
    params = params_of()
    opt = flatstep.AdamW(params, skip_nonfinite=True)
    with flatstep.profile(opt, limit=LIMIT) as prof:
        for _ in range(2):
            give_gradients(params, 0)
            params[0].grad[0] = math.nan
            opt.step()
    assert "2 of 2 steps met gradients that are not finite" in said(prof)
