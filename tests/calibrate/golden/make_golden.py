"""Make the golden files again: ``python tests/calibrate/golden/make_golden.py`` from outside the repository root.

``sources/`` holds tiny checkpoints in the layouts that models are published in: names and configs are real in form,
weights are a few numbers. ``overlays/<source>--<targets>/`` holds the files that fp8kv writes for them. Look at the
difference before committing: an engine's loader reads these bytes.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from fp8kv.calibrate.formats.checkpoint import open_checkpoint
from fp8kv.calibrate.formats.facts import model_facts
from fp8kv.calibrate.overlay.plan import plan_overlay
from fp8kv.calibrate.scales import LayerScales, ScaleSet

HERE = Path(__file__).parent
OVERLAYS = [
    ("llama-bf16", "vllm+sglang"),
    ("llama-bf16", "modelopt"),
    ("llama-bf16", "vllm+head"),
    ("qwen2-bf16", "vllm+sglang+transformers"),
    ("minimax-fp8", "vllm+sglang"),
    ("llama-int4", "vllm+sglang"),
    ("llama-modelopt", "vllm+modelopt"),
    ("deepseek-bf16", "vllm+sglang"),
    ("deepseek-bf16", "transformers"),
    ("deepseek-fp8", "vllm+sglang"),
    ("kimi-int4", "vllm+sglang"),
]


def scales_for(facts, granularity="tensor"):
    """Return scales that are easy to read back: 1/64 for K of layer 0, then steps of a power of two."""
    heads = facts.num_kv_heads if granularity == "head" else 1
    layers = []
    for position, layer in enumerate(facts.layers):
        k = tuple(2.0 ** (position - 6) * (1 + head / 8) for head in range(heads))
        v = k if facts.attention == "mla" else tuple(2 * value for value in k)
        layers.append(LayerScales(layer.index, layer.name, k, v))
    return ScaleSet(facts.attention, "e4m3fn", granularity, tuple(layers))


def plan_for(source, name):
    """Plan the overlay called ``name``: targets joined by ``+``, with ``head`` for one scale per KV head."""
    checkpoint = open_checkpoint(source)
    facts = model_facts(checkpoint)
    words = name.split("+")
    granularity = "head" if "head" in words else "tensor"
    targets = [word for word in words if word != "head"]
    return plan_overlay(checkpoint, facts, scales_for(facts, granularity), targets)


def main():
    shutil.rmtree(HERE / "sources", ignore_errors=True)
    shutil.rmtree(HERE / "overlays", ignore_errors=True)
    make_sources(HERE / "sources")
    for source, name in OVERLAYS:
        plan = plan_for(HERE / "sources" / source, name)
        directory = HERE / "overlays" / f"{source}--{name}"
        directory.mkdir(parents=True)
        for file, content in plan.new_files.items():
            if not file.startswith("fp8kv/"):
                (directory / file).write_bytes(content)


def make_sources(root):
    llama = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "num_hidden_layers": 2,
        "torch_dtype": "bfloat16",
        "vocab_size": 16,
        "a_key_that_no_library_knows": {"kept": True},
    }
    int4 = {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}},
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }
    fp8 = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
    }
    deepseek = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "hidden_size": 8,
        "kv_lora_rank": 4,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "num_nextn_predict_layers": 1,
        "qk_nope_head_dim": 2,
        "qk_rope_head_dim": 2,
        "v_head_dim": 2,
    }
    write(root / "llama-bf16", llama, gqa("model.", 2, 8), shards=2)
    write(
        root / "qwen2-bf16",
        llama | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
        gqa("model.", 2, 8),
        indent=4,
        line_end="\r\n",
    )
    write(
        root / "minimax-fp8",
        llama
        | {
            "architectures": ["MiniMaxM2ForCausalLM"],
            "model_type": "minimax_m2",
            "quantization_config": fp8,
        },
        gqa("model.", 2, 8, scale=".weight_scale_inv"),
        shards=2,
    )
    write(
        root / "llama-int4", llama | {"quantization_config": int4}, gqa("model.", 2, 8, packed=True)
    )
    write(
        root / "llama-modelopt",
        llama
        | {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": []}},
        gqa("model.", 2, 8, scale=".weight_scale"),
    )
    modelopt = {
        "producer": {"name": "modelopt", "version": "0.40.0"},
        "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None},
    }
    (root / "llama-modelopt" / "hf_quant_config.json").write_text(json.dumps(modelopt, indent=4))
    write(root / "deepseek-bf16", deepseek, mla("model.", 3))
    write(
        root / "deepseek-fp8",
        deepseek | {"quantization_config": fp8},
        mla("model.", 3, scale=".weight_scale_inv"),
        shards=2,
    )
    write(
        root / "kimi-int4",
        {
            "architectures": ["KimiK25ForConditionalGeneration"],
            "model_type": "kimi_k25",
            "text_config": deepseek | {"quantization_config": int4},
        },
        mla("language_model.model.", 3, packed=True),
        shards=2,
    )


def gqa(prefix, layers, hidden, scale=None, packed=False):
    tensors = {f"{prefix}embed_tokens.weight": torch.zeros(16, hidden, dtype=torch.bfloat16)}
    for layer in range(layers):
        for projection in "qkvo":
            name = f"{prefix}layers.{layer}.self_attn.{projection}_proj"
            rows = 16 if projection == "q" else 8
            tensors |= weight(name, rows, hidden, scale, packed)
    return tensors


def mla(prefix, layers, scale=None, packed=False):
    tensors = {f"{prefix}embed_tokens.weight": torch.zeros(16, 8, dtype=torch.bfloat16)}
    for layer in range(layers):  # the last one is the multi-token-prediction head
        name = f"{prefix}layers.{layer}.self_attn"
        tensors |= weight(f"{name}.kv_a_proj_with_mqa", 6, 8, scale, packed)
        tensors |= weight(f"{name}.kv_b_proj", 8, 4, scale, packed)
        tensors[f"{name}.kv_a_layernorm.weight"] = torch.ones(4, dtype=torch.bfloat16)
    return tensors


def weight(name, rows, columns, scale, packed):
    if packed:
        return {
            f"{name}.weight_packed": torch.zeros(rows, 1, dtype=torch.int32),
            f"{name}.weight_scale": torch.ones(rows, 1, dtype=torch.bfloat16),
            f"{name}.weight_shape": torch.tensor([rows, columns]),
        }
    values = torch.zeros(rows, columns, dtype=torch.bfloat16)
    if scale is None:
        return {f"{name}.weight": values}
    return {f"{name}.weight": values.to(torch.float8_e4m3fn), f"{name}{scale}": torch.ones(1, 1)}


def write(directory, config, tensors, shards=1, indent=2, line_end="\n"):
    directory.mkdir(parents=True)
    text = json.dumps(config, indent=indent) + "\n"
    (directory / "config.json").write_bytes(text.replace("\n", line_end).encode())
    (directory / "tokenizer_config.json").write_text("{}\n")
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        part = names[shard * len(names) // shards : (shard + 1) * len(names) // shards]
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file(
            {name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"}
        )
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


if __name__ == "__main__":
    main()
