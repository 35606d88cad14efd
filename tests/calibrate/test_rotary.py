"""Rotary pairs: their norm bounds what any position can bring an element to, and is the same at all of them."""

import math
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fp8kv.calibrate.modeling.tap import find_attention_modules, tap
from fp8kv.calibrate.rotary import RotaryLayout, rotary_layout

layouts = st.builds(
    RotaryLayout, st.sampled_from([4, 8, 16]), st.sampled_from(["halves", "neighbours"])
)
HEAD_DIM = 16


def turned_halves(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def turned_neighbours(x):
    return torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)


def rotate(rows, layout, angles):
    """Turn every pair of ``[batch, heads, tokens, head_dim]`` by its angle ``[tokens, width / 2]``."""
    rotated, rest = rows[..., : layout.width], rows[..., layout.width :]
    if layout.pairing == "halves":
        both, turned = torch.cat([angles, angles], dim=-1), turned_halves(rotated)
    else:
        both, turned = angles.repeat_interleave(2, dim=-1), turned_neighbours(rotated)
    return torch.cat([rotated * both.cos() + turned * both.sin(), rest], dim=-1)


def module_of(turn):
    """Return an attention module whose file defines ``rotate_half``, or does not."""
    code = types.ModuleType("some_modeling_file")
    if turn is not None:
        code.rotate_half = turn
    attention = type("Attention", (nn.Module,), {"__module__": "some_modeling_file"})
    return code, attention()


@pytest.fixture
def layout_of(monkeypatch):
    def find(turn, position_embeddings, head_dim):
        code, module = module_of(turn)
        monkeypatch.setitem(sys.modules, "some_modeling_file", code)
        return rotary_layout(module, position_embeddings, head_dim)

    return find


