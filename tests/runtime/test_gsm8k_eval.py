"""A whole evaluation of a checkpoint."""

import dataclasses
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fp8kv.demo import MODELS, TEST_DATA, TRAIN_DATA
from fp8kv.recipes.errors import CalibrationError, CheckpointError, EvaluationError
from fp8kv.runtime.eval_report import EvalReport
from fp8kv.runtime.gsm8k import PROTOCOL, load_problems
from fp8kv.runtime.gsm8k_eval import Questions, evaluate_gsm8k

MINIMAX = str(MODELS["tiny-minimax-m2"])


@pytest.fixture(scope="module")
def questions():
    problems = load_problems(TEST_DATA)
    return Questions("test.jsonl", problems, "train.jsonl", load_problems(TRAIN_DATA))


@pytest.fixture(scope="module")
def report(questions):
    """Four problems with two shots, long enough to be answered."""
    return evaluate_gsm8k(
        MINIMAX, questions, arms=["bf16", "fp8-unit"], limit=4, num_fewshot=2, device="cpu"
    )


def quick(model, questions, **keywords):
    options = {"limit": 1, "num_fewshot": 0, "max_new_tokens": 2, "device": "cpu"}
    return evaluate_gsm8k(model, questions, **{"arms": ["bf16"], **options, **keywords})


def test_reports_what_was_run(report):
    assert (report.model, report.data, report.shots) == (MINIMAX, "test.jsonl", "train.jsonl")
    assert (report.n, report.num_fewshot, report.max_new_tokens) == (4, 2, 256)
    assert report.protocol == PROTOCOL
    assert (report.device, report.dtype, report.fp8_format) == ("cpu", "float32", "e4m3fn")
    assert report.versions["torch"] == torch.__version__
    assert report.versions["transformers"] == transformers.__version__
    assert report.seconds > 0
    assert EvalReport.from_json(report.to_json()) == report


def test_the_trained_model_answers_and_the_cache_costs_nothing(report):
    assert list(report.arms) == ["bf16", "fp8-unit"]
    for arm in report.arms.values():
        assert arm.strict.value == arm.flexible.value == 1.0
    assert report.arms["bf16"].agreement.kl == 0
    assert report.arms["bf16"].agreement.nll < 0.1
    assert 0 < report.arms["fp8-unit"].agreement.kl < 1e-3
    assert list(report.comparisons) == ["fp8-unit"]
    assert report.comparisons["fp8-unit"].strict.both_right == 4


def test_the_protocol_digest_is_stable(report):
    # of these four problems, two shots each, and the stop strings with the tokenizer's own
    assert report.protocol_digest == (
        "a660ffb05e183bd95f734be68db3dcb3149334571b25e31920d4cd2ee70e78f5"
    )


def test_problems_that_are_their_own_shots_are_never_shown_solved(questions):
    problems = questions.problems[:3]
    digests = {}
    for shots_name in (None, "a copy"):
        own = Questions("test.jsonl", problems, shots_name, problems)
        result = quick(MINIMAX, own, limit=3, num_fewshot=2)
        assert result.shots == shots_name
        digests[shots_name] = result.protocol_digest

    assert digests[None] != digests["a copy"]


def test_the_scales_of_the_checkpoint_are_used(tiny_checkpoint, questions, tmp_path):
    found = {}
    for scale in (2.0**-12, 2.0**-4):
        path = tmp_path / f"model{scale}"
        shutil.copytree(tiny_checkpoint("llama"), path)
        names = [f"model.layers.{n}.self_attn.{s}_scale" for n in range(2) for s in "kv"]
        tensors = load_file(path / "model.safetensors")
        tensors |= {name: torch.tensor([scale]) for name in names}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        result = quick(str(path), short(questions), arms=["bf16", "fp8"])
        found[scale] = result.arms["fp8"].agreement.kl

    assert found[2.0**-12] > 10 * found[2.0**-4] > 0


def test_answers_are_kept_and_belong_to_their_run(questions, tmp_path):
    path = tmp_path / "answers.jsonl"
    quick(MINIMAX, questions, samples=path)
    before = path.read_bytes()
    assert len(before.splitlines()) == 1

    quick(MINIMAX, questions, samples=path)
    assert path.read_bytes() == before

    for other in ({"dtype": "bfloat16"}, {"max_new_tokens": 3}, {"fp8_format": "e5m2"}):
        with pytest.raises(EvaluationError, match="answers of another run"):
            quick(MINIMAX, questions, samples=path, **other)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"arms": ["fp9"]}, EvaluationError, "unknown arm 'fp9'; known: bf16, fp8-unit, fp8"),
        ({"arms": ["fp8"]}, EvaluationError, "carries no KV scales: convert it"),
        ({"arms": ["bf16", "bf16"]}, EvaluationError, "an arm appears twice"),
        ({"device": "cuda:99"}, CalibrationError, "'cuda:99' cannot be used here"),
        ({"model": "/nowhere/at/all"}, CheckpointError, "/nowhere/at/all does not exist"),
    ],
)
def test_what_cannot_be_run_is_refused(questions, changes, error, message):
    options = {"model": MINIMAX, **changes}

    with pytest.raises(error, match=message):
        quick(options.pop("model"), questions, **options)


def short(questions):
    """Return the questions with texts that fit into a model of 256 positions."""
    problems = [
        dataclasses.replace(problem, question=problem.question[:40], answer=problem.answer[:40])
        for problem in questions.problems[:8]
    ]
    return Questions("short", problems, None, problems)
