"""Train in bfloat16, with and without what keeps small updates, beside float32.

Two models, each trained once in every mode by flatstep.AdamW: a small network on scikit-learn's
digits, and a small character GPT on sentences of a made-up grammar. The runs of a model start from
the same weights and see the same batches; nothing is downloaded.

    pip install -c constraints.txt '.[test]'
    python examples/precision.py
    python examples/precision.py --plot precision.svg
    python examples/precision.py --steps 200 --lr 1e-3
    python examples/precision.py --memory 8 3072  # instead: what updates during backward save

What the modes are, and what they cost: docs/precision.md.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import flatstep

SEED = 0
F32, BF16 = torch.float32, torch.bfloat16


class Mode(NamedTuple):
    dtype: torch.dtype  # of the model: parameters, gradients, and what is computed with them
    options: dict[str, Any]  # of the optimizer


MODES = {
    "f32": Mode(F32, {}),
    "bf16": Mode(BF16, {}),
    "bf16, f32 states": Mode(BF16, {"state_dtype": F32}),
    "bf16, f32 states, stochastic": Mode(BF16, {"state_dtype": F32, "rounding": "stochastic"}),
    "bf16, f32 states, f32 master": Mode(BF16, {"state_dtype": F32, "master": "float32"}),
    "bf16, f32 states, split master": Mode(BF16, {"state_dtype": F32, "master": "split"}),
    "bf16, split master": Mode(BF16, {"master": "split"}),
}


class Batch(NamedTuple):
    x: Tensor
    y: Tensor


class Task(NamedTuple):
    title: str
    model: nn.Module
    batch: Callable[[torch.Generator], Batch]  # the next one
    lr: float
    steps: int


class Outcome(NamedTuple):
    losses: list[float]  # the training loss of every step
    bytes_held: float  # for each number in the model: parameter, gradient and states

    def final(self) -> float:
        """The mean of the last eighth."""
        return self.smoothed(max(1, len(self.losses) // 8))[-1]

    def smoothed(self, window: int) -> list[float]:
        """The mean of the last ``window`` losses, for each step that has so many."""
        losses = torch.tensor(self.losses, dtype=torch.float64)
        return [float(part.mean()) for part in losses.unfold(0, window, 1)]


# ---- what is trained


def digits() -> Task:
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=F32), torch.tensor(labels)

    def batch(chance: torch.Generator) -> Batch:
        rows = torch.randint(len(x), (64,), generator=chance)
        return Batch(x[rows], y[rows])

    model = nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    return Task("digits, 3-layer network", model, batch, lr=1e-4, steps=1500)


NOUNS, VERBS = ("cat", "dog", "bird", "child", "robot"), ("see", "hear", "follow", "like", "find")
ADJECTIVES = ("old", "small", "red", "quiet")
LETTERS = "\n .abcdefghijklmnopqrstuvwxyz"


def sentence(chance: random.Random) -> str:
    """Subject, verb and object, in which the number of subject and verb agree."""

    def noun_phrase(depth: int) -> tuple[str, bool]:
        is_plural = chance.random() < 0.5
        words = [chance.choice(("the", "two", "some") if is_plural else ("the", "a", "one"))]
        if chance.random() < 0.4:
            words.append(chance.choice(ADJECTIVES))
        words.append(chance.choice(NOUNS) + "s" * is_plural)
        if depth and chance.random() < 0.3:
            words += ["that", verb_phrase(is_plural, 0)]
        return " ".join(words), is_plural

    def verb_phrase(is_plural: bool, depth: int) -> str:
        verb = chance.choice(VERBS) + "s" * (not is_plural)
        return f"{verb} {noun_phrase(depth)[0]}"

    subject, is_plural = noun_phrase(1)
    return f"{subject} {verb_phrase(is_plural, 1)}.\n"


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.movedim(-3, 0).transpose(-2, -3)
        # Written out: of bfloat16, torch's own is several times slower on the CPU.
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        seen = scores.masked_fill(later, -math.inf).softmax(-1) @ v
        x = x + self.out(seen.transpose(-2, -3).flatten(-2))
        y: Tensor = x + self.mlp(self.between(x))
        return y


class GPT(nn.Module):
    def __init__(self, letters: int, length: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.letter, self.place = nn.Embedding(letters, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, letters)
        for embedding in (self.letter, self.place):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, letters: Tensor) -> Tensor:
        places = torch.arange(letters.shape[-1])
        x = self.blocks(self.letter(letters) + self.place(places))
        out: Tensor = self.head(self.norm(x))
        return out


def characters() -> Task:
    chance = random.Random(SEED)
    written = "".join(sentence(chance) for _ in range(20_000))
    text = torch.tensor([LETTERS.index(letter) for letter in written])
    length = 48

    def batch(chance: torch.Generator) -> Batch:
        starts = torch.randint(len(text) - length, (16, 1), generator=chance)
        rows = text[starts + torch.arange(length + 1)]
        return Batch(rows[:, :-1], rows[:, 1:])

    model = GPT(len(LETTERS), length, width=64, layers=2, heads=4)
    return Task("characters of a grammar, 2-layer GPT", model, batch, lr=3e-4, steps=600)


# ---- training


def train(task: Task, mode: Mode) -> Outcome:
    model = copy.deepcopy(task.model).to(mode.dtype)
    params = list(model.parameters())
    opt = flatstep.AdamW(params, lr=task.lr, **mode.options)
    chance = torch.Generator().manual_seed(SEED)
    losses = []
    for _ in range(task.steps):
        x, y = task.batch(chance)
        opt.zero_grad()
        guesses = model(x.to(mode.dtype) if x.is_floating_point() else x).float()
        loss = cross_entropy(guesses.flatten(0, -2), y.flatten())
        loss.backward()
        opt.step()
        losses.append(loss.item())
    arrays = [*params, *(param.grad for param in params)]
    arrays += [value for state in opt.state.values() for value in state.values() if value.dim()]
    held = sum(array.nbytes for array in arrays if array is not None)
    return Outcome(losses, held / sum(param.numel() for param in params))


def train_all(task: Task) -> dict[str, Outcome]:
    return {name: train(task, mode) for name, mode in MODES.items()}


def report(task: Task, outcomes: dict[str, Outcome]) -> None:
    console = Console()
    steps = len(outcomes["f32"].losses)
    count = sum(param.numel() for param in task.model.parameters())
    console.print(
        f"{task.title}: {count:,} parameters, {steps} steps of AdamW, lr {task.lr:g}", style="bold"
    )
    table = Table("", "final loss", "over f32's", "bytes per parameter", box=None)
    for name, outcome in outcomes.items():
        over = outcome.final() - outcomes["f32"].final()
        difference = "" if name == "f32" else f"{over:+.4f}"
        table.add_row(name, f"{outcome.final():.4f}", difference, f"{outcome.bytes_held:g}")
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    console.print(f"final loss: the mean of the last {max(1, steps // 8)} steps\n", style="dim")


class Line(NamedTuple):
    color: str
    width: float
    dashes: tuple[float, ...] = ()


# Broad below, narrow and dashed above: they lie on each other.
LINES = {
    "f32": Line("#f2b279", 7),
    "bf16": Line("#b3261e", 1.8),
    "bf16, f32 states, stochastic": Line("#2e7d32", 3),
    "bf16, f32 states, split master": Line("#7ec8ff", 1.5, (3, 3)),
}


def draw(results: list[tuple[Task, dict[str, Outcome]]], path: Path) -> None:
    """Saves the loss curves of some modes; the others lie on these."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    for axes, (task, outcomes) in zip(figure.subplots(1, len(results)), results, strict=True):
        for name, line in LINES.items():
            outcome = outcomes[name]
            window = max(1, len(outcome.losses) // 24)
            losses = outcome.smoothed(window)
            every = 1 + len(losses) // 200  # enough for the eye
            axes.plot(
                range(window, window + len(losses), every),
                losses[::every],
                color=line.color,
                linewidth=line.width,
                linestyle=(0, line.dashes) if line.dashes else "-",
                solid_capstyle="round",
                label=f"{name}: {outcome.final():.3f}",
            )
        axes.set_title(f"{task.title}, lr {task.lr:g}", loc="left", fontsize=11)
        axes.set_xlabel("step")
        axes.set_ylabel(f"training loss, mean of {window} steps")
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="#e6e6e6")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, title="final loss", alignment="left")
    with mpl.rc_context({"svg.hashsalt": "flatstep"}):
        date = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=110, metadata=date)


