"""RoPE is taken out of the modules whose whole rotation can be done elsewhere, and of no others."""

import copy
from contextlib import ExitStack

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama import modeling_llama

from fp8kv.calibrate.modeling.tap import find_attention_modules, tap
from fp8kv.kernels.rope import rotate, split_columns
from fp8kv.recipes.errors import UnsupportedModelError
from fp8kv.runtime.deferred_rope import defer_rope

# rotary parts narrower than a head, norms before RoPE, K and V of different width, two kinds of RoPE in one model
DEFERRED = [
    "llama",
    "mixtral",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "minimax_m2",
    "glm4_moe",
    "mimo_v2_flash",
]
# cosines of half a head; MLA, whose function takes other tensors
LEFT_ALONE = ["gpt_oss", "deepseek_v3", "longcat_flash"]


@pytest.fixture(scope="module")
def model_of(tiny_checkpoint, load):
    """Give a tiny float32 model with transformers' eager attention, the caller's own."""

    def get(model_type):
        model = load(tiny_checkpoint(model_type)).model
        model.set_attn_implementation("eager")
        return model

    return get


def cached_keys(model, modules, token_ids):
    """Run the model and return what each module caches as K, [tokens, kv_heads, dim], by its name."""
    found = {}

    def note(write):
        found[write.attention.name] = write.keys[0].transpose(0, 1)

    with tap(modules, note), torch.no_grad():
        model(input_ids=torch.tensor([token_ids]), use_cache=False)
    return found


@pytest.mark.parametrize("model_type", DEFERRED)
def test_what_is_left_to_do_is_the_rotation(model_of, model_type):
    model = model_of(model_type)
    modules = find_attention_modules(model)
    first = next(iter(modules))
    token_ids = [3, 7, 9, 200, 5]
    expected = cached_keys(model, modules, token_ids)[first]
    before = {name: sorted(vars(a.module)) for name, a in modules.items()}
    with ExitStack() as stack:
        ropes = defer_rope(model, modules, stack)
        assert list(ropes) == list(modules)
        # later layers read what attention made of unrotated tensors
        keys = cached_keys(model, modules, token_ids)[first]
        left_query, left_key, _, _ = ropes[first]._left
        rope = ropes[first].take(left_query, left_key)
        assert ropes[first].take(left_query, left_key) is None
    assert not torch.allclose(keys, expected, atol=1e-2)
    width = rope.cos.shape[-1]
    angles = torch.cat((rope.cos[:, : width // 2], rope.sin[:, : width // 2]), dim=-1)
    rest, turned = split_columns(keys, width, rope_last=False)
    turned = rotate(turned, torch.arange(len(keys)), angles, interleaved=False)
    torch.testing.assert_close(torch.cat((turned, rest), dim=-1), expected)
    assert {name: sorted(vars(a.module)) for name, a in modules.items()} == before
    after = cached_keys(model, modules, token_ids)[first]
    assert torch.equal(after, expected)


@pytest.mark.parametrize("model_type", LEFT_ALONE)
def test_other_rotations_stay_as_they_are(model_of, model_type):
    model = model_of(model_type)
    modules = find_attention_modules(model)
    before = {name: sorted(vars(a.module)) for name, a in modules.items()}
    with ExitStack() as stack:
        assert defer_rope(model, modules, stack) == {}
        assert {name: sorted(vars(a.module)) for name, a in modules.items()} == before
    assert model.config._attn_implementation == "eager"


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, attn_implementation="eager",
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def interleaved(query, key, cos, sin, unsqueeze_dim=1):
    def turned(heads):
        tokens = torch.arange(heads.shape[2])
        half = cos.shape[-1] // 2
        angles = torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1)
        return rotate(heads[0].transpose(0, 1), tokens, angles, True).transpose(0, 1)[None]

    return turned(query), turned(key)


def scaled(query, key, cos, sin, unsqueeze_dim=1):
    query, key = modeling_llama._rotate(query, key, cos, sin)
    return query, key * 2


@pytest.mark.parametrize("function", [interleaved, scaled])
def test_a_function_that_rotates_otherwise_is_left_alone(monkeypatch, function):
    model = llama()
    original = modeling_llama.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_llama, "_rotate", original, raising=False)
    with ExitStack() as stack:
        assert len(defer_rope(model, find_attention_modules(model), stack)) == 2
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", function)
    with ExitStack() as stack:
        assert defer_rope(model, find_attention_modules(model), stack) == {}


def test_angles_that_differ_from_half_to_half_are_left_alone(monkeypatch):
    model = llama()
    turn = model.model.rotary_emb.forward

    def uneven(*args, **kwargs):
        cos, sin = turn(*args, **kwargs)
        return cos, sin * torch.linspace(1, 2, sin.shape[-1])

    monkeypatch.setattr(model.model.rotary_emb, "forward", uneven)
    with ExitStack() as stack:
        assert defer_rope(model, find_attention_modules(model), stack) == {}


class NormAfterRope(modeling_llama.LlamaAttention):
    """Scales Q behind RoPE, as Ministral 3 does."""

    def forward(self, hidden_states, position_embeddings=None, past_key_values=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = self.q_proj(hidden_states).view(shape).transpose(1, 2)
        key = self.k_proj(hidden_states).view(shape).transpose(1, 2)
        value = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if self.scales == "query":
            query = query * 2
        if self.scales == "key":
            key = key * 2
        key, value = past_key_values.update(key, value, self.layer_idx)
        attend = modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, modeling_llama.eager_attention_forward
        )
        output, weights = attend(self, query, key, value, None, scaling=self.scaling)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), weights


apply_rotary_pos_emb = modeling_llama.apply_rotary_pos_emb


@pytest.mark.parametrize(("scales", "taken"), [(None, 2), ("query", 1), ("key", 1)])
def test_what_is_scaled_behind_rope_is_left_alone(scales, taken):
    model = llama()
    model.model.layers[1].self_attn.__class__ = NormAfterRope
    model.model.layers[1].self_attn.scales = scales
    with ExitStack() as stack:
        assert len(defer_rope(model, find_attention_modules(model), stack)) == taken


def test_a_module_that_is_changed_already_is_left_alone():
    model = llama()
    module = model.model.layers[0].self_attn
    module.forward = copy.copy(module.forward)
    with ExitStack() as stack:
        ropes = defer_rope(model, find_attention_modules(model), stack)
        assert list(ropes) == ["model.layers.1.self_attn"]
    assert "forward" in vars(module)


def test_another_arrangement_of_the_dimensions_is_rotated_at_once():
    model = llama()
    with ExitStack() as stack:
        rope = defer_rope(model, find_attention_modules(model), stack)["model.layers.0.self_attn"]
        query, key = torch.randn(1, 5, 2, 8), torch.randn(1, 5, 1, 8)
        cos, sin = torch.randn(2, 1, 5, 8)
        found = rope(query, key, cos, sin, unsqueeze_dim=2)
        expected = apply_rotary_pos_emb(query, key, cos, sin, unsqueeze_dim=2)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        assert rope.take(query, key) is None


def test_refuses_what_is_not_what_it_left():
    model = llama()
    with ExitStack() as stack:
        rope = defer_rope(model, find_attention_modules(model), stack)["model.layers.0.self_attn"]
        query, key = torch.randn(1, 2, 5, 8), torch.randn(1, 1, 5, 8)
        rope(query, key, *torch.randn(2, 1, 5, 8))
        with pytest.raises(UnsupportedModelError, match="LlamaAttention changes what RoPE gave it"):
            rope.take(query * 2, key)
