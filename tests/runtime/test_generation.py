"""Greedy generation and its stops."""

import copy

import pytest
import torch
from transformers import GenerationConfig

from fp8kv.demo import TEST_DATA, TRAIN_DATA
from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.absorbed_mla import absorbed_mla
from fp8kv.runtime.generation import generate_greedy
from fp8kv.runtime.gsm8k import build_prompts, load_problems

NEVER = ("a string that no answer holds",)


@pytest.fixture(scope="module", params=["minimax", "deepseek"])
def loaded(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def prompts():
    """Three prompts of different lengths."""
    problems = load_problems(TEST_DATA)[:3]
    shots = load_problems(TRAIN_DATA)
    return [build_prompts([problem], shots, count)[0] for count, problem in enumerate(problems)]


def free_tokens(loaded, prompt, count):
    """Return the ids of transformers' own greedy continuation of one prompt, past any end."""
    token_ids = torch.tensor([loaded.tokenizer(prompt)["input_ids"]])
    settings = GenerationConfig(
        max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
    )
    with torch.inference_mode():
        output = loaded.model.generate(
            token_ids, attention_mask=torch.ones_like(token_ids), generation_config=settings
        )
    return output[0, token_ids.shape[1] :].tolist()


def generate(loaded, prompts, stops=NEVER, max_new_tokens=24):
    return generate_greedy(
        loaded.model, loaded.tokenizer, prompts, stops=stops, max_new_tokens=max_new_tokens
    )


def test_a_padded_batch_equals_transformers_on_each_prompt(loaded, prompts):
    expected = [loaded.tokenizer.decode(free_tokens(loaded, prompt, 24)) for prompt in prompts]

    with absorbed_mla(loaded.model):
        found = generate(loaded, prompts)

    assert len(set(expected)) == 3
    assert found == expected


def test_a_stop_string_that_spans_tokens_ends_the_text(minimax, prompts):
    token_ids = free_tokens(minimax, prompts[2], 24)
    pieces = [minimax.tokenizer.decode([token]) for token in token_ids]
    stop = pieces[1][-2:] + pieces[2][:3]
    assert "".join(pieces).index(stop) == len(pieces[0] + pieces[1]) - 2, "where it is looked for"

    (found,) = generate(minimax, prompts[2:], stops=[*NEVER, stop])

    assert found == "".join(pieces[:3]), "to the end of the token that completes it"


def test_rows_stop_each_at_its_own_place(minimax, prompts):
    free = generate(minimax, prompts)
    stops = [free[1][10:16]]

    found = generate(minimax, prompts, stops=stops)

    assert len(found[1]) < len(free[1])
    for text, whole in zip(found, free, strict=True):
        assert whole.startswith(text)
        if stops[0] not in whole:
            assert text == whole


def test_a_stop_string_in_the_prompt_does_not_count(minimax, prompts):
    assert "Answer:" in prompts[0]

    found = generate(minimax, prompts, stops=["Answer:", "Question:"], max_new_tokens=6)

    assert found == generate(minimax, prompts, max_new_tokens=6)


def test_the_end_of_sequence_ends_the_text_and_is_left_out(minimax, prompts, monkeypatch):
    token_ids = free_tokens(minimax, prompts[1], 24)
    end = token_ids[7]
    first = token_ids.index(end)
    settings = copy.deepcopy(minimax.model.generation_config)
    settings.eos_token_id = [settings.eos_token_id, end]
    monkeypatch.setattr(minimax.model, "generation_config", settings)

    (found,) = generate(minimax, prompts[1:2])

    assert found == minimax.tokenizer.decode(token_ids[: first + 1])


def test_the_tokenizers_end_of_sequence_counts_where_the_model_names_none(
    minimax, prompts, monkeypatch
):
    token_ids = free_tokens(minimax, prompts[1], 24)
    settings = copy.deepcopy(minimax.model.generation_config)
    settings.eos_token_id = None
    monkeypatch.setattr(minimax.model, "generation_config", settings)
    tokenizer = copy.deepcopy(minimax.tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(token_ids[5])

    (found,) = generate_greedy(
        minimax.model, tokenizer, prompts[1:2], stops=NEVER, max_new_tokens=24
    )

    assert len(minimax.tokenizer(found)["input_ids"]) <= 6


def test_no_more_tokens_than_asked(minimax, prompts):
    assert generate(minimax, prompts[:1], max_new_tokens=5) == [
        minimax.tokenizer.decode(free_tokens(minimax, prompts[0], 5))
    ]


def test_without_stop_strings_it_runs_too(minimax, prompts):
    assert generate(minimax, prompts[:1], stops=(), max_new_tokens=5) == generate(
        minimax, prompts[:1], max_new_tokens=5
    )


def test_a_prompt_that_does_not_fit_is_refused(minimax, prompts):
    limit = minimax.model.config.max_position_embeddings
    tokens = len(minimax.tokenizer(prompts[2])["input_ids"])

    message = rf"prompt of {tokens} tokens and {limit} new ones exceed .* {limit} positions.*--num-fewshot"
    with pytest.raises(EvaluationError, match=message):
        generate(minimax, prompts, max_new_tokens=limit)
