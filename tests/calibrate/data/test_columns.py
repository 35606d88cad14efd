"""Column recognition: every layout, and the errors that lead to the right option."""

import pytest

from fp8kv.calibrate.data.columns import row_content
from fp8kv.calibrate.data.files import Row
from fp8kv.recipes.errors import DataError

TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def content(column=None, **fields):
    return row_content(Row("a.jsonl line 3", fields), column)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"text": "some text", "meta": 1}, "some text"),
        ({"question": "1+1?", "answer": "#### 2"}, "Question: 1+1?\nAnswer: #### 2"),
        ({"prompt": "say", "completion": "said"}, "say\nsaid"),
        ({"prompt": "say", "response": "said"}, "say\nsaid"),
        ({"instruction": "sort", "output": "a b"}, "sort\na b"),
        ({"instruction": "sort", "input": "b a", "output": "a b"}, "sort\nb a\na b"),
        ({"instruction": "sort", "input": "", "output": "a b"}, "sort\na b"),
        ({"question": "{}", "answer": "{0}"}, "Question: {}\nAnswer: {0}"),
    ],
)
def test_plain_layouts(fields, text):
    found = content(**fields)
    assert found.text == text
    assert not found.is_chat


def test_a_text_is_one_user_message_and_a_pair_is_an_exchange():
    assert content(text="t").messages == [{"role": "user", "content": "t"}]
    assert content(question="hi", answer="ho").messages == TALK
    assert content(instruction="a", input="b", output="c").messages[0]["content"] == "a\nb"


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_messages_in_both_spellings(column):
    sharegpt = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    for spelling in (TALK, sharegpt):
        found = content(**{column: spelling})
        assert found.messages == TALK
        assert found.text == "hi\n\nho"
        assert found.is_chat


def test_other_sharegpt_roles_keep_their_names():
    assert content(conversations=[{"from": "system", "value": "be"}]).messages == [
        {"role": "system", "content": "be"}
    ]


def test_nulls_that_a_columnar_format_filled_in_are_no_keys_of_a_message():
    message = {"role": "assistant", "content": None, "tool_calls": None, "name": "x"}
    found = content(messages=[message])
    assert found.messages == [{"role": "assistant", "content": None, "name": "x"}]
    assert found.text == ""


def test_the_text_of_a_message_in_parts_leaves_out_pictures():
    parts = [{"type": "image"}, {"type": "text", "text": "look"}]
    assert content(messages=[{"role": "user", "content": parts}]).text == "look"


def test_a_named_column_wins_over_recognised_ones():
    assert content("body", text="no", body="yes").text == "yes"
    assert content("dialog", text="no", dialog=TALK).messages == TALK
    assert content("question", question="q", answer="a").text == "q"


def test_the_order_of_recognition_is_fixed():
    assert content(messages=TALK, prompt="p", completion="c").is_chat
    assert content(text="t", messages=TALK).text == "t"


@pytest.mark.parametrize(
    "fields",
    [
        {"text": None},
        {"text": " \n"},
        {"messages": []},
        {"messages": None},
        {"question": "q", "answer": ""},
        {"question": None, "answer": "a"},
        {"prompt": "", "completion": "c"},
    ],
)
def test_empty_values_are_no_content(fields):
    assert content(**fields) is None


def test_unrecognised_columns_are_listed_with_the_option_to_use():
    with pytest.raises(DataError) as error:
        content(body="x", label=1)
    assert "a.jsonl line 3 has no column that is recognised, only 'body', 'label'" in str(
        error.value
    )
    assert "column=" in str(error.value)
    with pytest.raises(DataError, match="only none"):
        content()


def test_a_wrong_column_name_gets_the_columns_and_a_suggestion():
    with pytest.raises(DataError) as error:
        content("boddy", body="x", label=1)
    assert "has no column 'boddy' (did you mean 'body'?); its columns are 'body', 'label'" in str(
        error.value
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": 3}, "column 'text' of a.jsonl line 3 holds a int, not text"),
        ({"messages": "hi"}, "holds a str, not a list of messages"),
        ({"messages": ["hi"]}, "a message that is neither {role, content} nor {from, value}: 'hi'"),
        ({"messages": [{"role": "user"}]}, "neither {role, content} nor {from, value}"),
        ({"question": ["q"], "answer": "a"}, "column 'question' of a.jsonl line 3 holds a list"),
    ],
)
def test_values_of_a_wrong_kind_are_named(fields, message):
    with pytest.raises(DataError) as error:
        content(**fields)
    assert message in str(error.value)
