"""Rows of the latent cache: codes equal to the reference's, nothing else touched."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8kv.kernels.arguments import KernelArgumentError
from fp8kv.kernels.mla_pack import mla_pack, reference_mla_pack

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMATS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz]
POISON = 0x5A


def values(*shape, dtype=torch.bfloat16):
    """With scales around 0.3, a spread of 20 gives subnormal, normal and saturated codes."""
    return (torch.randn(shape, device=DEVICE) * 20).to(dtype)


def scale_of(elements=1):
    return torch.rand(elements, device=DEVICE) + 0.07


def make_problem(
    tokens,
    latent=512,
    rope=64,
    *,
    page_size=16,
    padding=0,
    index=torch.int64,
    dtype=torch.bfloat16,
    cache_dtype=torch.float8_e4m3fn,
):
    """Return the arguments of one call; the slots are shuffled and leave three pages' worth of others."""
    pages = -(-tokens // page_size) + 3
    width = (latent + rope) * cache_dtype.itemsize
    cache = torch.full((pages, page_size, width), POISON, dtype=torch.uint8, device=DEVICE)
    return {
        "latent": values(tokens + padding, latent, dtype=dtype),
        "rope": values(tokens + padding, rope, dtype=dtype),
        "cache": cache.view(cache_dtype),
        "slots": torch.randperm(pages * page_size, device=DEVICE)[:tokens].to(index),
        "scale": scale_of(),
    }


def assert_same_cache(problem, **options):
    """Run kernel and reference on copies; compare every byte of the cache, the untouched ones included."""
    expected = problem["cache"].clone()
    reference_mla_pack(**{**problem, "cache": expected})
    mla_pack(**problem, **options)
    found, wanted = problem["cache"].view(torch.uint8), expected.view(torch.uint8)
    assert torch.equal(found, wanted), f"{(found != wanted).sum()} bytes differ"
    if (problem["slots"] >= 0).any():
        assert (wanted != POISON).any()


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
@pytest.mark.parametrize("tokens", [1, 2, 7, 65])
def test_rows_go_to_their_slots(tokens, page_size, index):
    assert_same_cache(make_problem(tokens, page_size=page_size, index=index))


@pytest.mark.parametrize("cache_dtype", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_formats(dtype, cache_dtype):
    assert_same_cache(make_problem(5, dtype=dtype, cache_dtype=cache_dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_unquantised_cache_takes_values_as_they_are(dtype):
    problem = make_problem(600, dtype=dtype, cache_dtype=dtype)
    problem["slots"][7] = -1
    assert_same_cache(problem)
    slot = problem["slots"][5]
    row = problem["cache"][slot // 16, slot % 16]
    assert torch.equal(row, torch.cat([problem["latent"][5], problem["rope"][5]]))


@pytest.mark.parametrize(("latent", "rope"), [(32, 8), (24, 4), (7, 3), (48, 16)])
def test_other_widths(latent, rope):
    assert_same_cache(make_problem(9, latent, rope))


def test_negative_slots_are_skipped():
    problem = make_problem(9)
    problem["slots"][[0, 3, 8]] = torch.tensor([-1, -5, -(2**40)], device=DEVICE)
    assert_same_cache(problem)
    problem["slots"].fill_(-1)
    before = problem["cache"].view(torch.uint8).clone()
    mla_pack(**problem)
    assert torch.equal(problem["cache"].view(torch.uint8), before)


def test_rows_behind_the_slots_are_padding():
    problem = make_problem(6, padding=3)
    problem["latent"][6:] = float("nan")
    assert_same_cache(problem)


def test_parts_may_be_views_of_one_projection():
    problem = make_problem(6)
    joint = values(6, 640)
    problem["latent"], problem["rope"] = joint[:, :512], joint[:, 512:576].view(6, 1, 64)
    assert_same_cache(problem)


def test_cache_may_be_strided():
    problem = make_problem(6)
    padded = torch.full((9, 2, 16, 640), POISON, dtype=torch.uint8, device=DEVICE)
    problem["cache"] = padded[:, 1, :, 64:].view(torch.float8_e4m3fn)
    problem["slots"] = torch.randperm(9 * 16, device=DEVICE)[:6]
    assert_same_cache(problem)
    assert (padded[:, 0] == POISON).all()
    assert (padded[..., :64] == POISON).all()


def test_inputs_are_not_changed():
    problem = make_problem(6)
    before = {name: problem[name].clone() for name in ("latent", "rope", "slots", "scale")}
    mla_pack(**problem)
    for name, tensor in before.items():
        assert torch.equal(problem[name], tensor)


def test_nothing_to_write():
    problem = make_problem(0)
    before = problem["cache"].view(torch.uint8).clone()
    mla_pack(**problem)
    assert torch.equal(problem["cache"].view(torch.uint8), before)


@settings(max_examples=20 if DEVICE == "cpu" else 8, deadline=None)
@given(
    tokens=st.integers(1, 20),
    latent=st.integers(1, 40),
    rope=st.integers(1, 20),
    page_size=st.sampled_from([1, 2, 8, 64]),
    skipped=st.integers(0, 3),
)
def test_any_shape(tokens, latent, rope, page_size, skipped):
    problem = make_problem(tokens, latent, rope, page_size=page_size)
    problem["slots"][:skipped] = -1
    assert_same_cache(problem)


def test_bad_arguments_are_named_with_what_was_found_and_what_is_required():
    good = make_problem(4, 32, 16)
    wrong = [
        ({"scale": scale_of(2)}, "shape of scale", "[2]", "of 1 element"),
        ({"scale": 0.5}, "scale", "float", "float32 tensor"),
        ({"latent": values(3, 32)}, "rows of latent", "3", "at least 4"),
        ({"rope": values(3, 16)}, "rows of rope", "3", "at least 4"),
        ({"rope": values(4, 2, 16)}, "shape of rope", "[4, 2, 16]", "[any, 1, any]"),
        ({"rope": values(4, 8)}, "shape of cache", "48", "40"),
        ({"rope": values(4, 16).half()}, "dtype of rope", "float16", "bfloat16"),
        ({"slots": good["slots"].short()}, "dtype of slots", "int16", "int32 or int64"),
        ({"slots": good["slots"][None]}, "shape of slots", "[1, 4]", "[any]"),
        ({"latent": values(32, 4).t()}, "last stride of latent", "4", "1"),
        ({"cache": good["cache"].float()}, "dtype of cache", "float32", "float8_e4m3fn"),
        ({"cache": good["cache"][:, :12]}, "page size", "12", "power of two"),
        ({"scale": scale_of().to("meta")}, "device of scale", "meta", DEVICE),
    ]
    for change, name, found, required in wrong:
        with pytest.raises(KernelArgumentError) as raised:
            mla_pack(**{**good, **change})
        assert all(word in str(raised.value) for word in (name, found, required)), raised.value


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("pdl", [False, True])
@pytest.mark.parametrize("tokens", [1, 64, 1024, 8192])
def test_many_tokens(tokens, pdl):
    problem = make_problem(tokens, page_size=64)
    problem["slots"][::7] = -1
    assert_same_cache(problem, pdl=pdl)


@pytest.mark.gpu
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_slots_beyond_two_to_the_31st_bytes(index):
    problem = make_problem(4, page_size=64, index=index)
    pages = 2**32 // 576 // 64 + 2
    problem["cache"] = torch.empty(pages, 64, 576, dtype=torch.float8_e4m3fn, device=DEVICE)
    codes = problem["cache"].view(torch.uint8)
    codes.fill_(POISON)
    slots = [2**31 // 576, 2**31 // 576 + 1, 2**32 // 576, pages * 64 - 1]
    problem["slots"] = torch.tensor(slots, dtype=index, device=DEVICE)
    mla_pack(**problem)
    small = {**problem, "cache": torch.empty(1, 4, 576, device=DEVICE).to(torch.float8_e4m3fn)}
    reference_mla_pack(**{**small, "slots": torch.arange(4, device=DEVICE)})
    written = codes.flatten(0, 1)[slots]
    assert torch.equal(written, small["cache"][0].view(torch.uint8))
    assert sum(int((page != POISON).sum()) for page in codes.split(4096)) == int(
        (written != POISON).sum()
    )


@pytest.mark.gpu
def test_a_captured_graph_follows_slots_and_scale():
    problem = make_problem(64, page_size=64)
    mla_pack(**problem)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mla_pack(**problem)
    for scale in (0.11, 3.0):
        problem["cache"].view(torch.uint8).fill_(POISON)
        problem["scale"].fill_(scale)
        problem["slots"].copy_(torch.randperm(4 * 64, device=DEVICE)[:64])
        problem["slots"][5] = -1
        expected = problem["cache"].clone()
        reference_mla_pack(**{**problem, "cache": expected})
        graph.replay()
        assert torch.equal(problem["cache"].view(torch.uint8), expected.view(torch.uint8))
