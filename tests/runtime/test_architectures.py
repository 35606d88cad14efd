"""What the runtime cannot drive is refused by name, with the reason."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from fp8kv.recipes.errors import UnsupportedModelError
from fp8kv.runtime.architectures import check_supported, declared_window, text_config

REFUSED = {
    "qwen3_next": "linear attention",
    "qwen3_5_moe_text": "linear attention",
    "minimax": "linear attention",
    "kimi_linear": "linear attention",
    "gemma4_text": "last 2 layers share the KV cache",
    "llama4_text": "chunked attention .chunks of 16 tokens",
}

INDEXER = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 24,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 20,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "index_topk": 4,
    "index_n_heads": 2,
    "index_head_dim": 16,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "factor": 2.0,
    "original_max_position_embeddings": 64,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
}
REFUSED_VARIANTS = [
    ("deepseek_v32", INDEXER, "sparse attention"),
    ("glm_moe_dsa", INDEXER, "sparse attention"),
    ("deepseek_v4", {}, "compressed entries"),
    (
        "llama4_text",
        {
            "layer_types": ["full_attention"] * 2,
            "intermediate_size_mlp": 32,
            "num_local_experts": 2,
        },
        "tempers queries",
    ),
    ("llama", {"rope_parameters": LONG_ROPE}, "longrope RoPE"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "dynamic RoPE",
    ),
    ("falcon_h1", {}, "layers of type hybrid"),
]


@pytest.fixture(scope="module")
def model_of(tiny_checkpoint, load):
    return lambda model_type: load(tiny_checkpoint(model_type)).model


def tiny(model_type, **config):
    """Build a model that is not among the tiny ones."""
    common = {
        "vocab_size": 272,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    }
    config = AutoConfig.for_model(model_type, **common | config)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("model_type", ["llama", "gpt_oss", "longcat_flash", "kimi_k25"])
def test_returns_the_attention_modules_of_what_it_accepts(model_of, model_type):
    model = model_of(model_type)
    modules = check_supported(model)
    assert len(modules) == text_config(model).num_hidden_layers
    assert all(model.get_submodule(name) is found.module for name, found in modules.items())


@pytest.mark.parametrize(("model_type", "reason"), REFUSED.items())
def test_refuses_what_it_cannot_drive_by_name(model_of, model_type, reason):
    model = model_of(model_type)
    name = model.config.get_text_config().model_type
    with pytest.raises(UnsupportedModelError, match=f"cannot drive {name}: .*{reason}"):
        check_supported(model)


@pytest.mark.parametrize(("model_type", "config", "reason"), REFUSED_VARIANTS)
def test_refuses_variants_it_cannot_drive(model_type, config, reason):
    with pytest.raises(UnsupportedModelError, match=f"cannot drive {model_type}: .*{reason}"):
        check_supported(tiny(model_type, **config))


def test_refuses_a_kv_projection_that_cannot_be_absorbed(model_of):
    model = copy.deepcopy(model_of("deepseek_v3"))
    projection = model.model.layers[1].self_attn.kv_b_proj
    projection.bias = nn.Parameter(torch.zeros(projection.out_features))
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.self_attn\.kv_b_proj has a bias"):
        check_supported(model)
    projection.bias = None
    projection.weight = nn.Parameter(
        projection.weight.detach().to(torch.float8_e4m3fn), requires_grad=False
    )
    with pytest.raises(UnsupportedModelError, match="float8_e4m3fn, which cannot be absorbed"):
        check_supported(model)
    projection.weight = nn.Parameter(torch.zeros(30, 24))
    with pytest.raises(UnsupportedModelError, match="no whole number of heads"):
        check_supported(model)


def test_refuses_attention_that_is_not_causal(model_of):
    model = copy.deepcopy(model_of("llama"))
    model.model.layers[1].self_attn.is_causal = False
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.self_attn is not causal"):
        check_supported(model)


def test_refuses_what_no_configuration_of_layers_shows(model_of):
    model = copy.deepcopy(model_of("llama"))
    model.config.num_hidden_layers = 3
    with pytest.raises(UnsupportedModelError, match="only 2 of its 3 layers keep a KV cache"):
        check_supported(model)
    model._is_stateful = True
    with pytest.raises(UnsupportedModelError, match="state per sequence beside the KV cache"):
        check_supported(model)
    model.config.is_encoder_decoder = True
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        check_supported(model)


def test_accepts_longrope_whose_two_sets_of_factors_are_one():
    same = LONG_ROPE | {"long_factor": LONG_ROPE["short_factor"]}
    assert len(check_supported(tiny("llama", rope_parameters=same))) == 2


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({}, [None, None]),
        ({"sliding_window": 8}, [8, 8]),
        ({"sliding_window": 8, "use_sliding_window": False}, [None, None]),
        (
            {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
            [8, None],
        ),
    ],
)
def test_the_declared_window_is_that_of_the_layer(config, windows):
    layers = [SimpleNamespace(layer_idx=layer_idx) for layer_idx in range(2)]
    found = [declared_window(SimpleNamespace(**config), layer) for layer in layers]
    assert found == windows
