"""The Triton backend gives what the reference backend gives, and hands it what it has no kernel for.

Without a GPU the kernels run in Triton's interpreter, on float16, whose arithmetic is right there.
"""

import dataclasses

import pytest
import torch

from fp8kv.kernels.fp8 import FORMATS
from fp8kv.runtime.backends import AttentionOptions
from fp8kv.runtime.backends.reference import ReferenceBackend
from fp8kv.runtime.backends.triton import TritonBackend, has_kernel
from fp8kv.runtime.batch import make_batch
from fp8kv.runtime.paged_cache import LayerCache

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE_SIZE = 16
NUM_PAGES = 12
REFERENCE, TRITON = ReferenceBackend(), TritonBackend()

RAGGED = [(5, 0), (3, 16), (1, 20), (18, 3)]
DECODE = [(1, 0), (1, 16), (1, 20), (1, 3)]


def make_layer(mode="fp8", *, heads=2, k_dim=32, v_dim=16, scales=((0.25, 0.5), (2.0, 0.125))):
    """Return a layer whose pages hold 0x7F, the code of NaN, or random values where they hold none."""
    fmt = FORMATS["e4m3fn"] if mode in ("fp8", "fp8-unit", "emulate") else None
    k_scale, v_scale = (torch.tensor(scale, device=DEVICE) for scale in scales)

    def pages(*shape):
        shape = (NUM_PAGES, PAGE_SIZE, *shape)
        if mode in ("fp8", "fp8-unit"):
            stale = torch.full(shape, 0x7F, dtype=torch.uint8, device=DEVICE)
            return stale.view(torch.float8_e4m3fn)
        return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)

    if heads is None:
        return LayerCache("a", "mla", pages(k_dim), None, k_scale, k_scale, mode, v_dim, fmt)
    k, v = pages(heads, k_dim), pages(heads, v_dim)
    return LayerCache("a", "gqa", k, v, k_scale, v_scale, mode, v_dim, fmt)


def make_mla_layer(mode="fp8"):
    return make_layer(mode, heads=None, k_dim=576, v_dim=512, scales=((0.25,), (0.25,)))


def make_batches(lengths):
    """Return a batch of whole sequences, to fill the cache with, and one of their new tokens."""
    order, sequences = torch.randperm(NUM_PAGES).tolist(), []
    for new, prefix in lengths:
        count = -(-(new + prefix) // PAGE_SIZE)
        sequences.append((new, prefix, order[:count]))
        order = order[count:]
    whole = make_batch([([0] * (n + p), 0, pages) for n, p, pages in sequences], PAGE_SIZE, DEVICE)
    batch = make_batch([([0] * n, p, pages) for n, p, pages in sequences], PAGE_SIZE, DEVICE)
    return whole, batch


def randn(*shape):
    return torch.randn(shape, device=DEVICE).half()


def filled(layer, lengths):
    """Fill the layer by the reference backend and return the batch of the new tokens."""
    whole, batch = make_batches(lengths)
    tokens = whole.num_tokens
    if layer.v is None:
        REFERENCE.write(layer, randn(tokens, 512), randn(tokens, 64), whole)
    else:
        shapes = [(tokens, *cache.shape[2:]) for cache in (layer.k, layer.v)]
        REFERENCE.write(layer, randn(*shapes[0]), randn(*shapes[1]), whole)
    return batch


OPTIONS = {
    "plain": AttentionOptions(0.2),
    "window": AttentionOptions(0.2, window=7),
    "soft cap": AttentionOptions(0.5, soft_cap=2.0),
    "sinks": AttentionOptions(0.2, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0], device=DEVICE)),
}


def relative_error(found, wanted):
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("lengths", [RAGGED, DECODE], ids=["ragged", "decode"])
def test_attends_as_the_reference_does(options, lengths):
    layer = make_layer()
    batch = filled(layer, lengths)
    query = randn(batch.num_tokens, 4, 32)

    found = TRITON.attend(layer, query, batch, options)

    assert has_kernel(layer, query, options)
    assert found.shape == (batch.num_tokens, 4, 16)
    assert found.dtype == query.dtype
    assert relative_error(found, REFERENCE.attend(layer, query.float(), batch, options)) < 1e-3


@pytest.mark.parametrize("lengths", [RAGGED[1:], DECODE], ids=["ragged", "decode"])
def test_attends_over_latent_rows_as_the_reference_does(lengths):
    layer = make_mla_layer()
    batch = filled(layer, lengths)
    query, options = randn(batch.num_tokens, 4, 576), AttentionOptions(0.05)

    found = TRITON.attend(layer, query, batch, options)

    assert has_kernel(layer, query, options)
    assert found.shape == (batch.num_tokens, 4, 512)
    assert relative_error(found, REFERENCE.attend(layer, query.float(), batch, options)) < 1e-3


def test_padding_in_a_prefill_of_latent_rows_gives_zero():
    layer = make_mla_layer()
    batch = filled(layer, [(3, 16), (4, 2)])
    slots = batch.slots.clone()
    slots[[1, 6]] = -1
    query = randn(7, 4, 576)

    padded = dataclasses.replace(batch, slots=slots)
    found = TRITON.attend(layer, query, padded, AttentionOptions(0.05))

    assert (found[[1, 6]] == 0).all()
    whole = TRITON.attend(layer, query, batch, AttentionOptions(0.05))
    kept = [0, 2, 3, 4, 5]
    assert torch.equal(found[kept], whole[kept])


