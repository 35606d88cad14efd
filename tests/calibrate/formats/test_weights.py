"""Quantised checkpoints become plain weights."""

import json

import pytest
import torch
from safetensors.torch import save_file

from fp8kv.calibrate.formats.checkpoint import open_checkpoint
from fp8kv.calibrate.formats.fp8_block import quantize_block
from fp8kv.calibrate.formats.weights import stored_weights
from fp8kv.calibrate.modeling.weight_stream import WeightStream
from fp8kv.recipes.errors import CheckpointError, UnsupportedModelError

FP8 = torch.float8_e4m3fn
FP8_BLOCK = {"quant_method": "fp8", "weight_block_size": [128, 128]}
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 32},
        }
    },
}
LAYER = "model.layers.0"


def open_with(path, *shards, quantization=None):
    """Write shards with an index, and open them."""
    path.mkdir(exist_ok=True)
    config = {"architectures": ["X"]}
    if quantization is not None:
        config["quantization_config"] = quantization
    (path / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for number, tensors in enumerate(shards):
        save_file(tensors, path / f"{number}.safetensors")
        weight_map |= dict.fromkeys(tensors, f"{number}.safetensors")
    index = json.dumps({"weight_map": weight_map})
    (path / "model.safetensors.index.json").write_text(index)
    return open_checkpoint(path)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def int4_parts(name, rows=2, cols=64, group=32):
    packed = torch.zeros(rows, cols // 8, dtype=torch.int32)
    packed[0, 0] = 0x9  # column 0 holds 9 - 8 = 1, all others 0 - 8 = -8
    return {
        f"{name}.weight_packed": packed,
        f"{name}.weight_scale": torch.full((rows, cols // group), 0.5, dtype=torch.bfloat16),
        f"{name}.weight_shape": torch.tensor([rows, cols]),
    }


def decoded(checkpoint, dtype):
    with WeightStream(checkpoint, dtype=dtype, device=torch.device("cpu")) as stream:
        return {name: weight[...] for name, weight in stream.weights.items()}


def test_plain_tensors_are_left_as_they_are(tmp_path):
    tensors = {
        "w.weight": random(4, 4).bfloat16(),
        "norm.weight": random(4),
        "half": random(4).half(),
        "ids": torch.arange(3),
    }
    state = decoded(open_with(tmp_path, tensors), torch.float32)
    assert set(state) == set(tensors)
    for name, tensor in tensors.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor)


def test_fp8_blocks_with_576_ragged_rows(tmp_path):
    name = f"{LAYER}.self_attn.kv_a_proj_with_mqa.weight"
    weight = random(576, 200)
    codes, scales = quantize_block(weight)
    tensors = {name: codes, f"{name}_scale_inv": scales}
    checkpoint = open_with(tmp_path, tensors, quantization=FP8_BLOCK)
    state = decoded(checkpoint, torch.float32)
    assert list(state) == [name]
    row_scales = scales.repeat_interleave(128, 0)[:576]
    expected = codes.float() * row_scales.repeat_interleave(128, 1)[:, :200]
    assert torch.equal(state[name], expected)


def test_fp8_per_tensor_and_per_row_with_activation_scales(tmp_path):
    codes = random(3, 2).to(FP8)
    tensors = {
        "a.weight": codes,
        "a.weight_scale": torch.tensor(2.0),
        "a.input_scale": torch.tensor(3.0),
        "b.weight": codes.clone(),
        "b.weight_scale": torch.tensor([[1.0], [2.0], [4.0]]),
        "b.activation_scale": torch.tensor(3.0),
    }
    state = decoded(open_with(tmp_path, tensors), torch.float32)
    assert set(state) == {"a.weight", "b.weight"}
    assert torch.equal(state["a.weight"], codes.float() * 2)
    assert torch.equal(state["b.weight"], codes.float() * torch.tensor([[1.0], [2.0], [4.0]]))


def test_fp8_experts_stacked_under_a_name_of_their_own(tmp_path):
    tensors = {
        "experts.gate_up_proj": torch.ones(2, 130, 4).to(FP8),
        "experts.gate_up_proj_scale_inv": torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]),
    }
    state = decoded(open_with(tmp_path, tensors, quantization=FP8_BLOCK), torch.bfloat16)
    assert state["experts.gate_up_proj"][:, [0, 127, 128], 0].tolist() == [[1, 1, 2], [3, 3, 4]]


def test_int4(tmp_path):
    checkpoint = open_with(tmp_path, int4_parts("w"), quantization=INT4)
    state = decoded(checkpoint, torch.bfloat16)
    assert list(state) == ["w.weight"]
    expected = torch.full((2, 64), -4.0)
    expected[0, 0] = 0.5
    assert torch.equal(state["w.weight"], expected.bfloat16())


def test_the_config_of_a_wrapped_text_model_is_used(tmp_path):
    open_with(tmp_path, int4_parts("w"))
    config = {"architectures": ["X"], "text_config": {"quantization_config": INT4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = decoded(open_checkpoint(tmp_path), torch.bfloat16)
    assert state["w.weight"].shape == (2, 64)


def test_parts_of_a_weight_may_lie_in_different_shards(tmp_path):
    parts = int4_parts("w")
    codes, scales = quantize_block(random(4, 4))
    names = list(parts)
    checkpoint = open_with(
        tmp_path,
        {names[0]: parts[names[0]], "v.weight_scale_inv": scales},
        {names[2]: parts[names[2]]},
        {"v.weight": codes, names[1]: parts[names[1]]},
        quantization=INT4 | FP8_BLOCK,
    )
    state = decoded(checkpoint, torch.float32)
    assert state["w.weight"][1, 5] == -4.0
    assert torch.equal(state["v.weight"], codes.float() * scales)


def test_kv_scales_are_left_out(tmp_path):
    scales = ["k_scale", "attn.v_scale", "k_proj.k_scale", "v_proj.output_scale", "kv_scale"]
    scales += ["q_scale", "k_cache.scale", "prob_output_scale"]
    tensors = {f"{LAYER}.self_attn.{scale}": torch.ones(1) for scale in scales}
    tensors[f"{LAYER}.self_attn.k_proj.weight"] = random(2, 2).bfloat16()
    checkpoint = open_with(tmp_path, tensors)
    assert set(decoded(checkpoint, torch.bfloat16)) == {f"{LAYER}.self_attn.k_proj.weight"}


def test_stored_weights_tell_the_parts(tmp_path):
    codes, scales = quantize_block(random(4, 4))
    tensors = {**int4_parts("w"), "v.weight": codes, "v.weight_scale_inv": scales}
    tensors["norm.weight"] = random(2).bfloat16()
    weights = stored_weights(open_with(tmp_path, tensors, quantization=INT4))
    assert {name: (weight.kind, weight.parts) for name, weight in weights.items()} == {
        "w.weight": ("int4", ("w.weight_packed", "w.weight_scale", "w.weight_shape")),
        "v.weight": ("fp8", ("v.weight", "v.weight_scale_inv")),
        "norm.weight": ("plain", ("norm.weight",)),
    }


UINT8 = torch.zeros(2, 2, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("tensors", "culprit", "scheme"),
    [
        ({"w.qweight": torch.zeros(1, dtype=torch.int32)}, "w.qweight", "AWQ or GPTQ"),
        ({"e.gate_up_proj_blocks": UINT8}, "e.gate_up_proj_blocks", "MXFP4"),
        ({"w.weight": UINT8, "w.weight_scale_2": torch.ones(1)}, "w.weight_scale_2", "NVFP4"),
        ({"w.weight_packed": UINT8, "w.weight_scale": torch.ones(2)}, "w.weight_packed", "U8"),
        (
            {**int4_parts("w"), "w.weight_zero_point": torch.zeros(1, dtype=torch.int32)},
            "w.weight_zero_point",
            "asymmetric",
        ),
        (
            {**int4_parts("w"), "w.weight_g_idx": torch.zeros(64, dtype=torch.int32)},
            "w.weight_g_idx",
            "activation reordering",
        ),
        ({"w.weight": torch.zeros(2, 2, dtype=torch.int8)}, "w.weight", "I8"),
        ({"w.weight": UINT8, "w.weight.absmax": torch.ones(1)}, "w.weight", "U8"),
    ],
)
def test_other_quantisation_is_refused_by_name(tmp_path, tensors, culprit, scheme):
    checkpoint = open_with(tmp_path, tensors, quantization=INT4)
    with pytest.raises(UnsupportedModelError) as caught:
        decoded(checkpoint, torch.bfloat16)
    message = str(caught.value)
    assert message.startswith(f"{culprit} of {tmp_path}")
    assert scheme in message
    assert "start from the BF16, FP8 or compressed-tensors INT4 release" in message


def test_fp8_weight_without_scale(tmp_path):
    checkpoint = open_with(tmp_path, {"w.weight": torch.zeros(2, 2).to(FP8)})
    with pytest.raises(
        CheckpointError, match=r"w\.weight of .* has neither w\.weight_scale_inv nor"
    ):
        decoded(checkpoint, torch.bfloat16)


@pytest.mark.parametrize("missing", ["weight_scale", "weight_shape"])
def test_int4_weight_without_a_part(tmp_path, missing):
    tensors = int4_parts("w")
    del tensors[f"w.{missing}"]
    checkpoint = open_with(tmp_path, tensors, quantization=INT4)
    with pytest.raises(CheckpointError, match=rf"w\.weight_packed of .* has no w\.{missing}"):
        decoded(checkpoint, torch.bfloat16)


def test_scales_that_do_not_fit_name_the_weight(tmp_path):
    tensors = {"w.weight": torch.zeros(200, 200).to(FP8), "w.weight_scale_inv": torch.ones(3, 2)}
    checkpoint = open_with(tmp_path, tensors, quantization=FP8_BLOCK)
    with pytest.raises(CheckpointError, match=r"cannot decode w\.weight of .*: scales of \[3, 2\]"):
        decoded(checkpoint, torch.bfloat16)
