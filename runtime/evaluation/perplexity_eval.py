"""Measure a text's perplexity under every arm, and the section of the report that says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fp8kv.runtime.evaluation.arms import BASELINE, Progress, default_context
from fp8kv.runtime.evaluation.digests import json_digest
from fp8kv.runtime.evaluation.paired import bootstrap_interval
from fp8kv.runtime.evaluation.perplexity import (
    Perplexity,
    from_nats,
    measure_perplexity,
    text_windows,
)
from fp8kv.runtime.llm import LLM, LoadedModel


@dataclass(frozen=True)
class PerplexitySettings:
    """What to score.

    Attributes:
        name: where the text comes from, for the report.
        text: the text.
        context: tokens of a window, of which each but the first scores half; None takes
            :func:`fp8kv.runtime.evaluation.arms.default_context`.
    """

    name: str
    text: str
    context: int | None = None


@dataclass(frozen=True)
class PerplexityRatio:
    """The perplexity of an arm over the baseline's.

    Attributes:
        value: above 1 where the arm predicts worse.
        ci_low: lower end of the 95 % bootstrap interval over the windows; None where there is one only.
        ci_high: upper end of it.
    """

    value: float
    ci_low: float | None
    ci_high: float | None


@dataclass(frozen=True)
class PerplexityArm:
    """How well one arm predicts the text.

    Attributes:
        perplexity: ``exp(nll)``.
        nll: mean negative log likelihood of a token, in nats.
        bits_per_byte: of the text in UTF-8; unlike the others it can be compared between tokenizers.
        ratio: to the baseline; None for the baseline itself and where it was not run.
    """

    perplexity: float
    nll: float
    bits_per_byte: float
    ratio: PerplexityRatio | None


@dataclass(frozen=True)
class PerplexitySection:
    """Perplexity of a text.

    Attributes:
        data: where the text comes from.
        protocol_digest: SHA-256 of the windows' token ids.
        context: tokens of a window, at most.
        stride: tokens that each window but the first scores, at most.
        num_tokens: scored tokens.
        arms: by arm.
    """

    data: str
    protocol_digest: str
    context: int
    stride: int
    num_tokens: int
    arms: Mapping[str, PerplexityArm]


class PerplexityMeasurement:
    """Perplexity under one arm after the other."""

    def __init__(
        self, settings: PerplexitySettings, loaded: LoadedModel, progress: Progress
    ) -> None:
        """Cut the text into windows.

        Raises:
            DataError: the text has fewer than two tokens.
            EvaluationError: the context is too short.
        """
        self._settings = settings
        self._progress = progress
        context = default_context(loaded) if settings.context is None else settings.context
        self._windows = text_windows(loaded.tokenizer, settings.text, context)
        self._found: dict[str, Perplexity] = {}

    def run(self, arm: str, llm: LLM) -> None:
        """Score the text with ``llm``."""
        label, total = f"perplexity with {arm}", len(self._windows.windows)
        self._found[arm] = measure_perplexity(
            llm, self._windows, progress=lambda count: self._progress(label, count, total)
        )

    def result(self) -> PerplexitySection:
        """Return the section of the report."""
        baseline = self._found.get(BASELINE)
        return PerplexitySection(
            data=self._settings.name,
            protocol_digest=json_digest(self._windows.windows),
            context=self._windows.window,
            stride=self._windows.stride,
            num_tokens=sum(len(scored) for _, scored in self._windows.windows),
            arms={
                arm: PerplexityArm(
                    one.perplexity,
                    one.nll,
                    one.bits_per_byte,
                    None if baseline is None or arm == BASELINE else ratio(one, baseline),
                )
                for arm, one in self._found.items()
            },
        )


def ratio(arm: Perplexity, baseline: Perplexity) -> PerplexityRatio:
    """Compare the perplexity of the same windows under two arms.

    Raises:
        EvaluationError: a likelihood is not finite.
    """
    value = from_nats(arm.nll - baseline.nll)
    if len(arm.window_nll) == 1:
        # drawn from one window, an interval would have no width and look like certainty
        return PerplexityRatio(value, None, None)
    # windows are resampled, for tokens of one window share what they read; all count alike, as all but one score
    # the same number of tokens
    differences = [
        len(arm.window_nll) * (own - other) / arm.num_tokens
        for own, other in zip(arm.window_nll, baseline.window_nll, strict=True)
    ]
    low, high = bootstrap_interval(differences)
    return PerplexityRatio(value, from_nats(low), from_nats(high))
