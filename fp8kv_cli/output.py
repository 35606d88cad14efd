"""What the commands show: talk and tables on stderr, data on stdout."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

import click

from fp8kv.progress import ProgressBars

if TYPE_CHECKING:
    from rich.console import Console

_STYLES: Mapping[str, str] = {
    "clip": "bold red",
    "breaks": "bold red",
    "underflow": "yellow",
    "ignored": "yellow",
}
"""Cells that the eye must find in a table of a hundred rows."""


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
        """Write ``value`` to stdout as JSON where that was asked for; NaN and infinities become null."""
        if self.as_json:
            click.echo(json.dumps(_json_value(value), indent=2, allow_nan=False))

    def table(
        self,
        title: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[str]],
        legend: str = "",
    ) -> None:
        """Draw a table on stderr, unless quiet or JSON was asked for. Cells that are numbers align right."""
        if self.quiet or self.as_json:
            return
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
            show_edge=False,
            header_style="bold",
        )
        for number, column in enumerate(columns):
            cells = [row[number] for row in rows]
            numeric = bool(cells) and all(_is_number(cell) for cell in cells)
            table.add_column(column, justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            # Text, not markup: names come from checkpoints
            table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
        console = _console()
        # a title that wraps inside a narrow table cannot be copied
        console.print(Text(title, style="bold"), soft_wrap=True)
        console.print(table)
        if legend:
            console.print(Text(legend, style="dim"))
        console.print()

    @contextmanager
    def progress(self) -> Iterator[ProgressBars]:
        """Show on stderr how far the work is, while the context is open, unless quiet.

        Meanwhile libraries keep still, and what code from elsewhere prints goes to stderr: stdout is for data.
        """
        bars = ProgressBars(None if self.quiet else _console())
        with redirect_stdout(sys.stderr), _quiet_libraries():
            try:
                yield bars
            except BaseException:
                bars.stop(complete=False)
                raise
            bars.stop()


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Turn transformers' warnings and progress bars off: what a user must know, the commands say."""
    from huggingface_hub.utils import are_progress_bars_disabled  # type: ignore[attr-defined]
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars_were_on = logging.is_progress_bar_enabled() and not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars_were_on:
            logging.enable_progress_bar()


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def _json_value(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_number(cell: str) -> bool:
    return (
        cell in ("", "-", "inf") or cell[0].isdigit() or (cell[0] in "-+" and cell[1:2].isdigit())
    )
