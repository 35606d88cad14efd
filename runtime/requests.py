"""What goes into the engine and what comes out of it: requests, outputs, completions."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from fp8kv.recipes.errors import RequestError
from fp8kv.runtime.sampling import SamplingParameters

FinishReason = Literal["stop", "length", "error"]
"""``stop``: the end of sequence or a stop string came. ``length``: ``max_tokens`` were generated. ``error``: the model's
logits were no numbers."""


@dataclass(frozen=True)
class Request:
    """A prompt to continue.

    Attributes:
        prompt_token_ids: at least one token.
        parameters: how, how long, and how many times.
    """

    prompt_token_ids: tuple[int, ...]
    parameters: SamplingParameters


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of one generated token, before temperature, top-k and top-p.

    Attributes:
        token_id: the token.
        logprob: natural logarithm of its probability.
        top: the likeliest tokens at this position with theirs, best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Output:
    """What one step added to one continuation.

    Attributes:
        request_id: of the request, as :meth:`Engine.add` returned it.
        index: of the continuation, from 0 to ``n - 1``.
        token_ids: the new token; the end of sequence is among them. Empty where there was an error.
        text: what became certain of the text: neither half a character nor the beginning of what may turn out
            to be a stop string. The texts of all outputs, joined, are the continuation's text.
        logprobs: one for each of ``token_ids`` where they were asked for, else empty.
        finish_reason: None while the continuation goes on.
        error: where that is ``error``, what went wrong, in one sentence.
    """

    request_id: int
    index: int
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason | None
    error: str | None = None


@dataclass(frozen=True)
class Choice:
    """One finished continuation of a prompt.

    Attributes:
        text: without the end of sequence, the stop string and what came after it.
        token_ids: all that was generated.
        logprobs: one for each of ``token_ids`` where they were asked for, else empty.
        finish_reason: why it ended.
        error: where that is ``error``, what went wrong, in one sentence.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: FinishReason
    error: str | None = None


@dataclass(frozen=True)
class Completion:
    """All continuations of one prompt.

    Attributes:
        prompt_token_ids: the prompt.
        choices: ``n`` continuations.
    """

    prompt_token_ids: tuple[int, ...]
    choices: tuple[Choice, ...]

    @property
    def text(self) -> str:
        """The text of the first continuation."""
        return self.choices[0].text


def join_outputs(outputs: Iterable[Output]) -> Choice:
    """Return the continuation that ``outputs``, all of it and in order, are the steps of."""
    steps = list(outputs)
    reason = steps[-1].finish_reason
    if reason is None:
        raise ValueError("the last output is not the continuation's end")
    return Choice(
        text="".join(step.text for step in steps),
        token_ids=tuple(token for step in steps for token in step.token_ids),
        logprobs=tuple(entry for step in steps for entry in step.logprobs),
        finish_reason=reason,
        error=steps[-1].error,
    )


def read_token_ids(prompt: Iterable[int]) -> tuple[int, ...]:
    """Return the token ids of a prompt as whole numbers of Python's.

    Raises:
        RequestError: it is something else.
    """
    try:
        return tuple(map(operator.index, prompt))
    except TypeError:
        raise RequestError(
            f"a prompt is {reprlib.repr(prompt)}: give a text or a list of token ids"
        ) from None
