"""Trains a small network on scikit-learn's digits with torch's optimizer and with flatstep's.

Both start from the same weights and see the same batches, so that their losses differ by the
rounding of float32 alone. It takes a few seconds and needs scikit-learn (and matplotlib for the
plot):

    pip install -c constraints.txt '.[test]'
    python examples/digits.py --optimizer adam --plot digits.png
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import flatstep

BATCH = 64
OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adam": ("Adam", {"lr": 1e-3}),
    "adamw": ("AdamW", {"lr": 1e-3}),
    "rmsprop": ("RMSprop", {"lr": 3e-4}),
    "sgd": ("SGD", {"lr": 0.05, "momentum": 0.9}),
}


class Digits(NamedTuple):
    """Images of 8 × 8 grey values in [0, 1], and what they show."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass
class Run:
    """A model in training with one library's optimizer."""

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    losses: list[float] = field(default_factory=list)  # of every batch
    seconds: float = 0.0  # in step() alone

    def train(self, images: Tensor, labels: Tensor) -> None:
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(images), labels)
        loss.backward()
        start = time.perf_counter()
        self.optimizer.step()
        self.seconds += time.perf_counter() - start
        self.losses.append(loss.item())

    def mean_loss(self, batches: int) -> float:
        """Of the last so many batches."""
        return sum(self.losses[-batches:]) / batches

    @torch.no_grad()
    def accuracy(self, data: Digits) -> float:
        guesses = self.model(data.test_images).argmax(1)
        return (guesses == data.test_labels).float().mean().item()


def load() -> Digits:
    images, labels = load_digits(return_X_y=True)
    train, test, train_labels, test_labels = train_test_split(
        images / 16, labels, test_size=297, random_state=0, stratify=labels
    )
    return Digits(
        torch.tensor(train, dtype=torch.float32),
        torch.tensor(train_labels),
        torch.tensor(test, dtype=torch.float32),
        torch.tensor(test_labels),
    )


def start(optimizer: str) -> list[Run]:
    """The same model twice, once for each library."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10)
    )
    name, options = OPTIMIZERS[optimizer]
    runs = []
    for library in (torch.optim, flatstep):
        own = copy.deepcopy(model)
        runs.append(
            Run(
                library.__name__.partition(".")[0],
                own,
                getattr(library, name)(own.parameters(), **options),
            )
        )
    return runs


def train(data: Digits, optimizer: str, epochs: int) -> list[Run]:
    """Trains both models, batch by batch in turn, and prints what comes of it."""
    runs = theirs, ours = start(optimizer)
    generator = torch.Generator().manual_seed(1)
    print(f"{OPTIMIZERS[optimizer][0]}: the same weights, the same batches\n")
    print("epoch   loss, torch   loss, flatstep   difference")
    for epoch in range(1, epochs + 1):
        batches = torch.randperm(len(data.images), generator=generator).split(BATCH)
        for batch in batches:
            for run in runs:
                run.train(data.images[batch], data.labels[batch])
        losses = theirs.mean_loss(len(batches)), ours.mean_loss(len(batches))
        difference = abs(losses[0] - losses[1])
        print(f"{epoch:5d}   {losses[0]:11.7f}   {losses[1]:14.7f}   {difference:10.1e}")
    updates = f"{len(ours.losses)} updates"
    print(f"\n           {updates:>14}   right of {len(data.test_labels)} new digits")
    for run in runs:
        milliseconds = 1000 * run.seconds
        print(f"{run.name:8}   {milliseconds:11.1f} ms   {run.accuracy(data):22.1%}")
    return runs


def plot(runs: list[Run], optimizer: str, path: Path) -> None:
    """Draws both losses, one upon the other, and the distance between them."""
    from matplotlib.figure import Figure

    theirs, ours = runs
    ink, faint, rule = "#222222", "#777777", "#cccccc"
    steps = range(1, len(ours.losses) + 1)
    figure = Figure(figsize=(8, 5.2), dpi=150, layout="constrained")
    loss, distance = figure.subplots(2, 1, sharex=True, height_ratios=[2.2, 1])

    loss.plot(steps, theirs.losses, color="#f2b36b", linewidth=4.5, label="torch")
    loss.plot(steps, ours.losses, color="#0b5394", linewidth=1.1, label="flatstep")
    loss.set_yscale("log")
    loss.set_ylabel("loss of the batch")
    loss.legend(frameon=False, loc="upper right", labelcolor=ink)

    gaps = [abs(a - b) for a, b in zip(theirs.losses, ours.losses, strict=True)]
    seen = [(step, gap) for step, gap in zip(steps, gaps, strict=True) if gap > 0]
    spacing = [torch.finfo(torch.float32).eps * max(1.0, x) for x in ours.losses]
    distance.plot(*zip(*seen, strict=True), ".", color="#0b5394", markersize=3)
    distance.plot(steps, spacing, color=faint, linewidth=0.9, linestyle=(0, (4, 3)))
    distance.annotate(
        "spacing of float32 at 1",
        (1, spacing[-1]),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=7.5,
        color=faint,
    )
    distance.set_yscale("log")
    distance.set_ylabel("distance")
    distance.set_xlabel("update")

    for axes in (loss, distance):
        axes.margins(x=0.01)
        axes.grid(axis="y", color=rule, linewidth=0.5)
        axes.tick_params(labelsize=8, color=rule, labelcolor=faint, which="both")
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(rule)
        axes.xaxis.label.set_color(ink)
        axes.yaxis.label.set_color(ink)
    name = OPTIMIZERS[optimizer][0]
    times = " and ".join(f"{1000 * run.seconds:.0f} ms with {run.name}" for run in runs)
    figure.suptitle(
        f"{name} on scikit-learn's digits: one curve, drawn twice", x=0.012, ha="left", color=ink
    )
    loss.set_title(f"all {len(steps)} updates took {times}", loc="left", fontsize=9, color=faint)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adam")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="such as digits.png")
    options = parser.parse_args()
    if options.epochs < 1:
        parser.error("--epochs must be at least 1")
    runs = train(load(), options.optimizer, options.epochs)
    if options.plot:
        plot(runs, options.optimizer, options.plot)
        print(f"\nThe picture is in {options.plot}")


if __name__ == "__main__":
    main()
