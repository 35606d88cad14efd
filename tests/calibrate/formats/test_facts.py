"""Model facts from config and tensor names, for every architecture that is known."""

import json

import pytest
import torch
from safetensors.torch import save_file

from fp8kv.calibrate.formats.checkpoint import open_checkpoint
from fp8kv.calibrate.formats.facts import LayerFacts, model_facts, quantization_config, text_config
from fp8kv.recipes.errors import CheckpointError, UnsupportedModelError

HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 4, 2, 3, 8
GQA = {
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_size": HIDDEN,
}
MLA = {
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "hidden_size": HIDDEN,
    "head_dim": 999,  # must never be looked at
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
}
SEPARATE = ("q_proj", "k_proj", "v_proj", "o_proj")
LATENT = ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
LINEAR = ("linear_attn.in_proj_qkvz", "linear_attn.conv1d", "linear_attn.A_log")


def attention(projections, layers, prefix="model.layers", module="self_attn"):
    return {f"{prefix}.{layer}.{module}.{name}.weight" for layer in layers for name in projections}


def mlp(layers, prefix="model.layers"):
    return {f"{prefix}.{layer}.mlp.gate.weight" for layer in layers}


def facts_of(path, architecture, config, names, rows=KV_HEADS * HEAD_DIM):
    """Write a checkpoint of tiny tensors with these names, and derive its facts."""
    config = {"architectures": [architecture], **config}
    (path / "config.json").write_text(json.dumps(config))
    tensors = {name: torch.zeros(rows, 1) for name in sorted(names)}
    save_file(tensors, path / "model.safetensors")
    return model_facts(open_checkpoint(path))


def layer_names(layers, prefix="model.layers", module="self_attn"):
    return tuple(LayerFacts(layer, f"{prefix}.{layer}.{module}") for layer in layers)


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [
        ("LlamaForCausalLM", "llama"),
        ("MistralForCausalLM", "mistral"),
        ("MixtralForCausalLM", "mixtral"),
        ("Qwen2ForCausalLM", "qwen2"),
        ("Qwen3ForCausalLM", "qwen3"),
        ("Qwen3MoeForCausalLM", "qwen3_moe"),
        ("Gemma2ForCausalLM", "gemma2"),
        ("Gemma3ForCausalLM", "gemma3_text"),
        ("GptOssForCausalLM", "gpt_oss"),
        ("MiniMaxM2ForCausalLM", "minimax_m2"),
        ("Glm4MoeForCausalLM", "glm4_moe"),
    ],
)
def test_gqa(tmp_path, architecture, model_type):
    config = {**GQA, "model_type": model_type}
    facts = facts_of(tmp_path, architecture, config, attention(SEPARATE, range(4)))
    assert facts.architecture == architecture
    assert facts.model_type == model_type
    assert facts.attention == "gqa"
    assert facts.layers == layer_names(range(4))
    assert (facts.num_kv_heads, facts.head_dim) == (KV_HEADS, HEAD_DIM)
    assert (facts.latent_dim, facts.rope_dim) == (None, None)
    assert (facts.static_scales, facts.reason) == (True, "")
    assert (facts.quant_method, facts.quantization, facts.quantization_location) == (None, {}, ())


@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [
        ("DeepseekV2ForCausalLM", "deepseek_v2"),
        ("DeepseekV3ForCausalLM", "deepseek_v3"),
        ("DeepseekV3ForCausalLM", "kimi_k2"),
        ("Glm4MoeLiteForCausalLM", "glm4_moe_lite"),
        ("Mistral4ForCausalLM", "mistral4"),
        ("MiniCPM3ForCausalLM", "minicpm3"),
        ("YoutuForCausalLM", "youtu"),
    ],
)
def test_mla(tmp_path, architecture, model_type):
    config = {**MLA, "model_type": model_type}
    facts = facts_of(tmp_path, architecture, config, attention(LATENT, range(4)))
    assert facts.attention == "mla"
    assert facts.layers == layer_names(range(4))
    assert (facts.latent_dim, facts.rope_dim) == (16, 4)
    assert (facts.num_kv_heads, facts.head_dim) == (None, None)
    assert facts.static_scales


def test_mla_without_rotary_part(tmp_path):
    config = {**MLA, "model_type": "kimi_linear", "qk_rope_head_dim": 0}
    facts = facts_of(tmp_path, "X", config, attention(LATENT, range(4)))
    assert facts.rope_dim == 0


