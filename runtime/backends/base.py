"""What an attention backend does: it writes new keys and values into the paged cache, and attends over it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from fp8kv.runtime.batch import Batch
from fp8kv.runtime.latent_projection import LatentProjection
from fp8kv.runtime.paged_cache import LayerCache


@dataclass(frozen=True)
class AttentionOptions:
    """How one layer attends.

    Attributes:
        scaling: factor of the scores, all of a model's own corrections included.
        window: a token sees this many positions, itself included; None for all.
        soft_cap: scores become ``soft_cap * tanh(score / soft_cap)``; None leaves them.
        sinks: [q_heads] float32, logits that join the softmax's denominator only; None for none.
        chunk: a token sees positions of its own chunk of this many only (Llama 4); None for all.
    """

    scaling: float
    window: int | None = None
    soft_cap: float | None = None
    sinks: Tensor | None = None
    chunk: int | None = None


class Rope(NamedTuple):
    """The rotation of each new token, as transformers' rotary embedding gives it.

    Element i of a head's first ``rope_dim`` is paired with element ``i + rope_dim / 2``, and both halves of a row of
    ``cos`` and ``sin`` hold the same numbers; the elements behind stay as they are.

    Attributes:
        cos: [tokens, rope_dim], a factor such as YaRN's included.
        sin: the same.
    """

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class PreparedQkv:
    """What a backend's attention takes.

    Attributes:
        query: [tokens, q_heads, k_dim], after RoPE.
        key: [tokens, kv_heads, k_dim], the new tokens as they were computed; None where attention reads them from the
            cache, quantised as all later steps will.
        value: [tokens, kv_heads, v_dim]; None likewise.
    """

    query: Tensor
    key: Tensor | None
    value: Tensor | None


class Backend(Protocol):
    """Attention over the paged cache.

    A forward pass goes layer by layer. A backend that has no more than this takes the plain path: :meth:`write`, and
    :meth:`attend` with the new tokens as the model computed them beside the cache of those before them. One that
    :class:`PreparesPrefill` owns the step in front of attention.
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
        self,
        layer: LayerCache,
        query: Tensor,
        batch: Batch,
        options: AttentionOptions,
        key: Tensor | None = None,
        value: Tensor | None = None,
    ) -> Tensor:
        """Let each new token attend to its sequence up to itself; the new tokens are in the cache already.

        Args:
            layer: the layer's cache.
            query: [tokens, q_heads, k_dim] after RoPE; for MLA absorbed, [tokens, heads, latent_dim + rope_dim].
            batch: the new tokens.
            options: how the layer attends.
            key: the new tokens as :meth:`write` takes them, which attention then does not read from the cache; None
                has it read all from there. A sequence that decodes reads its one token from the cache in any case.
            value: likewise.

        Returns:
            [tokens, q_heads, v_dim] of the query's dtype; for MLA v_dim is latent_dim. Rows of padding hold finite
            numbers or are behind ``cu_seqlens[-1]`` and hold anything.
        """


@runtime_checkable
class PreparesPrefill(Protocol):
    """A backend that owns the step from BF16 to FP8 in front of attention, SGLang's hook of this name (#25460)."""

    def fuses_rope(self, layer: LayerCache) -> bool:
        """Say whether rotating, quantising and writing are one launch, for which RoPE is worth leaving to the hook."""

    def prepare_prefill_qkv(
        self,
        layer: LayerCache,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch: Batch,
        rope: Rope | None = None,
    ) -> PreparedQkv:
        """Rotate where asked, quantise, and write K and V into the cache; return what :meth:`Backend.attend` takes.

        New tokens are attended to as the cache holds them, so a prompt gives the same numbers however it is cut into
        chunks, and two backends differ by rounding alone.

        Args:
            layer: the layer's cache, changed in place.
            query: [tokens, q_heads, k_dim]; not changed.
            key: as :meth:`Backend.write` takes it, but before RoPE where ``rope`` is given; not changed.
            value: as :meth:`Backend.write` takes it.
            batch: the new tokens.
            rope: how to rotate ``query`` and ``key``; None where they are rotated already, or where MLA's are, whose
                rope parts the model rotates by itself.
        """


@runtime_checkable
class AttendsLatents(Protocol):
    """A backend that chooses by itself where attention of MLA runs absorbed, and where K and V are expanded."""

    def attend_latents(
        self,
        layer: LayerCache,
        query: Tensor,
        batch: Batch,
        options: AttentionOptions,
        projection: LatentProjection,
        key: Tensor | None = None,
        value: Tensor | None = None,
    ) -> Tensor:
        """Do what :meth:`Backend.attend` does, for queries that are not absorbed.

        Args:
            layer: the layer's cache.
            query: [tokens, heads, nope_dim + rope_dim].
            batch: the new tokens.
            options: how the layer attends.
            projection: from the latent to K and V of the heads.
            key: as for :meth:`Backend.attend`.
            value: likewise.

        Returns:
            [tokens, heads, v_dim] of the query's dtype, v_dim being the width of an expanded V head.
        """
