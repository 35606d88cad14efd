"""Decode of multi-head latent attention over a paged FP8 cache: one query token per sequence, split along its tokens.

Contract: a row of the cache holds a token's latent, 512 columns, and its rope part, 64 columns, as FP8 codes of one
scale. The absorbed queries have the same 576 columns. With k = float(code) * scale, a head's scores are
``sm_scale * q . k`` over all columns and its output is the softmax-weighted sum of k's first 512: V is the K that has
just been read, so there is one scale, and two different ones cannot be given. A sequence of length 0 gives 0 and a
log-sum-exp of -inf. Entries of the page table past the last page of a sequence, and bytes past its last token, are
never used. An unquantised cache, of the query's own 16-bit dtype, has no scale.

Codes become FP16 numbers, exactly, and queries too, after multiplication of each row by a power of two; products are
added up in float32, and probabilities are rounded to FP16. So the error is that of an FP16 probability, 2e-4, also
where one token takes nearly all the weight. Over an unquantised cache everything is multiplied in its dtype; the error
is that of a probability so rounded, for BF16 2e-3.

Floor: 576 elements per token of the sequences, or ``2 * heads * (576 + 512)`` operations per token at the BF16 matrix
rate, whichever takes longer; on an H200 the bytes do up to about 48 heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp8kv.kernels.arguments import (
    FLOAT_TYPES,
    FP8_TYPES,
    WIDE_TYPES,
    require,
    require_cache_dtype,
    require_dtype,
    require_same_device,
    require_scale,
    require_shape,
    require_unit_stride,
)
from fp8kv.kernels.combine import combine
from fp8kv.kernels.decode_mla_kernels import choose_kernel
from fp8kv.kernels.layout import MAX_PAGE_SIZE, gather_tokens, is_page_size
from fp8kv.kernels.outputs import stage_one_outputs
from fp8kv.kernels.pdl import uses_pdl

LATENT_DIM = 512
ROPE_DIM = 64
ROW_DIM = LATENT_DIM + ROPE_DIM

# cp.async and 16-byte loads: what a row's address and the rows' distances must be multiples of.
_ALIGNMENT = 16
_PAGE_SIZES = f"a power of two up to {MAX_PAGE_SIZE}"


def reference_decode_mla(
    query: Tensor,
    cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    scale: Tensor,
    *,
    sm_scale: float,
    max_seq_len: int,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    lse: Tensor | None = None,
    num_splits: int | None = None,
    pdl: bool | None = None,
) -> Tensor:
    """Do what :func:`decode_mla` does, in plain torch and float32; the last two arguments change nothing."""
    if out is None:
        out = _empty_like(query, out_dtype)
    for batch, length in enumerate(seq_lens.tolist()):
        rows = gather_tokens(cache, page_table[batch], length).float()
        if cache.dtype in FP8_TYPES:
            rows = rows * scale
        scores = query[batch].float() @ rows.T * sm_scale
        if lse is not None:
            lse[batch] = scores.logsumexp(-1)
        out[batch] = scores.softmax(-1) @ rows[:, :LATENT_DIM]
    return out


def decode_mla(
    query: Tensor,
    cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    scale: Tensor,
    *,
    sm_scale: float,
    max_seq_len: int,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    lse: Tensor | None = None,
    num_splits: int | None = None,
    pdl: bool | None = None,
) -> Tensor:
    """Compute one decode step of absorbed MLA (DeepSeek-V2, 2024) by Flash-Decoding (Dao et al., 2023).

    That is, every sequence is cut into splits that run side by side, and a second kernel combines their results.
    Everything but the host arguments is read on the device when the kernels run, so a captured CUDA graph may be
    replayed with other lengths, pages and scales, up to ``max_seq_len``.

    Args:
        query: [batch, heads, 576], bfloat16 or float16, [latent part | rope part]; any strides but the last.
        cache: [pages, page_size, 576], FP8 codes, or bfloat16 or float16 as ``query``; any strides of pages and
            tokens that are multiples of 16.
        page_table: [batch, max_pages], int32; entry p of a row holds tokens ``p * page_size`` and on.
        seq_lens: [batch], int32, tokens of each sequence, 0 and more.
        scale: float32, one element: the value of code 1.0, for K and so for V. Not read where the cache is
            unquantised.
        sm_scale: what the scores are multiplied by, usually ``(128 + 64) ** -0.5``.
        max_seq_len: no sequence is longer; chooses the number of splits.
        out: [batch, heads, 512], bfloat16, float16 or float32, to be filled; any strides but the last.
        out_dtype: dtype of the result where ``out`` is not given; the query's by default.
        lse: [batch, heads] float32, to be filled with the natural log-sum-exp of the scores; any strides.
        num_splits: parts that each sequence is cut into; chosen from the batch and ``max_seq_len`` by default.
        pdl: let the second stage start while the first ends; by default wherever the GPU can.

    Returns:
        ``out``, or a new contiguous tensor.

    Raises:
        KernelArgumentError: an argument's shape, dtype, device, stride or value does not fit.
    """
    _check(query, cache, page_table, seq_lens, scale, max_seq_len, num_splits)
    require(sm_scale > 0, "sm_scale", sm_scale, "positive")
    if out is None:
        out = _empty_like(query, out_dtype)
    _check_out(query, out, out_dtype, lse)
    batch, heads, _ = query.shape
    if batch * heads == 0:
        return out
    overlaps = uses_pdl(pdl is not False, query.device)
    kernel = choose_kernel(query, cache)
    splits = num_splits if num_splits is not None else kernel.splits(query, max_seq_len)
    result, log_sum = stage_one_outputs(out, lse, splits)
    kernel.launch(
        query,
        cache,
        page_table,
        seq_lens,
        scale,
        sm_scale=sm_scale,
        num_splits=splits,
        result=result,
        log_sum=log_sum,
        pdl=overlaps and splits > 1,
    )
    if splits > 1 and log_sum is not None:
        combine(result, log_sum, out, lse, pdl=overlaps)
    return out


def _empty_like(query: Tensor, dtype: torch.dtype | None) -> Tensor:
    batch, heads, _ = query.shape
    return query.new_empty(batch, heads, LATENT_DIM, dtype=dtype or query.dtype)


def _check(
    query: Tensor,
    cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    scale: Tensor,
    max_seq_len: int,
    num_splits: int | None,
) -> None:
    require_shape("query", query, (None, None, ROW_DIM))
    require_dtype("query", query, WIDE_TYPES)
    require_unit_stride("query", query)
    require_shape("cache", cache, (None, None, ROW_DIM))
    require_cache_dtype("cache", cache, query)
    require_unit_stride("cache", cache)
    require(is_page_size(cache.shape[1]), "page_size", cache.shape[1], _PAGE_SIZES)
    places = {
        "a page": cache.stride(0),
        "a token": cache.stride(1),
        "the first row": int(cache.storage_offset()),
    }
    for what, place in places.items():
        multiple = f"a multiple of {_ALIGNMENT}"
        require(place % _ALIGNMENT == 0, f"the place of {what} of cache", place, multiple)
    batch = query.shape[0]
    require_shape("page_table", page_table, (batch, None))
    require_dtype("page_table", page_table, (torch.int32,))
    require_unit_stride("page_table", page_table)
    require_shape("seq_lens", seq_lens, (batch,))
    require_dtype("seq_lens", seq_lens, (torch.int32,))
    require_unit_stride("seq_lens", seq_lens)
    require_scale("scale", scale, None)
    require_same_device(
        query=query, cache=cache, page_table=page_table, seq_lens=seq_lens, scale=scale
    )
    require(max_seq_len >= 0, "max_seq_len", max_seq_len, "0 or more")
    if num_splits is not None:
        require(num_splits > 0, "num_splits", num_splits, "at least 1")


def _check_out(
    query: Tensor, out: Tensor, out_dtype: torch.dtype | None, lse: Tensor | None
) -> None:
    batch, heads, _ = query.shape
    require_same_device(query=query, out=out, lse=lse)
    require_shape("out", out, (batch, heads, LATENT_DIM))
    require_dtype("out", out, FLOAT_TYPES)
    if out_dtype is not None:
        require_dtype("out", out, (out_dtype,))
    require_unit_stride("out", out)
    if lse is not None:
        require_shape("lse", lse, (batch, heads))
        require_dtype("lse", lse, (torch.float32,))
