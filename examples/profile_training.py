"""Train a small network while flatstep.profile records its optimizer.

    python examples/profile_training.py
    python examples/profile_training.py --steps 500 --trace trace.json --csv steps.csv

The trace opens in chrome://tracing and ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

import flatstep
from flatstep.recording import Recorder

WIDTH = 256


def train(steps: int) -> Recorder:
    """Learns to double numbers; clips gradients, so that their norm is recorded."""
    chance = torch.Generator().manual_seed(0)
    model = nn.Sequential(
        nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH), nn.LayerNorm(WIDTH)
    )
    opt = flatstep.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)
    with flatstep.profile(opt) as prof:
        for _ in range(steps):
            x = torch.randn(32, WIDTH, generator=chance)
            opt.zero_grad()
            (model(x) - 2 * x).square().mean().backward()
            opt.step()
    return prof


def main(argv: Sequence[str] | None = None) -> Recorder:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--trace", type=Path, metavar="FILE", help="save a trace here")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="save every step here")
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error("--steps must be at least 1")
    for name in ("trace", "csv"):
        path = getattr(options, name)
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"--{name}: there is no folder {path.parent}")
    prof = train(options.steps)
    print(prof.summary())
    if options.trace is not None:
        prof.to_chrome_trace(options.trace)
    if options.csv is not None:
        prof.to_csv(options.csv)
    return prof


if __name__ == "__main__":
    main()
