"""Compare the logits of every arm with the baseline's on given texts, and the section of the report that says it.

The arms run one after the other over the same weights, so the baseline's logits have to wait for the arm's. A group of
texts is as large as their bound on memory allows: the baseline runs the group, then each arm does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fp8kv.recipes.errors import DataError, EvaluationError
from fp8kv.runtime.evaluation.agreement import AgreementSummary
from fp8kv.runtime.evaluation.arms import BASELINE, ArmOpener, Progress, default_context
from fp8kv.runtime.evaluation.digests import json_digest
from fp8kv.runtime.evaluation.position_agreement import (
    PositionAgreement,
    forced_pieces,
    measure_positions,
)
from fp8kv.runtime.llm import LoadedModel
from fp8kv.runtime.runner_builder import PAGE_SIZE

Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]
"""Token ids of prompts with those of the answers that follow them, at least one token each."""

LOGITS_BYTES = 1 << 30
"""Of the baseline's logits, float32, that are held at a time; at least those of one answer are."""

PIECE_TOKENS = 1024
"""Tokens of a text whose logits are compared at a time."""

# tokens that the cache has room for where the texts are shorter, so that several run at once
_CACHE_TOKENS = 1 << 14


@dataclass(frozen=True)
class AgreementBucket:
    """Agreement at neighbouring positions.

    Attributes:
        first: the first position, which is the number of tokens before a token.
        last: the last one, included.
        agreement: over the tokens there.
    """

    first: int
    last: int
    agreement: AgreementSummary


@dataclass(frozen=True)
class ArmAgreement:
    """Agreement of one arm with the baseline; the baseline's own has KL 0.

    Attributes:
        total: over all tokens.
        buckets: by position, in order.
    """

    total: AgreementSummary
    buckets: tuple[AgreementBucket, ...]

    @classmethod
    def from_positions(cls, positions: PositionAgreement) -> ArmAgreement:
        """Give the means of what was summed up.

        Raises:
            EvaluationError: no token was compared.
        """
        return cls(
            positions.total.summary(),
            tuple(
                AgreementBucket(bucket.first, bucket.last, bucket.agreement.summary())
                for bucket in positions.buckets
            ),
        )


@dataclass(frozen=True)
class AgreementSection:
    """Agreement on a text, read in windows that have nothing in common.

    Attributes:
        data: where the text comes from.
        protocol_digest: SHA-256 of the windows' token ids.
        context: tokens of a window, at most.
        num_windows: windows.
        arms: by arm.
    """

    data: str
    protocol_digest: str
    context: int
    num_windows: int
    arms: Mapping[str, ArmAgreement]


@dataclass(frozen=True)
class AgreementSettings:
    """What to compare on.

    Attributes:
        name: where the text comes from, for the report.
        text: the text.
        context: tokens of a window; None takes :func:`fp8kv.runtime.evaluation.arms.default_context`.
    """

    name: str
    text: str
    context: int | None = None


class AgreementMeasurement:
    """Agreement of the arms with the baseline on one text."""

    def __init__(
        self, settings: AgreementSettings, loaded: LoadedModel, progress: Progress
    ) -> None:
        """Cut the text into windows.

        Raises:
            DataError: the text has fewer than two tokens.
            EvaluationError: a window is shorter than two tokens.
        """
        self._settings = settings
        self._progress = progress
        self._context = default_context(loaded) if settings.context is None else settings.context
        self._windows = separate_windows(loaded.tokenizer, settings.text, self._context)
        self._rows = answer_rows(loaded)
        self._arms: dict[str, PositionAgreement] = {}

    def compare(self, open_arm: ArmOpener, arms: Sequence[str]) -> None:
        """Run all arms, one after the other, on group after group of windows."""
        pieces = [piece for ids in self._windows for piece in forced_pieces(ids, PIECE_TOKENS)]
        self._arms = compare_arms(
            open_arm,
            arms,
            pieces,
            rows=self._rows,
            progress=lambda count: self._progress("agreement, all arms", count, len(pieces)),
        )

    def result(self) -> AgreementSection:
        """Return the section of the report."""
        return AgreementSection(
            data=self._settings.name,
            protocol_digest=json_digest(self._windows),
            context=self._context,
            num_windows=len(self._windows),
            arms={name: ArmAgreement.from_positions(one) for name, one in self._arms.items()},
        )


