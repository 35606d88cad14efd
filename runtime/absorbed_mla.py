"""Absorbed decoding for multi-head latent attention in an unmodified transformers model.

Transformers caches the latent, but expands the whole of it to K and V at every step. For a few new tokens it is far
cheaper to carry the query into the latent space and attend there (DeepSeek-V2, arXiv 2405.04434, section 2.1.2):
``q_nope @ W_uk`` against the latent, and the result back through ``W_uv``. The numbers are the same up to rounding.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from fp8kv.calibrate.modeling.tap import find_attention_modules
from fp8kv.recipes.errors import UnsupportedModelError

_NAME = "fp8kv_absorbed_mla"

_MAX_ABSORBED_TOKENS = 16
"""Above this many new tokens, expanding once costs less than attending in the wider latent space."""


@contextmanager
def absorbed_mla(model: nn.Module) -> Iterator[None]:
    """Decode absorbed while the context is open; models without MLA are left as they are.

    Raises:
        UnsupportedModelError: the attention class is not one whose ``expand_kv`` and ``kv_b_proj`` are understood.
    """
    modules = [a.module for a in find_attention_modules(model).values() if a.attention == "mla"]
    if not modules:
        yield
        return
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    config: Any = model.config
    before = config._attn_implementation
    with ExitStack() as stack:
        for module in modules:
            _check(module)
            hand_latent_through(module, stack)
        model.set_attn_implementation(_NAME)  # type: ignore[operator]
        stack.callback(model.set_attn_implementation, before)  # type: ignore[arg-type]
        yield


def hand_latent_through(module: nn.Module, stack: ExitStack) -> None:
    """Have an MLA module give its attention function the latent, not K and V expanded from it, until ``stack`` closes."""
    # an instance attribute shadows the method; deleting it brings the method back
    module.expand_kv = types.MethodType(_hand_through, module)  # type: ignore[assignment]
    stack.callback(delattr, module, "expand_kv")


def _hand_through(_module: nn.Module, latent: Tensor, rope: Tensor) -> tuple[Tensor, Tensor]:
    return latent, rope


def _attention(
    module: nn.Module,
    query: Tensor,
    latent: Tensor,
    rope: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend with ``query [batch, heads, new, nope + rope]`` over ``latent`` and ``rope [batch, 1, tokens, width]``."""
    if query.shape[2] > _MAX_ABSORBED_TOKENS:
        key, value = type(module).expand_kv(module, latent, rope)  # type: ignore[attr-defined]
        width = value.shape[-1]
        if query.device.type == "cpu" and width < query.shape[-1]:
            # torch's flash kernel for CPUs wants one width for all; without it, all scores are held at once
            value = nn.functional.pad(value, (0, query.shape[-1] - width))
        output, weights = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return output[..., :width], weights
    batch, num_heads, new, _ = query.shape
    nope, tokens = module.qk_nope_head_dim, latent.shape[2]
    weight = module.kv_b_proj.weight.view(num_heads, -1, latent.shape[-1])  # type: ignore[union-attr,operator]
    # einsum, not @: broadcasting over the batch would copy the weights once for each of its rows
    absorbed = torch.einsum("bhnd,hdl->bhnl", query[..., :nope], weight[:, :nope])
    # all heads read the same row: as one batch of queries, so that no head gets a copy of the cache
    scores = absorbed.flatten(1, 2) @ latent.squeeze(1).transpose(1, 2)
    scores = scores + query[..., nope:].flatten(1, 2) @ rope.squeeze(1).transpose(1, 2)
    scores = (scores * scaling).view(batch, num_heads, new, tokens)
    # not -inf: padding sees nothing at all, and its NaN would enter the cache that the other tokens read
    masked = torch.finfo(scores.dtype).min
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, masked)
    elif new > 1:
        future = torch.ones(new, tokens, dtype=torch.bool, device=query.device)
        scores = scores.masked_fill(future.triu(tokens - new + 1), masked)
    probabilities = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    output = probabilities.flatten(1, 2) @ latent.squeeze(1)
    output = output.view(batch, num_heads, new, -1)
    return torch.einsum("bhnl,hvl->bnhv", output, weight[:, nope:]), None


def _check(module: nn.Module) -> None:
    weight = getattr(getattr(module, "kv_b_proj", None), "weight", None)
    if not hasattr(module, "expand_kv") or not isinstance(weight, Tensor):
        raise UnsupportedModelError(
            f"{type(module).__name__} has no expand_kv method with a kv_b_proj: "
            "this transformers version builds MLA in a way that fp8kv does not know"
        )
