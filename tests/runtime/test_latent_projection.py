"""Absorbed and expanded, attention of MLA is the same, up to the order of sums."""

from contextlib import ExitStack

import torch
from torch import nn

from fp8kv.runtime.latent_projection import LatentProjection, hand_latent_through

HEADS, NOPE, ROPE, V_DIM, LATENT = 3, 6, 4, 5, 8


def make():
    module = nn.Module()
    module.kv_b_proj = nn.Linear(LATENT, HEADS * (NOPE + V_DIM), bias=False)
    module.kv_lora_rank, module.qk_nope_head_dim = LATENT, NOPE
    return module, LatentProjection.of(module, HEADS)


@torch.no_grad()
def test_scores_and_outputs_agree():
    _, projection = make()
    query, rows = torch.randn(7, HEADS, NOPE + ROPE), torch.randn(9, LATENT + ROPE)

    keys, values = projection.expand(rows)
    expanded = torch.einsum("nhd,thd->hnt", query, keys)
    absorbed = torch.einsum("nhl,tl->hnt", projection.absorb(query), rows)
    torch.testing.assert_close(absorbed, expanded)

    weights = expanded.softmax(-1)
    of_values = torch.einsum("hnt,thv->nhv", weights, values)
    of_latents = torch.einsum("hnt,tl->nhl", weights, rows[:, :LATENT])
    torch.testing.assert_close(projection.to_values(of_latents), of_values)


@torch.no_grad()
def test_expands_as_the_module_projects():
    module, projection = make()
    rows = torch.randn(9, LATENT + ROPE)
    keys, values = projection.expand(rows)
    both = module.kv_b_proj(rows[:, :LATENT]).view(9, HEADS, NOPE + V_DIM)
    assert torch.equal(keys[..., :NOPE], both[..., :NOPE])
    assert torch.equal(keys[..., NOPE:], rows[:, None, LATENT:].expand(9, HEADS, ROPE))
    assert torch.equal(values, both[..., NOPE:])
    assert (projection.latent_dim, projection.v_dim) == (LATENT, V_DIM)
    assert projection.weight.data_ptr() == module.kv_b_proj.weight.data_ptr()


def test_a_module_hands_its_latent_through_until_the_stack_closes():
    class Attention(nn.Module):
        def expand_kv(self, latent, rope):
            return latent + 1, rope + 1

    module = Attention()
    latent, rope = torch.randn(2, 1, 3, LATENT), torch.randn(2, 1, 3, ROPE)
    with ExitStack() as stack:
        hand_latent_through(module, stack)
        key, value = module.expand_kv(latent, rope)
        assert key is latent
        assert value is rope
    assert torch.equal(module.expand_kv(latent, rope)[0], latent + 1)
