"""The reference backend gives what attention over the plain sequences gives, token by token."""

import dataclasses
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fp8kv.kernels.fp8 import FORMATS
from fp8kv.runtime.backends import AttentionOptions, reference
from fp8kv.runtime.backends.reference import ReferenceBackend
from fp8kv.runtime.batch import make_batch
from fp8kv.runtime.paged_cache import LayerCache

PAGE_SIZE = 4
NUM_PAGES = 24
BACKEND = ReferenceBackend()

# (new tokens, prefix): an empty prefix, one that ends on a page, a single token, more than a page
RAGGED = [(5, 0), (3, 8), (1, 6), (9, 3)]
DECODE = [(1, 0), (1, 8), (1, 6), (1, 3)]


def make_layer(mode, *, heads=2, k_dim=8, v_dim=6, scale=(1.0,), v_scale=None, fmt="e4m3fn"):
    """Return a layer whose pages hold stale bytes, NaN where the type has one."""
    fmt = FORMATS[fmt] if mode not in ("bf16", "float32") else None
    codes = fmt is not None and mode != "emulate"
    dtype = fmt.dtype if codes else {"float32": torch.float32}.get(mode, torch.bfloat16)

    def pages(*shape):
        return torch.full((NUM_PAGES, PAGE_SIZE, *shape), math.nan, dtype=torch.float32).to(dtype)

    k_scale = torch.tensor(scale)
    if heads is None:
        return LayerCache("a", "mla", pages(k_dim), None, k_scale, k_scale, mode, v_dim, fmt)
    second = torch.tensor(v_scale or scale)
    k, v = pages(heads, k_dim), pages(heads, v_dim)
    return LayerCache("a", "gqa", k, v, k_scale, second, mode, v_dim, fmt)


