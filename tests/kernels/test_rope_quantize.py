"""Rotary embedding and quantisation in one launch: codes equal to the reference's, nothing else written."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8kv.kernels.arguments import KernelArgumentError
from fp8kv.kernels.rope_quantize import reference_rope_quantize, rope_quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz]
POISON = 0x5A
POSITIONS = 4096


def values(*shape, dtype=torch.bfloat16):
    """With scales around 0.3, a spread of 20 gives subnormal, normal and saturated codes."""
    return (torch.randn(shape, device=DEVICE) * 20).to(dtype)


def scale_of(elements=1):
    return torch.rand(elements, device=DEVICE) + 0.07


def make_problem(
    tokens,
    q_heads,
    kv_heads,
    dim,
    rope_dim,
    *,
    key_rope_heads=None,
    per_head=False,
    index=torch.int64,
    dtype=torch.bfloat16,
):
    """Return the arguments of one call; ``key_rope_heads`` hands K over in two pieces."""
    angles = torch.rand(POSITIONS, rope_dim // 2, device=DEVICE) * 6.28
    problem = {
        "query": values(tokens, q_heads, dim, dtype=dtype),
        "key": values(tokens, kv_heads, dim, dtype=dtype),
        "positions": torch.randint(0, POSITIONS, (tokens,), device=DEVICE).to(index),
        "cos_sin": torch.cat([angles.cos(), angles.sin()], dim=-1),
        "q_scale": scale_of(q_heads if per_head else 1),
        "k_scale": scale_of(kv_heads if per_head else 1),
    }
    if key_rope_heads is not None:
        problem["key"] = values(tokens, kv_heads, dim - rope_dim, dtype=dtype)
        problem["key_rope"] = values(tokens, key_rope_heads, rope_dim, dtype=dtype)
    return problem


def assert_same_codes(problem, *, pdl=False, **options):
    tensors = {name: tensor.clone() for name, tensor in problem.items()}
    found = rope_quantize(**problem, **options, pdl=pdl)
    expected = reference_rope_quantize(**problem, **options)
    for name, ours, theirs in zip(("Q", "K"), found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        differing = ours.view(torch.uint8) != theirs.view(torch.uint8)
        assert not differing.any(), f"{name}: {differing.sum()} codes differ"
    for name, before in tensors.items():
        assert torch.equal(problem[name], before), name


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rope_last", [False, True])
@pytest.mark.parametrize("rope_dim", [2, 16, 24, 64])
def test_partial_and_whole_rotation(rope_dim, rope_last, interleaved):
    assert_same_codes(
        make_problem(5, 6, 2, 64, rope_dim), rope_last=rope_last, interleaved=interleaved
    )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("key_rope_heads", [1, 4])
def test_key_in_two_pieces(key_rope_heads, interleaved):
    problem = make_problem(3, 4, 4, 192, 64, key_rope_heads=key_rope_heads)
    assert_same_codes(problem, rope_last=True, interleaved=interleaved)


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(1, 1), (48, 8), (6, 1), (7, 7), (16, 24)])
def test_head_counts_with_one_scale_and_with_one_per_head(q_heads, kv_heads):
    for per_head in (False, True):
        assert_same_codes(make_problem(3, q_heads, kv_heads, 32, 16, per_head=per_head))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("input_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_formats(index, input_dtype, dtype):
    assert_same_codes(make_problem(3, 4, 2, 32, 32, dtype=input_dtype, index=index), dtype=dtype)


def test_position_zero_leaves_values_as_they_are():
    problem = make_problem(2, 2, 1, 32, 32)
    problem["cos_sin"] = torch.tensor([[1.0] * 16 + [0.0] * 16], device=DEVICE)
    problem["positions"].zero_()
    problem["q_scale"].fill_(1.0)
    codes, _ = rope_quantize(**problem)
    expected = problem["query"].float().clamp(-448, 448).to(codes.dtype)
    assert torch.equal(codes.float(), expected.float())


def test_rotation_is_not_rounded_to_bfloat16():
    """2*cos = 1.0628 is nearer to the code of 1.125; rounded to BF16 it is the tie 1.0625, which goes to 1.0."""
    problem = make_problem(1, 1, 1, 2, 2)
    problem["query"] = torch.tensor([[[2.0, 0.0]]], dtype=torch.bfloat16, device=DEVICE)
    problem["cos_sin"] = torch.tensor([[0.5314, 0.0]], device=DEVICE)
    problem["positions"].zero_()
    problem["q_scale"].fill_(1.0)
    assert rope_quantize(**problem)[0].float().flatten().tolist() == [1.125, 0.0]


def test_parts_of_one_projection_are_taken_as_they_are():
    problem = make_problem(5, 8, 2, 64, 32)
    joint = values(5, 12 * 64)
    problem["query"] = joint[:, : 8 * 64].view(5, 8, 64)
    problem["key"] = joint[:, 8 * 64 : 10 * 64].view(5, 2, 64)
    assert_same_codes(problem)


def test_given_outputs_are_filled_and_their_neighbours_are_left():
    problem = make_problem(5, 4, 2, 64, 32)
    whole = torch.full((5, 4, 160), POISON, dtype=torch.uint8, device=DEVICE)
    codes = whole.view(torch.float8_e4m3fn)
    out_q, out_k = codes[..., 16:80], codes[:, :2, 80:144]
    returned = rope_quantize(**problem, out_q=out_q, out_k=out_k)
    assert returned[0] is out_q
    assert returned[1] is out_k
    expected_q, expected_k = reference_rope_quantize(**problem)
    assert torch.equal(whole[..., 16:80], expected_q.view(torch.uint8))
    assert torch.equal(whole[:, :2, 80:144], expected_k.view(torch.uint8))
    assert (whole[..., :16] == POISON).all()
    assert (whole[..., 144:] == POISON).all()
    assert (whole[:, 2:, 80:] == POISON).all()


def test_nothing_to_do():
    codes_q, codes_k = rope_quantize(**make_problem(0, 4, 2, 64, 32))
    assert codes_q.shape == (0, 4, 64)
    assert codes_k.shape == (0, 2, 64)


@settings(max_examples=20 if DEVICE == "cpu" else 8, deadline=None)
@given(
    tokens=st.integers(1, 6),
    q_heads=st.integers(1, 9),
    kv_heads=st.integers(1, 4),
    half=st.integers(1, 12),
    nope=st.integers(0, 20),
    pieces=st.sampled_from([None, "shared", "own"]),
    rope_last=st.booleans(),
    interleaved=st.booleans(),
    per_head=st.booleans(),
)
def test_any_shape(tokens, q_heads, kv_heads, half, nope, pieces, rope_last, interleaved, per_head):
    rope_heads = {None: None, "shared": 1, "own": kv_heads}[pieces]
    problem = make_problem(
        tokens,
        q_heads,
        kv_heads,
        nope + 2 * half,
        2 * half,
        key_rope_heads=rope_heads,
        per_head=per_head,
    )
    assert_same_codes(problem, rope_last=rope_last, interleaved=interleaved)


def good_codes(*shape):
    return torch.empty(shape, dtype=torch.float8_e4m3fn, device=DEVICE)


def test_bad_arguments_are_named_with_what_was_found_and_what_is_required():
    good = make_problem(4, 6, 2, 32, 16)
    wrong = [
        ({"rope_dim": 8}, "shape of cos_sin", "16", "8"),
        ({"rope_dim": 64}, "rope_dim", "64", "32"),
        ({"rope_dim": 15}, "rope_dim", "15", "even"),
        ({"query": values(4, 32)}, "shape of query", "[4, 32]", "[any, any, any]"),
        ({"key": values(4, 2, 16)}, "shape of key", "[4, 2, 16]", "[4, any, 32]"),
        ({"key": values(4, 2, 32).half()}, "dtype of key", "float16", "bfloat16"),
        ({"key": values(4, 32, 2).transpose(1, 2)}, "last stride of key", "2", "1"),
        ({"key_rope": values(4, 1, 16)}, "shape of key", "[4, 2, 32]", "[4, any, 16]"),
        (
            {"key": values(4, 2, 16), "key_rope": values(4, 3, 16)},
            "shape of key_rope",
            "[4, 3, 16]",
            "[4, 2, 16]",
        ),
        ({"positions": good["positions"][:3]}, "shape of positions", "[3]", "[4]"),
        ({"positions": good["positions"].float()}, "dtype of positions", "float32", "int32"),
        ({"cos_sin": good["cos_sin"].bfloat16()}, "dtype of cos_sin", "bfloat16", "float32"),
        ({"q_scale": scale_of(2)}, "shape of q_scale", "[2]", "1 or 6"),
        ({"k_scale": 1.0}, "k_scale", "float", "float32 tensor"),
        ({"k_scale": scale_of().to("meta")}, "device of k_scale", "meta", DEVICE),
        ({"out_q": good["query"]}, "dtype of out_q", "bfloat16", "float8_e4m3fn"),
        ({"dtype": torch.uint8}, "dtype", "uint8", "float8"),
        (
            {"out_q": good_codes(4, 6, 32), "out_k": good_codes(4, 2, 32).view(torch.float8_e5m2)},
            "dtype of out_k",
            "float8_e5m2",
            "float8_e4m3fn",
        ),
    ]
    for change, name, found, required in wrong:
        with pytest.raises(KernelArgumentError) as raised:
            rope_quantize(**{**good, **change})
        assert all(word in str(raised.value) for word in (name, found, required)), raised.value


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("tokens", [1, 127, 1024])
def test_prefill_of_latent_attention(tokens, pdl, interleaved):
    problem = make_problem(tokens, 128, 128, 192, 64, key_rope_heads=1)
    assert_same_codes(problem, rope_last=True, interleaved=interleaved, pdl=pdl)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 127, 8192])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(48, 8), (12, 2), (8, 1), (7, 1)])
def test_grouped_query_attention(q_heads, kv_heads, tokens):
    for rope_dim in (64, 128):
        assert_same_codes(make_problem(tokens, q_heads, kv_heads, 128, rope_dim, per_head=True))


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31st():
    tokens = 2**31 // (128 * 192) + 100
    problem = make_problem(1, 128, 1, 192, 64)
    # the same token over and over: no memory behind the input, more than 2^31 bytes of output
    problem["query"] = problem["query"].expand(tokens, -1, -1)
    problem["key"] = problem["key"].expand(tokens, -1, -1)
    problem["positions"] = problem["positions"].repeat(tokens)
    found, _ = rope_quantize(**problem)
    few = {**problem, "query": problem["query"][:1], "key": problem["key"][:1]}
    expected, _ = reference_rope_quantize(**{**few, "positions": problem["positions"][:1]})
    for token in (0, tokens // 2, tokens - 1):
        assert torch.equal(found[token].view(torch.uint8), expected[0].view(torch.uint8))


@pytest.mark.gpu
def test_a_captured_graph_follows_positions_and_scales():
    problem = make_problem(64, 128, 128, 192, 64, key_rope_heads=1)
    out_q, out_k = rope_quantize(**problem, rope_last=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rope_quantize(**problem, rope_last=True, out_q=out_q, out_k=out_k)
    for scale in (0.11, 3.0):
        problem["q_scale"].fill_(scale)
        problem["k_scale"].fill_(scale / 2)
        problem["positions"].copy_(torch.randint(0, POSITIONS, (64,), device=DEVICE))
        graph.replay()
        expected = reference_rope_quantize(**problem, rope_last=True)
        for ours, theirs in zip((out_q, out_k), expected, strict=True):
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
