"""Token ids: special tokens exactly once, chat templates, and long texts in pieces."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fp8kv.calibrate.data.columns import Content
from fp8kv.calibrate.data.tokens import encode_content, encode_pieces
from fp8kv.recipes.errors import DataError

BOS, EOS = 0, 1
TEMPLATE = "<s>{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}"
TALK = Content("hi\n\nho", [{"role": "user", "content": "hi"}], is_chat=True)
TEXT = Content("abc", [{"role": "user", "content": "abc"}], is_chat=False)


def byte_tokenizer(around="<s> $A", chat_template=None):
    """Return a tokenizer with one token per byte, and special tokens as ``around`` has them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": BOS, "</s>": EOS} | {c: 2 + i for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = chat_template
    return fast


def raw(tokenizer, text):
    return [tokenizer.convert_tokens_to_ids(c) for c in text]


def test_plain_text_gets_the_tokenizers_own_special_tokens():
    tokenizer = byte_tokenizer("<s> $A </s>")
    ids = encode_content(tokenizer, TEXT, "here", "auto")
    assert ids == [BOS, *raw(tokenizer, "abc"), EOS]


def test_a_rendered_conversation_gets_no_second_bos():
    tokenizer = byte_tokenizer(chat_template=TEMPLATE)
    assert encode_content(tokenizer, TALK, "here", "auto") == [BOS, *raw(tokenizer, "uhi")]


def test_always_and_never():
    tokenizer = byte_tokenizer(chat_template=TEMPLATE)
    assert encode_content(tokenizer, TEXT, "here", "always") == [BOS, *raw(tokenizer, "uabc")]
    never = encode_content(tokenizer, TALK, "here", "never")
    assert tokenizer.decode(never).startswith("<s>")
    assert len(never) == 1 + len("hi\n\nho")


def test_a_conversation_without_a_chat_template_gets_remedies():
    with pytest.raises(DataError) as error:
        encode_content(byte_tokenizer(), TALK, "a.jsonl line 3", "auto")
    assert "a.jsonl line 3" in str(error.value)
    assert "tokenizer has no chat template" in str(error.value)
    assert "column of plain text" in str(error.value)
    assert "'never'" in str(error.value)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages[7].content.x }}", "has no element 7"),
        ("{{ messages[0].content + 1 }}", "str"),
    ],
)
def test_a_template_that_refuses_is_reported_with_the_place(template, reason):
    tokenizer = byte_tokenizer(chat_template=template)
    with pytest.raises(DataError) as error:
        encode_content(tokenizer, TALK, "a.jsonl line 3", "auto")
    assert "the chat template refuses the messages of a.jsonl line 3" in str(error.value)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("around", "prefix"), [("$A", []), ("<s> $A", [BOS]), ("<s> $A </s>", [BOS]), ("$A </s>", [])]
)
def test_a_long_text_is_cut_into_pieces_that_begin_as_every_text_does(around, prefix):
    tokenizer = byte_tokenizer(around)
    text = "abcdefghij\n" * 5
    blocks = [text[:22], text[22:]]
    pieces = [piece.tolist() for piece in encode_pieces(tokenizer, blocks, seq_len=8)]
    assert all(piece[: len(prefix)] == prefix for piece in pieces)
    bare = [piece[len(prefix) :] for piece in pieces]
    joined = [token for piece in bare for token in piece]
    assert joined == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert all(len(piece) == 8 for piece in pieces[:-1])
    assert 0 < len(bare[-1]) <= 8 - len(prefix)


def test_pieces_own_their_memory():
    first, second = encode_pieces(byte_tokenizer("$A"), ["abcd"], seq_len=2)
    assert first.untyped_storage().nbytes() == second.untyped_storage().nbytes() == 8


def test_an_empty_text_has_no_pieces():
    assert encode_pieces(byte_tokenizer(), [], seq_len=8) == []
    assert encode_pieces(byte_tokenizer(), [""], seq_len=8) == []


def test_special_tokens_that_fill_the_sequence_are_refused():
    with pytest.raises(DataError, match=r"no room for text.*raise --seq-len"):
        encode_pieces(byte_tokenizer("<s> <s> $A"), ["abc"], seq_len=2)


def test_a_tokenizer_that_rewrites_text_beside_special_tokens_gets_no_prefix():
    def odd(text, add_special_tokens=True, verbose=True):
        return {"input_ids": [7, 8, 9] if add_special_tokens else [5, 6]}

    assert encode_pieces(odd, ["abc"], seq_len=2)[0].tolist() == [5, 6]
