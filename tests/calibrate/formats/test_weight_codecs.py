"""Decoding of INT4 and FP8 weights against independent references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8kv.calibrate.formats import weight_codecs
from fp8kv.calibrate.formats.weight_codecs import (
    WeightScheme,
    decode_fp8,
    decode_int4,
    read_scheme,
)

PLAIN = WeightScheme(block=None, group_sizes=(), int4_refusal="")


def pack_int4(values):
    """Pack ``[rows, cols]`` integers of -8..7 one by one, the way compressed-tensors documents it."""
    rows, cols = values.shape
    words = [[0] * -(-cols // 8) for _ in range(rows)]
    for row in range(rows):
        for col in range(cols):
            words[row][col // 8] |= (int(values[row, col]) + 8) << 4 * (col % 8)
    signed = [[word - 2**32 if word >= 2**31 else word for word in line] for line in words]
    return torch.tensor(signed, dtype=torch.int32).reshape(rows, -1)


def grouped(group):
    return WeightScheme(block=None, group_sizes=(group,), int4_refusal="")


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    cols=st.integers(1, 70),
    group=st.sampled_from([1, 3, 8, 32]),
    seed=st.integers(0, 2**31),
)
def test_int4_round_trip(rows, cols, group, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-8, 8, (rows, cols), generator=generator)
    scales = torch.rand(rows, -(-cols // group), generator=generator).bfloat16()
    shape = torch.tensor([rows, cols])
    decoded = decode_int4(pack_int4(values), scales, shape, grouped(group), torch.float32)
    expected = torch.stack(
        [values[:, col] * scales[:, col // group].float() for col in range(cols)], dim=1
    )
    assert torch.equal(decoded, expected)


def test_int4_golden_word():
    # Columns 0..7 hold -8, -7, 0, 7, 1, 2, 3, -1: nibbles 0, 1, 8, f, 9, a, b, 7 from the low end.
    packed = torch.tensor([[0x7BA9F810]], dtype=torch.int32)
    decoded = decode_int4(
        packed, torch.tensor([[0.5]]), torch.tensor([1, 8]), PLAIN, torch.bfloat16
    )
    assert decoded.dtype == torch.bfloat16
    assert decoded.tolist() == [[-4.0, -3.5, 0.0, 3.5, 0.5, 1.0, 1.5, -0.5]]


def test_int4_scale_per_row_needs_no_group_size():
    packed = pack_int4(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    scales = torch.tensor([[1.0], [10.0]])
    decoded = decode_int4(packed, scales, torch.tensor([2, 3]), PLAIN, torch.float32)
    assert decoded.tolist() == [[1.0, 2.0, 3.0], [40.0, 50.0, 60.0]]


@pytest.mark.parametrize(
    ("packed", "scales", "shape", "expected"),
    [
        ((2, 4), (2, 1), [2, 64], r"\[2, 4\] words of INT4 do not hold 2 x 64 weights"),
        ((2, 4, 1), (2, 1), [2, 32], "is a matrix"),
        ((2, 4), (2, 1), [2, 32, 1], "a shape of two numbers"),
        ((2, 4), (3, 1), [2, 32], r"scales of \[3, 1\] do not fit 2 x 32"),
        ((2, 4), (2,), [2, 32], r"scales of \[2\] do not fit"),
        ((2, 4), (2, 3), [2, 32], r"3 scales a row of 32 weights fit none of .* \[16\]"),
    ],
)
def test_int4_parts_that_do_not_fit(packed, scales, shape, expected):
    with pytest.raises(ValueError, match=expected):
        decode_int4(
            torch.zeros(packed, dtype=torch.int32),
            torch.ones(scales),
            torch.tensor(shape),
            grouped(16),
            torch.float32,
        )


def test_fp8_with_one_scale():
    codes = torch.tensor([[1.0, -2.0]]).to(torch.float8_e4m3fn)
    for scale in (torch.tensor(0.5), torch.tensor([0.5]), torch.tensor([[0.5]])):
        decoded = decode_fp8(codes, scale.bfloat16(), PLAIN, torch.float32)
        assert decoded.tolist() == [[0.5, -1.0]]


@pytest.mark.parametrize("shape", [(2,), (2, 1)])
def test_fp8_with_a_scale_per_row(shape):
    codes = torch.tensor([[1.0, -2.0, 4.0], [1.0, 1.0, 0.5]]).to(torch.float8_e5m2)
    scales = torch.tensor([0.5, 8.0]).reshape(shape)
    decoded = decode_fp8(codes, scales, PLAIN, torch.bfloat16)
    assert decoded.tolist() == [[0.5, -1.0, 2.0], [8.0, 8.0, 4.0]]


def test_fp8_with_block_scales():
    codes = torch.ones(3, 5, dtype=torch.float8_e4m3fn)
    scales = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    scheme = WeightScheme(block=(2, 2), group_sizes=(), int4_refusal="")
    assert decode_fp8(codes, scales, scheme, torch.float32).tolist() == [
        [1, 1, 2, 2, 3],
        [1, 1, 2, 2, 3],
        [4, 4, 5, 5, 6],
    ]


def test_fp8_experts_stacked_in_one_tensor():
    codes = torch.ones(2, 3, 2, dtype=torch.float8_e4m3fn)
    scales = torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])
    scheme = WeightScheme(block=(2, 2), group_sizes=(), int4_refusal="")
    decoded = decode_fp8(codes, scales, scheme, torch.float32)
    assert decoded[..., 0].tolist() == [[1, 1, 2], [3, 3, 4]]
    per_expert = decode_fp8(codes, torch.tensor([5.0, 6.0]).view(2, 1, 1), PLAIN, torch.float32)
    assert per_expert[:, 0, 0].tolist() == [5.0, 6.0]


@pytest.mark.parametrize("elements", [1, 12, 1000])
def test_a_chunk_of_any_size_decodes_to_the_same(monkeypatch, elements):
    monkeypatch.setattr(weight_codecs, "chunk_elements", lambda _device: elements)
    values = torch.randint(-8, 8, (5, 6))
    scales = torch.rand(5, 2)
    decoded = decode_int4(
        pack_int4(values), scales, torch.tensor([5, 6]), grouped(3), torch.float32
    )
    assert torch.equal(decoded, values * scales.repeat_interleave(3, 1))
    codes = torch.randn(5, 2, 3).to(torch.float8_e4m3fn)
    for shape in ((1,), (5, 1, 1), (1, 2, 1), (5, 2, 1)):
        scales = torch.rand(shape)
        decoded = decode_fp8(codes, scales, PLAIN, torch.bfloat16)
        assert torch.equal(decoded, (codes.float() * scales).bfloat16())


def test_fp8_of_no_dimensions():
    codes = torch.tensor(2.0).to(torch.float8_e4m3fn)
    assert decode_fp8(codes, torch.tensor(0.5), PLAIN, torch.float32).item() == 1.0


def test_fp8_scales_that_fit_in_no_way():
    codes = torch.ones(4, 4, dtype=torch.float8_e4m3fn)
    with pytest.raises(
        ValueError, match=r"\[2, 2\] do not fit FP8 codes of \[4, 4\] without block"
    ):
        decode_fp8(codes, torch.ones(2, 2), PLAIN, torch.float32)
    scheme = WeightScheme(block=(3, 4), group_sizes=(), int4_refusal="")
    with pytest.raises(ValueError, match=r"in blocks of \[3, 4\]"):
        decode_fp8(codes, torch.ones(2, 2), scheme, torch.float32)


INT4_GROUP = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 32}


def test_scheme_of_a_kimi_config():
    scheme = read_scheme({"config_groups": {"group_0": {"weights": INT4_GROUP}}})
    assert scheme == WeightScheme(block=None, group_sizes=(32,), int4_refusal="")


def test_scheme_of_int4_experts_beside_fp8_attention():
    fp8 = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    groups = {"group_0": {"weights": fp8}, "group_1": {"weights": INT4_GROUP}}
    assert read_scheme({"config_groups": groups}).int4_refusal == ""


def test_scheme_of_a_deepseek_config():
    scheme = read_scheme({"quant_method": "fp8", "weight_block_size": [128, 64]})
    assert scheme == WeightScheme(block=(128, 64), group_sizes=(), int4_refusal="")


@pytest.mark.parametrize("structure", [[128, 128], "128x128"])
def test_scheme_of_compressed_tensors_fp8_blocks(structure):
    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": structure}
    assert read_scheme({"config_groups": {"g": {"weights": weights}}}).block == (128, 128)


@pytest.mark.parametrize(
    "quantization",
    [
        {},
        {"config_groups": None},
        {"config_groups": {"g": None}},
        {"config_groups": {"g": {"weights": None}}},
        {"weight_block_size": None},
        {"weight_block_size": [128]},
        {"weight_block_size": [128, 0]},
        {"weight_block_size": "128xq"},
    ],
)
def test_scheme_that_states_nothing(quantization):
    assert read_scheme(quantization) == PLAIN


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_bits": 8}, "it has 8 bits a weight by its config, not 4"),
        ({"symmetric": False}, "it is asymmetric by its config"),
    ],
)
def test_int4_that_cannot_be_decoded_is_refused_with_the_reason(change, expected):
    scheme = read_scheme({"config_groups": {"g": {"weights": {**INT4_GROUP, **change}}}})
    with pytest.raises(ValueError, match=f"only symmetric INT4 is supported and {expected}"):
        decode_int4(
            torch.zeros(1, 1, dtype=torch.int32),
            torch.ones(1, 1),
            torch.tensor([1, 8]),
            scheme,
            torch.float32,
        )
