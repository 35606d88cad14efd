"""The number of splits: enough to fill the GPU, no more than the tokens are worth."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8kv.kernels.splits import MAX_SPLITS, choose_splits

H200 = {"num_sms": 132, "ctas_per_sm": 4}


def test_one_long_sequence_fills_one_wave_exactly():
    assert choose_splits(8, 196608, 32, **H200) == 66  # 8 x 66 = 132 x 4


def test_a_batch_that_fills_the_gpu_is_not_cut():
    assert choose_splits(512, 8192, 32, **H200) == 1
    assert choose_splits(1024, 8192, 32, **H200) == 1


def test_a_batch_that_leaves_half_a_wave_empty_is_cut():
    # 768 programs would run in two waves, the second half empty; twice as many take three full ones of half the length
    assert choose_splits(768, 8192, 32, **H200) == 2


def test_short_sequences_are_not_cut_below_the_minimum():
    assert choose_splits(1, 1000, 64, 132, min_tokens=256) == 3
    assert choose_splits(1, 100, 64, 132, min_tokens=256) == 1


def test_equally_good_counts_give_the_smallest():
    # 5 tiles on 4 places: 3 splits and 4 splits both last 2 tiles
    assert choose_splits(1, 5 * 64, 64, 4, min_tokens=64) == 3


def test_no_work_gives_one_split():
    assert choose_splits(0, 0, 64, 132) == 1


@pytest.mark.parametrize("name", ["tile", "num_sms", "ctas_per_sm", "min_tokens", "max_splits"])
def test_counts_below_one_are_refused(name):
    arguments = {"work_items": 1, "max_seq_len": 100, "tile": 64, "num_sms": 132, name: 0}
    with pytest.raises(ValueError, match=f"{name} is 0, but must be at least 1"):
        choose_splits(**arguments)


@given(
    work=st.integers(0, 4096),
    tokens=st.integers(0, 300_000),
    tile=st.sampled_from([16, 32, 64, 128]),
    sms=st.integers(1, 200),
    resident=st.integers(1, 8),
    minimum=st.integers(1, 1024),
)
def test_a_split_has_work_and_no_more_than_the_limit_exist(
    work, tokens, tile, sms, resident, minimum
):
    splits = choose_splits(work, tokens, tile, sms, ctas_per_sm=resident, min_tokens=minimum)
    assert 1 <= splits <= MAX_SPLITS
    assert splits == 1 or tokens // splits >= minimum
    assert splits <= max(1, -(-tokens // tile))
    # beyond one wave per work item there is nothing to gain
    assert splits <= max(1, sms * resident)