@settings(deadline=None, max_examples=50)
@given(layouts, st.integers(0, 2**20), st.sampled_from([torch.float32, torch.bfloat16]))
def test_no_position_brings_an_element_above_the_bound(layout, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, 3, 5, HEAD_DIM, generator=generator)
    rows = rows * torch.exp2(torch.randint(-8, 8, rows.shape, generator=generator))
    rows = rows.to(dtype)
    bound = layout.pair_norms(rows)
    for _ in range(4):
        angles = 1e4 * torch.rand(5, layout.width // 2, generator=generator, dtype=torch.float64)
        turned = rotate(rows.double(), layout, angles)
        assert bool((turned.abs().amax(dim=(0, 2, 3)) <= bound.double() * (1 + 1e-6)).all())


@settings(deadline=None, max_examples=50)
@given(layouts, st.integers(0, 2**20))
def test_some_position_reaches_the_bound(layout, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(1, 1, 1, HEAD_DIM, generator=generator)
    # the angle that turns each pair onto its first element
    if layout.pairing == "halves":
        first, second = rows[0, 0, :, : layout.width].double().chunk(2, dim=-1)
    else:
        first, second = rows[0, 0, :, 0 : layout.width : 2], rows[0, 0, :, 1 : layout.width : 2]
    angles = -torch.atan2(second.double(), first.double())
    reached = rotate(rows.double(), layout, angles).abs().max().item()
    assert layout.pair_norms(rows).item() == pytest.approx(reached, rel=1e-6)


@given(layouts, st.integers(0, 2**20))
def test_the_bound_is_between_the_maximum_and_root_two_times_it(layout, seed):
    rows = torch.randn(2, 3, 4, HEAD_DIM, generator=torch.Generator().manual_seed(seed))
    largest = rows.abs().amax(dim=(0, 2, 3))
    bound = layout.pair_norms(rows)
    assert bool((bound >= largest * (1 - 1e-6)).all())
    assert bool((bound <= largest * math.sqrt(2) * (1 + 1e-6)).all())


@pytest.mark.parametrize(
    ("pairing", "width", "expected"),
    [
        ("halves", 4, 5.0),  # (3, 4) and (0, 1)
        ("neighbours", 4, math.sqrt(17)),  # (3, 0) and (4, 1)
        ("halves", 2, 4.0),  # (3, 0), then 4 and 1 alone
        ("neighbours", 2, 4.0),
    ],
)
def test_the_pairs_are_those_of_the_layout(pairing, width, expected):
    rows = torch.tensor([[3.0, 0.0, 4.0, 1.0], [0.3, 0.0, 0.4, 0.1]]).view(1, 2, 1, 4)
    norms = RotaryLayout(width, pairing).pair_norms(rows)
    assert norms.dtype == torch.float32
    assert norms.tolist() == pytest.approx([expected, expected / 10])


def test_batch_and_tokens_share_one_bound_per_head():
    rows = torch.zeros(2, 2, 3, 4)
    rows[0, 0, 2, 1] = -7.0
    rows[1, 1, 0, 3] = 2.0
    assert RotaryLayout(4, "halves").pair_norms(rows).tolist() == [7.0, 2.0]


def test_rotate_half_of_halves_with_full_cosines(layout_of):
    cosines = torch.zeros(1, 5, 16)
    assert layout_of(turned_halves, (cosines, cosines), 16) == RotaryLayout(16, "halves")


def test_rotate_half_of_neighbours(layout_of):
    cosines = torch.zeros(1, 5, 16)
    assert layout_of(turned_neighbours, (cosines, cosines), 16) == RotaryLayout(16, "neighbours")


def test_cosines_narrower_than_the_head_turn_its_leading_part(layout_of):
    cosines = torch.zeros(1, 5, 8)
    assert layout_of(turned_halves, (cosines, cosines), 16) == RotaryLayout(8, "halves")
    assert layout_of(turned_neighbours, [cosines, cosines], 16) == RotaryLayout(8, "neighbours")


def test_cosines_once_per_pair_where_the_code_has_no_rotate_half(layout_of):
    cosines = torch.zeros(1, 5, 8)
    assert layout_of(None, (cosines, cosines), 16) == RotaryLayout(16, "halves")
    assert layout_of(None, (cosines[..., :4], cosines), 16) == RotaryLayout(8, "halves")


def test_complex_rotations_turn_neighbours(layout_of):
    rotations = torch.zeros(1, 5, 8, dtype=torch.complex64)
    assert layout_of(turned_halves, rotations, 16) == RotaryLayout(16, "neighbours")
    assert layout_of(None, rotations[..., :2], 16) == RotaryLayout(4, "neighbours")


@pytest.mark.parametrize("turn", [None, turned_halves])
def test_without_position_embeddings_the_whole_head_counts_as_turned(layout_of, turn):
    assert layout_of(turn, None, 16) == RotaryLayout(16, "halves")
    assert layout_of(turn, (None, None), 16) == RotaryLayout(16, "halves")


def test_embeddings_wider_than_what_is_cached_are_cut(layout_of):
    cosines = torch.zeros(1, 5, 64)
    assert layout_of(turned_halves, (cosines, cosines), 16).width == 16
    assert layout_of(None, (cosines, cosines), 16).width == 16
    assert layout_of(None, torch.zeros(1, 64, dtype=torch.complex64), 16).width == 16


NEIGHBOURS = {"deepseek_v2", "llama4_text"}
NO_POSITIONS = {"kimi_linear"}


def test_of_every_architecture_the_bound_is_the_same_at_every_position(
    architecture, tiny_checkpoint, load
):
    """One token alone attends to itself, so that only its rotation differs between positions."""
    decoder = load(tiny_checkpoint(architecture)).model.base_model
    text_model = getattr(decoder, "language_model", decoder)
    keys, bounds, found = {}, {}, set()

    def record(position):
        def observe(write):
            rows = write.values if write.attention.attention == "mla" else write.keys
            layout = rotary_layout(
                write.attention.module, write.position_embeddings, rows.shape[-1]
            )
            found.add(layout)
            keys[position, write.attention.name] = rows
            bounds[position, write.attention.name] = layout.pair_norms(rows)

        return observe

    with torch.inference_mode():
        for position in (0, 3, 101):
            with tap(find_attention_modules(text_model), record(position)):
                text_model(
                    input_ids=torch.tensor([[65]]),
                    position_ids=torch.tensor([[position]]),
                    use_cache=False,
                )
    names = {name for _, name in keys}
    assert names
    for name in names:
        for position in (3, 101):
            torch.testing.assert_close(
                bounds[position, name], bounds[0, name], rtol=2e-5, atol=1e-6
            )
    turned = any(not torch.allclose(keys[101, name], keys[0, name], rtol=1e-2) for name in names)
    assert turned == (architecture not in NO_POSITIONS)
    pairing = "neighbours" if architecture in NEIGHBOURS else "halves"
    assert {layout.pairing for layout in found} == {pairing}
