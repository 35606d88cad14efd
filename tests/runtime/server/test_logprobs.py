"""How tokens are shown, and where they begin."""

import math

import pytest

pytest.importorskip("fastapi")

from fp8kv.runtime.requests import TokenLogprob
from fp8kv.runtime.server.logprobs import (
    TextOffsets,
    TokenNames,
    chat_logprobs,
    completion_logprobs,
)


@pytest.fixture
def names(byte_tokenizer):
    return TokenNames(byte_tokenizer)


def ids(tokenizer, text):
    return tokenizer(text)["input_ids"]


def test_a_token_that_is_text_is_shown_as_it_is(names, byte_tokenizer):
    (token,) = ids(byte_tokenizer, "a")
    assert (names.name(token), names.utf8(token)) == ("a", [97])
    (space,) = ids(byte_tokenizer, " ")
    assert (names.name(space), names.utf8(space)) == (" ", [32])


def test_a_token_that_is_half_a_character_is_shown_as_bytes(names, byte_tokenizer):
    first, second, third = ids(byte_tokenizer, "€")
    assert names.name(first) == "bytes:\\xe2"
    assert [names.utf8(token) for token in (first, second, third)] == [[0xE2], [0x82], [0xAC]]


def test_every_byte_is_known(names, byte_tokenizer):
    found = sorted(names.utf8(token) for token in range(256))
    assert found == [[byte] for byte in range(256)]
    assert len({names.name(token) for token in range(256)}) == 256


def test_special_tokens_are_shown(names, byte_tokenizer):
    assert names.name(byte_tokenizer.eos_token_id) == byte_tokenizer.eos_token


class Spaced:
    """A tokenizer whose decoder strips the first space, as those of SentencePiece do, and has tokens of bytes."""

    pieces = ("\u2581Hello", "\u2581you", "<0xE2>", "\N{REPLACEMENT CHARACTER}\u4e00", None)

    def decode(self, token_ids, **_options):
        text = "".join(
            "\N{REPLACEMENT CHARACTER}"
            if one in (2, 4)
            else self.pieces[one].replace("\u2581", " ")
            for one in token_ids
        )
        return text.removeprefix(" ")

    def convert_ids_to_tokens(self, token_id):
        return self.pieces[token_id]


def test_a_space_at_the_beginning_is_part_of_the_token():
    names = TokenNames(Spaced())
    assert [names.name(0), names.name(1)] == [" Hello", " you"]
    assert (names.name(2), names.utf8(2)) == ("bytes:\\xe2", [0xE2])
    assert names.utf8(3) is names.utf8(4) is None


def test_places_follow_the_text_and_not_the_tokens(byte_tokenizer):
    offsets = TextOffsets(byte_tokenizer)
    found = [offsets.next(token) for token in ids(byte_tokenizer, "a€b")]
    assert found == [0, 1, 1, 1, 2]


def test_of_alternatives_that_look_alike_the_best_is_shown(byte_tokenizer):
    class Same(TokenNames):
        def name(self, token_id):
            return "x" if token_id < 3 else "y"

    entry = TokenLogprob(2, -3.0, ((0, -1.0), (1, -2.0), (3, -2.5)))
    found = completion_logprobs([entry], Same(byte_tokenizer), TextOffsets(byte_tokenizer))
    assert found["top_logprobs"] == [{"x": -1.0, "y": -2.5}]
    assert list(found["top_logprobs"][0]) == ["x", "y"]
    assert found["token_logprobs"] == [-3.0]


def test_what_is_impossible_has_a_number_that_json_knows(names, byte_tokenizer):
    entry = TokenLogprob(5, -math.inf, ((6, 0.0), (5, -math.inf)))
    found = completion_logprobs([entry], names, TextOffsets(byte_tokenizer))
    assert found["token_logprobs"] == [-9999.0]
    (found,) = chat_logprobs([entry], names)["content"]
    assert found["logprob"] == found["top_logprobs"][1]["logprob"] == -9999.0
