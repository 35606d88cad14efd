"""Outputs joined to what they are the steps of."""

import pytest

from fp8kv.runtime.requests import Choice, Completion, Output, TokenLogprob, join_outputs


def output(token_id, text, reason=None, logprobs=()):
    return Output(4, 1, (token_id,), text, logprobs, reason)


def test_the_steps_of_a_continuation_join_to_it():
    entry = TokenLogprob(9, -0.5, ((9, -0.5),))
    steps = [output(7, "se"), output(8, ""), output(9, "ven", "length", (entry,))]
    assert join_outputs(steps) == Choice("seven", (7, 8, 9), (entry,), "length")


def test_a_continuation_that_goes_on_is_not_joined():
    with pytest.raises(ValueError, match="not the continuation's end"):
        join_outputs([output(7, "a")])


def test_the_text_of_a_completion_is_its_first():
    choices = tuple(Choice(text, (), (), "stop") for text in ("one", "two"))
    assert Completion((1,), choices).text == "one"
