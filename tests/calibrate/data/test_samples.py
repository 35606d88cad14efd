"""Hashes and folds: by content, whatever the order."""

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8kv.calibrate.data.samples import Sample, assign_folds, samples_digest, token_digest
from fp8kv.calibrate.folds import CALIBRATION_FOLDS, HELD_OUT_FOLD, NUM_FOLDS

digests = st.integers(0, 2**256 - 1).map(lambda number: f"{number:064x}")


def test_the_digest_is_that_of_little_endian_int32():
    # printf '\x01\x00\x00\x00\x02\x01\x00\x00' | sha256sum
    expected = "fb8bbe2ad3ab5292f19bc5d75bbab9b5fbddc5a78ce47ab41b2d3d59bca08596"
    assert token_digest(torch.tensor([1, 258], dtype=torch.int32)) == expected


@given(st.lists(digests), st.randoms())
def test_digest_and_folds_do_not_depend_on_order(items, random):
    shuffled = random.sample(items, len(items))
    assert samples_digest(items) == samples_digest(shuffled)
    assert assign_folds(items) == assign_folds(shuffled)


@given(st.lists(digests, unique=True, min_size=1), digests)
def test_another_sample_changes_the_digest(items, other):
    assert samples_digest(items) != samples_digest([*items, other])


@given(st.lists(digests, unique=True, min_size=2))
def test_two_samples_or_more_always_calibrate_and_hold_out(items):
    folds = assign_folds(items)
    assert set(folds) == set(items)
    assert HELD_OUT_FOLD in folds.values()
    assert any(fold in CALIBRATION_FOLDS for fold in folds.values())


@given(st.lists(digests, unique=True, min_size=2))
def test_the_digest_alone_decides_unless_a_side_would_be_empty(items):
    by_digest = {digest: int(digest, 16) % NUM_FOLDS for digest in items}
    held_out = [fold == HELD_OUT_FOLD for fold in by_digest.values()]
    if any(held_out) and not all(held_out):
        assert assign_folds(items) == by_digest
    else:
        assert [d for d, fold in assign_folds(items).items() if fold == HELD_OUT_FOLD] == [
            max(items)
        ]


@pytest.mark.parametrize("fold", range(NUM_FOLDS))
def test_a_single_sample_is_calibrated_on(fold):
    assert assign_folds([f"{fold:064x}"])[f"{fold:064x}"] in CALIBRATION_FOLDS


def test_folds_of_real_hashes_are_about_even():
    counts = [0] * NUM_FOLDS
    items = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(4000)]
    for fold in assign_folds(items).values():
        counts[fold] += 1
    assert min(counts) > 400  # 500 expected, standard deviation 21
    assert max(counts) < 600


def test_samples_are_equal_when_their_tokens_are():
    def sample(*ids):
        token_ids = torch.tensor(ids, dtype=torch.int32)
        return Sample(token_ids, token_digest(token_ids), fold=0)

    assert sample(1, 2) == sample(1, 2)
    assert sample(1, 2) != sample(1, 3)
    assert len({sample(1, 2), sample(1, 2)}) == 1
    assert sample(1, 2).num_tokens == 2
