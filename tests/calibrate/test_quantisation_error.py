"""The error predicted from a histogram agrees with the error measured on the data.

The rule: noise power agrees within 2 % wherever about a thousand values or more carry it, and the more the better.
A histogram knows where a value lies only up to its bin, a sixteenth of an octave. Over n values that averages out, to
a standard deviation of 0.7 / sqrt(n) for rounding errors; over one it does not. Where a single clipped outlier
carries all noise, its error is known up to the width of its bin, no better.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8kv.calibrate.histogram import bin_edges, count_magnitudes
from fp8kv.calibrate.quantisation_error import POINTS_PER_BIN, predict_error, weighted_points
from fp8kv.calibrate.statistics import FoldStatistics
from fp8kv.kernels.fp8 import FORMATS, get_format, quantize_dequantize

NUM_VALUES = 200_000
TOLERANCE = 0.02
FEWEST_CARRIERS = 1000

all_formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

# octaves above the scale that just fits: from heavy clipping over every alignment of the bins to deep underflow
OCTAVES = (-3.0, -1.6, -1.0, 0.0, 0.3, 2.7, 8.0, 13.0, 16.5, 22.0)


def gaussian(generator):
    return torch.randn(NUM_VALUES, generator=generator)


def laplace(generator):
    uniform = torch.rand(NUM_VALUES, generator=generator).clamp(1e-6, 1 - 1e-6)
    return torch.distributions.Laplace(0.0, 0.02).icdf(uniform)


def lognormal_mix(generator):
    """A body, loud channels thirty times as large, and one value in ten that is exactly zero."""
    normal = torch.randn(NUM_VALUES, generator=generator)
    kind = torch.rand(NUM_VALUES, generator=generator)
    values = torch.where(kind < 0.5, (0.5 * normal).exp(), 30 * (0.4 * normal).exp())
    return values.masked_fill(kind > 0.9, 0.0) * normal.sign()


def fold_statistics(values):
    """Return the statistics of ``[heads, n]`` values."""
    magnitudes = values.abs()[None, :, :, None]
    counts = count_magnitudes(magnitudes)
    return FoldStatistics(
        histogram=counts.histogram,
        absmax=magnitudes.amax(dim=(0, 2, 3)).float(),
        zeros=counts.zeros,
        bfloat16=values.dtype == torch.bfloat16,
    )


def measured_noise(values, scale, fmt):
    """Return the squared error of every value; read back in float32, as an attention kernel does."""
    exact = values.double()
    return (quantize_dequantize(values.float(), scale, fmt).double() - exact).square()


def carriers(noise):
    """Return how many values carry the noise: n where n of them share it evenly and the rest has none."""
    return (noise.sum().square() / noise.square().sum()).item() if noise.sum() > 0 else 0.0


@all_formats
@both_dtypes
@pytest.mark.parametrize("make", [gaussian, laplace, lognormal_mix])
def test_predicted_noise_agrees_with_measured_noise(make, dtype, fmt):
    values = make(torch.Generator().manual_seed(0)).to(dtype)
    stats = fold_statistics(values[None])
    points = weighted_points(stats)
    compared = 0
    for octaves in OCTAVES:
        scale = stats.absmax / fmt.max * 2.0**octaves
        noise = measured_noise(values, scale, fmt)
        if carriers(noise) < FEWEST_CARRIERS:
            continue
        compared += 1
        predicted = predict_error(points, scale, fmt)
        assert predicted.noise.item() == pytest.approx(noise.sum().item(), rel=TOLERANCE), octaves
        power = values.double().square().sum().item()
        assert predicted.signal.item() == pytest.approx(power, rel=0.005)
        expected = math.sqrt(noise.sum().item() / power)
        assert predicted.relative.item() == pytest.approx(expected, rel=TOLERANCE)
        assert predicted.sqnr_db.item() == pytest.approx(-20 * math.log10(expected), abs=0.1)
    assert compared >= len(OCTAVES) - 2


@all_formats
def test_prediction_also_holds_for_float16(fmt):
    values = laplace(torch.Generator().manual_seed(1)).to(torch.float16)
    stats = fold_statistics(values[None])
    for octaves in (0.0, 3.1, 14.0):
        scale = stats.absmax / fmt.max * 2.0**octaves
        noise = measured_noise(values, scale, fmt)
        assert carriers(noise) >= FEWEST_CARRIERS
        predicted = predict_error(stats, scale, fmt).noise.item()
        assert predicted == pytest.approx(noise.sum().item(), rel=TOLERANCE)


@all_formats
@both_dtypes
@pytest.mark.parametrize("make", [gaussian, laplace, lognormal_mix])
def test_predicted_rates_agree_with_counted_ones(make, dtype, fmt):
    values = make(torch.Generator().manual_seed(2)).to(dtype)
    stats = fold_statistics(values[None])
    magnitudes = values.double().abs()
    non_zero = magnitudes[magnitudes > 0]
    for octaves in OCTAVES:
        scale = stats.absmax / fmt.max * 2.0**octaves
        clipped = (magnitudes / scale > fmt.max).double().mean().item()
        subnormal = (non_zero / scale < fmt.smallest_normal).double().mean().item()
        flushed = (non_zero / scale <= fmt.smallest_subnormal / 2).double().mean().item()
        predicted = predict_error(stats, scale, fmt)
        for rate, expected in (
            (predicted.clipped, clipped),
            (predicted.subnormal, subnormal),
            (predicted.flushed, flushed),
        ):
            # half the values of one bin may fall on the other side of the limit: 0.3 % of all at most
            assert rate.item() == pytest.approx(expected, rel=TOLERANCE, abs=3e-3), octaves


@pytest.mark.parametrize("octaves", [-2.0, 0.0, 15.0, 40.0])
@all_formats
def test_the_extremes_of_the_rates(fmt, octaves):
    values = torch.full((1, 100), 3.0)
    stats = fold_statistics(values)
    error = predict_error(stats, stats.absmax / fmt.max * 2.0**octaves, fmt)
    assert error.clipped.item() == (octaves < 0)
    assert error.flushed.item() == (octaves == 40)
    lowest_normal = math.log2(fmt.max / fmt.smallest_normal)
    assert error.subnormal.item() == (octaves > lowest_normal)


def test_zeros_count_among_what_could_clip_but_are_neither_flushed_nor_subnormal():
    values = torch.tensor([[0.0] * 6 + [1.0, 1000.0]])
    error = predict_error(fold_statistics(values), torch.ones(1), get_format("e4m3fn"))
    assert error.clipped.item() == 1 / 8
    assert error.subnormal.item() == error.flushed.item() == 0


@settings(deadline=None, max_examples=50)
@given(
    st.floats(450, 1e6, width=32),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**16),
)
def test_a_single_clipped_outlier_is_known_up_to_its_bin(outlier, dtype, seed):
    fmt = get_format("e4m3fn")
    body = torch.randn(1000, generator=torch.Generator().manual_seed(seed)) * 1e-3
    values = torch.cat([body, torch.tensor([outlier])]).to(dtype)
    error = math.sqrt(measured_noise(values, torch.ones(1), fmt).sum())
    predicted = predict_error(fold_statistics(values[None]), torch.ones(1), fmt)
    assert abs(predicted.noise.sqrt().item() - error) <= outlier / 16 + 0.1
    assert predicted.clipped.item() <= 1 / 1001


@both_dtypes
def test_heads_are_predicted_alone_each_at_its_scale(dtype):
    fmt = get_format("e4m3fn")
    generator = torch.Generator().manual_seed(3)
    values = (torch.randn(3, 2000, generator=generator) * torch.tensor([[1e-3], [1.0], [1e3]])).to(
        dtype
    )
    scales = torch.tensor([1e-3, 0.5, 2.0])
    together = predict_error(fold_statistics(values), scales, fmt)
    for head in range(3):
        alone = predict_error(
            fold_statistics(values[head : head + 1]), scales[head : head + 1], fmt
        )
        for field in ("signal", "noise", "clipped", "subnormal", "flushed"):
            assert getattr(together, field)[head].item() == pytest.approx(
                getattr(alone, field).item(), rel=1e-12
            )


def test_one_scale_serves_all_heads():
    fmt = get_format("e5m2")
    stats = fold_statistics(torch.randn(2, 500, generator=torch.Generator().manual_seed(4)))
    one = predict_error(stats, torch.tensor([0.3]), fmt)
    each = predict_error(stats, torch.tensor([0.3, 0.3]), fmt)
    assert torch.equal(one.noise, each.noise)
    assert one.noise.shape == (2,)


@all_formats
def test_what_the_format_holds_exactly_has_no_noise(fmt):
    # powers of two in bfloat16: the first of the eight numbers of their bins, which the limit at absmax keeps alone
    error = predict_error(fold_statistics(torch.full((1, 9), 0.25).bfloat16()), torch.ones(1), fmt)
    assert error.noise.item() == 0
    assert error.relative.item() == 0
    assert error.sqnr_db.item() == math.inf


def test_a_head_of_zeros_has_neither_signal_nor_noise():
    error = predict_error(fold_statistics(torch.zeros(2, 5)), torch.ones(1), get_format("e4m3fn"))
    for field in ("signal", "noise", "clipped", "subnormal", "flushed", "relative"):
        assert getattr(error, field).tolist() == [0, 0], field
    assert error.sqnr_db.tolist() == [math.inf, math.inf]


@given(st.lists(st.floats(-1e9, 1e9, width=32), min_size=1, max_size=50), st.booleans())
def test_the_points_weigh_what_was_counted_and_none_lies_above_the_largest_value(data, narrow):
    values = torch.tensor([data]).to(torch.bfloat16 if narrow else torch.float32)
    stats = fold_statistics(values)
    points = weighted_points(stats)
    assert points.weights.sum().item() == pytest.approx(stats.histogram.sum().item())
    assert points.zeros.tolist() == stats.zeros.tolist()
    assert points.values.max().item() <= stats.absmax.item()
    per_bin = points.weights.view(-1, POINTS_PER_BIN).sum(-1)
    assert torch.allclose(per_bin, stats.histogram[0].double())


def test_a_bfloat16_bin_becomes_the_eight_numbers_that_it_can_hold():
    stats = fold_statistics(torch.tensor([[1.0, 4.0]]).bfloat16())
    points = weighted_points(stats)
    at_one = (points.weights[0] > 0) & (points.values[0] < 2)
    assert points.values[0][at_one].tolist() == [1 + step / 128 for step in range(8)]


def test_a_float32_bin_becomes_the_midpoints_of_its_eighths():
    stats = fold_statistics(torch.tensor([[1.0, 4.0]]))
    points = weighted_points(stats)
    at_one = (points.weights[0] > 0) & (points.values[0] < 2)
    assert points.values[0][at_one].tolist() == [1 + (step + 0.5) / 128 for step in range(8)]


def test_the_bin_of_the_largest_value_is_shared_by_what_lies_below_it():
    stats = fold_statistics(torch.tensor([[1.0, 1 + 3 / 128]]).bfloat16())
    points = weighted_points(stats)
    used = points.weights[0] > 0
    assert points.values[0][used].tolist() == [1 + step / 128 for step in range(4)]
    assert points.weights[0][used].tolist() == [0.5] * 4


def test_values_beyond_the_last_octave_are_taken_at_most_as_large_as_the_largest():
    last = bin_edges()[-2].item()
    stats = fold_statistics(torch.full((1, 10), 1.5 * last))
    points = weighted_points(stats)
    used = points.values[points.weights > 0]
    assert used.min().item() >= last
    assert 1.4 * last <= used.max().item() <= 1.5 * last
    far = fold_statistics(torch.full((1, 10), 1e30))
    assert predict_error(far, torch.ones(1), get_format("e4m3fn")).clipped.item() == 1
