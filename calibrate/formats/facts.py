"""What calibration must know of a model, from its config and tensor names alone: no weights, no transformers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fp8kv.calibrate.formats.attention_modules import (
    LATENT_PROJECTION,
    StoredAttention,
    find_attention_modules,
    is_layer_tensor,
    require_int,
)
from fp8kv.calibrate.formats.checkpoint import Checkpoint
from fp8kv.calibrate.formats.json_text import read_object, show
from fp8kv.recipes.errors import CheckpointError, UnsupportedModelError

MODELOPT_FILE = "hf_quant_config.json"

_TEXT_CONFIGS = ("text_config", "language_config", "llm_config", "thinker_config")
_GEMMA4_GLOBAL_HEAD_DIM = 512  # the class default, which published configs may leave out

_SPARSE_REASON = (
    "its sparse attention (a DeepSeek-V3.2 style indexer) is served from a cache with one scale per token "
    "and tile, computed at run time (fp8_ds_mla), so no static scale exists"
)


@dataclass(frozen=True)
class LayerFacts:
    """One attention module that owns a KV cache.

    Attributes:
        index: transformers' ``layer_idx``: the number of its decoder layer, or ``2 * layer + i`` where a decoder
            layer has two attention modules (LongCat).
        name: its prefix in the checkpoint, e.g. ``model.layers.0.self_attn``.
    """

    index: int
    name: str


@dataclass(frozen=True)
class ModelFacts:
    """What calibration and the writer know of a model before any weight is read.

    Attributes:
        architecture: ``architectures[0]`` of the config.
        model_type: of the text model.
        attention: ``mla`` if the cache holds latent rows, else ``gqa`` (which includes MHA and MQA).
        layers: exactly the attention modules that own a KV cache, in model order.
        num_kv_heads: GQA: KV heads of a layer; None if it varies or the config leaves it to a class default.
        head_dim: GQA: width of a K and of a V head; None if it varies, if K and V differ, or as above.
        latent_dim: MLA: width of the latent, ``kv_lora_rank``; else None.
        rope_dim: MLA: width of the rope part, ``qk_rope_head_dim``; else None.
        quant_method: how the weights are quantised, in lower case, e.g. ``fp8``, ``compressed-tensors``; or None.
        quantization: the quantisation config as found, {} if there is none.
        quantization_location: key path of ``quantization`` inside ``config.json``; () if it is not there. A
            ModelOpt checkpoint may keep it in ``hf_quant_config.json`` instead: then this is () and
            ``quantization`` is not empty.
        static_scales: whether engines can use a static scale for this layout.
        reason: why not, as part of a sentence; empty if ``static_scales``.
    """

    architecture: str
    model_type: str
    attention: Literal["gqa", "mla"]
    layers: tuple[LayerFacts, ...]
    num_kv_heads: int | None
    head_dim: int | None
    latent_dim: int | None
    rope_dim: int | None
    quant_method: str | None
    quantization: Mapping[str, Any]
    quantization_location: tuple[str, ...]
    static_scales: bool
    reason: str


def model_facts(checkpoint: Checkpoint) -> ModelFacts:
    """Derive the facts of ``checkpoint``.

    Raises:
        CheckpointError: the config lacks a key that every config of its kind has, or layers are missing.
        UnsupportedModelError: no layer has a recognisable KV cache.
    """
    architecture = _architecture(checkpoint)
    config = text_config(checkpoint.config)
    modules = find_attention_modules(checkpoint, config)
    if not modules:
        raise UnsupportedModelError(_nothing_found(checkpoint, architecture, config))
    is_mla = any(module.projection == LATENT_PROJECTION for module in modules)
    if is_mla and config.get("kv_lora_rank") is None:
        raise CheckpointError(
            f"{checkpoint.path} has {LATENT_PROJECTION} tensors but its config.json has no kv_lora_rank; "
            "the two are not of one model"
        )
    num_kv_heads, head_dim = (None, None) if is_mla else _heads(checkpoint, config, modules)
    location, quantization = quantization_config(checkpoint)
    method = quantization.get("quant_method")
    sparse = _is_sparse(checkpoint, config)
    return ModelFacts(
        architecture=architecture,
        model_type=str(config.get("model_type") or checkpoint.config.get("model_type") or ""),
        attention="mla" if is_mla else "gqa",
        layers=tuple(LayerFacts(module.index, module.name) for module in modules),
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        latent_dim=require_int(checkpoint, config, "kv_lora_rank") if is_mla else None,
        # A latent without rotary part is possible.
        rope_dim=require_int(checkpoint, config, "qk_rope_head_dim", 0) if is_mla else None,
        quant_method=method.lower() if isinstance(method, str) else None,
        quantization=quantization,
        quantization_location=location,
        static_scales=not sparse,
        reason=_SPARSE_REASON if sparse else "",
    )


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of ``config`` that describes the text model: a nested config, or ``config`` itself."""
    for key in _TEXT_CONFIGS:
        nested = config.get(key)
        if isinstance(nested, dict) and nested:
            return text_config(nested)
    return config


