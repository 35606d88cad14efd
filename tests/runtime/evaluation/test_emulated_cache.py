"""An emulated cache gives back what an FP8 cache would."""

import dataclasses

import pytest
import torch
from transformers import DynamicCache

from fp8kv.calibrate.scales import LayerScales, ScaleSet
from fp8kv.recipes.errors import EvaluationError
from fp8kv.runtime.evaluation.emulated_cache import (
    CacheMode,
    emulated_cache,
    fp8_at_unit_scale,
    fp8_with_scales,
    unquantised,
)

LIMITS = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


class QuantisedCache(DynamicCache):
    """An FP8 cache written by hand: codes are what is kept, and what is read is code times scale."""

    def __init__(self, config, scales, dtype):
        super().__init__(config=config)
        self._scales, self._dtype = scales, dtype

    def update(self, keys, values, layer_idx, *arguments, **keywords):
        k_scale, v_scale = self._scales[layer_idx]
        keys, values = self._hold(keys, k_scale), self._hold(values, v_scale)
        return super().update(keys, values, layer_idx, *arguments, **keywords)

    def _hold(self, tensor, scales):
        heads = []
        for head in range(tensor.shape[1]):
            scale = scales[head % len(scales)]
            limit = LIMITS[self._dtype]
            codes = (tensor[:, head] / scale).clamp(-limit, limit).to(self._dtype)
            heads.append(codes.float() * scale)
        return torch.stack(heads, dim=1)


@pytest.fixture(scope="module", params=["llama", "qwen3", "deepseek_v3"])
def loaded(request, tiny_checkpoint, load):
    return load(tiny_checkpoint(request.param))


@pytest.fixture
def llama(tiny_checkpoint, load):
    return load(tiny_checkpoint("llama"))


def run(model, cache):
    """Return the logits of a prompt and of three steps over ``cache``."""
    token_ids = torch.arange(3, 21).view(2, 9)
    logits = []
    for start, end in [(0, 6), (6, 7), (7, 8), (8, 9)]:
        with torch.inference_mode():
            logits.append(model(token_ids[:, start:end], past_key_values=cache).logits)
    return torch.cat(logits, dim=1)


def scale_set(facts, values):
    """Return scales from one ``(k, v)`` pair of tuples a layer."""
    layers = tuple(
        LayerScales(layer.index, layer.name, k, v)
        for layer, (k, v) in zip(facts.layers, values, strict=True)
    )
    granularity = "head" if len(values[0][0]) > 1 else "tensor"
    return ScaleSet(facts.attention, "e4m3fn", granularity, layers)


def test_reads_what_a_hand_written_cache_would_hold(loaded):
    model, facts = loaded.model, loaded.facts
    # small enough to saturate, large enough to lose values in the subnormals
    by_layer = [((2.0**-9,), (2.0**-9,)), ((4.0,), (4.0,))]
    if facts.attention == "gqa":
        by_layer = [((2.0**-9,), (0.5,)), ((4.0,), (2.0**-7,))]
    mode = fp8_with_scales(scale_set(facts, by_layer))

    with emulated_cache(model, facts, mode):
        found = run(model, DynamicCache(config=model.config))

    expected = run(model, QuantisedCache(model.config, by_layer, torch.float8_e4m3fn))
    assert torch.equal(found, expected)
    plain = run(model, DynamicCache(config=model.config))
    assert (found - plain).abs().max() > 1e-3, "the quantisation shows"


def test_per_head_scales_reach_their_heads(llama):
    by_layer = [((2.0**-9, 1.0), (2.0, 2.0**-8)), ((0.25, 2.0**-8), (1.0, 4.0))]
    mode = fp8_with_scales(scale_set(llama.facts, by_layer))

    with emulated_cache(llama.model, llama.facts, mode):
        found = run(llama.model, DynamicCache(config=llama.model.config))

    cache = QuantisedCache(llama.model.config, by_layer, torch.float8_e4m3fn)
    assert torch.equal(found, run(llama.model, cache))


@pytest.mark.parametrize(
    ("name", "dtype"), [("e4m3fn", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)]
)
def test_unit_scale_in_each_format(loaded, name, dtype):
    model, facts = loaded.model, loaded.facts

    with emulated_cache(model, facts, fp8_at_unit_scale(name)):
        found = run(model, DynamicCache(config=model.config))

    unit = [((1.0,), (1.0,))] * len(facts.layers)
    assert torch.equal(found, run(model, QuantisedCache(model.config, unit, dtype)))


def test_a_layer_without_scales_is_stored_at_one(llama):
    both = fp8_with_scales(scale_set(llama.facts, [((0.25,), (0.25,)), ((1.0,), (1.0,))]))
    first = llama.facts.layers[0].name
    one = dataclasses.replace(both, scales={first: both.scales[first]})

    results = []
    for mode in (both, one):
        with emulated_cache(llama.model, llama.facts, mode):
            results.append(run(llama.model, DynamicCache(config=llama.model.config)))

    assert torch.equal(*results)


def test_an_mla_row_has_one_scale_and_it_is_ks(tiny_checkpoint, load):
    loaded = load(tiny_checkpoint("deepseek_v3"))
    k, v = torch.tensor([0.5]), torch.tensor([64.0])
    fmt = fp8_at_unit_scale().fmt
    names = [layer.name for layer in loaded.facts.layers]

    results = []
    for second in (k, v):
        mode = CacheMode("fp8", fmt, dict.fromkeys(names, (k, second)))
        with emulated_cache(loaded.model, loaded.facts, mode):
            results.append(run(loaded.model, DynamicCache(config=loaded.model.config)))

    assert torch.equal(*results)


def test_the_unquantised_cache_changes_nothing(loaded):
    expected = run(loaded.model, DynamicCache(config=loaded.model.config))

    with emulated_cache(loaded.model, loaded.facts, unquantised()):
        found = run(loaded.model, DynamicCache(config=loaded.model.config))

    assert torch.equal(found, expected)


def test_the_model_is_as_before_afterwards(loaded):
    model = loaded.model
    expected = run(model, DynamicCache(config=model.config))

    with pytest.raises(KeyError), emulated_cache(model, loaded.facts, fp8_at_unit_scale()):
        raise KeyError

    assert torch.equal(run(model, DynamicCache(config=model.config)), expected)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_scale_for_other_heads_is_refused(llama):
    scales = (torch.ones(3), torch.ones(3))
    mode = CacheMode(
        "fp8", fp8_at_unit_scale().fmt, {layer.name: scales for layer in llama.facts.layers}
    )

    with (
        emulated_cache(llama.model, llama.facts, mode),
        pytest.raises(
            EvaluationError, match=r"layers\.0\.self_attn caches 2 heads, but .* 3 values"
        ),
    ):
        run(llama.model, DynamicCache(config=llama.model.config))
