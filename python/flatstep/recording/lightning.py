"""A recording inside Lightning's Trainer, which this module imports."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from flatstep.recording.recorder import Recorder, profile


class ProfileCallback(Callback):
    """Records the optimizers' steps, logs them with the module, and prints a summary at the end.

    The figures are those of :meth:`flatstep.recording.Recorder.since_last`, as ``flatstep/wall_ms``
    and so on, through the module's ``log_dict``, after every batch that stepped: the Trainer passes
    them to its loggers every ``log_every_n_steps``.

    Args:
        limit: As for :func:`flatstep.profile`.

    Attributes:
        profile: The recording of the last fit, to be read and exported; None before one.

    Example:
        >>> callback = ProfileCallback()
        >>> Trainer(callbacks=[callback]).fit(module)
        >>> callback.profile.to_csv("steps.csv")
    """

    def __init__(self, *, limit: float | None = None) -> None:
        self.profile: Recorder | None = None
        self._limit = limit

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins to record the Trainer's optimizers."""
        self.profile = None
        if trainer.optimizers:
            self.profile = profile(*trainer.optimizers, limit=self._limit)
            self.profile.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Logs what the batch's steps took."""
        if self.profile is not None and (figures := self.profile.since_last()):
            pl_module.log_dict({f"flatstep/{name}": value for name, value in figures.items()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the recording, and prints its summary on the main process."""
        if self.profile is not None:
            self.profile.stop()
            if trainer.is_global_zero:
                print(self.profile.summary())

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Ends the recording."""
        if self.profile is not None:
            self.profile.stop()
