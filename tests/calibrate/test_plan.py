"""What a calibration knows, and refuses, before it reads a weight."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fp8kv.calibrate.formats.checkpoint import Checkpoint
from fp8kv.calibrate.plan import estimate_seconds, plan_calibration
from fp8kv.demo import MODELS
from fp8kv.recipes import default_recipe, load_recipe, override
from fp8kv.recipes.errors import (
    CalibrationError,
    CheckpointError,
    OutputError,
    RecipeError,
    ScaleError,
    UnsupportedModelError,
)


@pytest.fixture(autouse=True)
def no_weights(monkeypatch):
    """Fail a test whose plan reads a weight."""

    def refuse(*_arguments):
        pytest.fail("a plan reads no weights")

    monkeypatch.setattr(Checkpoint, "read", refuse)
    monkeypatch.setattr(Checkpoint, "read_many", refuse)


def plan(path, device="cpu", **changes):
    return plan_calibration(str(path), override(default_recipe(), changes), device=device)


# --- what it knows ---


def test_the_facts_of_a_gqa_model():
    found = plan(
        MODELS["tiny-minimax-m2"], **{"data.num_samples": 10, "data.seq_len": 100}
    ).to_json(1.5)
    targets = found.pop("targets")
    assert [target["target"] for target in targets] == ["vllm", "sglang"]
    assert {target["loads"] for target in targets} == {"loads"}
    shards = MODELS["tiny-minimax-m2"].glob("*.safetensors")
    weights = sum(tensor.nbytes for shard in shards for tensor in load_file(shard).values())
    assert found == {
        "model": str(MODELS["tiny-minimax-m2"]),
        "architecture": "MiniMaxM2ForCausalLM",
        "attention": "gqa",
        "streams": ["K", "V"],
        "layers": 6,
        "base": "fp8",
        "device": "cpu",
        "dtype": "float32",
        "recipe": "default",
        "samples": 10,
        "seq_len": 100,
        "tokens_at_most": 1000,
        "weight_bytes_read": weights,
        "scale_tensors": 12,
        "bytes_written": 12 * 4,
        "estimated_forward_seconds": 1.5,
    }


def test_the_facts_of_an_mla_model():
    found = plan(MODELS["tiny-deepseek-v3"]).to_json()
    assert found["attention"] == "mla"
    assert found["streams"] == ["LATENT", "ROPE"]
    assert (found["layers"], found["scale_tensors"]) == (5, 10)
    assert found["estimated_forward_seconds"] is None
    # neither engine uses them: said, not hidden
    assert {target["loads"] for target in found["targets"]} == {"ignored"}
    assert all(target["reason"] for target in found["targets"])
    json.dumps(found)


def test_an_unquantised_base_is_called_so_and_a_named_dtype_is_kept(tiny_checkpoint):
    found = plan(tiny_checkpoint("llama"), **{"calibration.dtype": "bfloat16"}).to_json()
    assert (found["base"], found["dtype"]) == ("unquantised", "bfloat16")


def test_per_head_scales_are_planned_with_their_size(tiny_checkpoint):
    changes = {"scales.granularity": "head", "output.targets": ["vllm"]}
    found = plan(tiny_checkpoint("llama"), **changes)
    assert found.scale_tensors == 4
    assert found.written_bytes == 2 * 2 * 2 * 4  # layers, streams, heads, bytes


# --- what one token meets ---


def test_active_parameters_count_a_tokens_experts_only():
    hidden, vocabulary = 256, 4096
    attention = 2 * hidden * 1024 + 2 * hidden * 256 + 1024 + 256
    router = 8 * hidden + 8
    experts = 2 * 3 * hidden * 192  # two of eight
    layer = attention + router + experts + 2 * hidden
    expected = 6 * layer + hidden + vocabulary * hidden
    assert plan(MODELS["tiny-minimax-m2"]).active_parameters == expected


def test_active_parameters_count_a_shared_expert_in_full():
    hidden, vocabulary = 256, 4096
    attention = hidden * 80 + 80 * 8 * 192 + hidden * 576 + 512 * 8 * 256 + 1024 * hidden + 80 + 512
    moe = 8 * hidden + 8 + (2 + 1) * 3 * hidden * 128
    expected = 5 * (attention + 2 * hidden) + 4 * moe + 3 * hidden * 512
    expected += hidden + vocabulary * hidden
    assert plan(MODELS["tiny-deepseek-v3"]).active_parameters == expected


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "glm4_moe"])
def test_every_spelling_of_the_number_of_experts_is_understood(tiny_checkpoint, model_type):
    path = tiny_checkpoint(model_type)
    tensors = load_file(path / "model.safetensors")
    expected = sum(
        tensor.numel() // (2 if ".experts." in name else 1)
        for name, tensor in tensors.items()
        if "embed" not in name
    )
    assert plan(path).active_parameters == expected


def test_int4_weights_count_as_weights_not_as_words(tiny_checkpoint, quantised_models, tmp_path):
    quantised_models.save_int4(tiny_checkpoint("llama"), tmp_path / "int4")
    plain, packed = plan(tiny_checkpoint("llama")), plan(tmp_path / "int4")
    assert packed.active_parameters == pytest.approx(plain.active_parameters, rel=0.01)
    assert packed.weight_bytes < plain.weight_bytes
    assert packed.to_json()["base"] == "compressed-tensors"


def test_the_estimate_grows_with_the_tokens(tiny_checkpoint):
    few = estimate_seconds(plan(tiny_checkpoint("llama"), **{"data.num_samples": 1}))
    many = estimate_seconds(plan(tiny_checkpoint("llama"), **{"data.num_samples": 10000}))
    assert 0 < few < many < math.inf


# --- what it refuses ---


def test_a_recipe_for_another_model_is_refused_with_all_that_disagrees(tiny_checkpoint):
    with pytest.raises(RecipeError) as error:
        plan_calibration(str(tiny_checkpoint("llama")), load_recipe("minimax-m2"), device="cpu")
    message = str(error.value)
    assert "recipe minimax-m2 does not fit this checkpoint" in message
    assert "model_type is llama, expected minimax_m2" in message
    assert "num_hidden_layers is 2, expected 62" in message


@pytest.mark.parametrize(
    ("model_type", "stated", "actual"), [("llama", "mla", "gqa"), ("deepseek_v3", "gqa", "mla")]
)
def test_a_recipe_for_another_attention_is_refused(tiny_checkpoint, model_type, stated, actual):
    with pytest.raises(
        RecipeError, match=rf"recipe default is for {stated} attention, but .* is {actual}: choose"
    ):
        plan(tiny_checkpoint(model_type), **{"model.attention": stated})


def test_a_device_that_is_not_there_is_refused_before_the_checkpoint_is_opened():
    with pytest.raises(CalibrationError, match="device 'tpu' cannot be used here"):
        plan("/nowhere", device="tpu")


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere"):
        plan(tmp_path / "nowhere")


def test_a_sparse_indexer_needs_no_scale_and_is_told_so(
    tiny_checkpoint, quantised_models, tmp_path
):
    path = tmp_path / "sparse"
    shutil.copytree(tiny_checkpoint("deepseek_v3"), path)
    quantised_models.set_config(
        path, model_type="deepseek_v32", architectures=["DeepseekV32ForCausalLM"], index_topk=8
    )
    with pytest.raises(UnsupportedModelError) as error:
        plan(path)
    message = str(error.value)
    assert message.startswith("DeepseekV32ForCausalLM needs no calibration: ")
    assert "no static scale exists" in message


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_bases_that_engines_give_no_scales_are_refused_with_the_reason(
    tiny_checkpoint, quantised_models, tmp_path, method
):
    path = tmp_path / method
    shutil.copytree(tiny_checkpoint("llama"), path)
    stored = {}
    for name, weight in load_file(path / "model.safetensors").items():
        if "_proj.weight" in name:
            base = name.removesuffix("weight")
            stored[f"{base}qweight"] = torch.zeros(weight.shape[1], weight.shape[0] // 8).int()
            stored[f"{base}qzeros"] = torch.zeros(1, weight.shape[0] // 8).int()
            stored[f"{base}scales"] = torch.ones(1, weight.shape[0]).half()
        else:
            stored[name] = weight
    save_file(stored, path / "model.safetensors")
    quantised_models.set_config(
        path, quantization_config={"quant_method": method, "bits": 4, "group_size": 32}
    )
    with pytest.raises(UnsupportedModelError) as error:
        plan(path)
    message = str(error.value)
    assert f"quant_method '{method}'" in message
    assert len(message.partition(": ")[2]) > 40


def test_a_checkpoint_that_carries_scales_is_refused(tiny_checkpoint, tmp_path):
    path = tmp_path / "converted"
    shutil.copytree(tiny_checkpoint("llama"), path)
    scale = {"model.layers.0.self_attn.k_scale": torch.ones(1)}
    tensors = load_file(path / "model.safetensors") | scale
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(OutputError, match=r"already carries 1 KV scale tensors, the first is mod"):
        plan(path)


def test_per_head_scales_of_an_mla_model_are_refused(tiny_checkpoint):
    with pytest.raises(ScaleError, match="caches one latent row: use granularity 'tensor'"):
        plan(tiny_checkpoint("deepseek_v3"), **{"scales.granularity": "head"})


def test_targets_of_which_none_would_use_the_scales_are_refused(tiny_checkpoint):
    changes = {"scales.granularity": "head", "output.targets": ["sglang"]}
    with pytest.raises(ScaleError) as error:
        plan(tiny_checkpoint("llama"), **changes)
    message = str(error.value)
    assert "no target would use the scales of this model: SGLang" in message
    assert "targets that do: vllm" in message
