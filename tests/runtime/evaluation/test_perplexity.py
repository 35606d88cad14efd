"""Perplexity of a text, window by window."""

import math
import os
from pathlib import Path

import pytest
import torch

from fp8kv.demo import MODELS
from fp8kv.recipes.errors import DataError, EvaluationError
from fp8kv.runtime.evaluation.perplexity import measure_perplexity, read_text, text_windows
from fp8kv.runtime.llm import LLM

TEXT = "A text — of some length, with ümlauts."
REFERENCE_DATA = os.environ.get("FP8KV_REFERENCE_DATA")


class Uniform:
    """Holds every token equally likely, but for what a context of each length costs."""

    def __init__(self, vocabulary=16):
        self.vocabulary = vocabulary
        self.seen = []

    def teacher_forced(self, sequences):
        self.seen += sequences
        for number in reversed(range(len(sequences))):
            yield number, torch.zeros(len(sequences[number][1]), self.vocabulary)


class Letters:
    """One token a character, of 16; a special one first where asked for."""

    def __init__(self, first=()):
        self._first = list(first)

    def __call__(self, text, **options):
        return {"input_ids": self._first + [ord(letter) % 16 for letter in text]}


@pytest.mark.parametrize("length", [2, 3, 7, 8, 9, 20, 21, 27, 38])
@pytest.mark.parametrize(("window", "stride"), [(2, 1), (8, 1), (8, 3), (8, 7), (50, 25)])
def test_each_token_is_scored_once_with_enough_of_the_text_before_it(length, window, stride):
    tokens = tuple(Letters()(TEXT[:length])["input_ids"])
    plan = text_windows(Letters(), TEXT[:length], window, stride)

    place = 1
    for number, (context, scored) in enumerate(plan.windows):
        assert scored == tokens[place : place + len(scored)]
        assert context == tokens[place - len(context) : place]
        assert len(context) + len(scored) <= window
        if number:
            assert len(scored) <= stride
            assert len(context) >= window - stride
            assert len(context) + len(scored) == window
        place += len(scored)
    assert place == length


def test_half_a_window_is_scored_where_nobody_says_how_much():
    plan = text_windows(Letters(), TEXT, 9)
    assert (plan.window, plan.stride) == (9, 4)
    assert plan.num_bytes == len(TEXT.encode()) == len(TEXT) + 3


def test_the_sums_become_means_per_token_and_per_byte():
    done = []
    plan = text_windows(Letters(), TEXT, 8, 4)
    found = measure_perplexity(Uniform(), plan, progress=done.append)

    assert found.num_tokens == len(TEXT) - 1
    assert found.nll == pytest.approx(math.log(16))
    assert found.perplexity == pytest.approx(16)
    assert found.bits_per_byte == pytest.approx(4 * (len(TEXT) - 1) / len(TEXT.encode()))
    assert found.window_nll == pytest.approx(
        [math.log(16) * len(scored) for _, scored in plan.windows]
    )
    assert done == [1] * len(plan.windows)


def test_a_special_first_token_is_context_and_all_of_the_text_is_scored():
    plan = text_windows(Letters([3]), TEXT, 8, 4)
    found = measure_perplexity(Uniform(), plan)
    assert plan.windows[0][0] == (3,)
    assert found.num_tokens == len(TEXT)
    assert found.bits_per_byte == pytest.approx(4 * len(TEXT) / len(TEXT.encode()))


@pytest.mark.parametrize(
    ("window", "stride", "message"),
    [
        (1, None, "the window is 1 tokens: give at least 2"),
        (8, 8, "the stride is 8 tokens: give at least 1 and fewer than the window's 8"),
        (8, 0, "the stride is 0 tokens: give at least 1"),
    ],
)
def test_what_does_not_fit_together_is_refused(window, stride, message):
    with pytest.raises(EvaluationError, match=message):
        text_windows(Letters(), TEXT, window, stride)


def test_a_text_of_one_token_cannot_be_scored():
    with pytest.raises(
        DataError, match=r"the text has fewer than two tokens .1., and scoring needs two"
    ):
        text_windows(Letters(), "A", 8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"text\.txt is empty: give a text to score"),
        (b"abc\xff", r"text\.txt is not UTF-8 text \(byte 3 of it\): convert it first"),
        (None, r"cannot read the text .*text\.txt: No such file or directory"),
    ],
)
def test_a_file_that_is_no_text_is_named(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_text(path)


def test_line_ends_are_read_as_they_are(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes("ä\r\nb".encode())
    assert read_text(path) == "ä\r\nb"


def test_a_byte_order_mark_is_no_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("abc", encoding="utf-8-sig")
    assert read_text(path) == "abc"


def test_a_model_scores_as_transformers_does(minimax):
    text = "Question: Tom has 3 apples and buys 4 more. How many has he now?\nAnswer: 3 + 4 = 7\n"
    plan = text_windows(minimax.tokenizer, text * 3, 48, 16)
    assert len(plan.windows) > 3
    expected = []
    for context, scored in plan.windows:
        ids = torch.tensor([context + scored])
        with torch.inference_mode():
            logprobs = minimax.model(ids, use_cache=False).logits[0].double().log_softmax(-1)
        rows = logprobs[len(context) - 1 : -1]
        expected.append(-float(rows.gather(1, torch.tensor(scored)[:, None]).sum()))

    with LLM(
        MODELS["tiny-minimax-m2"], cache="float32", backend="reference", device="cpu", num_pages=8
    ) as llm:
        found = measure_perplexity(llm, plan)

    assert found.window_nll == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif(
    REFERENCE_DATA is None,
    reason="FP8KV_REFERENCE_DATA names no directory with the reference data",
)
def test_wikitext_is_cut_into_windows_that_hold_all_of_it(minimax):
    text = read_text(Path(REFERENCE_DATA) / "data" / "wikitext-2" / "test.txt")
    plan = text_windows(minimax.tokenizer, text, 512)
    assert plan.num_bytes == len(text.encode()) > 1_000_000
    assert sum(len(scored) for _, scored in plan.windows) > 250_000
