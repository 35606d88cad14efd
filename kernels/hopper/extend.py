"""The Hopper kernel of :mod:`fp8kv.kernels.extend`: warp-specialised, with wgmma on FP16 tiles.

A CTA computes 128 or 192 query rows of one KV head, packed as in the portable kernel. One warp group widens tiles of
keys and values to FP16 (:mod:`fp8kv.kernels.hopper.extend_producer`), two or three others hold 64 rows each and use
every tile (:mod:`fp8kv.kernels.hopper.extend_consumer`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from fp8kv.kernels.extend_arguments import ExtendArguments
from fp8kv.kernels.hopper.extend_consumer import consume, power_of_two
from fp8kv.kernels.hopper.extend_producer import produce, tile_range

_NEW = {torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass(frozen=True)
class Form:
    """The compile-time constants of the kernel.

    Attributes:
        group: query heads of a KV head.
        dim: V's width, and K's without its tail: 64, 128 or 256.
        tail: the rest of K's width, 0 or 64.
        cached: whether keys are read from the cache.
        page_size: tokens of a page of the cache.
        e5m2: whether codes are E5M2 rather than E4M3.
        new: what the new tokens' K and V are: ``none`` (in the cache), ``codes``, ``fp16`` or ``bf16``.
        k_per_head: whether each KV head has a K scale of its own.
        v_per_head: the same for V.
        causal: whether a token sees nothing behind its own position.
        window: whether a token sees a limited number of positions.
        soft_cap: whether scores are capped.
        sinks: whether each query head has a sink.
        lse: whether the log-sum-exp is asked for.
        block_n: keys of a tile.
        stages: tiles of K, and of V, in shared memory.
        consumers: warp groups that multiply, 64 rows each; 2 or 3.
        consumer_registers: registers of a thread that multiplies.
        producer_registers: registers of a thread that fills tiles.
    """

    group: int
    dim: int
    tail: int
    cached: bool
    page_size: int
    e5m2: bool
    new: str
    k_per_head: bool
    v_per_head: bool
    causal: bool
    window: bool
    soft_cap: bool
    sinks: bool
    lse: bool
    block_n: int
    stages: int
    consumers: int
    consumer_registers: int
    producer_registers: int


# (k_dim, v_dim): keys of a tile, tiles in shared memory, consumers, registers of a consumer's and the producer's threads
_TILES = {
    (64, 64): (64, 4, 3, 144, 80),
    (128, 128): (128, 2, 2, 200, 104),
    (192, 128): (64, 3, 2, 200, 104),
    (256, 256): (32, 4, 2, 208, 88),
}
# the same where there are no codes to widen: more rows share what is twice as many bytes
_WIDE_TILES = _TILES | {(128, 128): (64, 4, 3, 144, 80)}


@gluon.jit(do_not_specialize=["window", "stride_table"])
def extend_kernel(
    query, key, value, k_cache, v_cache, page_table, prefix_lens, cu_seqlens, k_scale, v_scale,
    sinks, out, lse, sm_scale, soft_cap, window,
    stride_q_token, stride_q_head, stride_k_token, stride_k_head, stride_v_token, stride_v_head,
    stride_kc_page, stride_kc_token, stride_kc_head, stride_vc_page, stride_vc_token, stride_vc_head,
    stride_table, stride_o_token, stride_o_head, stride_lse_token, stride_lse_head,
    form: gl.constexpr,
) -> None:  # fmt: skip
    """Compute the rows of all consumers. Absent tensors are any pointer; K and V come as 32-bit words, strides included."""
    ROWS: gl.constexpr = 64 * form.consumers
    kv_head = gl.program_id(1)
    batch = gl.program_id(2)
    start = gl.load(cu_seqlens + batch).to(gl.int64)
    new_tokens = (gl.load(cu_seqlens + batch + 1) - start).to(gl.int32)
    # Late rows see the most keys: they go first, and the short ones fill up the end.
    first_row = (gl.num_programs(0) - 1 - gl.program_id(0)) * ROWS
    if first_row < new_tokens * form.group:
        prefix = gl.load(prefix_lens + batch)
        first_token = first_row // form.group
        last_token = gl.minimum((first_row + ROWS - 1) // form.group, new_tokens - 1)
        k_unit = gl.load(k_scale + kv_head * form.k_per_head)
        v_unit = gl.load(v_scale + kv_head * form.v_per_head)
        new_k_unit = k_unit
        new_v_unit = v_unit
        k_factor = 1.0
        v_factor = 1.0
        if form.new == "bf16" or form.new == "fp16":
            # Multiplied by a power of two near 1 / scale, BF16 fits FP16 without loss.
            k_exponent = _next_exponent(k_unit)
            v_exponent = _next_exponent(v_unit)
            new_k_unit = power_of_two(k_exponent)
            new_v_unit = power_of_two(v_exponent)
            k_factor = power_of_two(-k_exponent)
            v_factor = power_of_two(-v_exponent)
        cache_limit = prefix
        if form.new == "none":
            cache_limit = prefix + new_tokens
        cache_tiles = tile_range(cache_limit, prefix, first_token, last_token, window, form)
        new_tiles = tile_range(new_tokens, 0, first_token, last_token, window, form)
        segments = (cache_tiles, cache_limit, new_tiles, new_tokens)

        swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
        q_tile = gl.allocate_shared_memory(gl.float16, [form.consumers, 64, form.dim], swizzled)
        shape: gl.constexpr = [form.stages, form.block_n, form.dim]
        k_tile = gl.allocate_shared_memory(gl.float16, shape, swizzled)
        v_tile = gl.allocate_shared_memory(gl.float16, shape, swizzled)
        q_tail = q_tile
        k_tail = k_tile
        if form.tail:
            q_tail = gl.allocate_shared_memory(
                gl.float16, [form.consumers, 64, form.tail], swizzled
            )
            tail_shape: gl.constexpr = [form.stages, form.block_n, form.tail]
            k_tail = gl.allocate_shared_memory(gl.float16, tail_shape, swizzled)
        barrier: gl.constexpr = mbarrier.MBarrierLayout()
        k_full = gl.allocate_shared_memory(gl.int64, [form.stages, 1], barrier)
        k_empty = gl.allocate_shared_memory(gl.int64, [form.stages, 1], barrier)
        v_full = gl.allocate_shared_memory(gl.int64, [form.stages, 1], barrier)
        v_empty = gl.allocate_shared_memory(gl.int64, [form.stages, 1], barrier)
        STAGES: gl.constexpr = form.stages
        for stage in gl.static_range(STAGES):
            mbarrier.init(k_full.index(stage), count=1)
            mbarrier.init(v_full.index(stage), count=1)
            mbarrier.init(k_empty.index(stage), count=form.consumers)
            mbarrier.init(v_empty.index(stage), count=form.consumers)
        tiles = (k_tile, k_tail, v_tile)
        ready = (k_full, k_empty, v_full, v_empty)
        source = (
            k_cache + kv_head.to(gl.int64) * stride_kc_head,
            v_cache + kv_head.to(gl.int64) * stride_vc_head,
            page_table + batch.to(gl.int64) * stride_table,
            stride_kc_page, stride_kc_token, stride_vc_page, stride_vc_token,
            key + start * stride_k_token + kv_head * stride_k_head,
            value + start * stride_v_token + kv_head * stride_v_head,
            stride_k_token, stride_v_token, k_factor, v_factor,
        )  # fmt: skip
        head = kv_head * form.group
        rows = (
            query + start * stride_q_token + head * stride_q_head, stride_q_token, stride_q_head,
            out + start * stride_o_token + head * stride_o_head, stride_o_token, stride_o_head,
            lse + start * stride_lse_token + head * stride_lse_head, stride_lse_token, stride_lse_head,
            sinks + head, first_row, new_tokens, prefix, window, soft_cap, sm_scale,
            k_unit, v_unit, new_k_unit, new_v_unit,
        )  # fmt: skip
        queries = (q_tile, q_tail)
        if form.consumers == 3:
            gl.warp_specialize(
                [
                    (consume, (0, rows, segments, queries, tiles, ready, form)),
                    (consume, (1, rows, segments, queries, tiles, ready, form)),
                    (consume, (2, rows, segments, queries, tiles, ready, form)),
                    (produce, (source, segments, tiles, ready, form)),
                ],
                [4, 4, 4],
                [form.consumer_registers, form.consumer_registers, form.producer_registers],
            )
        else:
            gl.warp_specialize(
                [
                    (consume, (0, rows, segments, queries, tiles, ready, form)),
                    (consume, (1, rows, segments, queries, tiles, ready, form)),
                    (produce, (source, segments, tiles, ready, form)),
                ],
                [4, 4],
                [form.consumer_registers, form.producer_registers],
            )


def fits(arguments: ExtendArguments) -> bool:
    """Say whether :func:`launch` takes these arguments: the GPU, the widths and the strides."""
    device = arguments.query.device
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    if torch.cuda.get_device_capability(device)[0] != 9:
        return False
    sources = [tensor for tensor in arguments.sources if tensor is not None]
    if any(tensor.dtype == torch.float8_e4m3fnuz for tensor in sources):
        return False
    if (arguments.k_dim, arguments.v_dim) not in _TILES:
        return False
    return all(
        tensor.data_ptr() % 16 == 0
        and all(stride * tensor.element_size() % 16 == 0 for stride in tensor.stride()[:-1])
        for tensor in sources
    )


def launch(arguments: ExtendArguments) -> None:
    """Launch the kernel on checked arguments."""
    call = arguments
    codes = call.k_cache if call.k_cache is not None else call.keys
    tiles = _WIDE_TILES if codes.dtype in _NEW else _TILES
    tile = tiles[call.k_dim, call.v_dim]
    block_n, stages, consumers, consumer_registers, producer_registers = tile
    form = Form(
        group=call.group,
        dim=call.v_dim,
        tail=call.k_dim - call.v_dim,
        cached=call.k_cache is not None,
        page_size=call.page_size,
        e5m2=codes.dtype == torch.float8_e5m2,
        new="none" if call.key is None else _NEW.get(call.key.dtype, "codes"),
        k_per_head=call.k_scale.numel() > 1,
        v_per_head=call.v_scale.numel() > 1,
        causal=call.causal,
        window=call.window is not None,
        soft_cap=call.soft_cap is not None,
        sinks=call.sinks is not None,
        lse=call.lse is not None,
        block_n=block_n,
        stages=stages,
        consumers=consumers,
        consumer_registers=consumer_registers,
        producer_registers=producer_registers,
    )
    words = [None if tensor is None else tensor.view(torch.int32) for tensor in call.sources]
    absent = call.cu_seqlens
    rows = triton.cdiv(call.max_new_tokens * call.group, 64 * consumers)
    extend_kernel[rows, call.kv_heads, call.prefix_lens.shape[0]](
        call.query,
        *(absent if tensor is None else tensor for tensor in words),
        absent if call.page_table is None else call.page_table,
        call.prefix_lens,
        call.cu_seqlens,
        call.k_scale,
        call.v_scale,
        call.k_scale if call.sinks is None else call.sinks,
        call.out,
        call.k_scale if call.lse is None else call.lse,
        call.sm_scale,
        call.soft_cap or 1.0,
        call.window or 0,
        *call.strides(*words),
        form=form,
        num_warps=4,
    )


@gluon.jit
def _next_exponent(scale):
    """Return the smallest int32 e with ``2 ** e >= scale``, for a positive, finite, normal float32."""
    return ((scale.to(gl.int32, bitcast=True) + 0x7FFFFF) >> 23) - 127
