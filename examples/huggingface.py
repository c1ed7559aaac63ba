"""Train a small GPT-2 with Hugging Face's Trainer and flatstep.AdamW, and resume it in the middle.

The model has random weights and learns to count; nothing is downloaded.

    pip install -c constraints.txt '.[test]'
    python examples/huggingface.py

The Trainer makes the optimizer, so that its own groups (no weight decay of biases and norms) and
its scheduler are used. The optimizer clips in the update's one pass; max_grad_norm=0 tells the
Trainer, which clips at 1 unless told otherwise, to leave it alone.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
    logging,
    set_seed,
)

import flatstep

NUMBERS = 16


def counting(rows: int, length: int = 24) -> list[dict[str, torch.Tensor]]:
    """Rows that count from anywhere, modulo 16, by ones, twos or threes."""
    chance = torch.Generator().manual_seed(0)
    start = torch.randint(NUMBERS, (rows, 1), generator=chance)
    by = torch.randint(1, 4, (rows, 1), generator=chance)
    numbers = (start + by * torch.arange(length)) % NUMBERS
    return [{"input_ids": row, "labels": row} for row in numbers]


def make_trainer(folder: Path, steps: int) -> Trainer:
    set_seed(0)
    config = GPT2Config(
        vocab_size=NUMBERS,
        n_positions=24,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    options = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=3e-3,
        warmup_steps=steps // 10,
        per_device_train_batch_size=16,
        max_grad_norm=0.0,
        logging_steps=max(1, steps // 5),
        save_steps=max(1, steps // 2),
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    return Trainer(
        model=GPT2LMHeadModel(config),
        args=options,
        train_dataset=counting(512),
        optimizer_cls_and_kwargs=(flatstep.AdamW, {"lr": 3e-3, "max_grad_norm": 1.0}),
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args(argv)
    if options.steps < 2:
        parser.error("--steps must be at least 2")
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trainer = make_trainer(folder, options.steps)
        trainer.train()
        resumed = make_trainer(folder, options.steps)
        resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{options.steps // 2}"))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    pairs = zip(trainer.model.parameters(), resumed.model.parameters(), strict=True)
    same = all(torch.equal(one, other) for one, other in pairs)
    print(f"loss: {losses[0]:.3f} at first, {losses[-1]:.3f} at last")
    print(f"resumed at step {options.steps // 2}: {'the same bits' if same else 'other bits'}")


if __name__ == "__main__":
    main()
