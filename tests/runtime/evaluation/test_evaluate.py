"""A whole evaluation of a checkpoint."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fp8kv.recipes import Expect
from fp8kv.recipes.errors import CalibrationError, CheckpointError, EvaluationError, OutputError
from fp8kv.runtime.evaluation import evaluate as evaluation
from fp8kv.runtime.evaluation.agreement_eval import AgreementSettings
from fp8kv.runtime.evaluation.eval_report import EvalReport
from fp8kv.runtime.evaluation.evaluate import EvaluationSettings, evaluate
from fp8kv.runtime.evaluation.gsm8k import PROTOCOL, Problem
from fp8kv.runtime.evaluation.gsm8k_eval import Gsm8kSettings, Questions
from fp8kv.runtime.evaluation.needle_eval import NeedleSettings
from fp8kv.runtime.evaluation.perplexity_eval import PerplexitySettings
from fp8kv.runtime.evaluation.tasks_eval import TasksSettings

TEXT = "a text of some length, of which a tiny model has never heard. " * 5
PROBLEMS = [Problem(f"What is {n} plus 1?", f"{n} + 1 = {n + 1}.\n#### {n + 1}") for n in range(3)]
QUESTIONS = Questions("test.jsonl", PROBLEMS, None, PROBLEMS)
GSM8K = Gsm8kSettings(QUESTIONS, num_fewshot=1, max_new_tokens=8)
EVERYTHING = EvaluationSettings(
    gsm8k=GSM8K,
    perplexity=PerplexitySettings("text.txt", TEXT, 64),
    agreement=AgreementSettings("text.txt", TEXT, 64),
    # the byte tokenizer takes a token per letter
    needle=NeedleSettings(lengths=(256,), depths=(0.5,)),
    expect=Expect(max_kl=1e-9, max_accuracy_drop=100.0),
)


@pytest.fixture(scope="module")
def scaled(tiny_checkpoint, tmp_path_factory):
    """Give a tiny model with all scales at a value."""

    def make(scale):
        path = tmp_path_factory.mktemp("scaled") / "model"
        shutil.copytree(tiny_checkpoint("llama"), path)
        names = [f"model.layers.{n}.self_attn.{s}_scale" for n in range(2) for s in "kv"]
        tensors = load_file(path / "model.safetensors")
        tensors |= {name: torch.tensor([scale]) for name in names}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return str(path)

    return make


@pytest.fixture(scope="module")
def told():
    return []


@pytest.fixture(scope="module")
def report(scaled, told):
    """Everything but tasks, under all arms, at a scale that clips."""
    return evaluate(
        scaled(2.0**-12),
        EVERYTHING,
        arms=["bf16", "fp8-unit", "fp8", "emulate"],
        device="cpu",
        progress=lambda *one: told.append(one),
    )


def quick(model, **keywords):
    settings = EvaluationSettings(gsm8k=dataclasses.replace(GSM8K, limit=1, max_new_tokens=2))
    return evaluate(
        str(model), **{"settings": settings, "arms": ["bf16"], "device": "cpu"} | keywords
    )


def test_the_report_says_what_was_run(report):
    assert (report.device, report.dtype, report.backend) == ("cpu", "float32", "reference")
    assert report.fp8_format == "e4m3fn"
    assert report.sections.gsm8k.protocol == PROTOCOL
    assert report.versions["torch"] == torch.__version__
    assert report.versions["transformers"] == transformers.__version__
    assert report.seconds > 0
    assert EvalReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_every_section_is_over_every_arm(report):
    arms = ["bf16", "fp8-unit", "fp8", "emulate"]
    assert list(report.sections.present()) == ["gsm8k", "perplexity", "agreement", "needle"]
    for section in report.sections.present().values():
        assert list(section.arms) == arms
    # K and V of two layers with two heads of 8, in float32 for the baseline of a float32 model
    sizes = [run.cache_bytes_per_token for run in report.arms.values()]
    assert sizes == [sizes[1] * 4, sizes[1], sizes[1], sizes[1] * 2]


def test_the_scales_of_the_checkpoint_are_used(report):
    kl = {name: arm.total.kl for name, arm in report.sections.agreement.arms.items()}
    assert kl["bf16"] == 0
    assert kl["fp8"] > 10 * kl["fp8-unit"] > 0
    assert kl["emulate"] == pytest.approx(kl["fp8"], rel=0.05)
    gsm8k = report.sections.gsm8k.arms
    assert (
        gsm8k["bf16"].agreement.kl == 0 < gsm8k["fp8-unit"].agreement.kl < gsm8k["fp8"].agreement.kl
    )
    assert report.sections.perplexity.arms["fp8"].ratio.value != 1


def test_expectations_are_checked(report):
    met = {(one.expectation, one.measured): one.is_met for one in report.expectations}
    assert met == {
        ("max_accuracy_drop", "GSM8K, strict-match"): True,
        ("max_accuracy_drop", "GSM8K, flexible-extract"): True,
        ("max_kl", "reference answers"): False,
        ("max_kl", "text"): False,
    }
    assert not report.is_as_expected


def test_progress_adds_up_for_every_task(report, told):
    sums = {}
    totals = {}
    for task, count, total in told:
        sums[task] = sums.get(task, 0) + count
        totals[task] = total
    assert sums == totals
    arms = ("bf16", "fp8-unit", "fp8", "emulate")
    alone = [f"{what} with {arm}" for arm in arms for what in ("answers", "perplexity", "needles")]
    together = ("reference answers, all arms", "agreement, all arms")
    assert sorted(sums) == sorted(["loading weights", *alone, *together])


def test_tasks_that_cannot_run_are_refused_before_the_weights_are_read(scaled, monkeypatch):
    asked = []

    def refuse(tasks):
        asked.append(tasks)
        raise EvaluationError("no such task")

    monkeypatch.setattr(evaluation, "check_tasks", refuse)
    monkeypatch.setattr(evaluation, "load", None)
    with pytest.raises(EvaluationError, match="no such task"):
        quick(scaled(1.0), settings=EvaluationSettings(tasks=TasksSettings(("quiz",))))
    assert asked == [("quiz",)]


def test_the_arms_share_the_weights(scaled, monkeypatch):
    loads = []
    load = evaluation.load
    monkeypatch.setattr(evaluation, "load", lambda *a, **k: loads.append(a) or load(*a, **k))
    quick(scaled(1.0), arms=["bf16", "fp8-unit", "fp8"])
    assert len(loads) == 1


def test_answers_are_kept_and_belong_to_their_run(scaled, tmp_path):
    model, path = scaled(1.0), tmp_path / "answers.jsonl"
    kept = dataclasses.replace(GSM8K, limit=1, max_new_tokens=2, samples=path)
    quick(model, settings=EvaluationSettings(gsm8k=kept))
    before = path.read_bytes()
    assert len(before.splitlines()) == 1

    quick(model, settings=EvaluationSettings(gsm8k=kept))
    assert path.read_bytes() == before

    longer = dataclasses.replace(kept, max_new_tokens=3)
    for other in (
        {"dtype": "bfloat16"},
        {"settings": EvaluationSettings(gsm8k=longer)},
        {"model": scaled(0.5)},
    ):
        options = {"model": model, "settings": EvaluationSettings(gsm8k=kept)} | other
        with pytest.raises(EvaluationError, match="answers of another run"):
            quick(**options)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"settings": EvaluationSettings()}, EvaluationError, "there is nothing to measure"),
        ({"arms": ["fp9"]}, EvaluationError, "unknown arm 'fp9'"),
        ({"arms": ["fp8"]}, EvaluationError, "carries no KV scales: convert it"),
        ({"device": "cuda:99"}, CalibrationError, "'cuda:99' cannot be used here"),
        ({"model": "/nowhere/at/all"}, CheckpointError, "/nowhere/at/all does not exist"),
        (
            {"settings": EvaluationSettings(agreement=AgreementSettings("t", TEXT))},
            EvaluationError,
            "agreement compares other arms with 'bf16'",
        ),
        (
            {
                "settings": EvaluationSettings(agreement=AgreementSettings("t", TEXT)),
                "arms": ["fp8-unit", "fp8"],
            },
            EvaluationError,
            "agreement compares other arms with 'bf16'",
        ),
        (
            {
                "settings": EvaluationSettings(
                    gsm8k=dataclasses.replace(GSM8K, samples=Path("/no/such/folder/answers"))
                )
            },
            OutputError,
            "cannot write /no/such/folder/answers: No such file",
        ),
        (
            {"settings": EvaluationSettings(gsm8k=GSM8K, expect=Expect(min_needle_recall=1.0))},
            EvaluationError,
            "min_needle_recall cannot be checked without --needle",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_runs(
    tiny_checkpoint, monkeypatch, changes, error, message
):
    monkeypatch.setattr(evaluation, "arm_opener", None)
    options = {"model": tiny_checkpoint("llama"), **changes}

    with pytest.raises(error, match=message):
        quick(options.pop("model"), **options)
