"""The tap sees exactly what the cache would hold, of every architecture, and changes nothing unasked."""

import math
import types

import pytest
import torch
import transformers
from torch import nn

from fp8kv.calibrate.modeling.tap import find_attention_modules, tap
from fp8kv.recipes.errors import UnsupportedModelError

TOKENS = 24  # more than the sliding windows and chunks of the tiny models


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint, load):
    models = {}

    def get(model_type):
        if model_type not in models:
            models[model_type] = load(tiny_checkpoint(model_type)).model
        return models[model_type]

    return get


def tokens(rows=2):
    return torch.randint(0, 256, (rows, TOKENS))


def logits(model, ids, **options):
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False, **options).logits


def record(model, run):
    """Return what ``run()`` caches, by module name: a list of (keys, values)."""
    modules = find_attention_modules(model)
    seen = {name: [] for name in modules}

    def observe(write):
        seen[write.attention.name].append((write.keys.clone(), write.values.clone()))

    with torch.inference_mode(), tap(modules, observe):
        result = run()
    return seen, result


def test_the_tap_changes_no_bit_of_the_logits(loaded, architecture):
    model, ids = loaded(architecture), tokens()
    plain = logits(model, ids)
    _, tapped = record(model, lambda: logits(model, ids))
    assert plain.isfinite().all()
    assert torch.equal(tapped, plain)


def test_every_layer_that_owns_a_cache_records_once(loaded, tiny_models, architecture):
    model, expected = loaded(architecture), tiny_models.TINY_MODELS[architecture]
    seen, _ = record(model, lambda: logits(model, tokens()))
    assert [name.rsplit("layers.")[-1] for name in seen] == [
        name.rsplit("layers.")[-1] for name in expected.layers
    ]
    assert {name: len(writes) for name, writes in seen.items()} == dict.fromkeys(seen, 1)
    for keys, values in (writes[0] for writes in seen.values()):
        assert keys.shape[0] == values.shape[0] == 2
        assert keys.shape[2] == values.shape[2] == TOKENS


def test_what_is_recorded_is_what_transformers_puts_into_its_cache(loaded, architecture):
    model, ids = loaded(architecture), tokens()
    seen, _ = record(model, lambda: logits(model, ids))
    with torch.inference_mode():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    modules = find_attention_modules(model)
    for name, [(keys, values)] in seen.items():
        layer = cache.layers[modules[name].module.layer_idx]
        held = layer.keys.shape[2]  # a sliding layer holds its window only
        assert held == TOKENS or "Sliding" in type(layer).__name__
        assert torch.equal(keys[:, :, -held:], layer.keys)
        assert torch.equal(values[:, :, -held:], layer.values)
        assert keys[:, :, -held:].abs().max() == layer.keys.abs().max() > 0


def test_decoding_with_a_cache_records_every_token_once(loaded, architecture):
    model, ids = loaded(architecture), tokens(rows=1)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    plain = model.generate(ids, **options)
    seen, tapped = record(model, lambda: model.generate(ids, **options))
    assert torch.equal(tapped, plain)
    for writes in seen.values():
        assert [keys.shape[2] for keys, _ in writes] == [TOKENS, 1, 1, 1]


MLA_WITH_ROPE = [
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe_lite",
    "longcat_flash",
    "mistral3",
    "kimi_k25",
    "minicpm3",
    "youtu",
]


