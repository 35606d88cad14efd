"""Attention of new tokens over a paged FP8 prefix and over themselves: prefill and chunked prefill, ragged.

Contract: sequence b has ``prefix_lens[b]`` tokens in the paged cache and ``cu_seqlens[b + 1] - cu_seqlens[b]`` new
ones, whose K and V are BF16, FP16, FP8 codes of the cache's scales, or already in the cache behind the prefix. New
token i sits at position prefix + i; if causal, it sees the positions up to its own, of which a window leaves the last
``window``. Scores are ``sm_scale * q . k``, soft-capped if asked; a sink is one more logit of its head, without a value.
``value = float(code) * scale``, one scale or one per KV head, K and V apart. K and V may have different widths
(192 and 128 in the expanded heads of multi-head latent attention).

Everything is multiplied in FP16 with float32 sums. FP8 codes are FP16 numbers. BF16 queries and new tokens become FP16
numbers without loss after multiplication by a power of two, per row or near 1 / scale; those powers and the scales
themselves enter the float32 scores and the float32 output. Probabilities are rounded to FP16, never to FP8. Over an
unquantised cache, which has the dtype of queries and new tokens and no scales, everything is multiplied in that dtype,
and BF16 probabilities cost 2e-3.

Floor: ``2 * q_heads * (k_dim + v_dim) * pairs`` operations at the BF16 matrix rate, where pairs counts the visible
(query, key) combinations; the bytes of the cache matter only for few new tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fp8kv.kernels import extend_portable
from fp8kv.kernels.arguments import FP8_TYPES, require, require_dtype
from fp8kv.kernels.extend_arguments import ExtendArguments
from fp8kv.kernels.hopper import extend as hopper
from fp8kv.kernels.layout import gather_tokens


def reference_extend(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    page_table: Tensor | None,
    prefix_lens: Tensor,
    cu_seqlens: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    *,
    sm_scale: float,
    max_new_tokens: int,
    max_prefix_len: int,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Do what :func:`extend` does, in plain torch and float32."""
    if out is None:
        out = _empty_out(query, value if value is not None else v_cache, out_dtype)
    for batch, prefix in enumerate(prefix_lens.tolist()):
        first, last = cu_seqlens[batch : batch + 2].tolist()
        pages = page_table[batch] if page_table is not None else None
        seen = prefix if key is not None else prefix + last - first
        keys = _sequence(key, k_cache, pages, seen, first, last, k_scale)
        values = _sequence(value, v_cache, pages, seen, first, last, v_scale)
        group = query.shape[1] // keys.shape[1]
        keys = keys.repeat_interleave(group, 1).transpose(0, 1)
        values = values.repeat_interleave(group, 1).transpose(0, 1)
        scores = query[first:last].float().transpose(0, 1) @ keys.transpose(1, 2) * sm_scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        position = torch.arange(prefix, prefix + last - first, device=query.device)[:, None]
        column = torch.arange(keys.shape[1], device=query.device)[None, :]
        if causal:
            scores = scores.masked_fill(column > position, -math.inf)
        if window is not None:
            scores = scores.masked_fill(column <= position - window, -math.inf)
        total = scores.logsumexp(-1)
        if sinks is not None:
            total = torch.logaddexp(total, sinks[:, None])
        weights = (scores - total[..., None]).exp()
        out[first:last] = (weights @ values).transpose(0, 1).to(out.dtype)
        if lse is not None:
            lse[first:last] = total.transpose(0, 1)
    return out


