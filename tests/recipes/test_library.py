"""The recipes that ship."""

import re
import shlex

import pytest
import yaml

from fp8kv.recipes import list_recipes, load_recipe, recipe_text, recipe_to_yaml

EXPECTED = [
    "deepseek-r1",
    "deepseek-v3",
    "deepseek-v3.1",
    "kimi-k2-instruct",
    "kimi-k2-thinking",
    "kimi-k2.5",
    "llama-3",
    "minimax-m2",
    "minimax-m2.1",
    "minimax-m2.5",
    "qwen2.5",
    "qwen3",
]


def flags(text):
    words = shlex.split(text)
    return dict(zip(words, [*words[1:], ""], strict=True))


def test_the_library_holds_the_published_families():
    assert list_recipes() == EXPECTED


@pytest.mark.parametrize("name", EXPECTED)
class TestEveryRecipe:
    def test_it_loads_and_round_trips(self, name, tmp_path):
        recipe = load_recipe(name)
        path = tmp_path / "copy.yaml"
        path.write_text(recipe_to_yaml(recipe), encoding="utf-8")
        assert load_recipe(path) == recipe

    def test_it_says_what_it_is_for(self, name):
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.description
        assert recipe.model.model_type
        assert recipe.model.facts
        assert recipe.model.ids
        assert all(re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id) for hub_id in recipe.model.ids)

    def test_its_attention_is_that_of_its_facts(self, name):
        model = load_recipe(name).model
        mla = "kv_lora_rank" in model.facts
        assert model.attention == ("mla" if mla else "gqa")
        assert ("qk_rope_head_dim" in model.facts) == mla

    def test_it_writes_its_choices_out(self, name):
        # What a reader of the file must see without knowing the defaults.
        content = yaml.safe_load(recipe_text(name))
        assert {"sources", "num_samples", "seq_len"} <= content["data"].keys()
        assert "estimator" in content["scales"]
        assert content["output"]["targets"]

    def test_it_names_datasets_of_the_hub(self, name):
        for source in load_recipe(name).data.sources:
            assert re.fullmatch(r"[\w.-]+/[\w.-]+", source.dataset)

    def test_it_turns_the_fp8_cache_on_in_both_engines(self, name):
        serve = load_recipe(name).serve
        assert flags(serve.vllm)["--kv-cache-dtype"] == "fp8"
        assert flags(serve.sglang)["--kv-cache-dtype"] == "fp8_e4m3"

    def test_remote_code_is_asked_for_only_where_the_tokenizer_needs_it(self, name):
        serve = load_recipe(name).serve
        needed = name.startswith("kimi-")
        assert ("--trust-remote-code" in flags(serve.vllm)) == needed
        assert ("--trust-remote-code" in flags(serve.sglang)) == needed

    def test_it_claims_no_measurement_that_was_not_made(self, name):
        assert load_recipe(name).measured == {}

    def test_it_says_how_much_accuracy_the_cache_may_cost(self, name):
        expect = load_recipe(name).expect
        assert expect.arm == "fp8"
        assert 0 < expect.max_accuracy_drop <= 1

    def test_it_opens_with_a_comment_and_says_where_engines_ignore_scales(self, name):
        text = recipe_text(name)
        assert text.startswith("# ")
        header = text[: text.index("schema:")]
        if load_recipe(name).model.attention == "mla":
            assert "run an MLA cache at scale 1.0" in header
        if name == "qwen3":
            assert "never loads KV scales" in header


def test_no_two_recipes_claim_the_same_checkpoint():
    ids = [hub_id for name in EXPECTED for hub_id in load_recipe(name).model.ids]
    assert len(ids) == len(set(ids))
