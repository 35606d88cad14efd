"""Draw calibration samples from datasets, reproducibly, and say exactly what was drawn.

The road is source -> rows -> text or messages -> token ids -> samples -> batches; this module walks
it up to the samples, the ``data_*`` modules beside it are its steps:

- :mod:`fp8kv.calibrate.data.sources`: which dataset; the command-line form.
- :mod:`fp8kv.calibrate.data.files`, :mod:`fp8kv.calibrate.data.hub`: its rows.
- :mod:`fp8kv.calibrate.data.columns`: what a row says.
- :mod:`fp8kv.calibrate.data.tokens`: its token ids.
- :mod:`fp8kv.calibrate.data.samples`: hashes and folds.
- :mod:`fp8kv.calibrate.data.batches`: padded batches.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch

from fp8kv.calibrate.data.batches import TokenBatch, make_batches
from fp8kv.calibrate.data.columns import row_content
from fp8kv.calibrate.data.files import Row, read_rows, read_text_blocks
from fp8kv.calibrate.data.hub import stream_hub
from fp8kv.calibrate.data.parquet import shuffled_parquet
from fp8kv.calibrate.data.samples import Sample, assign_folds, samples_digest, token_digest
from fp8kv.calibrate.data.sources import Source, local_file, parse_source
from fp8kv.calibrate.data.tokens import ChatTemplate, encode_content, encode_pieces
from fp8kv.calibrate.folds import HELD_OUT_FOLD, NUM_FOLDS
from fp8kv.recipes.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "HELD_OUT_FOLD",
    "NUM_FOLDS",
    "Sample",
    "Source",
    "SourceSummary",
    "TokenBatch",
    "TokenSamples",
    "load_samples",
    "make_batches",
    "parse_source",
    "share_by_weight",
]

# A single token attends to itself only: it says nothing about the keys and values of running text.
_MIN_TOKENS = 2


@dataclass(frozen=True)
class SourceSummary:
    """What became of the rows that were read of one source.

    Attributes:
        source: the source.
        taken: samples drawn.
        tokens: tokens of these.
        truncated: how many of these were cut to the sequence length.
        empty: rows left out, because they had fewer than two tokens.
        duplicates: rows left out, because the same token ids were drawn before, from this source or
            another.
    """

    source: Source
    taken: int
    tokens: int
    truncated: int
    empty: int
    duplicates: int


@dataclass(frozen=True)
class TokenSamples:
    """The samples of one calibration.

    Attributes:
        samples: in the order drawn, source by source; no two are equal.
        digest: sha256 over the samples' digests; independent of their order.
        sources: one summary per source.
    """

    samples: tuple[Sample, ...]
    digest: str
    sources: tuple[SourceSummary, ...]

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all samples."""
        return sum(sample.num_tokens for sample in self.samples)


def load_samples(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_samples: int,
    seq_len: int,
    seed: int,
    chat_template: ChatTemplate = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> TokenSamples:
    """Draw ``num_samples`` token sequences from ``sources``.

    Each source gives its share by weight (:func:`share_by_weight`). Rows are drawn in an order that
    ``seed`` fixes: local jsonl, json and csv files are shuffled whole; hub datasets and parquet
    files are streamed through a shuffle buffer (:mod:`fp8kv.calibrate.data.hub`). What a row says
    is told by its columns (:func:`fp8kv.calibrate.data.columns.row_content`); each row is one
    sample, cut to ``seq_len``. A txt file is one long text, cut into consecutive pieces of
    ``seq_len`` tokens, which are then shuffled. Rows of fewer than two tokens and exact duplicates
    are left out and counted. Nothing is ever made up by repeating samples.

    Args:
        sources: where to draw from.
        tokenizer: the model's tokenizer.
        num_samples: samples in all.
        seq_len: most tokens in a sample.
        seed: fixes the draw.
        chat_template: ``auto`` renders conversations by the tokenizer's chat template and takes the
            rest as plain text; ``always`` renders everything; ``never`` nothing.
        progress: called with (samples drawn, ``num_samples``) after each sample.

    Raises:
        DataError: a source is missing, unreadable, empty, has no usable column, or has fewer
            samples than its share; or a number is out of range.
    """
    _check_request(sources, num_samples, seq_len, chat_template)
    shares = share_by_weight([source.weight for source in sources], num_samples)
    _check_shares(sources, shares)
    # All of them before the first is read: a typing error in the last must not cost a download.
    paths = [local_file(source) for source in sources]

    def tell(done: int) -> None:
        if progress is not None:
            progress(done, num_samples)

    drawn: dict[str, torch.Tensor] = {}
    summaries = []
    for source, path, share in zip(sources, paths, shares, strict=True):
        candidates = _candidates(source, path, tokenizer, seq_len, seed, chat_template)
        summary = _draw(source, candidates, share, drawn, tell)
        if summary.taken < share:
            raise _shortage(summary, share, alone=len(sources) == 1)
        summaries.append(summary)
    folds = assign_folds(drawn)
    return TokenSamples(
        samples=tuple(Sample(ids, digest, folds[digest]) for digest, ids in drawn.items()),
        digest=samples_digest(drawn),
        sources=tuple(summaries),
    )


def share_by_weight(weights: Sequence[float], total: int) -> list[int]:
    """Divide ``total`` in proportion to ``weights``, by largest remainder; ties go to the earlier.

    The shares add up to ``total``, and each is its exact share rounded down or up.
    """
    exact = [Fraction(weight) for weight in weights]
    whole = sum(exact)
    quotas = [weight * total / whole for weight in exact]
    shares = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: shares[i] - quotas[i])
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


