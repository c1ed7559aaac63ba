"""Train a small network on handwritten digits twice at once: with torch's optimizer and flatstep's.

Both start from the same weights and see the same batches, so the losses should differ by no more
than float32 rounding. The data comes with scikit-learn; nothing is downloaded.

    pip install -c constraints.txt '.[test]'
    python examples/digits.py
    python examples/digits.py --optimizer sgd --epochs 30 --plot digits.png

Exchanging the optimizer is the whole difference:

    - optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    + optimizer = flatstep.AdamW(model.parameters(), lr=1e-3)
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import flatstep

BATCH = 64
SEED = 0


class Choice(NamedTuple):
    torch_class: type[torch.optim.Optimizer]
    flatstep_class: type[torch.optim.Optimizer]
    options: dict[str, Any]
    torch_options: dict[str, Any]


FUSED = {"fused": True}
CHOICES = {
    "adam": Choice(torch.optim.Adam, flatstep.Adam, {"lr": 1e-3}, FUSED),
    "adamw": Choice(torch.optim.AdamW, flatstep.AdamW, {"lr": 1e-3}, FUSED),
    # torch has no fused RMSprop: this is its default, which on the CPU is a Python loop.
    "rmsprop": Choice(torch.optim.RMSprop, flatstep.RMSprop, {"lr": 1e-3}, {}),
    "sgd": Choice(torch.optim.SGD, flatstep.SGD, {"lr": 0.1, "momentum": 0.9}, FUSED),
}


class Outcome(NamedTuple):
    losses: list[float]  # the mean training loss of every epoch
    times: list[float]  # the seconds in every opt.step() after the first, which makes the state
    accuracy: float  # on the test set


class Results(NamedTuple):
    torch: Outcome
    flatstep: Outcome


class Digits(NamedTuple):
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


class Run:
    """A model with its optimizer, and what its training has shown so far."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model = model
        self.optimizer = optimizer
        self.losses: list[float] = []
        self.times: list[float] = []
        self._sum = 0.0
        self._count = 0

    def step(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        loss = cross_entropy(self.model(x), y)
        loss.backward()
        start = time.perf_counter()
        self.optimizer.step()
        self.times.append(time.perf_counter() - start)
        self._sum += loss.item() * len(x)
        self._count += len(x)

    def end_epoch(self) -> None:
        self.losses.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0

    def outcome(self, data: Digits) -> Outcome:
        with torch.no_grad():
            guesses = self.model(data.test_x).argmax(dim=1)
        right = (guesses == data.test_y).float().mean().item()
        return Outcome(self.losses, self.times[1:], right)


def load() -> Digits:
    pixels, labels = load_digits(return_X_y=True)
    x, test_x, y, test_y = train_test_split(
        pixels / 16, labels, test_size=0.2, random_state=SEED, stratify=labels
    )
    return Digits(
        torch.tensor(x, dtype=torch.float32),
        torch.tensor(y),
        torch.tensor(test_x, dtype=torch.float32),
        torch.tensor(test_y),
    )


def train(choice: Choice, epochs: int) -> Results:
    """Trains the same network with both optimizers, batch by batch."""
    data = load()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = nn.Sequential(
            nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
        )
    twin = copy.deepcopy(model)
    theirs = Run(
        model, choice.torch_class(model.parameters(), **choice.options, **choice.torch_options)
    )
    ours = Run(twin, choice.flatstep_class(twin.parameters(), **choice.options))
    shuffle = torch.Generator().manual_seed(SEED)
    for _ in range(epochs):
        for batch in torch.randperm(len(data.x), generator=shuffle).split(BATCH):
            x, y = data.x[batch], data.y[batch]
            theirs.step(x, y)
            ours.step(x, y)
        theirs.end_epoch()
        ours.end_epoch()
    return Results(theirs.outcome(data), ours.outcome(data))


def differences(results: Results) -> list[float]:
    """How far flatstep's losses are from torch's, relative to torch's."""
    pairs = zip(results.torch.losses, results.flatstep.losses, strict=True)
    return [abs(ours - theirs) / theirs for theirs, ours in pairs]


def report(name: str, results: Results) -> None:
    console = Console()
    theirs, ours = results.torch, results.flatstep
    losses = Table("epoch", "loss torch", "loss flatstep", "difference", box=None)
    rows = zip(theirs.losses, ours.losses, differences(results), strict=True)
    for epoch, (a, b, difference) in enumerate(rows, start=1):
        losses.add_row(
            str(epoch), f"{a:.6f}", f"{b:.6f}", f"{difference:.0e}" if difference else "0"
        )
    ends = Table("", "torch", "flatstep", box=None)
    ends.add_row(
        f"{len(ours.times)} updates", *(f"{1e3 * sum(run.times):.1f} ms" for run in results)
    )
    ends.add_row("one, median", *(f"{1e6 * median(run.times):.0f} µs" for run in results))
    ends.add_row("test accuracy", f"{theirs.accuracy:.1%}", f"{ours.accuracy:.1%}")
    for table in (losses, ends):
        for column in table.columns[0 if table is losses else 1 :]:
            column.justify = "right"
    console.print(f"{name} on scikit-learn's digits; the difference is relative\n", style="bold")
    console.print(losses)
    console.print()
    console.print(ends)


def draw(name: str, results: Results, path: Path) -> None:
    """Saves both loss curves: torch's as a broad band, flatstep's as a dashed line on top."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = range(1, len(results.torch.losses) + 1)
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(
        epochs,
        results.torch.losses,
        color="#f2b279",
        linewidth=7,
        solid_capstyle="round",
        label=f"torch.optim, test accuracy {results.torch.accuracy:.1%}",
    )
    axes.plot(
        epochs,
        results.flatstep.losses,
        color="#1f4e79",
        linewidth=1.8,
        linestyle=(0, (4, 2)),
        marker="o",
        markersize=4,
        label=f"flatstep, test accuracy {results.flatstep.accuracy:.1%}",
    )
    apart = differences(results)
    axes.text(
        0.03,
        0.06,
        f"largest relative difference: {max(apart):.0e}, epoch {apart.index(max(apart)) + 1}"
        if max(apart)
        else "no difference",
        transform=axes.transAxes,
        fontsize=9,
        color="#555555",
    )
    axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.set_ylabel("mean training loss")
    axes.set_title(f"{name}, same weights and same batches", loc="left", fontsize=12)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> Results:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--optimizer", choices=CHOICES, default="adamw")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="save the loss curves here")
    options = parser.parse_args(argv)
    if options.epochs < 1:
        parser.error("--epochs must be at least 1")
    if options.plot is not None and not options.plot.parent.is_dir():
        parser.error(f"--plot: there is no folder {options.plot.parent}")
    choice = CHOICES[options.optimizer]
    name = choice.flatstep_class.__name__
    results = train(choice, options.epochs)
    report(name, results)
    if options.plot is not None:
        draw(name, results, options.plot)
        print(f"\n→ {options.plot}")
    return results


if __name__ == "__main__":
    main()
