"""RoPE, quantisation and the paged write in one launch: Q, codes and all other bytes equal to the reference's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8kv.kernels.arguments import KernelArgumentError
from fp8kv.kernels.cache_write import reference_cache_write
from fp8kv.kernels.layout import PagedLayout
from fp8kv.kernels.rope_cache_write import reference_rope_cache_write, rope_cache_write
from fp8kv.kernels.rope_cache_write_kernel import rotate_and_write

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter cuts BF16 off where a GPU rounds it; there FP16 stands in for it.
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
POISON = 0x7F  # a NaN in E4M3: what a recycled byte may hold
# Where there is a GPU, all of these run on it. The interpreter computes in numpy, which warns where a GPU does not.
pytestmark = (
    [pytest.mark.gpu]
    if DEVICE == "cuda"
    else [pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")]
)
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")


def values(*shape, dtype=HALF):
    """With scales of 0.07 to 0.97, a spread of 20 gives subnormal, normal and saturated codes."""
    return (torch.randn(shape, device=DEVICE) * 20).to(dtype)


def make_cache(layout, pages, heads, dim, dtype=torch.float8_e4m3fn):
    cache = layout.empty(pages, heads, dim, dtype=dtype, device=DEVICE)
    cache.view(torch.uint8).fill_(POISON)
    return cache


def make_problem(
    tokens,
    q_heads=4,
    kv_heads=2,
    k_dim=32,
    rope_dim=None,
    v_dim=None,
    *,
    page_size=16,
    order="NHD",
    dtype=HALF,
    angle_dtype=None,
    cache_dtype=torch.float8_e4m3fn,
    per_head=False,
    index=torch.int64,
):
    """Return the arguments of one call; the slots are shuffled and leave three pages' worth of others."""
    rope_dim = k_dim if rope_dim is None else rope_dim
    v_dim = k_dim if v_dim is None else v_dim
    layout = PagedLayout(page_size, order)
    pages = layout.pages_for(tokens) + 3
    angles = torch.rand(tokens, rope_dim // 2, device=DEVICE) * 6.28
    cos, sin = (torch.cat([half, half], dim=-1) for half in (angles.cos(), angles.sin()))
    k_scale, v_scale = (
        torch.rand(kv_heads if per_head else 1, device=DEVICE) * 0.9 + 0.07 for _ in range(2)
    )
    return {
        "query": values(tokens, q_heads, k_dim, dtype=dtype),
        "key": values(tokens, kv_heads, k_dim, dtype=dtype),
        "value": values(tokens, kv_heads, v_dim, dtype=dtype),
        "cos": cos.to(angle_dtype or dtype),
        "sin": sin.to(angle_dtype or dtype),
        "k_cache": make_cache(layout, pages, kv_heads, k_dim, cache_dtype),
        "v_cache": make_cache(layout, pages, kv_heads, v_dim, cache_dtype),
        "slots": torch.randperm(pages * page_size, device=DEVICE)[:tokens].to(index),
        "k_scale": k_scale,
        "v_scale": v_scale,
    }


def codes_of(cache):
    """Return the bytes; the sign of a NaN is nobody's promise."""
    if cache.element_size() > 1:
        return cache.view(torch.uint8)
    return cache.view(torch.uint8).masked_fill(cache.float().isnan(), POISON)


def assert_same(problem, *, pdl=False, **options):
    """Run kernel and reference on copies; compare Q, and every byte of the caches, the untouched ones included."""
    caches = {name: problem[name].clone() for name in ("k_cache", "v_cache")}
    expected = reference_rope_cache_write(**{**problem, **caches}, **options)
    inputs = {name: problem[name].clone() for name in set(problem) - set(caches)}
    found = rope_cache_write(**problem, **options, pdl=pdl)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected), f"Q: {(found != expected).sum()} numbers differ"
    for name, cache in caches.items():
        differing = codes_of(problem[name]) != codes_of(cache)
        assert not differing.any(), f"{name}: {differing.sum()} codes differ"
    for name, before in inputs.items():
        assert torch.equal(problem[name], before), name


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("order", ["NHD", "HND"])
@pytest.mark.parametrize("per_head", [False, True])
def test_both_arrangements_of_pairs_in_both_orders(order, per_head, interleaved):
    problem = make_problem(37, order=order, per_head=per_head)
    assert_same(problem, interleaved=interleaved)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("k_dim", "rope_dim", "v_dim"),
    [
        (128, 128, 128),
        (128, 64, 128),
        (192, 64, 128),
        (80, 32, 80),
        (40, 24, 8),
        (6, 2, 5),
        (2, 2, 1),
    ],
)
def test_whole_and_partial_rotation_of_every_width(k_dim, rope_dim, v_dim, interleaved):
    assert_same(make_problem(5, 3, 1, k_dim, rope_dim, v_dim), interleaved=interleaved)


