"""Quantise and write K and V into pages: every code equal to the reference's, and nothing else touched."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8kv.kernels import cache_write as module
from fp8kv.kernels.arguments import KernelArgumentError
from fp8kv.kernels.cache_write import cache_write, reference_cache_write
from fp8kv.kernels.cast import plan_cast
from fp8kv.kernels.layout import PagedLayout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POISON = 0x7F  # a NaN in E4M3: what a recycled byte may hold
# Where there is a GPU, all of these run on it. Triton's interpreter computes in numpy, which warns where a GPU does not.
pytestmark = (
    [pytest.mark.gpu]
    if DEVICE == "cuda"
    else [pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning")]
)
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU")


def make_cache(layout, pages, heads, dim, dtype=torch.float8_e4m3fn):
    cache = layout.empty(pages, heads, dim, dtype=dtype, device=DEVICE)
    cache.view(torch.uint8).fill_(POISON)
    return cache


def make_problem(
    tokens,
    heads=2,
    k_dim=32,
    v_dim=None,
    *,
    page_size=16,
    order="NHD",
    dtype=torch.bfloat16,
    cache_dtype=torch.float8_e4m3fn,
    per_head=False,
    index=torch.int64,
    padding=0,
    spread=20.0,
):
    """Return the arguments of one call; the slots are shuffled and leave three pages' worth of others."""
    v_dim = k_dim if v_dim is None else v_dim
    layout = PagedLayout(page_size, order)
    pages = layout.pages_for(tokens) + 3
    k_scale, v_scale = (
        torch.rand(heads if per_head else 1, device=DEVICE) * 0.9 + 0.07 for _ in range(2)
    )
    # spread 20 over scales of 0.07 to 0.97: subnormal, normal and saturated codes
    key = torch.randn(tokens + padding, heads, k_dim, device=DEVICE) * spread
    value = torch.randn(tokens + padding, heads, v_dim, device=DEVICE) * spread
    slots = torch.randperm(pages * page_size, device=DEVICE)[:tokens].to(index)
    return {
        "key": key.to(dtype),
        "value": value.to(dtype),
        "k_cache": make_cache(layout, pages, heads, k_dim, cache_dtype),
        "v_cache": make_cache(layout, pages, heads, v_dim, cache_dtype),
        "slots": slots,
        "k_scale": k_scale,
        "v_scale": v_scale,
    }


def codes_of(cache):
    """Return the bytes; the sign of a NaN is nobody's promise."""
    if cache.element_size() > 1:
        return cache.view(torch.uint8)
    return cache.view(torch.uint8).masked_fill(cache.float().isnan(), POISON)


def assert_same_codes(problem, **options):
    """Run kernel and reference on copies; compare every byte of the caches, the untouched ones included."""
    expected = {name: problem[name].clone() for name in ("k_cache", "v_cache")}
    reference_cache_write(**{**problem, **expected}, **options)
    inputs = {name: problem[name].clone() for name in ("key", "value", "slots")}
    cache_write(**problem, **options)
    for name, cache in expected.items():
        found, wanted = codes_of(problem[name]), codes_of(cache)
        assert torch.equal(found, wanted), f"{name}: {(found != wanted).sum()} codes differ"
        if (problem["slots"] >= 0).any():
            assert (wanted != POISON).any()
    for name, before in inputs.items():
        assert torch.equal(problem[name].nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("order", ["NHD", "HND"])
@pytest.mark.parametrize("per_head", [False, True])
def test_codes_are_the_references_in_both_orders(order, per_head, index):
    assert_same_codes(make_problem(37, order=order, per_head=per_head, index=index))


@pytest.mark.parametrize("page_size", [1, 2, 16, 64, 256])
def test_every_page_size(page_size):
    assert_same_codes(make_problem(21, page_size=page_size))


@pytest.mark.parametrize(
    ("heads", "k_dim", "v_dim"),
    [
        (1, 128, 128),
        (8, 128, 128),
        (3, 96, 96),
        (2, 192, 128),
        (2, 64, 192),
        (1, 576, 512),
        (5, 80, 48),
        (2, 40, 72),
        (3, 7, 5),
        (1, 1, 1),
    ],
)
def test_every_width_of_k_and_of_v(heads, k_dim, v_dim):
    assert_same_codes(make_problem(9, heads, k_dim, v_dim, per_head=heads > 2))


@pytest.mark.parametrize("tokens", [1, 2, 3, 15, 64, 65, 130])
def test_every_token_is_written_once(tokens):
    problem = make_problem(tokens, page_size=4)
    assert_same_codes(problem)
    written = (problem["k_cache"].view(torch.uint8) != POISON).flatten(0, 1).flatten(1).all(1)
    assert written.sum() == tokens


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz]
)
def test_every_input_and_cache_type(dtype, cache_dtype):
    assert_same_codes(make_problem(11, dtype=dtype, cache_dtype=cache_dtype, page_size=4))


