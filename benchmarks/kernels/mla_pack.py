"""``mla_pack``: latent and rope part to one row of 576 bytes at random slots of pages of 64."""

from __future__ import annotations

import torch

from fp8kv.kernels.mla_pack import mla_pack, reference_mla_pack

from .case import Case, Problem, Target
from .problems import K_SCALE, differing_share, normal, scale_tensor, slots

LATENT, ROPE, PAGE_SIZE = 512, 64, 64
CAPACITY = 1 << 17
TARGETS_US = {1: 1.4, 64: 1.7, 1024: None, 8192: 4.5}


def cases() -> list[Case]:
    """Return all shapes."""
    rows = [
        _case(tokens, None if target is None else Target(time_us=target))
        for tokens, target in TARGETS_US.items()
    ]
    return rows + [_case(tokens, None, pdl=True) for tokens in TARGETS_US]


def _case(tokens: int, target: Target | None, pdl: bool = False) -> Case:
    def build(copies: int, tiny: bool, device: str = "cuda") -> Problem:
        capacity = max(CAPACITY, copies * tokens)
        latent = normal(copies, tokens, LATENT, device=device)
        rope = normal(copies, tokens, ROPE, device=device)
        shape = (capacity // PAGE_SIZE, PAGE_SIZE, LATENT + ROPE)
        cache = torch.zeros(shape, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn)
        places = slots(copies, tokens, capacity, device=device)
        scale = scale_tensor(K_SCALE, device=device)

        def error() -> float:
            expected = torch.zeros_like(cache)
            used = places[[0, copies - 1]].flatten()
            for i in {0, copies - 1}:
                reference_mla_pack(latent[i], rope[i], expected, places[i], scale)
            found, wanted = (
                each.view(torch.uint8).flatten(0, 1)[used] for each in (cache, expected)
            )
            return differing_share(found, wanted)

        calls = [
            lambda i=i: mla_pack(latent[i], rope[i], cache, places[i], scale, pdl=pdl)
            for i in range(copies)
        ]
        return Problem(calls, error)

    size = tokens * ((LATENT + ROPE) * 3 + 8)
    name = f"MLA576 T{tokens}{' PDL' if pdl else ''}"
    return Case("mla_pack", name, size, 0, build, size, target)
