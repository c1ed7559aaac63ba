"""What is known of one step."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """One call of ``step()``.

    Attributes:
        optimizer: Its class, with a number where several are alike.
        step: The call's number, from 1, among the recorded ones of its optimizer.
        start_s: Seconds since the recording began.
        wall_s: Seconds in ``step()``, without a closure's.
        kernel_s: Those inside the kernels' calls: the norm's and the update's. None for an
            optimizer that is not flatstep's.
        norm_s: Those of the norm alone; None where a step computed none.
        bytes_moved: What the kernels read and wrote, by the rule's count; None as for kernel_s.
        gb_per_s: The bytes in 1e9, by the kernels' seconds.
        of_limit: The same as a share of what this machine can move.
        grad_norm: The gradients' norm before clipping; None where a step computed none.
        skipped: Whether the step changed nothing, because gradients were not finite.
    """

    optimizer: str
    step: int
    start_s: float
    wall_s: float
    kernel_s: float | None
    norm_s: float | None
    bytes_moved: int | None
    gb_per_s: float | None
    of_limit: float | None
    grad_norm: float | None
    skipped: bool
