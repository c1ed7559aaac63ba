"""What the commands of ``verify`` share: the bar, and how Ctrl-C ends them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from flatstep.verify.runner import OnProgress

INTERRUPTED = 130  # the shell's code for Ctrl-C


@contextmanager
def progress_bar(console: Console, against: str) -> Iterator[OnProgress]:
    """A bar with the time left, on a terminal only."""
    with Progress(
        TextColumn("against {task.fields[against]}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    ) as progress:
        task: TaskID = progress.add_task("", against=against, total=None)
        yield lambda done, total, what: progress.update(
            task, completed=done, total=total, description=what
        )
