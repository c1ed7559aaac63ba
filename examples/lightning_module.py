"""Train with Lightning: flatstep.AdamW in configure_optimizers, a checkpoint, and resuming it.

A small network learns the digits that come with scikit-learn; nothing is downloaded.

    pip install -c constraints.txt '.[test]'
    python examples/lightning_module.py

The optimizer clips in the update's one pass, so Trainer has no gradient_clip_val.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import flatstep


class Digits(lightning.LightningModule):
    def __init__(self, steps: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        self.steps = steps
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], place: int) -> Tensor:
        x, y = batch
        loss = cross_entropy(self.model(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        opt = flatstep.AdamW(self.parameters(), lr=3e-3, max_grad_norm=1.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=3e-3, total_steps=self.steps)
        return {
            "optimizer": opt,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def load() -> DataLoader[tuple[Tensor, ...]]:
    """The batches, in the same order in each run."""
    pixels, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels))
    return DataLoader(data, batch_size=64)


def fit(folder: Path, epochs: int, checkpoint: Path | None = None) -> Digits:
    lightning.seed_everything(0, verbose=False)
    loader = load()
    module = Digits(epochs * len(loader))
    save = ModelCheckpoint(folder, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[save],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return module


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    epochs = parser.parse_args(argv).epochs
    if epochs < 2:
        parser.error("--epochs must be at least 2")
    half = epochs // 2
    with tempfile.TemporaryDirectory() as folder:
        whole = fit(Path(folder), epochs)
        # Lightning counts them from 0.
        resumed = fit(Path(folder), epochs, Path(folder) / f"epoch={half - 1}.ckpt")
    pairs = zip(whole.parameters(), resumed.parameters(), strict=True)
    same = all(torch.equal(one, other) for one, other in pairs)
    print(f"loss: {whole.losses[0]:.3f} at first, {whole.losses[-1]:.3f} at last")
    print(f"resumed after epoch {half}: {'the same bits' if same else 'other bits'}")


if __name__ == "__main__":
    main()
