"""Which architectures the runtime can drive through a paged cache, and why it refuses the others.

The runtime packs the new tokens of all sequences into one row and keeps nothing of a sequence but the pages of its
attention layers. So a model is refused where a layer carries other state from token to token, where it takes a
token's position from the length of the row, or where attention needs more than the cached pair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from fp8kv.calibrate.modeling.tap import AttentionModule, find_attention_modules
from fp8kv.recipes.errors import UnsupportedModelError

_REMEDY = "serve it with vLLM or SGLang"

_PAGED_LAYERS = frozenset({"full_attention", "sliding_attention", "attention"})


def check_supported(model: nn.Module) -> dict[str, AttentionModule]:
    """Return the attention modules of a transformers model that the runtime can drive, by name, in model order.

    Raises:
        UnsupportedModelError: the runtime cannot drive it; the message names the reason.
    """
    config = text_config(model)
    for reason in _reasons_of_config(config):
        raise _refusal(config, reason)
    if any(getattr(module, "_is_stateful", False) for module in model.modules()):
        raise _refusal(config, "it carries a state per sequence beside the KV cache")
    modules = find_attention_modules(model)
    for reason in _reasons_of_modules(config, modules):
        raise _refusal(config, reason)
    return modules


def text_config(model: nn.Module) -> Any:
    """Return the configuration of the language model, also where a multimodal one wraps it."""
    config: Any = model.config
    return config.get_text_config()


def declared_window(config: Any, module: Any) -> int | None:
    """Return the sliding window in tokens that ``config`` gives an attention module, None where it sees all."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return window if layer_types[module.layer_idx] == "sliding_attention" else None
    return window if getattr(config, "use_sliding_window", True) else None


def _refusal(config: Any, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the runtime cannot drive {config.model_type}: {reason}; {_REMEDY}"
    )


def _reasons_of_config(config: Any) -> Iterator[str]:
    layer_types = set(getattr(config, "layer_types", None) or ())
    if config.model_type == "deepseek_v4":
        yield "its compressed entries and their indexer bypass the KV cache"
    if getattr(config, "index_topk", None) is not None or "indexed_attention" in layer_types:
        yield "its sparse attention (DSA) picks tokens with an indexer that has a cache of its own"
    if getattr(config, "num_kv_shared_layers", 0):
        yield f"its last {config.num_kv_shared_layers} layers share the KV cache of earlier ones"
    if "chunked_attention" in layer_types:
        yield (
            f"its layers of chunked attention (chunks of {getattr(config, 'attention_chunk_size', None)} tokens) "
            "do not tell the attention function where a chunk begins"
        )
    if getattr(config, "attn_temperature_tuning", False):
        yield "it tempers queries by their place in the row, which is not their position in a packed batch"
    if "linear_attention" in layer_types:
        yield "its layers of linear attention carry a state per sequence that is no KV cache"
    other = sorted(layer_types - _PAGED_LAYERS)
    if other:
        yield f"its layers of type {', '.join(other)} are unknown to the paged cache"
    if config.is_encoder_decoder:
        yield "it is an encoder-decoder, whose cross-attention reads no paged cache"
    for rope in _rope_parameters(config):
        kind = rope.get("rope_type")
        if kind == "dynamic" or (
            kind == "longrope" and rope.get("short_factor") != rope.get("long_factor")
        ):
            yield f"its {kind} RoPE turns every token by the length of the longest sequence in the batch"


def _reasons_of_modules(config: Any, modules: Mapping[str, AttentionModule]) -> Iterator[str]:
    if len(modules) != config.num_hidden_layers:
        yield f"only {len(modules)} of its {config.num_hidden_layers} layers keep a KV cache of their own"
    for name, attention in modules.items():
        module: Any = attention.module
        if not module.is_causal:
            yield f"{name} is not causal"
        if attention.attention == "mla":
            yield from _reasons_of_mla(name, module)


def _reasons_of_mla(name: str, module: Any) -> Iterator[str]:
    projection = getattr(module, "kv_b_proj", None)
    weight = getattr(projection, "weight", None)
    if not hasattr(module, "expand_kv") or not isinstance(weight, Tensor):
        yield f"{name} ({type(module).__name__}) has no expand_kv method with a kv_b_proj to absorb"
        return
    rows, columns = weight.shape
    if columns != module.kv_lora_rank or rows % (module.qk_nope_head_dim + module.v_head_dim):
        yield (
            f"{name}.kv_b_proj has the shape {[rows, columns]}, which is no whole number of heads of width "
            f"{module.qk_nope_head_dim} + {module.v_head_dim} over a latent of {module.kv_lora_rank}"
        )
    if weight.itemsize < 2 or not weight.is_floating_point():
        yield f"{name}.kv_b_proj is stored as {weight.dtype}, which cannot be absorbed"
    if getattr(projection, "bias", None) is not None:
        yield f"{name}.kv_b_proj has a bias, which cannot be absorbed"


def _rope_parameters(config: Any) -> Iterator[Mapping[str, Any]]:
    """Give the RoPE parameters: one set, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    yield from nested or [parameters]
