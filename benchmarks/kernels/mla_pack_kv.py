"""``mla_pack_kv``: the expanded K and V of MLA prefill, K put together from its two parts, both quantised."""

from __future__ import annotations

import torch

from fp8kv.kernels.mla_pack_kv import mla_pack_kv, reference_mla_pack_kv

from .case import Case, Problem
from .problems import K_SCALE, V_SCALE, differing_share, normal, scale_tensor

NOPE, ROPE, VALUE = 128, 64, 128
SHAPES = [(8192, 128), (1024, 128), (64, 128)]


def cases() -> list[Case]:
    """Return all shapes."""
    return [_case(tokens, heads) for tokens, heads in SHAPES]


def _case(tokens: int, heads: int) -> Case:
    def build(copies: int, tiny: bool, device: str = "cuda") -> Problem:
        # k_nope and value are the two halves of one projection's output, as the model makes them
        both = normal(copies, tokens, heads, NOPE + VALUE, device=device)
        k_nope, value = both[..., :NOPE], both[..., NOPE:]
        k_rope = normal(copies, tokens, 1, ROPE, device=device)
        scales = [scale_tensor(scale, device=device) for scale in (K_SCALE, V_SCALE)]
        code = {"dtype": torch.float8_e4m3fn, "device": device}
        out_k = torch.empty(copies, tokens, heads, NOPE + ROPE, **code)
        out_v = torch.empty(copies, tokens, heads, VALUE, **code)

        def call(i: int) -> None:
            mla_pack_kv(k_nope[i], k_rope[i], value[i], *scales, out_k=out_k[i], out_v=out_v[i])

        def error() -> float:
            expected_k, expected_v = reference_mla_pack_kv(k_nope[0], k_rope[0], value[0], *scales)
            k_share = differing_share(out_k[0], expected_k)
            return max(k_share, differing_share(out_v[0], expected_v))

        return Problem([lambda i=i: call(i) for i in range(copies)], error)

    size = tokens * (heads * (NOPE + VALUE) * 2 + ROPE * 2 + heads * (NOPE + ROPE + VALUE))
    return Case("mla_pack_kv", f"{heads} heads T{tokens}", size, 0, build, size)
