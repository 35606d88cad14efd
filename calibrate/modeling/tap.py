"""The attention-module tap: see, and replace, exactly what a model puts into its KV cache.

Transformers hands every attention module a ``past_key_values`` object and calls its ``update(keys, values,
layer_idx)`` with what is to be cached: K after its norm and after RoPE, and V. A multi-head latent attention
(MLA) module passes the latent (after ``kv_a_layernorm``) and the rope part (after RoPE) instead. A forward
pre-hook replaces that object by a proxy, at one module at a time, so that no global state and no cache is
needed, and the model's own code stays as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from fp8kv.recipes.errors import UnsupportedModelError


@dataclass(frozen=True)
class AttentionModule:
    """One attention module that owns a KV cache.

    Attributes:
        name: its name inside the transformers model, e.g. ``model.layers.0.self_attn``.
        module: the module itself.
        attention: ``mla`` where the cached pair is (latent, rope part), else ``gqa``.
        widths: for MLA the expected widths ``(kv_lora_rank, qk_rope_head_dim)``, else None.
    """

    name: str
    module: nn.Module
    attention: Literal["gqa", "mla"]
    widths: tuple[int, int] | None

    @property
    def streams(self) -> tuple[str, str]:
        """The names of the two tensors: ``("K", "V")`` or ``("LATENT", "ROPE")``."""
        return ("LATENT", "ROPE") if self.attention == "mla" else ("K", "V")


@dataclass(frozen=True)
class CacheWrite:
    """What one attention module is about to cache.

    Attributes:
        attention: the module.
        keys: ``[batch, heads, tokens, width]``; for MLA the latent.
        values: likewise; for MLA the rope part.
        position_embeddings: the module's argument of that name, None where it takes none.
    """

    attention: AttentionModule
    keys: Tensor
    values: Tensor
    position_embeddings: Any


Observer = Callable[[CacheWrite], tuple[Tensor, Tensor] | None]
"""Returns the pair to go on with, or None to leave it as it is."""


def find_attention_modules(model: nn.Module) -> dict[str, AttentionModule]:
    """Return every module of ``model`` that writes a KV cache of its own, by name, in model order.

    Modules that reuse an earlier layer's cache (``is_kv_shared_layer``) are left out: they have no scale of
    their own.

    Raises:
        UnsupportedModelError: the model has no such module, or an MLA module of a layout that is not known.
    """
    found = {
        name: _describe(name, module)
        for name, module in model.named_modules()
        if _writes_cache(module)
    }
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no attention module that takes past_key_values: "
            "this architecture keeps no KV cache that fp8kv can measure"
        )
    return found


@contextmanager
def tap(modules: Mapping[str, AttentionModule], observe: Observer) -> Iterator[None]:
    """Call ``observe`` with all that enters the cache, while the context is open.

    The hooks come off when the context closes, also after an exception.

    Raises:
        UnsupportedModelError: an MLA module passes tensors of other widths than its configuration says, as
            releases before transformers 5.15 and the sparse-attention classes of 5.17 do.
    """
    with ExitStack() as stack:
        for attention in modules.values():
            handle = attention.module.register_forward_pre_hook(
                _make_hook(attention, observe), with_kwargs=True
            )
            stack.callback(handle.remove)
        yield


class _CacheProxy:
    """Stands in for ``past_key_values`` at one attention module; with no inner cache it holds nothing."""

    def __init__(
        self,
        inner: Any,
        attention: AttentionModule,
        observe: Observer,
        position_embeddings: Any,
    ) -> None:
        self._inner = inner
        self._attention = attention
        self._observe = observe
        self._position_embeddings = position_embeddings

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        _check_widths(self._attention, keys, values)
        edited = self._observe(CacheWrite(self._attention, keys, values, self._position_embeddings))
        if edited is not None:
            keys, values = edited
        if self._inner is None:
            return keys, values
        return self._inner.update(keys, values, layer_idx, *args, **kwargs)  # type: ignore[no-any-return]

    def get_seq_length(self, *args: Any) -> int:
        return 0 if self._inner is None else self._inner.get_seq_length(*args)

    def __getattr__(self, name: str) -> Any:
        inner = self.__dict__.get("_inner")
        if inner is None:
            raise AttributeError(name)
        return getattr(inner, name)


def _make_hook(attention: AttentionModule, observe: Observer) -> Callable[..., Any]:
    signature = inspect.signature(attention.module.forward)

    def hook(_module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        bound = signature.bind(*args, **kwargs)
        inner = bound.arguments.get("past_key_values")
        extra = bound.arguments.get("kwargs", {})
        position_embeddings = bound.arguments.get(
            "position_embeddings", extra.get("position_embeddings")
        )
        bound.arguments["past_key_values"] = _CacheProxy(
            inner, attention, observe, position_embeddings
        )
        return bound.args, bound.kwargs

    return hook


def _writes_cache(module: nn.Module) -> bool:
    return (
        isinstance(getattr(module, "layer_idx", None), int)
        and hasattr(module, "is_causal")
        and hasattr(module, "scaling")
        and not getattr(module, "is_kv_shared_layer", False)
        and "past_key_values" in inspect.signature(module.forward).parameters
    )


def _describe(name: str, module: nn.Module) -> AttentionModule:
    latent_dim = getattr(module, "kv_lora_rank", None)
    if latent_dim is None:
        return AttentionModule(name, module, "gqa", None)
    rope_dim = getattr(module, "qk_rope_head_dim", None)
    if not isinstance(rope_dim, int) or not isinstance(latent_dim, int):
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__}) has kv_lora_rank {latent_dim!r} but qk_rope_head_dim {rope_dim!r}: "
            "an MLA layout that fp8kv does not know"
        )
    return AttentionModule(name, module, "mla", (latent_dim, rope_dim))


def _check_widths(attention: AttentionModule, keys: Tensor, values: Tensor) -> None:
    if attention.widths is None:
        return
    seen = (keys.shape[-1], values.shape[-1])
    if seen != attention.widths or keys.shape[1] != 1 or values.shape[1] != 1:
        raise UnsupportedModelError(
            f"{attention.name} ({type(attention.module).__name__}) caches {list(keys.shape)} and "
            f"{list(values.shape)} where a latent of width {attention.widths[0]} and a rope part of width "
            f"{attention.widths[1]} were expected: this transformers version caches expanded K and V for this "
            "architecture; transformers 5.18 or later passes the latent"
        )
