"""The table of engines: complete, sourced, and saying what the contract says."""

import datetime
import itertools
from dataclasses import replace

import pytest
import yaml

from fp8kv.calibrate.formats.facts import LayerFacts, ModelFacts
from fp8kv.calibrate.formats.target_table import Case, load_table
from fp8kv.calibrate.formats.targets import (
    base_method,
    case_of,
    check_target,
    config_lacks,
    config_needed,
    effect_rule,
    files_rule,
    forbidden_keys,
    load_targets,
    names_rule,
    select_targets,
)
from fp8kv.recipes.errors import OutputError

TARGETS = load_targets()
METHODS = sorted({*load_table().bases, "unheard-of"})
MODEL_TYPES = ["llama", "qwen2", "qwen3", "minimax_m2", "deepseek_v3", "unheard_of"]
CASES = [
    Case(attention, method, model_type, granularity, fp8_format, has_scheme)
    for attention, method, model_type, granularity, fp8_format, has_scheme in itertools.product(
        ["gqa", "mla"],
        METHODS,
        MODEL_TYPES,
        ["tensor", "head"],
        ["e4m3fn", "e5m2", "e4m3fnuz"],
        [False, True],
    )
]


def facts_of(**changes):
    facts = ModelFacts(
        architecture="LlamaForCausalLM",
        model_type="llama",
        attention="gqa",
        layers=(LayerFacts(0, "model.layers.0.self_attn"),),
        num_kv_heads=2,
        head_dim=64,
        latent_dim=None,
        rope_dim=None,
        quant_method=None,
        quantization={},
        quantization_location=(),
        static_scales=True,
        reason="",
    )
    return replace(facts, **changes)


def test_the_versions_are_those_that_the_facts_are_about():
    versions = {name: target.version for name, target in TARGETS.items()}
    assert versions == {
        "vllm": "0.33.0",
        "sglang": "0.5.23",
        "transformers": "5.23",
        "modelopt": "0.47",
    }
    assert all(type(target.date) is datetime.date for target in TARGETS.values())


@pytest.mark.parametrize("name", TARGETS)
def test_every_case_has_an_effect_a_source_names_and_a_command(name):
    target = TARGETS[name]
    for case in CASES:
        rule = effect_rule(target, case)
        assert rule.effect in ("loads", "ignored", "breaks")
        assert rule.source
        assert not rule.reason.endswith(".")
        names = names_rule(target, case)
        spellings = load_table().spellings
        assert {*names.write, *names.load, *names.harmful} <= set(spellings)
        if rule.effect == "loads":
            assert set(names.write) & set(names.load), case


@pytest.mark.parametrize("name", TARGETS)
def test_no_rule_is_dead(name):
    target = TARGETS[name]
    families = {kind for rule in target.effects for kind in rule.when.model_type or ()}
    cases = [*CASES, *(replace(case, model_type=kind) for case in CASES[::7] for kind in families)]
    assert {id(effect_rule(target, case)) for case in cases} == {
        id(rule) for rule in target.effects
    }
    assert {id(names_rule(target, case)) for case in cases} == {id(rule) for rule in target.names}


@pytest.mark.parametrize("name", TARGETS)
def test_serve_commands_name_the_model_once(name):
    for case in CASES:
        command = next(rule.command for rule in TARGETS[name].serve if rule.when.holds(case))
        assert command.format(model="/m").count("/m") == 1


def test_a_base_that_scales_cannot_be_added_to_says_why_and_whence():
    for name, base in load_table().bases.items():
        assert base.writable or (base.reason and base.source), name


def test_the_kv_scheme_has_exactly_the_keys_that_compressed_tensors_accepts():
    for granularity, strategy in (("tensor", "tensor"), ("head", "attn_head")):
        case = Case("gqa", "compressed-tensors", "llama", granularity)
        assert config_needed(TARGETS["vllm"], case) == {
            "kv_cache_scheme": {
                "num_bits": 8,
                "type": "float",
                "strategy": strategy,
                "symmetric": True,
                "dynamic": False,
            }
        }