def compare_arms(
    open_arm: ArmOpener,
    arms: Sequence[str],
    sequences: Sequences,
    *,
    rows: int,
    progress: Callable[[int], None] = lambda _count: None,
) -> dict[str, PositionAgreement]:
    """Compare every arm's logits on given answers with the baseline's.

    Args:
        open_arm: opens an arm.
        arms: their names; the baseline runs whether it is among them or not.
        sequences: prompts with their answers.
        rows: answer tokens whose baseline logits are held at a time; at least one answer's are.
        progress: told how many sequences all arms are done with.

    Raises:
        RequestError: a sequence does not fit the model.
        EvaluationError: logits are not finite.
    """
    totals = {arm: PositionAgreement() for arm in arms}
    for group in _groups(sequences, rows):
        num_pages = _num_pages(group)
        with open_arm(BASELINE, num_pages) as llm:
            baseline = list(llm.teacher_forced(group))
        for arm in arms:
            if arm == BASELINE:
                found = _compare(baseline, baseline, group)
            else:
                with open_arm(arm, num_pages) as llm:
                    found = _compare(llm.teacher_forced(group), baseline, group)
            totals[arm] = totals[arm].merge(found)
        progress(len(group))
    return totals


def answer_rows(loaded: LoadedModel) -> int:
    """Return the answer tokens whose logits take :data:`LOGITS_BYTES`."""
    return max(1, LOGITS_BYTES // (4 * loaded.vocab_size))


def separate_windows(tokenizer: Any, text: str, context: int) -> list[tuple[int, ...]]:
    """Cut a text into windows of ``context`` tokens that have nothing in common.

    A special token that the tokenizer begins a text with begins every window: models hold on to it.

    Raises:
        DataError: the text has fewer than two tokens.
        EvaluationError: a window is shorter than two tokens.
    """
    # without the flag transformers warns of texts beyond the model's positions, which the windows are for
    ids = tuple(tokenizer(text, verbose=False)["input_ids"])
    if len(ids) < 2:
        raise DataError(
            f"the text has fewer than two tokens ({len(ids)}), and a comparison needs two: give a longer one"
        )
    start = ids[:1] if ids[0] in tokenizer.all_special_ids else ()
    if context < 2 + len(start):
        raise EvaluationError(f"the context is {context} tokens: give at least {2 + len(start)}")
    body = ids[len(start) :]
    step = context - len(start)
    windows = [start + body[first : first + step] for first in range(0, len(body), step)]
    # a window of one token predicts nothing
    return [window for window in windows if len(window) > 1]


def _groups(sequences: Sequences, rows: int) -> Iterator[Sequences]:
    """Yield neighbouring sequences, as many as have ``rows`` answer tokens together, at least one."""
    start = 0
    while start < len(sequences):
        stop, count = start + 1, len(sequences[start][1])
        while stop < len(sequences) and count + len(sequences[stop][1]) <= rows:
            count += len(sequences[stop][1])
            stop += 1
        yield sequences[start:stop]
        start = stop


def _num_pages(group: Sequences) -> int:
    """Return pages for the longest sequence, and for several where they are short."""
    pages = [-(-(len(prompt) + len(answer)) // PAGE_SIZE) for prompt, answer in group]
    return max(max(pages), min(sum(pages), _CACHE_TOKENS // PAGE_SIZE))


def _compare(
    pieces: Iterable[tuple[int, Tensor]],
    baseline: Sequence[tuple[int, Tensor]],
    group: Sequences,
) -> PositionAgreement:
    """Sum the agreement up; the logits of a long answer come in pieces, cut alike in every arm."""
    total = PositionAgreement()
    done = [0] * len(group)
    for (number, logits), (_, expected) in zip(pieces, baseline, strict=True):
        prompt, answer = group[number]
        start, stop = done[number], done[number] + len(logits)
        tokens = torch.tensor(answer[start:stop])
        total = total.merge(measure_positions(logits, expected, tokens, len(prompt) + start))
        done[number] = stop
    return total
