"""The plan of a calibration: everything that can be known, and refused, before any weight is read."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fp8kv.calibrate.formats.checkpoint import Checkpoint, open_checkpoint
from fp8kv.calibrate.formats.facts import ModelFacts, model_facts, text_config
from fp8kv.calibrate.formats.targets import TargetEffect
from fp8kv.calibrate.modeling.placement import resolve_device, resolve_dtype
from fp8kv.calibrate.overlay.plan import plan_overlay
from fp8kv.calibrate.scales import LayerScales, ScaleSet
from fp8kv.recipes import Recipe, check_model
from fp8kv.recipes.errors import RecipeError, UnsupportedModelError


@dataclass(frozen=True)
class CalibrationPlan:
    """What a calibration will do.

    Attributes:
        checkpoint: the source.
        facts: its facts.
        recipe: the resolved recipe.
        device: where the forward passes run.
        dtype: their dtype.
        effects: what each target will do with the result.
        weight_bytes: bytes of weights to read.
        scale_tensors: tensors that will be added.
        written_bytes: bytes of the added scale file.
        active_parameters: parameters that one token meets.
    """

    checkpoint: Checkpoint
    facts: ModelFacts
    recipe: Recipe
    device: torch.device
    dtype: torch.dtype
    effects: tuple[TargetEffect, ...]
    weight_bytes: int
    scale_tensors: int
    written_bytes: int
    active_parameters: int

    @property
    def most_tokens(self) -> int:
        """Tokens to run at most: every sample at full length."""
        return self.recipe.data.num_samples * self.recipe.data.seq_len

    def to_json(self, seconds: float | None = None) -> dict[str, Any]:
        """Return a JSON-serialisable form.

        Args:
            seconds: an estimate of the forward passes, from :func:`estimate_seconds`.
        """
        return {
            "model": self.checkpoint.source,
            "architecture": self.facts.architecture,
            "attention": self.facts.attention,
            "streams": ["LATENT", "ROPE"] if self.facts.attention == "mla" else ["K", "V"],
            "layers": len(self.facts.layers),
            "base": self.facts.quant_method or "unquantised",
            "device": str(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "recipe": self.recipe.name,
            "samples": self.recipe.data.num_samples,
            "seq_len": self.recipe.data.seq_len,
            "tokens_at_most": self.most_tokens,
            "weight_bytes_read": self.weight_bytes,
            "scale_tensors": self.scale_tensors,
            "bytes_written": self.written_bytes,
            "estimated_forward_seconds": seconds,
            "targets": [asdict(effect) for effect in self.effects],
        }


def plan_calibration(
    model: str, recipe: Recipe, *, revision: str | None = None, device: str = "auto"
) -> CalibrationPlan:
    """Open the checkpoint and check everything that does not need its weights.

    Args:
        model: a directory or a hub id.
        recipe: the resolved recipe.
        revision: of a hub id.
        device: ``auto`` (a GPU where there is one), or a torch device.

    Raises:
        CheckpointError: the checkpoint is missing, damaged or unsafe.
        UnsupportedModelError: its architecture or base cannot carry static scales.
        RecipeError: the recipe is for another model.
        OutputError: the targets contradict each other, or the checkpoint already carries scales.
        ScaleError: format or granularity does not suit a target.
        CalibrationError: the device does not exist here.
    """
    chosen = resolve_device(device)
    checkpoint = open_checkpoint(model, revision)
    facts = model_facts(checkpoint)
    if not facts.static_scales:
        raise UnsupportedModelError(f"{facts.architecture} needs no calibration: {facts.reason}")
    check_model(recipe, checkpoint.config)
    if recipe.model.attention not in (None, facts.attention):
        raise RecipeError(
            f"recipe {recipe.name} is for {recipe.model.attention} attention, but {facts.architecture} is "
            f"{facts.attention}: choose another recipe"
        )
    overlay = plan_overlay(
        checkpoint, facts, _placeholder_scales(facts, recipe), recipe.output.targets
    )
    return CalibrationPlan(
        checkpoint=checkpoint,
        facts=facts,
        recipe=recipe,
        device=chosen,
        dtype=resolve_dtype(recipe.calibration.dtype, checkpoint, chosen),
        effects=overlay.effects,
        weight_bytes=sum(
            entry.end - entry.start
            for shard in checkpoint.shards.values()
            for entry in shard.tensors.values()
        ),
        scale_tensors=len(overlay.tensors),
        written_bytes=sum(t.numel() * t.element_size() for t in overlay.tensors.values()),
        active_parameters=_active_parameters(checkpoint),
    )


def estimate_seconds(plan: CalibrationPlan) -> float:
    """Estimate the forward passes from a short matrix multiplication on the plan's device.

    Two floating-point operations per active parameter and token, at the rate just measured: a lower bound, for
    attention and memory traffic come on top.
    """
    size = 4096 if plan.device.type == "cuda" else 1024
    left = torch.randn(size, size, device=plan.device, dtype=plan.dtype)
    rounds = 0
    _multiply(left)
    start = time.perf_counter()
    while time.perf_counter() - start < 0.2:
        _multiply(left)
        rounds += 1
    rate = rounds * 2 * size**3 / (time.perf_counter() - start)
    return 2 * plan.active_parameters * plan.most_tokens / rate


def _multiply(left: torch.Tensor) -> None:
    # reading one element waits for the device
    (left @ left)[0, 0].item()


def _placeholder_scales(facts: ModelFacts, recipe: Recipe) -> ScaleSet:
    heads = 1
    if recipe.scales.granularity == "head" and facts.attention == "gqa":
        heads = facts.num_kv_heads or 1
    unit = (1.0,) * heads
    return ScaleSet(
        attention=facts.attention,
        fp8_format=recipe.scales.fp8_format,
        granularity=recipe.scales.granularity,
        layers=tuple(LayerScales(layer.index, layer.name, unit, unit) for layer in facts.layers),
    )


def _active_parameters(checkpoint: Checkpoint) -> int:
    config = text_config(checkpoint.config)
    share = _expert_share(config)
    total = 0.0
    for shard in checkpoint.shards.values():
        for name, entry in shard.tensors.items():
            if "embed" in name or "scale" in name:
                continue
            # eight 4-bit weights lie in one 32-bit word
            packed = 8 if entry.dtype == "I32" else 1
            total += math.prod(entry.shape) * packed * (share if ".experts." in name else 1)
    return int(total)


def _expert_share(config: Mapping[str, Any]) -> float:
    chosen = config.get("num_experts_per_tok")
    experts = next(
        (
            config[key]
            for key in ("n_routed_experts", "num_local_experts", "num_experts")
            if config.get(key)
        ),
        None,
    )
    return chosen / experts if chosen and experts else 1.0
