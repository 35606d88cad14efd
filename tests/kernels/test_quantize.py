"""FP8 codes of any shape: equal to the reference's, bit for bit, and nothing else written."""

from fractions import Fraction
from math import floor, log2

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8kv.kernels.arguments import KernelArgumentError
from fp8kv.kernels.quantize import quantize, reference_quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz]
INPUTS = [torch.bfloat16, torch.float16, torch.float32]
POISON = 0x5A


def values(*shape, dtype=torch.bfloat16, spread=20.0):
    """With scales around 0.3, a spread of 20 gives subnormal, normal and saturated codes."""
    return (torch.randn(shape, device=DEVICE) * spread).to(dtype)


def scale_of(*elements):
    return torch.rand(*elements, device=DEVICE) + 0.07


def codes_of(tensor):
    """Return the bytes; the sign of a NaN is nobody's promise."""
    return tensor.view(torch.uint8).masked_fill(tensor.float().isnan(), 0x7F)


def assert_same_codes(x, scale, **options):
    before = x.clone()
    found, expected = quantize(x, scale, **options), reference_quantize(x, scale, **options)
    assert found.dtype == expected.dtype
    assert found.shape == x.shape
    differing = codes_of(found) != codes_of(expected)
    assert not differing.any(), f"{differing.sum()} of {differing.numel()} codes differ"
    assert torch.equal(x.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("input_dtype", INPUTS)
def test_codes_equal_the_references(dtype, input_dtype):
    assert_same_codes(values(37, 129, dtype=input_dtype), scale_of(1), dtype=dtype)


@pytest.mark.parametrize("width", [1, 7, 16, 576, 1000, 7168])
def test_any_width(width):
    assert_same_codes(values(5, width), scale_of(1))
    assert_same_codes(values(5, width + 8)[:, :width], scale_of(1))
    assert_same_codes(values(5, 2, width), scale_of(2))


@pytest.mark.parametrize("dtype", FORMATS)
def test_every_bfloat16_pattern(dtype):
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for scale in (1.0, 0.37, 3.1e-5):
        assert_same_codes(bits.to(DEVICE), torch.tensor(scale, device=DEVICE), dtype=dtype)


def test_negative_zero_keeps_its_sign():
    codes = quantize(torch.tensor([-0.0, 0.0], device=DEVICE), torch.tensor([0.3], device=DEVICE))
    assert codes.view(torch.uint8).tolist() == [0x80, 0]


def test_nan_stays_nan_and_infinities_saturate():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e30], device=DEVICE)
    found = quantize(x, torch.tensor([0.5], device=DEVICE)).float()
    assert found[0].isnan()
    assert found[1:].tolist() == [448.0, -448.0, 448.0]


@pytest.mark.parametrize(
    "take",
    [
        lambda x: x[..., 128:],
        lambda x: x[..., :128],
        lambda x: x[:, 1:3],
        lambda x: x[::2],
        lambda x: x[:, :, 3:10],
        lambda x: x[:1],
        lambda x: x[:, :1],
        lambda x: x.transpose(0, 1),
    ],
)
def test_strided_views_with_one_scale_and_with_one_per_head(take):
    x = take(values(6, 4, 192))
    assert_same_codes(x, scale_of(1))
    assert_same_codes(x, scale_of(x.shape[-2]))


def test_part_of_a_projection_is_taken_as_it_is():
    qkv = values(9, 10 * 64)
    query, key = qkv[:, :512].view(9, 8, 64), qkv[:, 512:].view(9, 2, 64)
    for part in (query, key):
        assert_same_codes(part, scale_of(part.shape[1]))


def test_given_output_is_filled_and_its_neighbours_are_left():
    whole = torch.full((5, 4, 192), POISON, dtype=torch.uint8, device=DEVICE)
    out = whole.view(torch.float8_e4m3fn)[..., :128]
    x, scale = values(5, 4, 128), scale_of(4)
    assert quantize(x, scale, out=out) is out
    assert torch.equal(whole[..., :128], reference_quantize(x, scale).view(torch.uint8))
    assert (whole[..., 128:] == POISON).all()