def test_a_kv_lora_rank_alone_makes_no_mla(tmp_path):
    config = {**GQA, "kv_lora_rank": None, "model_type": "deepseek_v2"}
    facts = facts_of(tmp_path, "X", config, attention(SEPARATE, range(4)))
    assert facts.attention == "gqa"
    config = {**config, "kv_lora_rank": 512}
    assert facts_of(tmp_path, "X", config, attention(SEPARATE, range(4))).attention == "gqa"


def test_fused_projection_of_phi3(tmp_path):
    names = attention(("qkv_proj", "o_proj"), range(4))
    config = {**GQA, "model_type": "phi3", "head_dim": None, "hidden_size": HEADS * HEAD_DIM}
    facts = facts_of(tmp_path, "Phi3ForCausalLM", config, names, rows=24)
    assert facts.layers == layer_names(range(4))
    assert (facts.num_kv_heads, facts.head_dim) == (KV_HEADS, HEAD_DIM)


def test_head_dim_from_hidden_size(tmp_path):
    config = {**GQA, "model_type": "llama", "hidden_size": HEADS * HEAD_DIM}
    del config["head_dim"]
    facts = facts_of(tmp_path, "LlamaForCausalLM", config, attention(SEPARATE, range(4)))
    assert facts.head_dim == HEAD_DIM


def test_no_kv_heads_means_as_many_as_queries(tmp_path):
    config = {**GQA, "model_type": "llama", "num_key_value_heads": None}
    names = attention(SEPARATE, range(4))
    facts = facts_of(tmp_path, "X", config, names, rows=HEADS * HEAD_DIM)
    assert (facts.num_kv_heads, facts.head_dim) == (HEADS, HEAD_DIM)


def test_head_facts_that_the_config_leaves_to_class_defaults_are_unknown(tmp_path):
    # As google/gemma-3-4b-it: neither heads nor head_dim in the text config.
    text = {"num_hidden_layers": 4, "hidden_size": HIDDEN, "model_type": "gemma3_text"}
    names = attention(SEPARATE, range(4), "language_model.model.layers")
    facts = facts_of(tmp_path, "Gemma3ForConditionalGeneration", {"text_config": text}, names)
    assert (facts.num_kv_heads, facts.head_dim) == (None, None)
    # hidden_size / num_attention_heads is 2, the class default is not.
    config = {**GQA, "model_type": "qwen3"}
    del config["head_dim"]
    facts = facts_of(tmp_path, "Qwen3ForCausalLM", config, attention(SEPARATE, range(4)))
    assert (facts.num_kv_heads, facts.head_dim) == (KV_HEADS, None)


@pytest.mark.parametrize(
    ("architecture", "model_type", "prefix"),
    [
        ("Qwen3NextForCausalLM", "qwen3_next", "model.layers"),
        ("Qwen3_5MoeForConditionalGeneration", "qwen3_5_moe_text", "model.language_model.layers"),
    ],
)
@pytest.mark.parametrize("with_layer_types", [True, False])
def test_only_full_attention_of_qwen_hybrids(
    tmp_path, architecture, model_type, prefix, with_layer_types
):
    text = {**GQA, "model_type": model_type, "full_attention_interval": 4}
    if with_layer_types:
        text["layer_types"] = ["linear_attention"] * 3 + ["full_attention"]
    names = attention(SEPARATE, [3], prefix) | mlp(range(4), prefix)
    names |= {f"{prefix}.{layer}.{name}" for layer in range(3) for name in LINEAR}
    names |= attention(SEPARATE, [0], "mtp.layers")
    names |= attention(("k_proj",), range(4), "model.visual.blocks", "attn")
    config = text if prefix == "model.layers" else {"text_config": text, "model_type": "wrapper"}
    facts = facts_of(tmp_path, architecture, config, names)
    assert facts.layers == layer_names([3], prefix)
    assert facts.model_type == model_type


@pytest.mark.parametrize(
    "prefix", ["language_model.model.layers", "model.language_model.layers", "model.layers"]
)
def test_multimodal_wrappers_and_their_towers(tmp_path, prefix):
    names = attention(SEPARATE, range(4), prefix)
    names |= attention(SEPARATE, range(4), "vision_tower.vision_model.encoder.layers")
    names |= attention(SEPARATE, range(4), "model.vision_tower.encoder.layers")
    names |= attention(SEPARATE, range(4), "audio_tower.layers")
    text = {**GQA, "model_type": "gemma3_text"}
    facts = facts_of(tmp_path, "Gemma3ForConditionalGeneration", {"text_config": text}, names)
    assert facts.layers == layer_names(range(4), prefix)
    assert facts.model_type == "gemma3_text"


