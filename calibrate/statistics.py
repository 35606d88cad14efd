"""Statistics of a KV cache: what calibration keeps of the data, before any scale is chosen.

Everything merges by sum or by maximum, exactly, so shards, ranks, resumption and data that is added later are
one operation (:meth:`KVStatistics.merge`), independent of order. Any estimator, granularity and engine format is
derived from the merged statistics later, without the model.

Samples fall into folds (:mod:`fp8kv.calibrate.folds`): scales are chosen on all but the last and checked on it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fp8kv.calibrate.folds import NUM_FOLDS
from fp8kv.calibrate.histogram import NUM_BINS
from fp8kv.recipes.errors import StatisticsError

StreamName = Literal["K", "V", "LATENT", "ROPE"]


@dataclass(frozen=True)
class StreamStatistics:
    """Statistics of one stream of one layer; all tensors on the CPU.

    Attributes:
        histogram: ``[folds, heads, NUM_BINS]`` int64 counts of magnitudes (:mod:`fp8kv.calibrate.histogram`).
        absmax: ``[folds, heads]`` float32, zero where a fold has no data.
        zeros: ``[folds, heads]`` int64 counts of zeros.
        nonfinite: ``[folds, heads]`` int64 counts of NaN and infinities.
        channel_absmax: ``[heads, width]`` float32 over the calibration folds.
        first_histogram: ``[heads, NUM_BINS]`` int64, the first token of every sample alone (attention sinks),
            over the calibration folds; these tokens are in ``histogram`` too.
        first_absmax: ``[heads]`` float32, likewise.
        pair_norm: ``[heads]`` float32, over the calibration folds: the largest Euclidean norm of a rotary pair.
            RoPE turns pairs, so no position can bring an element above it. None for V and LATENT.
        bfloat16: the values were bfloat16 numbers, of which a bin holds eight, evenly spaced.
    """

    histogram: Tensor
    absmax: Tensor
    zeros: Tensor
    nonfinite: Tensor
    channel_absmax: Tensor
    first_histogram: Tensor
    first_absmax: Tensor
    pair_norm: Tensor | None
    bfloat16: bool

    @property
    def num_heads(self) -> int:
        """Number of KV heads, 1 for a latent."""
        return self.channel_absmax.shape[0]

    @property
    def width(self) -> int:
        """Elements per head and token."""
        return self.channel_absmax.shape[1]

    @classmethod
    def empty(
        cls, num_heads: int, width: int, *, has_pairs: bool, bfloat16: bool
    ) -> StreamStatistics:
        """Return the statistics of no data: the neutral element of :meth:`merge`."""
        return cls(
            histogram=torch.zeros(NUM_FOLDS, num_heads, NUM_BINS, dtype=torch.int64),
            absmax=torch.zeros(NUM_FOLDS, num_heads),
            zeros=torch.zeros(NUM_FOLDS, num_heads, dtype=torch.int64),
            nonfinite=torch.zeros(NUM_FOLDS, num_heads, dtype=torch.int64),
            channel_absmax=torch.zeros(num_heads, width),
            first_histogram=torch.zeros(num_heads, NUM_BINS, dtype=torch.int64),
            first_absmax=torch.zeros(num_heads),
            pair_norm=torch.zeros(num_heads) if has_pairs else None,
            bfloat16=bfloat16,
        )

    def merge(self, other: StreamStatistics) -> StreamStatistics:
        """Return the statistics of both sets of data; commutative and associative, exactly."""
        return StreamStatistics(
            histogram=self.histogram + other.histogram,
            absmax=torch.maximum(self.absmax, other.absmax),
            zeros=self.zeros + other.zeros,
            nonfinite=self.nonfinite + other.nonfinite,
            channel_absmax=torch.maximum(self.channel_absmax, other.channel_absmax),
            first_histogram=self.first_histogram + other.first_histogram,
            first_absmax=torch.maximum(self.first_absmax, other.first_absmax),
            pair_norm=None
            if self.pair_norm is None or other.pair_norm is None
            else torch.maximum(self.pair_norm, other.pair_norm),
            bfloat16=self.bfloat16 and other.bfloat16,
        )

    def select(self, folds: tuple[int, ...]) -> FoldStatistics:
        """Return histogram and maxima over some folds."""
        index = list(folds)
        return FoldStatistics(
            histogram=self.histogram[index].sum(0),
            absmax=self.absmax[index].amax(0),
            zeros=self.zeros[index].sum(0),
            bfloat16=self.bfloat16,
        )


@dataclass(frozen=True)
class FoldStatistics:
    """What an estimator works on: one stream of one layer over a selection of folds.

    Attributes:
        histogram: ``[heads, NUM_BINS]`` int64.
        absmax: ``[heads]`` float32.
        zeros: ``[heads]`` int64.
        bfloat16: the values were bfloat16 numbers.
    """

    histogram: Tensor
    absmax: Tensor
    zeros: Tensor
    bfloat16: bool

    def over_heads(self) -> FoldStatistics:
        """Return the same with all heads taken together, as one head."""
        return FoldStatistics(
            histogram=self.histogram.sum(0, keepdim=True),
            absmax=self.absmax.amax(0, keepdim=True),
            zeros=self.zeros.sum(0, keepdim=True),
            bfloat16=self.bfloat16,
        )

    def union(self, other: FoldStatistics) -> FoldStatistics:
        """Return the same over the data of both, as if it were one stream."""
        return FoldStatistics(
            histogram=self.histogram + other.histogram,
            absmax=torch.maximum(self.absmax, other.absmax),
            zeros=self.zeros + other.zeros,
            bfloat16=self.bfloat16 and other.bfloat16,
        )


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer.

    Attributes:
        index: the layer's number in the model, transformers' ``layer_idx``.
        name: checkpoint-side name of the attention module.
        streams: ``{"K", "V"}`` or, for MLA, ``{"LATENT", "ROPE"}``.
    """

    index: int
    name: str
    streams: dict[str, StreamStatistics]


