"""Agreement of an arm with the unquantised cache by position: does the error grow with the context?

The later a token, the more quantised keys and values it reads. One mean over all tokens hides what that does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

from torch import Tensor

from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.evaluation.agreement import Agreement, measure_agreement

FIRST_BUCKET = 128
"""Positions of the first bucket; every other one has as many as all before it."""


@dataclass(frozen=True)
class PositionBucket:
    """Agreement over neighbouring positions.

    Attributes:
        first: the first position.
        last: the last one, included.
        agreement: over the tokens there.
    """

    first: int
    last: int
    agreement: Agreement


@dataclass(frozen=True)
class PositionAgreement:
    """Agreement by position; sums, which merge over texts, shards and ranks in any order.

    The position of a token is the number of tokens before it, which is what its prediction reads from the cache.

    Attributes:
        buckets: 0 to 127, 128 to 255, 256 to 511 and so on, those that hold tokens, in order.
    """

    buckets: tuple[PositionBucket, ...] = ()

    @property
    def total(self) -> Agreement:
        """The agreement over all positions."""
        return reduce(Agreement.merge, (one.agreement for one in self.buckets), Agreement())

    def merge(self, other: PositionAgreement) -> PositionAgreement:
        """Return the agreement over both sets of tokens; ``PositionAgreement()`` is the neutral element."""
        merged = {bucket.first: bucket for bucket in self.buckets}
        for bucket in other.buckets:
            own = merged.get(bucket.first)
            if own is not None:
                bucket = replace(own, agreement=own.agreement.merge(bucket.agreement))
            merged[bucket.first] = bucket
        return PositionAgreement(tuple(merged[first] for first in sorted(merged)))


def measure_positions(
    logits: Tensor, baseline_logits: Tensor, reference_tokens: Tensor, first_position: int
) -> PositionAgreement:
    """Compare an arm's logits with the baseline's on neighbouring tokens of one text.

    Args:
        logits: the arm's logits [tokens, vocabulary], floating; row i predicts reference token i.
        baseline_logits: the unquantised cache's logits for the same rows [tokens, vocabulary].
        reference_tokens: the token ids that follow [tokens], integers.
        first_position: of the first reference token; the others follow.

    Raises:
        EvaluationError: shapes or types disagree, a token id is outside the vocabulary, or logits
            are not finite where the result depends on them.
    """
    count = len(reference_tokens)
    if len(logits) != count or len(baseline_logits) != count:
        raise EvaluationError(
            f"{len(logits)} rows of logits and {len(baseline_logits)} of the baseline for {count} reference tokens; "
            "row i must predict reference token i"
        )
    buckets = []
    start = 0
    while start < count:
        first, last = _bucket(first_position + start)
        stop = min(count, last + 1 - first_position)
        rows = slice(start, stop)
        agreement = measure_agreement(logits[rows], baseline_logits[rows], reference_tokens[rows])
        buckets.append(PositionBucket(first, last, agreement))
        start = stop
    return PositionAgreement(tuple(buckets))


def forced_pieces(
    token_ids: Sequence[int], rows: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a text into prompts and answers for teacher forcing, so that few logits exist at a time.

    Each piece's prompt is all of the text before it, which the page cache has from the piece before. The first token
    is not an answer.

    Args:
        token_ids: of the text.
        rows: tokens of an answer, at most.
    """
    ids = tuple(token_ids)
    return [(ids[:start], ids[start : start + rows]) for start in range(1, len(ids), rows)]


def _bucket(position: int) -> tuple[int, int]:
    """Return the first and the last position of the bucket that holds ``position``."""
    if position < FIRST_BUCKET:
        return 0, FIRST_BUCKET - 1
    first = FIRST_BUCKET << (position // FIRST_BUCKET).bit_length() - 1
    return first, 2 * first - 1
