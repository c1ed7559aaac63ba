"""A training loop in the manner of torchtitan and torchtune, on a small stack of Linear layers.

Everything that such a loop has around the optimizer: accumulated gradients, clipping, a schedule
with warm-up, a checkpoint of all of it, and a run that goes on from one. The data is made up.

    python examples/titan_loop.py
    python examples/titan_loop.py --steps 20

The loop is the usual one without clip_grad_norm_: the optimizer has max_grad_norm, reads the
gradients once for their norm, and multiplies in the update. opt.grad_norm is that norm, to log.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.lr_scheduler import LambdaLR

import flatstep

WIDTH = 64
MICRO_BATCHES = 2


class Line(NamedTuple):
    step: int
    loss: float
    grad_norm: float
    lr: float


class Run:
    """What a checkpoint holds: the model, its optimizer, the schedule and the data's place."""

    def __init__(self, steps: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        ).bfloat16()
        self.opt = flatstep.AdamW(
            self.model.parameters(),
            lr=3e-3,
            betas=(0.9, 0.95),
            max_grad_norm=0.2,
            skip_nonfinite=True,
            master="split",
            state_dtype=torch.float32,
        )
        warm = max(1, steps // 10)
        self.schedule = LambdaLR(
            self.opt, lambda step: min((step + 1) / warm, (steps - step) / (steps - warm))
        )
        self.data = torch.Generator().manual_seed(1)
        self.step = 0

    def batch(self) -> tuple[Tensor, Tensor]:
        """A vector and its neighbours' differences."""
        x = torch.randn(32, WIDTH, generator=self.data)
        return x.bfloat16(), (x.roll(1, 1) - x).bfloat16()

    def train(self, until: int) -> list[Line]:
        lines = []
        while self.step < until:
            self.opt.zero_grad()
            total = 0.0
            for _ in range(MICRO_BATCHES):
                x, y = self.batch()
                loss = mse_loss(self.model(x), y) / MICRO_BATCHES
                loss.backward()
                total += loss.item()
            lr = self.opt.param_groups[0]["lr"]
            self.opt.step()
            self.schedule.step()
            self.step += 1
            lines.append(Line(self.step, total, float(self.opt.grad_norm), lr))
        return lines

    def save(self, path: Path) -> None:
        torch.save(
            {
                "model": self.model.state_dict(),
                "opt": self.opt.state_dict(),
                "schedule": self.schedule.state_dict(),
                "data": self.data.get_state(),
                "step": self.step,
            },
            path,
        )

    def load(self, path: Path) -> None:
        saved = torch.load(path)
        self.model.load_state_dict(saved["model"])
        self.opt.load_state_dict(saved["opt"])
        self.schedule.load_state_dict(saved["schedule"])
        self.data.set_state(saved["data"])
        self.step = saved["step"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args(argv).steps
    if steps < 4:
        parser.error("--steps must be at least 4")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        run = Run(steps)
        lines = run.train(steps // 2)
        run.save(path)
        lines += run.train(steps)
        resumed = Run(steps)
        resumed.load(path)
        again = resumed.train(steps)
    for line in lines[:: max(1, steps // 8)]:
        print(
            f"step {line.step:4}  loss {line.loss:.4f}  norm {line.grad_norm:.3f}  lr {line.lr:.1e}"
        )
    same = all(map(torch.equal, run.model.parameters(), resumed.model.parameters()))
    same = same and again == lines[steps // 2 :]
    print(f"loss: {lines[0].loss:.3f} at first, {lines[-1].loss:.3f} at last")
    print(f"skipped steps: {run.opt.skipped_steps}")
    print(f"resumed at step {steps // 2}: {'the same bits' if same else 'other bits'}")


if __name__ == "__main__":
    main()
