"""Progress on stderr: bars on a terminal, one line per stage elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

_STAGES = {
    "data": "reading samples",
    "load": "loading weights",
    "measure": "measuring tokens",
    "write": "writing",
}


class ProgressBars:
    """Named progress bars; a listener of calibrations.

    Nothing is drawn before the first stage begins, so that the hub client's own download bars have the terminal
    to themselves until then.
    """

    def __init__(self, console: Console | None) -> None:
        """Draw on ``console``; None draws nothing."""
        self._console = console
        self._progress: Progress | None = None
        self._begun: set[str] = set()
        self._tasks: dict[str, TaskID] = {}
        self._stage = ""

    def stage(self, name: str) -> None:
        """Begin the stage called ``name``, and with it end the one before."""
        self._finish_uncounted()
        self._stage = name
        self._begin(name, _STAGES.get(name, name), None)

    def advance(self, done: int, total: int) -> None:
        """Set how far the running stage is."""
        if self._progress is not None and self._stage in self._tasks:
            self._progress.update(
                self._tasks[self._stage],
                completed=done,
                total=total,
                count=f"{done:,}/{total:,}",
            )

    def add(self, name: str, count: int, total: int) -> None:
        """Move the bar called ``name`` on by ``count`` of ``total``."""
        self._begin(name, name, total)
        if self._progress is None:
            return
        task = self._tasks[name]
        self._progress.advance(task, count)
        done = next(int(t.completed) for t in self._progress.tasks if t.id == task)
        self._progress.update(task, count=f"{done:,}/{total:,}")

    def stop(self, *, complete: bool = True) -> None:
        """Leave the bars as they stand; ``complete`` says that the running stage got to its end."""
        if self._progress is None:
            return
        self._finish_uncounted(remove=not complete)
        self._progress.stop()
        self._progress = None

    def _begin(self, name: str, description: str, total: int | None) -> None:
        if self._console is None or name in self._begun:
            return
        self._begun.add(name)
        if not self._console.is_interactive:
            # a log file is no place for bars
            self._console.print(description, markup=False, soft_wrap=True)
            return
        if self._progress is None:
            self._progress = _new_progress(self._console)
            self._progress.start()
        self._tasks[name] = self._progress.add_task(description, total=total, count="")

    def _finish_uncounted(self, *, remove: bool = False) -> None:
        """Fill the bar of a stage that never said how long it is, instead of letting it pulse for ever."""
        if self._progress is None or self._stage not in self._tasks:
            return
        task = self._tasks[self._stage]
        if any(t.id == task and t.total is None for t in self._progress.tasks):
            if remove:
                self._progress.remove_task(task)
            else:
                self._progress.update(task, total=1, completed=1)


def _new_progress(console: Console) -> Progress:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[count]}", style="progress.download", markup=False),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        redirect_stdout=False,
    )
