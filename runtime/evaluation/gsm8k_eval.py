"""Ask GSM8K under every arm: generated answers, and agreement on the reference answers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.evaluation.agreement import AgreementSummary
from fp8kv.runtime.evaluation.agreement_eval import answer_rows, compare_arms
from fp8kv.runtime.evaluation.arms import BASELINE, ArmOpener, Progress
from fp8kv.runtime.evaluation.digests import json_digest
from fp8kv.runtime.evaluation.gsm8k import (
    MAX_NEW_TOKENS,
    NUM_FEWSHOT,
    PROTOCOL,
    STOPS,
    Problem,
    Score,
    build_prompts,
    protocol_digest,
    reference_continuation,
    score,
    truncate_at_stop,
)
from fp8kv.runtime.evaluation.gsm8k_section import Gsm8kArm, Gsm8kSection, compare_with_baseline
from fp8kv.runtime.evaluation.paired import Accuracy
from fp8kv.runtime.evaluation.samples import SampleLog
from fp8kv.runtime.evaluation.teacher_forcing import encode_answers
from fp8kv.runtime.generation import max_positions
from fp8kv.runtime.llm import LLM, LoadedModel
from fp8kv.runtime.sampling import SamplingParameters


@dataclass(frozen=True)
class Questions:
    """The problems of an evaluation and the pool that shots are drawn from.

    Attributes:
        name: where the problems come from, for the report.
        problems: all of them, in the order of their file.
        shots_name: where the shots come from; None where they are the problems themselves.
        shots: the pool.
    """

    name: str
    problems: Sequence[Problem]
    shots_name: str | None
    shots: Sequence[Problem]


@dataclass(frozen=True)
class Gsm8kSettings:
    """What to ask, and how.

    Attributes:
        questions: problems and shots.
        limit: only the first so many problems.
        num_fewshot: solved problems in front of each.
        max_new_tokens: generation limit.
        samples: a JSON Lines file that keeps every answer; a run that was interrupted goes on from it.
    """

    questions: Questions
    limit: int | None = None
    num_fewshot: int = NUM_FEWSHOT
    max_new_tokens: int = MAX_NEW_TOKENS
    samples: Path | None = None


class Gsm8kMeasurement:
    """GSM8K under one arm after the other."""

    def __init__(
        self, settings: Gsm8kSettings, loaded: LoadedModel, run: Sequence[str], progress: Progress
    ) -> None:
        """Build the prompts.

        Args:
            settings: what to ask.
            loaded: the model.
            run: all else that shapes an answer, for the samples file.
            progress: told of every answer.

        Raises:
            DataError: there are too few shots.
            EvaluationError: there are no problems, a prompt does not fit the model, or the samples file belongs to another run.
        """
        questions = settings.questions
        self._settings = settings
        self._progress = progress
        self._tokenizer = loaded.tokenizer
        self._rows = answer_rows(loaded)
        self._problems = questions.problems[: settings.limit]
        if not self._problems:
            raise EvaluationError("there are no problems to evaluate")
        self._prompts = build_prompts(
            self._problems,
            questions.shots,
            settings.num_fewshot,
            same_split=questions.shots_name is None,
        )
        self._encoded: list[list[int]] = loaded.tokenizer(self._prompts, verbose=False)["input_ids"]
        _check_length(self._encoded, settings.max_new_tokens, max_positions(loaded.model))
        self._stops = stop_strings(loaded.tokenizer)
        self._digest = protocol_digest(
            self._prompts, self._problems, stops=self._stops, max_new_tokens=settings.max_new_tokens
        )
        self._log = None
        if settings.samples is not None:
            self._log = SampleLog(settings.samples, json_digest([self._digest, *run]))
        self._scores: dict[str, list[Score]] = {}
        self._seconds: dict[str, float] = {}
        self._agreements: dict[str, AgreementSummary] = {}

    def run(self, arm: str, llm: LLM) -> None:
        """Ask ``llm`` everything, all at once; what the samples file knows is not asked again."""
        start = time.perf_counter()
        texts = {} if self._log is None else self._log.known(arm, self._prompts)
        total = len(self._prompts)
        label = f"answers with {arm}"
        self._progress(label, len(texts), total)
        todo = [row for row in range(total) if row not in texts]
        parameters = SamplingParameters(max_tokens=self._settings.max_new_tokens, stop=self._stops)
        for number, completion in llm.generate_iter(
            [self._encoded[row] for row in todo], parameters
        ):
            row = todo[number]
            texts[row] = truncate_at_stop(completion.text, self._stops)
            if self._log is not None:
                self._log.append(arm, row, self._prompts[row], texts[row])
            self._progress(label, 1, total)
        self._scores[arm] = [
            score(texts[row], problem) for row, problem in enumerate(self._problems)
        ]
        self._seconds[arm] = time.perf_counter() - start

    def compare(self, open_arm: ArmOpener, arms: Sequence[str]) -> None:
        """Compare all arms with the baseline, if it is among them, teacher-forced on the reference answers."""
        if BASELINE not in arms:
            return
        references = [reference_continuation(problem) for problem in self._problems]
        answers = encode_answers(self._tokenizer, references)
        total = len(self._problems)
        found = compare_arms(
            open_arm,
            arms,
            list(zip(self._encoded, answers, strict=True)),
            rows=self._rows,
            progress=lambda count: self._progress("reference answers, all arms", count, total),
        )
        self._agreements = {arm: positions.total.summary() for arm, positions in found.items()}

    def result(self) -> Gsm8kSection:
        """Return the section of the report."""
        return Gsm8kSection(
            data=self._settings.questions.name,
            shots=self._settings.questions.shots_name,
            protocol=PROTOCOL,
            protocol_digest=self._digest,
            n=len(self._problems),
            num_fewshot=self._settings.num_fewshot,
            max_new_tokens=self._settings.max_new_tokens,
            arms={
                arm: Gsm8kArm(
                    Accuracy.from_outcomes([one.strict for one in scores]),
                    Accuracy.from_outcomes([one.flexible for one in scores]),
                    self._agreements.get(arm),
                    self._seconds[arm],
                )
                for arm, scores in self._scores.items()
            },
            comparisons=compare_with_baseline(self._scores),
        )


def stop_strings(tokenizer: Any) -> tuple[str, ...]:
    """Return the harness' stop strings and, as it does, the tokenizer's end of sequence."""
    end = tokenizer.eos_token
    return (*STOPS, end) if end else STOPS


def _check_length(encoded: Sequence[Sequence[int]], max_new_tokens: int, limit: int | None) -> None:
    longest = max(map(len, encoded))
    if limit is not None and longest + max_new_tokens > limit:
        raise EvaluationError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's {limit} positions: "
            "use fewer shots (--num-fewshot) or shorter answers (--max-new-tokens)"
        )