@pytest.mark.parametrize("make", [make_layer, make_mla_layer])
def test_writes_the_reference_s_codes_and_nothing_else(make):
    ours, theirs = make(), make()
    whole, _ = make_batches(RAGGED)
    slots = whole.slots.clone()
    slots[[0, 7]] = -1
    batch = dataclasses.replace(whole, slots=slots)
    if ours.v is None:
        key, value = randn(whole.num_tokens, 512), randn(whole.num_tokens, 64)
    else:
        # the views that a model's attention hands over: heads and tokens swapped
        key, value = (randn(2, whole.num_tokens, dim).transpose(0, 1) for dim in (32, 16))

    TRITON.write(ours, key, value, batch)
    REFERENCE.write(theirs, key, value, batch)

    pairs = [(ours.k, theirs.k), (ours.v, theirs.v)]
    for found, wanted in pairs[: 1 if ours.v is None else 2]:
        assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("mode", ["bf16", "emulate"])
@pytest.mark.parametrize("make", [make_layer, make_mla_layer])
def test_caches_without_codes_are_the_reference_s(mode, make):
    layer = make(mode)
    whole, batch = make_batches(RAGGED)
    tokens = whole.num_tokens
    shapes = (
        [(tokens, 512), (tokens, 64)] if layer.v is None else [(tokens, 2, 32), (tokens, 2, 16)]
    )
    key, value = randn(*shapes[0]), randn(*shapes[1])

    TRITON.write(layer, key, value, whole)
    query = randn(batch.num_tokens, 4, layer.k.shape[-1])
    found = TRITON.attend(layer, query, batch, OPTIONS["plain"])

    before = layer.k.clone()
    REFERENCE.write(layer, key, value, whole)
    assert torch.equal(layer.k, before)
    assert torch.equal(found, REFERENCE.attend(layer, query, batch, OPTIONS["plain"]))


@pytest.mark.parametrize(
    ("layer", "dtype", "options", "expected"),
    [
        ({}, torch.bfloat16, AttentionOptions(1.0), True),
        ({"v_dim": 256}, torch.float16, AttentionOptions(1.0, window=3, soft_cap=1.0), True),
        ({}, torch.float32, AttentionOptions(1.0), False),
        ({}, torch.bfloat16, AttentionOptions(1.0, chunk=8), False),
        ({"k_dim": 24}, torch.bfloat16, AttentionOptions(1.0), False),
        ({"v_dim": 272}, torch.bfloat16, AttentionOptions(1.0), False),
        ({"mode": "bf16"}, torch.bfloat16, AttentionOptions(1.0), False),
        ({"heads": None, "k_dim": 32, "v_dim": 24}, torch.bfloat16, AttentionOptions(1.0), False),
        (None, torch.bfloat16, AttentionOptions(1.0), True),
        (None, torch.bfloat16, AttentionOptions(1.0, window=8), False),
        (None, torch.bfloat16, AttentionOptions(1.0, soft_cap=8.0), False),
        (None, torch.bfloat16, AttentionOptions(1.0, sinks=torch.zeros(4)), False),
    ],
)
def test_a_kernel_is_taken_where_there_is_one(layer, dtype, options, expected):
    cache = make_mla_layer() if layer is None else make_layer(**layer)
    query = torch.empty(1, 4, cache.k.shape[-1], dtype=dtype)
    assert has_kernel(cache, query, options) == expected


def test_what_has_no_kernel_still_attends():
    layer = make_layer(k_dim=24, v_dim=8)
    batch = filled(layer, RAGGED)
    query = randn(batch.num_tokens, 4, 24)
    options = AttentionOptions(0.3, chunk=8)
    found = TRITON.attend(layer, query, batch, options)
    assert torch.equal(found, REFERENCE.attend(layer, query, batch, options))


@pytest.mark.gpu
@pytest.mark.parametrize("make", [make_layer, make_mla_layer])
@pytest.mark.parametrize("backend", [REFERENCE, TRITON], ids=["reference", "triton"])
def test_a_captured_decode_step_follows_its_batch(backend, make):
    layer, options = make(), AttentionOptions(0.1)
    batch = dataclasses.replace(filled(layer, DECODE), max_seq_len=64)
    shapes = ((4, 512), (4, 64)) if layer.v is None else ((4, 2, 32), (4, 2, 16))
    key, value, query = randn(*shapes[0]), randn(*shapes[1]), randn(4, 4, layer.k.shape[-1])

    def step():
        backend.write(layer, key, value, batch)
        return backend.attend(layer, query, batch, options)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for tensor in (key, value, query):
        tensor.normal_()
    batch.seq_lens[2] = 0
    batch.slots[2] = -1
    layer.k_scale.mul_(0.5)
    graph.replay()
    assert (out[2] == 0).all()
    assert relative_error(out, step()) < 1e-3
