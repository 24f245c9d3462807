"""One line on standard error that tells how far a command has come; none where there is no terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


class Line:
    """The line, with what there is to do in steps of any size, and the time that is left."""

    def __init__(self, progress: Progress, what: str, total: float | None) -> None:
        self._progress = progress
        self._task = progress.add_task(what, total=total)

    def advance(self, steps: float) -> None:
        """So much more is done."""
        self._progress.advance(self._task, steps)

    def say(self, what: str) -> None:
        """Tell what is going on."""
        self._progress.update(self._task, description=what)


@contextmanager
def progress_line(what: str, total: float | None) -> Iterator[Line]:
    """The line is there in this block; without `total`, nobody knows how long it takes."""
    console = Console(stderr=True)
    bar = BarColumn(bar_width=24)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), bar, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield Line(progress, what, total)