def test_bytes_behind_a_contiguous_output_are_left():
    for elements in (1, 15, 16, 17, 2047, 2049):
        whole = torch.full((elements + 64,), POISON, dtype=torch.uint8, device=DEVICE)
        quantize(values(elements), scale_of(1), out=whole[:elements].view(torch.float8_e4m3fn))
        assert (whole[elements:] == POISON).all()


def test_format_of_a_given_output_wins():
    out = torch.empty(3, 16, dtype=torch.float8_e5m2, device=DEVICE)
    assert_same_codes(values(3, 16), scale_of(1), out=out)


@pytest.mark.parametrize("shape", [(0,), (0, 16), (3, 0), (2, 0, 64)])
def test_nothing_to_do(shape):
    assert quantize(values(*shape), scale_of(1)).shape == shape


@settings(max_examples=25 if DEVICE == "cpu" else 8, deadline=None)
@given(
    tokens=st.integers(1, 9),
    heads=st.integers(1, 5),
    width=st.integers(1, 70),
    skipped=st.integers(0, 9),
    per_head=st.booleans(),
    dtype=st.sampled_from(FORMATS),
    input_dtype=st.sampled_from(INPUTS),
)
def test_any_shape_and_view(tokens, heads, width, skipped, per_head, dtype, input_dtype):
    x = values(tokens, heads, width + skipped, dtype=input_dtype)[..., skipped:]
    assert_same_codes(x, scale_of(heads if per_head else 1), dtype=dtype)


def test_two_operations_divide_every_16_bit_number_to_the_right_code():
    """What ``to_codes`` claims, by enumeration in exact arithmetic.

    A code can only be wrong where the quotient lies nearer to the middle m of two float32 numbers than the sum
    ``high + low`` is good to, 2^-45, and one of the two has 5 bits, as the boundaries between codes have.
    """
    near = []
    for boundary in range(16, 32):
        middles = [(boundary << 21) + 2, (boundary << 21) - 2]  # in units of 2^-25
        middles += [(boundary << 21) - 1] if boundary == 16 else []
        for middle in middles:
            for x in range(1 << 10, 1 << 11):
                scale = round_down(Fraction(x, middle), 24)
                ulp = Fraction(2) ** (floor(log2(scale)) - 23)
                near += [
                    (Fraction(x), candidate)
                    for candidate in (scale, scale + ulp)
                    if abs(x / (candidate * middle) - 1) < Fraction(1, 1 << 41)
                ]
    assert len(near) == 1
    for x, scale in near:
        nearest, high = round_even(1 / scale), round_down(1 / scale, 24)
        low = round_even(round_even(1 - high * scale) * nearest)
        assert round_even(x * high + round_even(x * low)) == round_even(x / scale)


def round_down(value, bits=24):
    unit = Fraction(2) ** (floor(log2(value)) - bits + 1)
    return value // unit * unit


def round_even(value):
    unit = Fraction(2) ** (floor(log2(value)) - 23)
    return round(value / unit) * unit


