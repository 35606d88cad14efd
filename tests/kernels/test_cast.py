"""Exact division by a scale and FP8 codes on the device, native and by integers: the same bits as the reference."""

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8kv.kernels.cast import divide, encode, plan_cast
from fp8kv.kernels.fp8 import FORMATS, quantize

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")
BLOCK = 4096
# Where there is a GPU, all of these run on it. Triton's interpreter computes in numpy, which warns where a GPU does not.
pytestmark = (
    [pytest.mark.gpu]
    if HAS_GPU
    else [pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")]
)
all_formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
# What calibration writes (bfloat16, above absmax / 448), and what is hard for a division: significands next to a power
# of two, all ones, just above one, thirds; and the ends of the promised range.
SCALES = [
    1.0,
    0.0213623046875,
    1 / 448,
    1 / 3,
    0.3,
    1 + 2.0**-23,
    2 - 2.0**-23,
    2 - 2.0**-22,
    1.5 + 2.0**-23,
    3.0 * 2.0**-30,
    41.7e6,
    2.0**-20,
    (2 - 2.0**-23) * 2.0**-86,
    1.1 * 2.0**99,
]


@triton.jit
def _divide_kernel(
    x, scale, out, EXACT_FMA: tl.constexpr, SELECT: tl.constexpr, SIZE: tl.constexpr
):
    places = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    divisor = tl.load(scale)
    reciprocal = tl.div_rn(1.0, divisor)
    quotient = divide(tl.load(x + places), divisor, reciprocal, EXACT_FMA, SELECT)
    tl.store(out + places, quotient)


@triton.jit
def _encode_kernel(
    x,
    out,
    SIZE: tl.constexpr,
    EXACT_FMA: tl.constexpr,
    NATIVE: tl.constexpr,
    MAX_BITS: tl.constexpr,
    MANTISSA_BITS: tl.constexpr,
    MIN_EXPONENT: tl.constexpr,
    NAN_CODE: tl.constexpr,
    E5M2: tl.constexpr,
    SIGNED_ZERO: tl.constexpr,
):
    places = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    values = tl.load(x + places)
    codes = encode(
        values, NATIVE, MAX_BITS, MANTISSA_BITS, MIN_EXPONENT, NAN_CODE, E5M2, SIGNED_ZERO
    )
    tl.store(out + places, codes)


def padded(x):
    """Return the float32 values on the device, filled up with zeros to whole blocks."""
    x = x.float().flatten()
    return torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).to(DEVICE)


