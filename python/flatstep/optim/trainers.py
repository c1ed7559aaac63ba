"""Who else clips the gradients that an optimizer is about to clip."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

_LOOKS = 32  # norms of an optimizer that are looked at; large ones are in the first steps
_IN_A_ROW = 3


class _Kind(NamedTuple):
    """How a trainer of others is asked about clipping."""

    option: str
    off: str
    limit: Callable[[Any], float | None]
    optimizers: Callable[[Any], list[Any]]


_HUGGING_FACE = _Kind(
    "TrainingArguments(max_grad_norm={})",
    "max_grad_norm=0 in TrainingArguments",
    lambda trainer: getattr(trainer.args, "max_grad_norm", None),
    lambda trainer: [getattr(trainer, "optimizer", None)],
)
_LIGHTNING = _Kind(
    "Trainer(gradient_clip_val={})",
    "no gradient_clip_val in Lightning's Trainer",
    lambda trainer: getattr(trainer, "gradient_clip_val", None),
    lambda trainer: getattr(trainer, "optimizers", []),
)
# By the module in whose methods a training runs.
_KINDS = {
    "transformers.trainer": _HUGGING_FACE,
    "lightning.pytorch.trainer.trainer": _LIGHTNING,
    "pytorch_lightning.trainer.trainer": _LIGHTNING,
}


def warn_of_trainer(optimizer: object) -> bool:
    """Warns where a trainer that is calling this optimizer, which clips, clips as well.

    Returns:
        Whether it does.
    """
    for kind, trainer in _trainers():
        limit = kind.limit(trainer)
        if limit and any(_unwrapped(own) is optimizer for own in kind.optimizers(trainer)):
            warnings.warn(
                f"gradients are clipped twice: by {kind.option.format(limit)}, and by "
                f"max_grad_norm of {type(optimizer).__name__}. The smaller limit holds, and "
                f"grad_norm is the norm after the first; use {kind.off}, or leave out the "
                "optimizer's max_grad_norm",
                UserWarning,
                stacklevel=2,
            )
            return True
    return False


def _trainers() -> Iterator[tuple[_Kind, Any]]:
    """The trainers of others whose methods are running in this thread."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        kind = _KINDS.get(frame.f_globals.get("__name__", ""))
        if kind is not None and "self" in frame.f_locals:
            yield kind, frame.f_locals["self"]


def _unwrapped(optimizer: Any) -> Any:
    """What Accelerate has wrapped."""
    while (inner := getattr(optimizer, "optimizer", None)) is not None:
        optimizer = inner
    return optimizer


class Suspicion:
    """Notices from the first norms that gradients have been clipped before.

    What clips leaves a norm that is its limit but for rounding: 0.99999923 at one step, 0.99999931
    at the next. Gradients that stay the same, as in a test, have equal norms and do not count.
    """

    def __init__(self) -> None:
        self._left = _LOOKS
        self._last = 0.0
        self._in_a_row = 0

    def look(self, norm: float) -> bool:
        """Whether to go on; warns at the third norm in a row that is the same limit.

        Limits have two digits or less: 1, 0.5, 0.25.
        """
        limit = float(f"{norm:.2g}")
        is_near = 0 < abs(norm - limit) < 1e-5 * limit + 1e-6
        is_same = abs(norm - self._last) < 1e-5 * limit + 1e-6 and norm != self._last
        self._in_a_row = 0 if not is_near else self._in_a_row + 1 if is_same else 1
        self._last = norm
        self._left -= 1
        if self._in_a_row < _IN_A_ROW:
            return self._left > 0
        warnings.warn(
            f"gradients seem to be clipped twice: at {_IN_A_ROW} steps in a row their norm was "
            f"{limit:g} before max_grad_norm of the optimizer, as clip_grad_norm_ leaves it. The "
            "smaller limit holds, and grad_norm is the norm after the first; leave out one of them",
            UserWarning,
            stacklevel=2,
        )
        return False
