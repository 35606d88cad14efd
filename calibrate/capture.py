"""Capture: run batches through a model and collect statistics of what enters its KV cache.

No cache is held: the tap hands each tensor to an accumulator on its own device and lets it go. Nothing is
copied to the host before :meth:`Capture.finish`, so a GPU is never waited for.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fp8kv.calibrate.data.loading import TokenBatch
from fp8kv.calibrate.folds import HELD_OUT_FOLD, NUM_FOLDS
from fp8kv.calibrate.formats.facts import ModelFacts
from fp8kv.calibrate.histogram import NUM_BINS, count_magnitudes
from fp8kv.calibrate.modeling.layers import match_layers
from fp8kv.calibrate.modeling.tap import (
    CacheWrite,
    Observer,
    find_attention_modules,
    tap,
)
from fp8kv.calibrate.rotary import RotaryLayout, rotary_layout
from fp8kv.calibrate.statistics import LayerStatistics, StreamStatistics
from fp8kv.recipes.errors import CalibrationError


class Capture:
    """Collect :class:`LayerStatistics` of one model over any number of batches.

    Memory on the model's device: per layer, stream and head ``NUM_FOLDS * NUM_BINS`` counts of 8 bytes (about
    57 KB), and while a tensor is counted one int32 and one int64 copy of it.
    """

    def __init__(self, model: nn.Module, facts: ModelFacts) -> None:
        """Match the model's attention modules with the checkpoint's layers.

        Raises:
            UnsupportedModelError: they do not match one to one, or differ in attention kind.
        """
        self._model = model
        self._modules = find_attention_modules(model)
        self._layers = match_layers(self._modules, facts)
        self._index = {layer.name: layer.index for layer in facts.layers}
        self._accumulators: dict[tuple[str, str], _Accumulator] = {}
        self._batch = _Batch(fold=0, valid=None)

    @property
    def expected_layers(self) -> list[str]:
        """Checkpoint-side names of the layers that must record."""
        return list(self._layers.values())

    def run(self, batch: TokenBatch) -> None:
        """Run one batch through the decoder and count what it caches.

        Padding is to the right, where causal attention never looks back from it, so no mask is needed; padded
        positions are left out of the statistics.
        """
        device = next(self._model.parameters()).device
        self._batch = _Batch(fold=batch.fold, valid=_valid_positions(batch, device))
        decoder = getattr(self._model, "base_model", self._model)
        with torch.inference_mode(), self._tap():
            decoder(input_ids=batch.token_ids.to(device), use_cache=False)

    def finish(self) -> tuple[LayerStatistics, ...]:
        """Return the statistics of all batches so far, in model order.

        Raises:
            CalibrationError: a layer recorded nothing, or recorded NaN or infinities; the layers are named.
        """
        silent = [
            self._layers[name]
            for name, attention in self._modules.items()
            if any((name, stream) not in self._accumulators for stream in attention.streams)
        ]
        if silent:
            raise CalibrationError(
                f"{len(silent)} of {len(self._modules)} attention layers recorded nothing, first {silent[0]}: "
                f"all of them: {', '.join(silent)}"
            )
        layers = []
        for name, attention in self._modules.items():
            streams = {
                stream: self._accumulators[name, stream].finish() for stream in attention.streams
            }
            layer = self._layers[name]
            _check_finite(layer, streams)
            layers.append(LayerStatistics(self._index[layer], layer, streams))
        return tuple(layers)

    def check(self) -> None:
        """Raise as :meth:`finish` does, without returning; use it early to stop a run that cannot succeed."""
        self.finish()

    def _tap(self) -> AbstractContextManager[None]:
        return tap(self._modules, self._observer())

    def _observer(self) -> Observer:
        def observe(write: CacheWrite) -> None:
            streams = zip(write.attention.streams, (write.keys, write.values), strict=True)
            for stream, tensor in streams:
                key = (write.attention.name, stream)
                if key not in self._accumulators:
                    layout = _layout(write, tensor) if stream in ("K", "ROPE") else None
                    self._accumulators[key] = _Accumulator(tensor, layout)
                self._accumulators[key].update(tensor, self._batch)

        return observe


@dataclass(frozen=True)
class _Batch:
    """What an accumulator must know of the running batch: its fold, and the flat positions that are no padding."""

    fold: int
    valid: Tensor | None


class _Accumulator:
    """Running statistics of one stream of one layer, on the stream's own device."""

    def __init__(self, tensor: Tensor, layout: RotaryLayout | None) -> None:
        _, num_heads, _, width = tensor.shape
        device = tensor.device
        self._layout = layout
        self._bfloat16 = tensor.dtype == torch.bfloat16
        self._histogram = torch.zeros(
            NUM_FOLDS, num_heads, NUM_BINS, dtype=torch.int64, device=device
        )
        self._zeros = torch.zeros(NUM_FOLDS, num_heads, dtype=torch.int64, device=device)
        self._nonfinite = torch.zeros_like(self._zeros)
        self._absmax = torch.zeros(NUM_FOLDS, num_heads, device=device)
        self._channel_absmax = torch.zeros(num_heads, width, device=device)
        self._first_histogram = torch.zeros(num_heads, NUM_BINS, dtype=torch.int64, device=device)
        self._first_absmax = torch.zeros(num_heads, device=device)
        self._pair_norm = torch.zeros(num_heads, device=device)

    def update(self, tensor: Tensor, batch: _Batch) -> None:
        """Count ``tensor`` of ``[batch, heads, tokens, width]``."""
        rows = tensor.detach()
        if batch.valid is not None:
            tokens = rows.transpose(1, 2).flatten(0, 1).index_select(0, batch.valid)
            rows = tokens.unsqueeze(2)  # [valid tokens, heads, 1, width]
        magnitudes = rows.abs()
        counts = count_magnitudes(magnitudes)
        channel_absmax = magnitudes.amax(dim=(0, 2)).float()
        fold = batch.fold
        self._histogram[fold] += counts.histogram
        self._zeros[fold] += counts.zeros
        self._nonfinite[fold] += counts.nonfinite
        self._absmax[fold] = torch.maximum(self._absmax[fold], channel_absmax.amax(-1))
        if fold == HELD_OUT_FOLD:
            return
        self._channel_absmax = torch.maximum(self._channel_absmax, channel_absmax)
        first = tensor[:, :, :1].abs()
        self._first_histogram += count_magnitudes(first).histogram
        self._first_absmax = torch.maximum(self._first_absmax, first.amax(dim=(0, 2, 3)).float())
        if self._layout is not None:
            self._pair_norm = torch.maximum(self._pair_norm, self._layout.pair_norms(rows))

    def finish(self) -> StreamStatistics:
        """Return the statistics on the CPU; counting may go on afterwards."""
        return StreamStatistics(
            histogram=self._histogram.cpu().clone(),
            absmax=self._absmax.cpu().clone(),
            zeros=self._zeros.cpu().clone(),
            nonfinite=self._nonfinite.cpu().clone(),
            channel_absmax=self._channel_absmax.cpu().clone(),
            first_histogram=self._first_histogram.cpu().clone(),
            first_absmax=self._first_absmax.cpu().clone(),
            pair_norm=None if self._layout is None else self._pair_norm.cpu().clone(),
            bfloat16=self._bfloat16,
        )


def _valid_positions(batch: TokenBatch, device: torch.device) -> Tensor | None:
    seq_len = batch.token_ids.shape[1]
    if bool((batch.lengths == seq_len).all()):
        return None
    valid = torch.arange(seq_len) < batch.lengths[:, None]
    return valid.flatten().nonzero().flatten().to(device)


def _layout(write: CacheWrite, tensor: Tensor) -> RotaryLayout:
    return rotary_layout(write.attention.module, write.position_embeddings, tensor.shape[-1])


def _check_finite(layer: str, streams: dict[str, StreamStatistics]) -> None:
    for stream, stats in streams.items():
        count = int(stats.nonfinite.sum())
        if count:
            raise CalibrationError(
                f"{stream} of {layer} holds {count} NaN or Inf values: the checkpoint is damaged, or it overflows "
                "in this dtype; try --dtype float32 or bfloat16"
            )
