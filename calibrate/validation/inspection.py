"""List the KV scales of any checkpoint, and flag what looks wrong about them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fp8kv.calibrate.formats.checkpoint import Checkpoint
from fp8kv.calibrate.formats.facts import ModelFacts, model_facts
from fp8kv.calibrate.formats.kv_names import FoundScale, find_kv_scales
from fp8kv.recipes.errors import UnsupportedModelError

LARGEST_SCALE = 64.0
"""Above it a layer would hold values over 64 * 448 = 28672: no trained model is known to."""

SMALLEST_SCALE = 2.0**-20
"""Below it a layer would hold nothing over 448 * 2**-20 = 0.0004."""

FLAGS: Mapping[str, str] = {
    "no-scales": "the checkpoint has no KV scales: an FP8 cache runs at scale 1.0",
    "missing-layers": "layers that own a KV cache have no scale",
    "missing": "this layer owns a KV cache and has no scale",
    "all-zero": "every scale is 0: exported without calibration",
    "all-one": "every scale is 1: the same as no calibration",
    "identical": "all layers have the same scales: hardly measured",
    "k-only": "a K scale without a V scale; engines disagree on V's then",
    "v-only": "a V scale without a K scale; some engines stop at that",
    "k-unlike-v": "an MLA layer has one row for K and V, but two different scales",
    "out-of-range": "a scale is not finite, not positive, above 64 or below 2**-20",
    "deprecated-kv-scale": "one kv_scale for both streams: engines use it for K alone, or not at all",
    "aliases-differ": "two names of the same scale hold different values",
    "unknown-architecture": "fp8kv does not know which layers own a cache, so none is missed",
}
"""Every flag and what it means."""


@dataclass(frozen=True)
class LayerRow:
    """The scales of one layer.

    Attributes:
        layer: prefix of the attention module.
        style: how the scales are spelled, as in :mod:`fp8kv.calibrate.formats.kv_names`; several are joined by ``, ``.
        k: smallest and largest K scale, equal if there is one; None if there is none.
        v: likewise for V.
        flags: keys of :data:`FLAGS`.
    """

    layer: str
    style: str
    k: tuple[float, float] | None
    v: tuple[float, float] | None
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """The scales of a checkpoint.

    Attributes:
        attention: ``gqa`` or ``mla``, None if the architecture is unknown.
        rows: one per layer that has scales or should have.
        flags: keys of :data:`FLAGS` that concern the checkpoint as a whole.
    """

    attention: str | None
    rows: tuple[LayerRow, ...]
    flags: tuple[str, ...]

    @property
    def suspicious(self) -> bool:
        """Whether anything was flagged."""
        return bool(self.flags) or any(row.flags for row in self.rows)


def inspect(checkpoint: Checkpoint) -> Inspection:
    """Return all KV scales of ``checkpoint``, whoever wrote them, with what is suspicious about them.

    Raises:
        CheckpointError: config or tensors cannot be read. An unknown architecture is flagged instead.
    """
    flags: list[str] = []
    facts: ModelFacts | None = None
    try:
        facts = model_facts(checkpoint)
    except UnsupportedModelError:
        flags.append("unknown-architecture")
    found = find_kv_scales(checkpoint)
    expected = [layer.name for layer in facts.layers] if facts else []
    attention = facts.attention if facts else None
    by_layer: dict[str, list[FoundScale]] = {layer: [] for layer in expected}
    for scale in found:
        by_layer.setdefault(scale.layer, []).append(scale)
    rows = (
        tuple(_row(layer, scales, attention) for layer, scales in by_layer.items()) if found else ()
    )
    return Inspection(attention, rows, tuple(flags + _whole(found, rows)))


def _row(layer: str, scales: Sequence[FoundScale], attention: str | None) -> LayerRow:
    k = _range([scale for scale in scales if "k" in scale.stream])
    v = _range([scale for scale in scales if "v" in scale.stream])
    flags = []
    if not scales:
        flags.append("missing")
    elif v is None:
        flags.append("k-only")
    elif k is None:
        flags.append("v-only")
    if any(scale.stream == "kv" for scale in scales):
        flags.append("deprecated-kv-scale")
    if attention == "mla" and k is not None and v is not None and k != v:
        flags.append("k-unlike-v")
    if any(not _in_range(value) for scale in scales for value in scale.value.tolist()):
        flags.append("out-of-range")
    if _aliases_differ(scales):
        flags.append("aliases-differ")
    style = ", ".join(dict.fromkeys(scale.style for scale in scales))
    return LayerRow(layer, style, k, v, tuple(flags))


def _whole(found: Sequence[FoundScale], rows: Sequence[LayerRow]) -> list[str]:
    if not found:
        return ["no-scales"]
    flags = []
    if any("missing" in row.flags for row in rows):
        flags.append("missing-layers")
    values = {value for scale in found for value in scale.value.tolist()}
    pairs = [(row.k, row.v) for row in rows if row.k or row.v]
    if values == {0.0}:
        flags.append("all-zero")
    elif values == {1.0}:
        flags.append("all-one")
    elif len(pairs) > 1 and len(set(pairs)) == 1:
        flags.append("identical")
    return flags


def _range(scales: Sequence[FoundScale]) -> tuple[float, float] | None:
    values = [value for scale in scales for value in scale.value.tolist()]
    if not values:
        return None
    # min and max are meaningless beside a NaN, and a NaN is what the reader must see.
    odd = next((value for value in values if math.isnan(value)), None)
    return (odd, odd) if odd is not None else (min(values), max(values))


def _in_range(value: float) -> bool:
    return math.isfinite(value) and SMALLEST_SCALE <= value <= LARGEST_SCALE


def _aliases_differ(scales: Sequence[FoundScale]) -> bool:
    for stream in ("k", "v"):
        same = [scale.value for scale in scales if stream in scale.stream]
        if any(not same[0].equal(other) for other in same[1:]):
            return True
    return False
