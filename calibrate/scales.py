"""The scale schema: what calibration chooses, what is written, and what the runtime reads.

Convention: ``x ~= float(code) * scale`` (see :mod:`fp8kv.kernels.fp8`). One scale per layer for K and one for V,
or one per KV head. A multi-head latent attention (MLA) layer caches one row of which V is a view, so it has
one scale: its ``k`` and ``v`` are equal by construction, and anything else is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fp8kv.kernels.fp8 import FORMATS
from fp8kv.recipes.errors import ScaleError

Attention = Literal["gqa", "mla"]
Granularity = Literal["tensor", "head"]


@dataclass(frozen=True)
class LayerScales:
    """The scales of one attention layer.

    Attributes:
        index: the layer's number in the model, transformers' ``layer_idx``.
        name: checkpoint-side name of the attention module, e.g. ``model.layers.0.self_attn``.
        k: the K scale, or one per KV head.
        v: the V scale, or one per KV head. Equal to ``k`` for MLA.
    """

    index: int
    name: str
    k: tuple[float, ...]
    v: tuple[float, ...]


@dataclass(frozen=True)
class ScaleSet:
    """The scales of a whole model.

    Attributes:
        attention: ``gqa`` or ``mla``, from the architecture.
        fp8_format: a key of :data:`fp8kv.kernels.fp8.FORMATS`.
        granularity: ``tensor`` (one value per layer and stream) or ``head``.
        layers: every layer that owns a KV cache, in model order.

    Raises:
        ScaleError: a scale is not finite, not positive or not bfloat16-representable; a layer appears twice or
            has the wrong number of values; or an MLA layer's K and V scales differ.
    """

    attention: Attention
    fp8_format: str
    granularity: Granularity
    layers: tuple[LayerScales, ...]

    def __post_init__(self) -> None:
        if self.attention not in ("gqa", "mla"):
            raise ScaleError(f"attention must be 'gqa' or 'mla', not {self.attention!r}")
        if self.granularity not in ("tensor", "head"):
            raise ScaleError(f"granularity must be 'tensor' or 'head', not {self.granularity!r}")
        if self.fp8_format not in FORMATS:
            raise ScaleError(f"unknown FP8 format {self.fp8_format!r}; known: {', '.join(FORMATS)}")
        if self.attention == "mla" and self.granularity == "head":
            raise ScaleError("an MLA layer caches one latent row: use granularity 'tensor'")
        names = [layer.name for layer in self.layers]
        for name in names:
            if names.count(name) > 1:
                raise ScaleError(f"layer {name} appears {names.count(name)} times in the scale set")
        for layer in self.layers:
            _check_layer(layer, self)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-serialisable form; :meth:`from_json` is its inverse."""
        return {
            "attention": self.attention,
            "fp8_format": self.fp8_format,
            "granularity": self.granularity,
            "layers": [
                {"index": layer.index, "name": layer.name, "k": list(layer.k), "v": list(layer.v)}
                for layer in self.layers
            ],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ScaleSet:
        """Build a scale set from :meth:`to_json`'s form.

        Raises:
            ScaleError: a key is missing, or the content breaks the schema.
        """
        try:
            layers = tuple(
                LayerScales(
                    index=int(layer["index"]),
                    name=str(layer["name"]),
                    k=tuple(float(value) for value in layer["k"]),
                    v=tuple(float(value) for value in layer["v"]),
                )
                for layer in data["layers"]
            )
            return cls(data["attention"], data["fp8_format"], data["granularity"], layers)
        except (KeyError, TypeError, ValueError) as error:
            raise ScaleError(f"malformed scale set: {error!r}") from None


def is_bfloat16_representable(value: float) -> bool:
    """Tell whether ``value`` survives a round trip through bfloat16."""
    return torch.tensor(value, dtype=torch.float64).to(torch.bfloat16).item() == value


def _check_layer(layer: LayerScales, scales: ScaleSet) -> None:
    for stream, values in (("k", layer.k), ("v", layer.v)):
        where = f"{stream}_scale of {layer.name}"
        if not values:
            raise ScaleError(f"{where} is missing: a layer needs both scales or is left out whole")
        if scales.granularity == "tensor" and len(values) != 1:
            raise ScaleError(f"{where} has {len(values)} values where granularity 'tensor' has one")
        for value in values:
            if not math.isfinite(value) or value <= 0:
                raise ScaleError(f"{where} is {value}; a scale is positive and finite")
            if not is_bfloat16_representable(value):
                raise ScaleError(
                    f"{where} is {value}, which bfloat16 cannot hold; round it up first, "
                    "otherwise engines read different values"
                )
    if len(layer.k) != len(layer.v):
        raise ScaleError(f"{layer.name} has {len(layer.k)} K scales and {len(layer.v)} V scales")
    if scales.attention == "mla" and layer.k != layer.v:
        raise ScaleError(
            f"{layer.name} is an MLA layer, whose V is a view of its K row, but its scales differ: "
            f"k_scale {layer.k[0]}, v_scale {layer.v[0]}"
        )
