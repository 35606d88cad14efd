"""MLA by kernels gives what absorbed attention by the reference gives, whichever way new tokens take.

Without a GPU the kernels run in Triton's interpreter, on float16, whose arithmetic is right there.
"""

import math

import pytest
import torch

from fp8kv.kernels.fp8 import FORMATS
from fp8kv.runtime.backends import AttendsLatents, AttentionOptions, triton_mla
from fp8kv.runtime.backends.reference import ReferenceBackend
from fp8kv.runtime.backends.triton import TritonBackend
from fp8kv.runtime.batch import make_batch
from fp8kv.runtime.latent_projection import LatentProjection
from fp8kv.runtime.paged_cache import LayerCache

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE_SIZE, NUM_PAGES = 16, 24
HEADS, NOPE, ROPE, V_DIM, LATENT = 4, 32, 64, 64, 512
REFERENCE, TRITON = ReferenceBackend(), TritonBackend()
OPTIONS = AttentionOptions(0.05)

FRESH = [(18, 0), (1, 0), (5, 0)]
# one continues a prompt, one starts, one is a chunk of a single token
CHUNKS = [(17, 20), (20, 0), (1, 3)]
MIXED = [(1, 20), (1, 3), *CHUNKS]


def randn(*shape, scale=1.0):
    return (torch.randn(shape, device=DEVICE) * scale).half()


def make_layer(mode="fp8"):
    """Return a layer whose pages hold NaN."""
    scale = torch.tensor([1 / 64], device=DEVICE)
    shape = (NUM_PAGES, PAGE_SIZE, LATENT + ROPE)
    fmt = FORMATS["e4m3fn"] if mode != "bf16" else None
    if mode == "fp8":
        stale = torch.full(shape, 0x7F, dtype=torch.uint8, device=DEVICE)
        pages = stale.view(torch.float8_e4m3fn)
    else:
        pages = torch.full(shape, math.nan, device=DEVICE).half()
    return LayerCache("a", "mla", pages, None, scale, scale, mode, LATENT, fmt)


@pytest.fixture
def projection():
    # so small that the heads' K and V are about as large as the latents
    return LatentProjection(randn(HEADS, NOPE + V_DIM, LATENT, scale=LATENT**-0.5), NOPE)


