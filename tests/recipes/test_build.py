"""Strict conversion of plain mappings to recipes, and overriding."""

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8kv.recipes import (
    Recipe,
    RecipeError,
    Scales,
    Source,
    build_recipe,
    load_recipe,
    override,
    recipe_content,
)

MINIMAL = {"schema": 1, "name": "mine"}


def refusal(content):
    with pytest.raises(RecipeError) as caught:
        build_recipe(content)
    return str(caught.value)


def test_sections_that_are_left_out_take_their_defaults():
    assert build_recipe(MINIMAL) == Recipe(name="mine")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "a recipe is a mapping of keys to values, found a list"),
        ("text", 'a recipe is a mapping of keys to values, found "text"'),
        ({"name": "x"}, "schema is missing; add the line `schema: 1`"),
        (
            {"schema": 2, "name": "x"},
            "schema is 2; this fp8kv reads schema 1, so rewrite the recipe or use the fp8kv version "
            "that it was written for",
        ),
        ({"schema": "1", "name": "x"}, 'schema is "1"; this fp8kv reads schema 1'),
        ({"schema": True, "name": "x"}, "schema is true; this fp8kv reads schema 1"),
        ({"schema": 1}, "name is missing; expected text"),
    ],
)
def test_what_is_no_recipe_of_this_schema_is_refused(content, message):
    assert refusal(content).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": 1.5}, "name is 1.5; expected text, so put it in quotes"),
        ({"description": None}, "description is null; expected text"),
        ({"scales": None}, "scales is null; expected a mapping of keys to values"),
        ({"scales": []}, "scales is a list; expected a mapping of keys to values"),
        (
            {"scales": {"estimator": "absmx"}},
            'scales.estimator is "absmx"; expected one of absmax, percentile, mse '
            "(did you mean absmax?)",
        ),
        (
            {"scales": {"estimator": "zzz"}},
            'scales.estimator is "zzz"; expected one of absmax, percentile, mse',
        ),
        (
            {"data": {"chat_template": False}},
            "data.chat_template is false; expected one of auto, always, never",
        ),
        ({"scales": {"headroom": "1.5"}}, 'scales.headroom is "1.5"; expected a finite number'),
        ({"scales": {"headroom": True}}, "scales.headroom is true; expected a finite number"),
        (
            {"scales": {"headroom": float("nan")}},
            "scales.headroom is nan; expected a finite number",
        ),
        (
            {"scales": {"headroom": 10**400}},
            f"scales.headroom is 1{'0' * 56}...; expected a finite number",
        ),
        ({"scales": {"power_of_two": 1}}, "scales.power_of_two is 1; expected true or false"),
        ({"data": {"num_samples": 512.0}}, "data.num_samples is 512.0; expected a whole number"),
        ({"data": {"num_samples": "512"}}, 'data.num_samples is "512"; expected a whole number'),
        ({"data": {"num_samples": True}}, "data.num_samples is true; expected a whole number"),
        (
            {"calibration": {"batch_size": "auto"}},
            'calibration.batch_size is "auto"; expected a whole number',
        ),
        ({"output": {"targets": "vllm"}}, 'output.targets is "vllm"; expected a list'),
        (
            {"output": {"targets": ["vllm", "sglan"]}},
            'output.targets[1] is "sglan"; expected one of vllm, sglang, transformers, modelopt '
            "(did you mean sglang?)",
        ),
        ({"model": {"model_type": [3]}}, "model.model_type[0] is 3; expected text"),
        ({"model": {"facts": [1]}}, "model.facts is a list; expected a mapping"),
        ({"model": {"facts": {1: 2}}}, "model.facts has the key 1; expected text, so quote it"),
        (
            {"expect": {"max_kl": "1e-3"}},
            'expect.max_kl is "1e-3"; expected a finite number, so write 0.001',
        ),
        (
            {"expect": {"arm": "bf16"}},
            'expect.arm is "bf16"; expected one of fp8-unit, fp8, emulate',
        ),
        (
            {"measured": {"runs": [{"when": object}]}},
            "measured.runs[0].when is <class 'object'>; expected text, a finite number",
        ),
        ({"measured": {"exact_match": float("inf")}}, "measured.exact_match is inf; expected"),
        ({"data": {"sources": {}}}, "data.sources is a mapping; expected a list"),
        ({"data": {"sources": ["gsm8k"]}}, 'data.sources[0] is "gsm8k"; expected a mapping'),
        ({"data": {"sources": [{}]}}, "data.sources[0].dataset is missing; expected text"),
        (
            {"data": {"sources": [{"dataset": "a"}, {"dataset": "b", "config": 3}]}},
            "data.sources[1].config is 3; expected text, so put it in quotes",
        ),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_key_value_and_expectation(changes, message):
    assert refusal({**MINIMAL, **changes}).startswith(message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"scale": {}},
            "unknown key scale (did you mean scales?); known keys: name, description, model, data, "
            "calibration, scales, output, serve, expect, measured",
        ),
        (
            {"scales": {"headrom": 1.0}},
            "unknown key scales.headrom (did you mean headroom?); known keys of scales: estimator, "
            "percentile, headroom, power_of_two, granularity, fp8_format",
        ),
        (
            {"data": {"sources": [{"dataset": "a", "Weight": 1}]}},
            "unknown key data.sources[0].Weight (did you mean weight?); known keys of data.sources[0]:",
        ),
        ({"SCALES": {}}, "unknown key SCALES (did you mean scales?)"),
        ({"serve": {"qqqq": ""}}, "unknown key serve.qqqq; known keys of serve: vllm, sglang"),
        ({True: 1}, "the recipe has the key true; expected text, so quote it"),
        ({"serve": {3: ""}}, "serve has the key 3; expected text, so quote it"),
    ],
)
def test_an_unknown_key_is_refused_with_its_path_and_the_closest_known_key(changes, message):
    assert refusal({**MINIMAL, **changes}).startswith(message)


