"""Outputs of launchers: where the first stage of a split decode writes."""

import pytest
import torch

from fp8kv.kernels.arguments import KernelArgumentError
from fp8kv.kernels.outputs import fp8_outputs, stage_one_outputs


@pytest.mark.parametrize("lse", [None, torch.zeros(2, 3)])
def test_one_split_writes_the_result_itself(lse):
    out = torch.zeros(2, 3, 8)
    result, log_sum = stage_one_outputs(out, lse, 1)
    result[1, 2, 0] = 5.0
    assert (out[1, 2] == 5.0).all()
    if lse is None:
        assert log_sum is None
    else:
        log_sum[1, 2, 0] = 7.0
        assert lse[1, 2] == 7.0


@pytest.mark.parametrize("lse", [None, torch.zeros(2, 3)])
def test_several_splits_write_partial_results_in_float32(lse):
    out = torch.zeros(2, 3, 8, dtype=torch.bfloat16)
    result, log_sum = stage_one_outputs(out, lse, 4)
    assert (result.shape, result.dtype) == ((2, 3, 4, 8), torch.float32)
    assert (log_sum.shape, log_sum.dtype) == ((2, 3, 4), torch.float32)


def test_outputs_that_are_not_given_are_made_in_the_format_of_one_that_is():
    given = torch.zeros(4, dtype=torch.uint8).view(torch.float8_e5m2)
    wanted = {"out_q": (None, (2, 3)), "out_k": (given, (4,))}
    made, kept = fp8_outputs(wanted, torch.float8_e4m3fn, torch.device("cpu"))
    assert kept is given
    assert (made.shape, made.dtype) == ((2, 3), torch.float8_e5m2)


def test_two_outputs_of_different_formats_are_refused():
    wanted = {
        "out_q": (torch.zeros(4).to(torch.float8_e5m2), (4,)),
        "out_k": (torch.zeros(4).to(torch.float8_e4m3fn), (4,)),
    }
    with pytest.raises(KernelArgumentError, match=r"out_k is float8_e4m3fn.*float8_e5m2"):
        fp8_outputs(wanted, torch.float8_e4m3fn, torch.device("cpu"))
