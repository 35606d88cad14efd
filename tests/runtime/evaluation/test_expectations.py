"""Expectations: what can be checked, and what is met."""

import dataclasses
import json
import math
from pathlib import Path

import pytest

from fp8kv.recipes import Expect
from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.evaluation.eval_report import EvalReport, Sections
from fp8kv.runtime.evaluation.expectations import check_askable, check_expectations

GOLDEN = Path(__file__).parent / "golden" / "eval_report.json"
ARMS = ("bf16", "fp8-unit", "fp8")


@pytest.fixture(scope="module")
def sections():
    """What the golden report holds: fp8-unit ruins the model, fp8 does not."""
    return EvalReport.from_json(json.loads(GOLDEN.read_text())).sections


def outcomes(sections, **expected):
    return check_expectations(sections, Expect(**expected))


@pytest.mark.parametrize(
    ("key", "good", "bad", "found"),
    [
        ("max_accuracy_drop", {"fp8": [0.2, 0.0]}, {"fp8-unit": [6.6, 6.6]}, 1.0),
        ("max_task_drop", {"fp8": [0.78125]}, {"fp8-unit": [25.0]}, 1.0),
        ("max_kl", {"fp8": [1.04e-5, 1.04e-5]}, {"fp8-unit": [0.119, 0.119]}, 0.01),
        ("min_top1", {"fp8": [1.0, 1.0]}, {"fp8-unit": [0.9719, 0.9719]}, 0.99),
        ("max_perplexity_ratio", {"fp8": [1.00001]}, {"fp8-unit": [1.2]}, 1.01),
    ],
)
def test_each_threshold_tells_a_good_arm_from_a_bad_one(sections, key, good, bad, found):
    for arms, is_met in ((good, True), (bad, False)):
        ((arm, values),) = arms.items()
        results = outcomes(sections, arm=arm, **{key: found})
        assert [one.found for one in results] == pytest.approx(values)
        assert {one.is_met for one in results} == {is_met}
        assert {(one.expectation, one.arm, one.threshold) for one in results} == {(key, arm, found)}


def test_recall_is_held_to_a_least_value(sections):
    assert outcomes(sections, min_needle_recall=0.5)[0].is_met
    (missed,) = outcomes(sections, min_needle_recall=0.51)
    assert (missed.found, missed.is_met) == (0.5, False)


def test_the_threshold_itself_is_met(sections):
    assert outcomes(sections, max_task_drop=0.78125)[0].is_met
    assert outcomes(sections, min_top1=1.0)[0].is_met


def test_every_section_that_measured_it_is_held_to_it(sections):
    both = outcomes(sections, max_kl=1.0)
    text_alone = outcomes(Sections(agreement=sections.agreement), max_kl=1.0)
    assert [one.measured for one in both] == ["reference answers", "text"]
    assert [one.measured for one in text_alone] == ["text"]


def test_only_metrics_of_which_more_is_better_can_drop(sections):
    (only,) = outcomes(sections, max_task_drop=0.0)
    assert only.measured == "arc_easy, acc,none"


def test_a_gain_is_no_drop(sections):
    pair = sections.gsm8k.comparisons["fp8"]
    better = dataclasses.replace(pair.strict, difference=0.1)
    gsm8k = dataclasses.replace(
        sections.gsm8k, comparisons={"fp8": dataclasses.replace(pair, strict=better)}
    )
    found = outcomes(Sections(gsm8k=gsm8k), max_accuracy_drop=0.0)
    assert [one.found for one in found] == pytest.approx([-10.0, 0.0])
    assert all(one.is_met for one in found)


def test_what_is_not_a_number_meets_nothing(sections):
    arms = sections.perplexity.arms
    ratio = dataclasses.replace(arms["fp8"].ratio, value=math.nan)
    arms = {**arms, "fp8": dataclasses.replace(arms["fp8"], ratio=ratio)}
    broken = Sections(perplexity=dataclasses.replace(sections.perplexity, arms=arms))
    assert not outcomes(broken, max_perplexity_ratio=2.0)[0].is_met


@pytest.mark.parametrize(
    ("expected", "arms", "measured", "message"),
    [
        ({"max_accuracy_drop": 1.0}, ARMS, ["perplexity"], "without --gsm8k or --data"),
        ({"max_task_drop": 1.0}, ARMS, ["gsm8k"], "without --tasks"),
        ({"max_kl": 1.0}, ARMS, ["needle"], "without --gsm8k or --data or --agreement"),
        ({"min_top1": 1.0}, ARMS, ["needle"], "without --gsm8k or --data or --agreement"),
        ({"max_perplexity_ratio": 1.0}, ARMS, ["gsm8k"], "without --perplexity"),
        ({"min_needle_recall": 1.0}, ARMS, ["gsm8k"], "min_needle_recall .* without --needle"),
        ({"max_kl": 1.0}, ("bf16", "fp8-unit"), ["gsm8k"], "without the arm 'fp8'"),
        ({"max_kl": 1.0, "arm": "emulate"}, ARMS, ["gsm8k"], "without the arm 'emulate'"),
        ({"max_kl": 1.0}, ("fp8",), ["gsm8k"], "without the arm 'bf16'"),
        ({"max_kl": 1.0, "min_needle_recall": 0.0}, ARMS, ["gsm8k"], "without --needle"),
    ],
)
def test_what_could_not_be_checked_is_refused(expected, arms, measured, message):
    with pytest.raises(EvaluationError, match=message):
        check_askable(Expect(**expected), arms, measured)


def test_what_can_be_checked_is_not():
    check_askable(Expect(max_kl=1.0), ARMS, ["agreement"])
    check_askable(Expect(max_kl=1.0), ARMS, ["gsm8k", "needle"])
    check_askable(Expect(min_needle_recall=0.0), ("fp8",), ["needle"])
