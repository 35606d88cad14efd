"""A launcher's checks: what fits passes in silence, what does not is named with what was found and what is required."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8kv.kernels.arguments import (
    FLOAT_TYPES,
    FP8_TYPES,
    INDEX_TYPES,
    KernelArgumentError,
    require,
    require_cache_dtype,
    require_dtype,
    require_same_device,
    require_scale,
    require_shape,
    require_unit_stride,
)

shapes = st.lists(st.integers(0, 5), max_size=4)


def refusal(check, *arguments, **keywords):
    """Return the error that a check raises."""
    with pytest.raises(KernelArgumentError) as caught:
        check(*arguments, **keywords)
    return caught.value


def test_an_error_is_a_value_error_that_knows_its_argument():
    error = refusal(require, False, "page_size", 12, "a power of two")
    assert isinstance(error, ValueError)
    assert error.argument == "page_size"
    assert str(error) == "page_size is 12, but must be a power of two"


def test_what_holds_passes():
    require(True, "page_size", 16, "a power of two")


@pytest.mark.parametrize("allowed", [FLOAT_TYPES, FP8_TYPES, INDEX_TYPES])
def test_allowed_dtypes_pass_and_others_are_refused_with_both_names(allowed):
    for dtype in allowed:
        require_dtype("x", torch.empty(1, dtype=dtype), allowed)
    message = str(refusal(require_dtype, "x", torch.empty(1, dtype=torch.bool), allowed))
    assert "dtype of x is bool" in message
    assert all(str(dtype).removeprefix("torch.") in message for dtype in allowed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cache_holds_codes_or_sixteen_bit_numbers_of_the_other_tensors_dtype(dtype):
    numbers = torch.empty(1, dtype=dtype)
    for allowed in (dtype, *FP8_TYPES):
        require_cache_dtype("k_cache", torch.empty(1, dtype=allowed), numbers)
    for other in {torch.bfloat16, torch.float16, torch.float32} - {dtype}:
        message = str(refusal(require_cache_dtype, "k_cache", numbers.to(other), numbers))
        assert "the dtype of k_cache" in message
        assert str(dtype).removeprefix("torch.") in message
    wide = torch.empty(1)
    assert "float32, but must be float8" in str(refusal(require_cache_dtype, "x", wide, wide))


@given(shapes, st.data())
def test_a_shape_fits_itself_and_any_length_where_none_is_required(shape, data):
    wanted = [data.draw(st.sampled_from([length, None])) for length in shape]
    require_shape("x", torch.empty(shape), wanted)


@given(shapes, shapes)
def test_another_shape_is_refused_with_both(found, required):
    if found == required:
        return
    error = refusal(require_shape, "x", torch.empty(found), required)
    assert str(error) == f"the shape of x is {found}, but must be {required}"


def test_any_length_is_called_so():
    error = refusal(require_shape, "key", torch.empty(3, 4), (None, 5))
    assert str(error) == "the shape of key is [3, 4], but must be [any, 5]"


def test_a_last_stride_other_than_one_is_refused_where_it_says_something():
    require_unit_stride("x", torch.empty(4, 3)[:, 1:])
    require_unit_stride("x", torch.empty(4, 3)[:, ::3])
    error = refusal(require_unit_stride, "x", torch.empty(4, 6)[:, ::2])
    assert str(error) == "the last stride of x is 2, but must be 1"


def test_the_common_device_is_returned_and_what_is_not_given_does_not_count():
    x = torch.empty(1, device="meta")
    assert require_same_device(x=x, y=None, z=x) == torch.device("meta")


def test_another_device_is_refused_with_both_and_both_arguments():
    error = refusal(require_same_device, y=None, x=torch.empty(1), z=torch.empty(1, device="meta"))
    assert str(error) == "the device of z is meta, but must be cpu, where x is"


@pytest.mark.parametrize("shape", [[], [1], [8]])
def test_one_scale_or_one_per_head_passes(shape):
    require_scale("k_scale", torch.ones(shape), 8)


@pytest.mark.parametrize("shape", [[2], [7], [0], [1, 1], [1, 8], [8, 1]])
def test_any_other_number_of_scales_is_refused(shape):
    message = str(refusal(require_scale, "k_scale", torch.ones(shape), 8))
    assert f"the shape of k_scale is {shape}" in message
    assert "1 or 8 elements" in message


def test_where_heads_share_a_scale_there_is_one():
    require_scale("scale", torch.ones([]), None)
    message = str(refusal(require_scale, "scale", torch.ones(8), None))
    assert "[8]" in message
    assert "of 1 elements" in message


def test_one_head_has_one_scale():
    require_scale("scale", torch.ones(1), 1)
    assert "of 1 elements" in str(refusal(require_scale, "scale", torch.ones(2), 1))


@pytest.mark.parametrize("scale", [0.5, 1, None])
def test_a_number_is_no_scale(scale):
    message = str(refusal(require_scale, "v_scale", scale, 8))
    assert f"v_scale is a {type(scale).__name__}" in message
    assert "float32 tensor" in message


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32])
def test_a_scale_is_float32(dtype):
    message = str(refusal(require_scale, "v_scale", torch.ones(1, dtype=dtype), 8))
    assert str(dtype).removeprefix("torch.") in message
    assert "float32" in message
