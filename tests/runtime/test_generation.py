"""What ends a text, and how long one may be."""

import copy

import pytest

from fp8kv.runtime.generation import eos_token_ids, max_positions


@pytest.mark.parametrize(
    ("named", "expected"), [(None, {1}), (1, {1}), (7, {1, 7}), ([7, 9], {1, 7, 9})]
)
def test_tokenizer_and_generation_settings_both_say_what_ends_a_text(
    minimax, monkeypatch, named, expected
):
    assert minimax.tokenizer.eos_token_id == 1
    settings = copy.deepcopy(minimax.model.generation_config)
    settings.eos_token_id = named
    monkeypatch.setattr(minimax.model, "generation_config", settings)
    assert eos_token_ids(minimax.model, minimax.tokenizer) == expected


def test_a_model_without_settings_ends_where_its_tokenizer_says(minimax, monkeypatch):
    monkeypatch.setattr(minimax.model, "generation_config", None)
    assert eos_token_ids(minimax.model, minimax.tokenizer) == {1}


def test_the_longest_text_is_the_language_models(minimax):
    assert max_positions(minimax.model) == 4096


def test_a_model_that_names_no_longest_text_has_none():
    class Config:
        def get_text_config(self):
            return object()

    class Model:
        config = Config()

    assert max_positions(Model()) is None
