"""MLA decode: the portable kernel's addressing in the interpreter, and all three kernels' results on a GPU."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fp8kv.kernels import decode_mla_kernels as kernels
from fp8kv.kernels.arguments import KernelArgumentError
from fp8kv.kernels.decode_mla import decode_mla, reference_decode_mla

SM_SCALE = 192**-0.5
POISON = 0xFF  # NaN in E4M3, two of them in BF16 and FP16
ONE = 0x38  # 1.0 in E4M3
GARBAGE_PAGES = (-1, 2**31 - 1)
FLOAT32_ERROR, BFLOAT16_ERROR = 3e-4, 2.5e-3
# over an unquantised cache BF16 probabilities cost more than FP16 ones
UNQUANTISED_ERRORS = {torch.float16: (3e-4, 2.5e-3), torch.bfloat16: (2.5e-3, 4e-3)}
GPU = torch.cuda.is_available()
HEADS = {"small": 16, "large": 128, "portable": 16}
# the interpreter and every GPU without a kernel of its own
needs_no_gpu = pytest.mark.skipif(GPU, reason="the interpreter runs where there is no GPU")


@dataclass
class Problem:
    """One decode step with permuted pages, where whatever must not be read is poisoned."""

    query: Tensor
    cache: Tensor
    page_table: Tensor
    seq_lens: Tensor
    scale: Tensor

    def run(self, **options) -> Tensor:
        options = {"sm_scale": SM_SCALE, "max_seq_len": self.capacity} | options
        return decode_mla(
            self.query, self.cache, self.page_table, self.seq_lens, self.scale, **options
        )

    def reference(self, lse: Tensor | None = None) -> Tensor:
        return reference_decode_mla(
            self.query,
            self.cache,
            self.page_table,
            self.seq_lens,
            self.scale,
            sm_scale=SM_SCALE,
            max_seq_len=self.capacity,
            out_dtype=torch.float32,
            lse=lse,
        )

    @property
    def capacity(self) -> int:
        return self.page_table.shape[1] * self.cache.shape[1]


def make_problem(
    lengths: list[int],
    heads: int,
    page_size: int = 64,
    *,
    device: str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    code: torch.dtype = torch.float8_e4m3fn,
    scale: float = 0.37,
    spare_pages: int = 3,
) -> Problem:
    pages = [-(-length // page_size) for length in lengths]
    total = sum(pages) + spare_pages
    width = 576 * code.itemsize
    cache = torch.full((total, page_size, width), POISON, dtype=torch.uint8, device=device)
    order = torch.randperm(total, device=device).to(torch.int32)
    table = torch.full((len(lengths), max(pages) + 2), GARBAGE_PAGES[0], dtype=torch.int32)
    table[:, 1::2] = GARBAGE_PAGES[1]
    table = table.to(device)
    first = 0
    for row, (length, count) in enumerate(zip(lengths, pages, strict=True)):
        own = order[first : first + count]
        table[row, :count] = own
        first += count
        codes = torch.randn(count * page_size, 576, device=device).to(code).view(torch.uint8)
        codes[length:] = POISON
        cache[own.long()] = codes.view(count, page_size, width)
    query = torch.randn(len(lengths), heads, 576, device=device).to(dtype)
    # large and small rows: no power of two may be lost
    query *= 2.0 ** torch.randint(-6, 4, (len(lengths), heads, 1), device=device).to(dtype)
    return Problem(
        query,
        cache.view(code),
        table,
        torch.tensor(lengths, dtype=torch.int32, device=device),
        torch.tensor([scale], device=device),
    )


def error(found: Tensor, wanted: Tensor) -> float:
    return ((found.float() - wanted).norm() / wanted.norm()).item()


@pytest.fixture(params=["small", "large", "portable"])
def path(request, monkeypatch) -> str:
    """One of the kernels that a GPU may run; the portable one runs where Gluon is missing."""
    if request.param == "portable":
        monkeypatch.setattr(kernels, "_HAS_GLUON", False)
    elif torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("a kernel for compute capability 9")
    return request.param


def expect(problem: Problem, **options) -> None:
    """Compare output and log-sum-exp with float32 arithmetic over the dequantised cache."""
    batch, heads, _ = problem.query.shape
    lse, wanted_lse = (torch.full((batch, heads), 7.0, device=problem.query.device) for _ in "ab")
    wanted = problem.reference(wanted_lse)
    found = problem.run(out_dtype=torch.float32, lse=lse, **options)
    limits = UNQUANTISED_ERRORS.get(problem.cache.dtype, (FLOAT32_ERROR, BFLOAT16_ERROR))
    assert error(found, wanted) <= limits[0]
    torch.testing.assert_close(lse, wanted_lse, atol=2e-4, rtol=1e-5)
    # the interpreter cuts BF16 off where a GPU rounds
    dtype = torch.bfloat16 if problem.query.is_cuda else torch.float16
    rounded = problem.run(out_dtype=dtype, **options)
    assert rounded.dtype == dtype
    assert error(rounded, wanted) <= limits[1]


# --- anywhere -----------------------------------------------------------------------------------


def test_reference_is_softmax_attention_over_the_latent() -> None:
    problem = make_problem([5], 2, 4, device="cpu", dtype=torch.float32)
    rows = torch.cat([problem.cache[page] for page in problem.page_table[0, :2].tolist()]).float()[
        :5
    ]
    rows = rows * 0.37
    wanted = torch.nn.functional.scaled_dot_product_attention(
        problem.query[:, :, None], rows.expand(1, 2, 5, 576), rows[:, :512].expand(1, 2, 5, 512),
        scale=SM_SCALE,
    )  # fmt: skip
    torch.testing.assert_close(problem.reference(), wanted[:, :, 0])


@needs_no_gpu
@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
@pytest.mark.parametrize("splits", [1, 3])
def test_portable_kernel_reads_the_tokens_of_the_page_table(page_size: int, splits: int) -> None:
    lengths = [0, 1, page_size - 1, page_size, page_size + 1, 150]
    problem = make_problem(lengths, 5, page_size, device="cpu", dtype=torch.float16)
    expect(problem, num_splits=splits)


@needs_no_gpu
@pytest.mark.parametrize("code", [torch.float8_e5m2, torch.float8_e4m3fnuz])
def test_portable_kernel_reads_other_formats(code: torch.dtype) -> None:
    problem = make_problem([70], 3, device="cpu", dtype=torch.float16, code=code)
    expect(problem, num_splits=1)


@needs_no_gpu
@pytest.mark.parametrize("splits", [1, 3])
def test_an_unquantised_cache_is_read_as_it_is_and_no_scale_is_applied(splits: int) -> None:
    lengths = [0, 1, 15, 16, 17, 100]
    problem = make_problem(
        lengths, 20, 16, device="cpu", dtype=torch.float16, code=torch.float16, scale=3.0
    )
    expect(problem, num_splits=splits)


@needs_no_gpu
def test_portable_kernel_takes_more_heads_than_a_program_and_strided_views() -> None:
    problem = make_problem([90, 3], 20, 16, device="cpu", dtype=torch.float16)
    wide = torch.zeros(2, 24, 600, dtype=torch.float16)
    wide[:, 2:22, 8:584] = problem.query
    problem.query = wide[:, 2:22, 8:584]
    padded = torch.full((*problem.cache.shape[:2], 640), POISON, dtype=torch.uint8)
    padded[..., 64:] = problem.cache.view(torch.uint8)
    problem.cache = padded.view(torch.float8_e4m3fn)[..., 64:]
    expect(problem, num_splits=2)


@needs_no_gpu
@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 140), min_size=1, max_size=3),
    heads=st.integers(1, 18),
    page_bits=st.integers(0, 8),
    splits=st.integers(1, 4),
)
def test_portable_kernel_agrees_for_any_shape(
    lengths: list[int], heads: int, page_bits: int, splits: int
) -> None:
    problem = make_problem([*lengths, 9], heads, 1 << page_bits, device="cpu", dtype=torch.float16)
    expect(problem, num_splits=splits)


def test_empty_batch_gives_an_empty_result() -> None:
    problem = make_problem([4], 2, device="cpu")
    problem.query, problem.page_table = problem.query[:0], problem.page_table[:0]
    problem.seq_lens = problem.seq_lens[:0]
    assert problem.run().shape == (0, 2, 512)


@pytest.mark.parametrize(
    ("batch", "tokens", "fastest"),
    [
        (1, 1024, 16),
        (1, 8192, 128),
        (1, 32_768, 128),
        (1, 196_608, 256),
        (2, 131_072, 128),
        (4, 8192, 32),
        (4, 32_768, 32),
        (8, 8192, 16),
        (8, 32_768, 32),
        (16, 1024, 8),
        (16, 8192, 8),
        (16, 32_768, 16),
        (32, 1024, 4),
        (32, 8192, 8),
        (64, 1024, 2),
        (64, 8192, 4),
        (64, 32_768, 4),
        (100, 8192, 5),
        (128, 1024, 1),
        (128, 8192, 2),
    ],
)
def test_splits_are_those_measured_to_be_the_fastest(batch: int, tokens: int, fastest: int) -> None:
    """16 heads on 132 multiprocessors, two programs on each, tiles of 32 tokens."""
    assert kernels._count_splits(batch, tokens, 132, 32, 2, 1.75) == fastest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(2, 4, 512, dtype=torch.bfloat16)}, r"query is \[2, 4, 512\].*576"),
        ({"query": torch.zeros(2, 4, 576)}, "query is float32.*bfloat16"),
        ({"cache": torch.zeros(4, 64, 576, dtype=torch.uint8)}, "cache is uint8.*float8_e4m3fn"),
        ({"cache": torch.zeros(4, 64, 576).half()}, "cache is float16.*bfloat16 or float8_e4m3fn"),
        ({"cache": torch.zeros(4, 48, 576).to(torch.float8_e4m3fn)}, "page_size is 48.*power"),
        (
            {"cache": torch.zeros(4, 64, 584).to(torch.float8_e4m3fn)[..., :576]},
            "a token of cache is 584.*16",
        ),
        (
            {"cache": torch.zeros(4, 64, 592).to(torch.float8_e4m3fn)[..., 8:584]},
            "first row of cache is 8.*16",
        ),
        ({"page_table": torch.zeros(2, 3, dtype=torch.int64)}, "page_table is int64.*int32"),
        ({"page_table": torch.zeros(3, 3, dtype=torch.int32)}, r"page_table is \[3, 3\].*2, any"),
        ({"seq_lens": torch.zeros(3, dtype=torch.int32)}, r"seq_lens is \[3\].*\[2\]"),
        ({"scale": torch.ones(2)}, r"scale is \[2\].*1 elements"),
        ({"scale": 0.5}, "scale is a float.*tensor"),
        ({"scale": torch.ones(1, dtype=torch.float64)}, "scale is float64.*float32"),
    ],
)
def test_bad_tensors_are_refused_by_name(change: dict[str, object], message: str) -> None:
    problem = make_problem([4, 5], 4, device="cpu")
    for name, value in change.items():
        setattr(problem, name, value)
    with pytest.raises(KernelArgumentError, match=message):
        problem.run()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": torch.zeros(2, 4, 576)}, r"out is \[2, 4, 576\].*2, 4, 512"),
        ({"out": torch.zeros(2, 4, 512), "out_dtype": torch.bfloat16}, "out is float32.*bfloat16"),
        ({"out_dtype": torch.int8}, "out is int8.*float32"),
        ({"lse": torch.zeros(2, 5)}, r"lse is \[2, 5\].*2, 4"),
        ({"num_splits": 0}, "num_splits is 0.*at least 1"),
        ({"max_seq_len": -1}, "max_seq_len is -1.*0 or more"),
        ({"sm_scale": 0.0}, "sm_scale is 0.0.*positive"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, object], message: str) -> None:
    with pytest.raises(KernelArgumentError, match=message):
        make_problem([4, 5], 4, device="cpu").run(**options)


# --- on a GPU -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
@pytest.mark.parametrize("splits", [1, 3, None])
def test_ragged_lengths_and_permuted_pages(path: str, page_size: int, splits: int | None) -> None:
    edges = [0, 1, page_size - 1, page_size, page_size + 1]
    problem = make_problem([*edges, 31, 32, 33, 127, 1000, 2500], HEADS[path], page_size)
    expect(problem, num_splits=splits)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [1, 8, 12, 17, 32, 33, 64, 100])
def test_any_number_of_heads(heads: int) -> None:
    expect(make_problem([300, 70], heads))
    expect(make_problem([300, 70], heads, dtype=torch.float16), num_splits=2)


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 2, 7, 64, 256])
def test_batches(path: str, batch: int) -> None:
    lengths = [1 + 37 * row % 700 for row in range(batch)]
    expect(make_problem(lengths, HEADS[path]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [16, 40, 128])
def test_an_unquantised_cache(heads: int, dtype: torch.dtype) -> None:
    lengths = [0, 1, 15, 16, 17, 63, 64, 65, 1000, 2500]
    problem = make_problem(lengths, heads, 16, dtype=dtype, code=dtype)
    for splits in (1, 3, None):
        expect(problem, num_splits=splits)
    problem.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = problem.run()
    problem.seq_lens.copy_(problem.seq_lens.flip(0).minimum(problem.seq_lens))
    graph.replay()
    assert error(out, problem.reference()) <= UNQUANTISED_ERRORS[dtype][1]
    expect(make_problem([1 + 37 * row % 700 for row in range(64)], heads, dtype=dtype, code=dtype))


@pytest.mark.gpu
def test_long_context(path: str) -> None:
    expect(make_problem([196_608], HEADS[path]))


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1024, 8192, 65_536])
@pytest.mark.parametrize("gap", [8.0, 10.0])
def test_attention_sink(path: str, length: int, gap: float) -> None:
    """One key has a logit far above the rest and a value of 0: what is left is the rounding of P."""
    problem = make_problem([length], HEADS[path], scale=1.0)
    problem.query.zero_()
    problem.query[..., :512] = torch.randn_like(problem.query[..., :512]) * 0.05
    problem.query[..., 512] = gap / SM_SCALE
    codes = problem.cache.view(torch.uint8)
    own = problem.page_table[0, : length // 64].long()
    rows = codes[own]
    rows[:, :, 512:] = 0
    rows[0, 0, :512] = 0
    rows[0, 0, 512] = ONE
    codes[own] = rows
    expect(problem)


@pytest.mark.gpu
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 900), min_size=1, max_size=5),
    heads=st.integers(1, 128),
    page_bits=st.integers(0, 8),
    splits=st.none() | st.integers(1, 7),
)
def test_any_shape(lengths: list[int], heads: int, page_bits: int, splits: int | None) -> None:
    expect(make_problem([*lengths, 9], heads, 1 << page_bits), num_splits=splits)


@pytest.mark.gpu
def test_many_splits_of_few_tokens(path: str) -> None:
    expect(make_problem([70, 3, 0, 200], HEADS[path], 16), num_splits=9)


@pytest.mark.gpu
def test_e5m2(path: str) -> None:
    expect(make_problem([300, 65], HEADS[path], code=torch.float8_e5m2))


@pytest.mark.gpu
def test_slots_beyond_two_to_the_31_bytes(path: str) -> None:
    problem = make_problem([1000, 200], HEADS[path])
    far = 2**31 // (64 * 576) + 5
    cache = torch.empty(far + problem.cache.shape[0], 64, 576, dtype=torch.uint8, device="cuda")
    cache[far:] = problem.cache.view(torch.uint8)
    wanted = problem.reference()
    used = (problem.page_table >= 0) & (problem.page_table < problem.cache.shape[0])
    problem.page_table[used] += far
    problem.cache = cache.view(torch.float8_e4m3fn)
    assert error(problem.run(out_dtype=torch.float32), wanted) <= FLOAT32_ERROR


@pytest.mark.gpu
def test_strided_views_and_untouched_neighbours(path: str) -> None:
    heads = HEADS[path]
    problem = make_problem([500, 64], heads, 16)
    wide = torch.zeros(2, heads + 4, 640, dtype=torch.bfloat16, device="cuda")
    wide[:, 2:-2, 8:584] = problem.query
    problem.query = wide[:, 2:-2, 8:584]
    padded = torch.full((*problem.cache.shape[:2], 640), POISON, dtype=torch.uint8, device="cuda")
    padded[..., 64:] = problem.cache.view(torch.uint8)
    problem.cache = padded.view(torch.float8_e4m3fn)[..., 64:]
    wanted = problem.reference()
    before = padded.clone()
    for splits in (1, 4):
        out = torch.full((2, heads + 2, 520), 5.0, device="cuda")
        lse = torch.full((2, heads, 3), 5.0, device="cuda")
        result = out[:, 1:-1, 4:516]
        assert problem.run(out=result, lse=lse[..., 1], num_splits=splits) is result
        assert error(result, wanted) <= FLOAT32_ERROR
        assert (lse[..., ::2] == 5.0).all()
        result.fill_(5.0)
        assert (out == 5.0).all()
    assert torch.equal(before, padded)


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 4])
def test_graph_replay_sees_new_lengths_pages_and_scales(path: str, splits: int) -> None:
    problem = make_problem([700, 64, 0], HEADS[path])
    out = torch.empty(3, HEADS[path], 512, device="cuda")
    lse = torch.empty(3, HEADS[path], device="cuda")
    options = {"out": out, "lse": lse, "num_splits": splits}
    problem.run(**options)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        problem.run(**options)
    problem.seq_lens.copy_(torch.tensor([65, 0, 700]))
    problem.page_table.copy_(problem.page_table[[0, 1, 0]].clone())
    problem.scale.fill_(1.75)
    wanted_lse = torch.empty_like(lse)
    wanted = problem.reference(wanted_lse)
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        assert error(out, wanted) <= FLOAT32_ERROR
        torch.testing.assert_close(lse, wanted_lse, atol=2e-4, rtol=1e-5)


@pytest.mark.gpu
def test_without_pdl_the_result_is_the_same(path: str) -> None:
    problem = make_problem([3000, 100], HEADS[path])
    assert torch.equal(problem.run(num_splits=5, pdl=False), problem.run(num_splits=5, pdl=True))
