"""The embedded models: their published layout, and that the script still makes them."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fp8kv.demo
from fp8kv.calibrate.formats.checkpoint import open_checkpoint
from fp8kv.calibrate.formats.facts import model_facts
from fp8kv.calibrate.formats.weights import stored_weights
from fp8kv.calibrate.modeling.weight_stream import WeightStream

DEMO_MODELS = Path(fp8kv.demo.__path__[0]) / "models"
LAYER = "model.layers.0"
PLAIN = {
    "model.embed_tokens.weight": (16, 8),
    f"{LAYER}.input_layernorm.weight": (8,),
    "model.norm.weight": (8,),
    "lm_head.weight": (16, 8),
}
MINIMAX = {
    "quantised": {
        f"{LAYER}.self_attn.q_proj.weight": (130, 8),
        f"{LAYER}.self_attn.k_proj.weight": (8, 8),
        f"{LAYER}.self_attn.v_proj.weight": (8, 8),
        f"{LAYER}.self_attn.o_proj.weight": (8, 130),
        f"{LAYER}.block_sparse_moe.experts.0.w1.weight": (6, 8),
        f"{LAYER}.block_sparse_moe.experts.0.w2.weight": (8, 6),
        f"{LAYER}.block_sparse_moe.experts.0.w3.weight": (6, 8),
    },
    "plain": {
        **PLAIN,
        f"{LAYER}.self_attn.q_norm.weight": (130,),
        f"{LAYER}.self_attn.k_norm.weight": (8,),
        f"{LAYER}.block_sparse_moe.gate.weight": (2, 8),
        f"{LAYER}.block_sparse_moe.e_score_correction_bias": (2,),
    },
    "config": {"model_type": "minimax_m2", "rotary_dim": 64},
}
DEEPSEEK = {
    "quantised": {
        f"{LAYER}.self_attn.q_a_proj.weight": (4, 8),
        f"{LAYER}.self_attn.q_b_proj.weight": (8, 4),
        f"{LAYER}.self_attn.kv_a_proj_with_mqa.weight": (576, 8),
        f"{LAYER}.self_attn.kv_b_proj.weight": (8, 4),
        f"{LAYER}.self_attn.o_proj.weight": (8, 8),
        f"{LAYER}.mlp.gate_proj.weight": (8, 8),
        f"{LAYER}.mlp.experts.3.up_proj.weight": (8, 8),
        f"{LAYER}.mlp.shared_experts.down_proj.weight": (8, 8),
    },
    "plain": {
        **PLAIN,
        f"{LAYER}.self_attn.q_a_layernorm.weight": (4,),
        f"{LAYER}.self_attn.kv_a_layernorm.weight": (4,),
        f"{LAYER}.mlp.gate.weight": (2, 8),
        f"{LAYER}.mlp.gate.e_score_correction_bias": (2,),
    },
    "config": {
        "model_type": "deepseek_v3",
        "head_dim": 64,
        "qk_head_dim": 192,
        "rope_interleave": True,
    },
}


@pytest.fixture(scope="module")
def make_fp8():
    spec = importlib.util.spec_from_file_location("make_fp8", Path(__file__).parent / "make_fp8.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_source(path, model):
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(shape, generator=generator).bfloat16()
        for name, shape in {**model["quantised"], **model["plain"]}.items()
    }
    for name in tensors:
        if name.endswith("bias"):
            tensors[name] = tensors[name].float()
    save_file(tensors, path / "model.safetensors")
    config = {
        "architectures": ["X"],
        "dtype": "bfloat16",
        "num_hidden_layers": 1,
        "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        **model["config"],
    }
    (path / "config.json").write_text(json.dumps(config))
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer_config.json"):
        (path / name).write_text(name)
    (path / "tokenizer.json").write_text('{ "a": "\u0120" }')
    return tensors


def decode(checkpoint):
    with WeightStream(checkpoint, dtype=torch.bfloat16, device=torch.device("cpu")) as stream:
        return {name: weight[...] for name, weight in stream.weights.items()}


@pytest.mark.parametrize("model", [MINIMAX, DEEPSEEK])
def test_quantises_exactly_the_published_layers(make_fp8, tmp_path, model):
    source = write_source(tmp_path / "source", model)
    make_fp8.convert(tmp_path / "source", tmp_path / "out", num_shards=2)
    checkpoint = open_checkpoint(tmp_path / "out")
    kinds = {name: weight.kind for name, weight in stored_weights(checkpoint).items()}
    assert kinds == {
        **dict.fromkeys(model["quantised"], "fp8"),
        **dict.fromkeys(model["plain"], "plain"),
    }
    for name in model["quantised"]:
        assert checkpoint.entry(name).dtype == "F8_E4M3"
        assert checkpoint.entry(f"{name}_scale_inv").dtype == "F32"
        assert checkpoint.weight_map[name] == checkpoint.weight_map[f"{name}_scale_inv"]
    decoded = decode(checkpoint)
    for name, tensor in source.items():
        if name in model["plain"]:
            assert torch.equal(decoded[name], tensor)
        else:
            torch.testing.assert_close(decoded[name], tensor, rtol=0.07, atol=1e-4)


def test_files_of_the_published_layout(make_fp8, tmp_path):
    write_source(tmp_path / "source", MINIMAX)
    make_fp8.convert(tmp_path / "source", tmp_path / "out", num_shards=2)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (tmp_path / "out" / "tokenizer.json").read_text(encoding="utf-8") == '{"a":"\u0120"}\n'
    assert all(header.tensors for header in open_checkpoint(tmp_path / "out").shards.values())


def test_minimax_config(make_fp8):
    config = make_fp8.published_config(
        {
            "model_type": "minimax_m2",
            "num_hidden_layers": 2,
            "dtype": "bfloat16",
            "rotary_dim": 64,
            "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5},
        }
    )
    assert config == {
        "attn_type_list": [1, 1],
        "model_type": "minimax_m2",
        "num_hidden_layers": 2,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "float8_e4m3fn",
            "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
        "rope_theta": 10000,
        "rotary_dim": 64,
        "shared_intermediate_size": 0,
        "torch_dtype": "bfloat16",
    }


def test_other_models_are_refused(make_fp8):
    config = {"model_type": "llama", "dtype": "bfloat16", "rope_parameters": {"rope_theta": 1.0}}
    with pytest.raises(SystemExit, match="no published layout known for model_type llama"):
        make_fp8.published_config(config)


@pytest.mark.parametrize(
    ("name", "attention", "num_layers"),
    [("tiny-minimax-m2", "gqa", 6), ("tiny-deepseek-v3", "mla", 5)],
)
def test_embedded_models_are_what_the_script_makes(make_fp8, name, attention, num_layers):
    checkpoint = open_checkpoint(DEMO_MODELS / name)
    facts = model_facts(checkpoint)
    assert (facts.attention, len(facts.layers)) == (attention, num_layers)
    assert facts.quant_method == "fp8"
    assert len(checkpoint.shards) == 2
    for tensor, weight in stored_weights(checkpoint).items():
        assert weight.kind == ("fp8" if make_fp8.QUANTISED.fullmatch(tensor) else "plain")
    for tensor in decode(checkpoint).values():
        assert tensor.isfinite().all()


def test_embedded_models_fit_their_budget():
    files = [path for path in DEMO_MODELS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 32_000_000
