"""Tables of results, as rows of text, and the sentences that go with them."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from fp8kv.calibrate.formats.targets import TargetEffect
    from fp8kv.calibrate.verdicts import ConvergencePoint, Quality, StreamVerdict
    from fp8kv.recipes import Recipe

VERDICT_COLUMNS = (
    "layer",
    "stream",
    "absmax",
    "at 1.0",
    "error",
    "scale",
    "error",
    "SQNR",
    "clipped",
)
VERDICT_LEGEND = (
    "at 1.0: flat (no harm), clip (saturates) or underflow (falls into subnormals), and the relative error; "
    "then the chosen scale and its error, and on held-out data its SQNR in dB and the share it clips"
)
EFFECT_COLUMNS = ("engine", "scales", "why")


def verdict_title(what: str, verdicts: Sequence[StreamVerdict]) -> str:
    """Return the title of the verdict table; it says what the layer column leaves out."""
    pattern, _ = short_names([verdict.layer for verdict in verdicts])
    return f"{what}, layers {pattern}" if pattern else what


def verdict_rows(verdicts: Sequence[StreamVerdict]) -> list[list[str]]:
    """Return the rows of the verdict table."""
    _, short = short_names([verdict.layer for verdict in verdicts])
    return [
        [
            short[verdict.layer],
            verdict.stream,
            f"{verdict.absmax:.4g}",
            verdict.verdict,
            f"{verdict.at_unit.relative_error:.2%}",
            f"{verdict.scale:.4g}",
            f"{verdict.at_scale.relative_error:.2%}",
            "-" if verdict.held_out is None else _decibels(verdict.held_out),
            "-" if verdict.held_out is None else _rate(verdict.held_out.clipped),
        ]
        for verdict in verdicts
    ]


def effect_rows(effects: Sequence[TargetEffect]) -> list[list[str]]:
    """Return one row per target: what it does and why."""
    return [[effect.target, effect.loads, effect.reason] for effect in effects]


def plan_rows(facts: dict[str, Any], recipe: Recipe) -> list[list[str]]:
    """Return the rows of a calibration's plan.

    Args:
        facts: :meth:`CalibrationPlan.to_json`'s form.
        recipe: the resolved recipe.
    """
    scales = recipe.scales
    estimator = scales.estimator
    if estimator == "percentile":
        estimator = f"percentile {scales.percentile:g}"  # type: ignore[assignment]
    rounding = "powers of two" if scales.power_of_two else "bfloat16 numbers"
    base = f"{facts['base']}, {_bytes(facts['weight_bytes_read'])} of weights"
    return [
        ["model", facts["model"]],
        ["architecture", f"{facts['architecture']}, {facts['attention']}"],
        ["base", base],
        ["measured", f"{', '.join(facts['streams'])} of {facts['layers']} layers"],
        ["recipe", facts["recipe"]],
        ["data", ", ".join(source.dataset for source in recipe.data.sources)],
        ["samples", f"{facts['samples']:,} of at most {facts['seq_len']:,} tokens"],
        ["tokens", f"{facts['tokens_at_most']:,} at most"],
        ["forward passes", f"{facts['dtype']} on {facts['device']}"],
        ["time", f"{_duration(facts['estimated_forward_seconds'])} or longer"],
        ["scales", f"{estimator}, per {scales.granularity}, {scales.fp8_format}, {rounding}"],
        ["written", f"{facts['scale_tensors']} scales, {_bytes(facts['bytes_written'])}"],
    ]


def verdict_sentence(verdicts: Sequence[StreamVerdict]) -> str:
    """Say in one line what the verdicts mean for a user who would otherwise serve at scale 1.0."""
    counts = dict.fromkeys(("flat", "clip", "underflow"), 0)
    for verdict in verdicts:
        counts[verdict.verdict] += 1
    if counts["clip"] == counts["underflow"] == 0:
        return f"all {len(verdicts)} streams are flat: scale 1.0 would serve as well here"
    return (
        f"scale 1.0 saturates {counts['clip']} and underflows {counts['underflow']} "
        f"of {len(verdicts)} streams; the calibrated scales hold them"
    )


def convergence_sentence(curve: Sequence[ConvergencePoint]) -> str:
    """Say in one line whether more data would change the scales."""
    if len(curve) < 2:
        return "too little data to tell whether the scales have converged"
    point = next((p for p in curve if p.tokens >= curve[-1].tokens / 2), curve[0])
    return (
        f"with {point.tokens:,} of {curve[-1].tokens:,} tokens the scales were within "
        f"{2**point.largest_change - 1:.1%} of the final ones (median {2**point.median_change - 1:.1%})"
    )


def serve_commands(effects: Sequence[TargetEffect], out: Path, recipe: Recipe) -> list[str]:
    """Return one shell command per engine that serves ``out``, with the flags that the recipe suggests.

    The table of targets decides on ``--kv-cache-dtype``: it knows what the scales need, a recipe does not.
    """
    commands = []
    for effect in effects:
        command = effect.serve.format(model=shlex.quote(str(out)))
        suggested = _flags(getattr(recipe.serve, effect.target, ""))
        given = {flag[0] for flag in _flags(command)} | {"--kv-cache-dtype"}
        missing = [word for flag in suggested if flag[0] not in given for word in flag]
        commands.append(" ".join([command, *map(shlex.quote, missing)]))
    return list(dict.fromkeys(commands))


def short_names(names: Sequence[str]) -> tuple[str, dict[str, str]]:
    """Return what dotted names have in common, and the shortest form that tells them apart.

    ``model.layers.0.self_attn`` and ``model.layers.1.self_attn`` give ``model.layers.*.self_attn``, ``0`` and ``1``.
    Numbers always stay, so that a single layer keeps its own.
    """
    unique = list(dict.fromkeys(names))
    parts = [name.split(".") for name in unique]
    if len({len(words) for words in parts}) != 1:
        return "", {name: name for name in unique}
    kept = [
        position
        for position, words in enumerate(zip(*parts, strict=True))
        if len(set(words)) > 1 or words[0].isdigit()
    ]
    if not kept:
        return "", {name: name for name in unique}
    pattern = ".".join("*" if position in kept else word for position, word in enumerate(parts[0]))
    short = {
        name: ".".join(words[position] for position in kept)
        for name, words in zip(unique, parts, strict=True)
    }
    return pattern, short


def _flags(command: str) -> list[list[str]]:
    """Split the options of a command line, each with its values; what stands before the first is left out."""
    flags: list[list[str]] = []
    for word in shlex.split(command):
        if word.startswith("-"):
            flags.append([word])
        elif flags:
            flags[-1].append(word)
    return flags


def _decibels(quality: Quality) -> str:
    return f"{quality.sqnr_db:.1f}"


def _rate(share: float) -> str:
    return "0" if share == 0 else f"{share:.1e}"


def _bytes(count: int) -> str:
    size, unit = float(count), "bytes"
    for larger in ("KB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{count:,} bytes" if unit == "bytes" else f"{size:.1f} {unit}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
