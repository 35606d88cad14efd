"""From a token to an output: its text, and whether that ends the continuation."""

from __future__ import annotations

from dataclasses import dataclass

from fp8kv.runtime.detokenizer import Detokenizer
from fp8kv.runtime.requests import FinishReason, Output, TokenLogprob
from fp8kv.runtime.sampling import NOT_FINITE
from fp8kv.runtime.scheduler import Continuation


@dataclass(frozen=True)
class News:
    """What a forward pass says of a continuation.

    Attributes:
        continuation: whose token it is.
        token_id: the token; None where the logits were no numbers.
        logprobs: of the token, where they were asked for.
        reason: why the continuation ends, as far as the token alone tells.
    """

    continuation: Continuation
    token_id: int | None
    logprobs: tuple[TokenLogprob, ...]
    reason: FinishReason | None


def make_output(news: News, detokenizer: Detokenizer) -> Output:
    """Return the output of ``news``, the next of the continuation whose text ``detokenizer`` makes."""
    text, reason = "", news.reason
    # the end of sequence is no part of the text
    is_text = news.token_id is not None and reason != "stop"
    if news.token_id is not None and is_text:
        text = detokenizer.append(news.token_id)
    if reason is not None:
        text += detokenizer.finish()
    # what was held back to the end may have been the rest of a stop string
    if is_text and detokenizer.is_stopped:
        reason = "stop"
    return Output(
        request_id=news.continuation.request_id,
        index=news.continuation.index,
        token_ids=() if news.token_id is None else (news.token_id,),
        text=text,
        logprobs=news.logprobs,
        finish_reason=reason,
        error=NOT_FINITE if reason == "error" else None,
    )
