"""The arms of an evaluation: ways to hold the KV cache of one loaded model, opened one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from fp8kv.calibrate.formats.checkpoint import Checkpoint
from fp8kv.calibrate.formats.facts import model_facts
from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.cache_scales import CacheScales, read_scales
from fp8kv.runtime.generation import max_positions
from fp8kv.runtime.llm import LLM, LoadedModel
from fp8kv.runtime.paged_cache import CacheMode

BASELINE = "bf16"
ARMS = ("bf16", "fp8-unit", "fp8", "emulate")
DEFAULT_ARMS = ("bf16", "fp8-unit", "fp8")
DEFAULT_CONTEXT = 2048
_CALIBRATED = ("fp8", "emulate")

Progress = Callable[[str, int, int], None]
"""Called with a task, the number of its units just finished, and how many there are in all."""


class ArmOpener(Protocol):
    """Opens the loaded model with the cache of an arm."""

    def __call__(self, arm: str, num_pages: int | None = None) -> AbstractContextManager[LLM]:
        """Return the model with the cache of ``arm``, ``num_pages`` large, or as large as the memory allows."""
        ...


@dataclass(frozen=True)
class EngineOptions:
    """How the arms run; none of it changes what an arm is.

    Attributes:
        backend: ``reference`` or ``triton``; None takes the fastest that runs on the device.
        max_sequences: continuations that are generated at one time; None takes the engine's default.
        max_batch_tokens: tokens of a forward pass; None takes the engine's default.
        memory_fraction: of a GPU's memory that weights and cache may take together; None takes the engine's default.
    """

    backend: str | None = None
    max_sequences: int | None = None
    max_batch_tokens: int | None = None
    memory_fraction: float | None = None


def arm_opener(loaded: LoadedModel, options: EngineOptions) -> ArmOpener:
    """Return what opens ``loaded`` with the cache of an arm; one arm at a time."""
    settings: dict[str, Any] = {
        name: value for name, value in vars(options).items() if value is not None
    }

    def open_arm(arm: str, num_pages: int | None = None) -> LLM:
        sized = settings
        if num_pages is not None:
            sized = {
                name: value for name, value in settings.items() if name != "memory_fraction"
            } | {"num_pages": num_pages}
        return LLM(loaded, cache=cache_mode(arm, loaded.dtype), **sized)

    return open_arm


def cache_mode(arm: str, dtype: torch.dtype) -> CacheMode:
    """Return how the cache of ``arm`` is held under a model that computes in ``dtype``.

    The baseline loses nothing: where the model's own numbers do not fit into bfloat16 it is held in float32.
    """
    if arm == BASELINE and dtype != torch.bfloat16:
        return "float32"
    return arm  # type: ignore[return-value]  # the other arms are named as their modes


def default_context(loaded: LoadedModel) -> int:
    """Return how many tokens of a text are read at a time unless the user says otherwise."""
    limit = max_positions(loaded.model)
    return DEFAULT_CONTEXT if limit is None else min(limit, DEFAULT_CONTEXT)


def check_arms(arms: Sequence[str], checkpoint: Checkpoint) -> CacheScales | None:
    """Refuse arms that cannot run on a checkpoint; return the scales that it carries, if any.

    Raises:
        EvaluationError: an arm is unknown or named twice, there is none, or the checkpoint lacks the scales for one.
    """
    if not arms:
        raise EvaluationError(f"an evaluation needs an arm; known: {', '.join(ARMS)}")
    for arm in arms:
        if arm not in ARMS:
            raise EvaluationError(f"unknown arm {arm!r}; known: {', '.join(ARMS)}")
    if len(set(arms)) != len(arms):
        raise EvaluationError(f"an arm appears twice: {', '.join(arms)}")
    scales = read_scales(checkpoint)
    needing = [arm for arm in arms if arm in _CALIBRATED]
    if needing:
        _check_scales(scales, checkpoint, needing)
    return scales


def _check_scales(scales: CacheScales | None, checkpoint: Checkpoint, arms: Sequence[str]) -> None:
    named = " and ".join(repr(arm) for arm in arms)
    if scales is None:
        raise EvaluationError(
            f"{checkpoint.path} carries no KV scales: convert it with fp8kv calibrate, or leave out {named}"
        )
    for layer in model_facts(checkpoint).layers:
        pair = scales.find(layer.name) or (None, None)
        missing = [
            name for name, scale in zip(("k_scale", "v_scale"), pair, strict=True) if scale is None
        ]
        if missing:
            raise EvaluationError(
                f"{checkpoint.path} lacks {' and '.join(missing)} of {layer.name}: convert it anew with "
                f"fp8kv calibrate, or leave out {named}"
            )
