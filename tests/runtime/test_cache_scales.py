"""The runtime applies the scales that a checkpoint carries, whoever wrote them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fp8kv.calibrate.formats.checkpoint import open_checkpoint
from fp8kv.recipes.errors import CheckpointError, ScaleError
from fp8kv.runtime.cache_scales import read_scales

LAYERS = ("model.layers.0.self_attn", "model.layers.1.self_attn")


@pytest.fixture
def with_scales(tiny_checkpoint, tmp_path):
    """Give a copy of the tiny llama with scale tensors added."""

    def get(tensors, manifest=None):
        directory = tmp_path / "scaled"
        shutil.copytree(tiny_checkpoint("llama"), directory)
        path = directory / "model.safetensors"
        added = {name: torch.tensor(value) for name, value in tensors.items()}
        save_file(load_file(path) | added, path, metadata={"format": "pt"})
        if manifest is not None:
            (directory / "fp8kv").mkdir()
            (directory / "fp8kv" / "manifest.json").write_text(json.dumps(manifest))
        return open_checkpoint(directory)

    return get


def as_lists(scales):
    return {
        name: tuple(None if value is None else value.tolist() for value in pair)
        for name, pair in scales.layers.items()
    }


def test_a_checkpoint_without_scales_has_none(tiny_checkpoint):
    assert read_scales(open_checkpoint(tiny_checkpoint("llama"))) is None


@pytest.mark.parametrize(
    ("k_name", "v_name"),
    [
        ("k_scale", "v_scale"),
        ("attn.k_scale", "attn.v_scale"),
        ("k_proj.k_scale", "v_proj.v_scale"),
        ("k_proj.output_scale", "v_proj.output_scale"),
        ("k_cache.scale", "v_cache.scale"),
    ],
)
def test_scales_are_read_in_every_spelling(with_scales, k_name, v_name):
    # 0.3 is no bfloat16 number: other writers' scales are taken as they are
    tensors = {f"{LAYERS[0]}.{k_name}": 0.3, f"{LAYERS[0]}.{v_name}": [0.5, 2.0]}
    scales = read_scales(with_scales(tensors))

    assert scales.fp8_format == "e4m3fn"
    assert as_lists(scales) == {LAYERS[0]: ([pytest.approx(0.3, rel=1e-7)], [0.5, 2.0])}


def test_one_deprecated_scale_serves_both_streams(with_scales):
    scales = read_scales(with_scales({f"{LAYERS[1]}.kv_scale": 0.5}))
    assert as_lists(scales) == {LAYERS[1]: ([0.5], [0.5])}


def test_a_stream_without_a_scale_stays_without(with_scales):
    scales = read_scales(with_scales({f"{LAYERS[1]}.k_scale": 0.5}))
    assert as_lists(scales) == {LAYERS[1]: ([0.5], None)}


def test_the_format_comes_from_the_record_of_calibration(with_scales):
    tensors = {f"{LAYERS[0]}.k_scale": 0.5}
    assert read_scales(with_scales(tensors, {"fp8_format": "e5m2"})).fp8_format == "e5m2"


def test_an_unknown_format_in_the_record_is_refused(with_scales):
    checkpoint = with_scales({f"{LAYERS[0]}.k_scale": 0.5}, {"fp8_format": "e3m4"})
    with pytest.raises(CheckpointError, match=r"manifest\.json is 'e3m4', and this fp8kv knows"):
        read_scales(checkpoint)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused(with_scales, value):
    with pytest.raises(ScaleError, match=r"0\.self_attn\.k_scale is .* positive and finite"):
        read_scales(with_scales({f"{LAYERS[0]}.k_scale": value}))


def test_two_names_of_one_scale_must_agree(with_scales):
    tensors = {f"{LAYERS[0]}.k_scale": 0.5, f"{LAYERS[0]}.attn.k_scale": 0.25}
    with pytest.raises(ScaleError, match="are two names of one scale, but differ"):
        read_scales(with_scales(tensors))
