"""FP8 formats: their limits, the clamp before the cast, rounding, and scales that bfloat16 can hold."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8kv.kernels.fp8 import (
    FORMATS,
    dequantize,
    get_format,
    quantize,
    quantize_dequantize,
    round_up_to_bfloat16,
    sqnr_db,
)

all_formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
formats = st.sampled_from(list(FORMATS.values()))
largest_bfloat16 = torch.finfo(torch.bfloat16).max


def floats32(low, high, **options):
    return st.floats(float(np.float32(low)), float(np.float32(high)), width=32, **options)


def grid(fmt):
    """Return the non-negative values of the format, ascending: the place in it is the code."""
    values = torch.arange(128, dtype=torch.uint8).view(fmt.dtype).double()
    return values[values.isfinite()].numpy()


def nearest(x, fmt):
    """Round as the standard says, in double precision: to the nearest value, ties to the even code."""
    values = grid(fmt)
    magnitude = np.minimum(np.abs(x.double().numpy()), values[-1])
    above = np.searchsorted(values, magnitude)
    below = np.maximum(above - 1, 0)
    to_above, to_below = values[above] - magnitude, magnitude - values[below]
    take_below = (to_below < to_above) | ((to_below == to_above) & (below % 2 == 0))
    rounded = np.where(take_below, values[below], values[above])
    return torch.from_numpy(np.copysign(rounded, x.double().numpy()))


def every_number(dtype):
    """Return all finite numbers of a 16-bit type."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return numbers[numbers.isfinite()]


@pytest.mark.parametrize(
    ("name", "largest", "smallest_normal", "smallest_subnormal", "mantissa_bits"),
    [
        ("e4m3fn", 448.0, 2.0**-6, 2.0**-9, 3),
        ("e5m2", 57344.0, 2.0**-14, 2.0**-16, 2),
        ("e4m3fnuz", 240.0, 2.0**-7, 2.0**-10, 3),
    ],
)
def test_the_limits_are_those_of_the_standard(
    name, largest, smallest_normal, smallest_subnormal, mantissa_bits
):
    fmt = get_format(name)
    assert fmt.name == name
    assert fmt.max == largest
    assert fmt.smallest_normal == smallest_normal
    assert fmt.smallest_subnormal == smallest_subnormal
    assert fmt.mantissa_bits == mantissa_bits


@all_formats
def test_the_limits_are_those_of_the_codes(fmt):
    values, steps = grid(fmt), np.diff(grid(fmt))
    assert fmt.max == values[-1] == torch.finfo(fmt.dtype).max
    assert fmt.smallest_subnormal == values[1]
    even = steps == fmt.smallest_subnormal
    # steps are even up to twice the smallest normal number, and wider from there on
    assert fmt.smallest_normal == values[even.sum()] / 2
    assert np.all(np.diff(even.astype(int)) <= 0)


def test_a_format_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_format("e4m3fn").max = 464.0


def test_an_unknown_format_is_refused_with_the_known_names():
    with pytest.raises(
        ValueError, match="unknown FP8 format 'e4m3'; known formats: e4m3fn, e5m2, e4m3fnuz"
    ):
        get_format("e4m3")


@all_formats
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_goes_to_the_nearest_code(fmt, dtype):
    numbers = every_number(dtype)
    assert torch.equal(quantize(numbers, 1.0, fmt).double(), nearest(numbers, fmt))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@all_formats
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gpu_stores_the_same_codes(fmt, dtype):
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    numbers = numbers.view(torch.float16 if dtype == torch.float16 else torch.bfloat16).to(dtype)
    for scale in (torch.tensor([1.0]), torch.tensor([0.3])):
        # a tensor: by a plain number a GPU multiplies with the rounded reciprocal
        on_gpu = quantize(numbers.cuda(), scale.cuda(), fmt).float().cpu()
        on_cpu = quantize(numbers, scale, fmt).float()
        torch.testing.assert_close(on_gpu, on_cpu, rtol=0, atol=0, equal_nan=True)


@all_formats
def test_ties_go_to_the_even_code_and_their_neighbours_to_the_nearer_one(fmt):
    values = grid(fmt)
    ties = torch.from_numpy((values[:-1] + values[1:]) / 2).float()
    above = torch.nextafter(ties, torch.tensor(math.inf))
    below = torch.nextafter(ties, torch.tensor(0.0))
    lower = torch.arange(len(values) - 1)
    for sign, bit in ((1, 0), (-1, 0x80)):
        codes = [quantize(sign * x, 1.0, fmt).view(torch.uint8).int() for x in (below, ties, above)]
        even = lower + lower % 2
        for code, magnitude in zip(codes, (lower, even, lower + 1), strict=True):
            # e4m3fnuz has no negative zero: its bit pattern is NaN
            no_sign = (magnitude == 0) & (fmt.name == "e4m3fnuz")
            assert torch.equal(code, torch.where(no_sign, 0, magnitude + bit).int())


@all_formats
def test_every_bfloat16_number_above_the_largest_saturates(fmt):
    numbers = every_number(torch.bfloat16)
    numbers = numbers[numbers.abs() > fmt.max]
    assert torch.equal(quantize(numbers, 1.0, fmt).float(), numbers.sign().float() * fmt.max)


@given(formats, st.data(), st.sampled_from([-1.0, 1.0]), st.sampled_from([2.0**-20, 1.0, 3.0]))
def test_every_input_above_the_largest_saturates(fmt, data, sign, scale):
    limit = np.nextafter(np.float32(fmt.max * scale), np.float32(np.inf))
    x = sign * data.draw(st.floats(float(limit), math.inf, width=32))
    code = quantize(torch.tensor([x]), scale, fmt).float().item()
    assert code == sign * fmt.max


