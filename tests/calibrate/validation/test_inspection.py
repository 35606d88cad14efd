"""Inspecting any checkpoint: what is listed, and what is flagged."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fp8kv.calibrate.formats.checkpoint import open_checkpoint
from fp8kv.calibrate.validation.inspection import FLAGS, LayerRow, inspect

SOURCES = Path(__file__).parents[1] / "golden" / "sources"
LAYER0, LAYER1 = "model.layers.0.self_attn", "model.layers.1.self_attn"


def checkpoint_with(tmp_path, base, tensors, **config):
    directory = tmp_path / "foreign"
    shutil.copytree(SOURCES / base, directory)
    checkpoint = open_checkpoint(directory)
    save_file(tensors, directory / "scales.safetensors")
    index_path = directory / "model.safetensors.index.json"
    if not index_path.exists():
        os.rename(directory / "model.safetensors", directory / "model-1.safetensors")
    weight_map = {
        name: "model-1.safetensors" if shard == "model.safetensors" else shard
        for name, shard in checkpoint.weight_map.items()
    }
    weight_map |= dict.fromkeys(tensors, "scales.safetensors")
    index_path.write_text(json.dumps({"weight_map": weight_map}))
    content = json.loads((directory / "config.json").read_text()) | config
    (directory / "config.json").write_text(json.dumps(content))
    return open_checkpoint(directory)


def scales(k0=0.5, v0=0.25, k1=0.125, v1=2.0, k="{}.k_scale", v="{}.v_scale"):
    values = {
        k.format(LAYER0): k0,
        v.format(LAYER0): v0,
        k.format(LAYER1): k1,
        v.format(LAYER1): v1,
    }
    return {name: torch.tensor([value]) for name, value in values.items() if value is not None}


def test_sound_scales_are_listed_without_flags(tmp_path):
    found = inspect(checkpoint_with(tmp_path, "llama-bf16", scales()))
    assert found.attention == "gqa"
    assert found.rows == (
        LayerRow(LAYER0, "{}_scale", (0.5, 0.5), (0.25, 0.25), ()),
        LayerRow(LAYER1, "{}_scale", (0.125, 0.125), (2.0, 2.0), ()),
    )
    assert found.flags == ()
    assert not found.suspicious


@pytest.mark.parametrize(
    ("k", "v", "style"),
    [
        ("{}.k_proj.k_scale", "{}.v_proj.v_scale", "{}_proj.{}_scale"),
        ("{}.attn.k_scale", "{}.attn.v_scale", "attn.{}_scale"),
        ("{}.k_proj.output_scale", "{}.v_proj.output_scale", "{}_proj.output_scale"),
    ],
)
def test_foreign_spellings_are_understood(tmp_path, k, v, style):
    found = inspect(checkpoint_with(tmp_path, "llama-bf16", scales(k=k, v=v)))
    assert [row.style for row in found.rows] == [style, style]
    assert found.rows[0].k == (0.5, 0.5)
    assert not found.suspicious


def test_one_scale_per_head_shows_its_range(tmp_path):
    tensors = {name: torch.tensor([0.5, 0.25]).view(2, 1, 1) for name in scales()}
    tensors[f"{LAYER0}.v_scale"] = torch.tensor([1.0, 4.0]).view(2, 1, 1)
    found = inspect(checkpoint_with(tmp_path, "llama-bf16", tensors))
    assert (found.rows[0].k, found.rows[0].v) == ((0.25, 0.5), (1.0, 4.0))


def test_no_scales_at_all():
    found = inspect(open_checkpoint(SOURCES / "llama-bf16"))
    assert (found.rows, found.flags) == ((), ("no-scales",))


@pytest.mark.parametrize(
    ("values", "flags"),
    [
        ((0.0, 0.0, 0.0, 0.0), ("all-zero",)),
        ((1.0, 1.0, 1.0, 1.0), ("all-one",)),
        ((0.5, 0.25, 0.5, 0.25), ("identical",)),
        ((0.5, 0.25, None, None), ("missing-layers",)),
    ],
)
def test_flags_of_the_whole_checkpoint(tmp_path, values, flags):
    assert inspect(checkpoint_with(tmp_path, "llama-bf16", scales(*values))).flags == flags


@pytest.mark.parametrize(
    ("values", "flags"),
    [
        ((None, None), ("missing",)),
        ((0.5, None), ("k-only",)),
        ((None, 0.5), ("v-only",)),
        ((0.0, 0.5), ("out-of-range",)),
        ((-1.0, 0.5), ("out-of-range",)),
        ((float("nan"), 0.5), ("out-of-range",)),
        ((float("inf"), 0.5), ("out-of-range",)),
        ((64.5, 0.5), ("out-of-range",)),
        ((2.0**-21, 0.5), ("out-of-range",)),
        ((64.0, 2.0**-20), ()),
    ],
)
def test_flags_of_a_layer(tmp_path, values, flags):
    found = inspect(checkpoint_with(tmp_path, "llama-bf16", scales(*values)))
    assert found.rows[0].flags == flags
    assert found.rows[1].flags == ()
    assert found.suspicious == bool(flags)


def test_a_nan_among_heads_is_shown(tmp_path):
    tensors = scales() | {f"{LAYER0}.k_scale": torch.tensor([0.5, float("nan")])}
    low, high = inspect(checkpoint_with(tmp_path, "llama-bf16", tensors)).rows[0].k
    assert low != low
    assert high != high


def test_mla_layers_whose_scales_differ_are_flagged(tmp_path):
    found = inspect(checkpoint_with(tmp_path, "deepseek-fp8", scales(0.5, 0.5, 0.25, 0.5)))
    assert found.attention == "mla"
    assert [row.flags for row in found.rows] == [(), ("k-unlike-v",)]


def test_the_deprecated_name_is_flagged_and_counts_for_both(tmp_path):
    tensors = {f"{LAYER0}.kv_scale": torch.tensor(0.5), f"{LAYER1}.kv_scale": torch.tensor(0.25)}
    row = inspect(checkpoint_with(tmp_path, "llama-bf16", tensors)).rows[0]
    assert (row.k, row.v, row.flags) == ((0.5, 0.5), (0.5, 0.5), ("deprecated-kv-scale",))


def test_aliases_are_one_row_and_flagged_only_where_they_differ(tmp_path):
    tensors = scales() | {
        f"{LAYER0}.attn.k_scale": torch.tensor([0.5]),
        f"{LAYER1}.attn.k_scale": torch.tensor([0.5]),
    }
    rows = inspect(checkpoint_with(tmp_path, "llama-bf16", tensors)).rows
    assert [row.flags for row in rows] == [(), ("aliases-differ",)]
    assert set(rows[0].style.split(", ")) == {"{}_scale", "attn.{}_scale"}


def test_an_unknown_architecture_is_still_listed(tmp_path):
    renamed = {name.replace("self_attn", "attention"): value for name, value in scales().items()}
    checkpoint = checkpoint_with(tmp_path, "llama-bf16", renamed)
    weights = {
        name.replace("k_proj", "key").replace("qkv", "x"): shard
        for name, shard in checkpoint.weight_map.items()
    }
    found = inspect(replace(checkpoint, weight_map=weights))
    assert found.attention is None
    assert found.flags == ("unknown-architecture",)
    assert len(found.rows) == 2


def test_every_flag_that_can_be_raised_is_explained():
    source = Path(inspect.__code__.co_filename).read_text()
    raised = {flag for flag in FLAGS if source.count(f'"{flag}"') > 1}
    assert raised == set(FLAGS)
