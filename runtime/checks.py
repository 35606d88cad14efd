"""Checks of what a user set, each with a sentence that says what to give instead."""

from __future__ import annotations

from collections.abc import Sequence

from fp8kv.recipes.errors import RequestError


def check_integer(
    name: str, value: object, *, least: int | None = None, most: int | None = None
) -> None:
    """Refuse what is no whole number, or one out of bounds.

    Raises:
        RequestError: it is.
    """
    if (
        not isinstance(value, int)
        or isinstance(value, bool)
        or (least is not None and value < least)
        or (most is not None and value > most)
    ):
        bounds = "" if least is None else f" of at least {least}"
        bounds += "" if most is None else f" and at most {most}"
        raise RequestError(f"{name} is {value!r}: give a whole number{bounds}")


def check_switch(name: str, value: object) -> None:
    """Refuse what is neither True nor False.

    Raises:
        RequestError: it is neither.
    """
    if not isinstance(value, bool):
        raise RequestError(f"{name} is {value!r}: give True or False")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse what is not one of ``choices``.

    Raises:
        RequestError: it is not.
    """
    if value not in choices:
        raise RequestError(f"{name} is {value!r}: give one of {', '.join(choices)}")