@pytest.mark.parametrize(("q_heads", "kv_heads"), [(1, 1), (48, 8), (7, 7), (6, 1), (3, 5)])
def test_every_number_of_heads(q_heads, kv_heads):
    for per_head in (False, True):
        assert_same(make_problem(3, q_heads, kv_heads, 16, per_head=per_head))


@pytest.mark.parametrize("page_size", [1, 2, 16, 64, 256])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_every_page_size_and_index(page_size, index):
    assert_same(make_problem(21, page_size=page_size, index=index))


@pytest.mark.parametrize("angle_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [HALF, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz]
)
def test_every_type(dtype, cache_dtype, angle_dtype):
    assert_same(make_problem(9, dtype=dtype, cache_dtype=cache_dtype, angle_dtype=angle_dtype))


@pytest.mark.parametrize("interleaved", [False, True])
def test_an_unquantised_cache_takes_numbers_as_they_are(interleaved):
    problem = make_problem(21, 4, 2, 80, 32, 48, cache_dtype=HALF)
    problem["slots"][3] = -1
    assert_same(problem, interleaved=interleaved)


def test_the_rotation_is_that_of_transformers():
    """rotate_half and two products, in float32, where neither side rounds what the other does not."""
    problem = make_problem(6, dtype=torch.float32)
    query, cos, sin = problem["query"], problem["cos"][:, None], problem["sin"][:, None]
    a, b = query.chunk(2, dim=-1)
    expected = query * cos + torch.cat([-b, a], dim=-1) * sin
    torch.testing.assert_close(rope_cache_write(**problem), expected, rtol=1e-6, atol=1e-5)


def test_the_cache_holds_what_rotating_first_and_writing_then_puts_there():
    """2 * 0.5314 is nearer to the code of 1.125; rounded to 16 bits first, as here, it may be the tie at 1.0625."""
    problem = make_problem(1, 1, 1, 2)
    problem["key"] = torch.tensor([[[2.0, 0.0]]], dtype=HALF, device=DEVICE)
    cos = 0.5314 if DEVICE == "cuda" else 0.53126  # their double is no tie, but rounds to one
    problem["cos"] = torch.full((1, 2), cos, device=DEVICE)
    problem["sin"] = torch.zeros(1, 2, device=DEVICE)
    problem["k_scale"].fill_(1.0)
    rope_cache_write(**problem)
    slot = problem["slots"][0]
    assert problem["k_cache"].flatten(0, 1)[slot].float().flatten().tolist() == [1.0, 0.0]


def test_the_rotated_keys_are_written_as_by_cache_write():
    problem = make_problem(8, 2, 2)
    caches = {name: problem[name].clone() for name in ("k_cache", "v_cache")}
    # K in the place of Q comes back as numbers, which cache_write can take
    rotated = rope_cache_write(**{**problem, "query": problem["key"]})
    written = ("value", "slots", "k_scale", "v_scale")
    reference_cache_write(rotated, **caches, **{name: problem[name] for name in written})
    for name, cache in caches.items():
        assert torch.equal(codes_of(problem[name]), codes_of(cache)), name


def test_the_second_halves_of_the_angles_are_not_read():
    problem = make_problem(4)
    expected = rope_cache_write(**problem)
    for name in ("cos", "sin"):
        problem[name][:, 16:] = float("nan")
    assert torch.equal(rope_cache_write(**problem), expected)


def test_slices_and_transposed_views_are_read_in_place():
    problem = make_problem(13, 4, 2, 32)
    fused = values(13, 8 * 32 + 8)
    problem["query"], problem["key"] = (
        fused[:, start : start + heads * 32].unflatten(1, (heads, 32))
        for start, heads in ((8, 4), (8 + 128, 2))
    )
    problem["value"] = values(2, 13, 32).transpose(0, 1)
    assert_same(problem)
    problem["query"] = values(4, 13, 33)[..., 1:].transpose(0, 1)
    problem["cos"], problem["sin"] = (
        torch.cat([problem[name], problem[name]], -1)[:, 32:] for name in ("cos", "sin")
    )
    problem["v_cache"] = make_cache(PagedLayout(16), 5, 3, 40)[1:, :, 1:, 3:35]
    assert_same(problem)


def test_a_given_output_is_filled_and_its_neighbours_are_left():
    problem = make_problem(5, 4, 2, 32)
    expected = rope_cache_write(**problem)
    around = torch.full((5, 6, 40), 9.0, dtype=HALF, device=DEVICE)
    out_q = around[:, 1:5, 4:36]
    assert rope_cache_write(**problem, out_q=out_q) is out_q
    assert torch.equal(out_q, expected)
    out_q.fill_(9.0)
    assert (around == 9.0).all()


