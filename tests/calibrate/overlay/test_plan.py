"""What a converted checkpoint will hold, per base and target, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fp8kv.calibrate.formats.checkpoint import open_checkpoint
from fp8kv.calibrate.formats.facts import model_facts
from fp8kv.calibrate.overlay.plan import plan_overlay
from fp8kv.calibrate.scales import LayerScales, ScaleSet
from fp8kv.recipes.errors import OutputError, ScaleError, UnsupportedModelError

GOLDEN = Path(__file__).parents[1] / "golden"
OVERLAYS = sorted(path.name for path in (GOLDEN / "overlays").iterdir())


def scales_for(facts, granularity="tensor", fp8_format="e4m3fn"):
    heads = facts.num_kv_heads if granularity == "head" else 1
    layers = []
    for position, layer in enumerate(facts.layers):
        k = tuple(2.0 ** (position - 6) * (1 + head / 8) for head in range(heads))
        v = k if facts.attention == "mla" else tuple(2 * value for value in k)
        layers.append(LayerScales(layer.index, layer.name, k, v))
    return ScaleSet(facts.attention, fp8_format, granularity, tuple(layers))


def plan_for(source, targets, granularity="tensor", fp8_format="e4m3fn", **options):
    path = source if isinstance(source, Path) else GOLDEN / "sources" / source
    checkpoint = open_checkpoint(path)
    facts = model_facts(checkpoint)
    scales = scales_for(facts, granularity, fp8_format)
    return plan_overlay(checkpoint, facts, scales, targets, **options)


def edited(tmp_path, source, **changes):
    """Copy a golden source with other values in its config; None removes a key."""
    directory = tmp_path / "edited"
    shutil.copytree(GOLDEN / "sources" / source, directory)
    config = json.loads((directory / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_written_file_has_its_golden_bytes(overlay):
    source, _, words = overlay.partition("--")
    targets = [word for word in words.split("+") if word != "head"]
    plan = plan_for(source, targets, "head" if words.endswith("+head") else "tensor")
    written = {name: data for name, data in plan.new_files.items() if "/" not in name}
    golden = {path.name: path.read_bytes() for path in (GOLDEN / "overlays" / overlay).iterdir()}
    assert written == golden


def test_the_scale_file_has_the_bytes_that_the_format_prescribes():
    plan = plan_for("llama-bf16", ["modelopt"])
    header = (
        b'{"__metadata__":{"format":"pt"},'
        b'"model.layers.0.self_attn.k_proj.k_scale":{"dtype":"F32","shape":[],"data_offsets":[0,4]},'
        b'"model.layers.0.self_attn.v_proj.v_scale":{"dtype":"F32","shape":[],"data_offsets":[4,8]},'
        b'"model.layers.1.self_attn.k_proj.k_scale":{"dtype":"F32","shape":[],"data_offsets":[8,12]},'
        b'"model.layers.1.self_attn.v_proj.v_scale":{"dtype":"F32","shape":[],"data_offsets":[12,16]}}'
    )
    header += b" " * (-len(header) % 8)
    data = torch.tensor([2.0**-6, 2.0**-5, 2.0**-5, 2.0**-4]).numpy().tobytes()
    expected = len(header).to_bytes(8, "little") + header + data
    assert plan.extra["model-kv-scales.safetensors"] == expected


def test_the_index_maps_every_tensor_and_counts_the_new_bytes():
    plan = plan_for("minimax-fp8", ["vllm"])
    before, after = json.loads(plan.checkpoint.index_text), json.loads(plan.index_text)
    assert set(after["weight_map"]) - set(before["weight_map"]) == set(plan.tensors)
    assert {after["weight_map"][name] for name in plan.tensors} == {"model-kv-scales.safetensors"}
    assert after["metadata"]["total_size"] == before["metadata"]["total_size"] + 4 * 4


def test_an_index_without_a_size_gets_none(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "sources" / "llama-bf16", source)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    (source / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index["weight_map"]})
    )
    assert list(json.loads(plan_for(source, ["vllm"]).index_text)) == ["weight_map"]


def test_a_single_file_becomes_a_shard_that_does_not_hide_the_index():
    plan = plan_for("qwen2-bf16", ["vllm"])
    assert plan.shards == {"model-00001-of-00001.safetensors": "model.safetensors"}
    assert plan.links["model-00001-of-00001.safetensors"].endswith("qwen2-bf16/model.safetensors")
    assert "model.safetensors" not in plan.links
    assert "fp8kv/original/model.safetensors.index.json" not in plan.extra


def test_an_index_that_names_model_safetensors_has_it_renamed(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "sources" / "llama-int4", source)
    names = open_checkpoint(source).weight_map
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    plan = plan_for(source, ["vllm"])
    shards = set(json.loads(plan.index_text)["weight_map"].values())
    assert shards == {"model-00001-of-00001.safetensors", "model-kv-scales.safetensors"}


def test_a_single_file_beside_an_index_stays_behind(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "sources" / "llama-bf16", source)
    checkpoint = open_checkpoint(source)
    save_file(dict(checkpoint.read_many(checkpoint.weight_map)), source / "model.safetensors")
    assert "model.safetensors" not in plan_for(source, ["vllm"]).links


def test_other_files_go_along_but_no_pickles_and_nothing_hidden(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "sources" / "llama-bf16", source)
    for name in [
        "modeling.py",
        "assets/logo.txt",
        "pytorch_model.bin",
        ".cache/x",
        ".gitattributes",
    ]:
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text("x")
    plan = plan_for(source, ["vllm"])
    others = set(plan.links) - set(plan.shards)
    assert others == {"tokenizer_config.json", "modeling.py", "assets/logo.txt"}
    assert set(plan.left_out) == {"pytorch_model.bin", ".cache/", ".gitattributes"}


def test_planning_writes_nothing(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "sources" / "llama-modelopt", source)
    before = {path: path.read_bytes() for path in source.rglob("*")}
    plan_for(source, ["vllm"])
    assert {path: path.read_bytes() for path in source.rglob("*")} == before
    assert list(tmp_path.iterdir()) == [source]


def test_extra_files_go_into_our_folder_and_into_the_record():
    plan = plan_for("llama-bf16", ["vllm"], extra={"recipe.yaml": b"schema: 1\n"}, estimator="mse")
    assert plan.extra["fp8kv/recipe.yaml"] == b"schema: 1\n"
    manifest = json.loads(plan.extra["fp8kv/manifest.json"])
    assert manifest["schema"] == 1
    assert manifest["estimator"] == "mse"
    assert "fp8kv/recipe.yaml" in manifest["added"]
    assert set(manifest["changed"]) == {"config.json", "model.safetensors.index.json"}
    assert manifest["base"]["digest"] == plan.checkpoint.digest()
    assert plan.new_bytes == sum(len(data) for data in plan.new_files.values())


@pytest.mark.parametrize(
    "name", ["", "/etc/passwd", "../x", "manifest.json", "original/config.json"]
)
def test_extra_files_cannot_leave_the_folder_or_replace_ours(name):
    with pytest.raises(OutputError, match="cannot be a file of the folder fp8kv"):
        plan_for("llama-bf16", ["vllm"], extra={name: b""})


def test_a_modelopt_base_that_keeps_its_config_in_its_own_file_has_only_that_file_edited(tmp_path):
    source = edited(tmp_path, "llama-modelopt", quantization_config=None)
    plan = plan_for(source, ["vllm"])
    assert plan.config_text == plan.checkpoint.config_text
    quantization = json.loads(plan.extra["hf_quant_config.json"])["quantization"]
    assert quantization == {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}
    original = plan.extra["fp8kv/original/hf_quant_config.json"]
    assert original == (source / "hf_quant_config.json").read_bytes()


def test_sglang_gets_no_key_on_an_fp8_base_whose_scales_it_ignores(tmp_path):
    source = edited(tmp_path, "minimax-fp8", model_type="qwen3_moe")
    plan = plan_for(source, ["vllm", "sglang"])
    assert [effect.loads for effect in plan.effects] == ["loads", "ignored"]
    assert "kv_cache_quant_algo" not in plan.config_text


def test_mla_effects_say_plainly_that_the_cache_runs_at_one():
    for effect in plan_for("deepseek-fp8", ["vllm", "sglang"]).effects:
        assert effect.loads == "ignored"
        assert "scale 1.0" in effect.reason
        assert (
            "`--mode fold` will make the calibration effective (not in this version)"
            in effect.reason
        )
    assert [
        effect.reason.split()[:2] for effect in plan_for("deepseek-fp8", ["vllm", "sglang"]).effects
    ] == [
        ["vLLM", "0.33.0"],
        ["SGLang", "0.5.23"],
    ]


REFUSED_BASES = [
    ("awq", "drops the scales of such a checkpoint silently"),
    ("gptq", "drops the scales of such a checkpoint silently"),
    ("mxfp4", "no KV-cache method for this quantisation"),
    ("quark", "writes nothing that it has not seen load"),
    ("newfangled", "does not know what engines do with KV scales"),
]


@pytest.mark.parametrize(("method", "message"), REFUSED_BASES)
@pytest.mark.parametrize("base", ["llama-bf16", "deepseek-bf16"])
def test_a_quantisation_without_kv_scales_is_refused(tmp_path, base, method, message):
    source = edited(tmp_path, base, quantization_config={"quant_method": method})
    with pytest.raises(UnsupportedModelError, match=f"quant_method '{method}'.*{message}"):
        plan_for(source, ["vllm", "sglang"])


def test_a_quantisation_without_a_name_is_refused(tmp_path):
    source = edited(tmp_path, "llama-bf16", quantization_config={"bits": 4})
    with pytest.raises(UnsupportedModelError, match="quant_method 'unnamed'"):
        plan_for(source, ["vllm"])


def test_nested_modelopt_keys_are_refused(tmp_path):
    config = {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8"}}
    source = edited(tmp_path, "llama-modelopt", quantization_config=config)
    with pytest.raises(UnsupportedModelError, match=r"under quantization_config\.quantization"):
        plan_for(source, ["vllm"])


def test_a_layout_without_static_scales_is_refused_with_its_reason(tmp_path):
    source = edited(tmp_path, "deepseek-bf16", index_topk=2048)
    with pytest.raises(UnsupportedModelError, match=r"takes no KV scales: .*sparse attention"):
        plan_for(source, ["vllm"])


@pytest.mark.parametrize(
    ("source", "targets", "options", "error", "message"),
    [
        ("llama-bf16", [], {}, OutputError, "no target was given; choose from vllm, sglang"),
        ("llama-bf16", ["vlm"], {}, OutputError, "unknown target 'vlm'; known targets: vllm"),
        (
            "llama-bf16",
            ["vllm", "modelopt"],
            {},
            OutputError,
            "targets vllm and modelopt need different values of quantization_config.quant_method",
        ),
        (
            "deepseek-bf16",
            ["transformers", "sglang"],
            {},
            OutputError,
            "targets transformers and sglang exclude each other .* auto into fp8_e4m3",
        ),
        (
            "deepseek-fp8",
            ["modelopt"],
            {},
            UnsupportedModelError,
            "SGLang 0.5.23 applies to MLA when reading the cache and not when writing",
        ),
        (
            "minimax-fp8",
            ["modelopt"],
            {},
            UnsupportedModelError,
            "config.json holds one quant_method",
        ),
        (
            "minimax-fp8",
            ["vllm"],
            {"granularity": "head"},
            ScaleError,
            "expects a scalar weight.*--granularity tensor",
        ),
        (
            "minimax-fp8",
            ["sglang"],
            {"granularity": "head"},
            ScaleError,
            "one scale per layer .*--granularity tensor",
        ),
        (
            "llama-bf16",
            ["sglang"],
            {"granularity": "head"},
            ScaleError,
            "no target would use the scales.*--granularity tensor.*targets that do: vllm, transformers",
        ),
        (
            "llama-bf16",
            ["modelopt"],
            {"granularity": "head"},
            ScaleError,
            "one scalar scale per layer",
        ),
        (
            "llama-bf16",
            ["vllm"],
            {"fp8_format": "e5m2"},
            ScaleError,
            "fp8_e5m2 kv-cache is not supported with fp8 checkpoints",
        ),
        ("llama-bf16", ["sglang"], {"fp8_format": "e5m2"}, ScaleError, "stores e4m3 .*57344"),
        ("llama-bf16", ["transformers"], {"fp8_format": "e5m2"}, ScaleError, "is e4m3fn"),
        ("llama-bf16", ["modelopt"], {"fp8_format": "e5m2"}, ScaleError, "one FP8 format"),
        (
            "llama-bf16",
            ["vllm"],
            {"fp8_format": "e4m3fnuz"},
            ScaleError,
            "doubles scales on fnuz hardware itself.*--fp8-format e4m3fn",
        ),
        (
            "llama-bf16",
            ["sglang"],
            {"fp8_format": "e4m3fnuz"},
            ScaleError,
            "doubles scales on fnuz hardware itself.*--fp8-format e4m3fn",
        ),
    ],
)
def test_targets_that_cannot_be_served_are_refused(source, targets, options, error, message):
    with pytest.raises(error, match=message):
        plan_for(source, targets, **options)


def test_a_gqa_model_that_no_target_would_load_is_refused_with_those_that_would(tmp_path):
    source = edited(tmp_path, "llama-bf16", model_type="qwen3")
    with pytest.raises(UnsupportedModelError, match=r"runs at scale 1\.0.*targets that do: vllm"):
        plan_for(source, ["sglang"])


def test_per_head_scales_are_ignored_by_sglang_and_kept_for_vllm():
    plan = plan_for("llama-int4", ["vllm", "sglang"], "head")
    assert [effect.loads for effect in plan.effects] == ["loads", "ignored"]
    assert "FlashAttention 3" in plan.effects[0].reason
    assert '"strategy": "attn_head"' in plan.config_text


def test_scales_that_are_already_there_are_refused(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "sources" / "llama-int4", source)
    checkpoint = open_checkpoint(source)
    tensors = dict(checkpoint.read_many(checkpoint.weight_map))
    tensors["model.layers.1.self_attn.k_proj.k_scale"] = torch.ones(())
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(
        OutputError, match=r"already carries 1 KV scale tensors, .*layers\.1\.self_attn\.k_proj"
    ):
        plan_for(source, ["vllm"])


def test_our_own_output_as_a_source_is_refused_with_strip(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "sources" / "llama-int4", source)
    (source / "fp8kv").mkdir()
    (source / "fp8kv" / "manifest.json").write_text("{}")
    with pytest.raises(OutputError, match=r"written by fp8kv .*run `fp8kv strip`"):
        plan_for(source, ["vllm"])


def test_a_stray_scale_file_is_refused(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(GOLDEN / "sources" / "llama-int4", source)
    save_file({"x": torch.ones(1)}, source / "model-kv-scales.safetensors")
    with pytest.raises(OutputError, match="exists, though no index names it"):
        plan_for(source, ["vllm"])


def test_scales_of_other_layers_are_refused_by_name():
    checkpoint = open_checkpoint(GOLDEN / "sources" / "llama-bf16")
    facts = model_facts(checkpoint)
    scales = scales_for(facts)
    lacking = replace(scales, layers=scales.layers[:1])
    with pytest.raises(ScaleError, match=r"lacks model\.layers\.1\.self_attn, compared with the 2"):
        plan_overlay(checkpoint, facts, lacking, ["vllm"])
    third = LayerScales(2, "model.layers.2.self_attn", (1.0,), (1.0,))
    with pytest.raises(ScaleError, match=r"has too much: model\.layers\.2\.self_attn"):
        plan_overlay(checkpoint, facts, replace(scales, layers=(*scales.layers, third)), ["vllm"])


def test_scales_of_another_attention_kind_or_head_count_are_refused():
    checkpoint = open_checkpoint(GOLDEN / "sources" / "llama-bf16")
    facts = model_facts(checkpoint)
    with pytest.raises(ScaleError, match="for mla attention and the checkpoint has gqa"):
        plan_overlay(checkpoint, facts, scales_for(replace(facts, attention="mla")), ["vllm"])
    with pytest.raises(ScaleError, match="has 4 scales for 2 KV heads"):
        plan_overlay(
            checkpoint, facts, scales_for(replace(facts, num_kv_heads=4), "head"), ["vllm"]
        )
