"""Log-probabilities of given tokens."""

import pytest
import torch

from fp8kv.recipes.errors import RequestError
from fp8kv.runtime import scoring
from fp8kv.runtime.paging import PageAllocator
from fp8kv.runtime.scoring import score_tokens

TOKENS = list(b"a text of some length")


@pytest.mark.parametrize("length", [1, 2, 8, 9, len(TOKENS)])
@pytest.mark.parametrize("max_batch_tokens", [1, 4, 5, 100])
def test_every_token_is_scored_by_all_before_it_whatever_the_chunks(
    fake_model, length, max_batch_tokens
):
    model, allocator = fake_model.FakeModel(6, 4), PageAllocator(6, 4)
    tokens = TOKENS[:length]

    found = score_tokens(model, allocator, tokens, max_batch_tokens=max_batch_tokens, device="cpu")

    expected = [
        float(model._answer(torch.tensor(tokens[:end])).log_softmax(-1)[tokens[end]])
        for end in range(1, length)
    ]
    assert found == pytest.approx(expected, abs=1e-5)
    assert all(batch.num_tokens <= max_batch_tokens for batch in model.batches)
    assert allocator.num_free == 6
    allocator.check([])


def test_logits_of_few_tokens_are_held_at_once(fake_model, monkeypatch):
    monkeypatch.setattr(scoring, "SCORED_AT_ONCE", 3)
    model = fake_model.FakeModel(6, 4)
    score_tokens(model, PageAllocator(6, 4), TOKENS, max_batch_tokens=100, device="cpu")
    assert max(batch.num_tokens for batch in model.batches) == 3


def test_what_does_not_fit_now_is_refused_and_takes_nothing(fake_model):
    allocator = PageAllocator(6, 4)
    held = allocator.allocate(2)
    with pytest.raises(RequestError, match="21 tokens cannot be scored beside what is running: "):
        score_tokens(
            fake_model.FakeModel(6, 4), allocator, TOKENS, max_batch_tokens=9, device="cpu"
        )
    allocator.check([held])


def test_a_model_that_fails_keeps_no_pages(fake_model):
    model, allocator = fake_model.FakeModel(6, 4), PageAllocator(6, 4)
    model.fails = True
    with pytest.raises(RuntimeError):
        score_tokens(model, allocator, TOKENS, max_batch_tokens=9, device="cpu")
    allocator.check([])
