"""What an engine accepts."""

import pytest

from fp8kv.recipes.errors import RequestError
from fp8kv.runtime.limits import EngineLimits


@pytest.mark.parametrize(
    ("token_ids", "max_tokens", "message"),
    [
        ((), 1, r"^the prompt is empty: give"),
        ((1, 259), 1, r"^the prompt holds token id 259, and the model knows 0 to 258: use"),
        ((5, -1), 1, r"^the prompt holds token id -1"),
        (
            (1,) * 20,
            12,
            r"^a prompt of 20 tokens with max_tokens 12 exceeds the model's 31 positions: shorten",
        ),
        ((1,) * 19, 11, r"^a prompt of 19 tokens .* can never fit .* 28 tokens: .*num_pages"),
        ((1,) * 29, 0, r"can never fit"),
    ],
)
def test_what_can_never_run_is_refused_in_one_sentence(token_ids, max_tokens, message):
    with pytest.raises(RequestError, match=message):
        EngineLimits(259, 31).check(token_ids, max_tokens, capacity=28)


@pytest.mark.parametrize(
    ("length", "max_tokens", "limit", "capacity"),
    [
        (20, 11, 31, 31),
        (20, 12, None, 31),  # the last token is not cached
        (31, 0, 31, 31),
    ],
)
def test_what_just_fits_is_accepted(length, max_tokens, limit, capacity):
    EngineLimits(259, limit).check((0, 258) + (7,) * (length - 2), max_tokens, capacity)


@pytest.mark.parametrize("name", ["max_batch_tokens", "max_sequences"])
def test_limits_of_nothing_are_refused(name):
    with pytest.raises(RequestError, match=f"{name} is 0: give a whole number of at least 1"):
        EngineLimits(10, None, **{name: 0})