@dataclass(frozen=True)
class Provenance:
    """What was measured.

    Attributes:
        model: the checkpoint as the user named it.
        model_digest: :meth:`fp8kv.calibrate.formats.checkpoint.Checkpoint.digest`.
        architecture: ``config.architectures[0]``.
        attention: ``gqa`` or ``mla``.
        dtype: dtype of the forward pass, e.g. ``bfloat16``.
        recipe_digests: digests of the recipes, sorted.
        data_digests: digests of the token sets, sorted; no two merged files share one.
        fp8kv: version that measured.
    """

    model: str
    model_digest: str
    architecture: str
    attention: Literal["gqa", "mla"]
    dtype: str
    recipe_digests: tuple[str, ...]
    data_digests: tuple[str, ...]
    fp8kv: str


@dataclass(frozen=True)
class KVStatistics:
    """Statistics of a whole model: the artefact ``kv-stats.safetensors``.

    Attributes:
        provenance: what was measured.
        layers: every layer that owns a KV cache, in model order.
        tokens: ``[folds]`` int64, tokens seen.
        samples: ``[folds]`` int64, samples seen.
    """

    provenance: Provenance
    layers: tuple[LayerStatistics, ...]
    tokens: Tensor
    samples: Tensor

    def merge(self, other: KVStatistics) -> KVStatistics:
        """Return the statistics of both sets of data; commutative and associative, exactly.

        Raises:
            StatisticsError: the two were not measured on the same checkpoint in the same dtype, or share data,
                which would then count twice.
        """
        _check_mergeable(self, other)
        return KVStatistics(
            provenance=replace(
                self.provenance,
                recipe_digests=_union(
                    self.provenance.recipe_digests, other.provenance.recipe_digests
                ),
                data_digests=_union(self.provenance.data_digests, other.provenance.data_digests),
                model=min(self.provenance.model, other.provenance.model),
                fp8kv=max(self.provenance.fp8kv, other.provenance.fp8kv),
            ),
            layers=merge_layers(self.layers, other.layers),
            tokens=self.tokens + other.tokens,
            samples=self.samples + other.samples,
        )


def absmax_by_layer(stats: KVStatistics) -> dict[str, tuple[float, float]]:
    """Return for every layer the largest magnitude under its K and under its V scale, calibration folds only.

    For MLA both are that of the whole row.
    """
    found = {}
    for layer in stats.layers:
        largest = {
            name: stream.channel_absmax.max().item() for name, stream in layer.streams.items()
        }
        if "LATENT" in largest:
            row = max(largest.values())
            found[layer.name] = (row, row)
        else:
            found[layer.name] = (largest["K"], largest["V"])
    return found


def merge_layers(
    a: tuple[LayerStatistics, ...], b: tuple[LayerStatistics, ...]
) -> tuple[LayerStatistics, ...]:
    """Return the statistics of both sets of data, layer by layer; the layers must be the same ones."""
    return tuple(
        LayerStatistics(
            mine.index,
            mine.name,
            {name: stream.merge(its.streams[name]) for name, stream in mine.streams.items()},
        )
        for mine, its in zip(a, b, strict=True)
    )


def _check_mergeable(a: KVStatistics, b: KVStatistics) -> None:
    for field, remedy in (
        ("model_digest", "measure both on the same checkpoint"),
        ("dtype", "measure both in the same --dtype"),
        ("attention", "measure both on the same checkpoint"),
    ):
        mine, its = getattr(a.provenance, field), getattr(b.provenance, field)
        if mine != its:
            raise StatisticsError(
                f"these statistics differ in {field} ({mine} and {its}) and cannot be merged: {remedy}"
            )
    shared = set(a.provenance.data_digests) & set(b.provenance.data_digests)
    if shared:
        raise StatisticsError(
            f"both statistics hold the data set {min(shared)[:16]}, which would count twice: "
            "merge statistics of different data"
        )
    if _shape(a) != _shape(b):
        raise StatisticsError("these statistics differ in layers, streams, heads or widths")


def _shape(stats: KVStatistics) -> list[tuple[str, list[tuple[str, int, int]]]]:
    return [
        (
            layer.name,
            [(name, stream.num_heads, stream.width) for name, stream in layer.streams.items()],
        )
        for layer in stats.layers
    ]


def _union(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(set(a) | set(b)))
