"""Estimators: from statistics to a scale, and the rounding that follows."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fp8kv.calibrate.estimators import (
    MSE_OCTAVES,
    absmax,
    finish_scale,
    get_estimator,
    mse,
    percentile,
)
from fp8kv.calibrate.histogram import count_magnitudes
from fp8kv.calibrate.quantisation_error import predict_error
from fp8kv.calibrate.statistics import FoldStatistics
from fp8kv.kernels.fp8 import FORMATS, get_format, quantize_dequantize

E4M3 = get_format("e4m3fn")

all_formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
formats = st.sampled_from(list(FORMATS.values()))
values = st.lists(st.floats(-1e8, 1e8, width=32), min_size=1, max_size=60)
positive = st.floats(2.0**-100, 2.0**100, width=32)

ONE_BIN = 1 / 16
"""The width of a bin, relative to its lower edge at most."""


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
    stored = quantize_dequantize(values, scale[:, None], fmt)
    return (stored.double() - values.double()).square().sum(-1)


@given(values, formats, st.sampled_from([1.0, 1.05, 2.0]), st.booleans())
def test_nothing_seen_clips_at_the_finished_absmax_scale(data, fmt, headroom, power_of_two):
    x = torch.tensor([data])
    scale = finish_scale(
        absmax(fold_statistics(x), fmt), headroom=headroom, power_of_two=power_of_two
    )
    assert (x.abs() / scale).max().item() <= fmt.max
    assert predict_error(fold_statistics(x), scale, fmt).clipped.item() == 0


@all_formats
def test_absmax_maps_the_largest_value_of_each_head_to_the_largest_code(fmt):
    x = torch.tensor([[1.0, -fmt.max], [0.5, 0.25], [3.0, -2.0]])
    scale = absmax(fold_statistics(x), fmt)
    assert scale.dtype == torch.float32
    assert scale.tolist() == [1.0, np.float32(0.5 / fmt.max), np.float32(3.0 / fmt.max)]


@all_formats
@pytest.mark.parametrize("name", ["absmax", "percentile", "mse"])
def test_a_head_of_zeros_gets_scale_one_and_leaves_the_others_alone(name, fmt):
    x = torch.stack([torch.zeros(64), torch.linspace(-7, 7, 64)])
    estimate = get_estimator(name, percent=99.0)
    scale = estimate(fold_statistics(x), fmt)
    assert scale[0].item() == 1.0
    assert scale[1].item() == estimate(fold_statistics(x[1:]), fmt).item() < 1.0


@given(values, formats, st.floats(0.1, 100), st.floats(0.1, 100))
def test_a_higher_percentile_never_gives_a_smaller_scale(data, fmt, a, b):
    x = torch.tensor([data])
    low, high = sorted((a, b))
    zeros = 100 * (x.abs() < 2.0**-130).double().mean().item()
    assume(low > zeros * 1.001)
    stats = fold_statistics(x)
    assert percentile(stats, fmt, percent=low) <= percentile(stats, fmt, percent=high)


@given(values, formats)
def test_the_hundredth_percentile_is_the_maximum(data, fmt):
    stats = fold_statistics(torch.tensor([data]))
    assert torch.equal(percentile(stats, fmt, percent=100.0), absmax(stats, fmt))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("percent", [30.0, 50.0, 90.0, 99.0, 99.9, 99.99])
@pytest.mark.parametrize("zeros", [0.0, 0.2])
def test_a_percentile_is_that_of_the_data_within_a_bin(dtype, percent, zeros):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 50_000, generator=generator) * torch.tensor([[1.0], [30.0]])
    x = x.masked_fill(torch.rand(2, 50_000, generator=generator) < zeros, 0.0).to(dtype)
    scale = percentile(fold_statistics(x), E4M3, percent=percent)
    expected = np.percentile(x.double().abs().numpy(), percent, axis=1)
    assert (scale * E4M3.max).tolist() == pytest.approx(expected.tolist(), rel=ONE_BIN)


def test_a_percentile_counts_each_head_alone():
    x = torch.tensor([[1.0] * 99 + [448.0], [448.0] * 99 + [1.0]])
    scale = percentile(fold_statistics(x), E4M3, percent=50.0)
    assert scale[0].item() == pytest.approx(1 / 448, rel=ONE_BIN)
    assert scale[1].item() == pytest.approx(1.0, rel=ONE_BIN)


def test_a_percentile_that_falls_among_zeros_lets_nothing_clip():
    x = torch.tensor([[0.0] * 90 + [1000.0] * 10])
    stats = fold_statistics(x)
    assert percentile(stats, E4M3, percent=90.0).item() == absmax(stats, E4M3).item()
    assert percentile(stats, E4M3, percent=50.0).item() == absmax(stats, E4M3).item()


@settings(deadline=None, max_examples=50)
@given(values, formats, st.booleans())
def test_mse_is_never_predicted_to_be_worse_than_absmax(data, fmt, narrow):
    stats = fold_statistics(torch.tensor([data]).to(torch.bfloat16 if narrow else torch.float32))
    largest, best = absmax(stats, fmt), mse(stats, fmt)
    assert predict_error(stats, best, fmt).noise <= predict_error(stats, largest, fmt).noise
    assert largest * 2.0**-MSE_OCTAVES <= best * 1.0001
    assert best <= largest


@all_formats
def test_mse_clips_a_few_where_that_gives_many_a_finer_step(fmt):
    # At the absmax scale the body lies just above a power of two, where steps are widest for the magnitude.
    # To clip the one outlier moves it towards the next power.
    generator = torch.Generator().manual_seed(6)
    power, step = 2.0 ** (math.floor(math.log2(fmt.max)) - 2), 2.0**-fmt.mantissa_bits
    body = power * (1 + step * torch.rand(100_000, generator=generator))
    x = torch.cat([body, torch.tensor([fmt.max])])[None]
    stats = fold_statistics(x)
    largest, best = absmax(stats, fmt), mse(stats, fmt)
    assert best < largest
    assert measured_noise(x, best, fmt) < 0.7 * measured_noise(x, largest, fmt)


@all_formats
def test_mse_does_not_clip_an_outlier_to_lift_the_body_out_of_the_subnormals(fmt):
    # With round numbers: 2**20 values at 1, one at 2**18. To lose the outlier costs 2**36, to lose the body 2**20.
    x = torch.cat([torch.ones(2**20), torch.tensor([2.0**18])])[None]
    stats = fold_statistics(x)
    assert torch.equal(mse(stats, fmt), absmax(stats, fmt))


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**20), formats, st.sampled_from([0.5, 1.0, 1.7]))
def test_mse_is_measured_to_be_no_worse_than_absmax_on_heavy_tails(seed, fmt, spread):
    generator = torch.Generator().manual_seed(seed)
    x = torch.exp(spread * torch.randn(1, 20_000, generator=generator))
    stats = fold_statistics(x)
    ratio = measured_noise(x, mse(stats, fmt), fmt) / measured_noise(x, absmax(stats, fmt), fmt)
    assert ratio.item() <= 1.05


def test_mse_chooses_each_head_alone():
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(3, 5000, generator=generator) * torch.tensor([[1e-3], [1.0], [50.0]])
    together = mse(fold_statistics(x), E4M3)
    alone = [mse(fold_statistics(x[head : head + 1]), E4M3).item() for head in range(3)]
    assert together.tolist() == alone


@pytest.mark.parametrize("name", ["absmax", "percentile", "mse"])
@all_formats
def test_an_estimate_follows_the_data_when_it_is_scaled_by_a_power_of_two(name, fmt):
    x = torch.randn(1, 4000, generator=torch.Generator().manual_seed(9))
    estimate = get_estimator(name, percent=99.9)
    scale = estimate(fold_statistics(x), fmt)
    assert torch.equal(estimate(fold_statistics(x * 2.0**7), fmt), scale * 2.0**7)


def test_the_estimators_are_found_by_name():
    x = torch.randn(1, 4000, generator=torch.Generator().manual_seed(10))
    stats = fold_statistics(x)
    for name, expected in (
        ("absmax", absmax(stats, E4M3)),
        ("percentile", percentile(stats, E4M3, percent=90.0)),
        ("mse", mse(stats, E4M3)),
    ):
        assert torch.equal(get_estimator(name, percent=90.0)(stats, E4M3), expected)
    with pytest.raises(ValueError, match="unknown estimator 'max'; known: absmax, percentile, mse"):
        get_estimator("max", percent=90.0)


@given(positive, st.floats(1.0, 4.0), st.booleans())
def test_finishing_rounds_up_to_what_bfloat16_holds(value, headroom, power_of_two):
    scale = torch.tensor([value])
    finished = finish_scale(scale, headroom=headroom, power_of_two=power_of_two)
    assert finished.dtype == torch.float32
    assert finished >= scale
    assert torch.equal(finished.to(torch.bfloat16).float(), finished)
    assert finished.item() >= value * headroom * (1 - 2.0**-24)
    step = 2 if power_of_two else 1 + 2.0**-7
    assert finished.item() < value * headroom * step * (1 + 2.0**-23)


@pytest.mark.parametrize("power_of_two", [True, False])
def test_finishing_leaves_every_power_of_two_exactly_as_it_is(power_of_two):
    powers = torch.exp2(torch.arange(-126.0, 128.0, dtype=torch.float64)).float()
    expected = [2.0**exponent for exponent in range(-126, 128)]
    assert finish_scale(powers, headroom=1.0, power_of_two=power_of_two).tolist() == expected
    one_by_one = [
        finish_scale(power.view(1), headroom=1.0, power_of_two=power_of_two).item()
        for power in powers
    ]
    assert one_by_one == expected


@given(positive)
def test_a_power_of_two_is_the_next_one_above(value):
    finished = finish_scale(torch.tensor([value]), headroom=1.0, power_of_two=True).item()
    mantissa, exponent = math.frexp(value)
    assert finished == math.ldexp(1.0, exponent - (mantissa == 0.5))


@pytest.mark.parametrize(("headroom", "expected"), [(1.0, 1.0), (1.5, 1.5), (2.0, 2.0), (0.5, 0.5)])
def test_headroom_is_a_factor_on_the_scale(headroom, expected):
    finished = finish_scale(torch.ones(2), headroom=headroom, power_of_two=False)
    assert finished.tolist() == [expected, expected]


@pytest.mark.parametrize("power_of_two", [True, False])
def test_a_scale_never_underflows_to_zero(power_of_two):
    tiny = torch.tensor([1e-45, 1e-40])
    finished = finish_scale(tiny, headroom=0.5, power_of_two=power_of_two)
    assert finished.tolist() == [2.0**-126] * 2
