"""Which layer of the checkpoint an attention module of the model is."""

import pytest
from torch import nn

from fp8kv.calibrate.formats.facts import LayerFacts, ModelFacts
from fp8kv.calibrate.modeling.layers import match_layers
from fp8kv.calibrate.modeling.tap import AttentionModule, find_attention_modules
from fp8kv.recipes.errors import UnsupportedModelError


def facts(*names, attention="gqa"):
    return ModelFacts(
        architecture="SomeForCausalLM",
        model_type="some",
        attention=attention,
        layers=tuple(LayerFacts(index, name) for index, name in enumerate(names)),
        num_kv_heads=1,
        head_dim=8,
        latent_dim=None,
        rope_dim=None,
        quant_method=None,
        quantization={},
        quantization_location=(),
        static_scales=True,
        reason="",
    )


def modules(*names, attention="gqa"):
    return {name: AttentionModule(name, nn.Identity(), attention, None) for name in names}


@pytest.mark.parametrize(
    ("in_model", "in_checkpoint"),
    [
        ("model.layers.{}.self_attn", "model.layers.{}.self_attn"),
        ("model.language_model.layers.{}.self_attn", "language_model.model.layers.{}.self_attn"),
        ("model.language_model.layers.{}.self_attn", "model.language_model.layers.{}.self_attn"),
        ("model.layers.0.self_attn.{}", "model.layers.0.self_attn.{}"),
    ],
)
def test_names_match_by_what_follows_the_wrappers(in_model, in_checkpoint):
    numbers = (0, 1, 10)
    found = match_layers(
        modules(*map(in_model.format, numbers)), facts(*map(in_checkpoint.format, numbers))
    )
    assert found == {in_model.format(n): in_checkpoint.format(n) for n in numbers}


def test_the_order_is_that_of_the_model():
    found = match_layers(
        modules("layers.0.self_attn", "layers.1.self_attn"),
        facts("layers.1.self_attn", "layers.0.self_attn"),
    )
    assert list(found) == ["layers.0.self_attn", "layers.1.self_attn"]


def test_layers_that_only_one_side_has_are_counted_and_named():
    names = [f"model.layers.{n}.self_attn" for n in (10, 2, 3, 4)]
    with pytest.raises(UnsupportedModelError) as error:
        match_layers(modules("layers.0.self_attn", "layers.9.self_attn"), facts(*names))
    message = str(error.value)
    assert "of SomeForCausalLM in transformers and in the checkpoint do not match" in message
    # by number, not by letter
    assert (
        "4 only in the checkpoint (model.layers.2.self_attn, model.layers.3.self_attn, "
        "model.layers.4.self_attn)" in message
    )
    assert "2 only in the model (layers.0.self_attn, layers.9.self_attn)" in message


def test_a_layer_missing_on_one_side_alone_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"1 only in the checkpoint .*0 only in the m"):
        match_layers(modules("layers.0.a"), facts("layers.0.a", "layers.1.a"))
    with pytest.raises(UnsupportedModelError, match=r"0 only in the checkpoint \(none\), 1 only"):
        match_layers(modules("layers.0.a", "layers.1.a"), facts("layers.0.a"))


def test_another_attention_kind_is_refused_with_both():
    with pytest.raises(
        UnsupportedModelError,
        match=r"layers\.0\.a is mla in transformers, but SomeForCausalLM is gqa",
    ):
        match_layers(modules("layers.0.a", attention="mla"), facts("layers.0.a"))


def test_every_architecture_matches_its_own_checkpoint(
    load, tiny_checkpoint, tiny_models, architecture
):
    loaded = load(tiny_checkpoint(architecture))
    expected = tiny_models.TINY_MODELS[architecture]
    attention = find_attention_modules(loaded.model)
    found = match_layers(attention, loaded.facts)
    assert loaded.facts.attention == expected.attention
    assert tuple(found.values()) == expected.layers
    indices = [attention[name].module.layer_idx for name in found]
    assert indices == [layer.index for layer in loaded.facts.layers]