def divided(x, scale, select=False):
    values, out = padded(x), torch.empty_like(padded(x))
    plan = plan_cast(torch.float8_e4m3fn, DEVICE)
    divisor = torch.tensor(scale, dtype=torch.float32, device=DEVICE)
    grid = (values.numel() // BLOCK,)
    _divide_kernel[grid](values, divisor, out, plan.exact_fma, select, BLOCK)
    return out[: x.numel()]


def encoded(x, plan):
    values = padded(x)
    out = torch.empty_like(values, dtype=torch.uint8)
    _encode_kernel[(values.numel() // BLOCK,)](values, out, BLOCK, **plan.constants())
    return out[: x.numel()]


def expected_codes(x, fmt):
    return quantize(x.float().flatten(), 1.0, fmt).to(DEVICE)


def plans(fmt):
    """Return the ways to encode that this machine has."""
    plan = plan_cast(fmt.dtype, DEVICE)
    return [plan, replace(plan, native=False)] if plan.native else [plan]


def assert_encodes(x, fmt):
    wanted = expected_codes(x, fmt)
    is_nan = wanted.float().isnan()
    for plan in plans(fmt):
        found = encoded(x, plan)
        assert torch.equal(found.view(fmt.dtype).float().isnan(), is_nan)
        differing = (found != wanted.view(torch.uint8)) & ~is_nan
        assert not differing.any(), f"native={plan.native}: {x.flatten()[differing.cpu()][:5]}"


def every_number(dtype):
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def ties(fmt):
    """Return the middles between neighbouring codes and the three floats around each, of both signs."""
    values = torch.arange(128, dtype=torch.uint8).view(fmt.dtype).float()
    values = values[values.isfinite()]
    bits = ((values[:-1] + values[1:]) / 2).view(torch.int32)
    near = (bits[:, None] + torch.arange(-1, 2, dtype=torch.int32)).view(torch.float32)
    return torch.cat([near, -near])


@all_formats
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number_is_encoded_as_by_the_reference(fmt, dtype):
    assert_encodes(every_number(dtype), fmt)


@all_formats
def test_ties_go_to_the_even_code(fmt):
    assert_encodes(ties(fmt), fmt)


@all_formats
def test_every_code_comes_back(fmt):
    codes = torch.arange(256, dtype=torch.uint8).view(fmt.dtype)
    codes = codes[~codes.float().isnan() & codes.float().isfinite()]
    for plan in plans(fmt):
        assert torch.equal(encoded(codes.float(), plan).cpu(), codes.view(torch.uint8))


@all_formats
@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=200))
def test_any_float_is_encoded_as_by_the_reference(fmt, numbers):
    assert_encodes(torch.tensor(numbers), fmt)


@all_formats
def test_a_plan_says_what_the_format_says(fmt):
    plan = plan_cast(fmt.dtype, DEVICE)
    largest = torch.tensor(plan.max_bits, dtype=torch.int32).view(torch.float32).item()
    assert largest == fmt.max
    assert 2.0**plan.min_exponent == fmt.smallest_normal
    assert plan.mantissa_bits == fmt.mantissa_bits
    assert torch.tensor(plan.nan_code, dtype=torch.uint8).view(fmt.dtype).float().isnan()
    assert plan.signed_zero == (torch.tensor(-0.0).to(fmt.dtype).float().signbit().item())
    assert plan.e5m2 == (fmt.name == "e5m2")


def test_the_interpreter_and_fnuz_are_never_native():
    assert not plan_cast(torch.float8_e4m3fnuz, DEVICE).native
    assert plan_cast(torch.float8_e4m3fn, DEVICE).native == (
        HAS_GPU and torch.cuda.get_device_capability() >= (9, 0)
    )
    assert plan_cast(torch.float8_e4m3fn, DEVICE).exact_fma == HAS_GPU


@pytest.mark.parametrize("scale", SCALES)
def test_quotients_of_every_bfloat16_number_are_those_of_an_ieee_division(scale):
    numbers = every_number(torch.bfloat16).float()
    assert_divides(numbers, scale)


@pytest.mark.parametrize("scale", SCALES[:-2])
def test_quotients_next_to_ties_are_those_of_an_ieee_division(scale):
    for fmt in FORMATS.values():
        near = (ties(fmt) * torch.tensor(scale, dtype=torch.float32)).view(torch.int32)
        steps = torch.arange(-3, 4, dtype=torch.int32)
        assert_divides((near[..., None] + steps).view(torch.float32), scale)


@settings(max_examples=40 if HAS_GPU else 10, deadline=None)
@given(
    st.integers(0x3F800000, 0x3FFFFFFF),
    st.integers(-40, 40),
    st.integers(0, 2**32 - 1),
)
def test_quotients_by_any_scale_are_those_of_an_ieee_division(significand, exponent, seed):
    scale = torch.tensor(significand, dtype=torch.int32).view(torch.float32).item() * 2.0**exponent
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31 - 1, (BLOCK,), generator=generator, dtype=torch.int64)
    assert_divides(bits.to(torch.int32).view(torch.float32), scale)


def assert_divides(x, scale):
    """Compare bit for bit wherever a format tells the quotients apart, and the codes everywhere."""
    for select in (False, True):
        assert_divides_so(x.flatten(), scale, select)


def assert_divides_so(x, scale, select):
    found = divided(x, scale, select)
    divisor = torch.tensor(scale, dtype=torch.float32)
    wanted = (x / divisor).to(DEVICE)
    # below half of the smallest step of any format, 2^-17, everything is zero
    told_apart = (wanted.abs() < 2.0**19) & (wanted.abs() >= 2.0**-17) | (x == 0).to(DEVICE)
    assert torch.equal(found[told_apart].view(torch.int32), wanted[told_apart].view(torch.int32))
    for fmt in FORMATS.values():
        plan = plan_cast(fmt.dtype, DEVICE)
        codes, reference = encoded(found, plan), quantize(x, divisor, fmt).to(DEVICE)
        codes, is_nan = codes.view(fmt.dtype), reference.float().isnan()
        assert torch.equal(codes.float().isnan(), is_nan)
        same = codes.view(torch.uint8) == reference.view(torch.uint8)
        assert (same | is_nan).all(), (fmt.name, x[~(same | is_nan).cpu()][:5])


def test_a_reciprocal_would_not_do():
    # what the division is for: multiplying by 1 / scale gives other codes
    if not HAS_GPU:
        pytest.skip("the interpreter divides")
    x = (ties(FORMATS["e4m3fn"]) * torch.tensor(0.3)).flatten()
    by_reciprocal = x * torch.tensor(1 / 0.3, dtype=torch.float32)
    wanted = quantize(x, 0.3, FORMATS["e4m3fn"]).view(torch.uint8)
    plan = plan_cast(torch.float8_e4m3fn, DEVICE)
    assert (encoded(by_reciprocal, plan).cpu() != wanted).any()
    assert torch.equal(encoded(divided(x, 0.3), plan).cpu(), wanted)


def test_an_unknown_dtype_has_no_plan():
    with pytest.raises(KeyError):
        plan_cast(torch.bfloat16, DEVICE)
