"""KV scales are found under every name that somebody writes."""

import json

import pytest
import torch
from safetensors.torch import save_file

from fp8kv.calibrate.formats.checkpoint import open_checkpoint
from fp8kv.calibrate.formats.kv_names import (
    find_kv_scales,
    is_attention_scale_name,
    is_kv_scale_name,
)

SPELLINGS = [
    ("self_attn.k_scale", "self_attn", "k", "{}_scale"),
    ("self_attn.v_scale", "self_attn", "v", "{}_scale"),
    ("self_attn.attn.k_scale", "self_attn", "k", "attn.{}_scale"),
    ("self_attn.attn_mqa.v_scale", "self_attn", "v", "attn_mqa.{}_scale"),
    ("self_attn.mla_attn.k_scale", "self_attn", "k", "mla_attn.{}_scale"),
    ("self_attn.mla_attn.mla_attn.k_scale", "self_attn", "k", "mla_attn.mla_attn.{}_scale"),
    ("self_attn.k_proj.k_scale", "self_attn", "k", "{}_proj.{}_scale"),
    ("self_attn.v_proj.v_scale", "self_attn", "v", "{}_proj.{}_scale"),
    ("self_attn.qkv_proj.k_scale", "self_attn", "k", "qkv_proj.{}_scale"),
    ("self_attn.qkv_proj.v_scale", "self_attn", "v", "qkv_proj.{}_scale"),
    ("self_attn.k_proj.output_scale", "self_attn", "k", "{}_proj.output_scale"),
    ("self_attn.v_proj.output_scale", "self_attn", "v", "{}_proj.output_scale"),
    ("self_attn.k_cache.scale", "self_attn", "k", "{}_cache.scale"),
    ("self_attn.v_cache.scale", "self_attn", "v", "{}_cache.scale"),
    ("self_attn.kv_scale", "self_attn", "kv", "kv_scale"),
    ("self_attn.1.k_scale", "self_attn.1", "k", "{}_scale"),
    ("self_attn.1.attn.v_scale", "self_attn.1", "v", "attn.{}_scale"),
    ("mixer.k_scale", "mixer", "k", "{}_scale"),
    ("mixer.attn.v_scale", "mixer", "v", "attn.{}_scale"),
    ("mixer.k_proj.k_scale", "mixer", "k", "{}_proj.{}_scale"),
    ("attention.v_scale", "attention", "v", "{}_scale"),
]
OTHER_ATTENTION_SCALES = [
    "self_attn.q_scale",
    "self_attn.q_proj.q_scale",
    "self_attn.q_proj.output_scale",
    "self_attn.prob_output_scale",
    "self_attn.prob_scale",
    "self_attn.q.scale",
    "self_attn.k_zero_point",
    "self_attn.attn.v_zero_point",
]
NO_SCALES = [
    "self_attn.k_proj.weight",
    "self_attn.k_proj.weight_scale",
    "self_attn.k_proj.weight_scale_inv",
    "self_attn.k_proj.input_scale",
    "self_attn.o_proj.output_scale",
    "self_attn.kv_a_proj_with_mqa.weight_scale",
    "self_attn.sinks",
    "mlp.k_scale",
    "mlp.experts.0.down_proj.weight_scale",
    "k_scale",
]
PREFIXES = ["model.layers.3.", "language_model.model.layers.12.", "backbone.layers.0.", "layers.0."]


def open_with(path, tensors):
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"architectures": ["X"]}))
    return open_checkpoint(path)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(("name", "layer", "stream", "style"), SPELLINGS)
def test_every_spelling_is_found(tmp_path, prefix, name, layer, stream, style):
    checkpoint = open_with(tmp_path, {prefix + name: torch.tensor([0.25])})
    [found] = find_kv_scales(checkpoint)
    assert (found.layer, found.stream, found.style) == (prefix + layer, stream, style)
    assert found.tensor == prefix + name
    assert found.value.tolist() == [0.25]
    assert is_kv_scale_name(prefix + name)
    assert is_attention_scale_name(prefix + name)


@pytest.mark.parametrize("name", OTHER_ATTENTION_SCALES)
def test_scales_of_query_and_probabilities_are_no_kv_scales(name):
    assert not is_kv_scale_name(f"model.layers.0.{name}")
    assert is_attention_scale_name(f"model.layers.0.{name}")


@pytest.mark.parametrize("name", NO_SCALES)
def test_other_tensors_are_no_attention_scales(name):
    assert not is_kv_scale_name(f"model.layers.0.{name}")
    assert not is_attention_scale_name(f"model.layers.0.{name}")


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(0.5),
        torch.tensor([0.5], dtype=torch.bfloat16),
        torch.tensor([[0.5]], dtype=torch.float16),
        torch.tensor([0.5], dtype=torch.float64),
        torch.tensor([[[0.5]], [[2.0]]]),
    ],
)
def test_values_become_flat_float32(tmp_path, value):
    checkpoint = open_with(tmp_path, {"model.layers.0.self_attn.k_scale": value})
    [found] = find_kv_scales(checkpoint)
    assert found.value.dtype == torch.float32
    assert found.value.shape == (value.numel(),)
    assert found.value.tolist() == value.double().flatten().tolist()


def test_aliases_are_all_found_in_the_order_of_the_checkpoint(tmp_path):
    names = [
        "model.layers.0.self_attn.attn.k_scale",
        "model.layers.0.self_attn.k_scale",
        "model.layers.1.self_attn.v_scale",
    ]
    tensors = {name: torch.tensor([float(i + 1)]) for i, name in enumerate(names)}
    checkpoint = open_with(tmp_path, {**tensors, "model.norm.weight": torch.ones(2)})
    found = {scale.tensor: scale.value.item() for scale in find_kv_scales(checkpoint)}
    assert found == {name: tensor.item() for name, tensor in tensors.items()}
    assert [scale.tensor for scale in find_kv_scales(checkpoint)] == [
        name for name in checkpoint.weight_map if name in tensors
    ]


def test_no_scales(tmp_path):
    assert find_kv_scales(open_with(tmp_path, {"model.norm.weight": torch.ones(2)})) == []