@pytest.mark.parametrize("model_type", [*MLA_WITH_ROPE, "kimi_linear"])
def test_mla_records_the_normalised_latent_and_the_rotated_rope_part(loaded, model_type):
    model, ids = loaded(model_type), tokens()
    modules = find_attention_modules(model)
    outputs = {}
    handles = [
        getattr(attention.module, part).register_forward_hook(
            lambda _module, _args, output, key=(name, part): outputs.__setitem__(key, output)
        )
        for name, attention in modules.items()
        for part in ("kv_a_layernorm", "kv_a_proj_with_mqa")
    ]
    seen, _ = record(model, lambda: logits(model, ids))
    for handle in handles:
        handle.remove()
    for name, [(latent, rope)] in seen.items():
        attention = modules[name]
        latent_dim, rope_dim = attention.widths
        assert attention.streams == ("LATENT", "ROPE")
        assert (latent.shape[1], latent.shape[3]) == (1, latent_dim)
        assert (rope.shape[1], rope.shape[3]) == (1, rope_dim)
        factor = 1.0
        if model_type == "longcat_flash":
            factor = (32 / latent_dim) ** 0.5
        normalised = outputs[name, "kv_a_layernorm"] * factor
        torch.testing.assert_close(latent[:, 0], normalised, rtol=1e-6, atol=0)
        raw = outputs[name, "kv_a_proj_with_mqa"][..., latent_dim:]
        # a rotation keeps the length of every row, and moves all but the first
        torch.testing.assert_close(rope[:, 0].norm(dim=-1), raw.norm(dim=-1), rtol=1e-5, atol=0)
        largest = rope[:, 0].abs().amax(-1)
        unrotated = torch.isclose(largest, raw.abs().amax(-1), rtol=1e-6, atol=0).float().mean()
        assert unrotated == 1 if model_type == "kimi_linear" else unrotated < 0.2


@pytest.mark.parametrize(
    ("model_type", "before_rope", "v_is_plain"),
    [
        ("llama", "k_proj", True),
        ("qwen2", "k_proj", True),
        ("gpt_oss", "k_proj", True),
        ("qwen3", "k_norm", True),
        ("minimax_m2", "k_norm", True),
        ("glm4_moe", "k_norm", True),
        ("gemma3", "k_norm", True),
        ("gemma4_text", "k_norm", False),
    ],
)
def test_k_is_recorded_after_its_norm_and_after_rope(loaded, model_type, before_rope, v_is_plain):
    model, ids = loaded(model_type), tokens()
    modules = find_attention_modules(model)
    outputs = {}
    handles = [
        getattr(attention.module, part).register_forward_hook(
            lambda _module, _args, output, key=(name, part): outputs.__setitem__(key, output)
        )
        for name, attention in modules.items()
        for part in (before_rope, "v_proj")
        if getattr(attention.module, part) is not None
    ]
    seen, _ = record(model, lambda: logits(model, ids))
    for handle in handles:
        handle.remove()
    for name, [(keys, values)] in seen.items():
        unrotated = outputs[name, before_rope]
        if unrotated.shape != keys.shape:
            unrotated = unrotated.reshape(2, TOKENS, -1, keys.shape[3]).transpose(1, 2)
        if model_type == "gpt_oss":
            unrotated = unrotated * (
                1 + 0.1 * math.log(32)
            )  # YaRN, which lengthens queries and keys
        torch.testing.assert_close(keys.norm(dim=-1), unrotated.norm(dim=-1), rtol=1e-5, atol=0)
        # position 0 turns nothing
        torch.testing.assert_close(keys[:, :, 0], unrotated[:, :, 0], rtol=1e-6, atol=0)
        assert not torch.allclose(keys[:, :, 1:], unrotated[:, :, 1:])
        if v_is_plain:
            assert torch.equal(values.transpose(1, 2).flatten(2), outputs[name, "v_proj"])


def test_layers_that_share_anothers_cache_are_left_out(loaded):
    model = loaded("gemma4_text")
    shared = [
        name for name, module in model.named_modules() if getattr(module, "is_kv_shared_layer", 0)
    ]
    assert len(shared) == 2
    assert len(find_attention_modules(model)) == 2
    assert not set(shared) & set(find_attention_modules(model))


def test_edits_reach_attention(loaded, load, tiny_checkpoint):
    model, ids = loaded("llama"), tokens()
    doubled = load(tiny_checkpoint("llama")).model
    for layer in doubled.model.layers:
        layer.self_attn.v_proj.weight.data *= 2
    with tap(find_attention_modules(model), lambda write: (write.keys, write.values * 2)):
        edited = logits(model, ids)
    assert torch.equal(edited, logits(doubled, ids))
    assert not torch.equal(edited, logits(model, ids))


