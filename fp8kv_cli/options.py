"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_args

import click

from fp8kv.recipes import schema

_Function = TypeVar("_Function", bound=Callable[..., Any])

RESUME_KEY = "fp8kv.resume"
"""Where a command leaves, in the context's ``meta``, what the user should know when it is interrupted."""


def output_options(function: _Function) -> _Function:
    """Add ``--json`` and ``--quiet``."""
    function = click.option(
        "--json", "as_json", is_flag=True, help="Print the result as JSON on stdout."
    )(function)
    return click.option(
        "--quiet", "-q", is_flag=True, help="No progress, and no tables on stderr."
    )(function)


def scale_options(function: _Function) -> _Function:
    """Add the options that choose how scales follow from statistics; None means: as the recipe says."""
    for option in reversed(
        [
            click.option(
                "--estimator",
                type=click.Choice(get_args(schema.Estimator)),
                help="How the magnitude that must fit is chosen.",
            ),
            click.option(
                "--percentile",
                type=click.FloatRange(0, 100, min_open=True),
                help="For --estimator percentile.",
            ),
            click.option(
                "--headroom",
                type=click.FloatRange(0, min_open=True),
                help="Factor on that magnitude.",
            ),
            click.option(
                "--power-of-two/--exact",
                default=None,
                help="Round scales up to powers of two, or to the next bfloat16 number only.",
            ),
            click.option(
                "--granularity",
                type=click.Choice(get_args(schema.Granularity)),
                help="One scale per tensor, or one per KV head.",
            ),
            click.option(
                "--fp8-format",
                type=click.Choice(get_args(schema.Fp8Format)),
                help="The cache's number format.",
            ),
        ]
    ):
        function = option(function)
    return function


def target_option(function: _Function) -> _Function:
    """Add ``--target``, repeatable."""
    return click.option(
        "--target",
        "targets",
        multiple=True,
        type=click.Choice(get_args(schema.TargetName)),
        help="Engine to write for; may be given several times.  [default: as the recipe says, vllm and sglang]",
    )(function)


def link_option(function: _Function) -> _Function:
    """Add ``--link``."""
    return click.option(
        "--link",
        type=click.Choice(["auto", "hard", "reflink", "symlink", "copy"]),
        default="auto",
        show_default=True,
        help="How the unchanged weights get into the output; auto never copies.",
    )(function)


def on_interrupt(text: str) -> None:
    """Say ``text`` when the running command is interrupted; without it nothing is promised."""
    click.get_current_context().meta[RESUME_KEY] = text


def scale_overrides(values: dict[str, Any]) -> dict[str, object]:
    """Return the recipe overrides for what :func:`scale_options` and :func:`target_option` collected."""
    overrides: dict[str, object] = {
        f"scales.{name}": values.get(name)
        for name in (
            "estimator",
            "percentile",
            "headroom",
            "power_of_two",
            "granularity",
            "fp8_format",
        )
    }
    overrides["output.targets"] = list(values["targets"]) if values.get("targets") else None
    return overrides
