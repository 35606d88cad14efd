"""The pipeline: the only module that knows all stages of a calibration, in order."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from fp8kv.calibrate.data.loading import TokenSamples, load_samples
from fp8kv.calibrate.data.sources import Source
from fp8kv.calibrate.derive import derive_scales
from fp8kv.calibrate.formats.checkpoint import Checkpoint, open_checkpoint
from fp8kv.calibrate.formats.facts import model_facts
from fp8kv.calibrate.formats.targets import TargetEffect
from fp8kv.calibrate.measure import measure
from fp8kv.calibrate.modeling.load import load_model, load_tokenizer, pad_token_id
from fp8kv.calibrate.overlay.linking import LinkMode
from fp8kv.calibrate.overlay.plan import plan_overlay
from fp8kv.calibrate.overlay.writer import check_output, write_overlay
from fp8kv.calibrate.plan import CalibrationPlan, plan_calibration
from fp8kv.calibrate.scales import ScaleSet
from fp8kv.calibrate.statistics import KVStatistics
from fp8kv.calibrate.stats_file import FILE_NAME, encode_statistics
from fp8kv.calibrate.verdicts import ConvergencePoint, StreamVerdict, convergence, judge
from fp8kv.recipes import Recipe, default_recipe, recipe_to_yaml
from fp8kv.recipes.errors import OutputError, StatisticsError
from fp8kv.recipes.schema import Scales

RECIPE_FILE = "recipe.yaml"
RESULT_FILE = "calibration.json"


class Listener(Protocol):
    """Is told how a calibration goes on."""

    def stage(self, name: str) -> None:
        """Say that a stage begins: ``data``, ``load``, ``measure``, ``write``."""

    def advance(self, done: int, total: int) -> None:
        """Say how far the running stage is, in samples or tokens."""


@dataclass(frozen=True)
class CalibrationResult:
    """What a calibration found and wrote.

    Attributes:
        out: the directory that was written.
        stats: the statistics.
        scales: the chosen scales.
        verdicts: per layer and stream.
        curve: convergence.
        effects: what each target does with the result; empty where only statistics were written.
        samples: the data.
        seconds: wall time of the whole.
    """

    out: Path
    stats: KVStatistics
    scales: ScaleSet
    verdicts: list[StreamVerdict]
    curve: list[ConvergencePoint]
    effects: tuple[TargetEffect, ...]
    samples: TokenSamples
    seconds: float


class _Silent:
    def stage(self, name: str) -> None: ...

    def advance(self, done: int, total: int) -> None: ...


def calibrate(
    model: str,
    out: str | Path,
    *,
    recipe: Recipe | None = None,
    revision: str | None = None,
    device: str = "auto",
    stats_only: bool = False,
    link: LinkMode = "auto",
    trust_remote_code: bool = False,
    builtin_datasets: Mapping[str, Path] | None = None,
    listener: Listener | None = None,
) -> CalibrationResult:
    """Measure a checkpoint's KV cache, choose scales, and write a checkpoint that the engines load.

    Interrupted at any point it leaves no output; run again with the same arguments it goes on from its last
    snapshot, which lies beside ``out``.

    Args:
        model: a directory or a hub id.
        out: the directory to make; it must not exist.
        recipe: what to calibrate on and how; the default recipe otherwise.
        revision: of a hub id.
        device: ``auto`` or a torch device.
        stats_only: write the statistics and the recipe, no checkpoint.
        link: how the weights get into the output: ``auto``, ``hard``, ``reflink``, ``symlink`` or ``copy``.
        trust_remote_code: let the checkpoint run Python code of its own.
        builtin_datasets: files behind dataset names such as ``builtin:gsm-synth``.
        listener: is told of the progress.

    Raises:
        Fp8kvError: a subclass that says what is wrong with the checkpoint, the data, the recipe or the output.
    """
    start = time.perf_counter()
    out = Path(out)
    listener = listener or _Silent()
    plan = plan_calibration(model, recipe or default_recipe(), revision=revision, device=device)
    check_output(plan.checkpoint.path, out)
    stats, samples = _measure(
        plan, _snapshot(out), trust_remote_code, builtin_datasets or {}, listener
    )
    listener.stage("write")
    scales = derive_scales(stats, plan.recipe.scales)
    verdicts = judge(stats, scales)
    curve = convergence(stats, plan.recipe.scales)
    extra = side_files(plan.recipe, stats, scales, verdicts, curve)
    effects: tuple[TargetEffect, ...] = ()
    if stats_only:
        _write_side_files(out, extra)
    else:
        overlay = plan_overlay(
            plan.checkpoint,
            plan.facts,
            scales,
            plan.recipe.output.targets,
            extra,
            estimator=plan.recipe.scales.estimator,
        )
        write_overlay(overlay, out, link=link)
        effects = overlay.effects
    _snapshot(out).unlink(missing_ok=True)
    return CalibrationResult(
        out=out,
        stats=stats,
        scales=scales,
        verdicts=verdicts,
        curve=curve,
        effects=effects,
        samples=samples,
        seconds=time.perf_counter() - start,
    )


def write_from_statistics(
    stats: KVStatistics,
    options: Scales,
    *,
    model: str,
    out: Path,
    targets: Sequence[str],
    recipe: Recipe,
    revision: str | None = None,
    link: LinkMode = "auto",
) -> tuple[TargetEffect, ...]:
    """Write a checkpoint with scales derived from statistics that were measured earlier; no GPU, no model run.

    Raises:
        StatisticsError: the statistics were measured on another checkpoint.
        Fp8kvError: as :func:`calibrate`.
    """
    checkpoint = open_checkpoint(model, revision)
    _check_same_model(stats, checkpoint)
    check_output(checkpoint.path, out)
    scales = derive_scales(stats, options)
    extra = side_files(recipe, stats, scales, judge(stats, scales), convergence(stats, options))
    overlay = plan_overlay(
        checkpoint, model_facts(checkpoint), scales, targets, extra, estimator=options.estimator
    )
    write_overlay(overlay, out, link=link)
    return overlay.effects


def side_files(
    recipe: Recipe,
    stats: KVStatistics,
    scales: ScaleSet,
    verdicts: Sequence[StreamVerdict],
    curve: Sequence[ConvergencePoint],
) -> dict[str, bytes]:
    """Return what lies in the output's folder ``fp8kv`` beside the manifest, by name."""
    return {
        FILE_NAME: encode_statistics(stats),
        RECIPE_FILE: recipe_to_yaml(recipe).encode(),
        RESULT_FILE: (json.dumps(result_json(scales, verdicts, curve), indent=2) + "\n").encode(),
    }


