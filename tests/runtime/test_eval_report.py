"""The evaluation report: its schema, its JSON form, and what it refuses."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.agreement import AgreementSummary
from fp8kv.runtime.eval_report import (
    Accuracy,
    ArmComparison,
    ArmResult,
    EvalReport,
    compare_with_baseline,
)
from fp8kv.runtime.gsm8k import Score
from fp8kv.runtime.paired import PairedComparison

GOLDEN = Path(__file__).parent / "golden" / "eval_report.json"

RIGHT, WRONG = Score(True, True, "1", "1"), Score(False, False, None, None)
LENIENT = Score(False, True, None, "1")

# Written out, not computed: the golden forms below must not change with the statistics.
LOSS = PairedComparison(
    n=500, both_right=460, only_a=3, only_b=36, neither=1,
    difference=-0.066, ci_low=-0.09, ci_high=-0.044, p_value=3.62e-08,
)  # fmt: skip
NONE = PairedComparison(
    n=500, both_right=496, only_a=0, only_b=0, neither=4,
    difference=0.0, ci_low=0.0, ci_high=0.0, p_value=1.0,
)  # fmt: skip
SMALL = PairedComparison(
    n=500, both_right=494, only_a=1, only_b=2, neither=3,
    difference=-0.002, ci_low=-0.01, ci_high=0.004, p_value=1.0,
)  # fmt: skip


def arm(right: int, low: float, high: float, agreement: AgreementSummary | None) -> ArmResult:
    accuracy = Accuracy(right=right, n=500, value=right / 500, ci_low=low, ci_high=high)
    return ArmResult(strict=accuracy, flexible=accuracy, agreement=agreement, seconds=12.5)


def report(**changes: Any) -> EvalReport:
    fields: dict[str, Any] = {
        "model": "out/tiny-deepseek-v3-fp8kv",
        "data": "gsm-synth-test.jsonl",
        "shots": "gsm-synth-train.jsonl",
        "protocol": "gsm8k 3.0, lm-evaluation-harness 0.4.13",
        "protocol_digest": "0123456789abcdef" * 4,
        "n": 500,
        "num_fewshot": 5,
        "max_new_tokens": 256,
        "device": "cpu",
        "dtype": "bfloat16",
        "fp8_format": "e4m3fn",
        "arms": {
            "bf16": arm(496, 0.98, 0.997, AgreementSummary(2064, 0.01495, 0.99322, 1.0, 0.0, 0.0)),
            "fp8-unit": arm(
                463, 0.9, 0.946, AgreementSummary(2064, 0.13547, 0.97045, 0.9719, 0.119, 7.25)
            ),
            "fp8": arm(
                496, 0.98, 0.997, AgreementSummary(2064, 0.01497, 0.99322, 1.0, 1.04e-05, 0.0013)
            ),
        },
        "comparisons": {
            "fp8-unit": ArmComparison(strict=LOSS, flexible=LOSS),
            "fp8": ArmComparison(strict=SMALL, flexible=NONE),
        },
        "versions": {"fp8kv": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0"},
        "seconds": 62.4,
    }
    return EvalReport(**{**fields, **changes})


def changed(path: str, value: Any = None, *, delete: bool = False) -> dict[str, Any]:
    """Return the report's JSON form with one key, named by a dotted path, set or deleted."""
    data = copy.deepcopy(report().to_json())
    *parents, last = path.split(".")
    target = data
    for key in parents:
        target = target[key]
    if delete:
        del target[last]
    else:
        target[last] = value
    return data


