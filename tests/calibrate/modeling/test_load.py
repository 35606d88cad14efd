"""Every base loads into the model that its weights, decoded by hand, make; what does not is refused in a sentence."""

import json
import shutil
import types

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fp8kv.calibrate.formats.checkpoint import open_checkpoint
from fp8kv.calibrate.formats.facts import model_facts
from fp8kv.calibrate.modeling.load import load_config, load_model, load_tokenizer, pad_token_id
from fp8kv.calibrate.modeling.weight_stream import LazyWeight
from fp8kv.calibrate.overlay.plan import plan_overlay
from fp8kv.calibrate.overlay.writer import write_overlay
from fp8kv.calibrate.scales import LayerScales, ScaleSet
from fp8kv.demo import MODELS
from fp8kv.recipes.errors import CalibrationError, CheckpointError, UnsupportedModelError


@pytest.fixture
def edited(tiny_checkpoint, quantised_models, tmp_path):
    """Copy a tiny checkpoint, with other config values and with its tensors changed in place."""

    def make(source, change_tensors=None, /, **config):
        directory = tmp_path / "edited"
        shutil.copytree(tiny_checkpoint(source), directory)
        quantised_models.set_config(directory, **config)
        if change_tensors is not None:
            tensors = load_file(directory / "model.safetensors")
            change_tensors(tensors)
            save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return directory

    return make


def load(path, dtype=torch.float32, **options):
    return load_model(open_checkpoint(path), dtype=dtype, device="cpu", **options)


def logits(model):
    ids = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits


def reference(source, tensors, directory):
    """Let transformers itself load ``tensors``, plain, with the config of ``source``."""
    directory.mkdir()
    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config", None)
    if config["model_type"] == "minimax_m2":
        # spelled so that every version of transformers understands it
        factor = config["rotary_dim"] / config["head_dim"]
        rope = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
        config["rope_parameters"] = rope | {"partial_rotary_factor": factor}
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, experts_implementation="eager"
    ).eval()


def decode_blocks(path):
    """Decode a checkpoint of FP8 blocks of 128x128 by the formula of its format."""
    stored = {}
    for shard in sorted(path.glob("*.safetensors")):
        stored |= load_file(shard)
    tensors = {}
    for name, tensor in stored.items():
        scales = stored.get(f"{name}_scale_inv")
        if scales is not None:
            rows, columns = tensor.shape
            grid = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
            tensors[name] = tensor.float() * grid
        elif not name.endswith("_scale_inv"):
            tensors[name] = tensor.float()
    return tensors


@pytest.mark.parametrize("name", list(MODELS))
def test_fp8_blocks_load_as_what_they_decode_to(name, tmp_path):
    tensors = decode_blocks(MODELS[name])
    if name == "tiny-deepseek-v3":
        ragged = tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"]
        assert ragged.shape[0] == 576  # no multiple of 128
    expected = reference(MODELS[name], tensors, tmp_path / "plain")
    assert torch.equal(logits(load(MODELS[name])), logits(expected))


