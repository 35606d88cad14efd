"""Log-probabilities of given texts, on the pages that the engine generates with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from fp8kv.recipes.errors import RequestError
from fp8kv.runtime.batch import Batch, make_batch
from fp8kv.runtime.paging import OutOfPages, PageAllocator

SCORED_AT_ONCE = 1024
"""Tokens of a forward pass; their logits over the whole vocabulary are held in float32."""


class ScoringRunner(Protocol):
    """A model over a paged cache."""

    def all_logits(self, batch: Batch) -> Tensor:
        """Return the logits ``[tokens, vocab]`` of every new token."""
        ...


def score_tokens(
    runner: ScoringRunner,
    allocator: PageAllocator,
    token_ids: Sequence[int],
    *,
    max_batch_tokens: int,
    device: torch.device | str,
) -> list[float]:
    """Return the natural log-probability of every token but the first, given those before it.

    The prompt runs in chunks through the same cache, quantised or not, as in generation; its pages are free again
    at the end.

    Raises:
        RequestError: there are too few free pages.
    """
    tokens = list(token_ids)
    try:
        pages = allocator.allocate(-(-len(tokens) // allocator.page_size))
    except OutOfPages as error:
        raise RequestError(
            f"{len(tokens)} tokens cannot be scored beside what is running: {error}"
        ) from None
    step = min(SCORED_AT_ONCE, max_batch_tokens)
    scores: list[float] = []
    try:
        # the last token is scored by the logits of the one before it
        for start in range(0, len(tokens) - 1, step):
            inputs = tokens[start : min(start + step, len(tokens) - 1)]
            batch = make_batch([(inputs, start, pages)], allocator.page_size, device)
            logprobs = runner.all_logits(batch).float().log_softmax(-1)
            targets = torch.tensor(tokens[start + 1 : start + 1 + len(inputs)])
            found = logprobs.gather(1, targets.to(logprobs.device)[:, None])
            scores += found[:, 0].tolist()
    finally:
        allocator.free(pages)
    return scores
