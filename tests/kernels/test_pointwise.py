"""The norm and the gated activation are those of transformers, rounded where it rounds.

Without a GPU the kernels run in Triton's interpreter, on float32 and float16, whose arithmetic is right there.
"""

import pytest
import torch

from fp8kv.kernels.arguments import KernelArgumentError
from fp8kv.kernels.pointwise import reference_rms_norm, reference_silu_mul, rms_norm, silu_mul

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
# two roundings
ROUNDING = {torch.float32: 2e-6, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


def assert_same(found, expected):
    """Nearly all numbers are equal, and the others differ by rounding."""
    assert found.dtype == expected.dtype
    bound = ROUNDING[found.dtype]
    torch.testing.assert_close(found, expected, rtol=bound, atol=bound * 1e-3)
    if found.dtype != torch.float32:
        assert (found == expected).float().mean() > 0.98


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "dim"), [(1, 1, 64), (3, 5, 16), (67, 1, 100), (2, 1, 4096), (5, 1, 1500)]
)
def test_rows_are_divided_by_their_root_mean_square(tokens, heads, dim, offset, dtype):
    x, weight = randn(tokens, heads, dim, dtype=dtype), randn(dim, dtype=dtype)
    expected = reference_rms_norm(x, weight, 1e-5, offset=offset)
    assert_same(rms_norm(x, weight, 1e-5, offset=offset), expected)


def test_the_epsilon_is_added_to_the_mean_square():
    x, weight = randn(3, 1, 64) * 1e-3, randn(64)
    result = rms_norm(x, weight, 1e-5)
    assert_same(result, reference_rms_norm(x, weight, 1e-5))
    assert not torch.allclose(result, reference_rms_norm(x, weight, 2e-5), rtol=0.05)


def test_heads_may_be_columns_of_a_wider_tensor():
    wide = randn(7, 3 * 32 + 16)
    x, weight = wide[:, 16:].unflatten(1, (3, 32)), randn(32)
    before = wide.clone()
    assert_same(rms_norm(x, weight, 1e-6), reference_rms_norm(x, weight, 1e-6))
    swapped = x.transpose(0, 1)
    result = rms_norm(swapped, weight, 1e-6)
    assert_same(result, reference_rms_norm(swapped, weight, 1e-6))
    assert result.is_contiguous()
    assert torch.equal(wide, before)


def test_a_row_of_nan_stays_in_its_row():
    x, weight = randn(6, 1, 48), randn(48)
    x[2, 0, 5] = float("nan")
    is_nan = rms_norm(x, weight, 1e-6).isnan().all(-1)[:, 0]
    assert is_nan.tolist() == [False, False, True, False, False, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (5, 100), (3, 1024), (2, 2500)])
def test_the_gate_passes_through_silu(rows, width, dtype):
    gate_up = randn(rows, 2 * width, dtype=dtype) * 4
    assert_same(silu_mul(gate_up), reference_silu_mul(gate_up))


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
def test_a_gate_of_any_size_passes():
    gate = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4], device=DEVICE)
    gate_up = torch.cat([gate, torch.ones_like(gate)])[None]
    assert_same(silu_mul(gate_up), reference_silu_mul(gate_up))


def test_rows_of_gate_and_up_may_lie_apart():
    wide = randn(4, 40)
    assert_same(silu_mul(wide[:, 8:]), reference_silu_mul(wide[:, 8:]))


def test_nothing_gives_nothing():
    assert rms_norm(randn(0, 2, 16), randn(16), 1e-6).shape == (0, 2, 16)
    assert silu_mul(randn(0, 16)).shape == (0, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rms_norm(randn(2, 16), randn(16), 1e-6), "shape of x"),
        (lambda: rms_norm(randn(2, 1, 16), randn(8), 1e-6), "shape of weight"),
        (lambda: rms_norm(randn(2, 1, 16), randn(16).half(), 1e-6), "dtype of weight"),
        (lambda: rms_norm(randn(2, 1, 16).double(), randn(16), 1e-6), "dtype of x"),
        (lambda: rms_norm(randn(2, 16, 1).transpose(1, 2), randn(16), 1e-6), None),
        (lambda: rms_norm(randn(2, 16, 3).transpose(1, 2), randn(16), 1e-6), "last stride of x"),
        (lambda: rms_norm(randn(2, 1, 32)[..., ::2], randn(16), 1e-6), "last stride of x"),
        (lambda: rms_norm(randn(1, 1, 16400), randn(16400), 1e-6), "width of x"),
        (lambda: silu_mul(randn(2, 15)), "width of gate_up"),
        (lambda: silu_mul(randn(2, 2, 16)), "shape of gate_up"),
        (lambda: silu_mul(randn(2, 16).double()), "dtype of gate_up"),
        (lambda: silu_mul(randn(2, 32)[:, ::2]), "last stride of gate_up"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(call, message):
    if message is None:
        call()
        return
    with pytest.raises(KernelArgumentError, match=message):
        call()