def test_a_whole_number_serves_where_a_number_is_expected():
    recipe = build_recipe({**MINIMAL, "scales": {"headroom": 2, "percentile": 99}})
    assert recipe.scales == Scales(headroom=2.0, percentile=99.0)
    assert type(recipe.scales.headroom) is float


def test_null_leaves_an_optional_value_unset():
    content = {"calibration": {"batch_size": None}, "data": {"sources": [{"dataset": "a"}]}}
    recipe = build_recipe({**MINIMAL, **content, "model": {"attention": None}})
    assert recipe.calibration.batch_size is None
    assert recipe.model.attention is None


def test_free_form_content_is_copied():
    measured = {"gsm8k": {"scores": [0.5, None, "x", True]}}
    recipe = build_recipe({**MINIMAL, "measured": measured})
    measured["gsm8k"]["scores"].append(3)
    assert recipe.measured == {"gsm8k": {"scores": [0.5, None, "x", True]}}


def test_override_wins_over_the_recipe_and_the_recipe_over_the_default():
    recipe = override(Recipe(name="mine"), {"scales.estimator": "percentile", "data.seed": 3})
    changed = override(recipe, {"scales.estimator": "mse"})
    assert changed.scales.estimator == "mse"
    assert changed.data.seed == 3
    assert changed.data.seq_len == Recipe(name="x").data.seq_len
    assert recipe.scales.estimator == "percentile"


def test_override_ignores_what_the_user_did_not_give():
    recipe = load_recipe("qwen3")
    assert override(recipe, {"scales.estimator": None, "data": None}) == recipe


def test_override_takes_sections_lists_and_dataclasses_whole():
    recipe = load_recipe("qwen3")
    sources = (Source("builtin:gsm-synth"),)
    assert override(recipe, {"data.sources": sources}).data.sources == sources
    mapping = [{"dataset": "builtin:gsm-synth"}]
    assert override(recipe, {"data.sources": mapping}).data.sources == sources
    scales = override(recipe, {"scales": {"headroom": 2}, "scales.estimator": "mse"}).scales
    assert scales == Scales(headroom=2.0, estimator="mse")


def test_override_leaves_the_given_values_alone():
    section = {"headroom": 2}
    override(Recipe(name="mine"), {"scales": section, "scales.estimator": "mse"})
    assert section == {"headroom": 2}


def test_override_sets_single_facts():
    recipe = override(load_recipe("minimax-m2"), {"model.facts.num_hidden_layers": 6})
    assert recipe.model.facts["num_hidden_layers"] == 6
    assert recipe.model.facts["head_dim"] == 128


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("scales.estimater", "mse", "unknown key scales.estimater (did you mean estimator?)"),
        ("scale.estimator", "mse", "unknown key scale (did you mean scales?)"),
        ("scales.estimator", "min", 'scales.estimator is "min"; expected one of absmax'),
        ("data.num_samples", "5", 'data.num_samples is "5"; expected a whole number'),
        ("data.num_samples", 0, "data.num_samples is 0; expected a whole number of at least 1"),
        (
            "data.sources.0.weight",
            2,
            "data.sources.0 is no key of a recipe: data.sources is not a section",
        ),
        ("schema", 2, "schema is 2; this fp8kv reads schema 1"),
    ],
)
def test_override_refuses_what_a_file_could_not_say(path, value, message):
    with pytest.raises(RecipeError) as caught:
        override(Recipe(name="mine"), {path: value})
    assert str(caught.value).startswith(message)


VALUES = {
    "name": st.text(string.printable, min_size=1).filter(str.strip),
    "data.num_samples": st.integers(1, 10**6),
    "data.seq_len": st.integers(1, 10**6),
    "data.seed": st.integers(0),
    "data.chat_template": st.sampled_from(["auto", "always", "never"]),
    "calibration.batch_size": st.integers(1, 512),
    "scales.estimator": st.sampled_from(["absmax", "percentile", "mse"]),
    "scales.percentile": st.floats(0, 100, exclude_min=True),
    "scales.headroom": st.floats(0, 1e30, exclude_min=True),
    "scales.power_of_two": st.booleans(),
    "scales.fp8_format": st.sampled_from(["e4m3fn", "e5m2", "e4m3fnuz"]),
}
CHANGES = st.fixed_dictionaries({}, optional=VALUES)


def at(recipe, path):
    value = recipe
    for key in path.split("."):
        value = getattr(value, key)
    return value


@settings(deadline=None)
@given(CHANGES)
def test_override_changes_what_it_is_told_to_and_nothing_else(changes):
    recipe = load_recipe("llama-3")
    changed = override(recipe, changes)
    for path in VALUES:
        assert at(changed, path) == changes.get(path, at(recipe, path))
    assert changed.data.sources == recipe.data.sources
    assert changed.model == recipe.model


@settings(deadline=None)
@given(CHANGES, CHANGES)
def test_two_overrides_are_one_with_the_later_winning(first, second):
    recipe = Recipe(name="mine")
    assert override(override(recipe, first), second) == override(recipe, {**first, **second})


@settings(deadline=None)
@given(CHANGES)
def test_plain_content_builds_the_same_recipe(changes):
    recipe = override(load_recipe("deepseek-v3"), changes)
    assert build_recipe(recipe_content(recipe)) == recipe