@all_formats
@pytest.mark.parametrize("count", [1, 67], ids=["scalar", "vector"])
def test_infinities_saturate(fmt, count):
    x = torch.tensor([math.inf, -math.inf]).repeat(count)
    assert quantize(x, 0.5, fmt).float().tolist() == [fmt.max, -fmt.max] * count


@all_formats
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("count", [1, 67], ids=["scalar", "vector"])
def test_nan_stays_nan(fmt, dtype, count):
    x = torch.tensor([math.nan, -math.nan], dtype=dtype).repeat(count)
    assert quantize(x, 2.0, fmt).float().isnan().all()
    assert quantize_dequantize(x, 2.0, fmt).isnan().all()


@pytest.mark.parametrize("name", ["e4m3fn", "e5m2"])
def test_negative_zero_keeps_its_sign(name):
    assert quantize(torch.tensor([-0.0]), 1.0, get_format(name)).view(torch.uint8).item() == 0x80


@pytest.mark.parametrize("x", [-0.0, -1e-30, -(2.0**-11)])
def test_e4m3fnuz_has_no_negative_zero_and_must_not_make_it_nan(x):
    assert quantize(torch.tensor([x]), 1.0, get_format("e4m3fnuz")).view(torch.uint8).item() == 0


@all_formats
def test_the_stored_code_is_the_value_over_the_scale(fmt):
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    scales = torch.tensor([0.25, 1.0, 3.0, 0.01]).view(4, 1, 1)
    codes = quantize(x, scales, fmt)
    assert codes.dtype == fmt.dtype
    assert codes.shape == x.shape
    assert torch.equal(codes.double(), nearest(x / scales, fmt))
    for head in range(4):
        alone = quantize(x[head], scales[head].item(), fmt)
        assert torch.equal(codes[head].view(torch.uint8), alone.view(torch.uint8))


@all_formats
def test_dequantising_rounds_once_to_the_wanted_dtype(fmt):
    codes = torch.arange(0, 120, dtype=torch.uint8).view(fmt.dtype)
    for dtype in (torch.float32, torch.bfloat16):
        read = dequantize(codes, 0.3, dtype)
        assert read.dtype == dtype
        assert torch.equal(read, (codes.double() * np.float32(0.3)).float().to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_reader_gets_the_dtype_that_the_writer_had_and_the_input_stays_as_it_was(dtype):
    x = torch.tensor([0.1, 1000.0, -3.0], dtype=dtype)
    before = x.clone()
    y = quantize_dequantize(x, 1.0, get_format("e4m3fn"))
    assert y.dtype == dtype
    assert y.tolist() == [0.1015625, 448.0, -3.0]
    assert torch.equal(x, before)


@given(formats, st.data(), st.integers(-30, 30), floats32(1, 1.9921875))
def test_the_error_is_at_most_half_a_step(fmt, data, exponent, mantissa):
    scale = mantissa * 2.0**exponent
    x = data.draw(floats32(-fmt.max, fmt.max)) * scale
    stored = torch.tensor(x)
    error = abs(quantize_dequantize(stored, scale, fmt).double().item() - stored.double().item())
    half_step = max(abs(x) * 2.0 ** -(fmt.mantissa_bits + 1), fmt.smallest_subnormal * scale / 2)
    assert error <= half_step * (1 + 1e-5)


@given(formats, st.data(), st.integers(-20, 20))
def test_what_was_read_from_the_cache_is_stored_without_a_further_error(fmt, data, exponent):
    x = torch.tensor(data.draw(st.lists(floats32(-1e6, 1e6), min_size=1)))
    once = quantize_dequantize(x, 2.0**exponent, fmt)
    assert torch.equal(quantize_dequantize(once, 2.0**exponent, fmt), once)


def test_sqnr_counts_decibels():
    x = torch.tensor([3.0, -4.0])
    assert sqnr_db(x, x * 1.1) == pytest.approx(20.0, abs=1e-5)
    assert sqnr_db(x, x + torch.tensor([0.0, 0.5])) == pytest.approx(20.0)
    assert sqnr_db(x, torch.zeros(2)) == 0.0
    assert sqnr_db(x.bfloat16(), x) == math.inf
    assert sqnr_db(torch.zeros(2), x) == -math.inf


@given(floats32(2.0**-149, largest_bfloat16, exclude_min=False))
def test_rounding_up_gives_the_smallest_bfloat16_number_that_is_not_below(value):
    scale = torch.tensor([value])
    rounded = round_up_to_bfloat16(scale)
    assert rounded.dtype == torch.float32
    assert rounded.item() >= value
    assert torch.equal(rounded.to(torch.bfloat16).float(), rounded)
    next_below = (rounded.view(torch.int32) - (1 << 16)).view(torch.float32)
    assert next_below.item() < value
    assert scale.item() == value


def test_rounding_up_leaves_every_bfloat16_number_as_it_is():
    numbers = every_number(torch.bfloat16).float()
    numbers = numbers[numbers > 0]
    assert torch.equal(round_up_to_bfloat16(numbers), numbers)


def test_rounding_up_takes_any_shape_and_stride():
    scales = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) + 0.1
    assert torch.equal(round_up_to_bfloat16(scales.T), round_up_to_bfloat16(scales).T)
    assert round_up_to_bfloat16(torch.tensor(0.1)).shape == ()


@given(st.data(), formats)
def test_an_absmax_scale_rounded_up_never_clips(data, fmt):
    absmax = data.draw(floats32(1e-20, 1e20))
    scale = round_up_to_bfloat16(torch.tensor(absmax, dtype=torch.float64).div(fmt.max).float())
    assert (torch.tensor(absmax) / scale).item() <= fmt.max
