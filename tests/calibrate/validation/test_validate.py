"""Every check: it passes on what fp8kv writes, and finds what is planted."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fp8kv.calibrate.formats.checkpoint import open_checkpoint
from fp8kv.calibrate.formats.facts import model_facts
from fp8kv.calibrate.overlay.plan import plan_overlay
from fp8kv.calibrate.overlay.writer import write_overlay
from fp8kv.calibrate.scales import LayerScales, ScaleSet
from fp8kv.calibrate.validation.validate import CHECKS, describe_checks, plausibility, validate
from fp8kv.recipes.errors import StatisticsError

SOURCES = Path(__file__).parents[1] / "golden" / "sources"
K0 = "model.layers.0.self_attn.k_scale"
V1 = "model.layers.1.self_attn.v_scale"


def convert(base, out, targets=("vllm", "sglang"), granularity="tensor", estimator=None):
    checkpoint = open_checkpoint(SOURCES / base)
    facts = model_facts(checkpoint)
    values = (0.5, 0.25) if granularity == "head" else (0.5,)
    layers = tuple(LayerScales(layer.index, layer.name, values, values) for layer in facts.layers)
    scales = ScaleSet(facts.attention, "e4m3fn", granularity, layers)
    extra = {"kv-stats.safetensors": b"statistics"}
    write_overlay(plan_overlay(checkpoint, facts, scales, targets, extra, estimator=estimator), out)
    return out


def change(directory, **changes):
    """Write other scale tensors, into the index too; None removes one."""
    path = directory / "model-kv-scales.safetensors"
    tensors = load_file(path)
    for name, value in changes.items():
        tensors[name] = value
    kept = {name: value for name, value in tensors.items() if value is not None}
    path.unlink()
    save_file(kept, path)
    index_path = directory / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    weights = {name: shard for name, shard in index["weight_map"].items() if shard != path.name}
    index["weight_map"] = weights | dict.fromkeys(kept, path.name)
    index_path.write_text(json.dumps(index))


def foreign(tmp_path, base, tensors, **config):
    """A checkpoint with scales that fp8kv did not write."""
    directory = tmp_path / "foreign"
    shutil.copytree(SOURCES / base, directory)
    save_file(tensors, directory / "scales.safetensors")
    index_path = directory / "model.safetensors.index.json"
    if index_path.exists():
        index = json.loads(index_path.read_text())
    else:
        checkpoint = open_checkpoint(directory)
        os.rename(directory / "model.safetensors", directory / "model-1.safetensors")
        index = {"weight_map": dict.fromkeys(checkpoint.weight_map, "model-1.safetensors")}
    index["weight_map"] |= dict.fromkeys(tensors, "scales.safetensors")
    index_path.write_text(json.dumps(index))
    content = json.loads((directory / "config.json").read_text()) | config
    (directory / "config.json").write_text(json.dumps(content))
    return directory


def both(spelling, value=0.5, layers=2, shape=(1,)):
    return {
        f"model.layers.{layer}.self_attn.{spelling.format(stream, stream)}": torch.full(
            shape, value
        )
        for layer in range(layers)
        for stream in "kv"
    }


def findings(directory, **options):
    return {
        check.name: check.detail for check in validate(directory, **options) if not check.passed
    }


@pytest.mark.parametrize(
    ("base", "targets", "granularity"),
    [
        ("llama-bf16", ["vllm", "sglang", "transformers"], "tensor"),
        ("llama-bf16", ["modelopt"], "tensor"),
        ("llama-int4", ["vllm", "sglang"], "head"),
        ("qwen2-bf16", ["vllm", "sglang"], "tensor"),
        ("minimax-fp8", ["vllm", "sglang"], "tensor"),
        ("llama-modelopt", ["vllm", "sglang", "modelopt"], "tensor"),
        ("deepseek-bf16", ["transformers"], "tensor"),
        ("deepseek-fp8", ["vllm", "sglang"], "tensor"),
        ("kimi-int4", ["vllm", "sglang", "transformers"], "tensor"),
    ],
)
def test_what_fp8kv_writes_passes_every_check(tmp_path, base, targets, granularity):
    convert(base, tmp_path / "out", targets, granularity)
    checks = validate(tmp_path / "out")
    assert [check for check in checks if not check.passed] == []
    names = [check.name for check in checks]
    assert len(set(names)) == len(names)
    assert [f"target {name}" for name in targets] == [name for name in names if " " in name]
    assert ("mla-k-equals-v" in names) == (not base.startswith(("llama", "qwen", "minimax")))
    assert "base-untouched" in names
    assert "plausible" not in names


def test_every_check_is_described_and_named_once():
    described = describe_checks()
    assert len({name for name, _ in described}) == len(CHECKS)
    assert all(text.endswith(".") for _, text in described)
    assert ("finite", "No scale is NaN or infinite.") in described


def test_a_checkpoint_that_does_not_open_gives_that_one_line(tmp_path):
    convert("llama-bf16", tmp_path / "out")
    (tmp_path / "out" / "model-00001-of-00002.safetensors").unlink()
    checks = validate(tmp_path / "out")
    assert [(check.name, check.passed) for check in checks] == [("opens", False)]
    assert "model-00001-of-00002.safetensors, which is missing" in checks[0].detail


def test_a_layer_without_scales_is_found(tmp_path):
    convert("llama-bf16", tmp_path / "out")
    change(tmp_path / "out", **{K0: None, "model.layers.0.self_attn.v_scale": None})
    found = findings(tmp_path / "out")
    assert found["layers-present"] == "model.layers.0.self_attn has no scale"
    assert f"vLLM 0.33.0 finds no {K0}" in found["target vllm"]


def test_a_missing_stream_is_found(tmp_path):
    convert("llama-bf16", tmp_path / "out")
    change(tmp_path / "out", **{V1: None})
    found = findings(tmp_path / "out")
    assert "model.layers.1.self_attn has no v_scale" in found["k-and-v-present"]
    assert "layers-present" not in found


@pytest.mark.parametrize(
    ("value", "check"),
    [
        (float("nan"), "finite"),
        (float("inf"), "finite"),
        (0.0, "positive"),
        (-1.0, "positive"),
        (0.1, "bfloat16-representable"),
    ],
)
def test_an_unsound_value_is_found_by_the_check_for_it_alone(tmp_path, value, check):
    convert("llama-bf16", tmp_path / "out")
    change(tmp_path / "out", **{K0: torch.tensor([value])})
    found = findings(tmp_path / "out")
    assert list(found) == [check]
    assert K0 in found[check]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.tensor([0.5], dtype=torch.bfloat16), "is BF16, not F32"),
        (torch.full((3,), 0.5), r"has shape [3]: neither one value nor one per head"),
    ],
)
def test_dtype_and_shape_are_checked(tmp_path, tensor, message):
    convert("llama-bf16", tmp_path / "out")
    change(tmp_path / "out", **{K0: tensor})
    assert message in findings(tmp_path / "out")["dtype-and-shape"]


def test_foreign_scales_may_be_half_precision(tmp_path):
    tensors = {name: value.bfloat16() for name, value in both("{}_scale").items()}
    directory = foreign(tmp_path, "minimax-fp8", tensors)
    assert "dtype-and-shape" not in findings(directory)


def test_aliases_that_disagree_are_found(tmp_path):
    convert("qwen2-bf16", tmp_path / "out")
    change(tmp_path / "out", **{"model.layers.0.self_attn.attn.k_scale": torch.tensor([0.25])})
    found = findings(tmp_path / "out")
    assert list(found) == ["aliases-agree"]
    assert "attn.k_scale is 0.25" in found["aliases-agree"]


def test_mla_scales_that_differ_are_found(tmp_path):
    convert("deepseek-fp8", tmp_path / "out")
    change(tmp_path / "out", **{V1: torch.tensor([0.25])})
    message = "model.layers.1.self_attn has k_scale 0.5 and v_scale 0.25"
    assert findings(tmp_path / "out") == {"mla-k-equals-v": message}


def test_a_config_that_lost_its_kv_scheme_is_found_for_each_target(tmp_path):
    convert("llama-bf16", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    del config["quantization_config"]["kv_cache_scheme"]
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    found = findings(tmp_path / "out")
    assert list(found) == ["target vllm", "target sglang"]
    assert "under quantization_config: kv_cache_scheme" in found["target vllm"]


def test_an_alias_that_sglang_needs_is_missed(tmp_path):
    convert("qwen2-bf16", tmp_path / "out")
    aliases = {
        f"model.layers.{layer}.self_attn.attn.{stream}_scale": None
        for layer in range(2)
        for stream in "kv"
    }
    change(tmp_path / "out", **aliases)
    assert list(findings(tmp_path / "out")) == ["target sglang"]


def test_ignored_targets_pass_and_are_named(tmp_path):
    convert("deepseek-fp8", tmp_path / "out")
    lines = {check.name: check for check in validate(tmp_path / "out")}
    assert lines["target vllm"].passed
    assert lines["target vllm"].detail.startswith("ignored: vLLM 0.33.0 has no way")


def test_foreign_scales_without_any_config_are_a_finding(tmp_path):
    found = findings(foreign(tmp_path, "llama-bf16", both("{}_scale")))
    assert "quantization_config: quant_method" in found["target vllm"]
    assert "target modelopt" not in found


def test_foreign_modelopt_scales_are_judged_as_such(tmp_path):
    scheme = {"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}}
    config = {"quant_method": "modelopt", "quant_algo": "FP8", **scheme}
    tensors = both("{}_proj.{}_scale", shape=())
    directory = foreign(tmp_path, "llama-modelopt", tensors, quantization_config=config)
    checks = {check.name: check for check in validate(directory)}
    assert all(check.passed for check in checks.values())
    assert checks["target transformers"].detail.startswith("ignored")
    assert "base-untouched" not in checks


def test_names_that_sglang_half_honours_for_mla_are_found_unless_they_are_one(tmp_path):
    directory = foreign(tmp_path, "deepseek-fp8", both("{}_proj.{}_scale"))
    assert (
        "applies model.layers.0.self_attn.k_proj.k_scale = 0.5 when it reads the cache and not"
        in (findings(directory)["target sglang"])
    )
    shutil.rmtree(directory)
    assert findings(foreign(tmp_path, "deepseek-fp8", both("{}_proj.{}_scale", 1.0))) == {}


def test_the_deprecated_single_scale_is_found(tmp_path):
    found = findings(foreign(tmp_path, "minimax-fp8", both("kv_scale")))
    assert "has no k_scale" in found["k-and-v-present"]


def test_a_tensor_that_the_index_does_not_know_is_found(tmp_path):
    convert("llama-bf16", tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["model.embed_tokens.weight"]
    path.write_text(json.dumps(index))
    found = findings(tmp_path / "out")
    assert list(found) == ["index"]
    assert (
        "model.embed_tokens.weight is in model-00001-of-00002.safetensors but not" in found["index"]
    )


def test_a_shard_that_was_exchanged_is_found(tmp_path):
    convert("llama-bf16", tmp_path / "out")
    path = tmp_path / "out" / "model-00002-of-00002.safetensors"
    tensors = load_file(path)
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt", "note": "another header"})
    message = "model-00002-of-00002.safetensors has another size or header than when fp8kv read it"
    assert findings(tmp_path / "out") == {"base-untouched": message}


def test_a_shard_that_was_added_is_found(tmp_path):
    convert("llama-bf16", tmp_path / "out")
    save_file({"extra": torch.ones(1)}, tmp_path / "out" / "extra.safetensors")
    path = tmp_path / "out" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["extra"] = "extra.safetensors"
    path.write_text(json.dumps(index))
    assert "extra.safetensors was not there" in findings(tmp_path / "out")["base-untouched"]


def test_a_damaged_manifest_is_found(tmp_path):
    convert("llama-bf16", tmp_path / "out")
    (tmp_path / "out" / "fp8kv" / "manifest.json").write_text('{"schema": 1}')
    assert "is damaged" in findings(tmp_path / "out")["opens"]


def test_scales_are_compared_with_the_statistics_if_a_reader_is_given(tmp_path):
    convert("llama-bf16", tmp_path / "out", estimator="absmax")
    maxima = dict.fromkeys(
        [f"model.layers.{layer}.self_attn" for layer in range(2)], (224.0, 300.0)
    )
    seen = []

    def read_absmax(path):
        seen.append(path)
        return maxima

    found = findings(tmp_path / "out", read_absmax=read_absmax)
    assert seen == [tmp_path / "out" / "fp8kv" / "kv-stats.safetensors"]
    assert list(found) == ["plausible"]
    assert (
        "v_scale 0.5 of model.layers.0.self_attn clips: the calibrated maximum 300 is 600"
        in (found["plausible"])
    )


def test_clipping_is_what_other_estimators_do_on_purpose(tmp_path):
    convert("llama-bf16", tmp_path / "out", estimator="mse")
    maxima = dict.fromkeys(
        [f"model.layers.{layer}.self_attn" for layer in range(2)], (224.0, 300.0)
    )
    assert findings(tmp_path / "out", read_absmax=lambda path: maxima) == {}


def test_no_statistics_give_no_line_and_broken_ones_a_finding(tmp_path):
    convert("llama-bf16", tmp_path / "out")

    def broken(path):
        raise StatisticsError(f"{path.name} is truncated")

    found = findings(tmp_path / "out", read_absmax=broken)
    assert found == {"plausible": "kv-stats.safetensors is truncated"}
    (tmp_path / "out" / "fp8kv" / "kv-stats.safetensors").unlink()
    names = [check.name for check in validate(tmp_path / "out", broken)]
    assert "plausible" not in names


@given(st.floats(2.0**-30, 2.0**30), st.floats(1.0, 63.0), st.sampled_from(["e4m3fn", "e5m2"]))
def test_any_scale_from_the_absmax_rule_up_to_the_waste_factor_is_plausible(absmax, factor, name):
    limit = {"e4m3fn": 448.0, "e5m2": 57344.0}[name]
    scale = absmax / limit * factor
    assert plausibility({"a": ([scale], [scale])}, {"a": (absmax, absmax)}, fp8_format=name) == []


@given(st.floats(2.0**-30, 2.0**30), st.floats(1.01, 1000.0))
def test_a_scale_below_the_absmax_rule_clips_and_one_far_above_wastes(absmax, factor):
    clips = plausibility({"a": ([absmax / 448 / factor], [1.0])}, {"a": (absmax, 0.0)})
    assert [problem for problem in clips if "clips" in problem]
    wastes = plausibility({"a": ([absmax / 448 * 64 * factor], [1.0])}, {"a": (absmax, 0.0)})
    assert [problem for problem in wastes if "wastes range" in problem]


def test_the_larger_stream_counts_for_mla():
    scales = {"a": ([1 / 448], [1 / 448])}
    assert plausibility(scales, {"a": (0.001, 1.0)}, attention="mla") == []
    assert len(plausibility(scales, {"a": (0.001, 1.0)}, attention="gqa")) == 1


def test_a_layer_that_the_statistics_do_not_know_is_named():
    assert plausibility({"a": ([1.0], [1.0])}, {}) == ["the statistics have no layer a"]
