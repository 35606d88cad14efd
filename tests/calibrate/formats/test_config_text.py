"""Editing JSON as text: the right dictionary, and nothing else changed."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8kv.calibrate.formats.config_text import nested_edits, set_json_key, set_json_keys
from fp8kv.recipes.errors import CheckpointError

TRANSFORMERS_STYLE = """{
  "architectures": [
    "LlamaForCausalLM"
  ],
  "model_type": "llama",
  "quantization_config": {
    "quant_method": "fp8",
    "weight_block_size": [
      128,
      128
    ]
  },
  "vocab_size": 4096
}
"""

keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | keys
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=8,
)
documents = st.dictionaries(keys, values, max_size=5)
layouts = st.sampled_from(
    [
        {},
        {"separators": (",", ":")},
        {"indent": 2},
        {"indent": 4, "ensure_ascii": False},
        {"indent": "\t"},
        {"indent": 2, "separators": (" ,", " : ")},
    ]
)
line_ends = st.sampled_from(["\n", "\r\n"])
tails = st.sampled_from(["", "\n", "\r\n", "  \n\n"])


def intended(document, path, value):
    result = json.loads(json.dumps(document))
    inner = result
    for key in path[:-1]:
        inner = inner.setdefault(key, {})
    inner[path[-1]] = value
    return result


def reachable(document, path):
    for key in path[:-1]:
        if key not in document:
            return True
        document = document[key]
        if not isinstance(document, dict):
            return False
    return True


@given(documents, layouts, line_ends, tails, st.lists(keys, min_size=1, max_size=3), values)
def test_the_result_parses_to_the_intended_dictionary(
    document, layout, line_end, tail, path, value
):
    text = json.dumps(document, **layout).replace("\n", line_end) + tail
    if not reachable(document, path):
        with pytest.raises(CheckpointError, match="not an object"):
            set_json_key(text, path, value)
        return
    result = set_json_key(text, path, value)
    assert json.loads(result) == intended(document, path, value)
    assert list(json.loads(result))[: len(document)] == list(document)


@given(documents, layouts, line_ends, tails, keys, values)
def test_every_byte_outside_the_edit_stays(document, layout, line_end, tail, key, value):
    text = json.dumps(document, **layout).replace("\n", line_end) + tail
    result = set_json_key(text, [key], value)
    prefix, suffix = common_ends(text, result)
    if key not in document:
        # One place was widened, and everything before and behind it is as it was
        # (white space inside an object that was empty belongs to that place).
        assert prefix + suffix >= (len(text) if document else len(text) - 2)
    else:
        assert result.endswith(tail)
        assert list(json.loads(result)) == list(document)


@given(documents, layouts, line_ends, tails)
def test_setting_a_value_that_is_already_there_changes_nothing(document, layout, line_end, tail):
    text = json.dumps(document, **layout).replace("\n", line_end) + tail
    for key, value in document.items():
        assert set_json_key(text, [key], value) == text


@given(documents, layouts, st.lists(st.tuples(keys, values), max_size=6))
def test_many_edits_at_once_equal_the_same_edits_one_by_one(document, layout, items):
    text = json.dumps(document, **layout)
    once = text
    for key, value in items:
        once = set_json_key(once, [key], value)
    together = set_json_keys(text, [((key,), value) for key, value in items])
    assert json.loads(together) == json.loads(once)


def test_a_key_added_to_an_object_takes_its_indentation():
    result = set_json_key(TRANSFORMERS_STYLE, ["quantization_config", "kv_cache_quant_algo"], "FP8")
    assert result == TRANSFORMERS_STYLE.replace(
        "      128\n    ]\n  },", '      128\n    ],\n    "kv_cache_quant_algo": "FP8"\n  },'
    )


def test_an_added_object_is_indented_below_its_key():
    result = set_json_key('{\n    "a": 1\n}', ["b"], {"c": [], "d": {"e": 1}})
    assert result == (
        '{\n    "a": 1,\n    "b": {\n        "c": [],\n        "d": {\n            "e": 1\n'
        "        }\n    }\n}"
    )


def test_a_replaced_value_keeps_its_neighbours_and_its_place():
    text = '{ "a":1,\n\t"b" : null , "c":  3}'
    assert set_json_key(text, ["b"], 2.5) == '{ "a":1,\n\t"b" : 2.5 , "c":  3}'


def test_missing_objects_on_the_way_are_created_once():
    result = set_json_keys('{\n  "a": 1\n}', nested_edits(("x", "y"), {"p": 1, "q": 2}))
    assert (
        result == '{\n  "a": 1,\n  "x": {\n    "y": {\n      "p": 1,\n      "q": 2\n    }\n  }\n}'
    )


def test_an_empty_object_is_opened_in_the_style_of_the_document():
    text = '{\r\n\t"a": {}\r\n}\r\n'
    assert set_json_key(text, ["a", "b"], 1) == '{\r\n\t"a": {\r\n\t\t"b": 1\r\n\t}\r\n}\r\n'
    assert set_json_key('{"a":{ }}', ["a", "b"], {"c": 1}) == '{"a":{"b":{"c":1}}}'
    assert set_json_key("{}\n", ["a"], 1) == '{\n  "a": 1\n}\n'


def test_unicode_and_escapes_outside_the_edit_are_not_normalised():
    text = '{"caf\\u00e9": "ü\\/\\ud83d\\ude00", "n": 1e5, "big": 123456789012345678901234567890}'
    result = set_json_key(text, ["n"], 2)
    assert result == text.replace("1e5", "2")


def test_of_a_repeated_key_the_last_is_changed_because_readers_take_it():
    assert set_json_key('{"a": 1, "a": 2}', ["a"], 3) == '{"a": 1, "a": 3}'


def test_true_is_not_taken_for_one():
    assert set_json_key('{"dynamic": 0}', ["dynamic"], False) == '{"dynamic": false}'


@pytest.mark.parametrize(
    ("text", "message"), [("[1]", "not an object"), ("{", "not JSON"), ("", "not JSON")]
)
def test_a_document_that_is_no_object_is_refused(text, message):
    with pytest.raises(CheckpointError, match=message):
        set_json_key(text, ["a"], 1)


@pytest.mark.parametrize("value", ["null", "1", "[]"])
def test_a_value_on_the_way_that_is_no_object_is_named(value):
    with pytest.raises(CheckpointError, match=r"the JSON key a\.b is not an object"):
        set_json_key(f'{{"a": {{"b": {value}}}}}', ["a", "b", "c"], 1)


def test_an_edit_without_a_key_is_refused():
    with pytest.raises(CheckpointError, match="at least one key"):
        set_json_key("{}", [], 1)


def test_additions_to_a_large_weight_map_come_behind_it_in_order():
    names = {f"model.layers.{i}.weight": "model-00001-of-00002.safetensors" for i in range(2000)}
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": names}, indent=2)
    edits = [(("weight_map", f"model.layers.{i}.k_scale"), "s.safetensors") for i in range(2000)]
    result = json.loads(set_json_keys(text, edits))
    assert len(result["weight_map"]) == 4000
    assert list(result["weight_map"])[:2000] == list(names)


def common_ends(one, other):
    prefix = 0
    while prefix < min(len(one), len(other)) and one[prefix] == other[prefix]:
        prefix += 1
    suffix = 0
    while suffix < min(len(one), len(other)) - prefix and one[-1 - suffix] == other[-1 - suffix]:
        suffix += 1
    return prefix, suffix
