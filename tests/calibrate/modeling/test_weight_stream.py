"""Weights go to the model one at a time: the same bits as from decoded files, straight to the device, in little memory."""

import json
import os
import re
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from fp8kv.calibrate.formats.checkpoint import open_checkpoint
from fp8kv.calibrate.modeling import staged_reader, weight_stream
from fp8kv.calibrate.modeling.load import load_model
from fp8kv.calibrate.modeling.weight_stream import WeightStream
from fp8kv.demo import MODELS
from fp8kv.recipes.errors import CheckpointError

BLOCK, GROUP = 12, 8  # neither divides every width of the tiny models
LINEAR = re.compile(r".*layers\.\d+\..*(proj|w[123])[^.]*\.weight")
COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized"}
INT4_WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": GROUP}
CONFIGS = {
    "fp8-block": {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]},
    "fp8-tensor": COMPRESSED,
    "fp8-row": COMPRESSED,
    "int4": COMPRESSED
    | {"format": "pack-quantized", "config_groups": {"0": {"weights": INT4_WEIGHTS}}},
}


def store(weight, kind):
    """Return what is stored of a weight, by suffix, and the float32 weight that it stands for."""
    if kind == "int4":
        groups = weight.unflatten(1, (-1, GROUP))
        scale = (groups.abs().amax(-1) / 7).bfloat16()
        values = (groups / scale.unsqueeze(-1)).round().clamp(-8, 7)
        nibbles = (values.long() + 8).view(len(weight), -1, 8)
        words = (nibbles << torch.arange(0, 32, 4)).sum(-1)
        packed = torch.where(words >= 2**31, words - 2**32, words).int()
        stored = {"_packed": packed, "_scale": scale, "_shape": torch.tensor(weight.shape)}
        return stored, (values * scale.unsqueeze(-1)).flatten(1)
    rows, columns = weight.shape
    if kind == "fp8-block":
        suffix, scale = "_scale_inv", torch.rand(-(-rows // BLOCK), -(-columns // BLOCK)) + 0.5
        full = scale.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    elif kind == "fp8-row":
        suffix, scale = "_scale", torch.rand(rows, 1) + 0.5
        full = scale
    else:
        suffix, scale = "_scale", torch.tensor([0.75], dtype=torch.bfloat16)
        full = scale.float()
    codes = (weight / full).to(torch.float8_e4m3fn)
    return {"": codes, suffix: scale}, codes.float() * full


def save_shards(directory, *shards):
    """Write tensors as shards with an index, in place of what was there."""
    for old in directory.glob("*.safetensors*"):
        old.unlink()
    weight_map = {}
    for number, tensors in enumerate(shards):
        save_file(tensors, directory / f"{number}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, f"{number}.safetensors")
    index = json.dumps({"weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(index)


def quantise(source, directory, kind, quantised_models):
    """Write a checkpoint with its layers quantised, scales in a shard apart from codes; return it decoded."""
    directory.mkdir()
    for name in ("config.json", "generation_config.json"):
        (directory / name).write_bytes((source / name).read_bytes())
    plain, codes, scales, decoded = {}, {}, {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        if LINEAR.fullmatch(name) is None:
            plain[name] = decoded[name] = weight
            continue
        stored, decoded[name] = store(weight, kind)
        for suffix, tensor in stored.items():
            (codes if suffix in ("", "_packed") else scales)[f"{name}{suffix}"] = tensor
    save_shards(directory, plain, codes, scales)
    quantised_models.set_config(directory, quantization_config=CONFIGS[kind])
    assert len(codes) >= 14
    return decoded


def load(path, dtype=torch.float32, **options):
    return load_model(open_checkpoint(path), dtype=dtype, device="cpu", **options)


def tensors_of(model):
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


@pytest.mark.parametrize("kind", [None, *CONFIGS])
@pytest.mark.parametrize(
    "architecture", ["llama", "minimax_m2", "deepseek_v3", "kimi_k2", "kimi_k25", "gemma3"]
)
def test_every_format_loads_the_bits_that_transformers_loads_from_its_decoded_weights(
    tiny_checkpoint, quantised_models, tmp_path, architecture, kind
):
    source = tiny_checkpoint("deepseek_v3" if architecture == "kimi_k2" else architecture)
    if kind is None:
        path, decoded = source, load_file(source / "model.safetensors")
    else:
        path = tmp_path / "quantised"
        decoded = quantise(source, path, kind, quantised_models)
        if architecture == "kimi_k2":
            quantised_models.set_config(path, model_type="kimi_k2")
    model = load(path, torch.bfloat16)

    model.config.save_pretrained(tmp_path / "decoded")
    save_file(decoded, tmp_path / "decoded" / "model.safetensors", metadata={"format": "pt"})
    expected = type(model).from_pretrained(
        tmp_path / "decoded", config=model.config, dtype=torch.bfloat16
    )
    ours, theirs = tensors_of(model), tensors_of(expected)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize(("kind", "host_parts"), [("fp8-block", 0), ("int4", 1), (None, 0)])
def test_weights_are_decoded_on_the_device_of_the_model(
    tiny_checkpoint, quantised_models, tmp_path, monkeypatch, kind, host_parts
):
    # torch's device without memory: a weight that was decoded elsewhere would show
    places = []
    decode = weight_stream.decode

    def watched(checkpoint, weight, tensors, *rest):
        places.append([tensor.device.type for tensor in tensors])
        return decode(checkpoint, weight, tensors, *rest)

    monkeypatch.setattr(weight_stream, "decode", watched)
    path = tiny_checkpoint("mixtral")
    if kind is not None:
        path = tmp_path / "quantised"
        quantise(tiny_checkpoint("mixtral"), path, kind, quantised_models)
    model = load_model(open_checkpoint(path), dtype=torch.bfloat16, device="meta")
    assert {tensor.device.type for tensor in tensors_of(model).values()} == {"meta"}
    assert bool(places) == (kind is not None)
    assert all(place == ["meta", "meta"] + ["cpu"] * host_parts for place in places)


def test_nothing_is_read_before_it_is_asked_for(tiny_checkpoint, quantised_models, tmp_path):
    quantise(tiny_checkpoint("llama"), tmp_path / "fp8", "fp8-row", quantised_models)
    checkpoint = open_checkpoint(tmp_path / "fp8")
    for shard in (tmp_path / "fp8").glob("*.safetensors"):
        shard.rename(shard.with_suffix(".aside"))
    with WeightStream(checkpoint, dtype=torch.bfloat16, device=torch.device("cpu")) as stream:
        for shard in (tmp_path / "fp8").glob("*.aside"):
            shard.rename(shard.with_suffix(".safetensors"))
        weight = stream.weights["model.layers.0.mlp.up_proj.weight"]
        first, second = weight[...], weight[...]
        assert (first.dtype, first.shape) == (torch.bfloat16, (32, 32))
        assert torch.equal(first, second)
        assert first.data_ptr() != second.data_ptr()
        assert stream.weights["model.norm.weight"][...].dtype == torch.float32  # as it is stored


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [None, *CONFIGS])
def test_a_gpu_gets_the_bits_of_a_cpu(
    tiny_checkpoint, quantised_models, tmp_path, monkeypatch, kind
):
    path = tiny_checkpoint("minimax_m2")
    if kind is not None:
        path = tmp_path / "quantised"
        quantise(tiny_checkpoint("minimax_m2"), path, kind, quantised_models)
    on_cpu = tensors_of(load(path, torch.bfloat16))
    monkeypatch.setattr(staged_reader, "STAGING_BYTES", 100)  # so that most tensors are several
    on_gpu = load_model(open_checkpoint(path), dtype=torch.bfloat16, device="cuda")
    for name, tensor in tensors_of(on_gpu).items():
        assert tensor.device.type == "cuda", name
        assert torch.equal(tensor.cpu(), on_cpu[name]), name


# --- progress ---


def test_progress_counts_the_stored_bytes():
    checkpoint = open_checkpoint(MODELS["tiny-minimax-m2"])
    entries = [checkpoint.entry(name) for name in checkpoint.weight_map]
    calls = []
    load_model(
        checkpoint,
        dtype=torch.bfloat16,
        device="cpu",
        progress=lambda *call: calls.append(call),
    )
    assert {total for _, total in calls} == {sum(entry.end - entry.start for entry in entries)}
    done = [done for done, _ in calls]
    assert done == sorted(done)
    assert len(set(done)) > 100
    assert calls[-1][0] == calls[-1][1]


def test_progress_is_told_of_one_weight_at_a_time(tiny_checkpoint):
    calls, another, overlaps = [], threading.Event(), []

    def progress(done, _total):
        calls.append(done)
        if len(calls) == 1:
            overlaps.append(another.wait(0.2))
        else:
            another.set()

    checkpoint = open_checkpoint(tiny_checkpoint("llama"))
    with WeightStream(
        checkpoint, dtype=torch.float32, device=torch.device("cpu"), progress=progress
    ) as stream:
        weight = stream.weights["model.norm.weight"]
        threads = [threading.Thread(target=weight.__getitem__, args=(...,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert calls == [128, 256]
    assert overlaps == [False]


def test_progress_ends_at_the_total_though_a_weight_has_no_place_in_the_model(
    tiny_checkpoint, quantised_models, tmp_path
):
    quantise(tiny_checkpoint("llama"), tmp_path / "fp8", "fp8-row", quantised_models)
    tensors = load_file(tmp_path / "fp8" / "0.safetensors")
    tensors["model.layers.2.mtp.weight"] = torch.zeros(1000)
    codes, scales = (load_file(tmp_path / "fp8" / f"{number}.safetensors") for number in (1, 2))
    save_shards(tmp_path / "fp8", tensors, codes, scales)
    calls = []
    load(tmp_path / "fp8", progress=lambda *call: calls.append(call))
    assert calls[-2][1] - calls[-2][0] == 4000
    assert calls[-1][1] == calls[-1][0]


# --- shards that are damaged after they were checked ---


@pytest.mark.parametrize("damage", ["truncated", "deleted"])
def test_a_shard_that_changes_meanwhile_is_named(
    tiny_checkpoint, quantised_models, tmp_path, damage
):
    path = tmp_path / "int4"
    quantise(tiny_checkpoint("minimax_m2"), path, "int4", quantised_models)
    checkpoint = open_checkpoint(path)
    shard = path / "1.safetensors"
    if damage == "truncated":
        os.truncate(shard, shard.stat().st_size // 2)
    else:
        shard.unlink()
    with pytest.raises(CheckpointError) as error:
        load_model(checkpoint, dtype=torch.float32, device="cpu")
    message = str(error.value)
    assert message.startswith(f"cannot read {shard}: ")
    assert message.endswith("; has it changed since it was opened?")
    assert "\n" not in message


def test_scales_that_do_not_fit_are_named(tiny_checkpoint, quantised_models, tmp_path):
    path = tmp_path / "fp8"
    quantise(tiny_checkpoint("deepseek_v3"), path, "fp8-block", quantised_models)
    quantised_models.set_config(
        path, quantization_config=CONFIGS["fp8-block"] | {"weight_block_size": [16, 16]}
    )
    with pytest.raises(CheckpointError, match=r"^cannot decode model\.layers\.\d\..* of \S+fp8: "):
        load(path)


# --- memory ---

MEASURE = """
import re, sys, torch
from pathlib import Path
from fp8kv.calibrate.formats.checkpoint import open_checkpoint
from fp8kv.calibrate.modeling.load import load_config, load_model
from fp8kv.calibrate.modeling.weight_stream import WeightStream

def mebibytes(key):
    status = Path("/proc/self/status").read_text()
    return int(re.search(key + r":\\s+(\\d+)", status)[1]) / 1024

checkpoint = open_checkpoint(sys.argv[1])
load_config(checkpoint)
import transformers.models.mixtral.modeling_mixtral
stream = WeightStream(checkpoint, dtype=torch.bfloat16, device=torch.device("cpu"))
before = mebibytes("VmRSS")
for weight in stream.weights.values():
    weight[...]
read = mebibytes("VmHWM") - before
before = mebibytes("VmRSS")
model = load_model(checkpoint, dtype=torch.bfloat16, device="cpu")
loaded = mebibytes("VmHWM") - before
print("MiB", read, loaded, sum(p.nbytes for p in model.parameters()) / 2**20)
"""


@pytest.fixture
def large_checkpoint(tmp_path):
    """Experts of 100 MB in FP8, a shard for each of four layers."""
    width, experts, layers = 1024, 8, 4
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": 8,
        "hidden_size": width,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "num_local_experts": experts,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    codes = torch.randn(width, width).to(torch.float8_e4m3fn)
    shards = []
    for layer in range(layers):
        tensors = {}
        for expert in range(experts):
            for matrix in ("w1", "w2", "w3"):
                name = f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"
                tensors[name], tensors[f"{name}_scale_inv"] = codes.clone(), torch.ones(8, 8)
        rest = {
            "block_sparse_moe.gate": (experts, width),
            "self_attn.q_proj": (width, width),
            "self_attn.k_proj": (128, width),
            "self_attn.v_proj": (128, width),
            "self_attn.o_proj": (width, width),
            "input_layernorm": (width,),
            "post_attention_layernorm": (width,),
        }
        for name, shape in rest.items():
            tensors[f"model.layers.{layer}.{name}.weight"] = torch.ones(shape).bfloat16()
        shards.append(tensors)
    for name, shape in (("model.embed_tokens", (8, width)), ("model.norm", (width,))):
        shards[0][f"{name}.weight"] = torch.ones(shape).bfloat16()
    shards[0]["lm_head.weight"] = torch.ones(8, width).bfloat16()
    save_shards(tmp_path, *shards)
    yield tmp_path
    for shard in tmp_path.glob("*.safetensors"):
        shard.unlink()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_near_that_of_the_model(large_checkpoint):
    # blocks that are freed return to the system at once: what the C library keeps is not measured
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "131072", "PYTHONSAFEPATH": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(large_checkpoint)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    read, loaded, model = map(float, done.stdout.rpartition("MiB ")[2].split())
    shard = sum(path.stat().st_size for path in large_checkpoint.glob("*.safetensors")) / 4 / 2**20
    merged = 8 * 2 * 2  # MiB in bfloat16 of a layer's largest merged tensor: w1 and w3 of 8 experts
    assert 200 < model < 225
    # a weight of 1 MiB, its 2 MiB decoded and the 4 MiB in between, where a mapped file would count whole
    assert read < shard
    assert loaded < model + merged + shard
