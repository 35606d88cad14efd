"""A paged cache has the shapes that the model writes and the scales that its checkpoint carries."""

import logging

import pytest
import torch

from fp8kv.calibrate.modeling.tap import find_attention_modules
from fp8kv.calibrate.scales import LayerScales, ScaleSet
from fp8kv.recipes.errors import (
    EvaluationError,
    ScaleError,
    UnsupportedModelError,
)
from fp8kv.runtime.cache_scales import CacheScales
from fp8kv.runtime.paged_cache import (
    LayerDims,
    build_cache,
    bytes_per_token,
    measure_dims,
)

LAYERS = ("model.layers.0.self_attn", "model.layers.1.self_attn")
GQA = dict.fromkeys(LAYERS, LayerDims("gqa", 2, 8, 6))
MLA = dict.fromkeys(LAYERS, LayerDims("mla", 1, 32, 24))


def build(dims=GQA, **changed):
    chosen = {"mode": "fp8", "num_pages": 3, "page_size": 4, "device": "cpu", "scales": None}
    # only the names of the modules are read
    return build_cache(dict.fromkeys(dims), dims, **chosen | changed)


def scales_of(*pairs, attention="gqa", fp8_format="e4m3fn"):
    layers = tuple(
        LayerScales(index, name, k, v)
        for index, (name, (k, v)) in enumerate(zip(LAYERS, pairs, strict=False))
    )
    granularity = "head" if len(pairs[0][0]) > 1 else "tensor"
    return ScaleSet(attention, fp8_format, granularity, layers)


def model_of(load, tiny_checkpoint, model_type):
    model = load(tiny_checkpoint(model_type)).model
    return model, find_attention_modules(model)


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("llama", [("gqa", 2, 8, 8)] * 2),
        ("qwen3", [("gqa", 2, 16, 16)] * 2),
        ("mimo_v2_flash", [("gqa", None, 24, 16)] * 2),
        ("deepseek_v3", [("mla", 1, 32, 24)] * 2),
        ("longcat_flash", [("mla", 1, 32, 24)] * 4),
    ],
)
def test_sizes_are_those_that_the_modules_write(load, tiny_checkpoint, model_type, expected):
    model, modules = model_of(load, tiny_checkpoint, model_type)

    dims = measure_dims(model, modules)

    assert list(dims) == list(modules)
    for found, (attention, kv_heads, k_dim, v_dim) in zip(dims.values(), expected, strict=True):
        assert found.attention == attention
        assert found.kv_heads == kv_heads or kv_heads is None
        assert (found.k_dim, found.v_dim) == (k_dim, v_dim)


def test_a_model_that_caches_nothing_is_refused(load, tiny_checkpoint, monkeypatch):
    model, modules = model_of(load, tiny_checkpoint, "llama")
    monkeypatch.setattr(model, "forward", lambda **_: None)
    with pytest.raises(UnsupportedModelError, match=r"cached nothing at model\.layers\.0"):
        measure_dims(model, modules)


@pytest.mark.parametrize(
    ("mode", "dtype"),
    [
        ("bf16", torch.bfloat16),
        ("fp8", torch.float8_e4m3fn),
        ("fp8-unit", torch.float8_e4m3fn),
        ("emulate", torch.bfloat16),
        ("float32", torch.float32),
    ],
)
def test_pages_have_their_mode_s_type_and_their_layer_s_shape(mode, dtype):
    cache = build(mode=mode)

    assert list(cache.layers) == list(LAYERS)
    layer = cache.layers[LAYERS[1]]
    assert (layer.name, layer.mode, layer.v_dim) == (LAYERS[1], mode, 6)
    assert (layer.k.shape, layer.v.shape) == ((3, 4, 2, 8), (3, 4, 2, 6))
    assert layer.k.dtype == layer.v.dtype == dtype
    assert layer.holds_codes == (mode in ("fp8", "fp8-unit"))
    assert (layer.fmt is None) == (mode in ("bf16", "float32"))
    assert cache.bytes_per_token == 2 * 2 * 14 * dtype.itemsize == bytes_per_token(GQA, mode)
    held = sum(part.nbytes for one in cache.layers.values() for part in (one.k, one.v))
    assert held == cache.bytes_per_token * cache.num_pages * cache.page_size


def test_an_mla_layer_is_one_row_with_one_scale():
    scales = scales_of(((0.5,), (0.5,)), ((0.25,), (0.25,)), attention="mla")
    cache = build(MLA, scales=scales)

    layer = cache.layers[LAYERS[1]]
    assert layer.attention == "mla"
    assert layer.k.shape == (3, 4, 32)
    assert layer.v is None
    assert layer.v_dim == 24
    assert layer.v_scale is layer.k_scale
    assert layer.k_scale.tolist() == [0.25]
    assert cache.bytes_per_token == 64


