"""Retrieval from a long context: does the model still find one sentence when all before it is quantised?

A pass key is hidden in a text that has nothing to do with it, at a given depth, and asked for at the end (the passkey
task of Mohtashami and Jaggi, arXiv 2305.16300, over the grid of lengths and depths of G. Kamradt's "needle in a
haystack", 2023). Every arm reads the same prompts. Two things are reported of each: whether the greedy answer begins
with the key, and how likely the key is when it is given; the second tells arms apart where a model finds all keys, and
where it is too small to find any.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fp8kv.runtime.evaluation.answer_scores import MeasuredModel, score_answers
from fp8kv.runtime.evaluation.needle_prompts import (
    ANSWER_TOKENS,
    DEPTHS,
    NeedlePlan,
    NeedlePrompt,
    default_lengths,
    plan_needles,
)
from fp8kv.runtime.sampling import SamplingParameters

__all__ = [
    "DEPTHS",
    "NeedleAnswer",
    "NeedleCell",
    "NeedlePlan",
    "NeedlePrompt",
    "NeedleResult",
    "default_lengths",
    "measure_needles",
    "plan_needles",
]

_GROUP_TOKENS = 1 << 16


@dataclass(frozen=True)
class NeedleAnswer:
    """What a model made of one prompt.

    Attributes:
        text: the greedy answer.
        is_found: whether its first number is the key.
        logprob: natural log-probability of the right answer, when it is given.
        top1: share of the right answer's tokens that are the likeliest, each given those before it.
    """

    text: str
    is_found: bool
    logprob: float
    top1: float


@dataclass(frozen=True)
class NeedleCell:
    """The prompts of one length and depth.

    Attributes:
        length: tokens of the context.
        depth: of the needle, 0 to 1.
        trials: prompts.
        found: keys that were retrieved.
        logprob: mean natural log-probability of the right answer.
        top1: mean share of its tokens that are the likeliest.
    """

    length: int
    depth: float
    trials: int
    found: int
    logprob: float
    top1: float


@dataclass(frozen=True)
class NeedleResult:
    """What one arm retrieved.

    Attributes:
        cells: length by length, depth by depth.
        recall: share of all keys that were retrieved.
        logprob: mean natural log-probability of the right answer.
        top1: mean share of its tokens that are the likeliest.
        answers: one for each prompt of the plan, for paired comparisons.
    """

    cells: tuple[NeedleCell, ...]
    recall: float
    logprob: float
    top1: float
    answers: tuple[NeedleAnswer, ...]


def measure_needles(
    llm: MeasuredModel,
    plan: NeedlePlan,
    *,
    progress: Callable[[int], None] = lambda _count: None,
) -> NeedleResult:
    """Have a model answer the prompts, and score the right answers.

    Args:
        llm: a model with its cache.
        plan: the prompts.
        progress: told of every number of prompts that is done.

    Raises:
        RequestError: a prompt does not fit the model or its cache.
        EvaluationError: a log-probability is not finite.
    """
    answers: list[NeedleAnswer] = []
    for group in _groups(plan.prompts):
        completions = llm.generate(
            [prompt.token_ids for prompt in group], SamplingParameters(max_tokens=ANSWER_TOKENS)
        )
        # right after: the prompts' pages are still in the cache
        scores = dict(score_answers(llm, [(one.token_ids, one.answer_ids) for one in group]))
        for number, (prompt, completion) in enumerate(zip(group, completions, strict=True)):
            number_found = re.search(r"\d+", completion.text)
            score = scores[number]
            answers.append(
                NeedleAnswer(
                    completion.text,
                    number_found is not None and number_found.group() == prompt.key,
                    score.logprob,
                    score.ranks.count(0) / len(score.ranks),
                )
            )
        progress(len(group))
    return _result(plan.prompts, answers)


def _groups(prompts: Sequence[NeedlePrompt]) -> Iterator[Sequence[NeedlePrompt]]:
    """Yield neighbours of :data:`_GROUP_TOKENS` tokens, or single prompts that are longer."""
    start = tokens = 0
    for stop, prompt in enumerate(prompts):
        if stop > start and tokens + prompt.length > _GROUP_TOKENS:
            yield prompts[start:stop]
            start, tokens = stop, 0
        tokens += prompt.length
    yield prompts[start:]


def _result(prompts: Sequence[NeedlePrompt], answers: Sequence[NeedleAnswer]) -> NeedleResult:
    by_cell: dict[tuple[int, float], list[NeedleAnswer]] = {}
    for prompt, answer in zip(prompts, answers, strict=True):
        by_cell.setdefault((prompt.length, prompt.depth), []).append(answer)
    return NeedleResult(
        cells=tuple(
            NeedleCell(
                length,
                depth,
                trials=len(own),
                found=sum(answer.is_found for answer in own),
                logprob=_mean([answer.logprob for answer in own]),
                top1=_mean([answer.top1 for answer in own]),
            )
            for (length, depth), own in by_cell.items()
        ),
        recall=_mean([float(answer.is_found) for answer in answers]),
        logprob=_mean([answer.logprob for answer in answers]),
        top1=_mean([answer.top1 for answer in answers]),
        answers=tuple(answers),
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
