"""The recording of an optimizer's steps while a model trains."""

from __future__ import annotations

from collections import Counter
from os import PathLike
from statistics import median
from time import perf_counter, time
from typing import TYPE_CHECKING, Any

import torch

from flatstep.optim.base import Optimizer
from flatstep.optim.routes import local_of
from flatstep.recording.rows import Row
from flatstep.recording.traffic import Traffic, measure_limit
from flatstep.recording.watch import NONE, HookedWatch, Record, StepWatch, Watch, seconds_between

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


def profile(*optimizers: torch.optim.Optimizer, limit: float | None = None) -> Recorder:
    """Records every step of optimizers: ``with flatstep.profile(opt) as prof``.

    A step then reads the clock a few times and keeps eight numbers. Everything else is computed
    when it is asked for. Of an optimizer that is not flatstep's only the wall time is known.

    Args:
        optimizers: One or several; wrappers with an ``.optimizer``, such as Accelerate's, are
            looked into.
        limit: What this machine's memory moves, in 1e9 bytes a second, where that is known. None:
            it is measured, in a second or less, when a figure that needs it is first asked for.

    Returns:
        A context manager, with ``start()`` and ``stop()`` where a ``with`` does not fit. It can be
        read while it runs and afterwards, and goes on where it is entered again.

    Raises:
        TypeError: Something is not an optimizer.
        ValueError: No optimizer, one given twice, or a limit that is not above 0.

    Example:
        >>> with flatstep.profile(opt) as prof:
        ...     train()
        >>> print(prof.summary())
    """
    if not optimizers:
        raise ValueError("profile() needs an optimizer: flatstep.profile(opt)")
    if limit is not None and not limit > 0:
        raise ValueError(f"Invalid limit: {limit}; give 1e9 bytes a second, or None to measure it")
    inner = [unwrapped(optimizer) for optimizer in optimizers]
    if len(set(map(id, inner))) < len(inner):
        raise ValueError("profile() got the same optimizer twice; give each once")
    return Recorder(inner, limit)


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside others that wrap it.

    Raises:
        TypeError: There is none.
    """
    inner = optimizer
    while isinstance(getattr(inner, "optimizer", None), torch.optim.Optimizer):
        inner = inner.optimizer
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(
            f"profile() takes optimizers, not {type(optimizer).__name__}; of several give each: "
            "flatstep.profile(*optimizers)"
        )
    return inner


class Recorder:
    """What :func:`flatstep.profile` returns.

    Attributes:
        watches: What is kept of each optimizer, by the name that its rows have.
        began: The first beginning, in seconds of ``perf_counter``; None before it.
        began_at: The same in seconds since 1970.
    """

    def __init__(self, optimizers: list[torch.optim.Optimizer], limit: float | None) -> None:
        self.watches: dict[str, Watch] = {}
        kinds = [type(optimizer).__name__ for optimizer in optimizers]
        for place, (kind, optimizer) in enumerate(zip(kinds, optimizers, strict=True)):
            name = f"{kind} {kinds[: place + 1].count(kind)}" if kinds.count(kind) > 1 else kind
            if isinstance(optimizer, Optimizer):
                self.watches[name] = StepWatch(optimizer)
            else:
                self.watches[name] = HookedWatch(optimizer)
        self.began: float | None = None
        self.began_at = 0.0
        self._limit = limit
        self._limits: dict[str, float] = {}
        self._told = dict.fromkeys(self.watches, 0)
        self._active = False

    def __enter__(self) -> Recorder:
        """As :meth:`start`."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """As :meth:`stop`."""
        self.stop()

    def start(self) -> None:
        """Begins to record, or goes on.

        Raises:
            ValueError: An optimizer is being recorded already, or steps in backward. None is then
                recorded.
        """
        if self._active:
            raise ValueError("this recording is running already; leave its `with` first")
        for name, watch in self.watches.items():
            _refuse(name, watch.optimizer)
        for watch in self.watches.values():
            watch.attach()
        self._active = True
        if self.began is None:
            self.began, self.began_at = perf_counter(), time()

    def stop(self) -> None:
        """Ends the recording, if it runs; what has been recorded stays."""
        if self._active:
            self._active = False
            for watch in self.watches.values():
                watch.detach()

    def rows(self) -> list[Row]:
        """Every recorded step, in the order of their beginnings."""
        rows = [
            row
            for name, watch in self.watches.items()
            for row in self._rows(name, watch, 0, self.limit(name))
        ]
        return sorted(rows, key=lambda row: row.start_s)

    def since_last(self) -> dict[str, float]:
        """For a log: what the steps since the last call of this took, by names of the figures.

        Medians of ``wall_ms``, ``kernel_ms`` and ``gb_per_s``, the last ``grad_norm``, and how many
        steps were ``skipped``; with several optimizers the optimizer's name goes before. The limit
        is not measured for it. Steps on a GPU are waited for.
        """
        found: dict[str, float] = {}
        for name, watch in self.watches.items():
            rows = self._rows(name, watch, self._told[name], None)
            self._told[name] += len(rows)
            if rows:
                before = f"{name}/" if len(self.watches) > 1 else ""
                found |= {before + key: value for key, value in _figures(rows).items()}
        return found

    def limit(self, name: str) -> float | None:
        """What the machine can move, in 1e9 bytes a second, for the steps of an optimizer.

        Measured at the first call, unless it was given.

        Args:
            name: A key of :attr:`watches`.
        """
        if self._limit is not None or name in self._limits:
            return self._limits.get(name, self._limit)
        watch = self.watches[name]
        traffic, norm = self.traffic(name), any(r.norm_begin != NONE for r in watch.records())
        if traffic is None or not traffic.update:
            return None
        states = [
            local_of(value)
            for state in watch.optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor) and value.dim()
        ]
        params = [
            local_of(param) for group in watch.optimizer.param_groups for param in group["params"]
        ]
        self._limits[name] = measure_limit(traffic, norm=norm, params=params, states=states)
        return self._limits[name]

    def traffic(self, name: str) -> Traffic | None:
        """What most steps of an optimizer moved; None where nothing is known."""
        watch = self.watches[name]
        places = Counter(record.traffic for record in watch.records() if record.traffic != NONE)
        return watch.traffics[int(max(places, key=places.__getitem__))] if places else None

    def as_dict(self) -> dict[str, Any]:
        """All of it in plain values that JSON holds."""
        return {
            "began_at": self.began_at,
            "limits_gb_per_s": {name: self.limit(name) for name in self.watches},
            "rows": [row._asdict() for row in self.rows()],
        }

    def summary(self) -> str:
        """The recording in words and figures, a table for each optimizer."""
        from flatstep.recording.summary import summary

        return summary(self)

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Writes the rows, with a line of names before them; what is not known is left empty."""
        from flatstep.recording.export import write_csv

        write_csv(self, path)

    def to_chrome_trace(self, path: str | PathLike[str]) -> None:
        """Writes a trace for chrome://tracing and Perfetto: steps, norms and updates over time."""
        from flatstep.recording.export import write_chrome_trace

        write_chrome_trace(self, path)

    def to_tensorboard(self, where: SummaryWriter | str | PathLike[str]) -> None:
        """Adds the figures of every step to TensorBoard.

        Args:
            where: A writer, which stays open, or a folder for a new one.

        Raises:
            ImportError: A folder is given and TensorBoard is not installed.
        """
        from flatstep.recording.export import write_tensorboard

        write_tensorboard(self, where)

    def _rows(self, name: str, watch: Watch, first: int, limit: float | None) -> list[Row]:
        return [
            self._row(name, watch, first + place, record, limit)
            for place, record in enumerate(watch.records(first))
        ]

    def _row(self, name: str, watch: Watch, place: int, record: Record, limit: float | None) -> Row:
        assert self.began is not None
        kernel = norm = moved = rate = None
        grad_norm = None if record.grad_norm == NONE else record.grad_norm
        skipped = False
        if isinstance(watch, StepWatch):
            skipped = record.update_begin == NONE
            update = 0.0 if skipped else record.update_end - record.update_begin
            if record.norm_begin != NONE:
                norm = record.norm_end - record.norm_begin
            on_gpu = watch.on_gpu.get(place)
            if on_gpu is not None:
                norm = None if norm is None else seconds_between(on_gpu.norm)
                update = seconds_between(on_gpu.update)
                skipped = skipped or on_gpu.was_skipped()
                if on_gpu.grad_norm is not None:
                    grad_norm = on_gpu.grad_norm.item()
            traffic = None if record.traffic == NONE else watch.traffics[int(record.traffic)]
            moved = 0
            if traffic is not None:
                moved += 0 if norm is None else traffic.norm
                moved += 0 if skipped else traffic.update
            kernel = update + (norm or 0.0)
            rate = moved / kernel / 1e9 if kernel and moved else None
        return Row(
            optimizer=name,
            step=place + 1,
            start_s=record.begin - self.began,
            wall_s=record.end - record.begin,
            kernel_s=kernel,
            norm_s=norm,
            bytes_moved=moved,
            gb_per_s=rate,
            of_limit=rate / limit if rate and limit else None,
            grad_norm=grad_norm,
            skipped=skipped,
        )


def _refuse(name: str, optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(optimizer, Optimizer):
        return
    if optimizer._watch is not None:
        raise ValueError(
            f"{name} is being recorded already; leave the other `with flatstep.profile(...)` first"
        )
    if optimizer._releases:
        raise ValueError(
            f"{name} updates its parameters one by one in backward(), which has no step to record; "
            "remove() what step_in_backward() returned, or leave it unrecorded"
        )


def _figures(rows: list[Row]) -> dict[str, float]:
    columns = {
        "wall_ms": [row.wall_s * 1e3 for row in rows],
        "kernel_ms": [row.kernel_s * 1e3 for row in rows if row.kernel_s is not None],
        "gb_per_s": [row.gb_per_s for row in rows if row.gb_per_s is not None],
    }
    found = {name: median(values) for name, values in columns.items() if values}
    norms = [row.grad_norm for row in rows if row.grad_norm is not None]
    if norms:
        found["grad_norm"] = norms[-1]
    found["skipped"] = float(sum(row.skipped for row in rows))
    return found
