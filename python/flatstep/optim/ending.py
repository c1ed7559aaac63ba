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

PATIENCE = 10.0  # seconds that a step may still take, or that whoever waits for a thread is kept

_taken = threading.Lock()
_taken.acquire()


class Turn:
    """What holds the steps of an optimizer apart.

    Attributes:
        lock: To be held during a step; once the process ends, one that is never let go of.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        _turns.add(self)


_turns: weakref.WeakSet[Turn] = weakref.WeakSet()


def may_go_on(turn: Turn) -> bool:
    """Whether a turn is taken by the end of the process, and the step may be made without it.

    So it may in the main thread, where functions of :mod:`atexit` run. Other threads wait here, and
    go on only where one of those seems to wait for them.
    """
    if turn.lock is not _taken:
        return False
    if threading.current_thread() is not threading.main_thread():
        _taken.acquire(timeout=PATIENCE)
    return True


@atexit.register
def _take_turns() -> None:
    under_way = []
    for turn in list(_turns):
        under_way.append(turn.lock)
        turn.lock = _taken
    deadline = time.monotonic() + PATIENCE
    for lock in under_way:
        lock.acquire(timeout=max(0.0, deadline - time.monotonic()))


# A child has no other thread than the one that forked.
os.register_at_fork(after_in_child=_turns.clear)
