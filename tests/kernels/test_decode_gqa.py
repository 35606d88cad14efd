"""GQA decode: the answer of float32 over the dequantised cache, whatever lies in the cache beside it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8kv.kernels import decode_gqa as module
from fp8kv.kernels.arguments import KernelArgumentError
from fp8kv.kernels.decode_gqa import decode_gqa, reference_decode_gqa
from fp8kv.kernels.layout import PagedLayout, slots_of

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
# The interpreter's BF16 arithmetic is wrong; the kernels read FP16 and float32 alike.
QUERY_TYPE = torch.bfloat16 if GPU else torch.float16
POISON = (
    0xFF  # two make a NaN in BF16 and FP16, one in E4M3 and E5M2: what a recycled byte may hold
)
FLOAT32_LIMIT, BFLOAT16_LIMIT = 3e-4, 2.5e-3
# over an unquantised cache probabilities are rounded to its dtype
UNQUANTISED_LIMIT = 2.5e-3 if GPU else FLOAT32_LIMIT
UNQUANTISED_BFLOAT16_LIMIT = 4e-3


def make_problem(
    lengths,
    kv_heads=2,
    group=3,
    k_dim=64,
    v_dim=None,
    *,
    page_size=16,
    order="NHD",
    dtype=torch.float8_e4m3fn,
    per_head=True,
    max_seq_len=None,
):
    """Return the arguments of one call: permuted pages, poison past every length, garbage in unused table entries."""
    v_dim = k_dim if v_dim is None else v_dim
    layout = PagedLayout(page_size, order)
    longest = max_seq_len or max(lengths)
    columns = layout.pages_for(longest) + 2
    used = [layout.pages_for(length) for length in lengths]
    pages = sum(used) + 3
    caches = []
    for dim in (k_dim, v_dim):
        cache = layout.empty(pages, kv_heads, dim, dtype=dtype, device=DEVICE)
        cache.view(torch.uint8).fill_(POISON)
        caches.append(cache)
    free = torch.randperm(pages, dtype=torch.int32)
    table = torch.full((len(lengths), columns), -1, dtype=torch.int32)
    table[1::2] = 2**30
    for row, count in enumerate(used):
        table[row, :count], free = free[:count], free[count:]
    table = table.to(DEVICE)
    for row, length in enumerate(lengths):
        slots = slots_of(table[row], torch.arange(length, device=DEVICE), page_size)
        for cache in caches:
            codes = torch.randn(length, kv_heads, cache.shape[3], device=DEVICE).to(dtype)
            cache.view(torch.uint8)[slots // page_size, slots % page_size] = codes.view(torch.uint8)
    k_scale, v_scale = (
        torch.rand(kv_heads if per_head else 1, device=DEVICE) * span + 0.3 for span in (1.0, 4.0)
    )
    query = torch.randn(len(lengths), kv_heads * group, k_dim, device=DEVICE)
    return {
        "query": query.to(QUERY_TYPE),
        "k_cache": caches[0],
        "v_cache": caches[1],
        "page_table": table,
        "seq_lens": torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        "k_scale": k_scale,
        "v_scale": v_scale,
        "sm_scale": k_dim**-0.5,
        "max_seq_len": longest,
    }


def relative_error(found, expected):
    """Return the largest error of a sequence; a reference of zeros asks for zeros."""
    difference = (found.float() - expected).flatten(1).norm(dim=1)
    norm = expected.flatten(1).norm(dim=1)
    return torch.where(norm > 0, difference / norm.clamp(min=1e-20), difference).max().item()


def assert_right(problem, splits=(1, 3, None), limit=FLOAT32_LIMIT, **options):
    """Compare output and log-sum-exp with the reference, for each of these numbers of splits."""
    batch, heads, _ = problem["query"].shape
    expected_lse = torch.empty(batch, heads, device=DEVICE)
    expected = reference_decode_gqa(**problem, **options, out_dtype=torch.float32, lse=expected_lse)
    assert expected.isfinite().all()
    for num_splits in splits:
        lse = torch.full_like(expected_lse, 7.0)
        out = torch.full_like(expected, 7.0)
        given_back = decode_gqa(**problem, **options, out=out, lse=lse, num_splits=num_splits)
        assert given_back is out
        assert relative_error(out, expected) <= limit, num_splits
        torch.testing.assert_close(lse, expected_lse, atol=2e-3, rtol=2e-5)


def lengths_around(page_size):
    return [0, 1, page_size - 1, page_size, page_size + 1, 3 * page_size + 5]


@pytest.fixture
def portable(monkeypatch):
    """Let the launcher take the kernel of other GPUs."""
    monkeypatch.setattr(module.hopper, "supports", lambda arguments: False)


@pytest.mark.parametrize("order", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_lengths_around_a_page(page_size, order):
    assert_right(make_problem(lengths_around(page_size), page_size=page_size, order=order))


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float8_e4m3fnuz])
def test_other_formats(dtype):
    assert_right(make_problem([40, 5], dtype=dtype), splits=(2,))


@pytest.mark.parametrize("order", ["NHD", "HND"])
@pytest.mark.parametrize(("k_dim", "v_dim"), [(64, 64), (96, 64), (192, 128)])
def test_an_unquantised_cache_is_read_as_it_is_and_no_scale_is_applied(k_dim, v_dim, order):
    problem = make_problem([0, 1, 16, 17, 150], 2, 3, k_dim, v_dim, dtype=QUERY_TYPE, order=order)
    assert_right(problem, limit=UNQUANTISED_LIMIT)
    options = {"window": 20, "soft_cap": 5.0, "sinks": torch.randn(6, device=DEVICE)}
    assert_right(problem, splits=(1, 2), limit=UNQUANTISED_LIMIT, **options)


@pytest.mark.parametrize(("kv_heads", "group"), [(4, 1), (1, 8), (1, 11), (1, 20)])
def test_groups(kv_heads, group):
    assert_right(make_problem([33, 9], kv_heads, group), splits=(2,))


@pytest.mark.parametrize(("k_dim", "v_dim"), [(80, 80), (96, 64), (192, 128), (16, 256)])
def test_head_dimensions(k_dim, v_dim):
    assert_right(make_problem([33, 9], 1, 2, k_dim, v_dim), splits=(2,))


@pytest.mark.parametrize("window", [1, 7, 16, 1000])
def test_a_window_hides_what_lies_before_it(window):
    assert_right(make_problem([0, 1, 15, 16, 17, 150]), splits=(1, 2), window=window)


def test_soft_cap():
    problem = make_problem([50, 3])
    problem["sm_scale"] = 2.0
    assert_right(problem, splits=(1, 2), soft_cap=4.0)


def test_sinks_join_the_denominator_and_the_log_sum_exp():
    problem = make_problem([0, 1, 40])
    sinks = torch.randn(6, device=DEVICE) * 3
    sinks[0] = -math.inf
    assert_right(problem, splits=(1, 2), sinks=sinks)
    assert_right(problem, splits=(1, 2), sinks=sinks, window=9, soft_cap=10.0)


def test_an_empty_sequence_gives_zero_and_the_logarithm_of_its_sink():
    problem = make_problem([0, 0], max_seq_len=64)
    for splits in (1, 2):
        lse = torch.full((2, 6), 7.0, device=DEVICE)
        out = decode_gqa(**problem, lse=lse, num_splits=splits)
        assert not out.any()
        assert (lse == -math.inf).all()
        sinks = torch.arange(6.0, device=DEVICE)
        out = decode_gqa(**problem, lse=lse, num_splits=splits, sinks=sinks)
        assert not out.any()
        torch.testing.assert_close(lse, sinks.expand(2, 6))


def test_strided_queries_and_outputs():
    problem = make_problem([20, 3])
    fused = torch.full((2, 12, 64), 7.0, device=DEVICE, dtype=QUERY_TYPE)
    fused[:, 3:9] = problem["query"]
    problem["query"] = fused[:, 3:9]
    wide = torch.full((2, 6, 128), 7.0, device=DEVICE)
    expected = reference_decode_gqa(**problem, out_dtype=torch.float32)
    for splits in (1, 2):
        decode_gqa(**problem, out=wide[..., 32:96], num_splits=splits)
        assert relative_error(wide[..., 32:96], expected) <= FLOAT32_LIMIT
        assert (wide[..., :32] == 7.0).all()
        assert (wide[..., 96:] == 7.0).all()


def test_nothing_to_do_is_done():
    problem = make_problem([5])
    empty = {**problem, "query": problem["query"][:0], "seq_lens": problem["seq_lens"][:0]}
    assert decode_gqa(**{**empty, "page_table": problem["page_table"][:0]}).shape == (0, 6, 64)


def test_inputs_are_left_as_they_were():
    problem = make_problem([20, 3])
    before = {name: value.clone() for name, value in problem.items() if torch.is_tensor(value)}
    decode_gqa(**problem, num_splits=2)
    for name, value in before.items():
        assert torch.equal(problem[name].view(torch.uint8), value.view(torch.uint8)), name


@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    # On a GPU each of these is a compilation.
    group=st.sampled_from([1, 6]) if GPU else st.integers(1, 9),
    dims=st.sampled_from([(64, 64), (112, 48)] if GPU else [(16, 32), (48, 16), (80, 96)]),
    page_size=st.sampled_from([8, 16, 128] if GPU else [1, 4, 16, 32, 128]),
    order=st.sampled_from(["NHD", "HND"]),
    splits=st.integers(1, 5),
    window=st.none() | st.integers(1, 60),
)
@settings(max_examples=12 if GPU else 8, deadline=None)
def test_any_shape(lengths, kv_heads, group, dims, page_size, order, splits, window):
    k_dim, v_dim = dims
    problem = make_problem(
        lengths, kv_heads, group, k_dim, v_dim, page_size=page_size, order=order, max_seq_len=90
    )
    assert_right(problem, splits=(splits,), limit=1e-3, window=window)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("query", lambda t: t[..., :48], r"the shape of k_cache is .*64\].*\[any, any, any, 48\]"),
        ("query", lambda t: t[:, :5], "the number of heads of query is 5, .* multiple of the 2"),
        ("query", lambda t: t.to(torch.float64), "the dtype of query is float64"),
        ("query", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), "stride of query is 6"),
        ("k_cache", lambda t: t.float(), "the dtype of k_cache is float32"),
        (
            "k_cache",
            lambda t: t.to(torch.float16 if GPU else torch.bfloat16),
            "the dtype of k_cache is b?float16",
        ),
        ("v_cache", lambda t: t.to(QUERY_TYPE), "v_cache is b?float16.*float8_e4m3fn"),
        ("v_cache", lambda t: t.view(torch.float8_e5m2), "v_cache is float8_e5m2.*float8_e4m3fn"),
        ("v_cache", lambda t: t[:, :, :1], r"the shape of v_cache is .*any\]"),
        ("v_cache", lambda t: t[..., :40], "the head dimension of v_cache is 40.*multiple of 16"),
        ("page_table", lambda t: t.long(), "the dtype of page_table is int64.*int32"),
        ("page_table", lambda t: t[:1], r"the shape of page_table is \[1, .*\[2, any\]"),
        ("page_table", lambda t: t[:, :0], "columns of page_table is 0, but must be at least 1"),
        ("seq_lens", lambda t: t.long(), "the dtype of seq_lens is int64.*int32"),
        ("k_scale", 1.0, "k_scale is a float, but must be a float32 tensor"),
        ("k_scale", lambda t: t.double(), "the dtype of k_scale is float64"),
        ("v_scale", lambda t: t.repeat(2)[:3], r"the shape of v_scale is \[3\].* 1 or 2"),
        ("sm_scale", 0.0, "sm_scale is 0.0, but must be positive"),
        ("max_seq_len", -1, "max_seq_len is -1"),
        ("window", 0, "window is 0"),
        ("soft_cap", 0.0, "soft_cap is 0.0"),
        ("num_splits", 0, "num_splits is 0"),
        ("sinks", torch.zeros(5), r"the shape of sinks is \[5\].*\[6\]"),
        ("out", torch.zeros(2, 6, 32), r"the shape of out is \[2, 6, 32\].*\[2, 6, 64\]"),
        ("lse", torch.zeros(2, 6).half(), "the dtype of lse is float16.*float32"),
    ],
)
def test_wrong_arguments_are_refused(name, value, message):
    problem = make_problem([20, 3])
    if callable(value):
        value = value(problem[name])
    elif torch.is_tensor(value):
        value = value.to(DEVICE)
    with pytest.raises(KernelArgumentError, match=message):
        decode_gqa(**{**problem, name: value})


def test_pages_of_no_power_of_two_and_unaligned_rows_are_refused():
    problem = make_problem([20, 3])
    odd = {name: problem[name][:, :12] for name in ("k_cache", "v_cache")}
    with pytest.raises(KernelArgumentError, match="page_size is 12, but must be a power of two"):
        decode_gqa(**{**problem, **odd})
    for name in ("k_cache", "v_cache"):
        pages, page_size, heads, dim = problem[name].shape
        rows = torch.zeros(pages, page_size, heads, dim + 8, device=DEVICE, dtype=torch.uint8)
        rows = rows.view(torch.float8_e4m3fn)[..., :dim]
        with pytest.raises(KernelArgumentError, match=f"the strides of {name} is"):
            decode_gqa(**{**problem, name: rows})


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
def test_on_the_gpu_lengths_around_a_page(page_size, order):
    lengths = [*lengths_around(page_size), 1000, 2222]
    assert_right(make_problem(lengths, 8, 6, 128, page_size=page_size, order=order))


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [16, 64])
def test_on_the_gpu_windows_soft_caps_and_sinks(page_size):
    problem = make_problem([*lengths_around(page_size), 1000, 2222], 8, 6, 128, page_size=page_size)
    sinks = torch.randn(48, device=DEVICE) * 3
    for window in (1, 300, 5000):
        assert_right(problem, splits=(1, 4), window=window, soft_cap=20.0, sinks=sinks)


@pytest.mark.gpu
def test_on_the_gpu_the_portable_kernel(portable):
    problem = make_problem([*lengths_around(16), 1000], 8, 6, 128)
    assert_right(problem)
    assert_right(problem, (1,), window=300, soft_cap=20.0, sinks=torch.randn(48, device=DEVICE))
    for dims in ((80, 80), (192, 128), (256, 256)):
        assert_right(make_problem([500, 3], 2, 20, *dims), splits=(2,))
    for dtype in (torch.float8_e5m2, torch.float8_e4m3fnuz):
        assert_right(make_problem([500, 3], 2, 6, dtype=dtype), splits=(2,))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("k_dim", "v_dim", "group"),
    [(64, 64, 1), (80, 80, 4), (96, 64, 8), (112, 128, 24), (192, 128, 16), (256, 256, 11)],
)
def test_on_the_gpu_head_dimensions_and_groups(k_dim, v_dim, group):
    assert_right(make_problem([900, 1, 0, 130], 2, group, k_dim, v_dim), splits=(1, 3))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("k_dim", "v_dim", "group", "page_size"),
    [(128, 128, 6, 16), (64, 64, 8, 64), (80, 128, 1, 32), (192, 128, 4, 16), (256, 256, 4, 16)],
)
def test_on_the_gpu_one_sequence_and_head_for_each_multiprocessor(k_dim, v_dim, group, page_size):
    """On Hopper such a batch is not cut: several warps share a sequence, and one of them starts their copies."""
    count = torch.cuda.get_device_properties(0).multi_processor_count // 8
    lengths = [*lengths_around(page_size), 255, 256, 257, 511, 1000, 1537]
    lengths += [100 * row for row in range(max(count - len(lengths), 0))]
    problem = make_problem(lengths[:count], 8, group, k_dim, v_dim, page_size=page_size)
    assert_right(problem, splits=(None, 2))
    if k_dim == 128:
        sinks = torch.randn(8 * group, device=DEVICE) * 3
        assert_right(problem, splits=(None,), window=300, soft_cap=20.0, sinks=sinks)


@pytest.mark.gpu
def test_on_the_gpu_e5m2_in_hnd_order():
    problem = make_problem([300, 17, 0], 2, 6, 128, dtype=torch.float8_e5m2, order="HND")
    assert_right(problem)


WIDTHS = [
    (16, 16), (32, 16), (64, 16), (128, 16), (16, 32), (64, 32), (128, 32), (48, 48), (96, 48), (128, 48),
    (32, 64), (128, 64), (256, 64), (64, 96), (128, 96), (96, 128), (256, 128),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("k_dim", "v_dim"), WIDTHS)
def test_on_the_gpu_keys_and_values_of_any_widths(k_dim, v_dim, monkeypatch):
    shape = ([0, 1, 17, 300], 1 + (v_dim > 32), 4, k_dim, v_dim)
    assert_right(make_problem(*shape), splits=(1, 2))
    assert_right(make_problem(*shape, dtype=QUERY_TYPE), splits=(2,), limit=UNQUANTISED_LIMIT)
    monkeypatch.setattr(module.hopper, "supports", lambda arguments: False)
    assert_right(make_problem(*shape), splits=(2,))


@pytest.mark.gpu
def test_on_the_gpu_an_unquantised_cache():
    for dtype, limit in ((torch.bfloat16, UNQUANTISED_LIMIT), (torch.float16, FLOAT32_LIMIT)):
        for dims in ((128, 128), (256, 256), (80, 48)):
            problem = make_problem([*lengths_around(16), 1000, 2222], 8, 4, *dims, dtype=dtype)
            problem["query"] = problem["query"].to(dtype)
            assert_right(problem, splits=(1, 4, None), limit=limit)
    lengths = torch.randint(0, 1500, (64,)).tolist()
    problem = make_problem(lengths, 8, 4, 128, dtype=torch.bfloat16, page_size=1)
    assert_right(problem, splits=(None,), limit=UNQUANTISED_LIMIT)
    expected = reference_decode_gqa(**problem, out_dtype=torch.float32)
    assert relative_error(decode_gqa(**problem), expected) <= UNQUANTISED_BFLOAT16_LIMIT


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1024, 8192, 65536])
@pytest.mark.parametrize("lead", [8.0, 10.0])
def test_one_key_far_above_the_rest(tokens, lead):
    """An attention sink takes most of the weight; what is left is a sum of very small probabilities."""
    problem = make_problem([tokens, tokens - 1], 2, 6, 128, page_size=64)
    problem["k_scale"].fill_(0.05)
    query = problem["query"].float()
    slot = problem["page_table"][:, 0].long()
    direction = query.view(2, 2, 6, 128).mean(2)
    direction = direction / direction.norm(dim=-1, keepdim=True)
    needed = lead / (query.view(2, 2, 6, 128) * direction[:, :, None]).sum(-1).amin(-1)
    needed = needed * 128**0.5 / 0.05
    codes = (direction * needed[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    problem["k_cache"].view(torch.uint8)[slot, 0] = codes.view(torch.uint8)
    problem["v_cache"].view(torch.uint8)[slot, 0] = 0
    assert_right(problem)
    out = decode_gqa(**problem)
    expected = reference_decode_gqa(**problem, out_dtype=torch.float32)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, expected) <= BFLOAT16_LIMIT


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 2, 7, 64, 256])
def test_on_the_gpu_batches_and_one_scale_for_all_heads(batch):
    lengths = torch.randint(0, 1500, (batch,)).tolist()
    problem = make_problem(lengths, 8, 6, 128, per_head=False, max_seq_len=1500)
    assert_right(problem, splits=(None, 1))
    out = decode_gqa(**problem)
    expected = reference_decode_gqa(**problem, out_dtype=torch.float32)
    assert relative_error(out, expected) <= BFLOAT16_LIMIT


@pytest.mark.gpu
def test_on_the_gpu_the_longest_context():
    assert_right(make_problem([196_608, 100_001], 1, 6, 128, page_size=64), splits=(None, 256))


@pytest.mark.gpu
def test_on_the_gpu_queries_of_any_magnitude():
    problem = make_problem([700, 50], 2, 6, 128)
    problem["k_scale"].fill_(1.0)
    for magnitude in (1e-30, 1e-6, 1e4, 1e30):
        scaled = {**problem, "query": problem["query"] * magnitude, "sm_scale": 0.1 / magnitude}
        assert_right(scaled, splits=(2,))
    assert_right({**problem, "query": torch.zeros_like(problem["query"])}, splits=(1, 2))


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [8, 16])
def test_on_the_gpu_slots_beyond_two_gigabytes(page_size):
    pages, kv_heads, dim = 2**31 // (page_size * 1024) + 64, 8, 128
    shape = (pages, page_size, kv_heads, dim)
    small = make_problem([100, 31], kv_heads, 6, dim, page_size=page_size)
    used = small["k_cache"].shape[0]
    far = {"page_table": torch.where(
        (small["page_table"] >= 0) & (small["page_table"] < used),
        small["page_table"] + (pages - used), small["page_table"],
    )}  # fmt: skip
    for name in ("k_cache", "v_cache"):
        cache = torch.full(shape, POISON, dtype=torch.uint8, device=DEVICE)
        cache[pages - used :] = small[name].view(torch.uint8)
        far[name] = cache.view(torch.float8_e4m3fn)
    expected = reference_decode_gqa(**small, out_dtype=torch.float32)
    for splits in (1, 3):
        out = decode_gqa(**{**small, **far}, out_dtype=torch.float32, num_splits=splits)
        assert relative_error(out, expected) <= FLOAT32_LIMIT


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
@pytest.mark.parametrize("splits", [1, None])
def test_a_captured_graph_reads_lengths_pages_and_scales_anew(splits, dtype):
    limit = FLOAT32_LIMIT if dtype == torch.float8_e4m3fn else UNQUANTISED_LIMIT
    problem = make_problem([900, 1500, 3, 0], 8, 6, 128, max_seq_len=1500, dtype=dtype)
    other = make_problem([1, 0, 1500, 777], 8, 6, 128, max_seq_len=1500, dtype=dtype)
    pages = max(problem["k_cache"].shape[0], other["k_cache"].shape[0])
    for each in (problem, other):
        for name in ("k_cache", "v_cache"):
            used = each[name].view(torch.uint8)
            cache = torch.full((pages, *used.shape[1:]), POISON, dtype=torch.uint8, device=DEVICE)
            cache[: len(used)] = used
            each[name] = cache.view(dtype)
    out = torch.empty(4, 48, 128, device=DEVICE)
    decode_gqa(**problem, out=out, num_splits=splits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode_gqa(**problem, out=out, num_splits=splits)
    for current in (problem, other, problem):
        state = {name: value.clone() for name, value in current.items() if torch.is_tensor(value)}
        expected = reference_decode_gqa(**{**current, **state}, out_dtype=torch.float32)
        for name, value in state.items():
            as_bytes = torch.uint8 if value.dim() == 4 else value.dtype
            problem[name].view(as_bytes).copy_(value.view(as_bytes))
        out.fill_(7.0)
        graph.replay()
        assert relative_error(out, expected) <= limit


@pytest.mark.gpu
def test_a_dependent_launch_waits_for_the_kernel_in_front():
    problem = make_problem([1000] * 16, 8, 6, 128)
    query = problem["query"].clone()
    expected = reference_decode_gqa(**problem, out_dtype=torch.float32)
    for splits in (1, 4):
        for _ in range(20):
            problem["query"].zero_()
            problem["query"].copy_(query)
            out = decode_gqa(**problem, out_dtype=torch.float32, num_splits=splits)
            assert relative_error(out, expected) <= FLOAT32_LIMIT


@pytest.mark.gpu
def test_a_new_batch_or_length_is_no_new_compilation():
    on_hopper = torch.cuda.get_device_capability()[0] == 9
    kernel = (
        module.hopper.decode_gqa_kernel if on_hopper else module.portable.decode_gqa_portable_kernel
    )
    for lengths in ([400, 30], [10], [77] * 5):
        problem = make_problem(lengths, 8, 6, 128, max_seq_len=1600)
        for splits in (1, 2, 16):
            decode_gqa(**problem, num_splits=splits)
        if lengths == [400, 30]:
            compiled = sum(len(cache[0]) for cache in kernel.device_caches.values())
    assert sum(len(cache[0]) for cache in kernel.device_caches.values()) == compiled
