"""The scale schema: what it refuses, and its JSON form."""

import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp8kv.calibrate.scales import LayerScales, ScaleSet, is_bfloat16_representable
from fp8kv.kernels.fp8 import FORMATS
from fp8kv.recipes.errors import ScaleError

NAME = "model.layers.0.self_attn"

bfloat16_scales = st.integers(1, 0x7F7F).map(
    lambda bits: torch.tensor([bits], dtype=torch.int16).view(torch.bfloat16).item()
)


def layer(index=0, k=(1.0,), v=(1.0,), name=None):
    return LayerScales(index, name or f"model.layers.{index}.self_attn", k, v)


def scale_set(*layers, attention="gqa", fp8_format="e4m3fn", granularity="tensor"):
    return ScaleSet(attention, fp8_format, granularity, layers)


@st.composite
def scale_sets(draw):
    attention = draw(st.sampled_from(["gqa", "mla"]))
    granularity = "tensor" if attention == "mla" else draw(st.sampled_from(["tensor", "head"]))
    heads = 1 if granularity == "tensor" else draw(st.integers(1, 4))
    values = st.tuples(*[bfloat16_scales] * heads)
    layers = []
    for index in draw(st.lists(st.integers(0, 99), unique=True, max_size=4)):
        k = draw(values)
        layers.append(layer(index, k, k if attention == "mla" else draw(values)))
    fp8_format = draw(st.sampled_from(list(FORMATS)))
    return scale_set(*layers, attention=attention, fp8_format=fp8_format, granularity=granularity)


@given(scale_sets())
def test_json_and_back_gives_the_same_scales(scales):
    text = json.dumps(scales.to_json(), allow_nan=False)
    assert ScaleSet.from_json(json.loads(text)) == scales


def test_the_json_form():
    scales = scale_set(layer(3, k=(0.5, 2.0), v=(1.0, 0.25)), granularity="head")
    assert scales.to_json() == {
        "attention": "gqa",
        "fp8_format": "e4m3fn",
        "granularity": "head",
        "layers": [
            {"index": 3, "name": "model.layers.3.self_attn", "k": [0.5, 2.0], "v": [1.0, 0.25]}
        ],
    }


def test_a_scale_set_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        scale_set(layer()).layers = ()


def test_heads_may_differ_and_mla_shares_one_scale():
    scale_set(layer(k=(0.5, 2.0), v=(1.0, 4.0)), granularity="head")
    scale_set(layer(k=(0.5,), v=(0.5,)), attention="mla")


@pytest.mark.parametrize("stream", ["k", "v"])
@pytest.mark.parametrize("value", [0.0, -0.0, -1.0, math.nan, math.inf, -math.inf])
def test_a_scale_is_positive_and_finite(stream, value):
    with pytest.raises(ScaleError) as caught:
        scale_set(layer(), layer(1, **{stream: (value,)}))
    assert str(caught.value) == (
        f"{stream}_scale of model.layers.1.self_attn is {value}; a scale is positive and finite"
    )


@pytest.mark.parametrize("value", [0.1, 1 / 448, 1.00390625, 1 + 2.0**-30, 3.4e38])
def test_a_scale_that_bfloat16_cannot_hold_is_refused(value):
    with pytest.raises(ScaleError) as caught:
        scale_set(layer(v=(value,)))
    assert str(caught.value) == (
        f"v_scale of {NAME} is {value}, which bfloat16 cannot hold; round it up first, "
        "otherwise engines read different values"
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: scale_set(attention="mha"),
            "attention must be 'gqa' or 'mla', not 'mha'",
        ),
        (
            lambda: scale_set(granularity="channel"),
            "granularity must be 'tensor' or 'head', not 'channel'",
        ),
        (
            lambda: scale_set(fp8_format="fp8"),
            "unknown FP8 format 'fp8'; known: e4m3fn, e5m2, e4m3fnuz",
        ),
        (
            lambda: scale_set(attention="mla", granularity="head"),
            "an MLA layer caches one latent row: use granularity 'tensor'",
        ),
        (
            lambda: scale_set(layer(0), layer(1), layer(0)),
            f"layer {NAME} appears 2 times in the scale set",
        ),
        (
            lambda: scale_set(layer(v=())),
            f"v_scale of {NAME} is missing: a layer needs both scales or is left out whole",
        ),
        (
            lambda: scale_set(layer(k=(1.0, 2.0), v=(1.0, 2.0))),
            f"k_scale of {NAME} has 2 values where granularity 'tensor' has one",
        ),
        (
            lambda: scale_set(layer(k=(1.0, 2.0), v=(1.0,)), granularity="head"),
            f"{NAME} has 2 K scales and 1 V scales",
        ),
        (
            lambda: scale_set(layer(k=(0.5,), v=(0.25,)), attention="mla"),
            f"{NAME} is an MLA layer, whose V is a view of its K row, but its scales differ: "
            "k_scale 0.5, v_scale 0.25",
        ),
    ],
)
def test_what_breaks_the_schema_is_refused_with_the_culprit(build, message):
    with pytest.raises(ScaleError) as caught:
        build()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("edit", "culprit"),
    [
        (lambda data: data.pop("layers"), "KeyError('layers')"),
        (lambda data: data.pop("fp8_format"), "KeyError('fp8_format')"),
        (lambda data: data["layers"][0].pop("v"), "KeyError('v')"),
        (lambda data: data["layers"][0].update(k=1.0), "TypeError"),
        (lambda data: data["layers"][0].update(k=["wide"]), "could not convert string to float"),
        (lambda data: data["layers"][0].update(index=None), "TypeError"),
        (lambda data: data.update(layers=None), "TypeError"),
        (lambda data: data.update(fp8_format=["e4m3fn"]), "TypeError"),
    ],
)
def test_malformed_json_is_one_error(edit, culprit):
    data = scale_set(layer()).to_json()
    edit(data)
    with pytest.raises(ScaleError) as caught:
        ScaleSet.from_json(data)
    assert str(caught.value).startswith("malformed scale set: ")
    assert culprit in str(caught.value)


def test_json_whose_content_breaks_the_schema_is_refused_like_the_object():
    data = scale_set(layer()).to_json()
    data["layers"][0]["k"] = [-1]
    with pytest.raises(ScaleError) as caught:
        ScaleSet.from_json(data)
    assert str(caught.value) == f"k_scale of {NAME} is -1.0; a scale is positive and finite"


@given(bfloat16_scales)
def test_every_bfloat16_number_is_representable_and_its_neighbours_are_not(value):
    assert is_bfloat16_representable(value)
    assert not is_bfloat16_representable(math.nextafter(value, math.inf))
    assert not is_bfloat16_representable(math.nextafter(value, 0.0))