@pytest.mark.parametrize("interleaved", [False, True])
def test_queries_may_be_rotated_in_place(interleaved):
    problem = make_problem(70, 4, 2, 64, 32)
    expected = rope_cache_write(**problem, interleaved=interleaved)
    rope_cache_write(**problem, interleaved=interleaved, out_q=problem["query"])
    assert torch.equal(problem["query"], expected)


def test_padding_slots_write_nothing_and_their_queries_are_rotated():
    problem = make_problem(20)
    problem["slots"][[0, 3, 19]] = torch.tensor([-1, -7, -(2**31)], device=DEVICE)
    assert_same(problem)
    problem["slots"].fill_(-1)
    before = [problem[name].clone() for name in ("k_cache", "v_cache")]
    rope_cache_write(**problem)
    for name, cache in zip(("k_cache", "v_cache"), before, strict=True):
        assert torch.equal(problem[name].view(torch.uint8), cache.view(torch.uint8))


def test_no_token_is_no_work():
    assert rope_cache_write(**make_problem(0)).shape == (0, 4, 32)


@settings(max_examples=15 if DEVICE == "cpu" else 20, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    half = data.draw(st.sampled_from([1, 3, 4, 8, 12, 16, 32, 64]))
    rest = data.draw(st.sampled_from([0, 0, 1, 8, 24, 64]))
    tokens = data.draw(st.integers(1, 40 if DEVICE == "cpu" else 2000))
    problem = make_problem(
        tokens,
        data.draw(st.integers(1, 9)),
        data.draw(st.integers(1, 4)),
        2 * half + rest,
        2 * half,
        data.draw(st.sampled_from([8, 24, 64, 128])),
        page_size=2 ** data.draw(st.integers(0, 8)),
        order=data.draw(st.sampled_from(["NHD", "HND"])),
        per_head=data.draw(st.booleans()),
    )
    problem["slots"][torch.rand(tokens, device=DEVICE) < 0.2] = -1
    assert_same(problem, interleaved=data.draw(st.booleans()))


@pytest.mark.parametrize(
    ("name", "change", "found", "required"),
    [
        ("query", lambda t: t[0], r"\[4, 32\]", "any, any, any"),
        ("query", lambda t: t.double(), "float64", "float16"),
        ("query", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), "4", "1"),
        ("key", lambda t: t[:4], r"\[4, 2, 32\]", "5, any, 32"),
        ("key", lambda t: t[..., :16], r"\[5, 2, 16\]", "5, any, 32"),
        ("key", lambda t: t[:, :1], r"\[5, 1, 32\]", "2, 32"),
        ("value", lambda t: t[:4], r"\[4, 2, 32\]", "5"),
        ("value", lambda t: t.float(), "float32", "float16"),
        ("cos", lambda t: t[:4], r"\[4, 32\]", "5, any"),
        ("cos", lambda t: t[:, :3], "3", "even"),
        ("cos", lambda t: t.repeat(1, 2), "64", "from 2 to 32"),
        ("cos", lambda t: t[:, :0], "0", "from 2 to 32"),
        ("cos", lambda t: t.double(), "float64", "float32"),
        ("cos", lambda t: t.T.contiguous().T, "5", "1"),
        ("sin", lambda t: t[:, :16], r"\[5, 16\]", "5, 32"),
        ("sin", lambda t: t.float(), "float32", "float16"),
        ("k_cache", lambda t: t[..., :16], "32", "16"),
        ("k_cache", lambda t: t[:, :12], "12", "power of two"),
        ("v_cache", lambda t: t.view(torch.float8_e5m2), "float8_e5m2", "float8_e4m3fn"),
        ("slots", lambda t: t[:4], r"\[4\]", "5"),
        ("slots", lambda t: t.short(), "int16", "int32 or int64"),
        ("k_scale", lambda t: 0.5, "float", "float32 tensor"),
        ("v_scale", lambda t: torch.ones(3, device=t.device), r"\[3\]", "1 or 2"),
        ("sin", lambda t: t.to("meta"), "meta", DEVICE),
    ],
)
def test_a_bad_argument_is_refused_with_what_was_found_and_what_is_required(
    name, change, found, required
):
    problem = make_problem(5, dtype=torch.float16)
    problem[name] = change(problem[name])
    with pytest.raises(KernelArgumentError, match=rf"{found}.*{required}"):
        rope_cache_write(**problem)


