"""Evaluate a checkpoint under several caches: load once, run every arm on the same prompts, report."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from fp8kv import __version__
from fp8kv.calibrate.formats.checkpoint import Checkpoint, open_checkpoint
from fp8kv.recipes import Expect
from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.architectures import check_supported
from fp8kv.runtime.backends import choose_backend
from fp8kv.runtime.cache_scales import CacheScales
from fp8kv.runtime.evaluation.agreement_eval import AgreementMeasurement, AgreementSettings
from fp8kv.runtime.evaluation.arms import (
    BASELINE,
    DEFAULT_ARMS,
    EngineOptions,
    Progress,
    arm_opener,
    cache_mode,
    check_arms,
)
from fp8kv.runtime.evaluation.eval_report import ArmRun, EvalReport, Sections
from fp8kv.runtime.evaluation.expectations import check_askable, check_expectations
from fp8kv.runtime.evaluation.gsm8k_eval import Gsm8kMeasurement, Gsm8kSettings
from fp8kv.runtime.evaluation.lm_eval_adapter import check_tasks
from fp8kv.runtime.evaluation.needle_eval import NeedleMeasurement, NeedleSettings
from fp8kv.runtime.evaluation.perplexity_eval import PerplexityMeasurement, PerplexitySettings
from fp8kv.runtime.evaluation.samples import check_writable
from fp8kv.runtime.evaluation.tasks_eval import TasksMeasurement, TasksSettings
from fp8kv.runtime.llm import LoadedModel, load
from fp8kv.runtime.paged_cache import bytes_per_token, measure_dims

_ARM_BY_ARM = ("gsm8k", "perplexity", "needle", "tasks")
"""What an arm is asked on its own, in this order."""

_SIDE_BY_SIDE = ("gsm8k", "agreement")
"""What compares the arms' logits: the same tokens under one arm after the other, over and over."""


@dataclass(frozen=True)
class EvaluationSettings:
    """What to measure; each of them may be left out.

    Attributes:
        gsm8k: exact match on word problems, and agreement on their reference answers.
        perplexity: of a text.
        agreement: with the baseline on a text, by position.
        needle: retrieval from long contexts.
        tasks: of lm-evaluation-harness.
        expect: what to hold the results to; None holds them to nothing.
    """

    gsm8k: Gsm8kSettings | None = None
    perplexity: PerplexitySettings | None = None
    agreement: AgreementSettings | None = None
    needle: NeedleSettings | None = None
    tasks: TasksSettings | None = None
    expect: Expect | None = None

    def asked(self) -> list[str]:
        """Return the names of what is to be measured."""
        return [name for name, one in vars(self).items() if one is not None and name != "expect"]


