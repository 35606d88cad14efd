"""Expanded K and V of latent attention: codes equal to the reference's, nothing else written."""

import pytest
import torch

from fp8kv.kernels.arguments import KernelArgumentError
from fp8kv.kernels.mla_pack_kv import mla_pack_kv, reference_mla_pack_kv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz]
POISON = 0x5A


def values(*shape, dtype=torch.bfloat16):
    """With scales around 0.3, a spread of 20 gives subnormal, normal and saturated codes."""
    return (torch.randn(shape, device=DEVICE) * 20).to(dtype)


def scale_of(elements=1):
    return torch.rand(elements, device=DEVICE) + 0.07


def make_problem(tokens, heads, nope=128, rope=64, v_dim=128, *, shared=True, per_head=False):
    """K's own part and V are the two halves of one projection."""
    joint = values(tokens, heads, nope + v_dim)
    return {
        "k_nope": joint[..., :nope],
        "k_rope": values(tokens, 1 if shared else heads, rope),
        "value": joint[..., nope:],
        "k_scale": scale_of(heads if per_head else 1),
        "v_scale": scale_of(heads if per_head else 1),
    }


def assert_same_codes(problem, **options):
    found, expected = mla_pack_kv(**problem, **options), reference_mla_pack_kv(**problem, **options)
    for name, ours, theirs in zip(("K", "V"), found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        differing = ours.view(torch.uint8) != theirs.view(torch.uint8)
        assert not differing.any(), f"{name}: {differing.sum()} codes differ"


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("tokens", "heads"), [(1, 1), (3, 5), (4, 16)])
def test_codes_equal_the_references(tokens, heads, shared, per_head):
    assert_same_codes(make_problem(tokens, heads, shared=shared, per_head=per_head))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("nope", "rope", "v_dim"), [(16, 8, 24), (7, 2, 3), (192, 64, 256)])
def test_widths_and_formats(nope, rope, v_dim, dtype):
    assert_same_codes(make_problem(3, 4, nope, rope, v_dim), dtype=dtype)


def test_outputs_may_be_strided_and_their_neighbours_are_left():
    problem = make_problem(3, 4)
    whole = torch.full((3, 4, 384), POISON, dtype=torch.uint8, device=DEVICE)
    codes = whole.view(torch.float8_e4m3fn)
    out_k, out_v = codes[..., 16:208], codes[..., 208:336]
    returned = mla_pack_kv(**problem, out_k=out_k, out_v=out_v)
    assert returned[0] is out_k
    assert returned[1] is out_v
    expected = torch.cat([part.view(torch.uint8) for part in reference_mla_pack_kv(**problem)], -1)
    assert torch.equal(whole[..., 16:336], expected)
    assert (whole[..., :16] == POISON).all()
    assert (whole[..., 336:] == POISON).all()


@pytest.mark.parametrize(("tokens", "heads"), [(0, 4), (4, 0)])
def test_nothing_to_do(tokens, heads):
    key, value = mla_pack_kv(**make_problem(tokens, heads))
    assert key.shape == (tokens, heads, 192)
    assert value.shape == (tokens, heads, 128)


def test_bad_arguments_are_named_with_what_was_found_and_what_is_required():
    good = make_problem(4, 3, 32, 16, 32)
    out = torch.empty(4, 3, 40, dtype=torch.float8_e4m3fn, device=DEVICE)
    out_k, out_v = out.new_empty(4, 3, 48), out.new_empty(4, 3, 32).view(torch.float8_e5m2)
    wrong = [
        ({"k_rope": values(4, 2, 16)}, "shape of k_rope", "[4, 2, 16]", "[4, 3, any]"),
        ({"k_rope": values(4, 16)}, "shape of k_rope", "[4, 16]", "[4, 3, any]"),
        ({"value": values(4, 2, 32)}, "shape of value", "[4, 2, 32]", "[4, 3, any]"),
        ({"value": values(4, 3, 32).half()}, "dtype of value", "float16", "bfloat16"),
        ({"value": values(4, 32, 3).transpose(1, 2)}, "last stride of value", "3", "1"),
        ({"k_scale": scale_of(4)}, "shape of k_scale", "[4]", "1 or 3"),
        ({"v_scale": None}, "v_scale", "NoneType", "float32 tensor"),
        ({"out_k": out}, "shape of out_k", "[4, 3, 40]", "[4, 3, 48]"),
        ({"out_k": out_k, "out_v": out_v}, "dtype of out_v", "float8_e5m2", "float8_e4m3fn"),
        ({"dtype": torch.uint8}, "dtype", "uint8", "float8"),
    ]
    for change, name, found, required in wrong:
        with pytest.raises(KernelArgumentError) as raised:
            mla_pack_kv(**{**good, **change})
        assert all(word in str(raised.value) for word in (name, found, required)), raised.value


@pytest.mark.gpu
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("pdl", [False, True])
def test_many_tokens(pdl, per_head):
    problem = make_problem(1024, 128, per_head=per_head)
    found, expected = mla_pack_kv(**problem, pdl=pdl), reference_mla_pack_kv(**problem)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31st():
    tokens = 2**31 // (128 * 192) + 100
    problem = make_problem(1, 128, v_dim=16)
    # the same token over and over: no memory behind the input, more than 2^31 bytes of output
    parts = ("k_nope", "k_rope", "value")
    many = {name: problem[name].expand(tokens, -1, -1) for name in parts}
    found, expected = mla_pack_kv(**{**problem, **many}), reference_mla_pack_kv(**problem)
    for ours, theirs in zip(found, expected, strict=True):
        for token in (0, tokens // 2, tokens - 1):
            assert torch.equal(ours[token].view(torch.uint8), theirs[0].view(torch.uint8))


@pytest.mark.gpu
def test_a_captured_graph_follows_the_scales():
    problem = make_problem(64, 16)
    out_k, out_v = mla_pack_kv(**problem)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mla_pack_kv(**problem, out_k=out_k, out_v=out_v)
    for scale in (0.11, 3.0):
        problem["k_scale"].fill_(scale)
        problem["v_scale"].fill_(scale / 2)
        graph.replay()
        for ours, theirs in zip((out_k, out_v), reference_mla_pack_kv(**problem), strict=True):
            assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