def result_json(
    scales: ScaleSet, verdicts: Sequence[StreamVerdict], curve: Sequence[ConvergencePoint]
) -> dict[str, Any]:
    """Return scales, verdicts and convergence in a JSON-serialisable form."""
    return {
        "schema": 1,
        "scales": scales.to_json(),
        "verdicts": [verdict.to_json() for verdict in verdicts],
        "convergence": [asdict(point) for point in curve],
    }


def _measure(
    plan: CalibrationPlan,
    snapshot: Path,
    trust_remote_code: bool,
    builtin_datasets: Mapping[str, Path],
    listener: Listener,
) -> tuple[KVStatistics, TokenSamples]:
    listener.stage("data")
    tokenizer = load_tokenizer(plan.checkpoint, trust_remote_code=trust_remote_code)
    data = plan.recipe.data
    samples = load_samples(
        [
            Source(
                str(builtin_datasets.get(source.dataset, source.dataset)),
                config=source.config,
                split=source.split,
                column=source.column,
                weight=source.weight,
            )
            for source in data.sources
        ],
        tokenizer,
        num_samples=data.num_samples,
        seq_len=data.seq_len,
        seed=data.seed,
        chat_template=data.chat_template,
        progress=listener.advance,
    )
    listener.stage("load")
    model = load_model(
        plan.checkpoint,
        dtype=plan.dtype,
        device=plan.device,
        trust_remote_code=trust_remote_code,
        progress=listener.advance,
    )
    listener.stage("measure")
    stats = measure(
        plan,
        model,
        samples,
        pad_token_id=pad_token_id(tokenizer),
        snapshot=snapshot,
        progress=listener.advance,
    )
    return stats, samples


def _snapshot(out: Path) -> Path:
    return out.with_name(f".{out.name}.fp8kv-progress.safetensors")


def _write_side_files(out: Path, files: dict[str, bytes]) -> None:
    partial = out.with_name(f".{out.name}.fp8kv-statistics")
    try:
        # what a killed run left
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, content in files.items():
            (partial / name).write_bytes(content)
        partial.rename(out)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OutputError(f"cannot write {out}: {error.strerror or error}") from error


def _check_same_model(stats: KVStatistics, checkpoint: Checkpoint) -> None:
    if stats.provenance.model_digest != checkpoint.digest():
        raise StatisticsError(
            f"the statistics were measured on {stats.provenance.model}, and {checkpoint.path} is not that "
            "checkpoint (config, shards or sizes differ)"
        )
