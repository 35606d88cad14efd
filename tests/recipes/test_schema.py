"""The checks that span fields, and the comparison with a checkpoint's config.json."""

import dataclasses
import math

import pytest

from fp8kv.recipes import (
    Calibration,
    Data,
    Model,
    Output,
    Recipe,
    RecipeError,
    Scales,
    Source,
    check_model,
)

FACTS = {"num_hidden_layers": 62, "num_key_value_heads": 8, "head_dim": 128}
CONFIG = {"model_type": "minimax_m2", **FACTS, "vocab_size": 200064}


def recipe_for(**model):
    return Recipe(name="mine", model=Model(**model))


def test_a_recipe_needs_no_more_than_a_name():
    recipe = Recipe(name="mine")
    assert recipe.data.num_samples == 512
    assert recipe.scales.estimator == "absmax"
    assert recipe.output.targets == ("vllm", "sglang")
    assert recipe.model == Model()
    assert recipe.measured == {}


def test_a_recipe_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Recipe(name="mine").name = "yours"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Recipe(name=" "), "name is empty; expected the name of the recipe"),
        (lambda: Data(sources=()), "data.sources is empty; expected at least one dataset"),
        (
            lambda: Data(sources=(Source("a"), Source(""))),
            "data.sources[1].dataset is empty; expected a dataset name or path",
        ),
        (
            lambda: Data(sources=(Source("a", split=""),)),
            "data.sources[0].split is empty; expected the name of a split",
        ),
        (
            lambda: Data(sources=(Source("a", weight=0.0),)),
            "data.sources[0].weight is 0.0; expected a number above 0",
        ),
        (
            lambda: Data(num_samples=0),
            "data.num_samples is 0; expected a whole number of at least 1",
        ),
        (lambda: Data(seq_len=-1), "data.seq_len is -1; expected a whole number of at least 1"),
        (lambda: Data(seed=-1), "data.seed is -1; expected a whole number of at least 0"),
        (
            lambda: Calibration(batch_size=0),
            "calibration.batch_size is 0; expected a whole number of at least 1",
        ),
        (
            lambda: Scales(percentile=0.0),
            "scales.percentile is 0.0; expected a number above 0 and at most 100",
        ),
        (
            lambda: Scales(percentile=100.1),
            "scales.percentile is 100.1; expected a number above 0 and at most 100",
        ),
        (lambda: Scales(headroom=0.0), "scales.headroom is 0.0; expected a number above 0"),
        (lambda: Scales(headroom=math.nan), "scales.headroom is nan; expected a number above 0"),
        (lambda: Scales(headroom=math.inf), "scales.headroom is inf; expected a number above 0"),
        (lambda: Output(targets=()), "output.targets is empty; expected at least one engine"),
        (
            lambda: Output(targets=("vllm", "vllm")),
            "output.targets is [vllm, vllm]; expected each engine once",
        ),
        (
            lambda: Model(facts={"head_dim": None}),
            "model.facts.head_dim is None; expected a number, text, true or false, "
            "or a list of accepted ones",
        ),
        (lambda: Model(facts={"head_dim": []}), "model.facts.head_dim is []; expected a number"),
        (
            lambda: Recipe(
                name="x", model=Model(attention="mla"), scales=Scales(granularity="head")
            ),
            'scales.granularity is "head" while model.attention is "mla"',
        ),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_key(build, message):
    with pytest.raises(RecipeError) as caught:
        build()
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Scales(percentile=100.0),
        lambda: Scales(headroom=0.5),
        lambda: Data(num_samples=1, seq_len=1, seed=0),
        lambda: Recipe(name="x", model=Model(attention="gqa"), scales=Scales(granularity="head")),
        lambda: Recipe(name="x", scales=Scales(granularity="head")),
    ],
)
def test_values_at_the_edge_of_their_range_are_taken(build):
    build()


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
