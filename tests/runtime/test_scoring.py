"""Log-probabilities of given tokens, and the logits that predict answers."""

import pytest
import torch

from fp8kv.recipes.errors import EvaluationError, RequestError
from fp8kv.runtime.limits import EngineLimits
from fp8kv.runtime.paging import PageAllocator
from fp8kv.runtime.scoring import Scorer

TEXTS = [list(b"a text of some length"), list(b"b"), list(b"another"), list(b"a text, again")]


def make(fake_model, max_tokens=100, max_rows=100):
    limits = EngineLimits(fake_model.VOCABULARY, 30, max_batch_tokens=max_tokens)
    return Scorer(fake_model.FakeModel(12, 4), PageAllocator(12, 4), limits, max_rows, "cpu")


@pytest.mark.parametrize(("max_tokens", "max_rows"), [(100, 100), (5, 100), (9, 4), (1, 1)])
def test_every_token_is_scored_by_all_before_it_whatever_the_cuts(fake_model, max_tokens, max_rows):
    scorer = make(fake_model, max_tokens, max_rows)

    found = scorer.score(TEXTS)

    for tokens, scores in zip(TEXTS, found, strict=True):
        assert [score.token_id for score in scores] == tokens[1:]
        for end, score in enumerate(scores, start=1):
            logits = scorer.runner._answer(tokens[:end])
            expected = float(logits.log_softmax(-1)[tokens[end]])
            assert score.logprob == pytest.approx(expected, abs=1e-5)
            assert score.is_greedy == (int(logits.argmax()) == tokens[end])
    scorer.allocator.check([])


def test_the_models_own_tokens_are_greedy(fake_model):
    scorer = make(fake_model)
    tokens = [1, 2]
    for _ in range(6):
        tokens.append(int(scorer.runner._answer(tokens).argmax()))
    ((first, *rest),) = scorer.score([tokens])
    assert not first.is_greedy
    assert all(score.is_greedy for score in rest)


def test_logits_that_are_no_numbers_are_refused_by_prompt(fake_model):
    scorer = make(fake_model)
    poison = [1, 2, 3, fake_model.POISON, 5, 6]
    with pytest.raises(EvaluationError, match=r"^prompt 1 of 2: the logits hold NaN or infinity: "):
        scorer.score([[1, 2], poison])
    scorer.allocator.check([])


SEQUENCES = [([1, 2, 3], [4, 5, 6, 7, 8]), ([9], [1]), ([1] * 7, [2, 3])]


@pytest.mark.parametrize("max_tokens", [100, 4, 1])
@pytest.mark.parametrize("max_rows", [100, 5, 3, 1])
def test_answers_come_in_order_and_whole_up_to_the_bound(fake_model, max_tokens, max_rows):
    scorer = make(fake_model, max_tokens, max_rows)

    found = list(scorer.teacher_forced(SEQUENCES))

    expected = []
    for number, (prompt, answer) in enumerate(SEQUENCES):
        rows = [scorer.runner._answer([*prompt, *answer[:end]]) for end in range(len(answer))]
        for start in range(0, len(rows), max_rows):
            expected.append((number, torch.stack(rows[start : start + max_rows])))
    assert [number for number, _ in found] == [number for number, _ in expected]
    for (_, logits), (_, own) in zip(found, expected, strict=True):
        assert logits.dtype == torch.float32
        assert torch.equal(logits, own)
    scorer.allocator.check([])


def test_logits_that_are_kept_keep_no_others(fake_model):
    found = [logits for _, logits in make(fake_model).teacher_forced(SEQUENCES)]
    for logits in found:
        assert logits.untyped_storage().nbytes() == logits.numel() * 4


def test_the_last_token_needs_no_place(fake_model):
    scorer = make(fake_model)
    assert len(scorer.score([[1] * 31])[0]) == 30
    ((_, logits),) = scorer.teacher_forced([([1] * 30, [2])])
    assert len(logits) == 1
    for call in (
        lambda: scorer.score([[1] * 32]),
        lambda: scorer.teacher_forced([([1] * 30, [2, 3])]),
    ):
        with pytest.raises(RequestError, match="exceeds the model's 30 positions"):
            call()


@pytest.mark.parametrize("sequence", [([], [1]), ([1], [])])
def test_an_answer_needs_a_prompt_and_a_token(fake_model, sequence):
    with pytest.raises(RequestError, match=r"^sequence 1 has . tokens of prompt and . of answer"):
        make(fake_model).teacher_forced([([1], [1]), sequence])


@pytest.mark.parametrize("tokens", [[1, 2, 259], [259, 1], []])
def test_tokens_that_the_model_does_not_know_are_refused(fake_model, tokens):
    with pytest.raises(RequestError, match=r"token id 259|prompt is empty"):
        make(fake_model).score([tokens])
