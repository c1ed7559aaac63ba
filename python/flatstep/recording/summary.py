"""A recording in words and figures."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from statistics import median
from textwrap import fill
from typing import TYPE_CHECKING

import torch

from flatstep.flat import holds_gradient
from flatstep.profiling.measure import Timing
from flatstep.profiling.text import (
    counted,
    format_bytes,
    format_time,
    millions,
    percent,
    plain_table,
    significant,
)
from flatstep.recording.rows import Row
from flatstep.recording.watch import StepWatch

if TYPE_CHECKING:
    from flatstep.recording.recorder import Recorder

COLUMNS = ("", "median", "25 %", "75 %", "least", "most", "first")
WIDTH = 79
MANY = 32  # tensors, from which looking each of them up takes longer than Python's fixed part
LARGE = 64 << 20  # bytes: what is less may lie in caches between two steps
MUCH = 0.25  # of a step's time
NEAR = 0.7  # of the limit
TOO_GOOD = 1.1

Column = Callable[[Row], float | None]


def summary(recorder: Recorder) -> str:
    """A table for each optimizer, and what to do next."""
    every = recorder.rows()
    parts = []
    for name in recorder.watches:
        rows = [row for row in every if row.optimizer == name]
        lines = [_title(recorder, name, rows)]
        if rows:
            lines += plain_table(COLUMNS, _cells(rows))
            limit = recorder.limit(name)
            if limit is not None:
                lines.append(f" limit: {significant(limit)} GB/s")
        parts.append("\n".join([*lines, fill(advice(recorder, name, rows), WIDTH)]))
    return "\n\n".join(parts)


def _title(recorder: Recorder, name: str, rows: Sequence[Row]) -> str:
    title = f"{name}: {counted(len(rows), 'step')}"
    traffic = recorder.traffic(name)
    if traffic is not None:
        moved = median([row.bytes_moved or 0 for row in rows if not row.skipped] or [0])
        title += (
            f" of {counted(traffic.tensors, 'tensor')}, {millions(traffic.elements)} parameters, "
            f"{format_bytes(round(moved))} a step"
        )
    skipped = sum(row.skipped for row in rows)
    return f"{title}; {skipped} skipped" if skipped else title


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    """The lines of the table, without those that nobody has."""
    columns: dict[str, tuple[Column, Callable[[float], str]]] = {
        "step()": (lambda row: row.wall_s, format_time),
        "kernels": (lambda row: row.kernel_s, format_time),
        "  norm": (lambda row: row.norm_s, format_time),
        "GB/s": (lambda row: row.gb_per_s, significant),
        "of limit": (lambda row: row.of_limit, percent),
        "grad norm": (lambda row: row.grad_norm, lambda norm: f"{norm:.4g}"),
    }
    cells = []
    for name, (column, text) in columns.items():
        values = [value for row in usual(rows) if (value := column(row)) is not None]
        if values:
            of = Timing.of(values)
            figures = [of.median, of.lower_quartile, of.upper_quartile, of.least, of.most]
            first = column(rows[0])
            cells.append([name, *map(text, figures), "" if first is None else text(first)])
    return cells


def usual(rows: Sequence[Row]) -> Sequence[Row]:
    """The steps that stand for the others: neither skipped nor the first, where there are such."""
    return [row for row in rows[1:] if not row.skipped] or rows


def advice(recorder: Recorder, name: str, rows: Sequence[Row]) -> str:
    """What to do next, in one sentence."""
    watch, traffic = recorder.watches[name], recorder.traffic(name)
    if not rows:
        return "Nothing was recorded: call step() of this optimizer inside the `with`."
    if not isinstance(watch, StepWatch):
        return (
            "Only the time of step() is known of this optimizer: flatstep's own tell of their "
            "kernels."
        )
    skipped = sum(row.skipped for row in rows)
    if traffic is None or skipped > len(rows) / 10:
        return (
            f"{skipped} of {counted(len(rows), 'step')} met gradients that are not finite and "
            "changed nothing: lower the learning rate, or look at the data of these steps."
        )
    if traffic.elsewhere:
        return (
            f"{counted(traffic.elsewhere, 'parameter')} cannot go through the one call of the "
            "kernels (strided, overlapping, sparse, a subclass): make them and their gradients "
            "dense and contiguous."
        )
    wall = median(row.wall_s for row in usual(rows))
    kernel = median(row.kernel_s or 0.0 for row in usual(rows))
    if traffic.gpu is None and wall - kernel > MUCH * wall:
        return _advice_on_wall_time(watch, traffic.tensors, wall, kernel)
    shares = [row.of_limit for row in usual(rows) if row.of_limit is not None]
    if shares and median(shares) > TOO_GOOD:
        return (
            "The steps were faster than the limit: the machine was busier when that was measured, "
            "so give flatstep.profile(opt, limit=...) the best GB/s that you know of it."
        )
    if not shares or traffic.update < LARGE:
        return (
            "The update is small: its arrays may lie in caches, and backward() takes their place; "
            "more per step, or less often, is all that would help."
        )
    if median(shares) < NEAR:
        return _advice_on_share(traffic.gpu)
    return "The update runs near this machine's limit: only fewer bytes would be faster."


def _advice_on_wall_time(watch: StepWatch, tensors: int, wall: float, kernel: float) -> str:
    apart = f"{format_time(wall - kernel)} of {format_time(wall)} pass outside the kernels"
    params = [param for group in watch.optimizer.param_groups for param in group["params"]]
    if tensors >= MANY and not all(map(holds_gradient, params)):
        return f"{apart}, in looking {tensors:,} tensors up: try flatstep.flatten_(model)."
    return f"{apart}, in Python and hooks: that is a fixed cost, which only larger steps hide."


def _advice_on_share(gpu: int | None) -> str:
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    if gpu is None and threads < cores // 2:
        return (
            f"The update runs on {counted(threads, 'thread')} of {counted(cores, 'core')}: try "
            "torch.set_num_threads()."
        )
    where = " --device cuda" if gpu is not None else ""
    return (
        "Something else uses the memory meanwhile, or the arrays lie badly: compare with "
        f"`flatstep profile{where}`, which measures updates alone."
    )
