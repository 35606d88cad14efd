"""Text token by token: the pieces are the whole, whatever the tokens, and stop strings end it at one place."""

import copy
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fp8kv.demo import MODELS, TEST_DATA
from fp8kv.runtime.detokenizer import Detokenizer

LETTERS = "ab \n<0xé€字😀👩‍👩‍👧\ufffd"
texts = st.text(alphabet=LETTERS, max_size=30)
stop_sets = st.lists(st.text(alphabet="ab é😀\ufffd", min_size=1, max_size=4), max_size=3)
BYTES = [bytes([value]) for value in range(256)]


def tokenizer_of(pieces, decoder):
    """Return a tokenizer that decodes the ids 0, 1, ... as ``pieces``; the one after the last is special."""
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, "?"))
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def byte_level(pieces):
    """Return a tokenizer of the GPT-2 kind for pieces of bytes, each written in that kind's 256 letters."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = (value for value in range(256) if value not in plain)
    letters = {value: chr(value) for value in plain}
    letters |= {value: chr(256 + place) for place, value in enumerate(others)}
    assert set(letters.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    names = ["".join(letters[value] for value in piece) for piece in pieces]
    return tokenizer_of(names, decoders.ByteLevel())


@pytest.fixture(scope="module")
def llama_like():
    """A tokenizer of the SentencePiece kind: words, and bytes for what has none."""
    words = ["▁", "▁a", "b", "▁b", "a", "▁▁", "é", "字", "\ufffd", "\n", "<0xAB", "."]
    decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer_of([*words, *(f"<0x{value:02X}>" for value in range(256))], decoder)


@pytest.fixture(scope="module")
def metaspace():
    """A tokenizer that strips the space of the first token only."""
    return tokenizer_of(["▁a", "b", "▁", "▁b", "é"], decoders.Metaspace())


@pytest.fixture(scope="module")
def trained():
    """A trained byte-level tokenizer."""
    return AutoTokenizer.from_pretrained(MODELS["tiny-minimax-m2"])


def whole(tokenizer, token_ids):
    return tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def pieces_of(tokenizer, token_ids, stops=()):
    """Return all pieces of the text, and the detokenizer."""
    detokenizer = Detokenizer(tokenizer, stops)
    pieces = [detokenizer.append(token_id) for token_id in token_ids]
    return [*pieces, detokenizer.finish()], detokenizer


def cut(text, stops):
    """Return ``text`` up to the stop string that ends first when read letter by letter, and that string."""
    for end in range(len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


def pieces_at(raw, places):
    """Return ``raw`` cut at each of ``places``, and without repetition the pieces to make a vocabulary of."""
    borders = [0, *sorted({place for place in places if 0 < place < len(raw)}), len(raw)]
    pieces = [raw[a:b] for a, b in pairwise(borders) if b > a]
    return pieces, list(dict.fromkeys(pieces))


@given(texts, st.sets(st.integers(1, 80)), stop_sets)
@settings(deadline=None)
def test_every_way_to_cut_a_text_into_tokens_gives_the_text(text, places, stops):
    pieces, vocabulary = pieces_at(text.encode(), places)
    token_ids = [vocabulary.index(piece) for piece in pieces]

    found, detokenizer = pieces_of(byte_level(vocabulary), token_ids, stops)

    assert ("".join(found), detokenizer.stop) == cut(text, stops)
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in found), "half a character was shown"


@given(st.binary(max_size=12) | st.lists(st.sampled_from("é€😀a".encode())).map(bytes), stop_sets)
@settings(deadline=None)
def test_bytes_that_are_no_text_give_what_the_whole_gives(raw, stops):
    tokenizer = byte_level(BYTES)
    text = raw.decode(errors="replace")
    assert whole(tokenizer, list(raw)) == text

    found, detokenizer = pieces_of(tokenizer, raw, stops)

    assert ("".join(found), detokenizer.stop) == cut(text, stops)


@pytest.mark.parametrize("name", ["llama_like", "metaspace", "trained"])
@given(data=st.data(), stops=stop_sets)
@settings(deadline=None)
def test_any_tokens_give_what_the_whole_gives(request, name, data, stops):
    """Special tokens and ids beyond the vocabulary are among them."""
    tokenizer = request.getfixturevalue(name)
    token_ids = data.draw(st.lists(st.integers(0, len(tokenizer) + 1), max_size=60))

    found, detokenizer = pieces_of(tokenizer, token_ids, stops)

    assert ("".join(found), detokenizer.stop) == cut(whole(tokenizer, token_ids), stops)


@given(texts, st.lists(st.integers(0, 60), max_size=5), st.integers(0, 255))
@settings(deadline=None)
def test_runs_of_byte_tokens_give_what_the_whole_gives(llama_like, text, places, extra):
    """All of a run is replaced where one byte of it is invalid, even one that comes after whole characters."""
    first_byte, special = llama_like.convert_tokens_to_ids(["<0x00>", "</s>"])
    token_ids = [first_byte + value for value in text.encode()]
    for place in places:
        token_ids.insert(place, [special, len(llama_like), first_byte + extra][place % 3])
    token_ids.insert(len(token_ids) // 2, 0)

    found, _ = pieces_of(llama_like, token_ids)

    assert "".join(found) == whole(llama_like, token_ids)


@pytest.mark.parametrize("name", ["llama_like", "metaspace"])
@pytest.mark.parametrize("between", [0, 1, 20])
def test_only_the_first_space_is_stripped_however_long_the_text(request, name, between):
    """Special tokens have no text: a decoder takes what comes after them for the beginning."""
    tokenizer = request.getfixturevalue(name)
    word, special = tokenizer.convert_tokens_to_ids(["▁a", "</s>"])
    for count in range(1, 40):
        token_ids = [word] * count + [special] * between + [word] * 3

        found, _ = pieces_of(tokenizer, token_ids)

        assert "".join(found) == " ".join("a" * (count + 3))


def test_real_text_comes_whole_and_at_once(trained):
    text = "".join(TEST_DATA.read_text().splitlines(keepends=True)[:5])
    token_ids = trained(text)["input_ids"]

    found, _ = pieces_of(trained, token_ids)

    assert "".join(found) == text
    assert all(found[:-1]), "plain letters are certain at once"
    assert found[-1] == ""


def test_a_character_comes_with_its_last_byte():
    found, _ = pieces_of(byte_level(BYTES), "a😀b".encode())

    assert found == ["a", "", "", "", "😀", "b", ""]


def test_letters_before_half_a_character_come_at_once():
    found, _ = pieces_of(byte_level([b"ab\xf0\x9f", b"\x98\x80c"]), [0, 1])

    assert found == ["ab", "😀c", ""]


def test_half_a_character_at_the_end_is_replaced():
    found, _ = pieces_of(byte_level(BYTES), "é😀".encode()[:-1])

    assert found == ["", "é", "", "", "", "\ufffd"]


def test_the_beginning_of_a_stop_string_is_held_back_and_shown_when_it_goes_on_otherwise():
    tokenizer = tokenizer_of(["x", "\n", "Q", ":", "A"], decoders.Fuse())

    found, detokenizer = pieces_of(tokenizer, [0, 1, 2, 4, 1, 2], ["\nQ:"])

    assert found == ["x", "", "", "\nQA", "", "", "\nQ"]
    assert not detokenizer.is_stopped


def test_a_stop_string_across_tokens_ends_the_text_for_good():
    tokenizer = tokenizer_of(["x\n", "Q", ": no"], decoders.Fuse())

    found, detokenizer = pieces_of(tokenizer, [0, 1, 2, 0, 0], ["\nQ:"])

    assert found == ["x", "", "", "", "", ""]
    assert detokenizer.is_stopped
    assert detokenizer.stop == "\nQ:"


@pytest.mark.parametrize(
    ("stops", "text", "stop"),
    [
        (["abcd", "bc"], "x a", "bc"),
        (["c", "abc", "bc"], "x ", "abc"),
        (["d", "bcd", "c"], "x ab", "c"),
    ],
)
def test_of_several_stop_strings_the_first_to_end_counts_then_the_longest(stops, text, stop):
    for pieces in (["x abcde"], list("x abcde")):
        tokenizer = tokenizer_of(pieces, decoders.Fuse())
        found, detokenizer = pieces_of(tokenizer, range(len(pieces)), stops)
        assert ("".join(found), detokenizer.stop) == (text, stop)


def test_a_stop_string_can_come_with_the_end():
    found, detokenizer = pieces_of(byte_level(BYTES), "aé".encode()[:-1], ["\ufffd"])

    assert (found, detokenizer.stop) == (["a", "", ""], "\ufffd")


def test_nothing_comes_after_the_end():
    tokenizer = byte_level(BYTES)
    _, detokenizer = pieces_of(tokenizer, b"a")

    assert (detokenizer.append(98), detokenizer.finish()) == ("", "")


@pytest.mark.parametrize("kind", ["letters", "special tokens between", "emoji"])
def test_a_long_text_costs_no_more_a_token_than_a_short_one(trained, kind):
    class Counting:
        longest = 0

        def decode(self, token_ids, **options):
            self.longest = max(self.longest, len(token_ids))
            return trained.decode(token_ids, **options)

        def convert_ids_to_tokens(self, token_id):
            return trained.convert_ids_to_tokens(token_id)

    text = "😀" * 200 if kind == "emoji" else "many words " * 200
    token_ids = trained(text)["input_ids"]
    if kind == "special tokens between":
        token_ids = [entry for token_id in token_ids for entry in (token_id, 0, 0, 0)]
    counting = Counting()

    found, _ = pieces_of(counting, token_ids)

    assert "".join(found) == text
    assert counting.longest <= 32 < len(token_ids)


def test_a_tokenizer_with_a_decoder_of_its_own_is_asked_itself(byte_tokenizer):
    kind = type(byte_tokenizer)
    shouting = type(
        "Shouting", (kind,), {"_decode": lambda self, *given, **more: kind._decode(self, *given, **more).upper()}
    )  # fmt: skip
    own = copy.copy(byte_tokenizer)
    own.__class__ = shouting
    detokenizer = Detokenizer(own)
    assert detokenizer.append(64) + detokenizer.append(65) == "AB"
    plain = Detokenizer(byte_tokenizer)
    assert plain.append(64) + plain.append(65) == "ab"
