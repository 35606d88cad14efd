"""Scores of a prompt's own tokens: those of the model, with the alternatives that generation would report."""

import pytest
import torch

pytest.importorskip("fastapi")

from fp8kv.demo import MODELS
from fp8kv.recipes.errors import EvaluationError, RequestError
from fp8kv.runtime.llm import LLM
from fp8kv.runtime.sampling import SamplingParameters
from fp8kv.runtime.server.prompt_scores import NotNow, score_prompt


class Scripted:
    """Reads as it is told."""

    def __init__(self, *pieces):
        self.pieces = pieces

    def teacher_forced(self, sequences):
        ((prompt, _),) = sequences
        assert len(prompt) == 1
        return iter((0, piece) for piece in self.pieces)


@pytest.fixture(scope="module")
def tiny():
    options = {"cache": "fp8-unit", "backend": "reference", "device": "cpu", "dtype": "float32"}
    with LLM(MODELS["tiny-minimax-m2"], num_pages=20, **options) as llm:
        yield llm


def test_they_are_what_the_model_says(tiny):
    token_ids = tiny.encode("Question: Tom has 3 apples and buys 4 more.\nAnswer:")
    found = score_prompt(tiny, token_ids, 3)
    assert [entry.token_id for entry in found] == list(token_ids[1:])
    (expected,) = tiny.logprobs([token_ids])
    assert [entry.logprob for entry in found] == pytest.approx(expected, abs=1e-5)
    for position in (1, 5, len(token_ids) - 1):
        (completion,) = tiny.generate(
            [token_ids[:position]], SamplingParameters(max_tokens=1, logprobs=3)
        )
        (generated,) = completion.choices[0].logprobs
        top = found[position - 1].top
        assert [token for token, _ in top] == [token for token, _ in generated.top]
        assert [value for _, value in top] == pytest.approx(
            [value for _, value in generated.top], abs=1e-4
        )


def test_without_alternatives_there_are_none(tiny):
    assert all(entry.top == () for entry in score_prompt(tiny, tiny.encode("Tom has"), 0))


def test_one_token_has_nothing_before_it(tiny):
    assert score_prompt(tiny, (5,), 3) == ()


def test_of_equals_the_lowest_id_comes_first():
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0]])
    (entry,) = score_prompt(Scripted(logits), (9, 2), 2)
    assert [token for token, _ in entry.top] == [1, 2]
    assert entry.logprob == entry.top[1][1]


def test_pieces_are_put_together():
    first, second = torch.randn(2, 7), torch.randn(1, 7)
    found = score_prompt(Scripted(first, second), (0, 1, 2, 3), 1)
    expected = torch.cat([first, second]).log_softmax(-1)
    assert [entry.logprob for entry in found] == pytest.approx(
        [float(expected[row, row + 1]) for row in range(3)], abs=1e-6
    )


def test_what_never_fits_is_refused_and_what_does_not_fit_now_is_not(tiny):
    with pytest.raises(RequestError, match="exceeds"):
        score_prompt(tiny, (5,) * 5000, 0)
    with pytest.raises(RequestError, match="token id 4096"):
        score_prompt(tiny, (5, 4096), 0)
    taken = tiny.engine._allocator.allocate(20)
    with pytest.raises(NotNow):
        score_prompt(tiny, (5, 6), 0)
    tiny.engine._allocator.free(taken)
    assert score_prompt(tiny, (5, 6), 0)


def test_numbers_that_are_none_are_said():
    with pytest.raises(EvaluationError, match="NaN or infinity"):
        score_prompt(Scripted(torch.tensor([[torch.nan, 1.0]])), (0, 1), 0)


def test_who_keeps_the_error_keeps_no_pages():
    class Watched(Scripted):
        is_closed = False

        def teacher_forced(self, sequences):
            try:
                yield 0, torch.tensor([[torch.nan, 1.0]])
                yield 0, torch.tensor([[0.0, 1.0]])
            finally:
                self.is_closed = True

    reader = Watched()
    with pytest.raises(EvaluationError) as caught:
        score_prompt(reader, (0, 1, 0), 0)
    assert caught.value.__traceback__ is not None
    assert reader.is_closed
