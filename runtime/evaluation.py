"""Evaluate cache arms on the same questions: GSM8K exact match, and agreement on the reference answers.

The model runs as transformers wrote it, its cache emulated (:mod:`fp8kv.runtime.emulated_cache`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fp8kv.calibrate.formats.facts import ModelFacts
from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.absorbed_mla import absorbed_mla
from fp8kv.runtime.agreement import Agreement, measure_agreement
from fp8kv.runtime.emulated_cache import CacheMode, emulated_cache
from fp8kv.runtime.eval_report import BASELINE, ArmResult
from fp8kv.runtime.generation import generate_greedy
from fp8kv.runtime.gsm8k import (
    MAX_NEW_TOKENS,
    STOPS,
    Problem,
    Score,
    reference_continuation,
    score,
    truncate_at_stop,
)
from fp8kv.runtime.samples import SampleLog
from fp8kv.runtime.teacher_forcing import answer_logits, force

Progress = Callable[[str, int], None]
"""Called with a task (``<arm>`` or ``agreement``) and the number of problems just finished."""


@dataclass(frozen=True)
class EvaluationTask:
    """What to run.

    Attributes:
        problems: the questions.
        prompts: one per problem.
        stops: stop strings; the harness' and the tokenizer's end of sequence.
        max_new_tokens: generation limit.
        batch_size: problems per forward pass.
    """

    problems: Sequence[Problem]
    prompts: Sequence[str]
    stops: Sequence[str]
    max_new_tokens: int = MAX_NEW_TOKENS
    batch_size: int = 32


def stop_strings(tokenizer: Any) -> tuple[str, ...]:
    """Return the harness' stop strings and, as it does, the tokenizer's end of sequence."""
    end = tokenizer.eos_token
    return (*STOPS, end) if end else STOPS


def run_arms(
    model: nn.Module,
    tokenizer: Any,
    facts: ModelFacts,
    modes: Sequence[CacheMode],
    task: EvaluationTask,
    *,
    log: SampleLog | None = None,
    progress: Progress = lambda _task, _count: None,
) -> tuple[dict[str, ArmResult], dict[str, list[Score]]]:
    """Generate every arm's answers and measure its agreement with the baseline arm.

    Args:
        model: a transformers causal language model.
        tokenizer: its tokenizer.
        facts: the checkpoint's facts, to find each layer's scale.
        modes: the arms; the baseline, where it is among them, is what the others are compared with.
        task: questions and limits.
        log: keeps every generated text and gives back those of an interrupted run.
        progress: told of every finished batch.

    Returns:
        Results and scores by arm.

    Raises:
        EvaluationError: there are no problems, or two arms have the same name.
    """
    if not task.problems:
        raise EvaluationError("there are no problems to evaluate")
    if len({mode.name for mode in modes}) != len(modes):
        raise EvaluationError(f"an arm appears twice: {', '.join(mode.name for mode in modes)}")
    results, scores = {}, {}
    with absorbed_mla(model):
        agreements = _agreements(model, tokenizer, facts, modes, task, progress)
        for mode in modes:
            start = time.perf_counter()
            with emulated_cache(model, facts, mode):
                texts = _generate(model, tokenizer, mode.name, task, log, progress)
            scores[mode.name] = [
                score(text, problem) for text, problem in zip(texts, task.problems, strict=True)
            ]
            agreement = agreements.get(mode.name)
            results[mode.name] = ArmResult.from_scores(
                scores[mode.name],
                None if agreement is None else agreement.summary(),
                time.perf_counter() - start,
            )
    return results, scores


def _generate(
    model: nn.Module,
    tokenizer: Any,
    arm: str,
    task: EvaluationTask,
    log: SampleLog | None,
    progress: Progress,
) -> list[str]:
    texts: dict[int, str] = {} if log is None else log.known(arm, task.prompts)
    progress(arm, len(texts))
    # prompts of like length together: less padding, and rows of a batch end at like times
    todo = sorted(set(range(len(task.prompts))) - set(texts), key=lambda i: len(task.prompts[i]))
    for start in range(0, len(todo), task.batch_size):
        rows = todo[start : start + task.batch_size]
        generated = generate_greedy(
            model,
            tokenizer,
            [task.prompts[row] for row in rows],
            stops=task.stops,
            max_new_tokens=task.max_new_tokens,
        )
        for row, text in zip(rows, generated, strict=True):
            texts[row] = truncate_at_stop(text, task.stops)
            if log is not None:
                log.append(arm, row, task.prompts[row], texts[row])
        progress(arm, len(rows))
    return [texts[row] for row in range(len(task.prompts))]


def _agreements(
    model: nn.Module,
    tokenizer: Any,
    facts: ModelFacts,
    modes: Sequence[CacheMode],
    task: EvaluationTask,
    progress: Progress,
) -> dict[str, Agreement]:
    baseline = next((mode for mode in modes if mode.name == BASELINE), None)
    if baseline is None:
        return {}
    totals = {mode.name: Agreement() for mode in modes}
    order = sorted(range(len(task.prompts)), key=lambda i: len(task.prompts[i]))
    for start in range(0, len(order), task.batch_size):
        rows = order[start : start + task.batch_size]
        batch = force(
            tokenizer,
            [task.prompts[row] for row in rows],
            [reference_continuation(task.problems[row]) for row in rows],
        )
        with emulated_cache(model, facts, baseline):
            expected = answer_logits(model, batch)
        for mode in modes:
            if mode is baseline:
                logits = expected
            else:
                with emulated_cache(model, facts, mode):
                    logits = answer_logits(model, batch)
            part = measure_agreement(logits, expected, batch.reference_tokens)
            totals[mode.name] = totals[mode.name].merge(part)
        progress("agreement", len(rows))
    return totals
