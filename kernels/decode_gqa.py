"""Decode of grouped-query attention over a paged FP8 cache: one query token per sequence, split along its tokens.

Contract: K and V are FP8 codes of scales of their own, one for a layer or one for each KV head; a value is
``float(code) * scale``. An unquantised cache, of the query's own 16-bit dtype, has no scales. A query head h attends KV head ``h // group``; multi-head and multi-query attention are groups
of 1 and of all heads. The query is the sequence's last token: with a window w it sees the last w tokens, itself
included. Scores are ``sm_scale * q . k``, soft-capped where asked, then masked; a head's sink joins the denominator
only. A sequence of length 0 gives 0, and the log-sum-exp of its sink alone, -inf where there is none. Entries of the
page table past a sequence's last page, and bytes past its last token, are never used.

Codes become FP16 numbers, exactly, and queries too, after multiplication of each row by a power of two; products are
added up in float32, and probabilities are rounded to FP16. So the error is that of an FP16 probability, 1e-4, also
where one token takes nearly all the weight. Over an unquantised cache everything is multiplied in its dtype; the error
is that of a probability so rounded, for BF16 2e-3.

Floor: memory, ``(k_dim + v_dim)`` elements per token of the sequences and KV head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8kv.kernels import decode_gqa_portable as portable
from fp8kv.kernels.arguments import FP8_TYPES
from fp8kv.kernels.combine import combine
from fp8kv.kernels.decode_gqa_arguments import (
    DecodeGqaArguments,
    StageOneOutput,
    check_arguments,
    check_outputs,
)
from fp8kv.kernels.hopper import decode_gqa as hopper
from fp8kv.kernels.layout import gather_tokens
from fp8kv.kernels.outputs import stage_one_outputs
from fp8kv.kernels.pdl import uses_pdl


def reference_decode_gqa(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    *,
    sm_scale: float,
    max_seq_len: int,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    lse: Tensor | None = None,
    num_splits: int | None = None,
    pdl: bool | None = None,
) -> Tensor:
    """Do what :func:`decode_gqa` does, in plain torch and float32; the last two arguments change nothing."""
    if out is None:
        out = _empty_output(query, v_cache, out_dtype)
    kv_heads = k_cache.shape[2]
    for batch, length in enumerate(seq_lens.tolist()):
        first = max(0, length - window) if window is not None else 0
        # [kv_heads, tokens, head_dim]
        keys = _read(k_cache, page_table[batch], length, k_scale)[:, first:]
        values = _read(v_cache, page_table[batch], length, v_scale)[:, first:]
        grouped = query[batch].float().unflatten(0, (kv_heads, -1))
        scores = grouped @ keys.transpose(1, 2) * sm_scale
        if soft_cap is not None:
            scores = soft_cap * (scores / soft_cap).tanh()
        total = scores.logsumexp(-1)
        if sinks is not None:
            total = torch.logaddexp(total, sinks.view(kv_heads, -1))
        weights = (scores - total[..., None]).exp()
        out[batch] = (weights @ values).flatten(0, 1)
        if lse is not None:
            lse[batch] = total.flatten()
    return out


def decode_gqa(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    k_scale: Tensor,
    v_scale: Tensor,
    *,
    sm_scale: float,
    max_seq_len: int,
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    lse: Tensor | None = None,
    num_splits: int | None = None,
    pdl: bool | None = None,
) -> Tensor:
    """Compute one decode step, flash-decoding style: splits along the tokens, then a combination where there are several.

    Everything but the host arguments is read on the device when the kernels run, so a captured CUDA graph may be
    replayed with other lengths, pages and scales, up to ``max_seq_len``.

    Args:
        query: [batch, q_heads, k_dim], bfloat16, float16 or float32 (which is rounded to 11 bits); any strides but the
            last.
        k_cache: [pages, page_size, kv_heads, k_dim], FP8 codes, or bfloat16 or float16 as ``query``; NHD or HND: any
            strides that are multiples of 16, but the last. Head dimensions are multiples of 16 up to 256.
        v_cache: [pages, page_size, kv_heads, v_dim], of the same dtype.
        page_table: [batch, max_pages] int32; entry p of a row holds tokens ``p * page_size`` and on.
        seq_lens: [batch] int32, tokens of each sequence, the query's own included; 0 and more.
        k_scale: float32 of one element, or of kv_heads: the value of code 1.0. Not read where the cache is unquantised.
        v_scale: as k_scale, for V.
        sm_scale: what the scores are multiplied by, positive, usually ``k_dim ** -0.5``.
        max_seq_len: no sequence is longer; chooses the number of splits.
        window: a query sees this many tokens, itself included; all by default.
        soft_cap: scores become ``soft_cap * tanh(score / soft_cap)``.
        sinks: [q_heads] float32, logits that join the denominator only (attention sinks).
        out: [batch, q_heads, v_dim], bfloat16, float16 or float32, to be filled; any strides but the last.
        out_dtype: dtype of the result where ``out`` is not given; the query's by default.
        lse: [batch, q_heads] float32, to be filled with the natural log-sum-exp of the scores, sinks included.
        num_splits: parts that each sequence is cut into; chosen from the batch and ``max_seq_len`` by default.
        pdl: let each kernel start while the one in front of it ends, and wait for it on the device; by default
            wherever the GPU can.

    Returns:
        ``out``, or a new contiguous tensor.

    Raises:
        KernelArgumentError: an argument's shape, dtype, device, stride or value does not fit.
    """
    arguments = DecodeGqaArguments(
        query, k_cache, v_cache, page_table, seq_lens, k_scale, v_scale, sm_scale, max_seq_len,
        window, soft_cap, sinks, uses_pdl(pdl is not False, query.device),
    )  # fmt: skip
    check_arguments(arguments, num_splits)
    if out is None:
        out = _empty_output(query, v_cache, out_dtype)
    check_outputs(arguments, out, out_dtype, lse)
    if out.numel() == 0:
        return out
    kernel = hopper if hopper.supports(arguments) else portable
    plan = kernel.make_plan(arguments, num_splits)
    result, log_sum = stage_one_outputs(out, lse, plan.splits)
    kernel.launch(arguments, plan, StageOneOutput(result, log_sum, final=plan.splits == 1))
    if plan.splits > 1 and log_sum is not None:
        combine(result, log_sum, out, lse, sinks, pdl=arguments.pdl)
    return out


def _read(cache: Tensor, pages: Tensor, length: int, scale: Tensor) -> Tensor:
    """Return K or V of a sequence, [kv_heads, length, head_dim] float32."""
    tokens = gather_tokens(cache, pages, length).float().transpose(0, 1)
    return tokens * scale.view(-1, 1, 1) if cache.dtype in FP8_TYPES else tokens


def _empty_output(query: Tensor, v_cache: Tensor, dtype: torch.dtype | None) -> Tensor:
    shape = (*query.shape[:-1], v_cache.shape[-1])
    return torch.empty(shape, dtype=dtype or query.dtype, device=query.device)
