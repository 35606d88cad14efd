"""Hold the results of an evaluation against what was expected of them, so that it can gate a release."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

from fp8kv.recipes import Expect
from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.evaluation.arms import BASELINE
from fp8kv.runtime.evaluation.eval_report import ExpectationOutcome, Sections

_NEEDS = {
    "max_accuracy_drop": {"gsm8k": "--gsm8k or --data"},
    "max_task_drop": {"tasks": "--tasks"},
    "max_kl": {"gsm8k": "--gsm8k or --data", "agreement": "--agreement"},
    "min_top1": {"gsm8k": "--gsm8k or --data", "agreement": "--agreement"},
    "max_perplexity_ratio": {"perplexity": "--perplexity"},
    "min_needle_recall": {"needle": "--needle"},
}
"""The sections that each expectation can be checked on, and what asks for them."""


def check_askable(expect: Expect, arms: Collection[str], sections: Collection[str]) -> None:
    """Refuse, before anything runs, what could not be checked afterwards: silence is no proof.

    Args:
        expect: what is expected.
        arms: that will run.
        sections: names of what will be measured.

    Raises:
        EvaluationError: an arm or a section that an expectation is about will not be there.
    """
    for key in _expected(expect):
        needs = _NEEDS[key]
        if not needs.keys() & set(sections):
            raise EvaluationError(
                f"{key} cannot be checked without {' or '.join(needs.values())}: measure it, or expect less"
            )
        for arm in (expect.arm, *([] if key == "min_needle_recall" else [BASELINE])):
            if arm not in arms:
                raise EvaluationError(
                    f"{key} cannot be checked without the arm {arm!r}: add it to --arms, or expect less"
                )


def check_expectations(sections: Sections, expect: Expect) -> tuple[ExpectationOutcome, ...]:
    """Return one outcome for each value that an expectation is about.

    Args:
        sections: what was measured, as :func:`check_askable` asks for.
        expect: what is expected.
    """
    outcomes = []
    for key in _expected(expect):
        threshold = getattr(expect, key)
        for measured, found in _found(key, sections, expect.arm):
            # comparisons with NaN are false, so NaN is never within a threshold
            is_met = found >= threshold if key.startswith("min_") else found <= threshold
            outcomes.append(ExpectationOutcome(key, expect.arm, measured, threshold, found, is_met))
    return tuple(outcomes)


def _expected(expect: Expect) -> list[str]:
    return [
        field.name
        for field in dataclasses.fields(expect)
        if field.name in _NEEDS and getattr(expect, field.name) is not None
    ]


def _found(key: str, sections: Sections, arm: str) -> Iterator[tuple[str, float]]:
    """Yield what was measured and how much, a drop in percentage points."""
    if key == "max_accuracy_drop" and sections.gsm8k is not None:
        pair = sections.gsm8k.comparisons[arm]
        yield "GSM8K, strict-match", -100 * pair.strict.difference
        yield "GSM8K, flexible-extract", -100 * pair.flexible.difference
    elif key == "max_task_drop" and sections.tasks is not None:
        yield from sections.tasks.drops(arm)
    elif key == "max_perplexity_ratio" and sections.perplexity is not None:
        ratio = sections.perplexity.arms[arm].ratio
        if ratio is not None:
            yield "perplexity", ratio.value
    elif key == "min_needle_recall" and sections.needle is not None:
        yield "needles", sections.needle.arms[arm].recall.value
    elif key in ("max_kl", "min_top1"):
        gsm8k = sections.gsm8k.arms[arm].agreement if sections.gsm8k is not None else None
        text = sections.agreement.arms[arm].total if sections.agreement is not None else None
        for measured, agreement in (("reference answers", gsm8k), ("text", text)):
            if agreement is not None:
                yield measured, agreement.kl if key == "max_kl" else agreement.top1_baseline
