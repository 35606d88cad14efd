"""The runtime applies the scales that a checkpoint carries, whoever wrote them."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fp8kv.calibrate.formats import kv_names
from fp8kv.calibrate.formats.checkpoint import open_checkpoint
from fp8kv.calibrate.formats.facts import model_facts
from fp8kv.calibrate.formats.targets import load_targets
from fp8kv.calibrate.modeling.tap import find_attention_modules
from fp8kv.calibrate.overlay.plan import plan_overlay
from fp8kv.calibrate.overlay.writer import write_overlay
from fp8kv.calibrate.scales import LayerScales, ScaleSet
from fp8kv.recipes.errors import CheckpointError, Fp8kvError, ScaleError
from fp8kv.runtime.cache_scales import read_scales
from fp8kv.runtime.paged_cache import build_cache, measure_dims

LAYERS = ("model.layers.0.self_attn", "model.layers.1.self_attn")

# the spellings that `inspect` reads, out of the table at the head of the module that reads them
SPELLINGS = re.findall(r"``([a-z_.]*scale)``", kv_names.__doc__)


@pytest.fixture
def with_scales(tiny_checkpoint, tmp_path):
    """Give a copy of a tiny model, the llama as a rule, with scale tensors added."""

    def get(tensors, manifest=None, source="llama"):
        directory = tmp_path / "scaled"
        shutil.copytree(tiny_checkpoint(source), directory)
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


@pytest.fixture
def held(load, tiny_checkpoint):
    """Give what the paged cache of a tiny model holds its layers at, by the number of the layer."""
    modules, dims = {}, {}

    def get(model_type, checkpoint):
        if model_type not in modules:
            model = load(tiny_checkpoint(model_type)).model
            modules[model_type] = find_attention_modules(model)
            dims[model_type] = measure_dims(model, modules[model_type])
        cache = build_cache(
            modules[model_type],
            dims[model_type],
            mode="fp8",
            num_pages=1,
            page_size=4,
            device="cpu",
            scales=read_scales(checkpoint),
        )
        layers = cache.layers.values()
        return [(layer.k_scale.tolist(), layer.v_scale.tolist()) for layer in layers]

    return get


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


def test_the_table_of_spellings_names_both_streams_and_their_sum():
    assert {"k_scale", "v_cache.scale", "mla_attn.mla_attn.k_scale", "kv_scale"} < set(SPELLINGS)
    assert len(SPELLINGS) == len(set(SPELLINGS)) >= 17


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_arrives_in_the_cache_of_its_layer(with_scales, held, spelling):
    tensors = {f"{LAYERS[0]}.{spelling}": 0.25, f"{LAYERS[1]}.{spelling}": [4.0, 8.0]}
    found = held("llama", with_scales(tensors))
    stream = re.match(r"(?:qkv_proj\.|(?:\w+\.)*(?=[kv]_scale))?(kv|k|v)_", spelling)[1]
    expected = {"k": ([0.25], [4.0, 8.0]), "v": ([0.25], [4.0, 8.0])}
    for name in {"k", "v"} - set(stream):
        expected[name] = ([1.0], [1.0])
    assert found == list(zip(expected["k"], expected["v"], strict=True))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_arrives_in_the_row_of_a_latent_layer(
    with_scales, held, tiny_checkpoint, spelling
):
    tensors = {f"{LAYERS[0]}.{spelling}": 0.25, f"{LAYERS[1]}.{spelling}": 4.0}
    checkpoint = with_scales(tensors, source="deepseek_v3")
    assert held("deepseek_v3", checkpoint) == [([0.25], [0.25]), ([4.0], [4.0])]


@pytest.mark.parametrize(
    ("model_type", "granularity"),
    [
        ("llama", "tensor"),
        ("llama", "head"),
        ("deepseek_v3", "tensor"),
        ("longcat_flash", "tensor"),  # two attention modules in a layer
        ("gemma3", "tensor"),  # a wrapper that transformers names otherwise
        ("kimi_k25", "tensor"),
    ],
)
def test_what_fp8kv_writes_arrives_for_every_target(
    tiny_checkpoint, held, tmp_path, model_type, granularity
):
    checkpoint = open_checkpoint(tiny_checkpoint(model_type))
    facts = model_facts(checkpoint)
    heads = 2 if granularity == "head" else 1
    layers = []
    for layer in facts.layers:
        k = tuple(2.0 ** (layer.index - head) for head in range(heads))
        v = k if facts.attention == "mla" else tuple(3 * value for value in k)
        layers.append(LayerScales(layer.index, layer.name, k, v))
    scales = ScaleSet(facts.attention, "e4m3fn", granularity, tuple(layers))
    served = []
    for target in load_targets():
        try:
            plan = plan_overlay(checkpoint, facts, scales, [target])
        except Fp8kvError:  # this target has no use for such scales
            continue
        write_overlay(plan, tmp_path / target)
        served.append(target)
        expected = [(list(layer.k), list(layer.v)) for layer in layers]
        assert held(model_type, open_checkpoint(tmp_path / target)) == expected, target
    assert "vllm" in served


@pytest.mark.parametrize(
    "other",
    ["audio_tower.layers.0.self_attn", "draft.layers.0.self_attn", "mtp_layers.0.self_attn"],
)
def test_attention_outside_the_decoder_has_no_say(with_scales, held, other):
    tensors = {f"{other}.k_scale": 0.25, f"{LAYERS[0]}.k_scale": 4.0}
    checkpoint = with_scales(tensors)
    assert as_lists(read_scales(checkpoint)) == {LAYERS[0]: ([4.0], None)}
    assert held("llama", checkpoint)[0] == ([4.0], [1.0])


def test_a_checkpoint_with_scales_outside_the_decoder_only_has_none(with_scales):
    assert read_scales(with_scales({"audio_tower.layers.0.self_attn.k_scale": 0.25})) is None


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
