"""``decode_mla``: one absorbed query token per sequence over rows of 512 + 64 codes, pages of 64, BF16 query and output."""

from __future__ import annotations

import torch

from fp8kv.kernels.decode_mla import decode_mla, reference_decode_mla

from .case import KIB, Case, Problem, Target, length_name
from .problems import (
    K_SCALE,
    normal,
    normal_codes,
    page_tables,
    relative_error,
    scale_tensor,
    some,
)

HEADS = [128, 64, 16]
LENGTHS = {1: (1, 8, 32, 192), 16: (1, 8, 32), 64: (1, 8, 32), 128: (1, 8, 32)}
LATENT, ROPE, PAGE_SIZE = 512, 64, 64
# the head dimension before absorption is 128 + 64
SM_SCALE = 192**-0.5
TARGETS_US = {"H16 B1 L192K": 45, "H128 B1 L192K": 110}


def cases() -> list[Case]:
    """Return all shapes."""
    return [
        _case(heads, batch, length * KIB)
        for heads in HEADS
        for batch, lengths in LENGTHS.items()
        for length in lengths
    ]


def _case(heads: int, batch: int, tokens: int) -> Case:
    def build(copies: int, tiny: bool, device: str = "cuda") -> Problem:
        tables, pages = page_tables(copies, batch, tokens, PAGE_SIZE, device=device, tiny=tiny)
        shape = (pages, PAGE_SIZE, LATENT + ROPE)
        cache = normal_codes(shape, K_SCALE, device=device, tiny=tiny)
        query = normal(copies, batch, heads, LATENT + ROPE, device=device)
        lengths = torch.full((batch,), 1 if tiny else tokens, dtype=torch.int32, device=device)
        scale = scale_tensor(K_SCALE, device=device)
        out = torch.empty(copies, batch, heads, LATENT, dtype=torch.bfloat16, device=device)
        limits = {"sm_scale": SM_SCALE, "max_seq_len": tokens}

        def call(i: int) -> None:
            decode_mla(query[i], cache, tables[i], lengths, scale, **limits, out=out[i])

        def error() -> float:
            errors = []
            for copy in {0, copies - 1}:
                for row in some(batch):
                    one = slice(row, row + 1)
                    expected = reference_decode_mla(
                        query[copy, one], cache, tables[copy, one], lengths[one], scale,
                        **limits, out_dtype=torch.float32,
                    )  # fmt: skip
                    errors.append(relative_error(out[copy, one], expected))
            return max(errors)

        return Problem([lambda i=i: call(i) for i in range(copies)], error)

    width = LATENT + ROPE
    size = batch * (tokens * width + 2 * heads * (width + LATENT) + tokens // PAGE_SIZE * 4)
    flops = 2 * batch * heads * tokens * (width + LATENT)
    shape = f"H{heads} B{batch} L{length_name(tokens)}"
    return Case("decode_mla", shape, size, flops, build, size, _target(shape, heads, batch, tokens))


def _target(shape: str, heads: int, batch: int, tokens: int) -> Target | None:
    if shape in TARGETS_US:
        return Target(time_us=TARGETS_US[shape])
    if tokens < 8 * KIB or batch < (64 if heads == 16 else 16):
        return None
    return Target(fraction=0.78 if heads == 16 else 0.6)
