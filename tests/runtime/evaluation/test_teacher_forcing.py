"""Logits on reference answers."""

import pytest
import torch

from fp8kv.runtime.evaluation.teacher_forcing import answer_logits, encode_answers, force

PROMPTS = ["Question: What is 2+3?\nAnswer:", "Question: Ann has 4 pens.\nAnswer:", "Hi"]
ANSWERS = [" 2+3 = <<2+3=5>>5.\n#### 5", " 4\n#### 4", " a"]


@pytest.fixture(scope="module", params=["minimax", "deepseek"])
def loaded(request):
    return request.getfixturevalue(request.param)


def tokens(tokenizer, text):
    return tokenizer(text)["input_ids"]


def test_answers_end_together_and_padding_is_masked(minimax):
    batch = force(minimax.tokenizer, PROMPTS, ANSWERS)

    rows = [
        tokens(minimax.tokenizer, prompt) + tokens(minimax.tokenizer, answer)
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)
    ]
    lengths = [len(row) for row in rows]
    assert batch.token_ids.shape == batch.mask.shape == (3, max(lengths))
    assert batch.mask.sum(1).tolist() == lengths
    for number, row in enumerate(rows):
        assert batch.token_ids[number, -len(row) :].tolist() == row
        assert batch.mask[number, -len(row) :].all()


def test_the_reference_tokens_are_the_answers(minimax):
    answers = [tokens(minimax.tokenizer, answer) for answer in ANSWERS]

    batch = force(minimax.tokenizer, PROMPTS, ANSWERS)

    assert batch.is_answer.shape == (3, max(map(len, answers)))
    assert batch.reference_tokens.tolist() == [token for answer in answers for token in answer]


def test_logits_equal_those_of_each_row_alone(loaded):
    batch = force(loaded.tokenizer, PROMPTS, ANSWERS)

    found = answer_logits(loaded.model, batch)

    expected = []
    for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
        head, tail = tokens(loaded.tokenizer, prompt), tokens(loaded.tokenizer, answer)
        with torch.inference_mode():
            logits = loaded.model(torch.tensor([head + tail])).logits[0]
        expected.append(logits[len(head) - 1 : -1])
    expected = torch.cat(expected)
    assert found.shape == (len(batch.reference_tokens), loaded.model.config.vocab_size)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-4)


def test_an_answer_has_no_special_tokens_of_its_own(byte_tokenizer):
    class Beginning:
        def __call__(self, texts, add_special_tokens=True):
            first = [257] if add_special_tokens else []
            return {"input_ids": [first + list(text.encode()) for text in texts]}

    assert encode_answers(Beginning(), ["ab", "c"]) == [[97, 98], [99]]
    pairs = zip(["ab", "c"], encode_answers(byte_tokenizer, ["ab", "c"]), strict=True)
    assert all(byte_tokenizer.decode(ids) == text for text, ids in pairs)


def test_a_trained_model_finds_its_answers_likely(minimax):
    batch = force(minimax.tokenizer, PROMPTS[:1], ANSWERS[:1])

    logits = answer_logits(minimax.model, batch)

    right = logits.argmax(-1) == batch.reference_tokens
    assert right.float().mean() > 0.5, "the logits belong to the next token, not to this one"
