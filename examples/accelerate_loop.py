"""Train with Hugging Face's Accelerate: bfloat16, accumulated gradients, clipping, a checkpoint.

A small network learns the digits that come with scikit-learn; nothing is downloaded.

    pip install -c constraints.txt '.[test]'
    python examples/accelerate_loop.py

Two lines of a usual loop are different. The optimizer is flatstep's, and it clips: there is no
accelerator.clip_grad_norm_, and no sync_gradients to ask before it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import flatstep


class Outcome(NamedTuple):
    losses: list[float]  # of every batch
    updates: int  # one for two batches, and one for a batch that is left at an epoch's end
    weights: list[torch.Tensor]  # at the end


def train(epochs: range, folder: Path) -> Outcome:
    """Trains for some epochs; begins where a checkpoint has ended, and saves one after each."""
    set_seed(0)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    pixels, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels))
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    opt = flatstep.AdamW(model.parameters(), lr=3e-3, max_grad_norm=1.0)
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, gamma=0.99)
    model, opt, loader, schedule = accelerator.prepare(
        model, opt, DataLoader(data, batch_size=64, shuffle=True), schedule
    )
    if epochs.start:
        accelerator.load_state(str(folder / f"{epochs.start}"))
    losses, updates = [], 0
    for epoch in epochs:
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = cross_entropy(model(x), y)
                accelerator.backward(loss)
                opt.step()
                schedule.step()
                opt.zero_grad()
            losses.append(loss.item())
            updates += accelerator.sync_gradients
        accelerator.save_state(str(folder / f"{epoch + 1}"))
    return Outcome(losses, updates, [param.detach() for param in model.parameters()])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    epochs = parser.parse_args(argv).epochs
    if epochs < 2:
        parser.error("--epochs must be at least 2")
    with tempfile.TemporaryDirectory() as folder:
        whole = train(range(epochs), Path(folder))
        resumed = train(range(epochs // 2, epochs), Path(folder))
    same = all(map(torch.equal, whole.weights, resumed.weights))
    losses = whole.losses
    print(f"{len(losses)} batches, {whole.updates} updates")
    print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
    print(f"resumed after epoch {epochs // 2}: {'the same bits' if same else 'other bits'}")


if __name__ == "__main__":
    main()
