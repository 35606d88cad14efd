"""What an attention backend does: it writes new keys and values into the paged cache, and attends over it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fp8kv.runtime.batch import Batch
from fp8kv.runtime.paged_cache import LayerCache


@dataclass(frozen=True)
class AttentionOptions:
    """How one layer attends.

    Attributes:
        scaling: factor of the scores, all of a model's own corrections included.
        window: a token sees this many positions, itself included; None for all.
        soft_cap: scores become ``soft_cap * tanh(score / soft_cap)``; None leaves them.
        sinks: [q_heads], logits that join the softmax's denominator only; None for none.
        chunk: a token sees positions of its own chunk of this many only (Llama 4); None for all.
    """

    scaling: float
    window: int | None = None
    soft_cap: float | None = None
    sinks: Tensor | None = None
    chunk: int | None = None


class Backend(Protocol):
    """Attention over the paged cache.

    A forward pass calls :meth:`write` and then :meth:`attend`, layer by layer. New tokens are read back from the
    cache, quantised as all later steps will read them; so a prompt gives the same numbers however it is cut into
    chunks, and two backends differ by rounding alone.
    """

    @property
    def name(self) -> str:
        """The name by which users choose it."""

    def write(self, layer: LayerCache, key: Tensor, value: Tensor, batch: Batch) -> None:
        """Write the batch's new tokens to their slots; a negative slot is skipped.

        Args:
            layer: the layer's cache, changed in place.
            key: [tokens, kv_heads, k_dim] after RoPE; for MLA the latent, [tokens, latent_dim].
            value: [tokens, kv_heads, v_dim]; for MLA the rope part, [tokens, rope_dim].
            batch: the new tokens.
        """

    def attend(
        self, layer: LayerCache, query: Tensor, batch: Batch, options: AttentionOptions
    ) -> Tensor:
        """Let each new token attend to its sequence up to itself; the new tokens are in the cache already.

        Args:
            layer: the layer's cache.
            query: [tokens, q_heads, k_dim] after RoPE; for MLA absorbed, [tokens, heads, latent_dim + rope_dim].
            batch: the new tokens.
            options: how the layer attends.

        Returns:
            [tokens, q_heads, v_dim] of the query's dtype; for MLA v_dim is latent_dim. Rows of padding hold finite
            numbers or are behind ``cu_seqlens[-1]`` and hold anything.
        """