def test_int4_loads_as_what_it_decodes_to(tiny_checkpoint, quantised_models, tmp_path):
    decoded = quantised_models.save_int4(tiny_checkpoint("llama"), tmp_path / "int4")
    model = load(tmp_path / "int4")
    expected = reference(tmp_path / "int4", decoded, tmp_path / "plain")
    assert torch.equal(logits(model), logits(expected))
    assert not torch.equal(logits(model), logits(load(tiny_checkpoint("llama"))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_plain_checkpoint_loads_in_the_dtype_asked_for(tiny_models, tmp_path, dtype):
    tiny_models.save_tiny_model("llama", tmp_path, dtype=torch.bfloat16)
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    model = load(tmp_path, dtype)
    state = model.state_dict()
    assert set(state) == set(stored)
    assert all(torch.equal(state[name], tensor.to(dtype)) for name, tensor in stored.items())
    assert logits(model).dtype == dtype
    assert logits(model).isfinite().all()


def test_a_loaded_model_is_ready_to_run_and_not_to_train(tiny_checkpoint):
    model = load(tiny_checkpoint("qwen3_moe"))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_every_architecture_loads_all_of_its_weights(tiny_checkpoint, architecture):
    path = tiny_checkpoint(architecture)
    model = load(path)
    stored = load_file(path / "model.safetensors")
    # by address, so that a tied head counts once; as a sum, for transformers merges and renames
    loaded = {
        tensor.data_ptr(): tensor.double().square().sum() for tensor in model.state_dict().values()
    }
    total = sum(tensor.double().square().sum() for tensor in stored.values())
    torch.testing.assert_close(sum(loaded.values()), total)
    assert abs(total) > 1


@pytest.mark.parametrize(
    ("base", "targets"),
    [("llama", ["vllm"]), ("llama", ["transformers"]), ("int4", ["vllm"]), ("fp8", ["vllm"])],
)
def test_a_converted_checkpoint_loads_as_its_source(
    tiny_checkpoint, quantised_models, tmp_path, base, targets
):
    source = tiny_checkpoint("llama")
    if base == "int4":
        source = tmp_path / "int4"
        quantised_models.save_int4(tiny_checkpoint("llama"), source)
    elif base == "fp8":
        source = MODELS["tiny-minimax-m2"]
    checkpoint = open_checkpoint(source)
    facts = model_facts(checkpoint)
    layers = tuple(LayerScales(x.index, x.name, (0.5,), (2.0,)) for x in facts.layers)
    scales = ScaleSet("gqa", "e4m3fn", "tensor", layers)
    write_overlay(plan_overlay(checkpoint, facts, scales, targets), tmp_path / "out")
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(source)))


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_load_does_not_take_the_memory_of_the_model_in_advance(edited, monkeypatch, is_whole):
    def warm_up(*_arguments):
        pytest.fail("transformers takes one block, which merged experts leave full of holes")

    assert callable(transformers.modeling_utils.caching_allocator_warmup)  # in every version
    monkeypatch.setattr(transformers.modeling_utils, "caching_allocator_warmup", warm_up)
    if is_whole:
        load(edited("mixtral"))
    else:
        with pytest.raises(CheckpointError):
            load(edited("mixtral", hidden_act="nope"))
    assert transformers.modeling_utils.caching_allocator_warmup is warm_up  # as it was


@pytest.mark.parametrize("base", ["plain", "int4"])
@pytest.mark.parametrize(("written", "expected"), [([7, 8], [7, 8]), (None, 257)])
def test_generation_settings_beside_the_weights_are_the_models(
    tiny_checkpoint, quantised_models, tmp_path, base, written, expected
):
    path = tmp_path / "model"
    if base == "plain":
        shutil.copytree(tiny_checkpoint("llama"), path)
    else:
        quantised_models.save_int4(tiny_checkpoint("llama"), path)
    (path / "generation_config.json").unlink()
    if written is not None:
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": written}))
    assert load(path).generation_config.eos_token_id == expected


def test_no_trace_of_the_quantisation_stays_in_the_model():
    model = load(MODELS["tiny-minimax-m2"])
    assert not hasattr(model.config, "quantization_config")
    assert getattr(model, "hf_quantizer", None) is None


def test_the_quantisation_of_a_nested_text_config_is_dropped_too(edited, tiny_checkpoint):
    text = json.loads((tiny_checkpoint("gemma3") / "config.json").read_text())["text_config"]
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    path = edited("gemma3", text_config=text | {"quantization_config": quantization})
    config = load_config(open_checkpoint(path))
    assert not hasattr(config.text_config, "quantization_config")
    assert torch.equal(logits(load(path)), logits(load(tiny_checkpoint("gemma3"))))


# --- corrected configurations ---


