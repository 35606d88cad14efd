"""Gather paged FP8 into contiguous rows: every value equal to the reference's, and no page read that no token needs."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8kv.kernels import gather_kernel
from fp8kv.kernels.arguments import KernelArgumentError
from fp8kv.kernels.gather import gather, gather_rows, reference_gather, reference_gather_rows
from fp8kv.kernels.layout import PagedLayout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter truncates where it should round to bfloat16
TYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
UNTOUCHED = -123.0
# Where there is a GPU, all of these run on it. Triton's interpreter computes in numpy, which warns where a GPU does not.
pytestmark = (
    [pytest.mark.gpu]
    if DEVICE == "cuda"
    else [pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")]
)
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")


def every_code(cache_dtype):
    """Return the 256 codes, NaN and infinities among them."""
    return torch.arange(256, dtype=torch.uint8, device=DEVICE).view(cache_dtype)


def make_cache(pages, page_size, heads, dim, order="NHD", dtype=torch.float8_e4m3fn):
    cache = PagedLayout(page_size, order).empty(pages, heads, dim, dtype=dtype, device=DEVICE)
    codes = torch.randint(0, 256, cache.shape, dtype=torch.uint8, device=DEVICE)
    cache.view(torch.uint8).copy_(codes)
    return cache


def make_places(lengths, starts, page_size, used_from=0):
    """Return page table, cu_seqlens and starts; pages are shuffled, and what is not to be read is out of bounds."""
    firsts = starts if starts is not None else [0] * len(lengths)
    needed = [
        range(s // page_size, -(-(s + n) // page_size)) if n else range(0)
        for s, n in zip(firsts, lengths, strict=True)
    ]
    pages = torch.randperm(sum(map(len, needed)) + 2) + used_from
    width = max((r.stop for r in needed), default=0) + 2
    table = torch.tensor([-1, 2**31 - 1], dtype=torch.int32).repeat(len(lengths), width)[:, :width]
    fresh = iter(pages.tolist())
    for row, used in zip(table, needed, strict=True):
        for place in used:
            row[place] = next(fresh)
    bounds = [0, *itertools.accumulate(lengths)]
    return {
        "page_table": table.to(DEVICE),
        "cu_seqlens": torch.tensor(bounds, dtype=torch.int32, device=DEVICE),
        "starts": None
        if starts is None
        else torch.tensor(starts, dtype=torch.int32, device=DEVICE),
        "total_tokens": bounds[-1],
    }, len(pages) + used_from


def make_problem(
    lengths=(5, 0, 17, 33),
    starts=None,
    heads=2,
    k_dim=32,
    v_dim=None,
    *,
    page_size=16,
    order="NHD",
    cache_dtype=torch.float8_e4m3fn,
    per_head=False,
    dtype=torch.float32,
):
    places, pages = make_places(lengths, starts, page_size)
    v_dim = k_dim if v_dim is None else v_dim
    k_scale, v_scale = (
        torch.rand(heads if per_head else 1, device=DEVICE) * 0.1 + 0.01 for _ in range(2)
    )
    return {
        "k_cache": make_cache(pages, page_size, heads, k_dim, order, cache_dtype),
        "v_cache": make_cache(pages, page_size, heads, v_dim, order, cache_dtype),
        "k_scale": k_scale,
        "v_scale": v_scale,
        "dtype": dtype,
        **places,
    }


def make_rows_problem(lengths, starts=None, dim=576, page_size=64, dtype=torch.float32):
    places, pages = make_places(lengths, starts, page_size)
    cache = make_cache(pages, page_size, 1, dim)[:, :, 0]
    return {"cache": cache, "scale": torch.tensor([0.037], device=DEVICE), "dtype": dtype, **places}


def assert_same_values(found, wanted):
    """Compare bit for bit; a NaN is a NaN."""
    assert found.dtype == wanted.dtype
    assert torch.equal(found.isnan(), wanted.isnan())
    found, wanted = (t.nan_to_num(nan=0.0, posinf=None, neginf=None) for t in (found, wanted))
    assert torch.equal(found, wanted), f"{(found != wanted).sum()} values differ"
    assert torch.equal(found.signbit(), wanted.signbit())


def assert_gathers(problem):
    for found, wanted in zip(gather(**problem), reference_gather(**problem), strict=True):
        assert_same_values(found, wanted)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("order", ["NHD", "HND"])
@pytest.mark.parametrize("per_head", [False, True])
def test_values_are_the_references_in_both_orders(order, per_head, dtype):
    assert_gathers(make_problem(order=order, per_head=per_head, dtype=dtype))


@pytest.mark.parametrize(
    "cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz]
)
@pytest.mark.parametrize("dtype", TYPES)
def test_every_code_of_every_format(cache_dtype, dtype):
    problem = make_problem([1, 15], heads=2, k_dim=128, cache_dtype=cache_dtype, dtype=dtype)
    codes = every_code(cache_dtype).view(torch.uint8).reshape(2, 128)
    problem["k_cache"].view(torch.uint8).copy_(codes)
    problem["v_cache"].view(torch.uint8).copy_(codes.flip(1))
    problem["v_scale"] = torch.tensor(448.0, device=DEVICE)
    assert_gathers(problem)


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_gpu_without_a_conversion_gives_the_same_values(cache_dtype, monkeypatch):
    monkeypatch.setattr(gather_kernel, "decodes_natively", lambda *_: False)
    problem = make_problem([1, 15], k_dim=128, cache_dtype=cache_dtype)
    problem["k_cache"].view(torch.uint8).copy_(every_code(torch.uint8).reshape(2, 128))
    assert_gathers(problem)


def test_the_product_is_rounded_once():
    problem = make_problem([1], heads=1, k_dim=256, dtype=torch.float16)
    problem["k_cache"].view(torch.uint8).copy_(torch.arange(256, dtype=torch.uint8))
    problem["k_scale"] = torch.tensor([1 + 2.0**-11 + 2.0**-20], device=DEVICE)
    found = gather(**problem)[0].double().nan_to_num(0.0)
    exact = every_code(torch.float8_e4m3fn).double().nan_to_num(0.0) * problem["k_scale"].double()
    assert torch.equal(found[0, 0], exact.to(torch.float16).double())


@pytest.mark.parametrize("page_size", [1, 2, 16, 64, 256])
def test_every_page_size(page_size):
    assert_gathers(make_problem([page_size, page_size + 1, 0, 70, 1], page_size=page_size))


@pytest.mark.parametrize(
    ("heads", "k_dim", "v_dim"),
    [
        (1, 128, 128),
        (8, 128, 128),
        (3, 96, 96),
        (1, 192, 128),
        (2, 64, 192),
        (5, 80, 48),
        (3, 7, 5),
    ],
)
def test_every_width_of_k_and_of_v(heads, k_dim, v_dim):
    assert_gathers(make_problem([3, 9], None, heads, k_dim, v_dim, per_head=heads > 2))


@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize(
    "lengths",
    [
        [1],
        [0],
        [63],
        [64],
        [65],
        [128],
        [0, 0, 0],
        [0, 5, 0, 0, 64, 0],
        [64] * 3,
        [1] * 7,
        [127, 1, 129],
    ],
)
def test_every_length_around_a_block_and_a_page(lengths, page_size):
    assert_gathers(make_problem(lengths, heads=1, page_size=page_size))


@pytest.mark.parametrize("batch", [127, 129] if DEVICE == "cpu" else [127, 128, 129, 300, 20000])
def test_many_sequences(batch):
    problem = make_rows_problem([i % 3 for i in range(batch)], dim=8, page_size=2)
    assert_same_values(gather_rows(**problem), reference_gather_rows(**problem))


def test_ragged_starts():
    assert_gathers(make_problem([5, 0, 17, 70], [3, 40, 16, 15]))


def test_table_rows_may_be_strided_and_caches_padded():
    problem = make_problem([20, 3], heads=2)
    wide = torch.full((2, 3 * problem["page_table"].shape[1]), -1, dtype=torch.int32, device=DEVICE)
    wide[:, 1 : 1 + problem["page_table"].shape[1]] = problem["page_table"]
    problem["page_table"] = wide[:, 1 : 1 + problem["page_table"].shape[1]]
    cache = problem["k_cache"]
    padded = make_cache(cache.shape[0] + 1, 16, 3, 41)
    padded[1:, :, 1:, 5:37] = cache
    problem["k_cache"] = padded[1:, :, 1:, 5:37]
    assert_gathers(problem)


def test_total_tokens_is_an_upper_bound_and_rows_past_the_last_token_stay():
    problem = make_problem([5, 17])
    problem["total_tokens"] = 130
    out = {name: torch.full((130, 2, 32), UNTOUCHED, device=DEVICE) for name in ("out_k", "out_v")}
    returned = gather(**problem, **out)
    assert returned[0] is out["out_k"]
    assert returned[1] is out["out_v"]
    for name, wanted in zip(out, reference_gather(**problem), strict=True):
        assert_same_values(out[name][:22], wanted[:22])
        assert (out[name][22:] == UNTOUCHED).all()


def test_tokens_beyond_total_tokens_are_left_out():
    problem = make_problem([5, 90, 8])
    wanted = reference_gather(**problem)
    problem["total_tokens"] = 70
    room = torch.full((103, 2, 32), UNTOUCHED, device=DEVICE)
    gather(**problem, out_k=room[:70], out_v=room[:70].clone())
    assert_same_values(room[:70], wanted[0][:70])
    assert_same_values(room[:70], reference_gather(**problem)[0])
    assert (room[70:] == UNTOUCHED).all()


def test_outputs_may_be_strided_and_their_neighbours_stay():
    problem = make_problem([5, 70], k_dim=32, v_dim=16, dtype=torch.float16)
    room = torch.full((77, 3, 64), UNTOUCHED, dtype=torch.float16, device=DEVICE)
    out_k, out_v = room[1:-1, :2, :32], room[1:-1, :2, 40:56]
    gather(**{**problem, "dtype": torch.float32}, out_k=out_k, out_v=out_v)
    for found, wanted in zip((out_k, out_v), reference_gather(**problem), strict=True):
        assert_same_values(found, wanted)
        found.fill_(UNTOUCHED)
    assert (room == UNTOUCHED).all()


@pytest.mark.parametrize("total_tokens", [0, 9])
def test_no_sequence_and_no_token_are_no_work(total_tokens):
    problem = make_problem([0, 0])
    k, v = gather(**{**problem, "total_tokens": total_tokens})
    assert k.shape == v.shape == (total_tokens, 2, 32)
    none = {"page_table": problem["page_table"][:0], "cu_seqlens": problem["cu_seqlens"][:1]}
    assert gather(**{**problem, **none})[0].shape == (0, 2, 32)


@pytest.mark.parametrize(
    ("dim", "page_size", "dtype"),
    [(576, 64, TYPES[0]), (576, 16, TYPES[-1]), (320, 32, TYPES[0]), *((32, 16, t) for t in TYPES)],
)
def test_rows_of_latent_attention(dim, page_size, dtype):
    problem = make_rows_problem([1, 0, 65], [7, 0, 3], dim, page_size, dtype)
    assert_same_values(gather_rows(**problem), reference_gather_rows(**problem))


def test_rows_go_to_a_strided_output():
    problem = make_rows_problem([3, 9], dim=64)
    room = torch.full((12, 100), UNTOUCHED, device=DEVICE)
    gather_rows(**problem, out=room[:, 4:68])
    assert_same_values(room[:, 4:68], reference_gather_rows(**problem))
    assert (room[:, :4] == UNTOUCHED).all()
    assert (room[:, 68:] == UNTOUCHED).all()


@settings(max_examples=8 if DEVICE == "cpu" else 25, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    dims = st.sampled_from([8, 24, 48, 64] + ([96, 192, 576] if DEVICE == "cuda" else []))
    most = 40 if DEVICE == "cpu" else 500
    lengths = data.draw(st.lists(st.integers(0, most), min_size=1, max_size=6))
    positions = st.integers(0, 300)
    starts = data.draw(
        st.none() | st.lists(positions, min_size=len(lengths), max_size=len(lengths))
    )
    problem = make_problem(
        lengths,
        starts,
        data.draw(st.integers(1, 3 if DEVICE == "cpu" else 9)),
        data.draw(dims),
        data.draw(dims),
        page_size=2 ** data.draw(st.integers(0, 8)),
        order=data.draw(st.sampled_from(["NHD", "HND"])),
        per_head=data.draw(st.booleans()),
        dtype=data.draw(st.sampled_from(TYPES)),
    )
    assert_gathers(problem)


@pytest.mark.parametrize(
    ("name", "change", "found", "required"),
    [
        ("k_cache", lambda t: t.float(), "float32", "float8_e4m3fn"),
        ("k_cache", lambda t: t[0], r"\[16, 2, 32\]", "any, any, any, any"),
        ("k_cache", lambda t: t[:, :5], "5", "power of two"),
        ("k_cache", lambda t: t[..., ::2], "2", "1"),
        ("v_cache", lambda t: t.view(torch.float8_e5m2), "float8_e5m2", "float8_e4m3fn"),
        ("v_cache", lambda t: t[:, :, :1], r"\[8, 16, 1, 32\]", "8, 16, 2"),
        ("page_table", lambda t: t.long(), "int64", "int32"),
        ("page_table", lambda t: t[0], r"\[5\]", "any, any"),
        ("cu_seqlens", lambda t: t[:-1], r"\[4\]", r"\[5\]"),
        ("cu_seqlens", lambda t: t.float(), "float32", "int32"),
        ("k_scale", lambda t: torch.ones(3, device=t.device), r"\[3\]", "1 or 2"),
        ("k_scale", lambda t: torch.ones(1, device=t.device).expand(2), "0", "1"),
        ("v_scale", lambda t: t.double(), "float64", "float32"),
        ("v_scale", lambda t: t.to("meta"), "meta", DEVICE),
        ("total_tokens", lambda n: -1, "-1", "at least 0"),
        ("starts", lambda _: torch.zeros(3, dtype=torch.int32, device=DEVICE), r"\[3\]", r"\[4\]"),
        ("starts", lambda _: torch.zeros(4, device=DEVICE), "float32", "int32"),
        ("dtype", lambda _: torch.float64, "float64", "bfloat16"),
        ("out_k", lambda _: torch.zeros(55, 2, 31, device=DEVICE), r"\[55, 2, 31\]", "55, 2, 32"),
        ("out_v", lambda _: torch.zeros(54, 2, 32, device=DEVICE), r"\[54, 2, 32\]", "55, 2, 32"),
        ("out_v", lambda _: torch.zeros(55, 2, 32).int(), "int32", "bfloat16"),
    ],
)
def test_a_bad_argument_is_refused_with_what_was_found_and_what_is_required(
    name, change, found, required
):
    problem = make_problem()
    problem[name] = change(problem.get(name))
    with pytest.raises(KernelArgumentError, match=rf"{name}.*{found}.*{required}"):
        gather(**problem)


def test_rows_have_one_scale():
    problem = make_rows_problem([3])
    problem["scale"] = torch.ones(2, device=DEVICE)
    with pytest.raises(KernelArgumentError, match=r"scale.*\[2\].*1 element"):
        gather_rows(**problem)


@pytest.mark.gpu
@needs_gpu
def test_pages_and_outputs_beyond_two_gigabytes():
    heads, dim, page_size, length = 8, 128, 64, 64 * 5
    pages = 2**15 + 64
    cache = torch.zeros(pages, page_size, heads, dim, dtype=torch.uint8, device=DEVICE)
    places, used = make_places([length] * 3, None, page_size)
    cache[-used:] = torch.randint(0, 0x7F, cache[-used:].shape, dtype=torch.uint8, device=DEVICE)
    cache = cache.view(torch.float8_e4m3fn)
    problem = make_problem(heads=heads, k_dim=dim, page_size=page_size, dtype=torch.bfloat16)
    small = {"k_cache": cache[-used:].clone(), "v_cache": cache[-used:].flip(0).clone()}
    wanted = reference_gather(**{**problem, **places, **small})
    in_table = (places["page_table"] >= 0) & (places["page_table"] < used)
    far = torch.where(in_table, places["page_table"] + (pages - used), places["page_table"])
    tail = torch.zeros_like(cache.view(torch.uint8))
    tail[-used:] = small["v_cache"].view(torch.uint8)
    large = {"k_cache": cache, "v_cache": tail.view(torch.float8_e4m3fn), "page_table": far}
    # the last token's row lies beyond 2^31 elements
    wide = torch.empty(length * 3, 2**22, dtype=torch.bfloat16, device=DEVICE)
    out_k = wide[:, 1024:2048].unflatten(1, (heads, dim))
    assert (length * 3 - 1) * wide.stride(0) > 2**31
    found = gather(**{**problem, **places, **large}, out_k=out_k)
    for one, other in zip(found, wanted, strict=True):
        assert_same_values(one, other)


@pytest.mark.gpu
@needs_gpu
def test_a_captured_graph_reads_lengths_pages_and_scales_anew():
    problem = make_problem([100, 3, 0, 64], [0, 5, 0, 1], heads=8, k_dim=128, dtype=torch.bfloat16)
    problem["total_tokens"] = 400
    k, v = gather(**problem)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        k, v = gather(**problem)
    for lengths, starts in (([1, 2, 3, 4], [9, 9, 9, 9]), ([0, 120, 7, 0], [0, 0, 1, 0])):
        places, used = make_places(lengths, starts, 16)
        assert used <= problem["k_cache"].shape[0]
        width = problem["page_table"].shape[1]
        table = torch.full_like(problem["page_table"], -1)
        table[:, : places["page_table"].shape[1]] = places["page_table"][:, :width]
        problem["page_table"].copy_(table)
        problem["cu_seqlens"].copy_(places["cu_seqlens"])
        problem["starts"].copy_(places["starts"])
        problem["k_scale"].uniform_(0.1, 2)
        problem["v_scale"].uniform_(0.1, 2)
        graph.replay()
        wanted = reference_gather(**problem)
        for found, expected in zip((k, v), wanted, strict=True):
            assert_same_values(found[: sum(lengths)], expected[: sum(lengths)])


@pytest.mark.gpu
@needs_gpu
def test_other_lengths_and_batches_are_no_new_compilation():
    gather(**make_problem([5, 9], heads=8, k_dim=128))
    compiled = sum(len(c[0]) for c in gather_kernel._gather_kernel.device_caches.values())
    for lengths in ([1], [16] * 16, [1000, 3], [5] * 17):
        gather(**make_problem(lengths, heads=8, k_dim=128))
    assert compiled == sum(len(c[0]) for c in gather_kernel._gather_kernel.device_caches.values())
