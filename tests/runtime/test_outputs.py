"""From a token to an output."""

import pytest

from fp8kv.runtime.detokenizer import Detokenizer
from fp8kv.runtime.outputs import News, make_output
from fp8kv.runtime.scheduler import Continuation

A, B, EOS = 64, 65, 257


def say(tokenizer, tokens, reason):
    """The output of the last token, after those before it."""
    detokenizer = Detokenizer(tokenizer, ("ab",))
    for token in tokens[:-1]:
        detokenizer.append(token)
    continuation = Continuation(4, 1, [], 0)
    return make_output(News(continuation, tokens[-1], (), reason), detokenizer)


@pytest.mark.parametrize(
    ("tokens", "reason", "text", "expected"),
    [
        ([B], None, "b", None),
        ([A], None, "", None),  # may be the beginning of the stop string
        ([A], "length", "a", "length"),
        ([A, B], None, "", "stop"),
        ([A, B], "length", "", "stop"),
        ([A, EOS], "stop", "a", "stop"),
        ([A, None], "error", "a", "error"),
    ],
)
def test_text_and_reason(byte_tokenizer, tokens, reason, text, expected):
    output = say(byte_tokenizer, tokens, reason)
    assert (output.text, output.finish_reason) == (text, expected)
    assert output.token_ids == (() if tokens[-1] is None else (tokens[-1],))
    assert (output.request_id, output.index) == (4, 1)


def test_an_error_says_what_to_do(byte_tokenizer):
    assert "dtype" in say(byte_tokenizer, [None], "error").error
    assert say(byte_tokenizer, [B], "length").error is None
