"""Batches: every sample once, padding on the right, budgets kept, folds apart."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8kv.calibrate.data.batches import make_batches
from fp8kv.calibrate.data.samples import Sample, token_digest
from fp8kv.calibrate.folds import NUM_FOLDS
from fp8kv.recipes.errors import DataError

PAD = 999


def sample(ids, fold=0):
    token_ids = torch.tensor(ids, dtype=torch.int32)
    return Sample(token_ids, token_digest(token_ids), fold)


samples_strategy = st.lists(
    st.builds(
        sample,
        st.lists(st.integers(0, 99), min_size=1, max_size=12),
        st.integers(0, NUM_FOLDS - 1),
    ),
    max_size=30,
    unique=True,
)
limits = st.one_of(
    st.tuples(st.integers(12, 60), st.none()),
    st.tuples(st.none(), st.integers(1, 7)),
    st.tuples(st.integers(12, 60), st.integers(1, 7)),
)


def rows(batches):
    return [
        (batch.fold, tuple(row[:length].tolist()))
        for batch in batches
        for row, length in zip(batch.token_ids, batch.lengths, strict=True)
    ]


@given(samples_strategy, limits)
def test_every_sample_is_in_exactly_one_batch_of_its_fold(samples, limit):
    batches = make_batches(samples, pad_token_id=PAD, max_tokens=limit[0], batch_size=limit[1])
    expected = sorted((s.fold, tuple(s.token_ids.tolist())) for s in samples)
    assert sorted(rows(batches)) == expected
    assert sum(batch.num_tokens for batch in batches) == sum(s.num_tokens for s in samples)


@given(samples_strategy, limits)
def test_limits_are_kept_and_padding_is_on_the_right(samples, limit):
    max_tokens, batch_size = limit
    for batch in make_batches(
        samples, pad_token_id=PAD, max_tokens=max_tokens, batch_size=batch_size
    ):
        assert max_tokens is None or batch.token_ids.numel() <= max_tokens
        assert batch_size is None or len(batch.lengths) <= batch_size
        assert batch.token_ids.dtype == batch.lengths.dtype == torch.int64
        assert batch.token_ids.shape == (len(batch.lengths), int(batch.lengths.max()))
        columns = torch.arange(batch.token_ids.shape[1])
        padded = columns >= batch.lengths[:, None]
        assert torch.equal(batch.token_ids == PAD, padded)  # no sample holds PAD


@given(samples_strategy, limits, st.randoms())
def test_batches_do_not_depend_on_the_order_of_samples(samples, limit, rng):
    options = {"pad_token_id": PAD, "max_tokens": limit[0], "batch_size": limit[1]}
    batches = make_batches(samples, **options)
    shuffled = make_batches(rng.sample(samples, len(samples)), **options)
    assert len(batches) == len(shuffled)
    for one, other in zip(batches, shuffled, strict=True):
        assert torch.equal(one.token_ids, other.token_ids)
        assert torch.equal(one.lengths, other.lengths)
        assert one.fold == other.fold


def test_sorting_by_length_keeps_padding_little():
    rng = random.Random(0)
    samples = [sample([i] + [1] * rng.randrange(1, 400)) for i in range(2, 300)]
    batches = make_batches(samples, pad_token_id=0, max_tokens=4096)
    waste = 1 - sum(b.num_tokens for b in batches) / sum(b.token_ids.numel() for b in batches)
    assert waste < 0.1  # batches in the order drawn waste nearly half


def test_a_batch_is_filled_up_to_its_budget():
    samples = [sample([i] * 4) for i in range(7)]
    sizes = [len(b.lengths) for b in make_batches(samples, pad_token_id=0, max_tokens=12)]
    assert sizes == [3, 3, 1]


def test_a_sample_longer_than_the_budget_is_refused_with_its_length():
    with pytest.raises(DataError) as error:
        make_batches([sample([1] * 9)], pad_token_id=0, max_tokens=8)
    assert "a sample has 9 tokens, more than the 8 of a batch" in str(error.value)
    assert "lower --seq-len" in str(error.value)


def test_limits_are_checked():
    with pytest.raises(DataError, match="give batch_size, max_tokens or both"):
        make_batches([], pad_token_id=0)
    with pytest.raises(DataError, match="batch_size is 0; it must be at least 1"):
        make_batches([], pad_token_id=0, batch_size=0)
    with pytest.raises(DataError, match="max_tokens is -1"):
        make_batches([], pad_token_id=0, max_tokens=-1)


def test_no_samples_make_no_batches():
    assert make_batches([], pad_token_id=0, batch_size=4) == []
