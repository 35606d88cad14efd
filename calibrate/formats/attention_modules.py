"""Find the attention modules of a checkpoint that own a KV cache, by config and tensor names.

A layer owns a KV cache if its attention projects keys (``k_proj``, a fused ``qkv_proj``, or the latent projection
``kv_a_proj_with_mqa`` of multi-head latent attention, MLA), the config does not call it linear attention, it does
not share another layer's cache, and it belongs to the model proper and not to a multi-token-prediction (MTP) head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fp8kv.calibrate.formats.checkpoint import Checkpoint
from fp8kv.calibrate.formats.json_text import show
from fp8kv.recipes.errors import CheckpointError

LATENT_PROJECTION = "kv_a_proj_with_mqa"

# Only wrappers of the text model: the attention of vision towers, audio encoders and draft heads must not match.
_LAYER = (
    r"(?:(?:model|language_model|text_model|thinker|transformer|backbone|llm)\.)*"
    r"layers\.(?P<layer>\d+)\."
)
_IN_LAYER = re.compile(_LAYER)
_PROJECTION = re.compile(
    rf"(?P<name>{_LAYER}(?:self_attn|attention|attn|mixer)(?:\.(?P<sub>\d+))?)\."
    rf"(?P<projection>k_proj|qkv_proj|{LATENT_PROJECTION})\.(?:weight|weight_packed|qweight)"
)
_CACHELESS_TYPES = ("linear", "mamba", "conv", "recurrent", "delta", "mlp", "moe")


@dataclass(frozen=True)
class StoredAttention:
    """An attention module that owns a KV cache.

    Attributes:
        layer: its decoder layer.
        index: its position among the model's caches; differs from ``layer`` where a decoder layer has two.
        name: its prefix in the checkpoint.
        projection: ``k_proj``, ``qkv_proj`` or ``kv_a_proj_with_mqa``.
        tensor: the stored weight of that projection.
    """

    layer: int
    index: int
    name: str
    projection: str
    tensor: str


def find_attention_modules(
    checkpoint: Checkpoint, config: Mapping[str, Any]
) -> list[StoredAttention]:
    """Return the attention modules that own a cache, in model order; empty if there are none.

    Where there are latent projections and ``config`` has a ``kv_lora_rank``, only those count: the other layers of
    such a hybrid (Kimi-Linear) have a ``k_proj``, too, but no KV cache.

    Args:
        checkpoint: the checkpoint.
        config: the text model's part of its config.

    Raises:
        CheckpointError: the config has no layer count, or the checkpoint lacks layers.
    """
    num_layers = _num_layers(checkpoint, config)
    _require_layers(checkpoint, num_layers)
    num_own = num_layers - (config.get("num_kv_shared_layers") or 0)
    cacheless = _cacheless_layers(config)
    matches = [
        match
        for tensor in checkpoint.weight_map
        if (match := _PROJECTION.fullmatch(tensor))
        and int(match["layer"]) < num_own
        and int(match["layer"]) not in cacheless
        and not _is_lightning(checkpoint, match["name"])
    ]
    if config.get("kv_lora_rank") is not None and any(
        match["projection"] == LATENT_PROJECTION for match in matches
    ):
        matches = [match for match in matches if match["projection"] == LATENT_PROJECTION]
    modules = _in_order(matches)
    if modules:
        _require_attention(checkpoint, config, {module.layer for module in modules}, num_own)
    return modules


def is_layer_tensor(name: str) -> bool:
    """Tell whether the tensor called ``name`` belongs to a decoder layer of the text model."""
    return _IN_LAYER.match(name) is not None


def require_int(
    checkpoint: Checkpoint, config: Mapping[str, Any], key: str, minimum: int = 1
) -> int:
    """Return ``config[key]``.

    Raises:
        CheckpointError: it is missing, not an integer, or below ``minimum``.
    """
    value = config.get(key)
    if type(value) is not int or value < minimum:
        raise CheckpointError(
            f"{key} in {checkpoint.path / 'config.json'} is {show(value)}, not an integer of at least "
            f"{minimum}; use the config that the model was published with"
        )
    return value


def _num_layers(checkpoint: Checkpoint, config: Mapping[str, Any]) -> int:
    if config.get("model_type") == "longcat_flash" and config.get("num_layers") is not None:
        # Two attentions a layer: transformers derives num_hidden_layers as twice this number.
        return require_int(checkpoint, config, "num_layers")
    layer_types = _layer_types(config)
    if config.get("num_hidden_layers") is None and layer_types:
        return len(layer_types)
    return require_int(checkpoint, config, "num_hidden_layers")


def _layer_types(config: Mapping[str, Any]) -> list[Any]:
    """Return the kind of each layer, empty if the config does not list them."""
    kinds = config.get("layer_types") or config.get("layers_block_type")  # the latter: Nemotron-H
    return kinds if isinstance(kinds, list) else []


def _cacheless_layers(config: Mapping[str, Any]) -> set[int]:
    """Return the layers whose attention, if they have any, keeps a state and not a KV cache."""
    layer_types = _layer_types(config)
    if layer_types:
        return {layer for layer, kind in enumerate(layer_types) if _is_cacheless(kind)}
    attn_types = config.get(
        "attn_type_list"
    )  # MiniMax: 1 is softmax attention, 0 is lightning attention
    if isinstance(attn_types, list):
        return {layer for layer, kind in enumerate(attn_types) if kind == 0}
    return set()


def _is_cacheless(kind: object) -> bool:
    # By what is known to have no cache, so that a new kind of attention is not dropped in silence.
    return isinstance(kind, str) and any(word in kind for word in _CACHELESS_TYPES)


def _is_lightning(checkpoint: Checkpoint, name: str) -> bool:
    """Tell MiniMax's lightning attention, whose fused qkv_proj looks like any other, by its output gate."""
    return any(
        f"{name}.output_gate.{weight}" in checkpoint.weight_map
        for weight in ("weight", "weight_packed", "qweight")
    )


def _in_order(matches: list[re.Match[str]]) -> list[StoredAttention]:
    num_subs = 1 + max((int(match["sub"] or 0) for match in matches), default=0)
    modules = {}
    for match in matches:
        layer = int(match["layer"])
        index = layer * num_subs + int(match["sub"] or 0)
        modules[match["name"]] = StoredAttention(
            layer, index, match["name"], match["projection"], match.string
        )
    return sorted(modules.values(), key=lambda module: module.index)


def _require_layers(checkpoint: Checkpoint, num_layers: int) -> None:
    matches = (_IN_LAYER.match(name) for name in checkpoint.weight_map)
    present = {int(match["layer"]) for match in matches if match}
    absent = [layer for layer in range(num_layers) if layer not in present]
    # Without any known layer the architecture is unknown, which is another error.
    if present and absent:
        raise CheckpointError(
            f"{checkpoint.path} has no tensors for layer {absent[0]} of the {num_layers} in its "
            f"config.json ({len(absent)} such layers); download the missing shards"
        )


def _require_attention(
    checkpoint: Checkpoint, config: Mapping[str, Any], owned: set[int], num_own: int
) -> None:
    for layer, kind in enumerate(_layer_types(config)[:num_own]):
        if "attention" in str(kind) and not _is_cacheless(kind) and layer not in owned:
            raise CheckpointError(
                f"layer {layer} of {checkpoint.path} is {show(kind)} by its config.json but has no "
                "attention projection; the two are not of one model"
            )