def test_bad_arguments_are_named_with_what_was_found_and_what_is_required():
    x, scale = values(4, 3, 32), scale_of(1)
    wrong = [
        ((x.to(torch.int32), scale), {}, "dtype of x", "int32", "bfloat16"),
        ((x.transpose(1, 2), scale), {}, "last stride of x", "32", "1"),
        ((x, 0.5), {}, "scale", "float", "float32 tensor"),
        ((x, scale.double()), {}, "dtype of scale", "float64", "float32"),
        ((x, scale_of(2)), {}, "shape of scale", "[2]", "1 or 3"),
        ((x, scale_of(1, 3)), {}, "shape of scale", "[1, 3]", "one dimension"),
        ((x, scale.to("meta")), {}, "device of scale", "meta", DEVICE),
        ((x, scale), {"dtype": torch.int8}, "dtype", "int8", "float8"),
        ((x, scale), {"out": torch.empty(4, 3, 32, device=DEVICE)}, "out", "float32", "float8"),
        ((x, scale), {"out": fp8(4, 3, 16)}, "shape of out", "[4, 3, 16]", "[4, 3, 32]"),
        ((x, scale), {"out": fp8(4, 32, 3).transpose(1, 2)}, "last stride of out", "3", "1"),
        ((values(), scale), {}, "dimensions of x", "0", "at least 1"),
        ((values(4, 5, 6, 7)[:, :4, :5, :6], scale), {}, "strides", "[210, 42, 7, 1]", "fold"),
    ]
    for arguments, options, name, found, required in wrong:
        with pytest.raises(KernelArgumentError) as raised:
            quantize(*arguments, **options)
        message = str(raised.value)
        assert name in message.split(" is ")[0] or name in message, message
        assert found in message, message
        assert required in message, message


def fp8(*shape):
    return torch.empty(shape, dtype=torch.float8_e4m3fn, device=DEVICE)


@pytest.mark.gpu
def test_integer_encoder_gives_the_codes_of_the_gpus_conversion(monkeypatch):
    """What GPUs without a conversion run, and what the interpreter judges."""
    from dataclasses import replace

    from fp8kv.kernels import quantize as module

    x, plan = values(64, 576), module.plan_cast
    native = quantize(x, scale_of(1).fill_(0.37))
    monkeypatch.setattr(module, "plan_cast", lambda *a: replace(plan(*a), native=False))
    assert torch.equal(
        quantize(x, scale_of(1).fill_(0.37)).view(torch.uint8), native.view(torch.uint8)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(8192, 7168), (8192, 7000), (64, 576), (1024, 128, 128)])
def test_large_inputs(shape):
    assert_same_codes(values(*shape), scale_of(1))
    assert_same_codes(values(*shape), scale_of(1), pdl=True)
    if len(shape) > 2:
        assert_same_codes(values(*shape), scale_of(shape[-2]))


@pytest.mark.gpu
def test_every_16_bit_pattern_with_many_scales():
    bits = torch.arange(1 << 16, dtype=torch.int32, device=DEVICE).to(torch.int16)
    scales = (torch.rand(60, device=DEVICE) + 0.5) * torch.exp2(torch.arange(-30, 30).to(DEVICE))
    scales[::3] = scales[::3].bfloat16().float()
    scales[0] = 1 - 2.0**-24
    for input_dtype in (torch.bfloat16, torch.float16):
        x = bits.view(input_dtype)
        for scale in scales:
            assert_same_codes(x, scale)


@pytest.mark.gpu
def test_float32_quotients_are_rounded_once():
    magnitudes = torch.exp2(torch.randint(-60, 60, (1 << 20,), device=DEVICE).float())
    x = torch.randn(1 << 20, device=DEVICE) * magnitudes
    for exponent in (-40, -9, 0, 3, 40):
        scale = (torch.rand(1, device=DEVICE) + 1) * 2.0**exponent
        for dtype in FORMATS:
            assert_same_codes(x, scale, dtype=dtype)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31st():
    x = values(1, 1 << 20).expand(
        2100, -1
    )  # 2.2e9 elements in the output, no memory behind the input
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=DEVICE)
    scale = scale_of(1)
    quantize(x, scale, out=out)
    expected = reference_quantize(x[0], scale).view(torch.uint8)
    for row in (0, 2047, 2048, 2099):
        assert torch.equal(out[row].view(torch.uint8), expected)


@pytest.mark.gpu
def test_a_captured_graph_follows_the_scale():
    x, scale = values(64, 576), scale_of(1)
    out = quantize(x, scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        quantize(x, scale, out=out)
    for value in (0.11, 3.0):
        scale.fill_(value)
        graph.replay()
        assert torch.equal(codes_of(out), codes_of(reference_quantize(x, scale)))
