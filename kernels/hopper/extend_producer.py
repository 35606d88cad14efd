"""What fills the tiles of :mod:`fp8kv.kernels.hopper.extend`: one warp group that widens K and V to FP16.

Tiles are handled in the order of :func:`tile_at`. K and V of a tile wait in registers, as 32-bit words, while the tile
in front is being multiplied; the numbers of a tile's pages are read one tile earlier still. The words are widened when the
buffer is free, and stored swizzled, as wgmma reads them.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier


@gluon.jit
def tile_range(limit, offset, first_token, last_token, window, form: gl.constexpr):
    """Return which tiles of a segment some row sees, and which of them all rows see in full.

    Args:
        limit: keys of the segment.
        offset: the first new token's position, in the segment's own coordinates.
        first_token: the first row's new token.
        last_token: the last row's new token.
        window: how many positions a token sees.
        form: the constants of the kernel.

    Returns:
        (first tile, first full tile, end of the full tiles, end of the tiles).
    """
    begin = 0
    end = limit
    full_end = limit // form.block_n
    if form.causal:
        end = gl.minimum(limit, offset + last_token + 1)
        full_end = gl.minimum(limit, offset + first_token + 1) // form.block_n
    if form.window:
        begin = gl.maximum(offset + first_token - window + 1, 0)
    first = begin // form.block_n
    last = gl.maximum((end + form.block_n - 1) // form.block_n, first)
    full_begin = first
    if form.window:
        full_begin = gl.maximum(offset + last_token - window + form.block_n, 0) // form.block_n
    full_begin = gl.minimum(full_begin, last)
    full_end = gl.minimum(gl.maximum(full_end, full_begin), last)
    return first, full_begin, full_end, last


@gluon.jit
def tile_at(step, tiles):
    """Return the tile of a step: first come those that need masks, then the full ones."""
    first, full_begin, full_end, last = tiles
    left = full_begin - first
    masked = left + last - full_end
    tile = gl.where(step < left, first + step, full_end + step - left)
    return gl.where(step < masked, tile, full_begin + step - masked)


@gluon.jit
def produce(source, segments, tiles, ready, form: gl.constexpr):
    """Fill the ring of K and V tiles, the prefix first, then the new tokens."""
    (k_cache, v_cache, table, k_page, k_token, v_page, v_token,
     key, value, new_k_token, new_v_token, k_factor, v_factor) = source  # fmt: skip
    cache_tiles, cache_limit, new_tiles, new_limit = segments
    k_tile, k_tail, v_tile = tiles
    # The swizzle works on bytes, so a tile of 16-bit numbers is as well one of pairs.
    words: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
    shape: gl.constexpr = [form.stages, form.block_n, form.dim // 2]
    tail_shape: gl.constexpr = [form.stages, form.block_n, form.tail // 2]
    k_words = k_tile._reinterpret(gl.int32, shape, words)
    v_words = v_tile._reinterpret(gl.int32, shape, words)
    tail_words = k_words
    if form.tail:
        tail_words = k_tail._reinterpret(gl.int32, tail_shape, words)
    buffers = (k_words, tail_words, v_words)
    PAGE_SIZE: gl.constexpr = form.page_size
    count = 0
    if form.cached:
        count = _fill_codes(
            count, cache_tiles, cache_limit, k_cache, v_cache, table, k_page, k_token, v_page, v_token,
            buffers, ready, PAGE_SIZE, form,
        )  # fmt: skip
    if form.new == "codes":
        count = _fill_codes(
            count, new_tiles, new_limit, key, value, table, 0, new_k_token, 0, new_v_token,
            buffers, ready, 0, form,
        )  # fmt: skip
    elif form.new != "none":
        count = _fill_wide(
            count, new_tiles, new_limit, key, value, new_k_token, new_v_token, k_factor, v_factor,
            buffers, ready, form,
        )  # fmt: skip


@gluon.jit
def _fill_codes(
    count, tiles, limit, keys, values, table, k_page, k_token, v_page, v_token, buffers, ready,
    PAGE_SIZE: gl.constexpr, form: gl.constexpr,
):  # fmt: skip
    """Fill the tiles of a segment of FP8 codes; PAGE_SIZE 0 means: not paged."""
    k_words, tail_words, v_words = buffers
    k_full, k_empty, v_full, v_empty = ready
    # Each lane's 16 bytes become 32, stored in two halves. So that 8 lanes, which store together, meet no bank twice, they sit
    # in two rows; the swizzle keeps even and odd rows apart.
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0])
    width: gl.constexpr = form.dim // 4
    tail_width: gl.constexpr = form.tail // 4
    row = gl.arange(0, form.block_n, gl.SliceLayout(1, layout))
    steps = tiles[3] - tiles[0]
    page = row
    if PAGE_SIZE:
        page = _pages(table, 0, steps, tiles, row, limit, PAGE_SIZE, form)
    column = tile_at(0, tiles) * form.block_n + row
    inside = column < gl.where(steps > 0, limit, 0)
    rows = _rows(page, column, k_page, k_token, PAGE_SIZE)
    key = _load(keys, rows, inside, width, layout)
    tail = key
    if form.tail:
        tail = _load(keys + width, rows, inside, tail_width, layout)
    value = _load(values, _rows(page, column, v_page, v_token, PAGE_SIZE), inside, width, layout)
    if PAGE_SIZE:
        page = _pages(table, 1, steps, tiles, row, limit, PAGE_SIZE, form)
    for step in range(steps):
        stage = count % form.stages
        phase = (count // form.stages) & 1
        following = page
        if PAGE_SIZE:
            following = _pages(table, step + 2, steps, tiles, row, limit, PAGE_SIZE, form)
        column = tile_at(step + 1, tiles) * form.block_n + row
        inside = column < gl.where(step + 1 < steps, limit, 0)
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        k_words.index(stage).store(_widen(key, form))
        rows = _rows(page, column, k_page, k_token, PAGE_SIZE)
        key = _load(keys, rows, inside, width, layout)
        if form.tail:
            tail_words.index(stage).store(_widen(tail, form))
            tail = _load(keys + width, rows, inside, tail_width, layout)
        # A proxy fence would wait for the loads in flight; the consumers have it instead, behind the barrier.
        mbarrier.arrive(k_full.index(stage), count=1)
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
        v_words.index(stage).store(_widen(value, form))
        rows = _rows(page, column, v_page, v_token, PAGE_SIZE)
        value = _load(values, rows, inside, width, layout)
        mbarrier.arrive(v_full.index(stage), count=1)
        page = following
        count += 1
    return count


@gluon.jit
def _fill_wide(
    count, tiles, limit, keys, values, k_token, v_token, k_factor, v_factor, buffers, ready,
    form: gl.constexpr,
):  # fmt: skip
    """Fill the tiles of a segment of BF16 or FP16 numbers, by halves: these are twice the bytes for the registers."""
    k_words, tail_words, v_words = buffers
    k_full, k_empty, v_full, v_empty = ready
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [4, 1], [1, 0])
    width: gl.constexpr = form.dim // 2
    tail_width: gl.constexpr = form.tail // 2
    half: gl.constexpr = form.block_n // 2
    row = gl.arange(0, half, gl.SliceLayout(1, layout))
    steps = tiles[3] - tiles[0]
    low = tile_at(0, tiles) * form.block_n + row
    high = low + half
    end = gl.where(steps > 0, limit, 0)
    low_words = _load(keys, low.to(gl.int64) * k_token, low < end, width, layout)
    high_words = _load(keys, high.to(gl.int64) * k_token, high < end, width, layout)
    for step in range(steps):
        stage = count % form.stages
        phase = (count // form.stages) & 1
        low = tile_at(step, tiles) * form.block_n + row
        high = low + half
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        k_words.index(stage).slice(0, half).store(_rescale(low_words, k_factor, form))
        low_words = _load(values, low.to(gl.int64) * v_token, low < limit, width, layout)
        k_words.index(stage).slice(half, half).store(_rescale(high_words, k_factor, form))
        if form.tail:
            tail = _load(keys + width, low.to(gl.int64) * k_token, low < limit, tail_width, layout)
            tail_words.index(stage).slice(0, half).store(_rescale(tail, k_factor, form))
            tail = _load(
                keys + width, high.to(gl.int64) * k_token, high < limit, tail_width, layout
            )
            tail_words.index(stage).slice(half, half).store(_rescale(tail, k_factor, form))
        high_words = _load(values, high.to(gl.int64) * v_token, high < limit, width, layout)
        mbarrier.arrive(k_full.index(stage), count=1)
        low = tile_at(step + 1, tiles) * form.block_n + row
        high = low + half
        end = gl.where(step + 1 < steps, limit, 0)
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
        v_words.index(stage).slice(0, half).store(_rescale(low_words, v_factor, form))
        low_words = _load(keys, low.to(gl.int64) * k_token, low < end, width, layout)
        v_words.index(stage).slice(half, half).store(_rescale(high_words, v_factor, form))
        high_words = _load(keys, high.to(gl.int64) * k_token, high < end, width, layout)
        mbarrier.arrive(v_full.index(stage), count=1)
        count += 1
    return count


@gluon.jit
def _pages(table, step, steps, tiles, row, limit, PAGE_SIZE: gl.constexpr, form: gl.constexpr):
    column = tile_at(step, tiles) * form.block_n + row
    inside = column < gl.where(step < steps, limit, 0)
    return gl.load(table + column // PAGE_SIZE, mask=inside, other=0)


@gluon.jit
def _rows(page, column, page_stride, token_stride, PAGE_SIZE: gl.constexpr):
    if PAGE_SIZE:
        return page.to(gl.int64) * page_stride + (column % PAGE_SIZE) * token_stride
    else:
        return column.to(gl.int64) * token_stride


@gluon.jit
def _load(base, rows, inside, WIDTH: gl.constexpr, layout: gl.constexpr):
    # Behind the last token stale bytes may be NaN, and 0 * NaN is NaN: they become 0.
    columns = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    return gl.load(base + rows[:, None] + columns[None, :], mask=inside[:, None], other=0)


@gluon.jit
def _widen(words, form: gl.constexpr):
    """Return pairs of FP16 numbers, [rows, 2 * words], from words of four FP8 codes; exact."""
    if form.e5m2:
        low, high = gl.inline_asm_elementwise(
            """{ .reg .b16 a, b; mov.b32 {a, b}, $2;
            cvt.rn.f16x2.e5m2x2 $0, a; cvt.rn.f16x2.e5m2x2 $1, b; }""",
            "=r,=r,r", [words], dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        low, high = gl.inline_asm_elementwise(
            """{ .reg .b16 a, b; mov.b32 {a, b}, $2;
            cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b; }""",
            "=r,=r,r", [words], dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    return gl.join(low, high).reshape([words.shape[0], 2 * words.shape[1]])


@gluon.jit
def _rescale(words, factor, form: gl.constexpr):
    """Return ``factor``, a power of two, times pairs of BF16 or FP16 numbers, as pairs of FP16; saturating."""
    if form.new == "bf16":
        return gl.inline_asm_elementwise(
            """{ .reg .b32 t; .reg .f32 a, b; shl.b32 t, $1, 16; mov.b32 a, t;
            and.b32 t, $1, 0xffff0000; mov.b32 b, t; mul.f32 a, a, $2; mul.f32 b, b, $2;
            cvt.rn.satfinite.f16x2.f32 $0, b, a; }""",
            "=r,r,f", [words, factor], dtype=gl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            """{ .reg .b16 c, d; .reg .f32 a, b; mov.b32 {c, d}, $1; cvt.f32.f16 a, c;
            cvt.f32.f16 b, d; mul.f32 a, a, $2; mul.f32 b, b, $2;
            cvt.rn.satfinite.f16x2.f32 $0, b, a; }""",
            "=r,r,f", [words, factor], dtype=gl.int32, is_pure=True, pack=1,
        )  # fmt: skip
