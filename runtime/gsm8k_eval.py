"""Evaluate a checkpoint on GSM8K-format problems: load, run every arm, report."""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from fp8kv import __version__
from fp8kv.calibrate.formats.checkpoint import Checkpoint, open_checkpoint
from fp8kv.calibrate.formats.facts import ModelFacts, model_facts
from fp8kv.calibrate.modeling.load import load_model, load_tokenizer
from fp8kv.calibrate.modeling.placement import resolve_device, resolve_dtype
from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.emulated_cache import (
    CacheMode,
    fp8_at_unit_scale,
    fp8_from_checkpoint,
    unquantised,
)
from fp8kv.runtime.eval_report import ARMS, EvalReport, compare_with_baseline
from fp8kv.runtime.evaluation import EvaluationTask, Progress, run_arms, stop_strings
from fp8kv.runtime.gsm8k import (
    MAX_NEW_TOKENS,
    NUM_FEWSHOT,
    PROTOCOL,
    Problem,
    build_prompts,
    protocol_digest,
)
from fp8kv.runtime.samples import SampleLog


@dataclass(frozen=True)
class Questions:
    """The problems of an evaluation and the pool that shots are drawn from.

    Attributes:
        name: where the problems come from, for the report.
        problems: all of them, in the order of their file.
        shots_name: where the shots come from; None where they are the problems themselves.
        shots: the pool.
    """

    name: str
    problems: Sequence[Problem]
    shots_name: str | None
    shots: Sequence[Problem]


def evaluate_gsm8k(
    model: str,
    questions: Questions,
    *,
    revision: str | None = None,
    arms: Sequence[str] = ARMS,
    limit: int | None = None,
    num_fewshot: int = NUM_FEWSHOT,
    max_new_tokens: int = MAX_NEW_TOKENS,
    batch_size: int = 32,
    device: str = "auto",
    dtype: str = "auto",
    fp8_format: str = "e4m3fn",
    samples: Path | None = None,
    trust_remote_code: bool = False,
    progress: Progress = lambda _task, _count: None,
) -> EvalReport:
    """Compare cache arms on the same questions, with lm-evaluation-harness' GSM8K protocol.

    Args:
        model: a directory or a hub id; the arm ``fp8`` reads its KV scales.
        questions: problems and shots.
        revision: of a hub id.
        arms: among ``bf16``, ``fp8-unit`` and ``fp8``; with ``bf16`` the others are compared to it.
        limit: only the first so many problems.
        num_fewshot: solved problems in front of each.
        max_new_tokens: generation limit.
        batch_size: problems per forward pass.
        device: ``auto`` or a torch device.
        dtype: ``auto``, ``bfloat16``, ``float16`` or ``float32``.
        fp8_format: of the FP8 arms.
        samples: a JSON Lines file that keeps every answer; a run that was interrupted goes on from it.
        trust_remote_code: let the checkpoint run Python code of its own.
        progress: told of every finished batch.

    Raises:
        Fp8kvError: a subclass that says what is wrong with the checkpoint, the data or the arms.
    """
    start = time.perf_counter()
    place = resolve_device(device)
    checkpoint = open_checkpoint(model, revision)
    facts = model_facts(checkpoint)
    modes = [cache_mode(arm, checkpoint, facts, fp8_format) for arm in arms]
    kind = resolve_dtype(dtype, checkpoint, place)
    problems = questions.problems[:limit]
    prompts = build_prompts(
        problems, questions.shots, num_fewshot, same_split=questions.shots_name is None
    )
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=trust_remote_code)
    stops = stop_strings(tokenizer)
    digest = protocol_digest(prompts, problems, stops=stops, max_new_tokens=max_new_tokens)
    log = None
    if samples is not None:
        log = SampleLog(samples, _run_digest(checkpoint, digest, str(kind), fp8_format))
    loaded = load_model(checkpoint, dtype=kind, device=place, trust_remote_code=trust_remote_code)
    results, scores = run_arms(
        loaded,
        tokenizer,
        facts,
        modes,
        EvaluationTask(problems, prompts, stops, max_new_tokens, batch_size),
        log=log,
        progress=progress,
    )
    return EvalReport(
        model=checkpoint.source,
        data=questions.name,
        shots=questions.shots_name,
        protocol=PROTOCOL,
        protocol_digest=digest,
        n=len(problems),
        num_fewshot=num_fewshot,
        max_new_tokens=max_new_tokens,
        device=_describe(place),
        dtype=str(kind).removeprefix("torch."),
        fp8_format=fp8_format,
        arms=results,
        comparisons=compare_with_baseline(scores),
        versions={
            "fp8kv": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        seconds=time.perf_counter() - start,
    )


def cache_mode(arm: str, checkpoint: Checkpoint, facts: ModelFacts, fp8_format: str) -> CacheMode:
    """Return the cache of the arm called ``arm``.

    Raises:
        EvaluationError: the arm is unknown, or is ``fp8`` and the checkpoint lacks scales.
    """
    if arm == "bf16":
        return unquantised()
    if arm == "fp8-unit":
        return fp8_at_unit_scale(fp8_format)
    if arm == "fp8":
        return fp8_from_checkpoint(checkpoint, facts, fp8_format)
    raise EvaluationError(f"unknown arm {arm!r}; known: {', '.join(ARMS)}")


def _run_digest(checkpoint: Checkpoint, protocol: str, dtype: str, fp8_format: str) -> str:
    content = [checkpoint.digest(), protocol, dtype, fp8_format, torch.__version__]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)})"
