"""Log-probability and rank of given answers."""

import math

import pytest
import torch

from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.evaluation import answer_scores
from fp8kv.runtime.evaluation.answer_scores import AnswerScore, score_answers

SEQUENCES = [([1, 2], [3, 0, 5, 5]), ([4], [2]), ([7, 7, 7], [6, 1, 6])]


class Forced:
    """Gives the logits that it was made with, in pieces of at most ``rows``."""

    def __init__(self, logits, rows=100, order=None):
        self._logits = logits
        self._rows = rows
        self._order = order or range(len(logits))

    def teacher_forced(self, sequences):
        for number in self._order:
            for piece in self._logits[number].split(self._rows):
                yield number, piece


def some_logits(dtype=torch.float32):
    return [torch.randn(len(answer), 8).to(dtype) for _, answer in SEQUENCES]


def expected(logits):
    found = {}
    for number, ((_, answer), rows) in enumerate(zip(SEQUENCES, logits, strict=True)):
        logprobs, ranks = [], []
        for token, row in zip(answer, rows.tolist(), strict=True):
            logprobs.append(row[token] - math.log(math.fsum(map(math.exp, row))))
            ranks.append(sorted(range(8), key=lambda i, row=row: (-row[i], i)).index(token))
        found[number] = logprobs, ranks
    return found


@pytest.mark.parametrize("rows", [1, 2, 100])
@pytest.mark.parametrize("elements", [8, 17, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_token_is_scored_whatever_the_pieces_and_chunks(rows, elements, dtype, monkeypatch):
    monkeypatch.setattr(answer_scores, "_CHUNK_ELEMENTS", elements)
    logits = some_logits(dtype)
    found = dict(score_answers(Forced(logits, rows, [2, 0, 1]), SEQUENCES))
    for number, (logprobs, ranks) in expected(logits).items():
        assert found[number].logprobs == pytest.approx(logprobs, abs=1e-12)
        assert list(found[number].ranks) == ranks


def test_answers_come_as_they_are_complete():
    scores = score_answers(Forced(some_logits(), 2, [2, 0, 1]), SEQUENCES)
    assert [number for number, _ in scores] == [2, 0, 1]


def test_of_equals_the_lowest_id_is_first_as_in_greedy_decoding():
    logits = [torch.zeros(4, 8), torch.zeros(1, 8), torch.zeros(3, 8)]
    found = dict(score_answers(Forced(logits), SEQUENCES))
    assert found[0].ranks == (3, 0, 5, 5)
    assert found[0].logprob == pytest.approx(-4 * math.log(8))


def test_an_answer_is_greedy_where_each_of_its_tokens_is():
    assert AnswerScore((-1.0, -2.0), (0, 0)).is_greedy
    assert not AnswerScore((-1.0, -2.0), (0, 1)).is_greedy
    assert AnswerScore((-1.0, -2.0), (0, 1)).logprob == -3


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_named(value):
    logits = some_logits()
    logits[0][3, 4] = value
    with pytest.raises(EvaluationError, match="of an answer of 4 tokens is nan: the logits hold"):
        dict(score_answers(Forced(logits), SEQUENCES))