def test_kimi_k2_is_deepseek_v3_under_another_name(edited, tiny_checkpoint):
    path = edited("deepseek_v3", model_type="kimi_k2")
    model = load(path)
    assert type(model).__name__ == "DeepseekV3ForCausalLM"
    assert model.config.kv_lora_rank == 24
    assert torch.equal(logits(model), logits(load(tiny_checkpoint("deepseek_v3"))))


def test_minimax_rotates_rotary_dim_of_head_dim():
    config = load_config(open_checkpoint(MODELS["tiny-minimax-m2"]))
    assert (config.rotary_dim, config.head_dim) == (64, 128)
    assert config.rope_parameters["partial_rotary_factor"] == 0.5
    assert load(MODELS["tiny-minimax-m2"]).model.rotary_emb.inv_freq.shape == (32,)


def test_a_partial_rotary_factor_that_minimax_states_is_kept(edited):
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
    path = edited("minimax_m2", rope_parameters=rope, rotary_dim=8)
    config = load_config(open_checkpoint(path))
    assert config.rope_parameters["partial_rotary_factor"] == 0.25


# --- what is refused ---


def test_a_missing_weight_is_named(edited):
    path = edited("llama", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError) as error:
        load(path)
    assert str(error.value) == (
        f"{path} lacks 1 weights that LlamaForCausalLM needs, first 'model.norm.weight': "
        "is the download complete?"
    )


def test_a_missing_weight_of_a_quantised_checkpoint_is_named(
    tiny_checkpoint, quantised_models, tmp_path
):
    quantised_models.save_int4(tiny_checkpoint("llama"), tmp_path / "int4")
    tensors = load_file(tmp_path / "int4" / "model.safetensors")
    del tensors["model.layers.1.post_attention_layernorm.weight"]
    save_file(tensors, tmp_path / "int4" / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"lacks 1 weights .*model\.layers\.1\.post_attention_layernorm"
    ):
        load(tmp_path / "int4")


def test_a_weight_of_another_shape_is_named_with_both_shapes(edited):
    name = "model.layers.0.self_attn.k_proj.weight"

    def transpose(tensors):
        tensors[name] = tensors[name].t().contiguous()

    with pytest.raises(CheckpointError) as error:
        load(edited("llama", transpose))
    message = str(error.value)
    assert "1 weights of" in message
    assert f"first {name!r}: [32, 16] instead of [16, 32]" in message


def test_an_expert_that_is_missing_is_named_by_its_layer(edited, capfd):
    path = edited(
        "mixtral",
        lambda tensors: tensors.pop("model.layers.1.block_sparse_moe.experts.2.w1.weight"),
    )
    with pytest.raises(CheckpointError) as error:
        load(path)
    assert f"cannot load {path}: the tensors that make up model.layers.1.mlp.experts" in str(
        error.value
    )
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"model_type": "zork"}, UnsupportedModelError, ["cannot build 'zork'", "config.json"]),
        ({"model_type": None}, UnsupportedModelError, ["cannot build None", "model_type"]),
        ({"model_type": "t5"}, UnsupportedModelError, ["no language model for T5Config"]),
        ({"hidden_size": "abc"}, CheckpointError, ["config.json", "hidden_size", "'abc'"]),
        ({"num_attention_heads": 3}, CheckpointError, ["config.json", "(3)"]),
        ({"num_attention_heads": 0}, UnsupportedModelError, ["config.json", "zero"]),
        ({"hidden_act": "nope"}, CheckpointError, ["cannot load", "KeyError 'nope'"]),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_in_a_sentence(edited, changes, kind, words):
    with pytest.raises(kind) as error:
        load(edited("llama", **changes))
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words)


