"""The error that an FP8 cache makes, predicted from a histogram of magnitudes.

Every bin is replaced by :data:`POINTS_PER_BIN` evenly spaced values that share its count. They go through the real
quantiser (:mod:`fp8kv.kernels.fp8`), so rounding, subnormals and saturation are those of the format, and a scale can
be judged without the data: within 2 % of the measured error (tested).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp8kv.calibrate.histogram import LAST_EXPONENT, bin_edges
from fp8kv.calibrate.statistics import FoldStatistics
from fp8kv.kernels.fp8 import Fp8Format, quantize_dequantize

POINTS_PER_BIN = 8
"""A bin of bfloat16 data holds exactly eight different values."""


@dataclass(frozen=True)
class PredictedError:
    """Prediction for one scale per head; every field is ``[heads]`` float64.

    Attributes:
        signal: sum of squares of the data.
        noise: sum of squared errors.
        clipped: fraction of the values that saturate.
        subnormal: fraction of the non-zero values whose code lies below the smallest normal number.
        flushed: fraction of the non-zero values whose code is zero.
    """

    signal: Tensor
    noise: Tensor
    clipped: Tensor
    subnormal: Tensor
    flushed: Tensor

    @property
    def relative(self) -> Tensor:
        """Root of noise over signal, ``[heads]``; zero where there is no signal."""
        return torch.where(self.signal > 0, (self.noise / self.signal).sqrt(), 0.0)

    @property
    def sqnr_db(self) -> Tensor:
        """Signal-to-quantisation-noise ratio in decibels, ``[heads]``; infinite where there is no noise."""
        ratio = 10 * torch.log10(self.signal / self.noise)
        return torch.where(self.noise > 0, ratio, torch.inf)


@dataclass(frozen=True)
class WeightedPoints:
    """Data as a weighted set of magnitudes.

    Attributes:
        values: ``[heads, points]`` float32 magnitudes.
        weights: ``[heads, points]`` float64, how many values each stands for.
        zeros: ``[heads]`` float64 count of zeros.
    """

    values: Tensor
    weights: Tensor
    zeros: Tensor


def weighted_points(stats: FoldStatistics) -> WeightedPoints:
    """Replace each bin of a histogram by evenly spaced values, none above the largest value seen."""
    edges = bin_edges()
    low, width = edges[:-1], edges.diff()
    # the open-ended last bin is taken up to twice its start; the limit below cuts it to what was seen
    width[-1] = 2.0**LAST_EXPONENT
    offsets = torch.arange(POINTS_PER_BIN, dtype=torch.float64)
    offsets = (offsets if stats.bfloat16 else offsets + 0.5) / POINTS_PER_BIN
    values = low[:, None] + width[:, None] * offsets
    top = stats.absmax.double()[:, None, None]
    within = values <= top
    # the lowest point of a bin that holds data always counts, so that its share is never lost
    within[..., 0] = True
    share = stats.histogram.double() / within.sum(-1)
    weights = share[..., None] * within
    clamped = torch.minimum(values.expand_as(within), top)
    return WeightedPoints(
        values=clamped.flatten(1).float(),
        weights=weights.flatten(1),
        zeros=stats.zeros.double(),
    )


def predict_error(
    data: FoldStatistics | WeightedPoints, scale: Tensor, fmt: Fp8Format
) -> PredictedError:
    """Predict the error of storing this data at ``scale``.

    Args:
        data: a histogram over one or more heads, or the points made of it.
        scale: ``[heads]`` or ``[1]`` float32, positive.
        fmt: the FP8 format.
    """
    points = weighted_points(data) if isinstance(data, FoldStatistics) else data
    values, weights = points.values, points.weights
    step = scale.float()[:, None]
    error = quantize_dequantize(values, step, fmt).double() - values.double()
    codes = values / step
    non_zero = weights.sum(-1).clamp_min(1)
    return PredictedError(
        signal=(weights * values.double().square()).sum(-1),
        noise=(weights * error.square()).sum(-1),
        clipped=(weights * (codes > fmt.max)).sum(-1) / (non_zero + points.zeros),
        subnormal=(weights * (codes < fmt.smallest_normal)).sum(-1) / non_zero,
        flushed=(weights * (codes <= fmt.smallest_subnormal / 2)).sum(-1) / non_zero,
    )
