"""Logits at chosen positions: of the right tokens, in order, within bounds, and no page stays behind."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8kv.recipes.errors import RequestError
from fp8kv.runtime.packed_logits import LEAST_ROWS, packed_logits, rows_at_once
from fp8kv.runtime.paging import PageAllocator

PAGE = 4


def run(model, allocator, texts, max_tokens=100, max_rows=100):
    return packed_logits(
        model, allocator, texts, max_tokens=max_tokens, max_rows=max_rows, device="cpu"
    )


texts = st.lists(
    st.integers(0, 17).flatmap(
        lambda length: st.tuples(
            st.lists(st.integers(0, 255), min_size=length, max_size=length),
            st.integers(0, max(0, length - 1)),
        )
    ),
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(texts=texts, max_tokens=st.integers(1, 30), max_rows=st.integers(1, 12))
def test_every_wanted_token_has_the_logits_behind_it_whatever_the_cuts(
    fake_model, texts, max_tokens, max_rows
):
    model, allocator = fake_model.FakeModel(8, PAGE), PageAllocator(8, PAGE)

    found = list(run(model, allocator, texts, max_tokens, max_rows))

    numbers = [number for number, _ in found]
    assert numbers == sorted(numbers)
    for number, (token_ids, first) in enumerate(texts):
        rows = [row for other, logits in found if other == number for row in logits]
        wanted = range(first + 1, len(token_ids) + 1)
        assert len(rows) == len(wanted)
        for row, end in zip(rows, wanted, strict=True):
            torch.testing.assert_close(
                row, model._answer(token_ids[:end]), rtol=0, atol=0, equal_nan=True
            )
    assert all(batch.num_tokens <= max_tokens for batch in model.batches)
    assert all(len(logits) <= max_rows for _, logits in found)
    assert sum(batch.num_tokens for batch in model.batches) == sum(len(ids) for ids, _ in texts)
    allocator.check([])
    assert allocator.num_free == 8


def test_short_texts_share_a_forward_pass(fake_model):
    model = fake_model.FakeModel(40, PAGE)
    list(run(model, PageAllocator(40, PAGE), [([1] * 9, 4)] * 7, max_tokens=63))
    assert [batch.num_sequences for batch in model.batches] == [7]


def test_texts_that_do_not_fit_together_wait_for_the_pages_of_others(fake_model):
    model = fake_model.FakeModel(5, PAGE)
    assert len(list(run(model, PageAllocator(5, PAGE), [([1] * 8, 7)] * 5))) == 5
    assert [batch.num_sequences for batch in model.batches] == [2, 2, 1]


def test_what_does_not_fit_beside_others_is_refused_and_takes_nothing(fake_model):
    allocator = PageAllocator(6, PAGE)
    held = allocator.allocate(2)
    with pytest.raises(RequestError, match="21 tokens cannot be scored beside what is running: "):
        list(run(fake_model.FakeModel(6, PAGE), allocator, [([1] * 4, 0), ([1] * 21, 0)]))
    allocator.check([held])


def test_who_stops_listening_frees_the_pages(fake_model):
    allocator = PageAllocator(6, PAGE)
    found = run(fake_model.FakeModel(6, PAGE), allocator, [([1] * 20, 0)], max_tokens=5)
    next(found)
    assert allocator.num_free == 1
    found.close()
    allocator.check([])


def test_a_model_that_fails_keeps_no_pages(fake_model):
    model, allocator = fake_model.FakeModel(6, PAGE), PageAllocator(6, PAGE)
    model.fails = True
    with pytest.raises(RuntimeError, match="broke"):
        list(run(model, allocator, [([1] * 20, 0)]))
    allocator.check([])


@pytest.mark.parametrize(("vocabulary", "rows"), [(256, 1 << 19), (1 << 18, LEAST_ROWS)])
def test_few_rows_of_a_large_vocabulary_are_held(vocabulary, rows):
    assert rows_at_once(vocabulary) == rows
