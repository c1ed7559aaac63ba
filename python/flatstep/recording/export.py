"""A recording for other programs: CSV, Chrome's trace format, TensorBoard."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flatstep.recording.rows import Row
from flatstep.recording.watch import NONE, NORM, UPDATE, Record, Watch

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from flatstep.recording.recorder import Recorder


def write_csv(recorder: Recorder, path: str | PathLike[str]) -> None:
    """Writes a line of names, and one for each row."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows((*row[:-1], int(row.skipped)) for row in recorder.rows())


def write_chrome_trace(recorder: Recorder, path: str | PathLike[str]) -> None:
    """Writes the trace-event format: a track for each optimizer, in microseconds."""
    process = os.getpid()
    events: list[dict[str, Any]] = [_named("process_name", "flatstep", process, 0)]
    rows: dict[str, list[Row]] = {name: [] for name in recorder.watches}
    for row in recorder.rows():
        rows[row.optimizer].append(row)
    for track, (name, watch) in enumerate(recorder.watches.items(), start=1):
        events.append(_named("thread_name", name, process, track))
        events.append(
            {"ph": "M", "name": "thread_sort_index", "pid": process, "tid": track}
            | {"args": {"sort_index": track}}
        )
        for row, record in zip(rows[name], watch.records(), strict=True):
            events += (
                {**event, "pid": process, "tid": track} for event in _events(row, record, watch)
            )
    trace = {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"began_at": recorder.began_at},
    }
    Path(path).write_text(json.dumps(trace, allow_nan=False), encoding="utf-8")


def _named(what: str, name: str, process: int, track: int) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": process, "tid": track, "args": {"name": name}}


def _events(row: Row, record: Record, watch: Watch) -> Iterator[dict[str, Any]]:
    """The step's range and those inside, then the counters."""

    def range_of(name: str, begin: float, end: float, **args: Any) -> dict[str, Any]:
        start = row.start_s + begin - record.begin
        event = {"ph": "X", "name": name, "cat": "flatstep", "ts": start * 1e6}
        return {**event, "dur": (end - begin) * 1e6, "args": args}

    known = {key: _valid(value) for key, value in row._asdict().items() if value is not None}
    yield range_of(f"{type(watch.optimizer).__name__}.step", record.begin, record.end, **known)
    if record.norm_begin != NONE:
        yield range_of(NORM, record.norm_begin, record.norm_end)
    if record.update_begin != NONE:
        yield range_of(UPDATE, record.update_begin, record.update_end)
    for name, value in (("GB/s", row.gb_per_s), ("gradient norm", row.grad_norm)):
        if value is not None and math.isfinite(value):
            counter = {"ph": "C", "name": f"{row.optimizer}: {name}", "ts": row.start_s * 1e6}
            yield {**counter, "args": {name: value}}


def _valid(value: Any) -> Any:
    """The value, or its name where JSON has no number for it."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def write_tensorboard(recorder: Recorder, where: SummaryWriter | str | PathLike[str]) -> None:
    """Adds a scalar for each figure of each row, at the row's own time."""
    if isinstance(where, (str, PathLike)):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "to_tensorboard() needs TensorBoard: pip install tensorboard"
            ) from error
        with SummaryWriter(os.fspath(where)) as writer:
            write_tensorboard(recorder, writer)
        return
    for row in recorder.rows():
        before = f"flatstep/{row.optimizer}/" if len(recorder.watches) > 1 else "flatstep/"
        figures = {
            "wall_ms": row.wall_s * 1e3,
            "kernel_ms": None if row.kernel_s is None else row.kernel_s * 1e3,
            "gb_per_s": row.gb_per_s,
            "of_limit": row.of_limit,
            "grad_norm": row.grad_norm,
            "skipped": float(row.skipped),
        }
        for name, value in figures.items():
            if value is not None:
                at = recorder.began_at + row.start_s
                where.add_scalar(before + name, value, row.step, walltime=at)
