"""The arithmetic of a GPU's memory, and the step that is measured."""

import pytest
import torch

from fp8kv.recipes.errors import RequestError
from fp8kv.runtime.limits import EngineLimits
from fp8kv.runtime.memory import DeviceMemory, pages_of_largest, pages_that_fit, run_largest

GPU = torch.device("cuda", 0)


def limits(max_positions=None, **more):
    return EngineLimits(259, max_positions, **more)


def test_the_cache_gets_what_weights_and_step_leave_of_the_fraction():
    assert DeviceMemory(1000, 300, 50).cache_bytes(0.9) == 550
    assert DeviceMemory(1000, 900, 50).cache_bytes(0.9) == -50


def test_pages_fill_the_budget():
    assert pages_that_fit(1000, 30, 64, limits(), GPU) == 33


def test_no_more_pages_than_all_seats_can_fill():
    assert pages_that_fit(10**9, 30, 64, limits(100, max_sequences=3), GPU) == 6


@pytest.mark.parametrize("budget", [29, -50])
def test_no_room_for_a_page_is_said(budget):
    with pytest.raises(
        RequestError,
        match=rf"^{max(budget, 0)} bytes of the memory of cuda:0 are left .* 30: raise memory_fraction",
    ):
        pages_that_fit(budget, 30, 64, limits(), GPU)


@pytest.mark.parametrize(
    ("own", "lengths"),
    [
        (limits(max_batch_tokens=50, max_sequences=4), [13, 13, 12, 12]),
        (limits(max_batch_tokens=3, max_sequences=8), [1, 1, 1]),
        (limits(10, max_batch_tokens=50, max_sequences=4), [10] * 4),  # no sequence is longer
    ],
)
def test_the_largest_step_is_as_large_as_the_limits_allow(fake_model, own, lengths):
    num_pages = pages_of_largest(own, 4)
    assert num_pages == sum(-(-length // 4) for length in lengths)
    model = fake_model.FakeModel(num_pages, 4)
    run_largest(model.forward, own, 4, "cpu")
    (batch,) = model.batches
    assert batch.cu_seqlens.diff().tolist() == lengths
    assert batch.slots.max() < num_pages * 4
