"""The histogram counts exactly: judged against a bisection over edges that are computed here."""

import bisect
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8kv.calibrate.histogram import (
    BINS_PER_OCTAVE,
    FIRST_EXPONENT,
    LAST_EXPONENT,
    NUM_BINS,
    bin_edges,
    count_magnitudes,
)

EDGES = [
    0.0,
    *(
        math.ldexp(1 + step / 16, exponent)
        for exponent in range(FIRST_EXPONENT, LAST_EXPONENT)
        for step in range(16)
    ),
    2.0**LAST_EXPONENT,
    2.0**128,
]
SMALLEST_COUNTED = 2.0**-130

bit_patterns = st.integers(-(2**31), 2**31 - 1)
near_an_edge = st.builds(
    lambda edge, ulps: int(np.float32(edge).view(np.int32)) + ulps,
    st.sampled_from([SMALLEST_COUNTED, *EDGES[1:-1]]),
    st.integers(-1, 1),
)


def counted(values):
    """Count ``[heads, n]`` values; return what is not zero as ``[{bin: count}, ...]``, zeros and non-finite ones."""
    counts = count_magnitudes(values.abs()[None, :, :, None])
    assert counts.histogram.shape == (values.shape[0], NUM_BINS)
    assert counts.histogram.dtype == counts.zeros.dtype == counts.nonfinite.dtype == torch.int64
    bins = [{i: int(row[i]) for i in row.nonzero().flatten().tolist()} for row in counts.histogram]
    return bins, counts.zeros.tolist(), counts.nonfinite.tolist()


def brute_force(values):
    """Do the same, one value at a time."""
    bins, zeros, nonfinite = [], [], []
    for row in values.abs().double().tolist():
        finite = [x for x in row if math.isfinite(x)]
        nonfinite.append(len(row) - len(finite))
        kept = [x for x in finite if x >= SMALLEST_COUNTED]
        zeros.append(len(finite) - len(kept))
        found = {}
        for x in kept:
            index = bisect.bisect_right(EDGES, x) - 1
            found[index] = found.get(index, 0) + 1
        bins.append(dict(sorted(found.items())))
    return bins, zeros, nonfinite


def from_bits(patterns):
    return torch.tensor(patterns, dtype=torch.int32).view(torch.float32)


def same(a, b):
    return all(
        torch.equal(getattr(a, field), getattr(b, field))
        for field in ("histogram", "zeros", "nonfinite")
    )


def test_the_edges_divide_every_octave_evenly_and_reach_from_zero_to_the_end_of_float32():
    edges = bin_edges()
    assert BINS_PER_OCTAVE == 16
    assert edges.dtype == torch.float64
    assert edges.tolist() == EDGES
    assert len(edges) == NUM_BINS + 1
    assert bool((edges.diff() > 0).all())


def test_the_octaves_cover_every_code_of_every_format_at_any_sensible_scale():
    assert (
        2.0**FIRST_EXPONENT <= 2.0**-16 * 2.0**-16
    )  # e5m2's smallest subnormal at a scale of 2**-16
    assert 2.0**LAST_EXPONENT >= 57344 * 256


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_pattern_is_counted_where_it_belongs(dtype):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    values = patterns.view(1, -1)
    assert counted(values) == brute_force(values)


@given(st.lists(st.one_of(bit_patterns, near_an_edge), min_size=1, max_size=60))
def test_any_float32_is_counted_where_it_belongs(patterns):
    values = from_bits(patterns).view(1, -1)
    assert counted(values) == brute_force(values)


def test_every_edge_opens_its_bin_and_what_is_just_below_belongs_to_the_one_before():
    edges = torch.tensor(EDGES[1:-1])
    below = torch.nextafter(edges, torch.tensor(0.0))
    assert list(counted(edges[None])[0][0]) == list(range(1, NUM_BINS))
    assert list(counted(below[None])[0][0]) == list(range(NUM_BINS - 1))


