"""Hand a checkpoint's weights to transformers one at a time, decoded on the device that the model is for.

``from_pretrained`` takes tensors out of a state dict by ``weight[...]``, on a few threads and in the order of the
layers, and puts each into the model, or into the tensor that a layer's experts are merged to. Where its state dict
would hold slices of safetensors files, it holds a :class:`LazyWeight` here. No decoded weight is held besides: what is
read ahead becomes part of the model, or is freed when it is merged.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from types import EllipsisType

import torch
from torch import Tensor

from fp8kv.calibrate.formats.checkpoint import Checkpoint
from fp8kv.calibrate.formats.weights import StoredWeight, decode, stored_weights, weight_scheme
from fp8kv.calibrate.modeling.staged_reader import StagedReader

Progress = Callable[[int, int], None]
"""Is told the bytes of the checkpoint that are done and those of all its weights; from any thread, one at a time."""


class LazyWeight:
    """A weight that is read when it is indexed; the part of a safetensors slice's interface that transformers uses."""

    __slots__ = ("_read",)

    def __init__(self, read: Callable[[], Tensor]) -> None:
        """Keep how to read it."""
        self._read = read

    def __getitem__(self, index: EllipsisType) -> Tensor:
        """Return the whole weight, a new tensor each time.

        Raises:
            CheckpointError: it cannot be read, or its parts do not fit together.
        """
        return self._read()


class WeightStream:
    """The weights of a checkpoint, none of which is read yet.

    Peak memory of one that is read: on the device its stored and decoded bytes and a working set of 192 MiB at most, on
    a host that is not the device what :class:`~fp8kv.calibrate.modeling.staged_reader.StagedReader` says. Close it, or
    use it in a ``with`` statement.

    Attributes:
        weights: plain name -> weight. KV scales and scales of activations are left out.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None = None,
    ) -> None:
        """Look at the names and dtypes of all weights.

        Args:
            checkpoint: that holds them.
            dtype: of what is quantised; what is not keeps its own.
            device: of what is read.
            progress: is told of every weight that has been read.

        Raises:
            UnsupportedModelError: a tensor is quantised in a way that fp8kv cannot decode.
            CheckpointError: a quantised weight lacks its scale or shape.
        """
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._progress = progress
        self._scheme = weight_scheme(checkpoint)
        self._reader = StagedReader(checkpoint)
        self._lock = threading.Lock()
        stored = stored_weights(checkpoint)
        self._done_bytes = 0
        self._total_bytes = sum(self._stored_bytes(weight) for weight in stored.values())
        self.weights = {
            name: LazyWeight(partial(self._read, weight)) for name, weight in stored.items()
        }

    def __enter__(self) -> WeightStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the shards; no weight can be read any more."""
        self._reader.close()

    def finish(self) -> None:
        """Report everything as done: weights that the model has no place for are never read."""
        if self._progress is not None:
            self._progress(self._total_bytes, self._total_bytes)

    def _read(self, weight: StoredWeight) -> Tensor:
        # the shape of an INT4 weight stays on the CPU: to look at it on a GPU would wait for the GPU
        parts = [self._reader.read(part, self._device) for part in weight.parts[:2]]
        parts += [self._reader.read(part, torch.device("cpu")) for part in weight.parts[2:]]
        if weight.kind == "plain":
            tensor = parts[0]
        else:
            tensor = decode(self._checkpoint, weight, parts, self._scheme, self._dtype)
        if self._progress is not None:
            with self._lock:
                self._done_bytes += self._stored_bytes(weight)
                self._progress(self._done_bytes, self._total_bytes)
        return tensor

    def _stored_bytes(self, weight: StoredWeight) -> int:
        entries = (self._checkpoint.entry(part) for part in weight.parts)
        return sum(entry.end - entry.start for entry in entries)