def evaluate(
    model: str,
    settings: EvaluationSettings,
    *,
    revision: str | None = None,
    arms: Sequence[str] = DEFAULT_ARMS,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    options: EngineOptions = EngineOptions(),  # noqa: B008  it is frozen
    progress: Progress = lambda _task, _count, _total: None,
) -> EvalReport:
    """Run every measurement under every arm.

    The weights are loaded once. An arm runs all that concerns it alone, then gives its cache back; what compares the
    arms' logits runs after that.

    Args:
        model: a directory or a hub id; the arms ``fp8`` and ``emulate`` read its KV scales.
        settings: what to measure.
        revision: of a hub id.
        arms: among ``bf16``, ``fp8-unit``, ``fp8`` and ``emulate``; with ``bf16`` the others are compared to it.
        device: ``auto`` or a torch device.
        dtype: ``auto``, ``bfloat16``, ``float16`` or ``float32``.
        trust_remote_code: let the checkpoint run Python code of its own.
        options: of the engine.
        progress: told of all that is done.

    Raises:
        Fp8kvError: a subclass that says what is wrong with the checkpoint, the data, the arms or the settings.
    """
    start = time.perf_counter()
    _check(settings, arms)
    scales = check_arms(arms, open_checkpoint(model, revision))
    loaded = load(
        model,
        revision=revision,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        progress=_told_of_steps(progress, "loading weights"),
    )
    measurements = _measurements(settings, loaded, scales, options, progress)
    open_arm = arm_opener(loaded, options)
    dims = measure_dims(loaded.model, check_supported(loaded.model))
    runs = {}
    for arm in arms:
        begun = time.perf_counter()
        with open_arm(arm) as llm:
            for name in _ARM_BY_ARM:
                if name in measurements:
                    measurements[name].run(arm, llm)
        size = bytes_per_token(dims, cache_mode(arm, loaded.dtype))
        runs[arm] = ArmRun(size, time.perf_counter() - begun)
    for name in _SIDE_BY_SIDE:
        if name in measurements:
            measurements[name].compare(open_arm, arms)
    sections = Sections(**{name: one.result() for name, one in measurements.items()})
    return EvalReport(
        model=_checkpoint(loaded).source,
        device=_describe(loaded.device),
        backend=choose_backend(options.backend, loaded.device).name,
        dtype=str(loaded.dtype).removeprefix("torch."),
        fp8_format="e4m3fn" if scales is None else scales.fp8_format,
        arms=runs,
        sections=sections,
        expectations=check_expectations(sections, settings.expect) if settings.expect else (),
        versions={
            "fp8kv": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        seconds=time.perf_counter() - start,
    )


def _told_of_steps(progress: Progress, task: str) -> Callable[[int, int], None]:
    """Return what is told how much is done in all, and tells ``progress`` of each step."""
    told = 0

    def tell(done: int, total: int) -> None:
        nonlocal told
        progress(task, done - told, total)
        told = done

    return tell


def _check(settings: EvaluationSettings, arms: Sequence[str]) -> None:
    asked = settings.asked()
    if not asked:
        raise EvaluationError("there is nothing to measure: name at least one measurement")
    if settings.agreement is not None and (BASELINE not in arms or len(arms) < 2):
        raise EvaluationError(
            f"agreement compares other arms with {BASELINE!r}: name it and at least one more"
        )
    if settings.tasks is not None:
        check_tasks(settings.tasks.tasks)
    if settings.expect is not None:
        check_askable(settings.expect, arms, asked)
    if settings.gsm8k is not None and settings.gsm8k.samples is not None:
        check_writable(settings.gsm8k.samples)


def _measurements(
    settings: EvaluationSettings,
    loaded: LoadedModel,
    scales: CacheScales | None,
    options: EngineOptions,
    progress: Progress,
) -> dict[str, Any]:
    """Return what was asked for, by section, its prompts built."""
    made: dict[str, Any] = {}
    if settings.gsm8k is not None:
        # a checkpoint's digest does not cover what its tensors hold, and scales may have been chosen anew
        run = (
            _checkpoint(loaded).digest(),
            repr(_scale_values(scales)),
            str(loaded.dtype),
            str(options.backend),
            torch.__version__,
        )
        made["gsm8k"] = Gsm8kMeasurement(settings.gsm8k, loaded, run, progress)
    if settings.perplexity is not None:
        made["perplexity"] = PerplexityMeasurement(settings.perplexity, loaded, progress)
    if settings.agreement is not None:
        made["agreement"] = AgreementMeasurement(settings.agreement, loaded, progress)
    if settings.needle is not None:
        made["needle"] = NeedleMeasurement(settings.needle, loaded, progress)
    if settings.tasks is not None:
        made["tasks"] = TasksMeasurement(settings.tasks, progress)
    return made


def _scale_values(scales: CacheScales | None) -> list[Any]:
    if scales is None:
        return []
    layers = [
        (name, [None if scale is None else scale.tolist() for scale in pair])
        for name, pair in sorted(scales.layers.items())
    ]
    return [scales.fp8_format, *layers]


def _checkpoint(loaded: LoadedModel) -> Checkpoint:
    if loaded.checkpoint is None:
        raise ValueError("the model was not loaded from a checkpoint")
    return loaded.checkpoint


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)})"