def test_llama4(tmp_path):
    prefix = "language_model.model.layers"
    kinds = ["chunked_attention"] * 3 + ["full_attention"]
    text = {**GQA, "model_type": "llama4_text", "layer_types": kinds}
    names = attention(SEPARATE, range(4), prefix)
    names |= attention(SEPARATE, range(2), "vision_model.model.layers")
    config = {"model_type": "llama4", "text_config": text}
    facts = facts_of(tmp_path, "Llama4ForConditionalGeneration", config, names)
    assert facts.layers == layer_names(range(4), prefix)
    assert (facts.num_kv_heads, facts.head_dim) == (KV_HEADS, HEAD_DIM)


@pytest.mark.parametrize("shared_tensors", [True, False])
def test_gemma4_layers_that_share_a_cache(tmp_path, shared_tensors):
    config = {
        **GQA,
        "model_type": "gemma4_text",
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    }
    names = attention(SEPARATE, range(4 if shared_tensors else 2)) | mlp(range(4))
    facts = facts_of(tmp_path, "Gemma4ForCausalLM", config, names)
    assert facts.layers == layer_names([0, 1])
    # The global layers have heads of another width, 512 by the class default.
    assert (facts.num_kv_heads, facts.head_dim) == (KV_HEADS, None)


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"v_head_dim": 2, "swa_head_dim": HEAD_DIM}, (KV_HEADS, None)),
        ({"swa_num_key_value_heads": 8}, (None, HEAD_DIM)),
        ({"num_global_key_value_heads": 1, "global_head_dim": 6}, (None, None)),
        ({"per_layer_config": {"1": {"num_key_value_heads": 1}}}, (None, HEAD_DIM)),
        ({"per_layer_config": {"1": {"head_dim": 7}}}, (KV_HEADS, None)),
        ({"v_head_dim": HEAD_DIM, "swa_num_key_value_heads": KV_HEADS}, (KV_HEADS, HEAD_DIM)),
    ],
)
def test_heads_that_vary_by_layer_or_stream_are_not_named(tmp_path, extra, expected):
    config = {**GQA, "model_type": "mimo_v2_flash", **extra}
    facts = facts_of(tmp_path, "MiMoV2FlashForCausalLM", config, attention(SEPARATE, range(4)))
    assert (facts.num_kv_heads, facts.head_dim) == expected


LIGHTNING = ("qkv_proj", "out_proj", "output_gate", "norm")


@pytest.mark.parametrize(
    "kinds",
    [
        {"layer_types": ["linear_attention"] * 3 + ["full_attention"]},
        {"attn_type_list": [0, 0, 0, 1]},
        {},
    ],
)
def test_only_softmax_attention_of_minimax_text(tmp_path, kinds):
    names = attention(LIGHTNING, range(3)) | attention(SEPARATE, [3])
    config = {**GQA, "model_type": "minimax", **kinds}
    facts = facts_of(tmp_path, "MiniMaxText01ForCausalLM", config, names)
    assert facts.layers == layer_names([3])


def test_a_layer_type_list_decides_where_tensors_look_alike(tmp_path):
    names = attention(("qkv_proj", "o_proj"), range(2))
    config = {**GQA, "num_hidden_layers": 2, "attn_type_list": [0, 1]}
    assert facts_of(tmp_path, "X", config, names).layers == layer_names([1])


@pytest.mark.parametrize(
    "kinds",
    [
        {"linear_attn_config": {"full_attn_layers": [4], "kda_layers": [1, 2, 3]}},
        {"layer_types": ["linear_attention"] * 3 + ["full_attention"]},
    ],
)
def test_only_latent_layers_of_kimi_linear(tmp_path, kinds):
    names = attention((*SEPARATE, "q_conv1d", "f_a_proj"), range(3)) | attention(LATENT, [3])
    config = {**MLA, "model_type": "kimi_linear", **kinds}
    facts = facts_of(tmp_path, "KimiLinearForCausalLM", config, names)
    assert facts.attention == "mla"
    assert facts.layers == layer_names([3])


@pytest.mark.parametrize("counts", [{"num_layers": 2}, {"num_layers": 2, "num_hidden_layers": 4}])
def test_longcat_has_two_attentions_a_layer(tmp_path, counts):
    names = attention(LATENT, [0, 1], module="self_attn.0")
    names |= attention(LATENT, [0, 1], module="self_attn.1")
    names |= attention(LATENT, [0], "model.mtp.layers")
    config = {key: value for key, value in MLA.items() if key != "num_hidden_layers"}
    config |= {"model_type": "longcat_flash", **counts}
    facts = facts_of(tmp_path, "LongcatFlashForCausalLM", config, names)
    assert facts.layers == (
        LayerFacts(0, "model.layers.0.self_attn.0"),
        LayerFacts(1, "model.layers.0.self_attn.1"),
        LayerFacts(2, "model.layers.1.self_attn.0"),
        LayerFacts(3, "model.layers.1.self_attn.1"),
    )


