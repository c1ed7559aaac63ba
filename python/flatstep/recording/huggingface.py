"""A recording inside Hugging Face's Trainer, which this module imports."""

from __future__ import annotations

from typing import Any

from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from flatstep.recording.recorder import Recorder, profile


class ProfileCallback(TrainerCallback):
    """Records the optimizer's steps, logs them with the Trainer, and prints a summary at the end.

    The figures are those of :meth:`flatstep.recording.Recorder.since_last`, as ``flatstep/wall_ms``
    and so on, through ``trainer.log`` whenever the Trainer itself logs: they are in its history and
    wherever it reports to.

    Args:
        trainer: The trainer that this callback is added to.
        limit: As for :func:`flatstep.profile`.

    Attributes:
        profile: The recording of the last training, to be read and exported; None before one.

    Example:
        >>> callback = ProfileCallback(trainer)
        >>> trainer.add_callback(callback)
        >>> trainer.train()
        >>> callback.profile.to_csv("steps.csv")
    """

    def __init__(self, trainer: Trainer, *, limit: float | None = None) -> None:
        self.profile: Recorder | None = None
        self._trainer = trainer
        self._limit = limit

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Begins to record the Trainer's optimizer; ends what a failed training has left."""
        if self.profile is not None:
            self.profile.stop()
        self.profile = profile(kwargs["optimizer"], limit=self._limit)
        self.profile.start()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Logs what the last steps took, where the Trainer is about to log."""
        if control.should_log and self.profile is not None:
            figures = self.profile.since_last()
            self._trainer.log({f"flatstep/{name}": value for name, value in figures.items()})

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Ends the recording, and prints its summary on the main process."""
        if self.profile is not None:
            self.profile.stop()
            if state.is_world_process_zero:
                print(self.profile.summary())
