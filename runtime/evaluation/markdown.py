"""Pieces of Markdown: tables and code spans."""

from __future__ import annotations

from collections.abc import Sequence


def table(columns: Sequence[str], num_words: int, rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay out a table whose first ``num_words`` columns hold words and the others numbers."""
    rule = ["---"] * num_words + ["---:"] * (len(columns) - num_words)
    return [f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows)]


def code(text: str) -> str:
    """Return ``text`` as a code span."""
    # A backtick would end the code span, a line break the paragraph.
    return f"`{' '.join(text.replace('`', chr(39)).split())}`"


def points(share: float) -> str:
    """Return a difference of shares in percentage points, with its sign."""
    text = f"{100 * share:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text


def small(value: float) -> str:
    """Return a number that may be tiny, in two digits."""
    return "0" if value == 0 else f"{value:.2g}"


def p_value(value: float) -> str:
    """Return a p-value."""
    return f"{value:.3f}" if value >= 0.001 else f"{value:.1e}"