def test_kimi_k25(tmp_path):
    prefix = "language_model.model.layers"
    quantization = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    text = {**MLA, "model_type": "kimi_k2", "quantization_config": quantization}
    names = {name.replace(".weight", ".weight_packed") for name in attention(LATENT, [1], prefix)}
    names |= attention(LATENT, [0, 2, 3], prefix)
    names |= attention(("wqkv",), range(2), "vision_tower.encoder.blocks", "attn")
    config = {"model_type": "kimi_k25", "text_config": text}
    facts = facts_of(tmp_path, "KimiK25ForConditionalGeneration", config, names)
    assert facts.layers == layer_names(range(4), prefix)
    assert facts.quant_method == "compressed-tensors"
    assert facts.quantization == quantization
    assert facts.quantization_location == ("text_config", "quantization_config")


def test_mtp_layers_are_left_out(tmp_path):
    config = {**MLA, "model_type": "deepseek_v3", "num_nextn_predict_layers": 1}
    names = attention(LATENT, range(5)) | {"model.layers.4.eh_proj.weight"}
    facts = facts_of(tmp_path, "DeepseekV3ForCausalLM", config, names)
    assert facts.layers == layer_names(range(4))


def test_layers_are_in_model_order_beyond_ten(tmp_path):
    config = {**GQA, "num_hidden_layers": 12}
    facts = facts_of(tmp_path, "X", config, attention(SEPARATE, range(12)))
    assert [layer.index for layer in facts.layers] == list(range(12))


@pytest.mark.parametrize("sign", ["config", "tensors"])
@pytest.mark.parametrize(
    ("architecture", "model_type"),
    [("DeepseekV32ForCausalLM", "deepseek_v32"), ("GlmMoeDsaForCausalLM", "glm_moe_dsa")],
)
def test_sparse_indexers_take_no_static_scale(tmp_path, sign, architecture, model_type):
    config = {**MLA, "model_type": model_type}
    names = attention(LATENT, range(4))
    if sign == "config":
        config["index_topk"] = 2048
    else:
        names |= attention(("indexer.wk",), range(4))
    facts = facts_of(tmp_path, architecture, config, names)
    assert facts.attention == "mla"
    assert not facts.static_scales
    assert "fp8_ds_mla" in facts.reason
    assert "no static scale exists" in facts.reason


@pytest.mark.parametrize(
    "layers",
    [
        {"num_hidden_layers": 3},
        {"layers_block_type": ["linear_attention", "full_attention", "moe"]},
    ],
)
def test_nemotron_names_its_attention_mixer(tmp_path, layers):
    prefix = "backbone.layers"
    config = {**GQA, "model_type": "nemotron_h"}
    del config["num_hidden_layers"]
    config |= layers
    names = attention(SEPARATE, [1], prefix, "mixer")
    names |= attention(("in_proj", "out_proj"), [0, 2], prefix, "mixer")
    facts = facts_of(tmp_path, "NemotronHForCausalLM", config, names)
    assert facts.layers == layer_names([1], prefix, "mixer")


@pytest.mark.parametrize("suffix", ["weight_packed", "qweight"])
def test_quantised_projections_count(tmp_path, suffix):
    names = {name.replace("weight", suffix) for name in attention(SEPARATE, range(4))}
    config = {**GQA, "quantization_config": {"quant_method": "AWQ"}}
    # AWQ stores its weights transposed, so its rows say nothing about the heads.
    rows = 1 if suffix == "qweight" else KV_HEADS * HEAD_DIM
    facts = facts_of(tmp_path, "X", config, names, rows)
    assert facts.layers == layer_names(range(4))
    assert (facts.num_kv_heads, facts.head_dim) == (KV_HEADS, HEAD_DIM)
    assert facts.quant_method == "awq"


