"""Prompts that hide a pass key."""

import re
from collections import defaultdict

import pytest

from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.evaluation.needle_prompts import (
    ANSWER_TOKENS,
    DEPTHS,
    default_lengths,
    plan_needles,
)

HAYSTACK = "One sentence stands here. Is this another? It is! " * 3


class Words:
    """Joins what stands together: a token is a word with the space before it, and every text begins with one."""

    def __call__(self, text, add_special_tokens=True):
        if isinstance(text, list):
            return {"input_ids": [self(one, add_special_tokens)["input_ids"] for one in text]}
        pieces = re.findall(r" ?[^ .]+\.?|\.| ", text)
        assert "".join(pieces) == text
        return {"input_ids": ([0] if add_special_tokens else []) + [self.id(one) for one in pieces]}

    def __init__(self):
        self._ids = defaultdict(lambda: len(self._ids) + 1)

    def id(self, piece):
        return self._ids[piece]

    def decode(self, ids):
        pieces = {number: piece for piece, number in self._ids.items()}
        return "".join(pieces.get(number, "<s>") for number in ids)


@pytest.fixture(params=["bytes", "words"])
def tokenizer(request, byte_tokenizer):
    return byte_tokenizer if request.param == "bytes" else Words()


@pytest.mark.parametrize("haystack", [None, HAYSTACK])
@pytest.mark.parametrize("length", [400, 512, 555, 2048])
def test_a_prompt_has_its_length_and_its_needle_at_its_depth(tokenizer, haystack, length):
    plan = plan_needles(tokenizer, [length], num_samples=2, haystack=haystack)
    assert len(plan.prompts) == 2 * len(DEPTHS)
    room = {}
    for prompt in plan.prompts:
        assert len(prompt.token_ids) == length - ANSWER_TOKENS
        needle = tokenizer.decode(prompt.token_ids[prompt.needle_start :])
        assert needle.startswith(f" The pass key is {prompt.key}. Remember it. {prompt.key} is")
        whole = tokenizer.decode(prompt.token_ids)
        assert whole.endswith(" What is the pass key? The pass key is")
        assert whole.count(prompt.key) == 2
        assert tokenizer.decode(prompt.answer_ids) == f" {prompt.key}"
        assert re.fullmatch(r"[1-9]\d{6}", prompt.key)
        # a sentence ends where the needle begins
        before = tokenizer.decode(prompt.token_ids[: prompt.needle_start])
        assert before[-1] in ".!?" or needle.count(".") == 3
        room.setdefault(prompt.depth, []).append(prompt.needle_start)
    starts = [min(room[depth]) for depth in DEPTHS]
    assert starts == sorted(starts)
    free = starts[-1] - starts[0]
    longest = 110 if haystack is None else 30  # of a sentence, in bytes
    for depth, start in zip(DEPTHS, starts, strict=True):
        assert abs(start - starts[0] - depth * free) <= longest


def test_depth_0_is_right_behind_the_introduction_and_depth_1_right_before_the_question(
    tokenizer,
):
    first, last = plan_needles(tokenizer, [600], [0, 1]).prompts
    assert tokenizer.decode(first.token_ids[: first.needle_start]).endswith("at the end.")
    rest = tokenizer.decode(last.token_ids[last.needle_start :])
    assert rest == (
        f" The pass key is {last.key}. Remember it. {last.key} is the pass key."
        " What is the pass key? The pass key is"
    )


def test_depths_differ_by_the_place_of_the_needle_alone(tokenizer):
    prompts = plan_needles(tokenizer, [900], [0, 0.3, 1]).prompts
    needle = len(tokenizer(".", add_special_tokens=False)["input_ids"])
    rests = set()
    for prompt in prompts:
        text = f". The pass key is {prompt.key}. Remember it. {prompt.key} is the pass key."
        size = len(tokenizer(text, add_special_tokens=False)["input_ids"]) - needle
        start = prompt.needle_start
        rests.add(prompt.token_ids[:start] + prompt.token_ids[start + size :])
    assert len(rests) == 1
    assert len({prompt.key for prompt in prompts}) == 1


def test_samples_lengths_and_seeds_have_other_keys_and_texts(byte_tokenizer):
    plans = [
        plan_needles(byte_tokenizer, [512, 1024], [0.5], num_samples=3, seed=seed)
        for seed in (1, 2)
    ]
    prompts = [prompt for plan in plans for prompt in plan.prompts]
    assert len({prompt.key for prompt in prompts}) == 12
    assert len({prompt.token_ids[: prompt.needle_start] for prompt in prompts}) == 12


def test_the_same_seed_gives_the_same_prompts(byte_tokenizer):
    assert plan_needles(byte_tokenizer, [512]) == plan_needles(byte_tokenizer, [512])


def test_a_key_does_not_stand_in_the_haystack(byte_tokenizer):
    drawn = plan_needles(byte_tokenizer, [512], [0.5]).prompts[0].key
    haystack = f"Somebody wrote {drawn} on the wall. " + HAYSTACK
    (prompt,) = plan_needles(byte_tokenizer, [512], [0.5], haystack=haystack).prompts
    assert prompt.key != drawn


@pytest.mark.parametrize(
    ("positions", "lengths"),
    [
        (511, ()),
        (512, (512,)),
        (4096, (512, 1024, 2048, 4096)),
        (5000, (512, 1024, 2048, 4096)),
        (0, ()),
    ],
)
def test_lengths_are_the_powers_of_two_that_the_model_has_positions_for(positions, lengths):
    assert default_lengths(positions) == lengths


@pytest.mark.parametrize(
    ("lengths", "depths", "options", "message"),
    [
        ([], [0.5], {}, r"give at least one length \(without any, powers of two from 512 to"),
        ([512], [], {}, "give at least one length"),
        ([512], [0.5], {"num_samples": 0}, "give at least one length"),
        ([512], [0.5, 1.5], {}, "the depth is 1.5: give a number from 0 to 1"),
        ([512, 100], [0.5], {}, "a context of 100 tokens has no room for .*: give at least 2"),
        ([512], [0.5], {"haystack": " \n"}, "the haystack has no text"),
    ],
)
def test_what_cannot_be_built_is_refused(byte_tokenizer, lengths, depths, options, message):
    with pytest.raises(EvaluationError, match=message):
        plan_needles(byte_tokenizer, lengths, depths, **options)


def test_the_least_length_has_room_for_everything_but_text(byte_tokenizer):
    with pytest.raises(EvaluationError) as refused:
        plan_needles(byte_tokenizer, [10], [0.5])
    least = int(re.search(r"at least (\d+)", str(refused.value))[1])
    (prompt,) = plan_needles(byte_tokenizer, [least], [0.5]).prompts
    assert len(prompt.token_ids) == least - ANSWER_TOKENS
    with pytest.raises(EvaluationError):
        plan_needles(byte_tokenizer, [least - 1], [0.5])
