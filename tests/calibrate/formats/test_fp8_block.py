"""FP8 block quantisation: shapes, ragged blocks, and one rounding only."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8kv.calibrate.formats import fp8_block
from fp8kv.calibrate.formats.fp8_block import dequantize_block, quantize_block


def expand(scales, rows, cols, block):
    """Write out the scale of every element, by the definition of the layout."""
    full = torch.empty(rows, cols)
    for row in range(rows):
        for col in range(cols):
            full[row, col] = scales[row // block, col // block]
    return full


@pytest.mark.parametrize(("rows", "cols"), [(128, 128), (1, 1), (129, 127), (256, 384)])
def test_shapes_and_dtypes(rows, cols):
    codes, scales = quantize_block(torch.randn(rows, cols))
    assert codes.shape == (rows, cols)
    assert codes.dtype == torch.float8_e4m3fn
    assert codes.is_contiguous()
    assert scales.shape == (-(-rows // 128), -(-cols // 128))
    assert scales.dtype == torch.float32


def test_576_rows_have_a_last_block_of_64():
    weight = torch.randn(576, 256, generator=torch.Generator().manual_seed(0))
    weight[512:] *= 1000  # only the ragged block sees these
    codes, scales = quantize_block(weight)
    assert scales.shape == (5, 2)
    torch.testing.assert_close(scales[4, 0].item(), weight[512:, :128].abs().max().item() / 448)
    torch.testing.assert_close(scales[3, 1].item(), weight[384:512, 128:].abs().max().item() / 448)
    decoded = dequantize_block(codes, scales)
    torch.testing.assert_close(decoded, weight, rtol=2**-4, atol=1000 * 4 / 448 * 2**-9)


def test_decoding_is_code_times_scale_of_its_block():
    generator = torch.Generator().manual_seed(1)
    codes = torch.randn(11, 7, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 2, generator=generator)
    decoded = dequantize_block(codes, scales, block=4)
    assert torch.equal(decoded, codes.float() * expand(scales, 11, 7, 4))


@pytest.mark.parametrize("rows", [24, 27])
@pytest.mark.parametrize("elements", [1, 2 * 4 * 7, 1000])
def test_a_chunk_of_any_size_decodes_to_the_same(monkeypatch, elements, rows):
    monkeypatch.setattr(fp8_block, "chunk_elements", lambda _device: elements)
    codes = torch.randn(rows, 7).to(torch.float8_e4m3fn)
    scales = torch.rand(-(-rows // 4), 2)
    decoded = dequantize_block(codes, scales, block=4)
    assert torch.equal(decoded, codes.float() * expand(scales, rows, 7, 4))


def test_codes_need_not_be_contiguous():
    codes = torch.randn(7, 11).to(torch.float8_e4m3fn).t()
    scales = torch.rand(3, 2)
    decoded = dequantize_block(codes, scales, block=4)
    assert torch.equal(decoded, codes.float() * expand(scales, 11, 7, 4))


def test_blocks_need_not_be_square():
    codes = torch.ones(4, 6, dtype=torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0], [10.0, 11.0, 12.0]])
    decoded = dequantize_block(codes, scales, block=(1, 2))
    assert torch.equal(decoded, scales.repeat_interleave(2, dim=1))


def test_result_is_rounded_once_to_its_dtype():
    codes = torch.full((1, 1), 1.125, dtype=torch.float8_e4m3fn)
    scales = torch.tensor([[1.001]])
    decoded = dequantize_block(codes, scales, dtype=torch.bfloat16)
    assert decoded.dtype == torch.bfloat16
    assert decoded.item() == torch.tensor(1.125 * 1.001).bfloat16().item()


def test_a_block_of_zeros_has_scale_one():
    codes, scales = quantize_block(torch.zeros(3, 3))
    assert scales.item() == 1.0
    assert torch.equal(dequantize_block(codes, scales), torch.zeros(3, 3))


def test_powers_of_two_scale_exponent_scales():
    codes = torch.ones(2, 2, dtype=torch.float8_e4m3fn)
    scales = torch.tensor([[4.0]]).to(torch.float8_e8m0fnu)
    assert torch.equal(dequantize_block(codes, scales), torch.full((2, 2), 4.0))


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 20),
    cols=st.integers(1, 20),
    block=st.integers(1, 8),
    seed=st.integers(0, 2**31),
    exponent=st.integers(-20, 20),
)
def test_round_trip_stays_within_half_a_step(rows, cols, block, seed, exponent):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator) * 2.0**exponent
    codes, scales = quantize_block(weight, block)
    full = expand(scales, rows, cols, block)
    # e4m3fn: 3 mantissa bits, and a fixed step of 2^-9 below its smallest normal number.
    bound = torch.maximum(weight.abs() * 2**-4, full * 2**-10) * 1.0001
    assert ((dequantize_block(codes, scales, block) - weight).abs() <= bound).all()
    assert codes.float().isfinite().all()


def test_quantising_again_changes_nothing():
    weight = torch.randn(40, 30, generator=torch.Generator().manual_seed(2))
    codes, scales = quantize_block(weight, 16)
    again, scales_again = quantize_block(dequantize_block(codes, scales, 16), 16)
    assert torch.equal(codes.view(torch.uint8), again.view(torch.uint8))
    torch.testing.assert_close(scales, scales_again)


def test_scales_that_do_not_fit_are_refused():
    codes = torch.zeros(576, 256, dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"576 x 256 in blocks of 128 x 128 needs scales of 5 x 2"):
        dequantize_block(codes, torch.ones(4, 2))


def test_only_matrices():
    with pytest.raises(ValueError, match=r"is a matrix, not \[3\]"):
        quantize_block(torch.zeros(3))
    with pytest.raises(ValueError, match=r"is a matrix, not \[1, 1, 1\]"):
        dequantize_block(torch.zeros(1, 1, 1), torch.ones(1, 1, 1))
