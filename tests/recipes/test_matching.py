"""The comparison of a recipe with a checkpoint's config.json."""

import pytest

from fp8kv.recipes import Model, Recipe, RecipeError, check_model

FACTS = {"num_hidden_layers": 62, "num_key_value_heads": 8, "head_dim": 128}
CONFIG = {"model_type": "minimax_m2", **FACTS, "vocab_size": 200064}


def recipe_for(**model):
    return Recipe(name="mine", model=Model(**model))


def test_a_fitting_checkpoint_passes():
    check_model(recipe_for(model_type=("minimax_m2",), facts=FACTS), CONFIG)


def test_a_recipe_without_a_model_section_fits_every_checkpoint():
    check_model(Recipe(name="mine"), {})
    check_model(Recipe(name="mine"), CONFIG)


def test_every_disagreement_is_listed_in_one_message():
    recipe = recipe_for(model_type=("minimax_m2", "other"), facts={**FACTS, "rotary_dim": 64})
    config = {"model_type": "llama", "num_hidden_layers": 6, "num_key_value_heads": 8}
    with pytest.raises(RecipeError) as caught:
        check_model(recipe, config)
    assert str(caught.value) == (
        "recipe mine does not fit this checkpoint: model_type is llama, expected minimax_m2 or other; "
        "num_hidden_layers is 6, expected 62; head_dim is missing, expected 128; "
        "rotary_dim is missing, expected 64; choose another recipe, or correct its model section"
    )


def test_a_config_without_a_model_type_does_not_fit_a_recipe_that_asks_for_one():
    with pytest.raises(RecipeError, match="model_type is missing, expected minimax_m2"):
        check_model(recipe_for(model_type=("minimax_m2",)), {})


def test_facts_are_looked_up_in_the_text_config_before_the_outer_one():
    recipe = recipe_for(model_type=("kimi_k25",), facts={"num_hidden_layers": 61, "top": 1})
    outer = {"model_type": "kimi_k25", "num_hidden_layers": 27, "top": 1}
    check_model(recipe, {**outer, "text_config": {"num_hidden_layers": 61}})
    with pytest.raises(RecipeError, match="num_hidden_layers is 27, expected 61"):
        check_model(recipe, {**outer, "text_config": None})


def test_the_model_type_of_the_text_config_is_accepted_too():
    recipe = recipe_for(model_type=("kimi_k2",))
    check_model(recipe, {"model_type": "kimi_k25", "text_config": {"model_type": "kimi_k2"}})
    with pytest.raises(RecipeError, match="model_type is other / kimi_k25, expected kimi_k2"):
        check_model(recipe, {"model_type": "kimi_k25", "text_config": {"model_type": "other"}})


def test_a_list_of_values_accepts_each_of_them():
    recipe = recipe_for(facts={"num_key_value_heads": [4, 8]})
    check_model(recipe, {"num_key_value_heads": 4})
    check_model(recipe, {"num_key_value_heads": 8})
    with pytest.raises(RecipeError, match="num_key_value_heads is 2, expected 4 or 8"):
        check_model(recipe, {"num_key_value_heads": 2})


def test_a_flag_is_not_a_count():
    with pytest.raises(RecipeError, match="n_shared is True, expected 1"):
        check_model(recipe_for(facts={"n_shared": 1}), {"n_shared": True})
    check_model(recipe_for(facts={"rope_theta": 10000}), {"rope_theta": 10000.0})
