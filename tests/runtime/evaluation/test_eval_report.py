"""The evaluation report: its schema, its JSON form, and what it refuses."""

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.evaluation.agreement import AgreementSummary
from fp8kv.runtime.evaluation.agreement_eval import AgreementBucket, AgreementSection, ArmAgreement
from fp8kv.runtime.evaluation.eval_report import ArmRun, EvalReport, ExpectationOutcome, Sections
from fp8kv.runtime.evaluation.gsm8k_section import Gsm8kArm, Gsm8kComparison, Gsm8kSection
from fp8kv.runtime.evaluation.lm_eval_adapter import TaskResults
from fp8kv.runtime.evaluation.needle import NeedleCell
from fp8kv.runtime.evaluation.needle_eval import NeedleArm, NeedleSection
from fp8kv.runtime.evaluation.paired import Accuracy, PairedComparison
from fp8kv.runtime.evaluation.perplexity_eval import (
    PerplexityArm,
    PerplexityRatio,
    PerplexitySection,
)
from fp8kv.runtime.evaluation.tasks_eval import TasksSection

GOLDEN = Path(__file__).parent / "golden" / "eval_report.json"
DIGEST = "0123456789abcdef" * 4

# Written out, not computed: the golden forms must not change with the statistics.
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
PLAIN = AgreementSummary(2064, 0.01495, 0.99322, 1.0, 0.0, 0.0)
RUINED = AgreementSummary(2064, 0.13547, 0.97045, 0.9719, 0.119, 7.25)
GOOD = AgreementSummary(2064, 0.01497, 0.99322, 1.0, 1.04e-05, 0.0013)


def gsm8k_arm(right: int, low: float, high: float, agreement: AgreementSummary) -> Gsm8kArm:
    accuracy = Accuracy(right=right, n=500, value=right / 500, ci_low=low, ci_high=high)
    return Gsm8kArm(strict=accuracy, flexible=accuracy, agreement=agreement, seconds=12.5)


def agreement_arm(summary: AgreementSummary) -> ArmAgreement:
    later = dataclasses.replace(summary, num_tokens=1937)
    early = dataclasses.replace(summary, num_tokens=127)
    return ArmAgreement(summary, (AgreementBucket(0, 127, early), AgreementBucket(128, 255, later)))


def needle_arm(found: int, comparison: PairedComparison | None) -> NeedleArm:
    cells = tuple(
        NeedleCell(
            length=length, depth=depth, trials=1, found=int(depth > 0), logprob=-0.5, top1=0.9
        )
        for length in (512, 1024)
        for depth in (0.0, 0.5)
    )
    recall = Accuracy(right=found, n=4, value=found / 4, ci_low=0.15, ci_high=0.85)
    return NeedleArm(recall, -0.5, 0.9, cells, comparison)


def task_results(accuracy: float) -> TaskResults:
    return TaskResults(
        tasks={"arc_easy": {"acc,none": accuracy, "acc_stderr,none": 0.01, "ppl,none": 3.5}},
        num_samples={"arc_easy": 100},
        num_fewshot={"arc_easy": 0},
        higher_is_better={"arc_easy": {"acc": True, "ppl": False}},
        task_versions={"arc_easy": "1.0"},
        harness="0.4.13",
    )


SECTIONS = Sections(
    gsm8k=Gsm8kSection(
        data="gsm-synth-test.jsonl",
        shots="gsm-synth-train.jsonl",
        protocol="gsm8k 3.0, lm-evaluation-harness 0.4.13",
        protocol_digest=DIGEST,
        n=500,
        num_fewshot=5,
        max_new_tokens=256,
        arms={
            "bf16": gsm8k_arm(496, 0.98, 0.997, PLAIN),
            "fp8-unit": gsm8k_arm(463, 0.9, 0.946, RUINED),
            "fp8": gsm8k_arm(496, 0.98, 0.997, GOOD),
        },
        comparisons={
            "fp8-unit": Gsm8kComparison(strict=LOSS, flexible=LOSS),
            "fp8": Gsm8kComparison(strict=SMALL, flexible=NONE),
        },
    ),
    perplexity=PerplexitySection(
        data="wiki.txt",
        protocol_digest=DIGEST,
        context=2048,
        stride=1024,
        num_tokens=12345,
        arms={
            "bf16": PerplexityArm(8.25, 2.11021, 0.75, None),
            "fp8-unit": PerplexityArm(9.9, 2.29253, 0.81, PerplexityRatio(1.2, 1.15, 1.25)),
            "fp8": PerplexityArm(8.25, 2.11022, 0.75, PerplexityRatio(1.00001, 0.9999, 1.0001)),
        },
    ),
    agreement=AgreementSection(
        data="wiki.txt",
        protocol_digest=DIGEST,
        context=256,
        num_windows=9,
        arms={
            "bf16": agreement_arm(PLAIN),
            "fp8-unit": agreement_arm(RUINED),
            "fp8": agreement_arm(GOOD),
        },
    ),
    needle=NeedleSection(
        protocol_digest=DIGEST,
        lengths=(512, 1024),
        depths=(0.0, 0.5),
        n=4,
        arms={
            "bf16": needle_arm(2, None),
            "fp8-unit": needle_arm(2, NONE),
            "fp8": needle_arm(2, NONE),
        },
    ),
    tasks=TasksSection(
        tasks=("arc_easy",),
        limit=100,
        arms={
            "bf16": task_results(0.75),
            "fp8-unit": task_results(0.5),
            "fp8": task_results(0.7421875),
        },
    ),
)


