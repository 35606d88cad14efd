"""Measuring: run every batch of a plan through the model, interruptible, and return the statistics."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fp8kv import __version__
from fp8kv.calibrate.capture import Capture
from fp8kv.calibrate.data.loading import TokenBatch, TokenSamples, make_batches
from fp8kv.calibrate.folds import NUM_FOLDS
from fp8kv.calibrate.plan import CalibrationPlan
from fp8kv.calibrate.statistics import KVStatistics, Provenance, merge_layers
from fp8kv.calibrate.stats_file import load_extra, load_statistics, save_statistics
from fp8kv.recipes import recipe_digest
from fp8kv.recipes.errors import CalibrationError, StatisticsError

Progress = Callable[[int, int], None]
"""Called with tokens done and tokens in all."""

SNAPSHOT_SECONDS = 30.0
"""How much work an interruption can cost."""

_CPU_BATCH_TOKENS = 4096
_GPU_BATCH_TOKENS = 32768


def measure(
    plan: CalibrationPlan,
    model: nn.Module,
    samples: TokenSamples,
    *,
    pad_token_id: int,
    snapshot: Path | None = None,
    progress: Progress = lambda _done, _total: None,
) -> KVStatistics:
    """Run all samples through the model and return what its cache would hold.

    Peak memory: the model, the activations of one batch, and :class:`~fp8kv.calibrate.capture.Capture`'s counts.

    Args:
        plan: the calibration.
        model: the loaded model.
        samples: the tokens.
        pad_token_id: fills up shorter samples; never measured.
        snapshot: a file that is rewritten every :data:`SNAPSHOT_SECONDS`; where it holds a part of this very run,
            the run goes on from there. It holds the whole result at the end; delete it when that is safe.
        progress: told of every finished batch.

    Raises:
        CalibrationError: a layer recorded nothing, or NaN or infinities; or the device ran out of memory.
    """
    batches = _make_batches(plan, samples, pad_token_id)
    run = _run_digest(plan, samples, batches)
    done, before = _resume(snapshot, run)
    total = sum(batch.num_tokens for batch in batches)
    tokens_done = sum(batch.num_tokens for batch in batches[:done])
    progress(tokens_done, total)
    capture = Capture(model, plan.facts)
    saved = time.monotonic()
    for number, batch in enumerate(batches[done:], start=done + 1):
        try:
            capture.run(batch)
        except torch.OutOfMemoryError:
            raise CalibrationError(
                f"{plan.device} ran out of memory with {list(batch.token_ids.shape)} tokens in a batch: "
                "lower --batch-size or --seq-len"
            ) from None
        tokens_done += batch.num_tokens
        progress(tokens_done, total)
        if number == done + 1:
            capture.check()
        if snapshot is not None and time.monotonic() - saved > SNAPSHOT_SECONDS:
            part = _statistics(plan, samples, capture, batches[done:number], before)
            save_statistics(part, snapshot, {"run": run, "batches": number})
            saved = time.monotonic()
    if before is not None and done == len(batches):
        return before
    stats = _statistics(plan, samples, capture, batches[done:], before)
    if snapshot is not None:
        save_statistics(stats, snapshot, {"run": run, "batches": len(batches)})
    return stats


def _make_batches(
    plan: CalibrationPlan, samples: TokenSamples, pad_token_id: int
) -> list[TokenBatch]:
    batch_size = plan.recipe.calibration.batch_size
    limit = _GPU_BATCH_TOKENS if plan.device.type == "cuda" else _CPU_BATCH_TOKENS
    max_tokens = None if batch_size else max(limit, plan.recipe.data.seq_len)
    return make_batches(
        samples.samples, pad_token_id=pad_token_id, max_tokens=max_tokens, batch_size=batch_size
    )


def _statistics(
    plan: CalibrationPlan,
    samples: TokenSamples,
    capture: Capture,
    batches: Sequence[TokenBatch],
    before: KVStatistics | None,
) -> KVStatistics:
    tokens = torch.zeros(NUM_FOLDS, dtype=torch.int64)
    count = torch.zeros(NUM_FOLDS, dtype=torch.int64)
    for batch in batches:
        tokens[batch.fold] += batch.num_tokens
        count[batch.fold] += len(batch.lengths)
    stats = KVStatistics(
        provenance=Provenance(
            model=plan.checkpoint.source,
            model_digest=plan.checkpoint.digest(),
            architecture=plan.facts.architecture,
            attention=plan.facts.attention,
            dtype=str(plan.dtype).removeprefix("torch."),
            recipe_digests=(recipe_digest(plan.recipe),),
            data_digests=(samples.digest,),
            fp8kv=__version__,
        ),
        layers=capture.finish(),
        tokens=tokens,
        samples=count,
    )
    if before is None:
        return stats
    # two parts of one run share their data set on purpose, which merge() refuses
    return KVStatistics(
        provenance=stats.provenance,
        layers=merge_layers(before.layers, stats.layers),
        tokens=before.tokens + stats.tokens,
        samples=before.samples + stats.samples,
    )


def _resume(snapshot: Path | None, run: str) -> tuple[int, KVStatistics | None]:
    """Return how many batches a snapshot of this run holds, and their statistics; nothing of another run."""
    if snapshot is None or not snapshot.exists():
        return 0, None
    try:
        extra: dict[str, Any] = load_extra(snapshot)
        if extra.get("run") != run:
            return 0, None
        return int(extra["batches"]), load_statistics(snapshot)
    except (StatisticsError, KeyError, ValueError):
        return 0, None


def _run_digest(plan: CalibrationPlan, samples: TokenSamples, batches: Sequence[TokenBatch]) -> str:
    content = {
        "model": plan.checkpoint.digest(),
        "recipe": recipe_digest(plan.recipe),
        "data": samples.digest,
        "dtype": str(plan.dtype),
        "device": plan.device.type,
        "batches": [list(batch.token_ids.shape) for batch in batches],
        "fp8kv": __version__,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