def test_edits_reach_the_cache_that_the_caller_passes(loaded):
    model, ids = loaded("deepseek_v3"), tokens()
    plain, cache = transformers.DynamicCache(), transformers.DynamicCache()
    with torch.inference_mode():
        model(input_ids=ids, past_key_values=plain, use_cache=True)
        with tap(find_attention_modules(model), lambda write: (write.keys, write.values * 2)):
            model(input_ids=ids, past_key_values=cache, use_cache=True)
    assert torch.equal(cache.layers[0].keys, plain.layers[0].keys)
    assert torch.equal(cache.layers[0].values, plain.layers[0].values * 2)


def test_hooks_come_off_after_an_error_in_the_observer(loaded):
    model = loaded("llama")

    def fail(_write):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), tap(find_attention_modules(model), fail):
        logits(model, tokens())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_hooks_come_off_if_one_cannot_be_installed(loaded):
    model = loaded("llama")
    modules = find_attention_modules(model)
    broken = dict(modules) | {"broken": types.SimpleNamespace(module=object())}
    with pytest.raises(AttributeError), tap(broken, lambda _write: None):
        pass
    assert not any(module._forward_pre_hooks for module in model.modules())


class FakeAttention(nn.Module):
    """Caches tensors of the given widths, as an attention module of a transformers model does."""

    layer_idx, is_causal, scaling = 0, True, 1.0

    def __init__(self, key_shape, value_shape, **attributes):
        super().__init__()
        self.key_shape, self.value_shape = key_shape, value_shape
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, hidden, past_key_values=None):
        keys, values = torch.zeros(self.key_shape), torch.zeros(self.value_shape)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
            self.seen = past_key_values
        return keys, values


@pytest.mark.parametrize(
    ("key_shape", "value_shape"),
    [
        ((1, 4, 3, 20), (1, 4, 3, 20)),  # expanded to every head
        ((1, 1, 3, 8), (1, 1, 3, 24)),  # the other way round
        ((1, 2, 3, 24), (1, 2, 3, 8)),  # a latent for every head
    ],
)
def test_mla_that_caches_anything_but_latent_and_rope_is_refused(key_shape, value_shape):
    model = nn.ModuleDict(
        {"attn": FakeAttention(key_shape, value_shape, kv_lora_rank=24, qk_rope_head_dim=8)}
    )
    seen = []
    with (
        pytest.raises(UnsupportedModelError) as error,
        tap(find_attention_modules(model), seen.append),
    ):
        model["attn"](None)
    message = str(error.value)
    assert message.startswith("attn (FakeAttention) caches")
    assert str(list(key_shape)) in message
    assert "a latent of width 24 and a rope part of width 8 were expected" in message
    assert "5.18 or later" in message
    assert seen == []


def test_an_mla_layout_without_rope_width_is_refused():
    model = nn.ModuleDict({"attn": FakeAttention((1,), (1,), kv_lora_rank=24)})
    with pytest.raises(UnsupportedModelError, match=r"attn \(FakeAttention\) has kv_lora_rank 24"):
        find_attention_modules(model)


def test_a_model_without_attention_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match="Linear has no attention module"):
        find_attention_modules(nn.Linear(2, 2))


def test_the_stand_in_answers_for_the_cache_behind_it():
    model = nn.ModuleDict({"attn": FakeAttention((1, 2, 3, 4), (1, 2, 3, 4))})
    inner = transformers.DynamicCache()
    inner.marker = "mine"
    with tap(find_attention_modules(model), lambda _write: None):
        model["attn"](None, inner)
        assert model["attn"].seen.get_seq_length() == inner.get_seq_length() == 3
        assert model["attn"].seen.marker == "mine"
        model["attn"](None)
        assert model["attn"].seen.get_seq_length() == 0
        with pytest.raises(AttributeError, match="marker"):
            _ = model["attn"].seen.marker