def report(**changes: Any) -> EvalReport:
    fields: dict[str, Any] = {
        "model": "out/tiny-deepseek-v3-fp8kv",
        "device": "cpu",
        "backend": "reference",
        "dtype": "bfloat16",
        "fp8_format": "e4m3fn",
        "arms": {
            "bf16": ArmRun(5760, 14.5),
            "fp8-unit": ArmRun(2880, 12.5),
            "fp8": ArmRun(2880, 12.5),
        },
        "sections": SECTIONS,
        "expectations": (
            ExpectationOutcome("max_kl", "fp8", "reference answers", 0.001, 1.04e-05, True),
            ExpectationOutcome("max_task_drop", "fp8", "arc_easy, acc,none", 0.5, 0.78125, False),
        ),
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

    @pytest.mark.parametrize("name", list(SECTIONS.present()))
    def test_is_read_back_equal_with_each_section_alone(self, name: str) -> None:
        original = report(sections=Sections(**{name: getattr(SECTIONS, name)}), expectations=())
        assert EvalReport.from_json(json.loads(json.dumps(original.to_json()))) == original

    def test_keeps_the_order_of_the_arms(self) -> None:
        tasks = dataclasses.replace(
            SECTIONS.tasks, arms=dict(reversed(SECTIONS.tasks.arms.items()))
        )
        original = report(
            arms=dict(reversed(report().arms.items())), sections=Sections(tasks=tasks)
        )
        data = json.loads(json.dumps(original.to_json()))
        assert list(EvalReport.from_json(data).arms) == ["fp8", "fp8-unit", "bf16"]

    def test_does_not_share_what_it_returns(self) -> None:
        original = report()
        original.to_json()["sections"]["gsm8k"]["arms"]["bf16"]["strict"]["right"] = 0
        assert original == report()

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ([], r"the report must be a JSON object, not \[\]"),
            ({}, "the report has schema None, and this version of fp8kv reads 2"),
            (changed("schema", 1), "the report has schema 1"),
            (changed("sections", delete=True), "report lacks 'sections'"),
            (changed("extra", 1), "report has an unknown key 'extra'; known: model, device"),
            (changed("sections.gsm8k.n", "500"), "report.sections.gsm8k.n must be int, not '500'"),
            (changed("sections.gsm8k.arms.fp8.strict.right", delete=True), "strict lacks 'right'"),
            (changed("sections.needle.lengths", 512), "needle.lengths must be a JSON array"),
            (changed("arms", {}), "an evaluation needs an arm"),
        ],
    )
    def test_names_what_is_malformed(self, data: Any, message: str) -> None:
        with pytest.raises(EvaluationError, match=message):
            EvalReport.from_json(data)


class TestConsistency:
    def test_refuses_an_unknown_arm(self) -> None:
        message = "unknown arm 'int4'; known: bf16, fp8-unit, fp8, emulate"
        with pytest.raises(EvaluationError, match=message):
            report(arms={"int4": ArmRun(1, 1.0)})

    def test_refuses_to_hold_nothing(self) -> None:
        with pytest.raises(EvaluationError, match="the report holds no section"):
            report(sections=Sections())

    @pytest.mark.parametrize("name", list(SECTIONS.present()))
    def test_refuses_a_section_over_other_arms(self, name: str) -> None:
        arms = {one: run for one, run in report().arms.items() if one != "fp8"}
        sections = Sections(**{name: getattr(SECTIONS, name)})
        with pytest.raises(EvaluationError, match=f"{name} is over the arms bf16, fp8-unit, fp8"):
            report(arms=arms, sections=sections)

    def test_is_as_expected_where_every_expectation_is_met(self) -> None:
        met, missed = report().expectations
        assert report(expectations=(met, met)).is_as_expected
        assert report(expectations=()).is_as_expected
        assert not report(expectations=(met, missed)).is_as_expected