@pytest.mark.parametrize("where", ["decoding", "merging"])
def test_weights_that_do_not_fit_the_device_are_said_so(tiny_checkpoint, monkeypatch, where):
    def fail(*_arguments, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")

    if where == "decoding":
        monkeypatch.setattr(LazyWeight, "__getitem__", fail)
    else:
        monkeypatch.setattr(torch, "stack", fail)  # that transformers puts experts together with
    path = tiny_checkpoint("mixtral")
    with pytest.raises(CalibrationError) as error:
        load(path)
    assert str(error.value) == (
        f"the weights of {path} in float32 do not fit into the memory of cpu: "
        "use --device cpu or a larger GPU"
    )


# --- code of the checkpoint's own ---

CONFIGURATION = """
from transformers import LlamaConfig

class ZorkConfig(LlamaConfig):
    model_type = "zork"
"""
MODELING = """
import pathlib
from transformers import LlamaForCausalLM
from .configuration_zork import ZorkConfig

class ZorkForCausalLM(LlamaForCausalLM):
    config_class = ZorkConfig
"""
AUTO_MAP = {
    "AutoConfig": "configuration_zork.ZorkConfig",
    "AutoModelForCausalLM": "modeling_zork.ZorkForCausalLM",
}


@pytest.fixture
def with_code(edited, tmp_path, monkeypatch):
    modules = tmp_path / "modules"
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(str(modules))

    def make(model_type, code=MODELING):
        path = edited("llama", model_type=model_type, auto_map=AUTO_MAP)
        (path / "configuration_zork.py").write_text(CONFIGURATION)
        (path / "modeling_zork.py").write_text(code)
        return path

    return make


def test_code_of_the_checkpoint_is_not_run_unasked(with_code, tmp_path):
    path = with_code("zork")
    with pytest.raises(UnsupportedModelError) as error:
        load(path)
    message = str(error.value)
    assert "cannot build 'zork'" in message
    assert "--trust-remote-code" in message
    assert not (tmp_path / "modules").exists()


def test_code_of_the_checkpoint_runs_if_it_is_trusted(with_code, tiny_checkpoint):
    model = load(with_code("zork"), trust_remote_code=True)
    assert type(model).__name__ == "ZorkForCausalLM"
    assert torch.equal(logits(model), logits(load(tiny_checkpoint("llama"))))


@pytest.mark.parametrize("trusted", [False, True])
def test_transformers_own_class_goes_before_code_of_the_checkpoint(with_code, trusted):
    # code that was written for transformers 4, beside a tokenizer that needs to be trusted (Kimi-K2)
    model = load(with_code("llama", "from transformers import Gone"), trust_remote_code=trusted)
    assert type(model) is transformers.LlamaForCausalLM


def test_code_that_does_not_import_is_refused_in_a_sentence(with_code):
    path = with_code("zork", "from transformers import Gone")
    with pytest.raises(CheckpointError, match="cannot import name 'Gone'"):
        load(path, trust_remote_code=True)


# --- tokenizer ---


def test_the_tokenizer_lies_beside_the_checkpoint(tiny_checkpoint):
    tokenizer = load_tokenizer(open_checkpoint(tiny_checkpoint("llama")))
    assert tokenizer.decode(tokenizer("3 apples")["input_ids"]) == "3 apples"


@pytest.mark.parametrize("content", [None, "{broken"])
def test_a_tokenizer_that_is_missing_or_broken_is_said_so(edited, content):
    path = edited("llama")
    (path / "tokenizer_config.json").unlink()
    (path / "tokenizer.json").unlink()
    if content is not None:
        (path / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError) as error:
        load_tokenizer(open_checkpoint(path))
    message = str(error.value)
    assert message.startswith(f"no usable tokenizer in {path}: ")
    assert message.endswith("put tokenizer.json and tokenizer_config.json there")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("pad", "end", "expected"), [(5, 6, 5), (None, 6, 6), (None, None, 0), (0, 6, 0)]
)
def test_padding_falls_back_to_the_end_of_sequence(pad, end, expected):
    assert pad_token_id(types.SimpleNamespace(pad_token_id=pad, eos_token_id=end)) == expected
