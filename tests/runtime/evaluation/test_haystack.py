"""Sentences to hide a needle in."""

import itertools

from fp8kv.runtime.evaluation.haystack import built_in_sentences, split_sentences


def test_the_generated_sentences_differ_and_hold_no_digits():
    sentences = built_in_sentences(1)
    assert len(sentences) == len(set(sentences)) == 65536
    assert not any(letter.isdigit() for letter in itertools.chain.from_iterable(sentences))
    assert all(one[0].isupper() and one.endswith(".") for one in sentences)
    assert sentences == built_in_sentences(1)
    assert sentences != built_in_sentences(2)


def test_a_text_is_split_behind_its_sentences():
    text = "  One is here.\n\nIs  it? Yes!  and more v1.5 of it"
    assert split_sentences(text) == ["One is here.", "Is it?", "Yes!", "and more v1.5 of it"]
    assert split_sentences(" \n") == []