@pytest.mark.parametrize(
    ("out_q", "found"),
    [
        (lambda q: q[..., :16], "out_q.*16"),
        (lambda q: q.float(), "out_q.*float32"),
        (lambda q: q.transpose(1, 2).contiguous().transpose(1, 2), "out_q.*4"),
    ],
)
def test_a_bad_output_is_refused(out_q, found):
    problem = make_problem(5)
    with pytest.raises(KernelArgumentError, match=found):
        rope_cache_write(**problem, out_q=out_q(problem["query"]))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rope_dim", [64, 128])
@pytest.mark.parametrize("tokens", [1, 64, 8192])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(32, 8), (48, 8), (8, 1), (7, 7)])
def test_large_models(q_heads, kv_heads, tokens, rope_dim, interleaved):
    problem = make_problem(tokens, q_heads, kv_heads, 128, rope_dim, per_head=rope_dim == 64)
    assert_same(problem, interleaved=interleaved, pdl=tokens == 64)


@pytest.mark.gpu
@needs_gpu
def test_slots_beyond_two_gigabytes():
    pages, page_size, heads, dim = 2**15 + 64, 64, 8, 128
    problem = make_problem(96, 8, heads, dim, page_size=page_size)
    expected = {name: problem[name][:64].clone() for name in ("k_cache", "v_cache")}
    reference_rope_cache_write(**{**problem, **expected})
    for name, order in (("k_cache", "NHD"), ("v_cache", "HND")):
        problem[name] = make_cache(PagedLayout(page_size, order), pages, heads, dim)
    problem["slots"] = problem["slots"] + (pages - 64) * page_size
    assert problem["slots"].max().item() * heads * dim > 2**31
    rope_cache_write(**problem)
    for name, cache in expected.items():
        tail = problem[name][pages - 64 :][: len(cache)]
        assert torch.equal(tail.view(torch.uint8), cache.view(torch.uint8))
        assert (problem[name].view(torch.uint8)[: pages - 64] == POISON).all()


@pytest.mark.gpu
@needs_gpu
def test_offsets_of_queries_beyond_two_giga_elements():
    tokens, width = 2**16 + 8, 2**15 + 64
    problem = make_problem(tokens, 1, 1, 64)
    fused = torch.empty(tokens, width, dtype=HALF, device=DEVICE)
    for start, name in ((64, "query"), (128, "key"), (192, "value")):
        fused[:, start : start + 64] = problem[name][:, 0]
        problem[name] = fused[:, start : start + 64].unsqueeze(1)
    assert (tokens - 1) * width > 2**31
    caches = {name: problem[name].clone() for name in ("k_cache", "v_cache")}
    expected = reference_rope_cache_write(**{**problem, **caches})
    assert torch.equal(rope_cache_write(**problem, out_q=problem["query"]), expected)
    for name, cache in caches.items():
        assert torch.equal(codes_of(problem[name]), codes_of(cache))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("tokens", [3, 700])
def test_a_captured_graph_reads_slots_angles_and_scales_anew(tokens):
    problem = make_problem(tokens, 32, 8, 128, per_head=True)
    out_q = rope_cache_write(**problem)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rope_cache_write(**problem, out_q=out_q)
    for _ in range(3):
        for name in ("k_scale", "v_scale"):
            problem[name].uniform_(0.1, 2)
        for name in ("query", "key", "value"):
            problem[name].normal_(0, 20)
        for name in ("cos", "sin"):
            problem[name].uniform_(-1, 1)
        slots = torch.randperm(problem["k_cache"].shape[0] * 16, device=DEVICE)
        problem["slots"].copy_(slots[:tokens])
        problem["slots"][0] = -1
        for name in ("k_cache", "v_cache"):
            problem[name].view(torch.uint8).fill_(POISON)
        caches = {name: problem[name].clone() for name in ("k_cache", "v_cache")}
        expected = reference_rope_cache_write(**{**problem, **caches})
        graph.replay()
        assert torch.equal(out_q, expected)
        for name, cache in caches.items():
            assert torch.equal(codes_of(problem[name]), codes_of(cache))


@pytest.mark.gpu
@needs_gpu
def test_a_new_number_of_tokens_is_no_new_compilation():
    def compiled():
        return sum(len(cache[0]) for cache in rotate_and_write.device_caches.values())

    problem = make_problem(1024, 32, 8, 128)
    rows = ("query", "key", "value", "cos", "sin", "slots")

    def first(tokens):
        return {**problem, **{name: problem[name][:tokens] for name in rows}}

    rope_cache_write(**first(1))
    before = compiled()
    for tokens in (2, 3, 16, 17, 300, 1024):
        rope_cache_write(**first(tokens))
    assert compiled() == before
