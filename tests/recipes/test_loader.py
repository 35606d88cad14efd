"""Recipes by name and file, their YAML, their digest, and the search by checkpoint."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8kv.recipes import (
    Expect,
    Recipe,
    RecipeError,
    default_recipe,
    find_recipe_for,
    list_recipes,
    load_expect,
    load_recipe,
    override,
    recipe_digest,
    recipe_text,
    recipe_to_yaml,
)

MINIMAL = "schema: 1\nname: mine\n"


@pytest.fixture
def write(tmp_path):
    def write_file(text, name="mine.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
        return path

    return write_file


def refusal(source):
    with pytest.raises(RecipeError) as caught:
        load_recipe(source)
    return str(caught.value)


def test_a_file_is_loaded_by_path_object_and_by_text(write):
    path = write(MINIMAL)
    assert load_recipe(path) == load_recipe(str(path)) == Recipe(name="mine")


def test_a_file_without_a_suffix_is_found_in_the_working_directory(write, monkeypatch):
    path = write(MINIMAL, "plain")
    monkeypatch.chdir(path.parent)
    assert load_recipe("plain").name == "mine"


def test_a_built_in_name_wins_over_a_file_of_that_name(write, monkeypatch):
    path = write(MINIMAL, "qwen3")
    monkeypatch.chdir(path.parent)
    assert load_recipe("qwen3").name == "qwen3"
    assert load_recipe("./qwen3").name == "mine"
    assert load_recipe(Path("qwen3")).name == "mine"


def test_an_unknown_name_lists_the_known_ones_and_suggests_the_closest():
    message = refusal("MiniMax-M2.55")
    assert message.startswith("unknown recipe MiniMax-M2.55 (did you mean minimax-m2.5?)")
    assert all(name in message for name in list_recipes())
    assert "did you mean" not in refusal("zzzzzz")
    assert refusal("z" * 5000).startswith("unknown recipe zzz")


@pytest.mark.parametrize("name", ["gone.yaml", "gone.yml", "folder/gone"])
def test_a_missing_file_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(name)
    assert message.startswith(f"recipe file {name} does not exist; check the path")
    assert "minimax-m2" in message


def test_a_directory_is_refused(tmp_path):
    assert refusal(tmp_path).startswith(f"recipe file {tmp_path} cannot be read: ")


def test_a_path_that_no_system_takes_is_refused():
    assert "cannot be read" in refusal(Path("nul\0byte"))


def test_a_file_that_is_not_text_is_refused(write):
    path = write(b"\xff\xfe\x00name")
    assert refusal(path) == f"recipe file {path} is not UTF-8 text; save it as UTF-8"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the recipe is empty; start with the lines `schema: 1` and `name: ...`"),
        ("# only a comment\n", "the recipe is empty"),
        ("- a\n- b\n", "a recipe is a mapping of keys to values, found a list"),
        ("just text\n", 'a recipe is a mapping of keys to values, found "just text"'),
        (
            "schema: 1\nname: [a\nmodel: {}\n",
            "line 3: while parsing a flow sequence, expected ',' or ']', but got ':'; correct the YAML",
        ),
        ("schema: 1\nname: a: b\n", "line 2: mapping values are not allowed here"),
        (
            "schema: 1\nname: a\ndata:\n  seed: 1\n  seq_len: 5\n  seed: 2\n",
            "line 6: the key seed stands twice in one mapping, keep one; correct the YAML",
        ),
        (
            "schema: 1\nname: a\nmeasured: {x: 1, 'x': 2}\n",
            "line 3: the key x stands twice in one mapping",
        ),
        (
            "schema: 1\nname: &n a\ndescription: *n\n",
            "line 3: aliases (*name) are not read in recipes, write the value out",
        ),
        ("schema: 1\nname: !!python/name:os.system\n", "line 2: could not determine a constructor"),
        (
            "schema: 1\n---\nschema: 1\n",
            "line 2: expected a single document in the stream, but found another",
        ),
        ("? [a]\n: b\n", "line 1: while constructing a mapping, found unhashable key"),
        ("schema: !!int x\n", "this is no YAML that can be read: invalid literal for int()"),
        ("name: a\0b\n", "this is no YAML that can be read: unacceptable character #x0000"),
        ("[" * 5000, "this is no YAML that can be read: maximum recursion depth"),
        ("schema: 3\nname: a\n", "schema is 3; this fp8kv reads schema 1"),
        ("name: a\n", "schema is missing; add the line `schema: 1`"),
        (MINIMAL + "scale: {}\n", "unknown key scale (did you mean scales?)"),
        (MINIMAL + "data: {seed: x}\n", 'data.seed is "x"; expected a whole number'),
        (MINIMAL + "data: {seed: -1}\n", "data.seed is -1; expected a whole number of at least 0"),
        (MINIMAL + "data: {chat_template: no}\n", "data.chat_template is false; expected one of"),
        (MINIMAL + "serve: {no: x}\n", "serve has the key false; expected text, so quote it"),
        (MINIMAL + "measured: {when: !!timestamp 2026-11-20}\n", "measured.when is 2026-11-20;"),
    ],
)
def test_a_bad_file_is_refused_by_name_and_place(text, message, write):
    path = write(text)
    assert refusal(path).startswith(f"{path}: {message}")


def test_a_date_is_read_as_text(write):
    recipe = load_recipe(write(MINIMAL + "measured: {date: 2026-11-20, bad: 2026-02-31}\n"))
    assert recipe.measured == {"date": "2026-11-20", "bad": "2026-02-31"}


def test_the_text_of_a_recipe_keeps_its_comments(write):
    path = write("# why\n" + MINIMAL)
    assert recipe_text(path) == "# why\n" + MINIMAL
    assert recipe_text("qwen3").startswith("# ")


def test_the_default_recipe_is_the_dataclasses_defaults():
    recipe = default_recipe()
    assert recipe == Recipe(name="default", description=recipe.description)


def test_yaml_has_every_default_in_a_fixed_order(write):
    text = recipe_to_yaml(Recipe(name="mine"))
    assert text.startswith("schema: 1\nname: mine\ndescription: ''\nmodel:\n  ids: []\n")
    assert "  estimator: absmax\n  percentile: 99.99\n  headroom: 1.0\n" in text
    assert text.endswith("measured: {}\n")
    assert load_recipe(write(text)) == Recipe(name="mine")


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(
    name=st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip),
    headroom=st.floats(0, 1e300, exclude_min=True),
    flags=st.text(st.characters(exclude_categories=["Cs"])),
    measured=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), PLAIN, max_size=3),
)
def test_yaml_loads_back_to_the_same_recipe(name, headroom, flags, measured, tmp_path_factory):
    recipe = override(
        Recipe(name="x"),
        {"name": name, "scales.headroom": headroom, "serve.vllm": flags, "measured": measured},
    )
    path = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    path.write_text(recipe_to_yaml(recipe), encoding="utf-8")
    again = load_recipe(path)
    assert again == recipe
    assert recipe_to_yaml(again) == recipe_to_yaml(recipe)
    assert recipe_digest(again) == recipe_digest(recipe)


def test_the_digest_does_not_depend_on_the_order_or_the_way_of_writing(write):
    one = "schema: 1\nname: a\nscales: {headroom: 1, estimator: mse}\nmeasured: {b: 1, a: 2}\n"
    two = (
        "measured:\n  a: 2\n  b: 1  # comment\nscales:\n  estimator: 'mse'\n  headroom: 1.0\n"
        "  percentile: 99.99\nname: a\nschema: 1\n"
    )
    digests = {recipe_digest(load_recipe(write(text))) for text in (one, two)}
    assert len(digests) == 1
    assert all(len(digest) == 64 and int(digest, 16) for digest in digests)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"scales.headroom": 1.25},
        {"data.seed": 1},
        {"data.sources": [{"dataset": "openai/gsm8k", "config": "main"}]},
        {"model.facts.head_dim": 64},
        {"output.targets": ["sglang", "vllm"]},
        {"measured.gpu": "H200"},
    ],
)
def test_the_digest_changes_with_the_content(change):
    recipe = load_recipe("minimax-m2")
    assert recipe_digest(override(recipe, change)) != recipe_digest(recipe)


def test_what_is_expected_of_the_result_is_not_part_of_the_digest():
    recipe = load_recipe("minimax-m2")
    assert recipe_digest(override(recipe, {"expect.max_kl": 0.5})) == recipe_digest(recipe)


def test_the_digest_stays_the_same_over_releases():
    # Statistics files carry it: a change of the schema that moves it must be made knowingly.
    assert (
        recipe_digest(Recipe(name="mine"))
        == "3a7aaefb9fe1508f0d39f29c0ea3a17755613f2bd1d8543a4d3c49f96f8eb71a"
    )


MINIMAX = {
    "model_type": "minimax_m2",
    "num_hidden_layers": 62,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
DEEPSEEK = {
    "model_type": "deepseek_v3",
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
}
KIMI_TEXT = {**DEEPSEEK, "model_type": "kimi_k2", "num_attention_heads": 64}


@pytest.mark.parametrize(
    ("config", "source", "expected"),
    [
        (MINIMAX, None, "minimax-m2"),
        (MINIMAX, "MiniMaxAI/MiniMax-M2.5", "minimax-m2.5"),
        (MINIMAX, "/data/models/minimax-m2.1/", "minimax-m2.1"),
        (MINIMAX, "/data/my-finetune", "minimax-m2"),
        (MINIMAX, "", "minimax-m2"),
        ({**MINIMAX, "num_hidden_layers": 6}, "MiniMaxAI/MiniMax-M2.5", None),
        (DEEPSEEK, None, "deepseek-r1"),
        (DEEPSEEK, "deepseek-ai/DeepSeek-V3-0324", "deepseek-v3"),
        (DEEPSEEK, "deepseek-ai/DeepSeek-V3.1-Terminus", "deepseek-v3.1"),
        ({**DEEPSEEK, "model_type": "deepseek_v32"}, "deepseek-ai/DeepSeek-V3.2", None),
        (KIMI_TEXT, "moonshotai/Kimi-K2-Thinking", "kimi-k2-thinking"),
        ({**KIMI_TEXT, "model_type": "deepseek_v3"}, None, "kimi-k2-instruct"),
        ({"model_type": "kimi_k25", "text_config": KIMI_TEXT}, None, "kimi-k2.5"),
        (
            {"model_type": "llama", "num_key_value_heads": 8, "vocab_size": 128256},
            None,
            "llama-3",
        ),
        ({"model_type": "llama", "num_key_value_heads": 32, "vocab_size": 32000}, None, None),
        ({"model_type": "qwen2", "num_key_value_heads": 4, "vocab_size": 152064}, None, "qwen2.5"),
        (
            {
                "model_type": "qwen3_moe",
                "num_key_value_heads": 4,
                "head_dim": 128,
                "vocab_size": 151936,
            },
            None,
            "qwen3",
        ),
        ({}, None, None),
    ],
)
def test_the_recipe_of_a_checkpoint_is_found_by_its_config(config, source, expected):
    assert find_recipe_for(config, source) == expected


def test_expectations_come_from_a_recipe_a_file_and_inline_and_the_last_wins(write):
    recipe = write(f"{MINIMAL}expect: {{arm: emulate, max_kl: 0.5, min_top1: 0.9}}\n")
    file = write("max_kl: 0.25\n", "thresholds.yaml")
    json_file = write('{"max_kl": 0.125, "arm": "fp8"}', "thresholds.json")
    assert load_expect(str(recipe)) == Expect(arm="emulate", max_kl=0.5, min_top1=0.9)
    assert load_expect(str(recipe), str(file), "max_accuracy_drop=1") == Expect(
        arm="emulate", max_kl=0.25, min_top1=0.9, max_accuracy_drop=1.0
    )
    assert load_expect(str(file), str(json_file)) == Expect(arm="fp8", max_kl=0.125)
    assert load_expect(str(recipe), "arm=fp8", "max_kl=1e-3").arm == "fp8"
    assert load_expect("max_kl=0.5", "max_kl=1e-3") == Expect(max_kl=0.001)


def test_expectations_come_from_a_built_in_recipe():
    assert load_expect("minimax-m2") == load_recipe("minimax-m2").expect


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("max_kl=low", 'expect.max_kl is "low"; expected a finite number'),
        ("max_kl=", 'expect.max_kl is ""; expected a finite number'),
        ("max_kl=inf", "expect.max_kl is inf; expected a finite number"),
        ("min_top1=2", "expect.min_top1 is 2.0; expected a number from 0 to 1"),
        ("max_lk=1", "unknown key expect.max_lk (did you mean max_kl?); known keys of expect: arm"),
        ("arm=emulate", "arm=emulate expects nothing; give thresholds such as max_accuracy_drop=1"),
        ("minimax-m3", "unknown recipe minimax-m3 (did you mean minimax-m2?)"),
    ],
)
def test_expectations_that_cannot_be_read_are_refused(setting, message):
    with pytest.raises(RecipeError) as caught:
        load_expect(setting)
    assert str(caught.value).startswith(message)


def test_a_wrong_expectation_in_a_file_names_the_file(write):
    for text in ("max_kl: low\n", f"{MINIMAL}expect: {{max_kl: low}}\n"):
        path = write(text)
        with pytest.raises(RecipeError) as caught:
            load_expect(str(path))
        assert str(caught.value) == f'{path}: expect.max_kl is "low"; expected a finite number'


def test_a_recipe_that_expects_nothing_cannot_be_asked(write):
    path = write(MINIMAL)
    with pytest.raises(RecipeError, match=r"mine\.yaml expects nothing"):
        load_expect(str(path))