def test_scales_reach_their_layers_and_heads():
    cache = build(scales=scales_of(((0.5, 2.0), (4.0, 1.0)), ((0.25, 8.0), (1.0, 16.0))))

    found = [(one.k_scale.tolist(), one.v_scale.tolist()) for one in cache.layers.values()]
    assert found == [([0.5, 2.0], [4.0, 1.0]), ([0.25, 8.0], [1.0, 16.0])]
    assert cache.layers[LAYERS[0]].k_scale.dtype == torch.float32


def test_the_format_is_that_of_the_scales():
    scales = scales_of(((0.5,), (2.0,)), ((0.5,), (2.0,)), fp8_format="e5m2")
    assert build(scales=scales).layers[LAYERS[0]].k.dtype == torch.float8_e5m2
    assert build(scales=scales, mode="fp8-unit").layers[LAYERS[0]].k.dtype == torch.float8_e5m2


def test_a_wrapper_s_other_name_for_the_same_layer_is_found():
    dims = {"model.language_model.layers.1.self_attn": GQA[LAYERS[1]]}
    scales = CacheScales(
        "e4m3fn",
        {
            f"language_model.model.layers.{number}.self_attn": (torch.tensor([value]),) * 2
            for number, value in ((11, 3.0), (1, 5.0))
        },
    )
    (layer,) = build(dims, scales=scales).layers.values()
    assert layer.k_scale.tolist() == [5.0]


@pytest.mark.parametrize("mode", ["fp8-unit", "bf16", "float32"])
def test_modes_without_scales_do_not_take_them(mode, caplog):
    cache = build(mode=mode, scales=scales_of(((0.5,), (2.0,)), ((0.5,), (2.0,))))
    assert cache.layers[LAYERS[0]].k_scale.tolist() == [1.0]
    assert not caplog.records


def test_what_has_no_scale_is_held_at_one_and_said_so_once(caplog):
    partial = CacheScales("e4m3fn", {LAYERS[0]: (torch.tensor([0.5]), None)})
    with caplog.at_level(logging.WARNING):
        cache = build(scales=partial)

    first, second = cache.layers.values()
    assert (first.k_scale.item(), first.v_scale.item()) == (0.5, 1.0)
    assert (second.k_scale.item(), second.v_scale.item()) == (1.0, 1.0)
    (record,) = caplog.records
    assert record.getMessage() == (
        "3 of 4 KV scales are missing and taken as 1.0: v_scale of model.layers.0.self_attn, "
        "k_scale of model.layers.1.self_attn, v_scale of model.layers.1.self_attn"
    )


def test_a_checkpoint_without_scales_is_told_what_to_do(caplog):
    build(scales=None)
    (record,) = caplog.records
    assert record.getMessage() == (
        "all KV scales are missing and taken as 1.0: convert the checkpoint with fp8kv calibrate, or ask for the "
        "cache fp8-unit"
    )


def test_a_complete_set_of_scales_is_nothing_to_warn_of(caplog):
    build(scales=scales_of(((0.5,), (2.0,)), ((0.5,), (2.0,))))
    assert not caplog.records


def test_one_scale_is_enough_for_an_mla_row(caplog):
    k_only = CacheScales("e4m3fn", {name: (torch.tensor([0.5]), None) for name in LAYERS})
    cache = build(MLA, scales=k_only)
    assert cache.layers[LAYERS[0]].v_scale.item() == 0.5
    assert not caplog.records


@pytest.mark.parametrize(
    ("dims", "pair", "message"),
    [
        (
            GQA,
            ([0.5] * 3, [0.5]),
            "k_scale of model.layers.0.self_attn has 3 values, but the layer",
        ),
        (MLA, ([0.5], [0.25]), "MLA layer, whose V is a view of its K row, but its scales differ"),
        (MLA, ([0.5, 0.5], [0.5, 0.5]), "has 2 values, but the layer caches 1 heads"),
    ],
)
def test_scales_that_do_not_fit_the_layer_are_refused(dims, pair, message):
    layers = {name: tuple(torch.tensor(values) for values in pair) for name in LAYERS}
    with pytest.raises(ScaleError, match=message):
        build(dims, scales=CacheScales("e4m3fn", layers))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mode": "int8"}, "unknown cache mode 'int8'; known modes: bf16, fp8, fp8-unit, emulate"),
        ({"page_size": 12}, "page_size is 12, but must be a power of two up to 256"),
        ({"num_pages": 0}, "num_pages is 0, but a cache needs at least one page"),
    ],
)
def test_what_cannot_be_built_is_refused(changed, message):
    with pytest.raises(EvaluationError, match=message):
        build(**changed)