@dataclass(frozen=True)
class _Candidate:
    token_ids: torch.Tensor  # [tokens] int32
    truncated: bool


def _check_request(
    sources: Sequence[Source], num_samples: int, seq_len: int, chat_template: str
) -> None:
    if not sources:
        raise DataError("no dataset is given; name one with --dataset")
    if num_samples < 1:
        raise DataError(f"--num-samples is {num_samples}; it must be at least 1")
    if seq_len < _MIN_TOKENS:
        raise DataError(f"--seq-len is {seq_len}; it must be at least {_MIN_TOKENS}")
    if chat_template not in get_args(ChatTemplate):
        known = ", ".join(get_args(ChatTemplate))
        raise DataError(f"chat_template is {chat_template!r}; it must be one of {known}")


def _check_shares(sources: Sequence[Source], shares: Sequence[int]) -> None:
    for source, share in zip(sources, shares, strict=True):
        if share == 0:
            raise DataError(
                f"dataset {source.dataset} with weight {source.weight:g} gets none of "
                f"{sum(shares)} samples; raise --num-samples or its weight, or leave it out"
            )


def _candidates(
    source: Source,
    path: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    seed: int,
    chat_template: ChatTemplate,
) -> Iterator[_Candidate]:
    """Yield what ``source`` offers, in the order that ``seed`` fixes, tokenised on demand."""
    if path is not None and path.suffix.lower() == ".txt":
        if source.column is not None:
            raise DataError(
                f"dataset {source.dataset} is plain text, which has no columns; leave out column="
            )
        pieces = encode_pieces(tokenizer, read_text_blocks(path), seq_len)
        random.Random(seed).shuffle(pieces)
        for piece in pieces:
            yield _Candidate(piece, truncated=False)
        return
    for row in _shuffled_rows(source, path, seed):
        content = row_content(row, source.column)
        ids = encode_content(tokenizer, content, row.where, chat_template) if content else []
        yield _Candidate(torch.tensor(ids[:seq_len], dtype=torch.int32), len(ids) > seq_len)


def _shuffled_rows(source: Source, path: Path | None, seed: int) -> Iterable[Row]:
    if path is None:
        return stream_hub(source, seed)
    if path.suffix.lower() == ".parquet":
        return shuffled_parquet(path, seed)
    rows = read_rows(path)
    random.Random(seed).shuffle(rows)
    return rows


def _draw(
    source: Source,
    candidates: Iterable[_Candidate],
    share: int,
    drawn: dict[str, torch.Tensor],
    tell: Callable[[int], None],
) -> SourceSummary:
    """Add to ``drawn``, by digest, up to ``share`` candidates that are not there yet."""
    taken = tokens = truncated = empty = duplicates = 0
    for candidate in candidates:
        if len(candidate.token_ids) < _MIN_TOKENS:
            empty += 1
            continue
        digest = token_digest(candidate.token_ids)
        if digest in drawn:
            duplicates += 1
            continue
        drawn[digest] = candidate.token_ids
        taken += 1
        tokens += len(candidate.token_ids)
        truncated += candidate.truncated
        tell(len(drawn))
        if taken == share:
            break
    return SourceSummary(source, taken, tokens, truncated, empty, duplicates)


def _shortage(summary: SourceSummary, share: int, *, alone: bool) -> DataError:
    name = summary.source.dataset
    if summary.taken + summary.empty + summary.duplicates == 0:
        return DataError(
            f"dataset {name} is empty; check the file or the split, or name another dataset"
        )
    left_out = f"{summary.empty} empty and {summary.duplicates} duplicate rows left out"
    if summary.taken == 0:
        return DataError(f"dataset {name} has no sample to give: {left_out}; check its columns")
    remedy = "lower --num-samples " + (
        f"to {summary.taken}" if alone else "or this dataset's weight"
    )
    return DataError(
        f"dataset {name} has {summary.taken} samples where {share} are asked of it ({left_out}); "
        f"{remedy}"
    )