def quantization_config(checkpoint: Checkpoint) -> tuple[tuple[str, ...], Mapping[str, Any]]:
    """Return where the quantisation config stands and what it says, looking where engines look, in their order.

    Returns:
        The key path inside ``config.json`` and the config: ``quantization_config``, the text model's
        ``quantization_config``, or ``compression_config``. Else () and what ModelOpt's ``hf_quant_config.json``
        says. Else () and {}.

    Raises:
        CheckpointError: the value is not an object.
    """
    paths: list[tuple[str, ...]] = [("quantization_config",)]
    paths += [(key, "quantization_config") for key in _TEXT_CONFIGS]
    paths += [("compression_config",)]
    for path in paths:
        value: Any = checkpoint.config
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None and not isinstance(value, dict):
            raise CheckpointError(
                f"{'.'.join(path)} in {checkpoint.path / 'config.json'} is {show(value)}, "
                "not an object; repair the config"
            )
        if value:
            return path, value
    if (checkpoint.path / MODELOPT_FILE).is_file():
        content, _ = read_object(checkpoint.path / MODELOPT_FILE)
        quantization = content.get("quantization")
        if isinstance(quantization, dict):
            return (), {"quant_method": "modelopt", **quantization}
    return (), {}


def _architecture(checkpoint: Checkpoint) -> str:
    names = checkpoint.config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'} names no architecture (architectures is {show(names)}); "
            "use the config that the model was published with"
        )
    return names[0]


def _is_sparse(checkpoint: Checkpoint, config: Mapping[str, Any]) -> bool:
    return config.get("index_topk") is not None or any(
        ".indexer." in name and is_layer_tensor(name) for name in checkpoint.weight_map
    )


def _heads(
    checkpoint: Checkpoint, config: Mapping[str, Any], modules: list[StoredAttention]
) -> tuple[int | None, int | None]:
    """Return KV heads and head width, each None where the config gives no single answer."""
    query_heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    stated_heads, stated_dim = config.get("num_key_value_heads"), config.get("head_dim")
    num_heads = query_heads if stated_heads is None else stated_heads
    head_dim = stated_dim
    if head_dim is None and hidden and query_heads:
        head_dim = hidden // query_heads
    global_dim = config.get("global_head_dim")
    if global_dim is None and str(config.get("model_type")).startswith("gemma4"):
        global_dim = _GEMMA4_GLOBAL_HEAD_DIM
    # Models whose global and sliding layers, or K and V, differ.
    other_heads = _others(
        config, "num_key_value_heads", "num_global_key_value_heads", "swa_num_key_value_heads"
    )
    num_heads = _single(num_heads, other_heads)
    other_dims = [
        global_dim,
        *_others(config, "head_dim", "v_head_dim", "swa_head_dim", "swa_v_head_dim"),
    ]
    head_dim = _single(head_dim, other_dims)
    if num_heads and head_dim and not _shapes_agree(checkpoint, modules, num_heads * head_dim):
        # The class has its own default for a key that the config leaves out.
        return _single(stated_heads, other_heads), None
    return num_heads, head_dim


def _others(config: Mapping[str, Any], key: str, *variants: str) -> list[Any]:
    """Return what the config says of ``key`` for some layers or streams only."""
    values = [config.get(variant) for variant in variants]
    per_layer = config.get("per_layer_config")
    if isinstance(per_layer, dict):
        values += [layer.get(key) for layer in per_layer.values() if isinstance(layer, dict)]
    return values


def _single(value: Any, others: Iterable[Any]) -> int | None:
    if type(value) is not int or any(other is not None and other != value for other in others):
        return None
    return value


def _shapes_agree(checkpoint: Checkpoint, modules: list[StoredAttention], rows: int) -> bool:
    """Tell whether every plain k_proj has ``rows`` rows; fused and transposed ones say nothing."""
    return all(
        checkpoint.entry(module.tensor).shape[:1] == (rows,)
        for module in modules
        if module.projection == "k_proj" and not module.tensor.endswith(".qweight")
    )


def _nothing_found(checkpoint: Checkpoint, architecture: str, config: Mapping[str, Any]) -> str:
    hint = f"; besides, {_SPARSE_REASON}" if config.get("index_topk") is not None else ""
    return (
        f"{architecture} in {checkpoint.path} has no layer with a KV cache that fp8kv knows: it looked for "
        "layers.N.self_attn with k_proj, qkv_proj or kv_a_proj_with_mqa among "
        f"{len(checkpoint.weight_map)} tensors{hint}"
    )
