"""Estimators: from statistics to a scale, as pure functions.

All return ``[heads]`` float32 scales in the convention ``x ~= float(code) * scale``; a head that saw only zeros gets
1.0. None of them rounds: see :func:`finish_scale`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fp8kv.calibrate.histogram import bin_edges
from fp8kv.calibrate.quantisation_error import predict_error, weighted_points
from fp8kv.calibrate.statistics import FoldStatistics
from fp8kv.kernels.fp8 import Fp8Format, round_up_to_bfloat16

MSE_STEPS_PER_OCTAVE = 4
MSE_OCTAVES = 10
"""The search range of :func:`mse`: from the largest value down by this many octaves."""


def absmax(stats: FoldStatistics, fmt: Fp8Format) -> Tensor:
    """Return the scale that maps the largest magnitude seen to the largest code: nothing seen clips."""
    return _to_scale(stats.absmax.double(), fmt)


def percentile(stats: FoldStatistics, fmt: Fp8Format, *, percent: float) -> Tensor:
    """Return the scale that maps the given percentile of the magnitudes, zeros included, to the largest code.

    Args:
        stats: the data.
        fmt: the FP8 format.
        percent: in (0, 100]; 100 equals :func:`absmax`, and so does a percentile at which all is zero.
    """
    counts = stats.histogram.double()
    upper = torch.minimum(bin_edges()[1:].expand_as(counts), stats.absmax.double()[:, None])
    lower = torch.minimum(bin_edges()[:-1].expand_as(counts), upper)
    cumulative = counts.cumsum(-1) + stats.zeros.double()[:, None]
    wanted = cumulative[:, -1:] * (percent / 100)
    index = torch.searchsorted(cumulative, wanted).clamp_max(counts.shape[-1] - 1)
    below = (cumulative - counts).gather(1, index)
    inside = ((wanted - below) / counts.gather(1, index).clamp_min(1)).clamp(0, 1)
    threshold = lower.gather(1, index) * (1 - inside) + upper.gather(1, index) * inside
    # a percentile that falls among the zeros says nothing about the rest: then nothing may clip
    threshold = torch.where(threshold > 0, threshold, stats.absmax.double()[:, None])
    return _to_scale(threshold.squeeze(1), fmt)


def mse(stats: FoldStatistics, fmt: Fp8Format) -> Tensor:
    """Return the scale with the least expected squared error, found on a grid of quarter octaves.

    The error is that of :func:`fp8kv.calibrate.quantisation_error.predict_error`: clipping the few against finer
    steps for the many, as the clipping thresholds of Migacz, "8-bit Inference with TensorRT" (GTC 2017) do for
    integers. A floating-point format gains little from clipping, so on most data this equals :func:`absmax`.
    """
    largest = absmax(stats, fmt)
    points = weighted_points(stats)
    best_scale, best_noise = largest.clone(), torch.full_like(points.zeros, float("inf"))
    for step in range(MSE_OCTAVES * MSE_STEPS_PER_OCTAVE + 1):
        scale = largest * 2.0 ** (-step / MSE_STEPS_PER_OCTAVE)
        noise = predict_error(points, scale, fmt).noise
        better = noise < best_noise
        best_scale = torch.where(better, scale, best_scale)
        best_noise = torch.where(better, noise, best_noise)
    return best_scale


def get_estimator(name: str, *, percent: float) -> Callable[[FoldStatistics, Fp8Format], Tensor]:
    """Return the estimator called ``absmax``, ``percentile`` or ``mse``.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    estimators: dict[str, Callable[[FoldStatistics, Fp8Format], Tensor]] = {
        "absmax": absmax,
        "percentile": lambda stats, fmt: percentile(stats, fmt, percent=percent),
        "mse": mse,
    }
    try:
        return estimators[name]
    except KeyError:
        raise ValueError(f"unknown estimator {name!r}; known: {', '.join(estimators)}") from None


def finish_scale(scale: Tensor, *, headroom: float, power_of_two: bool) -> Tensor:
    """Apply headroom, round up to a power of two where asked, and up to a bfloat16-representable value.

    Rounding only ever goes up, so that nothing clips which did not clip before.
    """
    widened = (scale.double() * headroom).clamp_min(torch.finfo(torch.float32).tiny)
    if power_of_two:
        return torch.exp2(torch.ceil(torch.log2(widened))).float()
    return round_up_to_bfloat16(widened.float())


def _to_scale(threshold: Tensor, fmt: Fp8Format) -> Tensor:
    return torch.where(threshold > 0, threshold / fmt.max, 1.0).float()
