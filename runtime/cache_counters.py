"""Count what a quantised cache loses while it serves: values beyond the format's range, and values that become zero.

A value is *clipped* where its code is the largest of the format and rounding alone would not have made it so: with one
more exponent the format would have held something larger. It is *flushed* where it is not zero and its code is. Both
are exact, by the quotient ``x / scale`` in float32 that the code is made of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fp8kv.kernels.fp8 import Fp8Format
from fp8kv.runtime.backends.base import (
    AttendsLatents,
    AttentionOptions,
    Backend,
    PreparedQkv,
    PreparesPrefill,
    Rope,
)
from fp8kv.runtime.batch import Batch
from fp8kv.runtime.paged_cache import LayerCache

_NUMBERS = 3  # values, clipped, flushed; of K and of V


@dataclass(frozen=True)
class StreamCounts:
    """What was written of K, or of V, in one layer.

    Attributes:
        num_values: numbers written, all heads together; a token that is computed again counts again.
        num_clipped: those whose code stands for less than they are, because the format ends there; infinities too.
        num_flushed: those that are not zero, and whose code is.
    """

    num_values: int
    num_clipped: int
    num_flushed: int


@dataclass(frozen=True)
class LayerCounts:
    """What was written in one layer.

    Attributes:
        k: of the keys; for MLA of the latents.
        v: of the values; for MLA of the rope parts.
    """

    k: StreamCounts
    v: StreamCounts


class CountingBackend:
    """A backend that counts on the way into the cache, and is the backend that it wraps in all else.

    The counters live on the device, are never read back while serving, and are changed in place, so that forward
    passes with them can be captured in a CUDA graph. NaN is neither clipped nor flushed. A cache that holds no FP8
    loses nothing and counts values only.
    """

    def __init__(self, backend: Backend, layers: Mapping[str, LayerCache]) -> None:
        """Wrap a backend.

        Args:
            backend: does the work.
            layers: the caches that it will write, of one device.
        """
        self._backend = backend
        device = next(iter(layers.values())).k.device
        numbers = torch.zeros(len(layers), 2, _NUMBERS, dtype=torch.int64, device=device)
        self._numbers = numbers
        self._rows: dict[str, Tensor] = dict(zip(layers, numbers, strict=True))
        # what a backend can do beyond the contract is asked by looking for the method
        if isinstance(backend, PreparesPrefill):
            self._prepares = backend
            self.prepare_prefill_qkv = self._prepare_prefill_qkv
        if isinstance(backend, AttendsLatents):
            self.attend_latents = backend.attend_latents

    @property
    def name(self) -> str:
        """The name of the wrapped backend."""
        return self._backend.name

    def counts(self) -> dict[str, LayerCounts]:
        """Return what was counted in each layer so far; waits for the device."""
        found = self._numbers.tolist()
        return {
            name: LayerCounts(StreamCounts(*k), StreamCounts(*v))
            for name, (k, v) in zip(self._rows, found, strict=True)
        }

    def fuses_rope(self, layer: LayerCache) -> bool:
        """Say no: keys are counted as they are quantised, so the model has to rotate them by itself."""
        return False

    def write(self, layer: LayerCache, key: Tensor, value: Tensor, batch: Batch) -> None:
        """Count and write new tokens."""
        self._count(layer, key, value, batch)
        self._backend.write(layer, key, value, batch)

    def attend(
        self,
        layer: LayerCache,
        query: Tensor,
        batch: Batch,
        options: AttentionOptions,
        key: Tensor | None = None,
        value: Tensor | None = None,
    ) -> Tensor:
        """Attend as the wrapped backend does."""
        return self._backend.attend(layer, query, batch, options, key, value)

    def _prepare_prefill_qkv(
        self,
        layer: LayerCache,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch: Batch,
        rope: Rope | None = None,
    ) -> PreparedQkv:
        if rope is not None:
            raise ValueError("keys are counted after RoPE: the model must rotate them")
        self._count(layer, key, value, batch)
        return self._prepares.prepare_prefill_qkv(layer, query, key, value, batch)

    def _count(self, layer: LayerCache, key: Tensor, value: Tensor, batch: Batch) -> None:
        real = batch.slots >= 0
        scales = layer.k_scale, layer.v_scale
        for numbers, values, scale in zip(
            self._rows[layer.name], (key, value), scales, strict=True
        ):
            # padding has no part, and may hold anything
            numbers[0].add_(real.sum() * values[0].numel())
            if layer.fmt is not None:
                mask = real.view(-1, *[1] * (values.dim() - 1))
                # a scale is of the layer or of each head, the second dimension but for MLA's rows
                divisor = scale if layer.v is None else scale.view(-1, 1)
                clipped, flushed = lost_values(values, divisor, layer.fmt)
                numbers[1].add_((clipped & mask).sum())
                numbers[2].add_((flushed & mask).sum())


def lost_values(values: Tensor, scale: Tensor, fmt: Fp8Format) -> tuple[Tensor, Tensor]:
    """Say which values are clipped and which are flushed when they are quantised.

    Args:
        values: any shape, any floating dtype.
        scale: float32, broadcastable to ``values``.
        fmt: the FP8 format.

    Returns:
        Two of bool, like ``values``.
    """
    quotients = (values.float() / scale).abs()
    limit = _first_clipped(fmt)
    # half a step rounds to zero, which is even
    flushed = (quotients <= fmt.smallest_subnormal / 2) & (values != 0)
    return quotients >= limit, flushed


def _first_clipped(fmt: Fp8Format) -> float:
    """Return the smallest float32 that would round to something above the format's largest number.

    Halfway to the next number goes to the even one of the two. The largest number of ``e4m3fn`` is even, for the odd
    one behind it is NaN; of the other formats it is odd.
    """
    step = 2.0 ** (math.floor(math.log2(fmt.max)) - fmt.mantissa_bits)
    halfway = fmt.max + step / 2
    is_even = fmt.max / step % 2 == 0
    return float(np.nextafter(np.float32(halfway), np.float32(math.inf))) if is_even else halfway
