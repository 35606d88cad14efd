"""An emulated FP8 cache: the unmodified model, with what enters its cache quantised and dequantised.

Attention then reads exactly the numbers that an FP8 cache would give back, while its own arithmetic stays as it
was. So what changes in the output is the quantisation and nothing else.

Scales are studied on it, and the paged cache is tested against it: the two have no code in common but the encoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fp8kv.calibrate.formats.facts import ModelFacts
from fp8kv.calibrate.modeling.layers import match_layers
from fp8kv.calibrate.modeling.tap import AttentionModule, CacheWrite, find_attention_modules, tap
from fp8kv.calibrate.scales import ScaleSet
from fp8kv.kernels.fp8 import Fp8Format, get_format, quantize_dequantize
from fp8kv.recipes.errors import EvaluationError


@dataclass(frozen=True)
class CacheMode:
    """One way to hold the cache.

    Attributes:
        name: name of the arm in reports, e.g. ``fp8``.
        fmt: the FP8 format, or None for the unquantised cache.
        scales: per layer (checkpoint-side name) the K and the V scale, float32 ``[1]`` or ``[heads]``; a layer that
            is absent is stored at 1.0. Ignored without a format.
    """

    name: str
    fmt: Fp8Format | None
    scales: Mapping[str, tuple[Tensor, Tensor]]


def unquantised() -> CacheMode:
    """Return the baseline: the cache in the model's own dtype."""
    return CacheMode("bf16", None, {})


def fp8_at_unit_scale(fp8_format: str = "e4m3fn") -> CacheMode:
    """Return an FP8 cache at scale 1.0 for every layer: what an engine does without scales."""
    return CacheMode("fp8-unit", get_format(fp8_format), {})


def fp8_with_scales(scales: ScaleSet, name: str = "fp8") -> CacheMode:
    """Return an FP8 cache at the given scales."""
    return CacheMode(
        name,
        get_format(scales.fp8_format),
        {layer.name: (torch.tensor(layer.k), torch.tensor(layer.v)) for layer in scales.layers},
    )


@contextmanager
def emulated_cache(model: nn.Module, facts: ModelFacts, mode: CacheMode) -> Iterator[None]:
    """Let ``model`` read its cache as ``mode`` would hold it, while the context is open.

    Raises:
        EvaluationError: a per-head scale has another number of heads than the cache.
    """
    if mode.fmt is None:
        yield
        return
    modules = find_attention_modules(model)
    layers = match_layers(modules, facts)
    device = next(model.parameters()).device
    unit = torch.ones(1)
    scales = {
        name: tuple(
            scale.to(device=device, dtype=torch.float32).view(-1, 1, 1)
            for scale in mode.scales.get(layer, (unit, unit))
        )
        for name, layer in layers.items()
    }
    fmt = mode.fmt

    def edit(write: CacheWrite) -> tuple[Tensor, Tensor]:
        k_scale, v_scale = scales[write.attention.name]
        # an MLA row is latent and rope part under one scale; K's is the row's
        second = k_scale if write.attention.attention == "mla" else v_scale
        _check_heads(write.attention, write.keys, k_scale)
        return (
            quantize_dequantize(write.keys, k_scale, fmt),
            quantize_dequantize(write.values, second, fmt),
        )

    with tap(modules, edit):
        yield


def _check_heads(attention: AttentionModule, keys: Tensor, scale: Tensor) -> None:
    if scale.shape[0] not in (1, keys.shape[1]):
        raise EvaluationError(
            f"{attention.name} caches {keys.shape[1]} heads, but its k_scale has {scale.shape[0]} values"
        )
