"""Retrieval of a pass key from a long context."""

import re

import pytest
import torch

from fp8kv.runtime.evaluation import needle
from fp8kv.runtime.evaluation.needle import DEPTHS, measure_needles, plan_needles
from fp8kv.runtime.llm import LLM
from fp8kv.runtime.requests import Choice, Completion

VOCABULARY = 259


class Reader:
    """A model over bytes that finds keys of its choice and knows them when it is given them."""

    def __init__(self, tokenizer, finds, says=" {key}. Remember"):
        self.tokenizer = tokenizer
        self._finds = finds
        self._says = says
        self.groups = []

    def generate(self, prompts, parameters):
        self.groups.append(len(prompts))
        self._key = [
            re.search(r"is (\d{7})\. Rem", self.tokenizer.decode(prompt))[1] for prompt in prompts
        ]
        assert parameters.temperature == 0
        return [
            Completion(
                prompt, (Choice(self._answer(key)[: parameters.max_tokens], (), (), "stop"),)
            )
            for prompt, key in zip(prompts, self._key, strict=True)
        ]

    def teacher_forced(self, sequences):
        for number, (_prompt, answer) in enumerate(sequences):
            assert self.tokenizer.decode(answer) == f" {self._key[number]}"
            logits = torch.zeros(len(answer), VOCABULARY)
            # all but the last digit, where it does not find the key
            for row, token in enumerate(answer if self._finds(self._key[number]) else answer[:-1]):
                logits[row, token] = 30.0
            yield number, logits

    def _answer(self, key):
        return self._says.format(key=key if self._finds(key) else "123")


@pytest.fixture(scope="module")
def plan(byte_tokenizer):
    return plan_needles(byte_tokenizer, [512, 1024], num_samples=2)


def test_a_model_that_finds_all_keys_recalls_all(byte_tokenizer, plan):
    done = []
    found = measure_needles(Reader(byte_tokenizer, lambda key: True), plan, progress=done.append)

    assert found.recall == found.top1 == 1
    assert found.logprob == pytest.approx(0, abs=1e-9)
    assert len(found.answers) == sum(done) == len(plan.prompts) == 44
    assert [(cell.length, cell.depth) for cell in found.cells] == [
        (length, depth) for length in (512, 1024) for depth in DEPTHS
    ]
    assert {(cell.trials, cell.found, cell.top1) for cell in found.cells} == {(2, 2, 1)}


def test_every_prompt_counts_in_its_own_cell(byte_tokenizer, plan):
    lost = {prompt.key for prompt in plan.prompts if prompt.length == 1024}
    kept = {prompt.key for prompt in plan.prompts if prompt.length == 512}
    assert len(lost) == len(kept) == 2
    found = measure_needles(Reader(byte_tokenizer, lambda key: key not in lost), plan)

    assert found.recall == 0.5
    assert [answer.is_found for answer in found.answers] == [
        prompt.key not in lost for prompt in plan.prompts
    ]
    for cell in found.cells:
        assert cell.found == (2 if cell.length == 512 else 0)
        assert cell.top1 == pytest.approx(1 if cell.length == 512 else 7 / 8)
        # one digit of eight tokens is not known: all tokens are equally likely there
        missed = 0 if cell.length == 512 else -torch.tensor(VOCABULARY).log().item()
        assert cell.logprob == pytest.approx(missed, abs=1e-4)
    assert found.logprob == pytest.approx(-torch.tensor(VOCABULARY).log().item() / 2, abs=1e-4)


@pytest.mark.parametrize(
    ("says", "is_found"),
    [
        (" {key}", True),
        (" number {key}", True),
        (" {key}4", False),
        (" 7, {key}", False),
        ("", False),
        (" unknown", False),
    ],
)
def test_the_first_number_of_the_answer_must_be_the_key(byte_tokenizer, plan, says, is_found):
    found = measure_needles(Reader(byte_tokenizer, lambda key: True, says), plan)
    assert found.recall == is_found


def test_prompts_run_in_groups_of_bounded_size(byte_tokenizer, plan, monkeypatch):
    monkeypatch.setattr(needle, "_GROUP_TOKENS", 2000)
    reader = Reader(byte_tokenizer, lambda key: True)
    found = measure_needles(reader, plan)
    # 3 of 512, the last group with the first of 1024
    assert reader.groups == [3] * 7 + [2] + [1] * 21
    assert found.recall == 1


def test_the_same_prompts_give_the_same_result(byte_tokenizer, plan):
    results = [
        measure_needles(Reader(byte_tokenizer, lambda key: key > "5"), plan) for _ in range(2)
    ]
    assert results[0] == results[1]


def test_a_model_answers_and_scores_as_transformers_does(minimax, greedy_texts):
    plan = plan_needles(minimax.tokenizer, [256, 300], [0, 1])
    with LLM(minimax.path, cache="float32", backend="reference", device="cpu", num_pages=32) as llm:
        found = measure_needles(llm, plan)

    for prompt, answer in zip(plan.prompts, found.answers, strict=True):
        text = minimax.tokenizer.decode(prompt.token_ids)
        assert minimax.tokenizer(text)["input_ids"] == list(prompt.token_ids)
        (expected,) = greedy_texts(minimax.model, minimax.tokenizer, [text], needle.ANSWER_TOKENS)
        assert answer.text == expected
        ids = torch.tensor([prompt.token_ids + prompt.answer_ids])
        with torch.inference_mode():
            logits = minimax.model(ids, use_cache=False).logits[0, len(prompt.token_ids) - 1 : -1]
        right = torch.tensor(prompt.answer_ids)
        logprobs = logits.double().log_softmax(-1).gather(1, right[:, None])
        assert answer.logprob == pytest.approx(float(logprobs.sum()), rel=1e-5)
        assert answer.top1 == pytest.approx(float((logits.argmax(-1) == right).double().mean()))
