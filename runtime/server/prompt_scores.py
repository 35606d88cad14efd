"""Log-probabilities of a prompt's own tokens, with alternatives, as ``echo`` wants them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fp8kv.recipes.errors import EvaluationError, RequestError
from fp8kv.runtime.requests import TokenLogprob
from fp8kv.runtime.sampling import NOT_FINITE, token_logprobs


class NotNow(Exception):
    """Pages are missing that others hold: try again when they have ended."""


class Reader(Protocol):
    """Reads texts; an :class:`~fp8kv.runtime.llm.LLM` does."""

    def teacher_forced(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield the logits that predict the tokens of each answer behind its prompt, in order."""
        ...


def score_prompt(
    llm: Reader, token_ids: Sequence[int], num_alternatives: int
) -> tuple[TokenLogprob, ...]:
    """Return what the model says of every token but the first, given those before it.

    Args:
        llm: reads.
        token_ids: of the prompt.
        num_alternatives: likeliest tokens that are reported with each; of equals the one with the lowest id first.

    Raises:
        RequestError: the prompt can never be read.
        NotNow: the prompt cannot be read beside what is running.
        EvaluationError: the logits hold NaN or infinity.
    """
    if len(token_ids) < 2:
        return ()
    pieces = llm.teacher_forced([(token_ids[:1], token_ids[1:])])
    entries: list[TokenLogprob] = []
    try:
        for _, logits in pieces:
            start = len(entries) + 1
            found = _entries(logits, token_ids[start : start + len(logits)], num_alternatives)
            if found is None:
                break
            entries += found
        else:
            return tuple(entries)
    except RequestError as error:
        raise NotNow(str(error)) from None
    # it holds pages, and would live as long as the exception that knows this frame
    del pieces
    raise EvaluationError(f"the prompt: {NOT_FINITE}")


def _entries(
    logits: Tensor, token_ids: Sequence[int], num_alternatives: int
) -> list[TokenLogprob] | None:
    """Return what ``logits [rows, vocabulary]`` say of one token each, None if they are no numbers."""
    if not logits.amax(-1).isfinite().all():
        return None
    chosen = torch.tensor(token_ids).to(logits.device)
    own, values, ids = (part.tolist() for part in token_logprobs(logits, chosen, num_alternatives))
    top = (tuple(zip(*row, strict=True)) for row in zip(ids, values, strict=True))
    return [TokenLogprob(*entry) for entry in zip(token_ids, own, top, strict=True)]
