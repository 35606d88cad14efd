"""Tables of results, as rows of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fp8kv.calibrate.formats.targets import TargetEffect
    from fp8kv.calibrate.scales import ScaleSet
    from fp8kv.calibrate.verdicts import ConvergencePoint, Quality, StreamVerdict

VERDICT_COLUMNS = (
    "layer",
    "stream",
    "absmax",
    "scale",
    "verdict",
    "error at 1.0",
    "error",
    "held-out SQNR",
    "held-out clipped",
)


def verdict_rows(verdicts: Sequence[StreamVerdict]) -> list[list[str]]:
    """Return the rows of the verdict table."""
    return [
        [
            verdict.layer,
            verdict.stream,
            f"{verdict.absmax:.4g}",
            f"{verdict.scale:.6g}",
            verdict.verdict,
            f"{verdict.at_unit.relative_error:.2%}",
            f"{verdict.at_scale.relative_error:.2%}",
            "-" if verdict.held_out is None else _decibels(verdict.held_out),
            "-" if verdict.held_out is None else f"{verdict.held_out.clipped:.1e}",
        ]
        for verdict in verdicts
    ]


def scale_rows(scales: ScaleSet) -> list[list[str]]:
    """Return one row per layer: name, K scale, V scale."""
    return [[layer.name, _values(layer.k), _values(layer.v)] for layer in scales.layers]


def effect_rows(effects: Sequence[TargetEffect]) -> list[list[str]]:
    """Return one row per target: what it does and why."""
    return [[effect.target, effect.loads, effect.reason] for effect in effects]


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


def _decibels(quality: Quality) -> str:
    return f"{quality.sqnr_db:.1f} dB"


def _values(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.6g}"
    return f"{min(values):.6g} to {max(values):.6g} ({len(values)} heads)"
