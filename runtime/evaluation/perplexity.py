"""Perplexity of a text, window by window.

A text longer than a model's context is cut into windows that overlap: each token is scored once, and every window
but the first gives its tokens at least ``window - stride`` tokens of context. The first token of the text has nothing
that predicts it and is not scored; a tokenizer that begins texts with a special token puts that one there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8kv.recipes.errors import DataError, EvaluationError
from fp8kv.runtime.evaluation.answer_scores import MeasuredModel, score_answers


@dataclass(frozen=True)
class TextWindows:
    """A text, cut for scoring; the same for every arm.

    Attributes:
        windows: of each window the token ids of its context and those that are scored.
        num_bytes: of the text in UTF-8.
        window: tokens of a window, at most.
        stride: tokens that a window scores, at most; the first scores all but one.
    """

    windows: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    num_bytes: int
    window: int
    stride: int


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        num_tokens: scored tokens, all but the text's first.
        num_bytes: of the text in UTF-8.
        nll: mean negative log likelihood of a token, in nats.
        perplexity: ``exp(nll)``.
        bits_per_byte: negative log likelihood of the text in bits, by its bytes; unlike the others it can be
            compared between tokenizers.
        window_nll: sum of each window, in nats; what a paired comparison of two arms is made of.
    """

    num_tokens: int
    num_bytes: int
    nll: float
    perplexity: float
    bits_per_byte: float
    window_nll: tuple[float, ...]


def read_text(path: str | Path) -> str:
    """Read a text file.

    Raises:
        DataError: it cannot be read, is not UTF-8, or is empty.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read the text {path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start} of it): convert it first"
        ) from None
    if not text:
        raise DataError(f"{path} is empty: give a text to score")
    return text


def text_windows(tokenizer: Any, text: str, window: int, stride: int | None = None) -> TextWindows:
    """Tokenise a text as a whole and cut it into windows.

    Args:
        tokenizer: of transformers; puts its special tokens around the text.
        text: what is scored.
        window: tokens of a window, at least 2 and at most the model's positions.
        stride: tokens that each window but the first scores, below ``window``; None takes half a window.

    Raises:
        DataError: the text has fewer than two tokens.
        EvaluationError: window and stride do not fit together.
    """
    if window < 2:
        raise EvaluationError(f"the window is {window} tokens: give at least 2")
    if stride is None:
        stride = window // 2
    if not 1 <= stride < window:
        raise EvaluationError(
            f"the stride is {stride} tokens: give at least 1 and fewer than the window's {window}"
        )
    # without the flag transformers warns of texts beyond the model's positions, which the windows are for
    token_ids = tuple(tokenizer(text, verbose=False)["input_ids"])
    if len(token_ids) < 2:
        raise DataError(
            f"the text has fewer than two tokens ({len(token_ids)}), and scoring needs two: give a longer one"
        )
    windows = [(token_ids[:1], token_ids[1:window])]
    for first in range(window, len(token_ids), stride):
        scored = token_ids[first : first + stride]
        windows.append((token_ids[first + len(scored) - window : first], scored))
    return TextWindows(tuple(windows), len(text.encode()), window, stride)


def measure_perplexity(
    llm: MeasuredModel,
    windows: TextWindows,
    *,
    progress: Callable[[int], None] = lambda _count: None,
) -> Perplexity:
    """Score a text.

    Args:
        llm: a model with its cache.
        windows: the text.
        progress: told of every window that is done, as 1.

    Raises:
        RequestError: a window does not fit the model or its cache.
        EvaluationError: a log-probability is not finite.
    """
    sums = [0.0] * len(windows.windows)
    for number, score in score_answers(llm, windows.windows):
        sums[number] = -score.logprob
        progress(1)
    return _perplexity(sums, [len(scored) for _, scored in windows.windows], windows.num_bytes)


def from_nats(value: float) -> float:
    """Return ``exp(value)``, infinity where that is beyond a float: a broken cache can cost so much."""
    return math.exp(value) if value < 700 else math.inf


def _perplexity(sums: Sequence[float], counts: Sequence[int], num_bytes: int) -> Perplexity:
    total = math.fsum(sums)
    nll = total / sum(counts)
    return Perplexity(
        num_tokens=sum(counts),
        num_bytes=num_bytes,
        nll=nll,
        perplexity=from_nats(nll),
        bits_per_byte=total / math.log(2) / num_bytes,
        window_nll=tuple(sums),
    )
