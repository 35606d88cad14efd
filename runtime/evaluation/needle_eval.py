"""Find keys in long contexts under every arm, and the section of the report that says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.evaluation.arms import BASELINE, Progress
from fp8kv.runtime.evaluation.digests import json_digest
from fp8kv.runtime.evaluation.needle import (
    DEPTHS,
    NeedleCell,
    NeedleResult,
    default_lengths,
    measure_needles,
    plan_needles,
)
from fp8kv.runtime.evaluation.paired import Accuracy, PairedComparison, compare
from fp8kv.runtime.generation import max_positions
from fp8kv.runtime.llm import LLM, LoadedModel


@dataclass(frozen=True)
class NeedleSettings:
    """Where the keys are.

    Attributes:
        lengths: tokens of the contexts; None takes the powers of two from 512 to the model's positions.
        depths: of the key in its context, 0 (first) to 1 (last).
        num_samples: prompts of each length and depth.
        haystack: a text to hide the keys in; None takes generated sentences.
    """

    lengths: tuple[int, ...] | None = None
    depths: tuple[float, ...] = DEPTHS
    num_samples: int = 1
    haystack: str | None = None


@dataclass(frozen=True)
class NeedleArm:
    """What one arm retrieved.

    Attributes:
        recall: keys that it found.
        logprob: mean natural log-probability of the right answer, when it is given.
        top1: mean share of its tokens that are the likeliest, each given those before it.
        cells: length by length, depth by depth.
        comparison: with the baseline, prompt by prompt; None for the baseline itself and where it was not run.
    """

    recall: Accuracy
    logprob: float
    top1: float
    cells: tuple[NeedleCell, ...]
    comparison: PairedComparison | None


@dataclass(frozen=True)
class NeedleSection:
    """Retrieval from long contexts.

    Attributes:
        protocol_digest: SHA-256 of the prompts' token ids.
        lengths: tokens of the contexts.
        depths: of the keys.
        n: prompts.
        arms: by arm.
    """

    protocol_digest: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    n: int
    arms: Mapping[str, NeedleArm]


class NeedleMeasurement:
    """Retrieval under one arm after the other."""

    def __init__(self, settings: NeedleSettings, loaded: LoadedModel, progress: Progress) -> None:
        """Build the prompts.

        Raises:
            EvaluationError: a length or depth cannot be, or the model names no longest length and neither does
                the user.
        """
        self._settings = settings
        self._progress = progress
        self._lengths = _lengths(settings, loaded)
        self._plan = plan_needles(
            loaded.tokenizer,
            self._lengths,
            settings.depths,
            num_samples=settings.num_samples,
            haystack=settings.haystack,
        )
        self._found: dict[str, NeedleResult] = {}

    def run(self, arm: str, llm: LLM) -> None:
        """Have ``llm`` look for the keys."""
        label, total = f"needles with {arm}", len(self._plan.prompts)
        self._found[arm] = measure_needles(
            llm, self._plan, progress=lambda count: self._progress(label, count, total)
        )

    def result(self) -> NeedleSection:
        """Return the section of the report."""
        baseline = self._found.get(BASELINE)
        return NeedleSection(
            protocol_digest=json_digest([prompt.token_ids for prompt in self._plan.prompts]),
            lengths=self._lengths,
            depths=self._settings.depths,
            n=len(self._plan.prompts),
            arms={
                arm: _arm(one, None if arm == BASELINE else baseline)
                for arm, one in self._found.items()
            },
        )


def _arm(found: NeedleResult, baseline: NeedleResult | None) -> NeedleArm:
    outcomes = [answer.is_found for answer in found.answers]
    comparison = None
    if baseline is not None:
        comparison = compare(outcomes, [answer.is_found for answer in baseline.answers])
    return NeedleArm(
        Accuracy.from_outcomes(outcomes), found.logprob, found.top1, found.cells, comparison
    )


def _lengths(settings: NeedleSettings, loaded: LoadedModel) -> tuple[int, ...]:
    limit = max_positions(loaded.model)
    if settings.lengths is not None:
        longest = max(settings.lengths, default=0)
        if limit is not None and longest > limit:
            raise EvaluationError(
                f"a context of {longest} tokens exceeds the model's {limit} positions: give shorter ones (--lengths)"
            )
        return settings.lengths
    if limit is None:
        raise EvaluationError("the model names no longest context: give the lengths (--lengths)")
    return default_lengths(limit)
