"""The attention modules of a model while a runner holds it: what each does in a forward pass over the pages."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface

from fp8kv.calibrate.modeling.tap import AttentionModule, CacheWrite
from fp8kv.recipes.errors import UnsupportedModelError
from fp8kv.runtime.backends import (
    AttendsLatents,
    AttentionOptions,
    Backend,
    PreparedQkv,
    PreparesPrefill,
)
from fp8kv.runtime.batch import Batch
from fp8kv.runtime.deferred_rope import DeferredRope
from fp8kv.runtime.latent_projection import LatentProjection, hand_latent_through
from fp8kv.runtime.paged_cache import LayerCache

_NAME = "fp8kv_paged"
_LAYER = "fp8kv_layer"

_HARMLESS = frozenset({"dropout", "position_ids", "use_cache", "output_router_logits"})
"""Arguments that reach an attention function and change nothing in evaluation mode."""


@dataclass
class ForwardPass:
    """One forward pass as the attention modules see it.

    Attributes:
        backend: attends.
        hook: the same backend where it owns the step in front of attention, else None.
        latents: the same where it chooses how MLA attends, else None.
        layers: all modules, by name.
        batch: the new tokens; None between passes.
        noted: what modules cache that have not attended yet.
        attended: the modules that had their turn.
    """

    backend: Backend
    hook: PreparesPrefill | None
    latents: AttendsLatents | None
    layers: dict[str, PagedLayer] = field(default_factory=dict)
    batch: Batch | None = None
    noted: dict[str, CacheWrite] = field(default_factory=dict)
    attended: set[str] = field(default_factory=set)

    def begin(self, batch: Batch) -> None:
        """Start with ``batch``."""
        self.batch = batch
        self.attended.clear()

    def end(self) -> list[str]:
        """Forget the batch and return the layers that were passed by."""
        self.batch = None
        self.noted.clear()
        return [name for name in self.layers if name not in self.attended]

    def running(self, name: str) -> Batch:
        """Return the batch for the module ``name``.

        Raises:
            ValueError: no pass is under way.
        """
        if self.batch is None:
            raise ValueError(
                f"{name} belongs to a ModelRunner: close it before the model is called directly"
            )
        return self.batch

    def note(self, write: CacheWrite) -> None:
        """Keep what a module caches until it attends: with the query at hand, one launch may do for both."""
        self.running(write.attention.name)
        self.noted[write.attention.name] = write


@dataclass(frozen=True)
class PagedLayer:
    """One attention module with its cache.

    Attributes:
        attention: the module.
        cache: its pages.
        window: the sliding window that its configuration declares, None for none.
        current: the forward pass under way, the same object for all layers.
        rope: the rotation that the module leaves to the backend; None where it rotates by itself.
    """

    attention: AttentionModule
    cache: LayerCache
    window: int | None
    current: ForwardPass
    rope: DeferredRope | None

    def attend(self, queries: Tensor, options: AttentionOptions) -> Tensor:
        """Write what the module caches and attend with ``queries [1, heads, tokens, width]``.

        Returns:
            [tokens, heads, value width].

        Raises:
            UnsupportedModelError: the module attends in a way that the runtime does not know.
        """
        current, name = self.current, self.attention.name
        batch = current.running(name)
        write = current.noted.pop(name, None)
        if write is None:
            raise UnsupportedModelError(
                f"{name} attends before it updates its cache: the runtime cannot drive this architecture"
            )
        if options.window != self.window:
            raise UnsupportedModelError(
                f"{name} attends in a window of {options.window} tokens where its configuration says {self.window}: "
                "transformers applies it in a mask only, which the runtime does not build"
            )
        ready = self._prepare(queries, write, batch)
        if self.attention.attention == "mla":
            output = self._attend_latents(ready, batch, options)
        else:
            output = current.backend.attend(
                self.cache, ready.query, batch, options, ready.key, ready.value
            )
        current.attended.add(name)
        return output.to(queries.dtype)

    def _prepare(self, queries: Tensor, write: CacheWrite, batch: Batch) -> PreparedQkv:
        """Write new tokens to the cache, and return what attention takes."""
        query = queries[0].transpose(0, 1)
        if self.attention.attention == "mla":
            # one head, of which the cache keeps no dimension
            key, value = write.keys[0, 0], write.values[0, 0]
        else:
            key, value = write.keys[0].transpose(0, 1), write.values[0].transpose(0, 1)
        current = self.current
        if current.hook is None:
            current.backend.write(self.cache, key, value, batch)
            return PreparedQkv(query, key, value)
        rope = None if self.rope is None else self.rope.take(queries, write.keys)
        return current.hook.prepare_prefill_qkv(self.cache, query, key, value, batch, rope)

    def _attend_latents(
        self, ready: PreparedQkv, batch: Batch, options: AttentionOptions
    ) -> Tensor:
        query, new = ready.query, (ready.key, ready.value)
        projection = LatentProjection.of(self.attention.module, query.shape[1])
        current = self.current
        if current.latents is not None:
            return current.latents.attend_latents(
                self.cache, query, batch, options, projection, *new
            )
        absorbed = projection.absorb(query)
        latents = current.backend.attend(self.cache, absorbed, batch, options, *new)
        return projection.to_values(latents.to(query.dtype))


def is_held(module: nn.Module) -> bool:
    """Say whether a runner holds this attention module."""
    return hasattr(module, _LAYER)


def hold_module(layer: PagedLayer, stack: ExitStack) -> None:
    """Have an attention module attend over its pages until ``stack`` closes."""
    AttentionInterface.register(_NAME, _attention)
    module: Any = layer.attention.module
    setattr(module, _LAYER, layer)
    stack.callback(delattr, module, _LAYER)
    if layer.attention.attention == "mla":
        hand_latent_through(module, stack)
    # not set_attn_implementation, which would switch the vision tower of a multimodal model, too
    stack.callback(
        setattr, module.config, "_attn_implementation", module.config._attn_implementation
    )
    module.config._attn_implementation = _NAME


def _attention(
    module: nn.Module,
    query: Tensor,
    _key: Tensor,
    _value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend with ``query [1, heads, tokens, width]`` over the pages; return ``[1, tokens, heads, value width]``."""
    layer: PagedLayer = getattr(module, _LAYER)
    unknown = [
        name for name, value in kwargs.items() if value is not None and name not in _HARMLESS
    ]
    if attention_mask is not None:
        unknown.append("attention_mask")
    if unknown:
        raise UnsupportedModelError(
            f"{layer.attention.name} ({type(module).__name__}) attends with {', '.join(sorted(unknown))}, "
            "which the runtime does not know"
        )
    options = AttentionOptions(
        scaling=scaling,
        window=sliding_window,
        soft_cap=softcap,
        sinks=None if s_aux is None else s_aux.float(),
    )
    return layer.attend(query, options)[None], None
