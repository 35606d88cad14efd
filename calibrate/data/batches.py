"""Group samples into right-padded batches of one fold each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from fp8kv.calibrate.data.samples import Sample
from fp8kv.recipes.errors import DataError


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Samples of one fold, padded on the right to one length.

    Attributes:
        token_ids: [batch, seq] int64; past a row's length it holds the padding id.
        lengths: [batch] int64, tokens of each row without padding.
        fold: the fold that all its samples are in.
    """

    token_ids: torch.Tensor
    lengths: torch.Tensor
    fold: int

    @property
    def num_tokens(self) -> int:
        """Number of tokens, padding not counted."""
        return int(self.lengths.sum())


def make_batches(
    samples: Iterable[Sample],
    *,
    pad_token_id: int,
    max_tokens: int | None = None,
    batch_size: int | None = None,
) -> list[TokenBatch]:
    """Group ``samples`` into batches, each sample into exactly one.

    Inside a fold the samples are sorted by length, longest first, so that little is padding and a
    batch that does not fit into memory shows at once. The result does not depend on the order of
    ``samples``.

    Args:
        samples: what :func:`fp8kv.calibrate.data.loading.load_samples` drew.
        pad_token_id: fills rows up; any id of the vocabulary, since padded positions are not
            recorded.
        max_tokens: most tokens in a batch, padding counted; ``None`` for no such limit.
        batch_size: most samples in a batch; ``None`` for no such limit.

    Raises:
        DataError: no limit is given, a limit is less than 1, or a sample is longer than
            ``max_tokens``.
    """
    if max_tokens is None and batch_size is None:
        raise DataError("batches need a limit: give batch_size, max_tokens or both")
    for name, limit in (("max_tokens", max_tokens), ("batch_size", batch_size)):
        if limit is not None and limit < 1:
            raise DataError(f"{name} is {limit}; it must be at least 1")
    ordered = sorted(samples, key=lambda sample: (sample.fold, -sample.num_tokens, sample.digest))
    for sample in ordered:
        if max_tokens is not None and sample.num_tokens > max_tokens:
            raise DataError(
                f"a sample has {sample.num_tokens} tokens, more than the {max_tokens} of a batch; "
                "raise max_tokens or lower --seq-len"
            )
    return [_pad(group, pad_token_id) for group in _groups(ordered, max_tokens, batch_size)]


def _groups(
    ordered: Sequence[Sample], max_tokens: int | None, batch_size: int | None
) -> Iterator[list[Sample]]:
    group: list[Sample] = []
    for sample in ordered:
        # The first sample of a group is its longest, so it sets the width of all rows.
        if group and (
            sample.fold != group[0].fold
            or (batch_size is not None and len(group) == batch_size)
            or (max_tokens is not None and (len(group) + 1) * group[0].num_tokens > max_tokens)
        ):
            yield group
            group = []
        group.append(sample)
    if group:
        yield group


def _pad(group: Sequence[Sample], pad_token_id: int) -> TokenBatch:
    lengths = torch.tensor([sample.num_tokens for sample in group], dtype=torch.int64)
    token_ids = torch.full((len(group), int(lengths.max())), pad_token_id, dtype=torch.int64)
    for row, sample in zip(token_ids, group, strict=True):
        row[: sample.num_tokens] = sample.token_ids
    return TokenBatch(token_ids, lengths, group[0].fold)
