"""Drive an unmodified transformers model over a paged KV cache.

The new tokens of all sequences go through the model as one row, ``[1, tokens]``, with their positions. At every
attention module a tap writes what the module would cache into the pages, and a registered attention function has
the backend attend over them, so the model builds no mask and keeps no cache of its own. An MLA module's
``expand_kv`` hands the latent through, and attention runs absorbed: the query is carried into the latent space
(DeepSeek-V2, arXiv 2405.04434, section 2.1.2).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from fp8kv.calibrate.modeling.tap import AttentionModule, CacheWrite, tap
from fp8kv.recipes.errors import UnsupportedModelError
from fp8kv.runtime.absorbed_mla import hand_latent_through
from fp8kv.runtime.architectures import check_supported, declared_window, text_config
from fp8kv.runtime.backends import AttentionOptions, Backend
from fp8kv.runtime.batch import Batch
from fp8kv.runtime.paged_cache import LayerCache, PagedCache

_NAME = "fp8kv_paged"
_LAYER = "fp8kv_layer"

_HARMLESS = frozenset({"dropout", "position_ids", "use_cache", "output_router_logits"})
"""Arguments that reach an attention function and change nothing in evaluation mode."""


class ModelRunner:
    """Compute logits of packed batches; the cache is filled on the way.

    The model belongs to the runner until :meth:`close`, which leaves it as it was found; a runner is a context
    manager that closes itself. The runner itself never waits for the device, so that a forward can be captured in a
    CUDA graph where the model's own code can.

    Attributes:
        cache: the pages that the model writes and reads.
    """

    def __init__(self, model: nn.Module, cache: PagedCache, backend: Backend) -> None:
        """Take over ``model``, a transformers model in evaluation mode.

        Raises:
            UnsupportedModelError: the model's attention cannot be driven through a paged cache.
            ValueError: the cache was built for another model, or another runner holds this one.
        """
        modules = check_supported(model)
        _check_free(model, modules, cache)
        self.cache = cache
        self._model = model
        self._pass = _Pass(backend)
        config = text_config(model)
        with ExitStack() as stack:
            AttentionInterface.register(_NAME, _attention)
            for name, attention in modules.items():
                window = declared_window(config, attention.module)
                layer = _Layer(attention, cache.layers[name], window, self._pass)
                _install(layer, stack)
                self._pass.layers[name] = layer
            stack.enter_context(tap(modules, self._pass.write))
            self._held = stack.pop_all()

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits of each sequence's last new token, float32 ``[sequences, vocabulary]``."""
        return self._run(batch, batch.cu_seqlens[1:].to(torch.int64) - 1).float()

    def all_logits(self, batch: Batch) -> Tensor:
        """Return the logits of every new token, ``[tokens, vocabulary]``, in the model's dtype."""
        return self._run(batch, 0)

    def close(self) -> None:
        """Leave the model as it was found; closing twice does nothing."""
        self._held.close()
        self._pass.layers.clear()

    def __enter__(self) -> ModelRunner:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    @torch.no_grad()
    def _run(self, batch: Batch, kept: Tensor | int) -> Tensor:
        if not self._pass.layers:
            raise ValueError("this runner is closed; make another one to run the model")
        self._pass.begin(batch)
        try:
            output = self._model(
                input_ids=batch.token_ids[None],
                position_ids=batch.positions[None],
                use_cache=False,
                logits_to_keep=kept,
            )
        finally:
            missed = self._pass.end()
        if missed:
            raise UnsupportedModelError(
                f"{missed[0]} ({len(missed)} of {len(self._pass.layers)} attention modules of "
                f"{type(self._model).__name__}) did not attend through the registered attention function: "
                "the runtime cannot drive this architecture"
            )
        return output.logits[0]  # type: ignore[no-any-return]


@dataclass
class _Pass:
    """One forward pass as the attention modules see it: which batch, and which of them had their turn."""

    backend: Backend
    layers: dict[str, _Layer] = field(default_factory=dict)
    batch: Batch | None = None
    written: set[str] = field(default_factory=set)
    attended: set[str] = field(default_factory=set)

    def begin(self, batch: Batch) -> None:
        self.batch = batch
        self.written.clear()
        self.attended.clear()

    def end(self) -> list[str]:
        """Return the layers that were passed by."""
        self.batch = None
        return [name for name in self.layers if name not in self.attended]

    def running(self, name: str) -> Batch:
        if self.batch is None:
            raise ValueError(
                f"{name} belongs to a ModelRunner: close it before the model is called directly"
            )
        return self.batch

    def write(self, write: CacheWrite) -> None:
        """Put what a module caches into the pages."""
        name = write.attention.name
        batch = self.running(name)
        if write.attention.attention == "mla":
            # one head, of which the cache keeps no dimension
            key, value = write.keys[0, 0], write.values[0, 0]
        else:
            key, value = write.keys[0].transpose(0, 1), write.values[0].transpose(0, 1)
        self.backend.write(self.layers[name].cache, key, value, batch)
        self.written.add(name)


@dataclass(frozen=True)
class _Layer:
    """One attention module with its cache."""

    attention: AttentionModule
    cache: LayerCache
    window: int | None
    current: _Pass

    def attend(self, query: Tensor, options: AttentionOptions) -> Tensor:
        """Attend with ``query [heads, tokens, width]``; return ``[tokens, heads, value width]``."""
        current, name = self.current, self.attention.name
        batch = current.running(name)
        if name not in current.written:
            raise UnsupportedModelError(
                f"{name} attends before it updates its cache: the runtime cannot drive this architecture"
            )
        if options.window != self.window:
            raise UnsupportedModelError(
                f"{name} attends in a window of {options.window} tokens where its configuration says {self.window}: "
                "transformers applies it in a mask only, which the runtime does not build"
            )
        if self.attention.attention == "mla":
            output = self._attend_absorbed(query, batch, options)
        else:
            output = current.backend.attend(self.cache, query.transpose(0, 1), batch, options)
        current.attended.add(name)
        return output.to(query.dtype)

    def _attend_absorbed(self, query: Tensor, batch: Batch, options: AttentionOptions) -> Tensor:
        module: Any = self.attention.module
        nope, latent_dim = module.qk_nope_head_dim, module.kv_lora_rank
        weight = module.kv_b_proj.weight.view(query.shape[0], -1, latent_dim)
        absorbed = query[..., :nope] @ weight[:, :nope]
        absorbed = torch.cat((absorbed.transpose(0, 1), query[..., nope:].transpose(0, 1)), dim=-1)
        latent = self.current.backend.attend(self.cache, absorbed, batch, options)
        return torch.einsum("thl,hvl->thv", latent.to(query.dtype), weight[:, nope:])


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
    layer: _Layer = getattr(module, _LAYER)
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
    return layer.attend(query[0], options)[None], None


def _check_free(
    model: nn.Module, modules: Mapping[str, AttentionModule], cache: PagedCache
) -> None:
    kind = type(model).__name__
    if set(cache.layers) != set(modules):
        raise ValueError(
            f"the cache has the layers {sorted(cache.layers)}, but {kind} has {sorted(modules)}"
        )
    if any(hasattr(attention.module, _LAYER) for attention in modules.values()):
        raise ValueError(f"another ModelRunner holds this {kind}; close it first")


def _install(layer: _Layer, stack: ExitStack) -> None:
    """Bind an attention module to its layer until ``stack`` closes."""
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