@pytest.mark.parametrize(
    ("target", "model_type", "method", "effect", "write", "load"),
    [
        ("vllm", "llama", None, "loads", "attention", "attention projection inner"),
        ("vllm", "minimax_m2", "fp8", "loads", "attention", "attention projection inner"),
        ("vllm", "llama", "modelopt", "loads", "projection", "projection attention inner"),
        ("vllm", "llama", "awq", "ignored", None, None),
        ("sglang", "llama", "fp8", "loads", "attention", "attention projection"),
        ("sglang", "qwen2", "fp8", "loads", "attention inner", "inner"),
        ("sglang", "qwen2", "modelopt", "ignored", None, None),
        ("sglang", "qwen3_moe", "fp8", "ignored", None, None),
        ("sglang", "unheard_of", None, "ignored", None, None),
        ("sglang", "llama", "gptq", "ignored", None, None),
        ("transformers", "llama", "compressed-tensors", "loads", "attention", "attention"),
        ("transformers", "llama", "fp8", "ignored", None, None),
        ("modelopt", "llama", None, "loads", "projection", "projection"),
        ("modelopt", "llama", "fp8", "breaks", None, None),
    ],
)
def test_what_each_engine_loads(target, model_type, method, effect, write, load):
    quantization = {"quant_method": method} if method else {}
    facts = facts_of(model_type=model_type, quant_method=method, quantization=quantization)
    assert check_target(TARGETS[target], facts).loads == effect
    if effect == "loads":
        rule = names_rule(TARGETS[target], case_of(facts))
        assert (rule.write, rule.load) == (tuple(write.split()), tuple(load.split()))


@pytest.mark.parametrize("target", ["vllm", "sglang"])
@pytest.mark.parametrize("method", [None, "fp8", "compressed-tensors"])
def test_mla_is_ignored_by_both_engines_and_no_half_honoured_name_is_written(target, method):
    quantization = {"quant_method": method} if method else {}
    facts = facts_of(attention="mla", quant_method=method, quantization=quantization)
    effect = check_target(TARGETS[target], facts)
    assert effect.loads == "ignored"
    assert "--mode fold" in effect.reason
    assert names_rule(TARGETS[target], case_of(facts)).write == ("attention",)
    assert config_needed(TARGETS[target], case_of(facts)) == {}


def test_sglang_forbids_a_kv_scheme_for_mla_alone():
    rule = forbidden_keys(TARGETS["sglang"], Case("mla", "none", "deepseek_v3"))
    assert rule is not None
    assert rule.keys == ("kv_cache_scheme", "kv_cache_quant_algo")
    assert forbidden_keys(TARGETS["sglang"], Case("gqa", "none", "llama")) is None


def test_transformers_reads_mla_scales_once_a_scheme_is_there():
    config = {"quant_method": "compressed-tensors"}
    facts = facts_of(attention="mla", quant_method="compressed-tensors", quantization=config)
    assert check_target(TARGETS["transformers"], facts).loads == "ignored"
    with_scheme = replace(facts, quantization=config | {"kv_cache_scheme": {"num_bits": 8}})
    assert check_target(TARGETS["transformers"], with_scheme).loads == "loads"


def test_a_config_is_compared_key_by_key_and_may_say_more():
    case = Case("gqa", "compressed-tensors", "llama")
    needed = config_needed(TARGETS["vllm"], case)
    scheme = {**needed["kv_cache_scheme"], "observer": "minmax"}
    assert config_lacks(TARGETS["vllm"], case, {"kv_cache_scheme": scheme}) == []
    scheme["num_bits"] = 4
    assert config_lacks(TARGETS["vllm"], case, {"kv_cache_scheme": scheme}) == [
        "kv_cache_scheme.num_bits"
    ]
    assert config_lacks(TARGETS["vllm"], case, {"kv_cache_scheme": None}) == ["kv_cache_scheme"]


def test_modelopts_older_key_is_as_good():
    case = Case("gqa", "modelopt", "llama")
    assert config_lacks(TARGETS["vllm"], case, {"kv_cache_quant_algo": "FP8"}) == []
    assert config_lacks(TARGETS["vllm"], case, {}) == ["kv_cache_scheme"]


def test_only_modelopt_creates_a_file_and_only_on_an_unquantised_base():
    creating = {
        (name, method)
        for name, target in TARGETS.items()
        for method in METHODS
        if (rule := files_rule(target, Case("gqa", method, "llama"))) and rule.create
    }
    assert creating == {("modelopt", "none")}


def test_targets_are_selected_once_and_in_order():
    assert [target.name for target in select_targets(["sglang", "vllm", "sglang"])] == [
        "sglang",
        "vllm",
    ]
    with pytest.raises(OutputError, match="unknown target 'tgi'; known targets: vllm, sglang"):
        select_targets(["tgi"])


def test_a_config_without_a_method_is_not_taken_for_an_unquantised_model():
    assert base_method(facts_of()) == "none"
    assert base_method(facts_of(quantization={"bits": 4})) == "unnamed"


def test_the_table_is_read_only():
    with pytest.raises(TypeError):
        load_targets()["vllm"] = None


def test_the_yaml_has_no_key_that_nothing_reads():
    from importlib import resources

    text = (resources.files("fp8kv.calibrate.formats") / "targets.yaml").read_text()
    content = yaml.safe_load(text)
    assert set(content) == {"schema", "spellings", "bases", "shared", "targets"}
    known = {"engine", "version", "date", "effects", "names", "config", "forbid", "files", "serve"}
    for target in content["targets"].values():
        assert set(target) <= known
