"""Absorbed decoding equals transformers' own expansion."""

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from fp8kv.recipes.errors import UnsupportedModelError
from fp8kv.runtime import absorbed_mla as absorbed_module
from fp8kv.runtime.absorbed_mla import absorbed_mla

MLA_TYPES = ["deepseek_v3", "deepseek_v2", "glm4_moe_lite", "minicpm3"]
PADDING = [0, 3, 7]
STEPS = 4


@pytest.fixture(scope="module", params=MLA_TYPES)
def mla(request, tiny_checkpoint, load):
    return load(tiny_checkpoint(request.param)).model


def decode(model, prompt_tokens, padding=PADDING):
    """Return the logits of a left-padded batch, of the prompt and of each decode step, ``[rows, vocabulary]``."""
    generator = torch.Generator().manual_seed(1)
    token_ids = torch.randint(3, 200, (len(padding), prompt_tokens + STEPS), generator=generator)
    mask = torch.ones_like(token_ids)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
        token_ids[row, :count] = 258
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    cache = DynamicCache(config=model.config)
    logits = []
    for start, end in [
        (0, prompt_tokens),
        *((prompt_tokens + i, prompt_tokens + i + 1) for i in range(STEPS)),
    ]:
        with torch.inference_mode():
            output = model(
                input_ids=token_ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
            )
        logits.append(output.logits[mask[:, start:end].bool()])
    return torch.cat(logits)


def attention_modules(model):
    return [
        module
        for module in model.modules()
        if hasattr(module, "kv_lora_rank") and hasattr(module, "kv_b_proj")
    ]


# up to 16 new tokens are absorbed, the prompt too; unpadded prompts get no mask from transformers
@pytest.mark.parametrize("padding", [PADDING, [0, 0]], ids=["padded", "unpadded"])
@pytest.mark.parametrize("prompt_tokens", [9, 16, 17, 40])
def test_equals_transformers_own_expansion(mla, prompt_tokens, padding):
    expected = decode(mla, prompt_tokens, padding)

    with absorbed_mla(mla):
        found = decode(mla, prompt_tokens, padding)

    assert expected.isfinite().all()
    assert expected.std() > 0.1, "logits that say something"
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_decoding_expands_nothing(mla, monkeypatch):
    calls = []
    attention = type(attention_modules(mla)[0])
    expand = attention.expand_kv

    def counted(self, latent, rope):
        calls.append(latent.shape[2])
        return expand(self, latent, rope)

    monkeypatch.setattr(attention, "expand_kv", counted)
    with absorbed_mla(mla):
        decode(mla, prompt_tokens=20)

    assert calls == [20] * len(attention_modules(mla)), "the prompt alone, once a layer"


def test_a_prompt_runs_in_one_width_for_torchs_flash_kernel(deepseek, monkeypatch):
    seen = []
    original = absorbed_module.sdpa_attention_forward

    def spy(module, query, key, value, *arguments, **keywords):
        seen.append((query.shape[-1], key.shape[-1], value.shape[-1]))
        return original(module, query, key, value, *arguments, **keywords)

    monkeypatch.setattr(absorbed_module, "sdpa_attention_forward", spy)
    module = attention_modules(deepseek.model)[0]
    assert module.v_head_dim < module.qk_head_dim
    expected = decode(deepseek.model, 20)

    with absorbed_mla(deepseek.model):
        found = decode(deepseek.model, 20)

    assert set(seen) == {(module.qk_head_dim,) * 3}
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_model_is_as_before_afterwards(mla):
    implementation = mla.config._attn_implementation
    before = [set(vars(module)) for module in attention_modules(mla)]
    expected = decode(mla, 20)

    with absorbed_mla(mla):
        assert mla.config._attn_implementation == "fp8kv_absorbed_mla"
        assert all("expand_kv" in vars(module) for module in attention_modules(mla))

    assert mla.config._attn_implementation == implementation
    assert [set(vars(module)) for module in attention_modules(mla)] == before
    assert torch.equal(decode(mla, 20), expected)


def test_the_model_is_as_before_after_an_exception(mla):
    implementation = mla.config._attn_implementation

    with pytest.raises(KeyError), absorbed_mla(mla):
        raise KeyError

    assert mla.config._attn_implementation == implementation
    assert not any("expand_kv" in vars(module) for module in attention_modules(mla))


def test_a_model_without_mla_is_left_alone(tiny_checkpoint, load):
    model = load(tiny_checkpoint("llama")).model
    implementation = model.config._attn_implementation

    with absorbed_mla(model):
        assert model.config._attn_implementation == implementation


def test_an_unknown_kind_of_mla_is_refused_and_left_alone():
    class OtherMla(nn.Module):
        layer_idx, is_causal, scaling = 0, True, 1.0
        kv_lora_rank, qk_rope_head_dim = 8, 4

        def forward(self, hidden_states, past_key_values=None):
            return hidden_states

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = OtherMla()
            self.config = type("Config", (), {"_attn_implementation": "sdpa"})()

    model = Model()
    with (
        pytest.raises(UnsupportedModelError, match="OtherMla has no expand_kv"),
        absorbed_mla(model),
    ):
        pass
    assert model.config._attn_implementation == "sdpa"
    assert "expand_kv" not in vars(model.attention)
