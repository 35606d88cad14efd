"""The arms: how each holds the cache, and what cannot run."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fp8kv.calibrate.formats.checkpoint import open_checkpoint
from fp8kv.demo import MODELS
from fp8kv.recipes.errors import EvaluationError, RequestError
from fp8kv.runtime.evaluation import arms
from fp8kv.runtime.evaluation.arms import (
    EngineOptions,
    arm_opener,
    cache_mode,
    check_arms,
    default_context,
)
from fp8kv.runtime.llm import LoadedModel


@pytest.fixture
def scaled(tiny_checkpoint, tmp_path):
    """Copy a tiny model, with scales for some of its layers."""

    def make(names):
        path = tmp_path / "scaled"
        shutil.copytree(tiny_checkpoint("llama"), path)
        tensors = load_file(path / "model.safetensors")
        tensors |= {f"model.layers.{name}_scale": torch.tensor([0.5]) for name in names}
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return open_checkpoint(path)

    return make


WHOLE = ("0.self_attn.k", "0.self_attn.v", "1.self_attn.k", "1.self_attn.v")


def test_the_baseline_loses_nothing_of_what_the_model_computes():
    assert cache_mode("bf16", torch.bfloat16) == "bf16"
    assert cache_mode("bf16", torch.float16) == cache_mode("bf16", torch.float32) == "float32"
    for arm in ("fp8", "fp8-unit", "emulate"):
        assert cache_mode(arm, torch.bfloat16) == cache_mode(arm, torch.float32) == arm


def test_a_whole_set_of_scales_serves_every_arm(scaled):
    scales = check_arms(("bf16", "fp8-unit", "fp8", "emulate"), scaled(WHOLE))
    assert scales.fp8_format == "e4m3fn"


def test_arms_that_need_no_scales_run_without():
    checkpoint = open_checkpoint(MODELS["tiny-minimax-m2"])
    assert check_arms(("bf16", "fp8-unit"), checkpoint) is None


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ((), "an evaluation needs an arm; known: bf16, fp8-unit, fp8, emulate"),
        (("fp9",), "unknown arm 'fp9'; known: bf16, fp8-unit, fp8, emulate"),
        (("bf16", "bf16"), "an arm appears twice: bf16, bf16"),
        (
            ("bf16", "fp8"),
            "carries no KV scales: convert it with fp8kv calibrate, or leave out 'fp8'",
        ),
        (("fp8", "emulate"), "leave out 'fp8' and 'emulate'"),
    ],
)
def test_arms_that_cannot_run_are_refused(named, message):
    with pytest.raises(EvaluationError, match=message):
        check_arms(named, open_checkpoint(MODELS["tiny-minimax-m2"]))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (WHOLE[:3], "lacks v_scale of model.layers.1.self_attn: convert it anew"),
        (WHOLE[:2], "lacks k_scale and v_scale of model.layers.1.self_attn"),
    ],
)
def test_a_layer_without_a_scale_is_named(scaled, names, message):
    with pytest.raises(EvaluationError, match=message):
        check_arms(("bf16", "fp8"), scaled(names))


def test_an_arm_is_opened_as_large_as_it_is_asked_for(monkeypatch, minimax):
    opened = []
    monkeypatch.setattr(arms, "LLM", lambda loaded, **options: opened.append(options))
    loaded = LoadedModel(minimax.model, minimax.tokenizer, None, minimax.checkpoint)
    open_arm = arm_opener(loaded, EngineOptions(max_sequences=3, memory_fraction=0.5))
    open_arm("bf16", 7)
    open_arm("fp8-unit")
    assert opened == [
        {"cache": "float32", "max_sequences": 3, "num_pages": 7},
        {"cache": "fp8-unit", "max_sequences": 3, "memory_fraction": 0.5},
    ]


def test_options_of_the_engine_are_checked_by_it(minimax):
    loaded = LoadedModel(minimax.model, minimax.tokenizer, None, minimax.checkpoint)
    with pytest.raises(RequestError, match="memory_fraction is 2"):
        arm_opener(loaded, EngineOptions(memory_fraction=2.0))("bf16")


def test_texts_are_read_in_what_the_model_holds(minimax, tiny_checkpoint, load):
    small = load(tiny_checkpoint("llama"))
    assert default_context(LoadedModel(minimax.model, None)) == 2048
    assert default_context(LoadedModel(small.model, None)) == 256
