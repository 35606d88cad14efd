"""The GSM8K section of a report: consistency, and the comparison with the baseline."""

import dataclasses

import pytest

from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.evaluation.gsm8k import Score
from fp8kv.runtime.evaluation.gsm8k_section import (
    Gsm8kArm,
    Gsm8kComparison,
    Gsm8kSection,
    compare_with_baseline,
)
from fp8kv.runtime.evaluation.paired import Accuracy, compare

RIGHT, WRONG = Score(True, True, "1", "1"), Score(False, False, None, None)
LENIENT = Score(False, True, None, "1")
ACCURACY = Accuracy.from_outcomes([True, False])
PAIR = compare([True, False], [True, True])


def section(n=2, arms=("bf16", "fp8"), comparisons=None):
    pair = Gsm8kComparison(strict=PAIR, flexible=PAIR)
    return Gsm8kSection(
        data="d",
        shots=None,
        protocol="p",
        protocol_digest="0",
        n=n,
        num_fewshot=0,
        max_new_tokens=1,
        arms={name: Gsm8kArm(ACCURACY, ACCURACY, None, 1.0) for name in arms},
        comparisons={"fp8": pair} if comparisons is None else comparisons,
    )


def test_an_arm_over_other_problems_is_refused():
    with pytest.raises(EvaluationError, match="arm 'bf16' is over 2 problems, the report over 64"):
        section(n=64)


def test_a_comparison_over_other_problems_is_refused():
    pair = Gsm8kComparison(strict=PAIR, flexible=dataclasses.replace(PAIR, n=64))
    with pytest.raises(EvaluationError, match="comparison of 'fp8' is over 64 problems"):
        section(comparisons={"fp8": pair})


@pytest.mark.parametrize(
    ("arms", "compared"), [(("bf16",), "fp8"), (("fp8",), "fp8"), (("bf16", "fp8"), "bf16")]
)
def test_a_comparison_without_its_arms_is_refused(arms, compared):
    pair = Gsm8kComparison(strict=PAIR, flexible=PAIR)
    with pytest.raises(EvaluationError, match=f"comparison of '{compared}' with 'bf16'"):
        section(arms=arms, comparisons={compared: pair})


def test_every_other_arm_is_compared_per_filter():
    found = compare_with_baseline(
        {
            "fp8-unit": [WRONG, LENIENT, RIGHT],
            "bf16": [RIGHT, RIGHT, WRONG],
            "fp8": [RIGHT, RIGHT, WRONG],
        }
    )
    assert list(found) == ["fp8-unit", "fp8"]
    unit = found["fp8-unit"]
    assert (unit.strict.only_a, unit.strict.only_b) == (1, 2)
    assert (unit.flexible.only_a, unit.flexible.only_b) == (1, 1)
    assert unit.strict.difference == pytest.approx(-1 / 3)
    assert found["fp8"].strict.difference == 0.0


def test_without_the_baseline_there_is_nothing_to_compare():
    assert compare_with_baseline({"fp8": [RIGHT]}) == {}


def test_arms_over_other_problems_are_refused():
    with pytest.raises(EvaluationError, match="the arms answered 1 and 2 problems"):
        compare_with_baseline({"bf16": [RIGHT, RIGHT], "fp8": [RIGHT]})