def make_batches(lengths):
    """Return a batch that writes the prefixes, if there are any, and one for the new tokens."""
    order = torch.randperm(NUM_PAGES).tolist()
    sequences = []
    for new, prefix in lengths:
        count = -(-(new + prefix) // PAGE_SIZE)
        sequences.append(([0] * new, prefix, order[:count]))
        order = order[count:]
    before = [([0] * prefix, 0, pages) for _, prefix, pages in sequences if prefix]
    batch = make_batch(sequences, PAGE_SIZE, "cpu")
    # what lies behind a sequence's last page is nobody's page
    garbage = batch.page_table.masked_fill(batch.page_table < 0, 10**6)
    batch = dataclasses.replace(batch, page_table=garbage)
    return (make_batch(before, PAGE_SIZE, "cpu") if before else None), batch


def fill(layer, lengths, key, value):
    """Write whole sequences, prefix first, and return the batch of the new tokens."""
    before, batch = make_batches(lengths)
    starts = torch.tensor([0] + [new + prefix for new, prefix in lengths]).cumsum(0).tolist()
    old = [
        i for (_, p), start in zip(lengths, starts, strict=False) for i in range(start, start + p)
    ]
    new = [i for i in range(starts[-1]) if i not in set(old)]
    if before is not None:
        BACKEND.write(layer, key[old], value[old], before)
    BACKEND.write(layer, key[new], value[new], batch)
    return batch


def expected(query, keys, values, lengths, options):
    """Attend one token and one head at a time over the sequences' own K and V."""
    rows, start, row = [], 0, 0
    group = query.shape[1] // keys.shape[1]
    for new, prefix in lengths:
        for position in range(prefix, prefix + new):
            first = 0
            if options.window is not None:
                first = max(first, position - options.window + 1)
            if options.chunk is not None:
                first = max(first, position // options.chunk * options.chunk)
            heads = []
            for head in range(query.shape[1]):
                k = keys[start + first : start + position + 1, head // group].double()
                v = values[start + first : start + position + 1, head // group].double()
                scores = k @ query[row, head].double() * options.scaling
                if options.soft_cap is not None:
                    scores = options.soft_cap * torch.tanh(scores / options.soft_cap)
                weights = scores.exp()
                sink = options.sinks[head].double().exp() if options.sinks is not None else 0
                heads.append(weights @ v / (weights.sum() + sink))
            rows.append(torch.stack(heads))
            row += 1
        start += new + prefix
    return torch.stack(rows).float()


def tokens_of(lengths):
    return sum(new + prefix for new, prefix in lengths), sum(new for new, _ in lengths)


OPTIONS = {
    "plain": AttentionOptions(0.3),
    "window": AttentionOptions(0.3, window=5),
    "soft cap": AttentionOptions(0.9, soft_cap=1.5),
    "sinks": AttentionOptions(0.3, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
    "chunk": AttentionOptions(0.3, chunk=4),
    "all": AttentionOptions(0.9, window=6, soft_cap=2.0, sinks=torch.ones(4), chunk=8),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("lengths", [RAGGED, DECODE], ids=["ragged", "decode"])
def test_attends_as_the_definition_says(options, lengths):
    total, new = tokens_of(lengths)
    key, value, query = torch.randn(total, 2, 8), torch.randn(total, 2, 6), torch.randn(new, 4, 8)
    layer = make_layer("float32")

    batch = fill(layer, lengths, key, value)

    assert batch.is_decode == (lengths is DECODE)
    found = BACKEND.attend(layer, query, batch, options)
    torch.testing.assert_close(found, expected(query, key, value, lengths, options))


@pytest.mark.parametrize("lengths", [RAGGED, DECODE], ids=["ragged", "decode"])
def test_an_mla_row_is_latent_and_rope_part_and_its_values_are_the_latent(lengths):
    total, new = tokens_of(lengths)
    latent, rope, query = torch.randn(total, 6), torch.randn(total, 3), torch.randn(new, 4, 9)
    layer = make_layer("float32", heads=None, k_dim=9, v_dim=6)

    batch = fill(layer, lengths, latent, rope)

    options = OPTIONS["plain"]
    rows = torch.cat([latent, rope], -1)[:, None]
    found = BACKEND.attend(layer, query, batch, options)
    assert found.shape == (new, 4, 6)
    torch.testing.assert_close(found, expected(query, rows, latent[:, None], lengths, options))


def quantised(values, scale, limit, dtype):
    scale = torch.tensor(scale).view(-1, 1)
    return (values / scale).clamp(-limit, limit).to(dtype).float() * scale


@pytest.mark.parametrize("mode", ["fp8", "fp8-unit", "emulate"])
@pytest.mark.parametrize("fmt", ["e4m3fn", "e5m2"])
def test_reads_codes_times_their_scales_one_for_each_head(mode, fmt):
    # saturating, in the subnormals, and K unlike V
    scales = ((2.0**-9, 4.0), (0.5, 2.0**-8)) if mode != "fp8-unit" else ((1.0,), (1.0,))
    total, new = tokens_of(RAGGED)
    key, value, query = torch.randn(total, 2, 8), torch.randn(total, 2, 6), torch.randn(new, 4, 8)
    layer = make_layer(mode, scale=scales[0], v_scale=scales[1], fmt=fmt)

    batch = fill(layer, RAGGED, key, value)

    limit, dtype = {"e4m3fn": 448.0, "e5m2": 57344.0}[fmt], FORMATS[fmt].dtype
    key = quantised(key, scales[0], limit, dtype)
    value = quantised(value, scales[1], limit, dtype)
    options = OPTIONS["plain"]
    found = BACKEND.attend(layer, query, batch, options)
    torch.testing.assert_close(found, expected(query, key, value, RAGGED, options))


def test_an_mla_row_has_one_scale():
    total, new = tokens_of(RAGGED)
    latent, rope, query = torch.randn(total, 6), torch.randn(total, 3), torch.randn(new, 4, 9)
    layer = make_layer("fp8", heads=None, k_dim=9, v_dim=6, scale=(2.0**-6,))

    batch = fill(layer, RAGGED, latent, rope)

    rows = quantised(torch.cat([latent, rope], -1), (2.0**-6,), 448.0, torch.float8_e4m3fn)[:, None]
    options = OPTIONS["plain"]
    found = BACKEND.attend(layer, query, batch, options)
    torch.testing.assert_close(found, expected(query, rows, rows[..., :6], RAGGED, options))


def test_a_bfloat16_cache_rounds_and_the_output_has_the_query_s_type():
    total, new = tokens_of(RAGGED)
    key, value = torch.randn(total, 2, 8), torch.randn(total, 2, 6)
    query = torch.randn(new, 4, 8).bfloat16()
    layer = make_layer("bf16")

    batch = fill(layer, RAGGED, key, value)

    found = BACKEND.attend(layer, query, batch, OPTIONS["plain"])
    wanted = expected(
        query, key.bfloat16().float(), value.bfloat16().float(), RAGGED, OPTIONS["plain"]
    )
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted.bfloat16())


@pytest.mark.parametrize("mode", ["float32", "fp8"])
@pytest.mark.parametrize("padded", [[0], [1, 3], [3], [0, 1, 2, 3]])
def test_padding_is_written_nowhere(mode, padded):
    layer = make_layer(mode)
    _, batch = make_batches(DECODE)
    slots = batch.slots.clone()
    slots[padded] = -1
    batch = dataclasses.replace(batch, slots=slots)
    before = layer.k.float().flatten(0, 1).nan_to_num(9.0)

    BACKEND.write(layer, torch.full((4, 2, 8), 2.0), torch.ones(4, 2, 6), batch)

    after = layer.k.float().flatten(0, 1).nan_to_num(9.0)
    written = [slot for slot in slots.tolist() if slot >= 0]
    assert (after[written] == 2.0).all()
    untouched = torch.ones(len(after), dtype=torch.bool)
    untouched[written] = False
    assert torch.equal(after[untouched], before[untouched])


def test_a_sequence_that_only_pads_the_batch_gives_zero():
    layer = make_layer("fp8")
    batch = fill(layer, DECODE, torch.randn(21, 2, 8), torch.randn(21, 2, 6))
    query = torch.randn(4, 4, 8)
    whole = BACKEND.attend(layer, query, batch, OPTIONS["plain"])
    lengths = batch.seq_lens.clone()
    lengths[2] = 0
    # a CUDA graph was captured with room for more
    wide = torch.full((4, 9), -1, dtype=torch.int32)
    wide[:, : batch.page_table.shape[1]] = batch.page_table
    padded = dataclasses.replace(batch, seq_lens=lengths, page_table=wide, max_seq_len=33)

    found = BACKEND.attend(layer, query, padded, OPTIONS["plain"])

    assert torch.equal(found[2], torch.zeros(4, 6))
    torch.testing.assert_close(found[[0, 1, 3]], whole[[0, 1, 3]])


@pytest.mark.parametrize("mode", ["fp8", "emulate", "float32"])
def test_a_decode_step_reads_nothing_back_to_the_host(mode):
    """Fake tensors have no values, so whatever looks at one stops there."""
    _, batch = make_batches(DECODE)
    with FakeTensorMode() as fake:
        tensors = {k: v for k, v in vars(batch).items() if isinstance(v, torch.Tensor)}
        batch = dataclasses.replace(
            batch, **{name: fake.from_tensor(tensor) for name, tensor in tensors.items()}
        )
        options = AttentionOptions(0.3, window=6, soft_cap=2.0, sinks=torch.ones(4), chunk=8)
        layer = make_layer(mode)
        BACKEND.write(layer, torch.randn(4, 2, 8), torch.randn(4, 2, 6), batch)
        out = BACKEND.attend(layer, torch.randn(4, 4, 8), batch, options)
        rows = make_layer(mode, heads=None, k_dim=9, v_dim=6)
        BACKEND.write(rows, torch.randn(4, 6), torch.randn(4, 3), batch)
        latents = BACKEND.attend(rows, torch.randn(4, 4, 9), batch, AttentionOptions(0.3))
    assert out.shape == (4, 4, 6)
    assert latents.shape == (4, 4, 6)


@pytest.mark.parametrize("lengths", [RAGGED, DECODE], ids=["ragged", "decode"])
def test_what_is_large_is_taken_in_pieces_without_a_difference(monkeypatch, lengths):
    total, new = tokens_of(lengths)
    key, value, query = torch.randn(total, 2, 8), torch.randn(total, 2, 6), torch.randn(new, 4, 8)
    layer = make_layer("float32")
    batch = fill(layer, lengths, key, value)
    whole = BACKEND.attend(layer, query, batch, OPTIONS["all"])
    pieces = []
    attend = reference._attend
    monkeypatch.setattr(reference, "_attend", lambda *a: (pieces.append(1), attend(*a))[1])
    # two rows of the longest prompt; three sequences of a decode step
    monkeypatch.setattr(reference, "_MOST_SCORES", 4 * 12 * 2)
    monkeypatch.setattr(reference, "_MOST_NUMBERS", 9 * 28 * 3)

    found = BACKEND.attend(layer, query, batch, OPTIONS["all"])

    torch.testing.assert_close(found, whole)
    # 5 new tokens of 5 in all, 3 of 11, 1 of 7, 9 of 12; and 4 sequences
    assert len(pieces) == (2 + 2 + 1 + 5 if lengths is RAGGED else 2)
