"""What the commands show: talk and tables on stderr, data on stdout."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


class Output:
    """Where a command speaks. Rich is imported when something is first shown."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet

    def say(self, text: str) -> None:
        """Write a line to stderr, unless quiet."""
        if not self.quiet:
            click.echo(text, err=True)

    def data(self, text: str) -> None:
        """Write a line to stdout, unless JSON was asked for."""
        if not self.as_json:
            click.echo(text)

    def json(self, value: Any) -> None:
        """Write ``value`` to stdout as JSON where that was asked for."""
        if self.as_json:
            click.echo(json.dumps(value, indent=2, allow_nan=False))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Draw a table on stderr, unless quiet or JSON was asked for. Cells that are numbers align right."""
        if self.quiet or self.as_json:
            return
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left", header_style="bold")
        for number, column in enumerate(columns):
            cells = [row[number] for row in rows]
            numeric = bool(cells) and all(_is_number(cell) for cell in cells)
            table.add_column(column, justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            # Text, not markup: names come from checkpoints
            table.add_row(*(Text(cell) for cell in row))
        _console().print(table)

    @contextmanager
    def progress(self) -> Iterator[ProgressBars]:
        """Show progress bars on stderr while the context is open, unless quiet."""
        if self.quiet:
            yield ProgressBars(None)
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=_console(),
        ) as progress:
            yield ProgressBars(progress)


class ProgressBars:
    """Named progress bars; a listener of calibrations."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._stage = ""

    def stage(self, name: str) -> None:
        """Begin the stage called ``name``."""
        self._stage = name
        if self._progress is not None and name not in self._tasks:
            self._tasks[name] = self._progress.add_task(_STAGES.get(name, name), total=None)

    def advance(self, done: int, total: int) -> None:
        """Set how far the running stage is."""
        if self._progress is not None and self._stage in self._tasks:
            self._progress.update(self._tasks[self._stage], completed=done, total=total)

    def add(self, name: str, count: int, total: int) -> None:
        """Move the bar called ``name`` on by ``count`` of ``total``."""
        if self._progress is None:
            return
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total)
        self._progress.advance(self._tasks[name], count)


_STAGES = {
    "data": "reading samples",
    "load": "loading weights",
    "measure": "measuring tokens",
    "write": "writing",
}


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def _is_number(cell: str) -> bool:
    return not cell or cell[0].isdigit() or (cell[0] in "-+<" and len(cell) > 1) or cell == "-"
