"""The Hopper kernel of MLA decode for 33 to 128 heads: numbers against float32 attention over the dequantised cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fp8kv.kernels.combine import combine
from fp8kv.kernels.hopper import decode_mla_large as large

LATENT, ROPE = 512, 64
WIDTH = LATENT + ROPE
NAN_CODE = 0x7F
SM_SCALE = 1 / math.sqrt(192)

gpu = pytest.mark.gpu
hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs compute capability 9.x",
)


@dataclass
class Problem:
    """Queries and a paged cache whose every byte that belongs to no token is a NaN."""

    query: Tensor
    cache: Tensor
    page_table: Tensor
    seq_lens: Tensor
    scale: Tensor
    sm_scale: float = SM_SCALE

    def run(self, splits: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp of the kernel, its partial results put together."""
        batch, heads, _ = self.query.shape
        device = self.query.device
        out = torch.full((batch, heads, LATENT), math.nan, dtype=dtype, device=device)
        lse = torch.full((batch, heads), math.nan, device=device)
        result, log_sum = out[:, :, None], lse[:, :, None]
        if splits > 1:
            result = torch.full((batch, heads, splits, LATENT), math.nan, device=device)
            log_sum = torch.full((batch, heads, splits), math.nan, device=device)
        large.launch_decode_mla_large(
            self.query,
            self.cache,
            self.page_table,
            self.seq_lens,
            self.scale,
            sm_scale=self.sm_scale,
            num_splits=splits,
            result=result,
            log_sum=log_sum,
            pdl=False,
        )
        if splits > 1:
            combine(result, log_sum, out, lse)
        return out, lse

    def reference(self) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp in float64 over the dequantised cache."""
        batch, heads, _ = self.query.shape
        page_size = self.cache.shape[1]
        out = self.query.new_zeros(batch, heads, LATENT, dtype=torch.float64)
        lse = self.query.new_full((batch, heads), -math.inf, dtype=torch.float64)
        for row, length in enumerate(self.seq_lens.tolist()):
            if length == 0:
                continue
            pages = self.page_table[row, : -(-length // page_size)].long()
            tokens = self.cache[pages].reshape(-1, self.cache.shape[-1])[:length]
            tokens = tokens.double() * self.scale.double()
            scores = self.query[row].double() @ tokens.T * self.sm_scale
            lse[row] = scores.logsumexp(-1)
            out[row] = scores.softmax(-1) @ tokens[:, :LATENT]
        return out, lse


def make_problem(
    lengths: Sequence[int],
    heads: int,
    page_size: int = 64,
    *,
    dtype: torch.dtype = torch.bfloat16,
    codes_dtype: torch.dtype = torch.float8_e4m3fn,
) -> Problem:
    """Make a problem with permuted pages, NaN codes after every sequence's end and garbage table entries."""
    device = torch.device("cuda")
    used = [-(-length // page_size) for length in lengths]
    total = sum(used) + 2
    values = torch.randn(total, page_size, WIDTH, device=device)
    cache = values.to(codes_dtype)
    order = torch.randperm(total, device=device).to(torch.int32)
    table = torch.full((len(lengths), max(used) + 2), -7_777_777, dtype=torch.int32, device=device)
    codes = cache.view(torch.uint8)
    first = 0
    for row, (length, pages) in enumerate(zip(lengths, used, strict=True)):
        table[row, :pages] = order[first : first + pages]
        first += pages
        if length % page_size:
            codes[order[first - 1], length % page_size :] = NAN_CODE
    codes[order[first:].long()] = NAN_CODE
    query = torch.randn(len(lengths), heads, WIDTH, device=device).to(dtype)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=device)
    return Problem(query, cache, table, seq_lens, torch.tensor([0.37], device=device))


def assert_close(problem: Problem, splits: int, dtype: torch.dtype = torch.float32) -> None:
    """Compare every sequence on its own, so that a long one cannot hide a short one."""
    out, lse = problem.run(splits, dtype)
    wanted, wanted_lse = problem.reference()
    limit = 3e-4 if dtype == torch.float32 else 2.5e-3
    for row, length in enumerate(problem.seq_lens.tolist()):
        error = (out[row].double() - wanted[row]).norm()
        assert error <= limit * wanted[row].norm(), f"sequence {row} of {length} tokens"
    torch.testing.assert_close(lse.double(), wanted_lse, atol=2e-4, rtol=1e-5)


LENGTHS = [0, 1, 63, 64, 65, 127, 128, 1000]


@gpu
@hopper
@pytest.mark.parametrize("splits", [1, 2, 7])
@pytest.mark.parametrize("heads", [33, 40, 64, 100, 128])
def test_it_equals_float32_attention(heads: int, splits: int) -> None:
    assert_close(make_problem(LENGTHS, heads), splits)


@gpu
@hopper
@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
def test_pages_may_have_any_power_of_two(page_size: int) -> None:
    lengths = [0, 1, page_size - 1, page_size, page_size + 1, 777]
    assert_close(make_problem(lengths, 64, page_size), 3)


@gpu
@hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("splits", [1, 4])
def test_queries_and_outputs_may_have_half_precision(dtype: torch.dtype, splits: int) -> None:
    assert_close(make_problem([500, 70], 64, dtype=dtype), splits, dtype)


@gpu
@hopper
def test_codes_may_be_e5m2() -> None:
    assert_close(make_problem([500, 70, 0], 64, codes_dtype=torch.float8_e5m2), 2)


@gpu
@hopper
@pytest.mark.parametrize("gain", [1e-30, 1e-4, 8.0, 1e4])
def test_large_and_small_queries_lose_no_bits(gain: float) -> None:
    problem = make_problem([300], 64)
    problem.query *= gain
    problem.sm_scale = SM_SCALE / gain
    assert_close(problem, 2)


@gpu
@hopper
@pytest.mark.parametrize("length", [1024, 8192, 65536])
def test_an_attention_sink_costs_no_accuracy(length: int) -> None:
    """One key stands 9 logits above the rest, at the start, where the running maximum meets it last or first."""
    problem = make_problem([length, length - 30], 64)
    codes = problem.cache.view(torch.uint8)
    page = problem.page_table[:, 0].long()
    codes[page, 3, LATENT:] = 0
    codes[page, 3, WIDTH - 1] = torch.tensor(256.0).to(torch.float8_e4m3fn).view(torch.uint8).item()
    problem.query[..., WIDTH - 1] = 9 / (256 * 0.37 * SM_SCALE)
    assert_close(problem, 1)
    assert_close(problem, 5)


@gpu
@hopper
def test_long_contexts_and_many_splits() -> None:
    assert_close(make_problem([196_608, 5, 0], 128), 44)


@gpu
@hopper
def test_batches_of_many_sequences() -> None:
    lengths = torch.randint(0, 700, (256,)).tolist()
    assert_close(make_problem(lengths, 64, 16), 1)


@gpu
@hopper
def test_strided_caches_queries_and_outputs() -> None:
    problem = make_problem([200, 90], 48)
    pages, page_size, _ = problem.cache.shape
    wide = torch.full((pages, page_size, 640), NAN_CODE, dtype=torch.uint8, device="cuda")
    wide[..., :WIDTH] = problem.cache.view(torch.uint8)
    problem.cache = wide.view(torch.float8_e4m3fn)[..., :WIDTH]
    problem.query = problem.query.transpose(0, 1).contiguous().transpose(0, 1)
    assert_close(problem, 2)


@gpu
@hopper
def test_slots_beyond_two_gigabytes() -> None:
    pages = 2**31 // (64 * WIDTH) + 10
    problem = make_problem([100], 64)
    used = problem.page_table[0, :2].long()
    cache = torch.empty(pages, 64, WIDTH, dtype=torch.float8_e4m3fn, device="cuda")
    cache.view(torch.uint8)[-2:] = problem.cache.view(torch.uint8)[used]
    problem.cache = cache
    problem.page_table[0, :2] = torch.tensor([pages - 2, pages - 1], dtype=torch.int32)
    assert_close(problem, 1)


@gpu
@hopper
@pytest.mark.parametrize("splits", [1, 3])
def test_a_graph_replays_with_new_lengths_pages_and_scale(splits: int) -> None:
    problem = make_problem([400, 64, 1], 64)
    problem.run(splits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = problem.run(splits)
    problem.seq_lens.copy_(torch.tensor([65, 0, 1], dtype=torch.int32))
    problem.scale.fill_(0.05)
    graph.replay()
    wanted, wanted_lse = problem.reference()
    torch.testing.assert_close(
        out.double(), wanted, atol=3e-4 * wanted.abs().max().item(), rtol=3e-3
    )
    torch.testing.assert_close(lse.double(), wanted_lse, atol=2e-4, rtol=1e-5)


@gpu
@hopper
def test_nothing_beside_the_output_is_written() -> None:
    problem = make_problem([70, 0], 40)
    room = torch.full((4, 44, LATENT + 8), 5.0, device="cuda")
    out = room[1:3, 2:42, :LATENT]
    large.launch_decode_mla_large(
        problem.query,
        problem.cache,
        problem.page_table,
        problem.seq_lens,
        problem.scale,
        sm_scale=SM_SCALE,
        num_splits=1,
        result=out[:, :, None],
        log_sum=None,
        pdl=False,
    )
    assert not (out == 5.0).any()
    out.fill_(5.0)
    assert (room == 5.0).all()
