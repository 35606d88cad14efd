"""What an engine accepts and does at once, and how it says what it is doing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fp8kv.recipes.errors import RequestError
from fp8kv.runtime.checks import check_integer

MAX_BATCH_TOKENS = 8192
MAX_SEQUENCES = 256


@dataclass(frozen=True)
class EngineLimits:
    """What the engine accepts and does at once.

    Attributes:
        vocab_size: token ids lie below it.
        max_positions: tokens of a prompt and its continuation together; None where the model names no limit.
        max_batch_tokens: tokens of a forward pass.
        max_sequences: continuations that hold pages at one time.
    """

    vocab_size: int
    max_positions: int | None
    max_batch_tokens: int = MAX_BATCH_TOKENS
    max_sequences: int = MAX_SEQUENCES

    def __post_init__(self) -> None:
        for name in ("max_batch_tokens", "max_sequences"):
            check_integer(name, getattr(self, name), least=1)

    def check(self, token_ids: Sequence[int], max_tokens: int, capacity: int) -> None:
        """Refuse a prompt that could never run, given a cache of ``capacity`` tokens.

        Raises:
            RequestError: it is empty, holds a token id that the model does not know, or does not fit with the
                ``max_tokens`` that are to follow it.
        """
        if not token_ids:
            raise RequestError("the prompt is empty: give at least one token")
        for token_id in (min(token_ids), max(token_ids)):
            if not 0 <= token_id < self.vocab_size:
                raise RequestError(
                    f"the prompt holds token id {token_id}, and the model knows 0 to {self.vocab_size - 1}: "
                    "use the tokenizer of this model"
                )
        total = len(token_ids) + max_tokens
        wanted = f"a prompt of {len(token_ids)} tokens with max_tokens {max_tokens}"
        limit = self.max_positions
        if limit is not None and total > limit:
            raise RequestError(
                f"{wanted} exceeds the model's {limit} positions: shorten the prompt or lower max_tokens"
            )
        # the last generated token is never read, so it needs no place
        if total - bool(max_tokens) > capacity:
            raise RequestError(
                f"{wanted} can never fit into the cache's {capacity} tokens: shorten the prompt, lower max_tokens "
                "or give the cache more pages (num_pages)"
            )


@dataclass(frozen=True)
class EngineStatus:
    """The engine's load and what it has done since it was made.

    Attributes:
        num_waiting: continuations without pages.
        num_running: continuations with pages.
        num_pages: of the cache.
        num_free_pages: that can be had at once, those kept for reuse among them.
        num_preemptions: continuations that lost their pages and were recomputed.
        num_reused_tokens: tokens that were found in the cache and not computed.
        num_computed_tokens: tokens that went through the model.
        num_generated_tokens: tokens that were sampled.
    """

    num_waiting: int
    num_running: int
    num_pages: int
    num_free_pages: int
    num_preemptions: int
    num_reused_tokens: int
    num_computed_tokens: int
    num_generated_tokens: int
