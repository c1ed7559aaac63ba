"""The recording inside the trainers of others, with the real libraries."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch_versions import import_transformers

import flatstep

ROWS = [{"x": torch.randn(8), "labels": torch.zeros(1)} for _ in range(48)]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 1)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": mse_loss(self.layer(x), labels)}


class InterruptedTrainingError(Exception):
    pass


# ---- Hugging Face


def hugging_face_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, opt: torch.optim.Optimizer, model: Model
) -> Any:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = import_transformers()
    options = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=12,
        logging_steps=4,
        per_device_train_batch_size=4,
        use_cpu=True,
        max_grad_norm=0.0,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
    )
    return transformers.Trainer(
        model=model, args=options, train_dataset=ROWS, optimizers=(opt, None)
    )


def test_hugging_faces_trainer_logs_what_its_steps_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model()
    opt = flatstep.AdamW(model.parameters(), max_grad_norm=1.0)
    trainer = hugging_face_trainer(tmp_path, monkeypatch, opt, model)
    from flatstep.recording.huggingface import ProfileCallback

    callback = ProfileCallback(trainer, limit=10.0)
    trainer.add_callback(callback)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "flatstep/wall_ms" in entry]
    assert [entry["step"] for entry in logged] == [4, 8, 12]
    for entry in logged:
        assert entry["flatstep/wall_ms"] > entry["flatstep/kernel_ms"] > 0
        assert entry["flatstep/gb_per_s"] > 0
        assert entry["flatstep/grad_norm"] > 0
        assert entry["flatstep/skipped"] == 0
    assert [row.step for row in callback.profile.rows()] == list(range(1, 13))
    assert "AdamW: 12 steps of 2 tensors, 9 parameters" in capsys.readouterr().out
    assert opt._watch is None


def test_hugging_faces_trainer_begins_again_after_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model()
    opt = flatstep.AdamW(model.parameters())
    trainer = hugging_face_trainer(tmp_path, monkeypatch, opt, model)
    from flatstep.recording.huggingface import ProfileCallback

    callback = ProfileCallback(trainer, limit=10.0)
    trainer.add_callback(callback)

    def fail(*_: Any) -> None:
        if len(callback.profile.watches["AdamW"]) == 3:
            raise InterruptedTrainingError

    hook = opt.register_step_post_hook(fail)
    with pytest.raises(InterruptedTrainingError):
        trainer.train()
    hook.remove()
    trainer.train()
    assert len(callback.profile.rows()) == 12
    assert opt._watch is None


# ---- Lightning

# Lightning's own, about the newest torch.
accepts_lightning = pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")


def fit(tmp_path: Path, callback: Any, fails_at: int | None = None, several: bool = False) -> Any:
    """Trains for 12 batches; the optimizers are the result."""
    pl = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers import CSVLogger

    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()
            self.other = Model()
            self.automatic_optimization = not several

        def training_step(self, batch: dict[str, Tensor], place: int) -> Tensor | None:
            if place == fails_at:
                raise InterruptedTrainingError
            loss = self.model(**batch)["loss"]
            if self.automatic_optimization:
                return loss
            for opt, of in zip(self.optimizers(), (self.model, self.other), strict=True):
                opt.zero_grad()
                self.manual_backward(of(**batch)["loss"])
                opt.step()
            return None

        def configure_optimizers(self) -> Any:
            first = flatstep.AdamW(self.model.parameters())
            return [first, flatstep.SGD(self.other.parameters())] if several else first

    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=1,
        log_every_n_steps=4,
        callbacks=[callback],
        logger=CSVLogger(tmp_path),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(ROWS, batch_size=4))
    return trainer.optimizers


def lightning_callback() -> Any:
    pytest.importorskip("lightning.pytorch")
    from flatstep.recording.lightning import ProfileCallback

    return ProfileCallback(limit=10.0)


def logged(tmp_path: Path) -> list[dict[str, str]]:
    (path,) = tmp_path.rglob("metrics.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@accepts_lightning
def test_lightning_logs_what_its_steps_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = lightning_callback()
    (opt,) = fit(tmp_path, callback)
    entries = logged(tmp_path)
    assert [int(entry["step"]) for entry in entries] == [3, 7, 11]
    for entry in entries:
        # The closure, in which Lightning trains, is no part of the step.
        assert float(entry["flatstep/wall_ms"]) > float(entry["flatstep/kernel_ms"]) > 0
        assert float(entry["flatstep/skipped"]) == 0
    assert len(callback.profile.rows()) == 12
    assert "AdamW: 12 steps of 2 tensors, 9 parameters" in capsys.readouterr().out
    assert opt._watch is None


@accepts_lightning
def test_lightning_logs_each_of_several_optimizers(tmp_path: Path) -> None:
    callback = lightning_callback()
    fit(tmp_path, callback, several=True)
    for entry in logged(tmp_path):
        assert float(entry["flatstep/AdamW/kernel_ms"]) > 0
        assert float(entry["flatstep/SGD/kernel_ms"]) > 0
    assert [row.optimizer for row in callback.profile.rows()] == ["AdamW", "SGD"] * 12


@accepts_lightning
def test_lightning_leaves_nothing_behind_where_training_fails(tmp_path: Path) -> None:
    callback = lightning_callback()
    with pytest.raises(InterruptedTrainingError):
        fit(tmp_path, callback, fails_at=3)
    assert len(callback.profile.rows()) == 3
    assert all(watch.optimizer._watch is None for watch in callback.profile.watches.values())