@pytest.mark.parametrize(
    ("value", "bins", "zeros", "nonfinite"),
    [
        (0.0, {}, 1, 0),
        (-0.0, {}, 1, 0),
        (1e-45, {}, 1, 0),
        (2.0**-131, {}, 1, 0),
        (2.0**-130, {0: 1}, 0, 0),
        (2.0**-33, {0: 1}, 0, 0),
        (2.0**-32, {1: 1}, 0, 0),
        (2.0**24, {NUM_BINS - 1: 1}, 0, 0),
        (3.4e38, {NUM_BINS - 1: 1}, 0, 0),
        (math.inf, {}, 0, 1),
        (-math.inf, {}, 0, 1),
        (math.nan, {}, 0, 1),
    ],
)
def test_the_ends_of_the_range(value, bins, zeros, nonfinite):
    assert counted(torch.tensor([[value]])) == ([bins], [zeros], [nonfinite])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("count", [1, 67], ids=["scalar", "vector"])
def test_a_negative_nan_is_one_value_that_is_not_finite(dtype, count):
    bits = torch.full((1, count), -1, dtype=torch.int32 if dtype == torch.float32 else torch.int16)
    assert counted(bits.view(dtype)) == ([{}], [0], [count])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_each_head_is_counted_alone(dtype):
    values = torch.tensor([[1.0, 1.0, 1.0], [0.0, 2.0, math.nan], [3e4, -3e4, 1.0]], dtype=dtype)
    assert counted(values) == brute_force(values)
    one = 1 + 32 * 16
    assert counted(values)[0] == [{one: 3}, {one + 16: 1}, brute_force(values)[0][2]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_batch_tokens_and_width_only_add_up(dtype):
    values = torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    flat = values.transpose(0, 1).reshape(3, -1)
    counts = count_magnitudes(values.abs())
    assert counts.histogram.sum().item() == values.numel()
    assert same(counts, count_magnitudes(flat.abs()[None, :, :, None]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(2, 3),
        lambda x: x[:, ::2, 1:, ::3],
        lambda x: x[:1].expand(4, -1, -1, -1),
        lambda x: x.flip(3),
    ],
    ids=["transposed", "sliced", "expanded", "flipped"],
)
def test_strided_views_are_counted_as_their_contiguous_copies(dtype, view):
    values = torch.randn(2, 4, 6, 8, generator=torch.Generator().manual_seed(2)).abs().to(dtype)
    before = values.clone()
    assert same(count_magnitudes(view(values)), count_magnitudes(view(values).contiguous()))
    assert torch.equal(values, before)


@given(st.lists(st.integers(-(2**15), 2**15 - 1), min_size=1))
def test_a_bfloat16_number_is_counted_like_the_same_number_in_float32(patterns):
    values = torch.tensor(patterns, dtype=torch.int16).view(torch.bfloat16)[None]
    assert counted(values) == counted(values.float())


@given(st.lists(bit_patterns, max_size=40), st.integers(1, 3))
def test_every_value_is_counted_once(patterns, num_heads):
    values = from_bits(patterns).abs().expand(num_heads, -1)[None, :, :, None]
    counts = count_magnitudes(values)
    total = counts.histogram.sum(1) + counts.zeros + counts.nonfinite
    assert total.tolist() == [len(patterns)] * num_heads


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gpu_counts_what_the_cpu_counts(dtype):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = patterns.view(torch.float16 if dtype == torch.float16 else torch.bfloat16).to(dtype)
    values = values.abs().view(1, 4, -1, 8)
    on_gpu = count_magnitudes(values.cuda())
    on_cpu = count_magnitudes(values)
    for field in ("histogram", "zeros", "nonfinite"):
        assert getattr(on_gpu, field).is_cuda
        assert torch.equal(getattr(on_gpu, field).cpu(), getattr(on_cpu, field)), field
