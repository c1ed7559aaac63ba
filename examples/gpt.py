"""Train a character GPT of a million parameters with torch's AdamW, ours, and ours in bfloat16.

The text is the reference that comes with Python (pydoc_data.topics); nothing is downloaded. The
three start from the same weights and take every batch in turn, so that what else the machine does
meets all of them.

    pip install -c constraints.txt '.[test]'
    python examples/gpt.py
    python examples/gpt.py --steps 100 --out gpt.svg

The figure has the loss curves, and the time of a step in forward, backward and update. The update
is everything between backward() and the next forward(): clipping, step() and zero_grad().
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data import topics
from statistics import median
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import flatstep

SEED = 0
LENGTH = 64
BATCH = 8
WIDTH = 128
LAYERS = 5
HEADS = 4
LR = 1e-3
CLIP = 1.0
PARTS = ("forward", "backward", "update")
TORCH, OURS, SPLIT = "torch AdamW", "flatstep AdamW", "flatstep AdamW, bf16 split"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.before(x)).unflatten(-1, (3, HEADS, -1))
        q, k, v = qkv.movedim(-3, 0).transpose(-2, -3)
        # Written out: of bfloat16, torch's own is several times slower on the CPU.
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        seen = scores.masked_fill(later, -math.inf).softmax(-1) @ v
        x = x + self.out(seen.transpose(-2, -3).flatten(-2))
        y: Tensor = x + self.mlp(self.between(x))
        return y


class GPT(nn.Module):
    def __init__(self, letters: int) -> None:
        super().__init__()
        self.letter, self.place = nn.Embedding(letters, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, letters)
        for embedding in (self.letter, self.place):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, letters: Tensor) -> Tensor:
        x = self.blocks(self.letter(letters) + self.place(torch.arange(letters.shape[-1])))
        out: Tensor = self.head(self.norm(x))
        return out


class Text(NamedTuple):
    letters: int  # how many different ones
    training: Tensor
    held_out: Tensor

    def batch(self, part: Tensor, chance: torch.Generator) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(part) - LENGTH, (BATCH, 1), generator=chance)
        rows = part[starts + torch.arange(LENGTH + 1)]
        return rows[:, :-1], rows[:, 1:]


def load() -> Text:
    written = "".join(topics.topics.values())
    letters = sorted(set(written))
    places = {letter: place for place, letter in enumerate(letters)}
    text = torch.tensor([places[letter] for letter in written])
    end = len(text) * 9 // 10
    return Text(len(letters), text[:end], text[end:])


class Run:
    """A model with its optimizer, and what its training has shown so far."""

    def __init__(self, model: nn.Module, opt: torch.optim.Optimizer) -> None:
        self.model = model
        self.opt = opt
        self.losses: list[float] = []
        self.seconds: dict[str, list[float]] = {part: [] for part in PARTS}
        self.held_out = math.nan

    def step(self, x: Tensor, y: Tensor) -> None:
        clock = [time.perf_counter()]
        loss = self.loss(x, y)
        clock.append(time.perf_counter())
        loss.backward()
        clock.append(time.perf_counter())
        if isinstance(self.opt, torch.optim.AdamW):
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.opt.step()
        self.opt.zero_grad()
        clock.append(time.perf_counter())
        self.losses.append(loss.item())
        for part, start, end in zip(PARTS, clock, clock[1:], strict=False):
            self.seconds[part].append(end - start)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(self.model(x).flatten(0, 1).float(), y.flatten())

    def final(self) -> float:
        """The mean training loss of the last eighth."""
        last = self.losses[-max(1, len(self.losses) // 8) :]
        return sum(last) / len(last)

    def milliseconds(self, part: str) -> float:
        """The median over all steps but the first, in which states are made."""
        return 1e3 * median(self.seconds[part][1:])


def make_runs(letters: int) -> dict[str, Run]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        models = [GPT(letters)]
    models += [copy.deepcopy(models[0]), copy.deepcopy(models[0]).bfloat16()]
    ours: dict[str, Any] = {"lr": LR, "max_grad_norm": CLIP}
    split: dict[str, Any] = {"master": "split", "state_dtype": torch.float32}
    return {
        TORCH: Run(models[0], torch.optim.AdamW(models[0].parameters(), lr=LR, fused=True)),
        OURS: Run(models[1], flatstep.AdamW(models[1].parameters(), **ours)),
        SPLIT: Run(models[2], flatstep.AdamW(models[2].parameters(), **ours, **split)),
    }


def train(text: Text, steps: int) -> dict[str, Run]:
    runs = make_runs(text.letters)
    chance = torch.Generator().manual_seed(SEED)
    for _ in range(steps):
        x, y = text.batch(text.training, chance)
        for run in runs.values():
            run.step(x, y)
    batches = [text.batch(text.held_out, chance) for _ in range(16)]
    with torch.no_grad():
        for run in runs.values():
            run.held_out = sum(run.loss(x, y).item() for x, y in batches) / len(batches)
    return runs


def report(runs: dict[str, Run]) -> None:
    console = Console()
    first = next(iter(runs.values()))
    count = sum(param.numel() for param in first.model.parameters())
    console.print(
        f"GPT of {count:,} parameters, {len(first.losses)} steps, {BATCH * LENGTH} characters each",
        style="bold",
    )
    table = Table("", "loss", "held out", *PARTS, box=None)
    for name, run in runs.items():
        times = (f"{run.milliseconds(part):.2f} ms" for part in PARTS)
        table.add_row(name, f"{run.final():.4f}", f"{run.held_out:.4f}", *times)
    for column in table.columns[1:]:
        column.justify = "right"
    console.print(table)
    console.print(
        "loss: mean of the last eighth; times: medians; update: clip, step(), zero_grad()",
        style="dim",
    )


def draw(runs: dict[str, Run], path: Path) -> None:
    """Saves the loss curves and the parts of a step."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    curves, bars = figure.subplots(1, 2, width_ratios=(3, 2))
    # Broad below, narrow and dashed above: they lie on each other.
    lines: list[dict[str, Any]] = [
        {"color": "#f2b279", "linewidth": 7, "solid_capstyle": "round"},
        {"color": "#1f4e79", "linewidth": 2.4},
        {"color": "#7ec8ff", "linewidth": 1.5, "linestyle": (0, (3, 3))},
    ]
    for (name, run), line in zip(runs.items(), lines, strict=True):
        window = max(1, len(run.losses) // 24)
        smooth = torch.tensor(run.losses).unfold(0, window, 1).mean(1).tolist()
        every = 1 + len(smooth) // 200  # enough for the eye
        steps = range(window, window + len(smooth), every)
        curves.plot(steps, smooth[::every], label=f"{name}: {run.final():.3f}", **line)
    curves.set_xlabel("step")
    curves.set_ylabel(f"training loss, mean of {window} steps")
    curves.grid(axis="y", color="#e6e6e6")
    curves.set_axisbelow(True)
    curves.legend(frameon=False, fontsize=9, title="loss of the last eighth", alignment="left")
    names = [name.replace(", ", ",\n") for name in runs]
    left = [0.0] * len(runs)
    for part, color in zip(PARTS, ("#d9d9d9", "#a6a6a6", "#1f4e79"), strict=True):
        widths = [run.milliseconds(part) for run in runs.values()]
        bars.barh(names, widths, left=left, height=0.55, color=color, label=part)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for place, (run, end) in enumerate(zip(runs.values(), left, strict=True)):
        update = run.milliseconds("update")
        bars.text(end, place, f" {update:.1f}", va="center", color="#1f4e79", fontsize=9)
    bars.invert_yaxis()
    bars.set_xlim(right=1.12 * max(left))
    bars.set_xlabel("median of a step, ms; in blue its update")
    bars.legend(frameon=False, fontsize=9, ncols=3, loc="lower center", bbox_to_anchor=(0.4, 1))
    for axes in (curves, bars):
        axes.spines[["top", "right"]].set_visible(False)
    with mpl.rc_context({"svg.hashsalt": "flatstep"}):
        date = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=110, metadata=date)


def main(argv: Sequence[str] | None = None) -> dict[str, Run]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, metavar="FILE", help="save the figure here")
    options = parser.parse_args(argv)
    if options.steps < 2:
        parser.error("--steps must be at least 2")
    if options.out is not None and not options.out.absolute().parent.is_dir():
        parser.error(f"--out: there is no folder {options.out.parent}")
    runs = train(load(), options.steps)
    report(runs)
    if options.out is not None:
        draw(runs, options.out)
        print(f"→ {options.out}")
    return runs


if __name__ == "__main__":
    main()