def extend(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    page_table: Tensor | None,
    prefix_lens: Tensor,
    cu_seqlens: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    *,
    sm_scale: float,
    max_new_tokens: int,
    max_prefix_len: int,
    causal: bool = True,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    lse: Tensor | None = None,
) -> Tensor:
    """Let new tokens attend to their sequence's FP8 prefix and to each other.

    Nothing is read from the device, so the call can be captured in a CUDA graph; lengths, page table and scales may
    change between replays, within the two upper bounds.

    Args:
        query: [tokens, q_heads, k_dim], bfloat16 or float16, the new tokens of all sequences in a row. Rows behind
            ``cu_seqlens[-1]`` are padding; their output is left alone.
        key: [tokens, kv_heads, k_dim], bfloat16, float16 or FP8 codes; ``None`` where the new tokens are in the cache
            already, at positions prefix_lens[b] and on.
        value: [tokens, kv_heads, v_dim], like ``key``.
        k_cache: [pages, page_size, kv_heads, k_dim], FP8 codes, or bfloat16 or float16 as ``query`` and ``key``; any
            strides but the last; ``None`` where no sequence has a prefix.
        v_cache: [pages, page_size, kv_heads, v_dim], like ``k_cache``.
        page_table: [batch, max_pages] int32; entries behind a sequence's last page are never used.
        prefix_lens: [batch] int32, tokens in front of the new ones.
        cu_seqlens: [batch + 1] int32, where in ``query`` the new tokens of each sequence start.
        k_scale: float32 on the device, one element or [kv_heads]; positive. No value is scaled where the cache is
            unquantised.
        v_scale: the same for V.
        sm_scale: factor of the scores, usually ``k_dim ** -0.5``.
        max_new_tokens: upper bound of the new tokens of one sequence; sets the grid.
        max_prefix_len: upper bound of ``prefix_lens``; 0 skips the cache where the new tokens are given.
        causal: whether a token sees nothing behind its own position.
        window: how many positions a token sees, itself included; ``None`` for all. Needs ``causal``.
        soft_cap: scores become ``soft_cap * tanh(score / soft_cap)``.
        sinks: [q_heads] float32, natural logits that join the denominator only.
        out: [tokens, q_heads, v_dim], bfloat16, float16 or float32, to be filled; made where absent.
        out_dtype: dtype of ``out`` where it is made; the query's by default.
        lse: [tokens, q_heads] float32, to be filled with the natural logarithm of the sum of exponentials.

    Returns:
        ``out``.

    Raises:
        KernelArgumentError: an argument's shape, dtype, device, stride or value does not fit.
    """
    if max_prefix_len == 0 and key is not None:
        k_cache = v_cache = page_table = None
    if out is None:
        out = _empty_out(query, value if value is not None else v_cache, out_dtype)
    else:
        require_dtype("out", out, (out_dtype or out.dtype,))
    arguments = ExtendArguments(
        query, key, value, k_cache, v_cache, page_table, prefix_lens, cu_seqlens, k_scale, v_scale,
        sm_scale, max_new_tokens, max_prefix_len, causal, window, soft_cap, sinks, out, lse,
    )  # fmt: skip
    arguments.check()
    if prefix_lens.shape[0] == 0 or query.shape[0] == 0 or max_new_tokens == 0:
        return out
    if arguments.is_quantised and hopper.fits(arguments):
        hopper.launch(arguments)
    else:
        extend_portable.launch(arguments)
    return out


def _empty_out(query: Tensor, values: Tensor | None, dtype: torch.dtype | None) -> Tensor:
    require(values is not None, "value", None, "given where there is no cache")
    shape = (*query.shape[:-1], values.shape[-1] if values is not None else 0)
    return torch.empty(shape, dtype=dtype or query.dtype, device=query.device)


def _sequence(
    new: Tensor | None,
    cache: Tensor | None,
    pages: Tensor | None,
    cached: int,
    first: int,
    last: int,
    scale: Tensor,
) -> Tensor:
    """Return K or V of a whole sequence, [tokens, kv_heads, dim] float32."""
    unit = scale.view(-1, 1)
    parts = []
    if cache is not None and pages is not None:
        rows = gather_tokens(cache, pages, cached).float()
        parts.append(rows * unit if cache.dtype in FP8_TYPES else rows)
    if new is not None:
        rows = new[first:last].float()
        parts.append(rows * unit if new.dtype in FP8_TYPES else rows)
    return torch.cat(parts)