class TestJson:
    def test_has_the_golden_form(self) -> None:
        assert json.dumps(report().to_json(), indent=2) + "\n" == GOLDEN.read_text()

    def test_is_read_back_equal(self) -> None:
        original = report()
        assert EvalReport.from_json(json.loads(json.dumps(original.to_json()))) == original

    def test_keeps_the_order_of_the_arms(self) -> None:
        arms = dict(reversed(report().arms.items()))
        data = json.loads(json.dumps(report(arms=arms).to_json()))
        assert list(EvalReport.from_json(data).arms) == ["fp8", "fp8-unit", "bf16"]

    def test_is_read_back_equal_without_baseline_and_agreement(self) -> None:
        original = report(arms={"fp8": arm(4, 0.0, 0.1, None)}, comparisons={})
        assert EvalReport.from_json(json.loads(json.dumps(original.to_json()))) == original

    def test_is_read_back_equal_without_shots(self) -> None:
        original = report(num_fewshot=0, shots=None)
        assert EvalReport.from_json(json.loads(json.dumps(original.to_json()))) == original

    def test_may_hold_a_whole_number_where_a_float_stands(self) -> None:
        data = changed("arms.bf16.agreement.kl", 0)
        assert EvalReport.from_json(data) == report()

    def test_does_not_share_what_it_returns(self) -> None:
        original = report()
        original.to_json()["arms"]["bf16"]["strict"]["right"] = 0
        assert original == report()

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ([], r"the report must be a JSON object, not \[\]"),
            ({}, "the report has schema None, and this version of fp8kv reads 1"),
            (changed("schema", 2), "the report has schema 2"),
            (changed("n", delete=True), "report lacks 'n'"),
            (changed("arms.fp8.strict.right", delete=True), "report.arms.fp8.strict lacks 'right'"),
            (changed("extra", 1), "report has an unknown key 'extra'; known: model, data"),
            (changed("arms.fp8.extra", 1), "report.arms.fp8 has an unknown key 'extra'"),
            (changed("n", "500"), "report.n must be int, not '500'"),
            (changed("n", 500.0), "report.n must be int, not 500.0"),
            (changed("n", True), "report.n must be int, not True"),
            (changed("model", None), "report.model must be str, not None"),
            (changed("seconds", "1"), "report.seconds must be float"),
            (changed("arms", []), r"report.arms must be a JSON object, not \[\]"),
            (changed("arms.fp8", None), "report.arms.fp8 must be a JSON object"),
            (changed("arms.fp8.agreement", 3), "report.arms.fp8.agreement must be a JSON object"),
            (changed("comparisons.fp8.strict.p_value", None), "fp8.strict.p_value must be float"),
            (changed("versions.torch", 2), "report.versions.torch must be str, not 2"),
            (changed("arms", {}), "an evaluation needs an arm"),
        ],
    )
    def test_names_what_is_malformed(self, data: Any, message: str) -> None:
        with pytest.raises(EvaluationError, match=message):
            EvalReport.from_json(data)


class TestConsistency:
    def test_refuses_an_unknown_arm(self) -> None:
        with pytest.raises(EvaluationError, match="unknown arm 'int4'; known: bf16, fp8-unit, fp8"):
            report(arms={"int4": arm(1, 0.0, 0.1, None)}, comparisons={})

    def test_refuses_an_arm_over_other_problems(self) -> None:
        with pytest.raises(
            EvaluationError, match="arm 'bf16' is over 500 problems, the report over 64"
        ):
            report(n=64)

    def test_refuses_a_comparison_over_other_problems(self) -> None:
        pair = ArmComparison(strict=SMALL, flexible=dataclasses.replace(SMALL, n=64))
        with pytest.raises(EvaluationError, match="comparison of 'fp8' is over 64 problems"):
            report(comparisons={"fp8": pair})

    @pytest.mark.parametrize(
        ("arms", "compared"),
        [(("bf16",), "fp8"), (("fp8",), "fp8"), (("bf16", "fp8"), "bf16")],
    )
    def test_refuses_a_comparison_without_its_arms(
        self, arms: tuple[str, ...], compared: str
    ) -> None:
        results = {name: report().arms[name] for name in arms}
        pairs = {compared: ArmComparison(strict=SMALL, flexible=SMALL)}
        with pytest.raises(EvaluationError, match=f"comparison of '{compared}' with 'bf16'"):
            report(arms=results, comparisons=pairs)


class TestFromScores:
    def test_counts_each_filter_apart(self) -> None:
        result = ArmResult.from_scores([RIGHT, LENIENT, WRONG, RIGHT], None, 3.0)
        assert (result.strict.right, result.strict.n, result.strict.value) == (2, 4, 0.5)
        assert (result.flexible.right, result.flexible.value) == (3, 0.75)
        assert (result.agreement, result.seconds) == (None, 3.0)

    def test_gives_the_wilson_interval(self) -> None:
        accuracy = Accuracy.from_outcomes([True] * 5 + [False] * 5)
        assert (accuracy.ci_low, accuracy.ci_high) == pytest.approx((0.2366, 0.7634), abs=5e-5)

    def test_refuses_no_scores(self) -> None:
        with pytest.raises(EvaluationError, match="no problem was evaluated"):
            ArmResult.from_scores([], None, 0.0)


class TestCompareWithBaseline:
    def test_compares_every_other_arm_per_filter(self) -> None:
        scores = {
            "fp8-unit": [WRONG, LENIENT, RIGHT],
            "bf16": [RIGHT, RIGHT, WRONG],
            "fp8": [RIGHT, RIGHT, WRONG],
        }
        found = compare_with_baseline(scores)
        assert list(found) == ["fp8-unit", "fp8"]
        unit = found["fp8-unit"]
        assert (unit.strict.only_a, unit.strict.only_b) == (1, 2)
        assert (unit.flexible.only_a, unit.flexible.only_b) == (1, 1)
        assert unit.strict.difference == pytest.approx(-1 / 3)
        assert found["fp8"].strict.difference == 0.0

    def test_finds_nothing_to_compare_without_the_baseline(self) -> None:
        assert compare_with_baseline({"fp8": [RIGHT]}) == {}

    def test_refuses_arms_over_other_problems(self) -> None:
        with pytest.raises(EvaluationError, match="the arms answered 1 and 2 problems"):
            compare_with_baseline({"bf16": [RIGHT, RIGHT], "fp8": [RIGHT]})
