"""Stage 2 of split decode: the splits' results come together as if the sequence had never been cut."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8kv.kernels.arguments import KernelArgumentError
from fp8kv.kernels.combine import combine, reference_combine

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEG_INF = -math.inf


def on_device(tensor):
    """Return a copy on the device that keeps its strides, which a plain move does not."""
    whole = tensor if tensor._base is None else tensor._base
    place = (tensor.shape, tensor.stride(), tensor.storage_offset())
    return whole.to(DEVICE).as_strided(*place)


def make_partials(batch, heads, splits, dim, *, spread=4.0):
    """Return partial outputs and logarithms; some splits are empty and hold NaN, and so does a whole sequence."""
    partial_out = torch.randn(batch, heads, splits, dim, device=DEVICE)
    partial_lse = torch.randn(batch, heads, splits, device=DEVICE) * spread
    empty = torch.rand(batch, 1, splits, device=DEVICE).expand(-1, heads, -1) < 0.3
    if batch > 1:
        empty = empty.clone()
        empty[0] = True
    return (
        partial_out.masked_fill(empty[..., None], math.nan),
        partial_lse.masked_fill(empty, NEG_INF),
    )


def run_both(partial_out, partial_lse, sinks=None, dtype=torch.float32):
    results = []
    for function in (combine, reference_combine):
        out = torch.full_like(partial_out[:, :, 0], 7.0, dtype=dtype)
        lse = torch.full_like(partial_lse[:, :, 0], 7.0)
        function(partial_out, partial_lse, out, lse, sinks)
        results += [out, lse]
    return results


@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize(
    ("batch", "heads", "splits", "dim"),
    [(2, 3, 1, 64), (1, 5, 7, 80), (3, 2, 130, 128), (2, 1, 256, 512), (1, 2, 300, 96)],
)
def test_splits_come_together(batch, heads, splits, dim, with_sinks):
    partials = make_partials(batch, heads, splits, dim)
    sinks = torch.randn(heads, device=DEVICE) * 3 if with_sinks else None
    out, lse, expected_out, expected_lse = run_both(*partials, sinks)
    torch.testing.assert_close(out, expected_out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)


def test_cutting_a_sequence_changes_nothing():
    scores = torch.randn(1, 1, 60, device=DEVICE) * 3
    values = torch.randn(60, 64, device=DEVICE)
    parts = [(scores[..., s : s + 12], values[s : s + 12]) for s in range(0, 60, 12)]
    partial_out = torch.stack([part.softmax(-1) @ rows for part, rows in parts], dim=2)
    partial_lse = torch.stack([part.logsumexp(-1) / math.log(2) for part, _ in parts], dim=2)
    out = torch.empty(1, 1, 64, device=DEVICE)
    lse = torch.empty(1, 1, device=DEVICE)
    combine(partial_out, partial_lse, out, lse)
    torch.testing.assert_close(out, scores.softmax(-1) @ values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, scores.logsumexp(-1), atol=1e-5, rtol=1e-5)


def test_the_largest_logarithm_may_come_last():
    partial_out = torch.randn(1, 2, 300, 64, device=DEVICE)
    partial_lse = torch.linspace(-8, 8, 300, device=DEVICE).expand(1, 2, 300).contiguous()
    out, lse, expected_out, expected_lse = run_both(partial_out, partial_lse)
    torch.testing.assert_close(out, expected_out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)


def test_a_sequence_without_tokens_is_zero_and_its_logarithm_that_of_the_sink():
    partial_out = torch.full((1, 2, 3, 64), math.nan, device=DEVICE)
    partial_lse = torch.full((1, 2, 3), NEG_INF, device=DEVICE)
    out = torch.empty(1, 2, 64, device=DEVICE)
    lse = torch.empty(1, 2, device=DEVICE)
    combine(partial_out, partial_lse, out, lse)
    assert torch.equal(out, torch.zeros_like(out))
    assert lse.tolist() == [[NEG_INF, NEG_INF]]
    combine(partial_out, partial_lse, out, lse, torch.tensor([1.5, NEG_INF], device=DEVICE))
    assert torch.equal(out, torch.zeros_like(out))
    assert lse.tolist() == [[1.5, NEG_INF]]


def test_large_logarithms_neither_overflow_nor_vanish():
    partial_out, partial_lse = make_partials(1, 2, 9, 64, spread=4000.0)
    out, lse, expected_out, expected_lse = run_both(partial_out, partial_lse)
    torch.testing.assert_close(out, expected_out, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lse, expected_lse, atol=1e-2, rtol=1e-5)


def test_strided_outputs_are_filled_and_their_neighbours_left_alone():
    partials = make_partials(2, 4, 5, 64)
    wide = torch.full((2, 4, 80), 7.0, device=DEVICE)
    lse = torch.full((4, 2), 7.0, device=DEVICE)
    combine(*partials, wide[..., :64], lse.T)
    expected = torch.empty(2, 4, 64, device=DEVICE)
    expected_lse = torch.empty(2, 4, device=DEVICE)
    reference_combine(*partials, expected, expected_lse)
    torch.testing.assert_close(wide[..., :64], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.T, expected_lse, atol=1e-5, rtol=1e-5)
    assert (wide[..., 64:] == 7.0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_dtypes_are_rounded_once(dtype):
    partials = make_partials(3, 8, 20, 128)
    out, _, expected, _ = run_both(*partials, dtype=dtype)
    step = torch.finfo(dtype).eps
    assert ((out - expected).abs() <= step * expected.abs() + 1e-5).all()


@pytest.mark.gpu
def test_as_a_dependent_launch_it_waits_for_the_kernel_in_front():
    torch.manual_seed(1)
    batch, heads, splits, dim = 64, 48, 8, 128
    final_out, final_lse = make_partials(batch, heads, splits, dim)
    partial_out, partial_lse = torch.empty_like(final_out), torch.empty_like(final_lse)
    expected = torch.empty(batch, heads, dim, device=DEVICE)
    reference_combine(final_out, final_lse, expected)
    out = torch.empty_like(expected)
    for _ in range(20):
        partial_out.fill_(0.0)
        partial_lse.copy_(final_lse)
        partial_out.copy_(final_out)
        combine(partial_out, partial_lse, out, pdl=True)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 5),
    splits=st.integers(1, 140),
    dim=st.integers(1, 40).map(lambda n: 8 * n),
)
@settings(max_examples=15, deadline=None)
def test_any_shape_comes_together(batch, heads, splits, dim):
    out, lse, expected_out, expected_lse = run_both(*make_partials(batch, heads, splits, dim))
    torch.testing.assert_close(out, expected_out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("partial_out", torch.zeros(2, 4, 5, 64).double(), "the dtype of partial_out is float64"),
        ("partial_out", torch.zeros(2, 4, 64), r"the shape of partial_out is \[2, 4, 64\]"),
        ("partial_out", torch.zeros(2, 4, 5, 128)[..., ::2], "partial_out is strided"),
        ("partial_lse", torch.zeros(2, 4, 6), r"partial_lse is \[2, 4, 6\].*\[2, 4, 5\]"),
        ("out", torch.zeros(2, 4, 32), r"the shape of out is \[2, 4, 32\].*\[2, 4, 64\]"),
        ("out", torch.zeros(2, 4, 128)[..., ::2], "the last stride of out is 2, but must be 1"),
        ("out", torch.zeros(2, 4, 64).int(), "the dtype of out is int32"),
        ("lse", torch.zeros(2, 5), r"the shape of lse is \[2, 5\].*\[2, 4\]"),
        ("lse", torch.zeros(2, 4).half(), "the dtype of lse is float16, but must be float32"),
        ("sinks", torch.zeros(3), r"the shape of sinks is \[3\].*\[4\]"),
    ],
)
def test_wrong_arguments_are_refused(name, value, message):
    arguments = {
        "partial_out": torch.zeros(2, 4, 5, 64, device=DEVICE),
        "partial_lse": torch.zeros(2, 4, 5, device=DEVICE),
        "out": torch.zeros(2, 4, 64, device=DEVICE),
        name: on_device(value),
    }
    with pytest.raises(KernelArgumentError, match=message):
        combine(**arguments)
