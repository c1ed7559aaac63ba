"""The end of the process while threads step: a step that runs is waited for, and none begins.

Once Python ends, a daemon thread that asks for its lock again is unwound where it stands, and no
destructor in C++ survives that, be it ours or one of torch's, which lets go of the lock as often as
it is asked for something. So no thread may be inside a step by then.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from typing import Any

PATIENCE = 10.0  # seconds that a step may still take, or that whoever waits for a thread is kept

_turns: weakref.WeakSet[Any] = weakref.WeakSet()
_has_begun = False
_gate = threading.Lock()
_gate.acquire()


def new_turn() -> Any:
    """A lock that is held during an optimizer's steps, and from the end of the process on."""
    turn = threading.Lock()
    _turns.add(turn)
    return turn


def may_go_on() -> bool:
    """Whether a turn that is taken was taken by the end, and the step may be made without it.

    So it may in the main thread, where functions of :mod:`atexit` run. Other threads wait here, and
    go on only where one of those seems to wait for them.
    """
    if _has_begun and threading.current_thread() is not threading.main_thread():
        _gate.acquire(timeout=PATIENCE)
    return _has_begun


@atexit.register
def _take_turns() -> None:
    global _has_begun
    _has_begun = True
    deadline = time.monotonic() + PATIENCE
    for turn in list(_turns):
        turn.acquire(timeout=max(0.0, deadline - time.monotonic()))


# A child has no other thread than the one that forked.
os.register_at_fork(after_in_child=_turns.clear)
