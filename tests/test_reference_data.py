"""Checks against the larger reference data: the BF16 originals of the embedded models, and the real GSM8K.

They run where FP8KV_REFERENCE_DATA names a directory with ``models/tiny-*`` and ``data/gsm8k/{train,test}.jsonl``.
"""

import os
from pathlib import Path

import pytest
import torch

from fp8kv.calibrate.formats.checkpoint import open_checkpoint
from fp8kv.calibrate.modeling.load import load_model, load_tokenizer
from fp8kv.demo import MODELS, TEST_DATA, TRAIN_DATA
from fp8kv.runtime.evaluation.agreement import measure_agreement
from fp8kv.runtime.evaluation.evaluate import EvaluationSettings, evaluate
from fp8kv.runtime.evaluation.gsm8k import build_prompts, load_problems, reference_continuation
from fp8kv.runtime.evaluation.gsm8k_eval import Gsm8kSettings, Questions
from fp8kv.runtime.evaluation.teacher_forcing import answer_logits, force

ROOT = os.environ.get("FP8KV_REFERENCE_DATA")

pytestmark = pytest.mark.skipif(
    ROOT is None, reason="FP8KV_REFERENCE_DATA names no directory with the reference data"
)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_the_embedded_fp8_model_answers_as_its_bf16_original(name):
    problems = load_problems(TEST_DATA)[:8]
    prompts = build_prompts(problems, load_problems(TRAIN_DATA))
    original = open_checkpoint(Path(ROOT) / "models" / name)
    batch = force(load_tokenizer(original), prompts, [reference_continuation(p) for p in problems])

    logits = [
        answer_logits(load_model(checkpoint, dtype=torch.float32, device="cpu"), batch)
        for checkpoint in (open_checkpoint(MODELS[name]), original)
    ]

    agreement = measure_agreement(*logits, batch.reference_tokens).summary()
    assert agreement.kl < 1e-3
    assert agreement.top1_baseline > 0.995


def test_the_real_gsm8k_file_runs_through():
    problems, shots = (
        load_problems(Path(ROOT) / "data" / "gsm8k" / f"{split}.jsonl")
        for split in ("test", "train")
    )
    assert len(problems) == 1319

    questions = Questions("gsm8k", problems, "gsm8k train", shots)
    settings = EvaluationSettings(gsm8k=Gsm8kSettings(questions, limit=2, max_new_tokens=16))
    report = evaluate(str(MODELS["tiny-minimax-m2"]), settings, arms=["bf16", "fp8-unit"])

    section = report.sections.gsm8k
    assert section.n == 2
    assert section.arms["bf16"].agreement.kl == 0
    assert 0 < section.arms["fp8-unit"].agreement.kl < 1
