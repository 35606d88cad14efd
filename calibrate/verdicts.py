"""Verdicts: is scale 1.0 good enough for a layer, and do the chosen scales hold on data they have not seen?

FP8's relative error is the same over three decades of magnitude, so most layers lose nothing at scale 1.0. A layer
gains where 1.0 saturates (*clip*) or where its values fall into the subnormals (*underflow*).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch

from fp8kv.calibrate.derive import derive_scales
from fp8kv.calibrate.folds import CALIBRATION_FOLDS, HELD_OUT_FOLD
from fp8kv.calibrate.quantisation_error import predict_error
from fp8kv.calibrate.scales import LayerScales, ScaleSet
from fp8kv.calibrate.statistics import FoldStatistics, KVStatistics, LayerStatistics
from fp8kv.kernels.fp8 import Fp8Format, get_format
from fp8kv.recipes.schema import Scales

Verdict = Literal["flat", "clip", "underflow"]

FLAT_TOLERANCE = 1.1
"""Scale 1.0 counts as good as the chosen one while its relative error is at most this many times as large."""

SPLIT_TOLERANCE = 1.5
"""A stream is held badly by the row's common scale when a scale of its own would make its error this much smaller."""


@dataclass(frozen=True)
class Quality:
    """Predicted quality of one scale on one set of data, the heads taken together.

    Attributes:
        relative_error: root of noise over signal.
        sqnr_db: signal-to-quantisation-noise ratio; infinite where there is no noise.
        clipped: fraction of values that saturate.
        subnormal: fraction of non-zero values with a subnormal code.
    """

    relative_error: float
    sqnr_db: float
    clipped: float
    subnormal: float


@dataclass(frozen=True)
class StreamVerdict:
    """The verdict on one stream of one layer.

    Attributes:
        layer: name of the attention module.
        stream: K, V, LATENT or ROPE.
        verdict: what scale 1.0 does to this stream.
        absmax: largest magnitude on the calibration folds.
        first_token_absmax: the same for the first token of every sample alone.
        pair_norm: bound on what RoPE can bring an element to at any position; None for V and LATENT.
        scale: the chosen scale; the largest where there is one per head.
        at_unit: quality at scale 1.0, calibration folds.
        at_scale: quality at the chosen scale, calibration folds.
        held_out: quality at the chosen scale on the held-out fold; None where that is empty.
        note: what else the user should know, or an empty string.
    """

    layer: str
    stream: str
    verdict: Verdict
    absmax: float
    first_token_absmax: float
    pair_norm: float | None
    scale: float
    at_unit: Quality
    at_scale: Quality
    held_out: Quality | None
    note: str

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-serialisable form, infinities as null."""
        data = asdict(self)
        for key in ("at_unit", "at_scale", "held_out"):
            if data[key] is not None and not math.isfinite(data[key]["sqnr_db"]):
                data[key]["sqnr_db"] = None
        return data


@dataclass(frozen=True)
class ConvergencePoint:
    """How far the scales were from the final ones after some of the data.

    Attributes:
        tokens: calibration tokens used.
        largest_change: largest of ``|log2(scale / final scale)|`` over layers and streams; no scale is rounded to a
            power of two for it.
        median_change: the median of the same.
    """

    tokens: int
    largest_change: float
    median_change: float


def judge(stats: KVStatistics, scales: ScaleSet) -> list[StreamVerdict]:
    """Return the verdict on every stream of every layer, in model order."""
    fmt = get_format(scales.fp8_format)
    verdicts = []
    for layer, chosen in zip(stats.layers, scales.layers, strict=True):
        for stream_name in layer.streams:
            verdicts.append(_judge_stream(layer, stream_name, chosen, fmt))
    return verdicts


def convergence(stats: KVStatistics, options: Scales) -> list[ConvergencePoint]:
    """Return how the scales moved while data was added, fold by fold; the last point is zero by definition.

    A curve that is flat at its end says that more data of the same kind would not change the scales.
    """
    exact = replace(options, power_of_two=False)
    filled = [fold for fold in CALIBRATION_FOLDS if int(stats.tokens[fold]) > 0]
    final = _log_scales(derive_scales(stats, exact, filled)) if filled else torch.zeros(0)
    points = []
    for count in range(1, len(filled) + 1):
        folds = filled[:count]
        change = (_log_scales(derive_scales(stats, exact, folds)) - final).abs()
        points.append(
            ConvergencePoint(
                tokens=int(stats.tokens[folds].sum()),
                largest_change=change.max().item(),
                median_change=change.median().item(),
            )
        )
    return points


def _judge_stream(
    layer: LayerStatistics, stream_name: str, chosen: LayerScales, fmt: Fp8Format
) -> StreamVerdict:
    stream = layer.streams[stream_name]
    data = stream.select(CALIBRATION_FOLDS)
    held_out = stream.select((HELD_OUT_FOLD,))
    scale = torch.tensor(chosen.v if stream_name == "V" else chosen.k)
    at_unit = _quality(data, torch.ones(1), fmt)
    at_scale = _quality(data, scale, fmt)
    absmax = data.absmax.max().item()
    return StreamVerdict(
        layer=layer.name,
        stream=stream_name,
        verdict=_verdict(absmax, at_unit, at_scale, fmt),
        absmax=absmax,
        first_token_absmax=stream.first_absmax.max().item(),
        pair_norm=None if stream.pair_norm is None else stream.pair_norm.max().item(),
        scale=scale.max().item(),
        at_unit=at_unit,
        at_scale=at_scale,
        held_out=_quality(held_out, scale, fmt) if int(held_out.histogram.sum()) else None,
        note=_split_note(data, stream_name, at_scale, fmt),
    )


def _verdict(absmax: float, at_unit: Quality, at_scale: Quality, fmt: Fp8Format) -> Verdict:
    if absmax > fmt.max:
        return "clip"
    if at_unit.relative_error > FLAT_TOLERANCE * at_scale.relative_error:
        return "underflow"
    return "flat"


def _split_note(data: FoldStatistics, stream_name: str, at_scale: Quality, fmt: Fp8Format) -> str:
    if stream_name not in ("LATENT", "ROPE"):
        return ""
    own = _quality(data, (data.absmax / fmt.max).clamp_min(1e-30), fmt)
    if at_scale.relative_error <= SPLIT_TOLERANCE * own.relative_error:
        return ""
    return (
        f"one scale cannot hold latent and rope part: {stream_name} has {at_scale.relative_error:.1%} relative "
        f"error where a scale of its own would have {own.relative_error:.1%}; folding gives each its own factor"
    )


def _quality(data: FoldStatistics, scale: torch.Tensor, fmt: Fp8Format) -> Quality:
    error = predict_error(data, scale, fmt)
    signal, noise = error.signal.sum().item(), error.noise.sum().item()
    non_zero = data.histogram.sum(-1).double()
    return Quality(
        relative_error=math.sqrt(noise / signal) if signal > 0 else 0.0,
        sqnr_db=10 * math.log10(signal / noise) if noise > 0 and signal > 0 else math.inf,
        clipped=_mean(error.clipped, non_zero + data.zeros),
        subnormal=_mean(error.subnormal, non_zero),
    )


def _mean(rates: torch.Tensor, counts: torch.Tensor) -> float:
    return ((rates * counts).sum() / counts.sum().clamp_min(1)).item()


def _log_scales(scales: ScaleSet) -> torch.Tensor:
    values: Sequence[float] = [value for layer in scales.layers for value in (*layer.k, *layer.v)]
    return torch.tensor(values, dtype=torch.float64).log2()