def filled(layer, lengths):
    """Fill the layer by the reference backend and return the batch of the new tokens."""
    order, sequences = torch.randperm(NUM_PAGES).tolist(), []
    for new, prefix in lengths:
        count = -(-(new + prefix) // PAGE_SIZE)
        sequences.append((new, prefix, order[:count]))
        order = order[count:]
    whole = make_batch([([0] * (n + p), 0, pages) for n, p, pages in sequences], PAGE_SIZE, DEVICE)
    tokens = whole.num_tokens
    REFERENCE.write(layer, randn(tokens, LATENT), randn(tokens, ROPE), whole)
    return make_batch([([0] * n, p, pages) for n, p, pages in sequences], PAGE_SIZE, DEVICE)


def expected(layer, query, batch, projection, *new):
    exact = LatentProjection(projection.weight.float(), NOPE)
    latents = REFERENCE.attend(layer, exact.absorb(query.float()), batch, OPTIONS, *new)
    return exact.to_values(latents)


def relative_error(found, wanted):
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


@pytest.fixture(params=["absorbed", "expanded"])
def way(request, monkeypatch):
    """Have few and many new tokens go the same way; say whether they did."""
    expanded = []
    monkeypatch.setattr(triton_mla, "_expands", lambda *_: request.param == "expanded")
    extend = triton_mla.extend
    monkeypatch.setattr(triton_mla, "extend", lambda *a, **k: (expanded.append(1), extend(*a, **k)))
    yield request.param
    assert bool(expanded) == (request.param == "expanded")


@pytest.mark.parametrize("lengths", [FRESH, CHUNKS, MIXED], ids=["fresh", "chunks", "mixed"])
def test_new_tokens_read_from_the_cache(lengths, way, projection):
    layer = make_layer()
    batch = filled(layer, lengths)
    query = randn(batch.num_tokens, HEADS, NOPE + ROPE)

    found = TRITON.attend_latents(layer, query, batch, OPTIONS, projection)

    assert isinstance(TRITON, AttendsLatents)
    assert found.shape == (batch.num_tokens, HEADS, V_DIM)
    assert found.dtype == query.dtype
    # float16 of the query in the latent space or of the expanded K: 2**-11 each
    assert relative_error(found, expected(layer, query, batch, projection)) < 2e-3


@pytest.mark.parametrize("lengths", [FRESH, CHUNKS, MIXED], ids=["fresh", "chunks", "mixed"])
def test_new_tokens_as_they_were_computed(lengths, projection):
    layer = make_layer()
    batch = filled(layer, lengths)
    query = randn(batch.num_tokens, HEADS, NOPE + ROPE)
    new = randn(batch.num_tokens, LATENT), randn(batch.num_tokens, ROPE)

    found = TRITON.attend_latents(layer, query, batch, OPTIONS, projection, *new)

    wanted = expected(layer, query, batch, projection, *new)
    assert relative_error(found, wanted) < 2e-3
    assert relative_error(wanted, expected(layer, query, batch, projection)) > 0.1


def test_a_decode_step_runs_absorbed(projection, monkeypatch):
    layer = make_layer()
    batch = filled(layer, [(1, 20), (1, 0), (1, 40)])
    query = randn(3, HEADS, NOPE + ROPE)
    monkeypatch.setattr(triton_mla, "extend", None)
    for new in ((), (randn(3, LATENT), randn(3, ROPE))):
        found = TRITON.attend_latents(layer, query, batch, OPTIONS, projection, *new)
        assert relative_error(found, expected(layer, query, batch, projection)) < 2e-3


def test_many_heads_are_expanded_in_groups(projection, monkeypatch):
    layer = make_layer()
    batch = filled(layer, CHUNKS)
    query = randn(batch.num_tokens, HEADS, NOPE + ROPE)
    monkeypatch.setattr(triton_mla, "_expands", lambda *_: True)
    calls, extend = [], triton_mla.extend
    monkeypatch.setattr(
        triton_mla, "extend", lambda q, *a, **k: (calls.append(q.shape[1]), extend(q, *a, **k))
    )
    whole = TRITON.attend_latents(layer, query, batch, OPTIONS, projection)
    # 38 new rows and 3 * 32 of prefixes, of 32 + 64 + 96 numbers of two bytes
    monkeypatch.setattr(triton_mla, "_MOST_EXPANDED", 3 * (38 + 96) * 192 * 2)
    found = TRITON.attend_latents(layer, query, batch, OPTIONS, projection)
    assert torch.equal(found, whole)
    monkeypatch.setattr(triton_mla, "_MOST_EXPANDED", 1)
    TRITON.attend_latents(layer, query, batch, OPTIONS, projection)
    assert calls == [4, 3, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("lengths", "expands"),
    [
        ([(32, 0)], False),
        ([(33, 0)], True),
        # each new token saves 768 products for each token that it sees, and one of the prefix costs twice 131072
        ([(328, 4096)], False),
        ([(329, 4096)], True),
        ([(100, 4096), (556, 4096)], False),
        ([(100, 4096), (558, 4096)], True),
        # the others that are new count, too
        ([(154, 64)], False),
        ([(155, 64)], True),
    ],
)
def test_rows_are_expanded_where_that_pays(lengths, expands):
    deepseek = LatentProjection(torch.empty(2, 256, LATENT), 128)
    sequences = [([0] * new, prefix, list(range(80))) for new, prefix in lengths]
    batch = make_batch(sequences, 64, DEVICE)
    assert triton_mla._expands(batch, deepseek, LATENT + ROPE) == expands


def test_what_decodes_beside_a_prompt_has_no_part_in_the_choice(projection, monkeypatch):
    layer = make_layer()
    batch = filled(layer, [(1, 60), (40, 0)])
    prefixes = []
    monkeypatch.setattr(
        triton_mla, "_expands", lambda part, *_: prefixes.append(part.max_prefix_len) or True
    )
    query = randn(batch.num_tokens, HEADS, NOPE + ROPE)
    found = TRITON.attend_latents(layer, query, batch, OPTIONS, projection)
    assert prefixes == [0]
    assert relative_error(found, expected(layer, query, batch, projection)) < 2e-3


@pytest.mark.parametrize("mode", ["bf16", "emulate"])
def test_caches_of_numbers_are_expanded_as_they_are(mode, projection, monkeypatch):
    layer = make_layer(mode)
    batch = filled(layer, MIXED)
    monkeypatch.setattr(triton_mla, "_expands", lambda *_: True)
    query = randn(batch.num_tokens, HEADS, NOPE + ROPE)
    found = TRITON.attend_latents(layer, query, batch, OPTIONS, projection)
    assert relative_error(found, expected(layer, query, batch, projection)) < 2e-3


def test_what_has_no_kernel_is_the_reference_s(projection):
    layer = make_layer()
    batch = filled(layer, CHUNKS)
    query = torch.randn(batch.num_tokens, HEADS, NOPE + ROPE, device=DEVICE)
    exact = LatentProjection(projection.weight.float(), NOPE)
    found = TRITON.attend_latents(layer, query, batch, OPTIONS, exact)
    assert torch.equal(found, expected(layer, query, batch, projection))
