"""The kernel of :mod:`fp8kv.kernels.rope_cache_write`, and what is known of a launch when it is compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from fp8kv.kernels.arguments import require
from fp8kv.kernels.quantize import invert, to_codes

# Elements of a thread, and threads of a program.
VECTOR = 16
VECTORS = 128
# Threads are counted in int32, those that the last programs leave idle included.
_MOST_VECTORS = 2**31 - 5 * VECTORS


class Side(NamedTuple):
    """Q, K or V as the kernel sees it, strides in elements; Q has neither a scale nor pages."""

    source: Tensor
    out: Tensor
    scale: Tensor | None
    source_token: int
    source_head: int
    out_page: int
    out_token: int
    out_head: int


@dataclass(frozen=True)
class Form:
    """What is known when the kernel is compiled.

    Attributes:
        interleaved: the elements of a rotary pair are neighbours.
        half: rotary pairs of a head.
        pairs: how many of them a thread takes, a power of two.
        rest: columns of a head of Q or K that are not rotated.
        rest_vector: how many of them a thread takes.
        v_dim: columns of a head of V.
        v_vector: how many of them a thread takes.
        q_heads: heads of Q.
        kv_heads: heads of K and V.
        page_size: tokens of a page.
        k_per_head: whether each head of K has a scale of its own.
        v_per_head: the same for V.
        vectors: threads of a program.
    """

    interleaved: bool
    half: int
    pairs: int
    rest: int
    rest_vector: int
    v_dim: int
    v_vector: int
    q_heads: int
    kv_heads: int
    page_size: int
    k_per_head: bool
    v_per_head: bool
    vectors: int

    def programs(self, tokens: int) -> int:
        """Return how many programs so many tokens take.

        Raises:
            KernelArgumentError: they have more threads than an int32 counts.
        """
        rope, rest = self.half // self.pairs, self.rest // self.rest_vector
        parts = [self.kv_heads * (self.v_dim // self.v_vector)]
        parts += [heads * part for heads in (self.kv_heads, self.q_heads) for part in (rope, rest)]
        threads = tokens * sum(parts)
        require(threads < _MOST_VECTORS, "the vectors of query", threads, f"below {_MOST_VECTORS}")
        return sum(triton.cdiv(tokens * part, self.vectors) for part in parts)


@triton.jit
def _targets(side, slots, token, head, exists, PAGED: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Return where the rows of the output begin, and which of them are written."""
    if PAGED:
        slot = tl.load(slots + token, mask=exists, other=-1).to(tl.int64)
        row = slot // PAGE_SIZE * side.out_page + slot % PAGE_SIZE * side.out_token
        exists = slot >= 0
    else:
        row = token * side.out_token
    return (side.out + row + head * side.out_head)[:, None], exists[:, None]


@triton.jit
def _inverse(side, head, PER_HEAD: tl.constexpr):
    if PER_HEAD:
        scale = tl.load(side.scale + head)[:, None]
    else:
        scale = tl.load(side.scale)
    return invert(scale)