@pytest.mark.parametrize("order", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_unquantised_cache_takes_values_as_they_are(dtype, order):
    problem = make_problem(37, 3, 96, 40, dtype=dtype, cache_dtype=dtype, order=order)
    problem["slots"][[0, 9]] = -1
    assert_same_codes(problem)
    slot = problem["slots"][5]
    row = problem["k_cache"][slot // 16, slot % 16]
    assert torch.equal(row, problem["key"][5])


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_gpu_without_a_conversion_writes_the_same_codes(cache_dtype, monkeypatch):
    plan = plan_cast(cache_dtype, torch.device(DEVICE))
    monkeypatch.setattr(module, "plan_write", lambda *_: replace(plan, native=False))
    assert_same_codes(make_problem(50, cache_dtype=cache_dtype, page_size=4))


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_bfloat16_number_for_many_scales(cache_dtype):
    scales = [1.0, 0.0213, 3.7, 1 / 448, 1.9999999, 2.0**-20, 41000.0]
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    for scale in scales if DEVICE == "cuda" else scales[1:2]:
        problem = make_problem(512, 1, 128, cache_dtype=cache_dtype, page_size=64)
        problem["key"] = numbers.reshape(512, 1, 128).to(DEVICE)
        problem["value"] = problem["key"].flip(0)
        problem["k_scale"] = torch.tensor([scale], device=DEVICE)
        problem["v_scale"] = torch.tensor(scale / 3, device=DEVICE)
        assert_same_codes(problem)


def test_quotients_at_ties_are_rounded_as_by_an_ieee_division():
    # numbers whose quotient lies within one float32 step of the middle between two codes
    codes = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (codes[:-1] + codes[1:]) / 2
    problem = make_problem(5, 1, 128, dtype=torch.float32)
    scale = torch.tensor([0.3], device=DEVICE)
    ties = torch.nn.functional.pad(middles, (0, 3), value=1.0).to(DEVICE) * scale
    bits = ties.view(torch.int32) + torch.arange(-2, 3, device=DEVICE, dtype=torch.int32)[:, None]
    problem["key"] = bits.view(torch.float32).unsqueeze(1)
    problem["value"] = -problem["key"]
    problem["k_scale"] = problem["v_scale"] = scale
    assert_same_codes(problem)


def test_slices_of_a_fused_tensor_are_read_in_place():
    problem = make_problem(13, 2, 32, padding=6)
    fused = torch.randn(19, 4 * 32 + 2 * 32 + 2 * 32 + 24, device=DEVICE).to(torch.bfloat16)
    problem["key"] = fused[:, 128:192].unflatten(1, (2, 32))
    problem["value"] = fused[:, 192:256].unflatten(1, (2, 32))
    assert_same_codes(problem)


def test_an_unaligned_view_and_padded_caches_are_served():
    problem = make_problem(7, 2, 32)
    fused = torch.randn(7, 2 * 33 + 1, device=DEVICE).to(torch.bfloat16)
    problem["key"] = fused[:, 1:].unflatten(1, (2, 33))[..., :32]
    padded = make_cache(PagedLayout(16), 5, 3, 40)
    problem["v_cache"] = padded[1:, :, 1:, 3:35]
    assert_same_codes(problem)
    padded.view(torch.uint8)[1:, :, 1:, 3:35] = POISON
    assert (padded.view(torch.uint8) == POISON).all()


def test_k_and_v_have_scales_of_their_own():
    problem = make_problem(4)
    problem["value"] = problem["key"].clone()
    problem["k_scale"], problem["v_scale"] = (torch.tensor([s], device=DEVICE) for s in (0.5, 0.25))
    assert_same_codes(problem)
    k, v = (problem[name].float() for name in ("k_cache", "v_cache"))
    exact = (v.abs() < 200) & (v.abs() > 1)
    assert exact.any()
    assert torch.equal(v[exact], 2 * k[exact])


def test_padding_slots_are_skipped_and_keys_may_be_longer():
    problem = make_problem(20, padding=5)
    problem["slots"][[0, 3, 4, 19]] = torch.tensor([-1, -1, -7, -(2**31)], device=DEVICE)
    problem["key"][-5:] = float("nan")
    assert_same_codes(problem)


def test_all_slots_may_be_padding():
    problem = make_problem(6)
    problem["slots"].fill_(-1)
    before = problem["k_cache"].clone()
    cache_write(**problem)
    assert torch.equal(problem["k_cache"].view(torch.uint8), before.view(torch.uint8))


def test_no_token_is_no_work():
    assert_same_codes(make_problem(0))


@pytest.mark.parametrize("map_index", [torch.int32, torch.int64])
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_a_slot_map_leads_to_the_window_pool(index, map_index):
    problem = make_problem(24, index=index)
    window = problem["slots"].clone()
    full = torch.randperm(500, device=DEVICE)[:24]
    # The map lies inside a tensor whose neighbours hold valid slots: a lookup of slot -1 would find one of them.
    around = torch.zeros(502, dtype=map_index, device=DEVICE)
    slot_map = around[1:-1]
    slot_map.fill_(-1)
    slot_map[full] = window.to(map_index)
    slot_map[full[5:8]] = -1
    problem["slots"] = full.to(index)
    problem["slots"][10:12] = -1
    around[0] = around[-1] = window[10]
    assert_same_codes(problem, slot_map=slot_map)


def test_scale_of_no_dimension_is_taken():
    problem = make_problem(3)
    problem["k_scale"] = problem["k_scale"].reshape([])
    assert_same_codes(problem)


@settings(max_examples=12 if DEVICE == "cpu" else 25, deadline=None)
@given(data=st.data())
def test_any_shape(data):
    dims = st.sampled_from([8, 16, 24, 48, 64, 96, 128, 192, 576])
    tokens = data.draw(st.integers(1, 40 if DEVICE == "cpu" else 3000))
    problem = make_problem(
        tokens,
        data.draw(st.integers(1, 9)),
        data.draw(dims),
        data.draw(dims),
        page_size=2 ** data.draw(st.integers(0, 8)),
        order=data.draw(st.sampled_from(["NHD", "HND"])),
        per_head=data.draw(st.booleans()),
        index=data.draw(st.sampled_from([torch.int32, torch.int64])),
        padding=data.draw(st.integers(0, 3)),
    )
    problem["slots"][torch.rand(tokens, device=DEVICE) < 0.2] = -1
    assert_same_codes(problem)


@pytest.mark.parametrize(
    ("name", "change", "found", "required"),
    [
        ("key", lambda t: t[:4], "4", "5"),
        ("key", lambda t: t[:, :1], r"\[5, 1, 32\]", "2, 32"),
        ("key", lambda t: t.double(), "float64", "bfloat16"),
        ("key", lambda t: t.transpose(0, 2).contiguous().transpose(0, 2), "10", "1"),
        ("value", lambda t: t[..., :31], "31", "32"),
        ("value", lambda t: t.float(), "float32", "bfloat16"),
        ("value", lambda t: t[:3], "3", "5"),
        ("k_cache", lambda t: t.float(), "float32", "float8_e4m3fn"),
        ("k_cache", lambda t: t[:, :12], "12", "power of two"),
        ("k_cache", lambda t: t[0], r"\[16, 2, 32\]", "any, any, any, any"),
        ("v_cache", lambda t: t[:, :, :1], r"\[4, 16, 1, 32\]", "4, 16, 2"),
        ("v_cache", lambda t: t.view(torch.float8_e5m2), "float8_e5m2", "float8_e4m3fn"),
        ("slots", lambda t: t.short(), "int16", "int32 or int64"),
        ("slots", lambda t: t[None], r"\[1, 5\]", "any"),
        ("slots", lambda t: t.repeat_interleave(2)[::2], "2", "1"),
        ("k_scale", lambda t: t.double(), "float64", "float32"),
        ("k_scale", lambda t: torch.ones(3, device=t.device), r"\[3\]", "1 or 2"),
        ("v_scale", lambda t: t.expand(2), "0", "1"),
        ("v_scale", lambda t: 0.5, "float", "float32 tensor"),
        ("v_scale", lambda t: t.to("meta"), "meta", DEVICE),
    ],
)
def test_a_bad_argument_is_refused_with_what_was_found_and_what_is_required(
    name, change, found, required
):
    problem = make_problem(5)
    problem[name] = change(problem[name])
    with pytest.raises(KernelArgumentError, match=rf"{name}.*{found}.*{required}"):
        cache_write(**problem)


def test_a_bad_slot_map_is_refused():
    problem = make_problem(5)
    with pytest.raises(KernelArgumentError, match=r"slot_map.*float32.*int32 or int64"):
        cache_write(**problem, slot_map=torch.zeros(9, device=DEVICE))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_slots_beyond_two_gigabytes(index):
    pages, page_size, heads, dim = 2**15 + 64, 64, 8, 128
    cache = torch.full((pages, page_size, heads, dim), POISON, dtype=torch.uint8, device=DEVICE)
    problem = make_problem(96, heads, dim, index=index, page_size=page_size)
    problem["k_cache"] = cache.view(torch.float8_e4m3fn)
    problem["v_cache"] = make_cache(PagedLayout(page_size, "HND"), pages, heads, dim)
    problem["slots"] = pages * page_size - 1 - problem["slots"]
    assert problem["slots"].max().item() * heads * dim > 2**31
    used = problem["slots"].long()
    tail = slice(pages - 64, None)
    cache_write(**problem)
    assert (cache[: pages - 64] == POISON).all()
    assert (problem["v_cache"].view(torch.uint8)[: pages - 64] == POISON).all()
    small = {name: problem[name][tail].clone() for name in ("k_cache", "v_cache")}
    for part in small.values():
        part.view(torch.uint8).fill_(POISON)
    shifted = (used - (pages - 64) * page_size).to(index)
    reference_cache_write(**{**problem, **small, "slots": shifted})
    for name, part in small.items():
        assert torch.equal(problem[name][tail].view(torch.uint8), part.view(torch.uint8))


@pytest.mark.gpu
@needs_gpu
def test_key_offsets_beyond_two_giga_elements():
    tokens, width = 2**16 + 8, 2**15 + 64
    fused = torch.empty(tokens, width, dtype=torch.bfloat16, device=DEVICE)
    problem = make_problem(tokens, 1, 64)
    fused[:, 64:128] = problem["key"][:, 0]
    problem["key"] = fused[:, 64:128].unsqueeze(1)
    assert (tokens - 1) * width > 2**31
    expected = {name: problem[name].clone() for name in ("k_cache", "v_cache")}
    reference_cache_write(**{**problem, **expected})
    cache_write(**problem)
    for name, cache in expected.items():
        assert torch.equal(codes_of(problem[name]), codes_of(cache))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("tokens", [3, 700])
def test_a_captured_graph_reads_slots_map_and_scales_anew(tokens):
    problem = make_problem(tokens, 8, 128, per_head=True)
    slot_map = torch.arange(problem["k_cache"].shape[0] * 16, device=DEVICE, dtype=torch.int32)
    cache_write(**problem, slot_map=slot_map)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache_write(**problem, slot_map=slot_map)
    for _ in range(3):
        problem["k_scale"].uniform_(0.1, 2)
        problem["v_scale"].uniform_(0.1, 2)
        problem["key"].normal_(0, 20)
        problem["slots"].copy_(torch.randperm(slot_map.numel(), device=DEVICE)[:tokens])
        problem["slots"][0] = -1
        slot_map.copy_(torch.randperm(slot_map.numel(), device=DEVICE))
        for name in ("k_cache", "v_cache"):
            problem[name].view(torch.uint8).fill_(POISON)
        graph.replay()
        expected = {
            name: torch.full_like(problem[name].view(torch.uint8), POISON)
            for name in ("k_cache", "v_cache")
        }
        expected = {name: cache.view(torch.float8_e4m3fn) for name, cache in expected.items()}
        reference_cache_write(**{**problem, **expected}, slot_map=slot_map)
        for name, cache in expected.items():
            assert torch.equal(codes_of(problem[name]), codes_of(cache))


@pytest.mark.gpu
@needs_gpu
def test_a_dependent_launch_waits_for_the_kernel_in_front():
    # The second write starts while the last tokens of the first are on their way, and reads them as its keys.
    tokens, tail, page_size = 2**16, 2**12, 16
    first = make_problem(tokens, 8, 128, page_size=page_size)
    first["slots"] = torch.arange(tokens, device=DEVICE)
    expected = {name: first[name].clone() for name in ("k_cache", "v_cache")}
    reference_cache_write(**{**first, **expected})
    second = make_problem(tail, 8, 64, page_size=page_size)

    def as_keys(cache):
        rows = cache.view(torch.uint8).flatten(0, 1)[tokens - tail : tokens]
        return rows.view(torch.bfloat16)

    wanted = {name: second[name].clone() for name in ("k_cache", "v_cache")}
    keys = {"key": as_keys(expected["k_cache"]), "value": as_keys(expected["v_cache"])}
    reference_cache_write(**{**second, **keys, **wanted})
    keys = {"key": as_keys(first["k_cache"]), "value": as_keys(first["v_cache"])}
    busy = torch.randn(8192, 8192, device=DEVICE)
    for _ in range(5):
        for problem in (first, second):
            for name in ("k_cache", "v_cache"):
                problem[name].view(torch.uint8).fill_(POISON)
        busy @ busy  # lets the host launch both before the first begins
        cache_write(**first, pdl=True)
        cache_write(**{**second, **keys}, pdl=True)
        for name, cache in wanted.items():
            assert torch.equal(codes_of(second[name]), codes_of(cache))


@pytest.mark.gpu
@needs_gpu
def test_a_new_number_of_tokens_is_no_new_compilation():
    problem = make_problem(4000, 8, 128)
    cache_write(**{**problem, "slots": problem["slots"][:1]})
    compiled = sum(len(c[0]) for c in module._cache_write_kernel.device_caches.values())
    for tokens in (2, 3, 16, 17, 300, 2048, 4000):
        cache_write(**{**problem, "slots": problem["slots"][:tokens]})
    assert compiled == sum(len(c[0]) for c in module._cache_write_kernel.device_caches.values())
