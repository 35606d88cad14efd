"""Tiny random models of every architecture that fp8kv calibrates, as real checkpoints on disk.

Sizes differ where they can (heads, key and value widths, latent and rope widths), so that a mix-up shows as a shape.
Every MLP is as small as the architecture allows; attention is what these models are for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 272  # 256 bytes, the special tokens, and a few that no text reaches
SPECIAL_TOKENS = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "pad_token": "<|pad|>"}


@dataclass(frozen=True)
class TinyModel:
    """One architecture.

    Attributes:
        model_type: transformers' name of it.
        config: what differs from the configuration class's defaults.
        layers: the attention modules that own a cache, by their checkpoint-side names.
        attention: ``gqa`` or ``mla``.
        class_name: the model class, where transformers' automatic class knows none.
        renamed: what transformers writes into a tensor's name, and what it is in published checkpoints.
    """

    model_type: str
    config: Mapping[str, Any]
    layers: tuple[str, ...]
    attention: str = "gqa"
    class_name: str | None = None
    renamed: tuple[str, str] | None = None


def _names(
    *layers: int, prefix: str = "model.layers", suffix: str = "self_attn"
) -> tuple[str, ...]:
    return tuple(f"{prefix}.{layer}.{suffix}" for layer in layers)


_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": 258,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
_WIDE = _COMMON | {"head_dim": 16}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MLA = _COMMON | {
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 20,
}
_MLA_EXPERTS = _MLA | _EXPERTS | {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1}
_MLA_EXPERTS |= {"topk_group": 1, "first_k_dense_replace": 1}
_DELTA_NET = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_experts": 4,
    "shared_expert_intermediate_size": 16,
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}
_SLIDING = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 14,
}
_SQUARE_VISION = _VISION | {"image_size": 28}

_BOTH = _names(0, 1)
_MODELS = (
    TinyModel("llama", _COMMON, _BOTH),
    TinyModel("mistral", _WIDE | {"sliding_window": 8}, _BOTH),
    TinyModel("mixtral", _COMMON | {"num_local_experts": 4}, _BOTH),
    TinyModel("qwen2", _COMMON, _BOTH),
    TinyModel("qwen3", _WIDE, _BOTH),
    TinyModel("qwen3_moe", _WIDE | _EXPERTS | {"num_experts": 4}, _BOTH),
    TinyModel("qwen3_next", _WIDE | _EXPERTS | _DELTA_NET, _names(3)),
    TinyModel("qwen3_5_moe_text", _WIDE | _EXPERTS | _DELTA_NET, _names(3)),
    TinyModel("gemma2", _WIDE | {"sliding_window": 8}, _BOTH),
    TinyModel("gemma3_text", _WIDE | _SLIDING, _BOTH),
    TinyModel(
        "gemma4_text",
        _WIDE
        | {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 8,
            "global_head_dim": 32,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCABULARY,
        },
        _BOTH,
    ),
    TinyModel(
        "gpt_oss",
        _WIDE | _SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2},
        _BOTH,
    ),
    TinyModel(
        "llama4_text",
        _WIDE
        | {
            "intermediate_size_mlp": 32,
            "num_local_experts": 4,
            "num_hidden_layers": 4,
            "attention_chunk_size": 16,
        },
        _names(0, 1, 2, 3),
    ),
    TinyModel(
        "minimax_m2",
        _WIDE | {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8},
        _BOTH,
    ),
    TinyModel(
        "minimax",
        _WIDE
        | {
            "num_local_experts": 4,
            "block_size": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
        _names(1),
    ),
    TinyModel(
        "glm4_moe",
        _WIDE
        | _EXPERTS
        | {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
        | {"use_qk_norm": True},
        _BOTH,
    ),
    TinyModel(
        "mimo_v2_flash",
        _WIDE
        | _EXPERTS
        | _SLIDING
        | {"n_routed_experts": 4, "head_dim": 24, "v_head_dim": 16}
        | {"mlp_layer_types": ["dense", "sparse"]},
        _BOTH,
    ),
    TinyModel("deepseek_v2", _MLA_EXPERTS, _BOTH, "mla"),
    TinyModel("deepseek_v3", _MLA_EXPERTS, _BOTH, "mla"),
    TinyModel("glm4_moe_lite", _MLA_EXPERTS, _BOTH, "mla"),
    TinyModel(
        "longcat_flash",
        {
            key: value
            for key, value in _MLA.items()
            if key not in ("intermediate_size", "num_hidden_layers")
        }
        | {
            "num_layers": 2,
            "ffn_hidden_size": 32,
            "head_dim": 8,
            "moe_topk": 2,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "expert_ffn_hidden_size": 16,
        },
        _names(0, suffix="self_attn.0")
        + _names(0, suffix="self_attn.1")
        + _names(1, suffix="self_attn.0")
        + _names(1, suffix="self_attn.1"),
        "mla",
    ),
    TinyModel(
        "mistral3",
        {
            "text_config": {"model_type": "mistral4"} | _MLA_EXPERTS,
            "vision_config": {"model_type": "pixtral"} | _SQUARE_VISION,
            "image_token_index": 259,
        },
        _names(0, 1, prefix="language_model.model.layers"),
        "mla",
        class_name="Mistral3ForConditionalGeneration",
    ),
    TinyModel(
        "kimi_linear",
        _MLA
        | {
            "q_lora_rank": None,
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
        },
        _names(3),
        "mla",
    ),
    TinyModel(
        "gemma3",
        {
            "text_config": _WIDE | _SLIDING,
            "vision_config": _SQUARE_VISION,
            "image_token_index": 259,
            "mm_tokens_per_image": 4,
        },
        _names(0, 1, prefix="language_model.model.layers"),
    ),
    TinyModel(
        "kimi_k25",
        {
            "text_config": {"model_type": "kimi_k2"} | _MLA_EXPERTS,
            "vision_config": _VISION | {"pos_emb_height": 4, "pos_emb_width": 4},
            "projection_hidden_size": 16,
            "image_token_id": 259,
            "video_token_id": 260,
            "vision_start_token_id": 261,
            "vision_end_token_id": 262,
            "tie_word_embeddings": False,
        },
        _names(0, 1, prefix="language_model.model.layers"),
        "mla",
        class_name="Kimi_K25ForConditionalGeneration",
        # transformers undoes its renaming of the vision tower's blocks in the language model, too
        renamed=("language_model.model.blocks", "language_model.model.layers"),
    ),
    TinyModel("minicpm3", _MLA, _BOTH, "mla"),
    TinyModel("youtu", _MLA, _BOTH, "mla"),
)

TINY_MODELS: Mapping[str, TinyModel] = {model.model_type: model for model in _MODELS}
"""The architectures by their ``model_type``."""


def save_tiny_model(model_type: str, directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the checkpoint of a tiny model with its tokenizer; always the same one."""
    tiny = TINY_MODELS[model_type]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _build(tiny)
        _disturb_vectors(model)
    model.to(dtype).save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    config["architectures"] = [type(model).__name__]
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    if tiny.renamed is not None:
        tensors = load_file(directory / "model.safetensors")
        save_file(
            {name.replace(*tiny.renamed): tensor for name, tensor in tensors.items()},
            directory / "model.safetensors",
            metadata={"format": "pt"},
        )
    save_byte_tokenizer(directory)


def save_byte_tokenizer(directory: Path) -> None:
    """Write a tokenizer whose ids 0 to 255 are bytes and 256 to 258 the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        token: number for number, token in enumerate([*alphabet, *SPECIAL_TOKENS.values()])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS).save_pretrained(directory)


def _build(tiny: TinyModel) -> Any:
    config = AutoConfig.for_model(tiny.model_type, **tiny.config)
    if tiny.class_name is not None:
        return getattr(transformers, tiny.class_name)(config)
    return AutoModelForCausalLM.from_config(config)


def _disturb_vectors(model: torch.nn.Module) -> None:
    """Make norm weights differ from 1 and biases from 0, so that leaving one out shows."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += torch.rand_like(parameter) - 0.5
