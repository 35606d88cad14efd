"""Drive an unmodified transformers model over a paged KV cache.

The new tokens of all sequences go through the model as one row, ``[1, tokens]``, with their positions. At every
attention module a tap takes what the module would cache, and a registered attention function has the backend write it
into the pages and attend over them, so the model builds no mask and keeps no cache of its own. An MLA module's
``expand_kv`` hands the latent through, and attention runs absorbed
(:mod:`fp8kv.runtime.latent_projection`), or as the backend chooses. A backend that rotates while it writes is left the
rotation, too (:mod:`fp8kv.runtime.deferred_rope`).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fp8kv.calibrate.modeling.tap import AttentionModule, tap
from fp8kv.recipes.errors import RequestError, UnsupportedModelError
from fp8kv.runtime.architectures import check_supported, declared_window, text_config
from fp8kv.runtime.backends import AttendsLatents, Backend, PreparesPrefill
from fp8kv.runtime.batch import Batch
from fp8kv.runtime.checks import check_choice
from fp8kv.runtime.deferred_rope import DeferredRope, defer_rope
from fp8kv.runtime.paged_attention import ForwardPass, PagedLayer, hold_module, is_held
from fp8kv.runtime.paged_cache import PagedCache

Prefill = Literal["fp8", "bf16"]
"""What a prompt's own tokens are attended as: what the cache holds of them, as later steps read it, or K and V as
they were computed."""


class ModelRunner:
    """Compute logits of packed batches; the cache is filled on the way.

    The model belongs to the runner until :meth:`close`, which leaves it as it was found; a runner is a context
    manager that closes itself. The runner itself never waits for the device, so that a forward can be captured in a
    CUDA graph where the model's own code can.

    Attributes:
        cache: the pages that the model writes and reads.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: PagedCache,
        backend: Backend,
        prefill: Prefill = "fp8",
    ) -> None:
        """Take over ``model``, a transformers model in evaluation mode.

        Args:
            model: its weights stay where they are.
            cache: built for this model.
            backend: attends.
            prefill: ``fp8`` reads new tokens back from the cache, so that a prompt gives the same numbers however it
                is cut into chunks; ``bf16`` takes them as the model computed them, as vLLM and SGLang do by default.
                Backends that do not :class:`~fp8kv.runtime.backends.PreparesPrefill` know ``bf16`` only.

        Raises:
            UnsupportedModelError: the model's attention cannot be driven through a paged cache.
            RequestError: another runner holds the model, or ``prefill`` is neither.
            ValueError: the cache was built for another model.
        """
        check_choice("prefill", prefill, get_args(Prefill))
        modules = check_supported(model)
        check_free(model, modules)
        _check_cache(model, modules, cache)
        self.cache = cache
        self._model = model
        # asked once: isinstance is slow on protocols
        hook = backend if prefill == "fp8" and isinstance(backend, PreparesPrefill) else None
        latents = backend if isinstance(backend, AttendsLatents) else None
        self._pass = ForwardPass(backend, hook, latents)
        config = text_config(model)
        with ExitStack() as stack:
            ropes = _defer_rope(model, modules, cache, hook, stack)
            for name, attention in modules.items():
                window = declared_window(config, attention.module)
                layer = PagedLayer(
                    attention, cache.layers[name], window, self._pass, ropes.get(name)
                )
                hold_module(layer, stack)
                self._pass.layers[name] = layer
            stack.enter_context(tap(modules, self._pass.note))
            self._held = stack.pop_all()

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits of each sequence's last new token, float32 ``[sequences, vocabulary]``."""
        return self._run(batch, batch.cu_seqlens[1:].to(torch.int64) - 1).float()

    def logits_at(self, batch: Batch, rows: Tensor) -> Tensor:
        """Return the logits of some new tokens, ``[wanted, vocabulary]``, in the model's dtype.

        Args:
            batch: the new tokens.
            rows: [wanted] int64, which of them.
        """
        return self._run(batch, rows)

    def close(self) -> None:
        """Leave the model as it was found; closing twice does nothing."""
        self._held.close()
        self._pass.layers.clear()

    def __enter__(self) -> ModelRunner:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    @torch.no_grad()
    def _run(self, batch: Batch, kept: Tensor) -> Tensor:
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


def check_free(model: nn.Module, modules: Mapping[str, AttentionModule]) -> None:
    """Refuse a model that a runner holds.

    Args:
        model: of transformers.
        modules: its attention modules.

    Raises:
        RequestError: one does.
    """
    if any(is_held(attention.module) for attention in modules.values()):
        raise RequestError(
            f"this {type(model).__name__} is in use: close the LLM that runs it, or load it once more"
        )


def _check_cache(
    model: nn.Module, modules: Mapping[str, AttentionModule], cache: PagedCache
) -> None:
    if set(cache.layers) != set(modules):
        raise ValueError(
            f"the cache has the layers {sorted(cache.layers)}, but {type(model).__name__} has {sorted(modules)}"
        )


def _defer_rope(
    model: nn.Module,
    modules: Mapping[str, AttentionModule],
    cache: PagedCache,
    hook: PreparesPrefill | None,
    stack: ExitStack,
) -> dict[str, DeferredRope]:
    """Leave RoPE to the backend in the layers where it gains by it."""
    if hook is None:
        return {}
    chosen = {
        name: attention
        for name, attention in modules.items()
        if hook.fuses_rope(cache.layers[name])
    }
    return defer_rope(model, chosen, stack)