@triton.jit
def _rotate(
    side,
    cos_sin,
    slots,
    tokens,
    block,
    HEADS: tl.constexpr,
    CACHED: tl.constexpr,
    PER_HEAD: tl.constexpr,
    FORM: tl.constexpr,
    CAST: tl.constexpr,
):
    """Rotate one program's vectors of Q, or of K, which are ``CACHED``."""
    head_vectors: tl.constexpr = FORM.half // FORM.pairs
    vector = block * FORM.vectors + tl.arange(0, FORM.vectors)
    token = (vector // (HEADS * head_vectors)).to(tl.int64)
    head = vector // head_vectors % HEADS
    exists = token < tokens
    first = (vector % head_vectors * FORM.pairs)[:, None]
    pair = first + tl.arange(0, FORM.pairs)[None, :]
    both = 2 * first + tl.arange(0, 2 * FORM.pairs)[None, :]
    source = (side.source + token * side.source_token + head * side.source_head)[:, None]
    # Loads are issued in program order, and nothing that is computed waits for the slot.
    out, written = _targets(side, slots, token, head, exists, CACHED, FORM.page_size)
    if FORM.interleaved:
        values = tl.load(source + both, mask=exists[:, None])
        a, b = tl.split(tl.reshape(values, (FORM.vectors, FORM.pairs, 2)))
    else:
        a = tl.load(source + pair, mask=exists[:, None])
        b = tl.load(source + FORM.half + pair, mask=exists[:, None])
    cosines, sines, cos_token, sin_token = cos_sin
    cos = tl.load(cosines + (token * cos_token)[:, None] + pair, mask=exists[:, None])
    sin = tl.load(sines + (token * sin_token)[:, None] + pair, mask=exists[:, None])
    dtype: tl.constexpr = a.dtype
    a, b, cos, sin = a.to(tl.float32), b.to(tl.float32), cos.to(tl.float32), sin.to(tl.float32)
    a, b = (a * cos - b * sin).to(dtype), (b * cos + a * sin).to(dtype)
    if CACHED and CAST is not None:
        inverse = _inverse(side, head, PER_HEAD)
        a, b = to_codes(a, inverse, CAST), to_codes(b, inverse, CAST)
    if FORM.interleaved:
        joined = tl.reshape(tl.join(a, b), (FORM.vectors, 2 * FORM.pairs))
        tl.store(out + both, joined, mask=written)
    else:
        tl.store(out + pair, a, mask=written)
        tl.store(out + FORM.half + pair, b, mask=written)


@triton.jit
def _pass_on(
    side,
    slots,
    tokens,
    block,
    HEADS: tl.constexpr,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    CACHED: tl.constexpr,
    PER_HEAD: tl.constexpr,
    FORM: tl.constexpr,
    CAST: tl.constexpr,
):
    """Copy one program's vectors, of ``WIDTH`` columns of a head from ``START`` on."""
    head_vectors: tl.constexpr = WIDTH // VECTOR
    vector = block * FORM.vectors + tl.arange(0, FORM.vectors)
    token = (vector // (HEADS * head_vectors)).to(tl.int64)
    head = vector // head_vectors % HEADS
    exists = token < tokens
    column = (START + vector % head_vectors * VECTOR)[:, None] + tl.arange(0, VECTOR)[None, :]
    source = (side.source + token * side.source_token + head * side.source_head)[:, None]
    out, written = _targets(side, slots, token, head, exists, CACHED, FORM.page_size)
    values = tl.load(source + column, mask=exists[:, None])
    if CACHED and CAST is not None:
        values = to_codes(values, _inverse(side, head, PER_HEAD), CAST)
    tl.store(out + column, values, mask=written)


@triton.jit(do_not_specialize=["tokens"])
def rotate_and_write(
    query,
    key,
    value,
    cos_sin,
    slots,
    tokens,
    PDL: tl.constexpr,
    FORM: tl.constexpr,
    CAST: tl.constexpr,
) -> None:
    """Rotate and write; the arguments are those of ``rope_cache_write``, ``CAST`` is a CastPlan or None."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    rope: tl.constexpr = FORM.half // FORM.pairs
    rest: tl.constexpr = FORM.rest // FORM.rest_vector
    columns: tl.constexpr = 2 * FORM.half
    block = tl.program_id(0)
    # the first program behind each stretch; K and V go first, because their stores wait for a slot
    v_end = tl.cdiv(tokens * (FORM.kv_heads * (FORM.v_dim // FORM.v_vector)), FORM.vectors)
    k_end = v_end + tl.cdiv(tokens * (FORM.kv_heads * rope), FORM.vectors)
    q_end = k_end + tl.cdiv(tokens * (FORM.q_heads * rope), FORM.vectors)
    k_rest_end = q_end + tl.cdiv(tokens * (FORM.kv_heads * rest), FORM.vectors)
    if block < v_end:
        _pass_on(
            value, slots, tokens, block,
            FORM.kv_heads, 0, FORM.v_dim, FORM.v_vector, True, FORM.v_per_head, FORM, CAST,
        )  # fmt: skip
    elif block < k_end:
        _rotate(
            key, cos_sin, slots, tokens, block - v_end,
            FORM.kv_heads, True, FORM.k_per_head, FORM, CAST,
        )  # fmt: skip
    elif block < q_end:
        _rotate(
            query, cos_sin, slots, tokens, block - k_end,
            FORM.q_heads, False, False, FORM, CAST,
        )  # fmt: skip
    elif FORM.rest > 0:
        if block < k_rest_end:
            _pass_on(
                key, slots, tokens, block - q_end,
                FORM.kv_heads, columns, FORM.rest, FORM.rest_vector, True, FORM.k_per_head, FORM, CAST,
            )  # fmt: skip
        else:
            _pass_on(
                query, slots, tokens, block - k_rest_end,
                FORM.q_heads, columns, FORM.rest, FORM.rest_vector, False, False, FORM, CAST,
            )  # fmt: skip