# ---- memory of updates during backward

WAYS = ("step()", "step_in_backward()")


def print_peak(way: str, layers: int, width: int) -> None:
    """Trains a stack of Linear layers and prints the most that this process had resident, in kB."""
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    opt = flatstep.AdamW(model.parameters())
    if way == "step_in_backward()":
        opt.step_in_backward()
    for _ in range(3):
        model(torch.randn(8, width)).square().mean().backward()
        opt.step()
        opt.zero_grad()
    status = Path("/proc/self/status").read_text()
    print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


def report_memory(layers: int, width: int) -> None:
    """Compares the two ways, each in a process of its own."""
    console = Console()
    one = width * width * 4 / 1e6
    console.print(f"{layers} × Linear({width}, {width}), float32, AdamW, 3 steps", style="bold")
    console.print(
        f"parameters {layers * one:.0f} MB, states {2 * layers * one:.0f} MB, all gradients "
        f"{layers * one:.0f} MB, one gradient {one:.0f} MB\n"
    )
    table = Table("", "peak of the process", box=None)
    peaks = []
    for way in WAYS:
        line = [sys.executable, __file__, "--memory", str(layers), str(width), "--way", way]
        printed = subprocess.run(line, check=True, capture_output=True, text=True).stdout
        peaks.append(int(printed) * 1024 / 1e6)
        table.add_row(way, f"{peaks[-1]:.0f} MB")
    table.add_row("difference", f"{peaks[1] - peaks[0]:+.0f} MB")
    table.columns[1].justify = "right"
    console.print(table)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Outcome]]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, help="of every run")
    parser.add_argument("--lr", type=float, help="of every run")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="save the loss curves here")
    parser.add_argument(
        "--memory",
        nargs=2,
        type=int,
        metavar=("LAYERS", "WIDTH"),
        help="instead, measure what step_in_backward() saves",
    )
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.steps is not None and options.steps < 1:
        parser.error("--steps must be at least 1")
    if options.plot is not None and not options.plot.parent.is_dir():
        parser.error(f"--plot: there is no folder {options.plot.parent}")
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install matplotlib")
    if options.memory is not None and not Path("/proc/self/status").exists():
        parser.error("--memory reads /proc/self/status, which only Linux has")
    if options.way is not None:
        print_peak(options.way, *options.memory)
        return []
    if options.memory is not None:
        report_memory(*options.memory)
        return []
    results = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models as small as these are no slower, and the figures are the same
    try:
        for make in (digits, characters):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(SEED)
                task = make()
            task = task._replace(steps=options.steps or task.steps, lr=options.lr or task.lr)
            results.append((task, train_all(task)))
            report(*results[-1])
    finally:
        torch.set_num_threads(threads)
    if options.plot is not None:
        draw(results, options.plot)
        print(f"→ {options.plot}")
    return [outcomes for _, outcomes in results]


if __name__ == "__main__":
    main()