@pytest.mark.parametrize(
    ("names", "extra"),
    [
        ({"transformer.h.0.attn.c_attn.weight"}, {}),
        (mlp(range(4)), {}),
        ({f"backbone.layers.{i}.mixer.in_proj.weight" for i in range(4)}, {"model_type": "mamba2"}),
    ],
)
def test_unknown_architecture_says_what_was_looked_for(tmp_path, names, extra):
    with pytest.raises(UnsupportedModelError) as caught:
        facts_of(tmp_path, "OddForCausalLM", {**GQA, **extra}, names)
    message = str(caught.value)
    assert message.startswith(f"OddForCausalLM in {tmp_path} has no layer with a KV cache")
    assert "k_proj, qkv_proj or kv_a_proj_with_mqa" in message


def test_unknown_sparse_architecture_says_so(tmp_path):
    names = {f"layers.{layer}.attn.wkv.weight" for layer in range(4)}
    with pytest.raises(UnsupportedModelError, match="besides, its sparse attention"):
        facts_of(tmp_path, "DeepseekV4ForCausalLM", {**GQA, "index_topk": 512}, names)


def test_missing_layers_are_counted(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"no tensors for layer 2 of the 4 .*\(2 such layers\)"
    ):
        facts_of(tmp_path, "X", GQA, attention(SEPARATE, [0, 1]))


def test_attention_that_config_and_tensors_dispute(tmp_path):
    config = {**GQA, "layer_types": ["full_attention"] * 4}
    names = attention(SEPARATE, [0, 1, 3]) | mlp(range(4))
    with pytest.raises(CheckpointError, match=r"layer 2 of .* is 'full_attention' by its config"):
        facts_of(tmp_path, "X", config, names)


def test_latent_tensors_without_a_latent_config(tmp_path):
    with pytest.raises(CheckpointError, match=r"kv_a_proj_with_mqa tensors but .* no kv_lora_rank"):
        facts_of(tmp_path, "X", GQA, attention(LATENT, range(4)))


@pytest.mark.parametrize("value", [None, 0, -1, "4", 4.0, True])
def test_layer_count_that_is_none(tmp_path, value):
    with pytest.raises(CheckpointError, match=r"num_hidden_layers in .*config\.json is"):
        facts_of(tmp_path, "X", {**GQA, "num_hidden_layers": value}, attention(SEPARATE, range(4)))


def test_mla_config_without_rope_width(tmp_path):
    config = {**MLA, "qk_rope_head_dim": None}
    with pytest.raises(CheckpointError, match=r"qk_rope_head_dim in .* is None"):
        facts_of(tmp_path, "X", config, attention(LATENT, range(4)))


@pytest.mark.parametrize("value", [None, [], "X", [3]])
def test_no_architecture(tmp_path, value):
    with pytest.raises(CheckpointError, match=r"config\.json names no architecture"):
        facts_of(tmp_path, "X", {**GQA, "architectures": value}, attention(SEPARATE, range(4)))


@pytest.mark.parametrize(
    ("config", "location", "method"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, ("quantization_config",), "fp8"),
        (
            {
                "quantization_config": None,
                "compression_config": {"quant_method": "compressed-tensors"},
            },
            ("compression_config",),
            "compressed-tensors",
        ),
        (
            {
                "quantization_config": {"quant_method": "a"},
                "text_config": {"quantization_config": {"quant_method": "b"}},
            },
            ("quantization_config",),
            "a",
        ),
        (
            {
                "text_config": {"quantization_config": {"quant_method": "b"}},
                "compression_config": {"quant_method": "c"},
            },
            ("text_config", "quantization_config"),
            "b",
        ),
        ({"quantization_config": {}}, (), None),
    ],
)
def test_where_the_quantisation_config_is_looked_for(tmp_path, config, location, method):
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    found_location, found = quantization_config(open_checkpoint(tmp_path))
    assert found_location == location
    assert found.get("quant_method") == method


def test_quantisation_config_in_modelopts_own_file(tmp_path):
    content = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(content))
    facts = facts_of(tmp_path, "X", GQA, attention(SEPARATE, range(4)))
    assert facts.quant_method == "modelopt"
    assert facts.quantization == {"quant_method": "modelopt", "quant_algo": "FP8"}
    assert facts.quantization_location == ()


def test_quantisation_config_that_is_no_object(tmp_path):
    with pytest.raises(CheckpointError, match=r"quantization_config in .* is 'fp8', not an object"):
        facts_of(
            tmp_path, "X", {**GQA, "quantization_config": "fp8"}, attention(SEPARATE, range(4))
        )


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "x"},
        {"text_config": {"model_type": "x"}},
        {"language_config": {"model_type": "x"}},
        {"thinker_config": {"text_config": {"model_type": "x"}}},
        {"text_config": None, "model_type": "x"},
    ],
)
def test_text_config(config):
    assert text_config(config)["model_type"] == "x"
