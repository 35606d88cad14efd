"""The Triton backend gives what the reference backend gives, and hands it what it has no kernel for.

Without a GPU the kernels run in Triton's interpreter, on float16, whose arithmetic is right there.
"""

import dataclasses

import pytest
import torch

from fp8kv.kernels.fp8 import FORMATS
from fp8kv.runtime.backends import AttentionOptions, Rope
from fp8kv.runtime.backends.reference import ReferenceBackend
from fp8kv.runtime.backends.triton import TritonBackend, has_kernel
from fp8kv.runtime.batch import make_batch
from fp8kv.runtime.paged_cache import LayerCache

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE_SIZE = 16
NUM_PAGES = 12
# unlike each other, and not a power of two
K_DIM, V_DIM = 96, 64
REFERENCE, TRITON = ReferenceBackend(), TritonBackend()

RAGGED = [(5, 0), (3, 16), (1, 20), (18, 3)]
DECODE = [(1, 0), (1, 16), (1, 20), (1, 3)]
# the first two decode, the others prefill, one of them a single token behind others
MIXED = [(1, 20), (1, 3), (5, 0), (18, 3), (1, 2)]
LENGTHS = {"ragged": RAGGED, "decode": DECODE, "mixed": MIXED}


def make_layer(
    mode="fp8",
    *,
    heads=2,
    k_dim=K_DIM,
    v_dim=V_DIM,
    scales=((0.25, 0.5), (2.0, 0.125)),
    dtype=torch.bfloat16,
):
    """Return a layer whose pages hold 0x7F, the code of NaN, or random values where they hold none."""
    fmt = FORMATS["e4m3fn"] if mode in ("fp8", "fp8-unit", "emulate") else None
    k_scale, v_scale = (torch.tensor(scale, device=DEVICE) for scale in scales)

    def pages(*shape):
        shape = (NUM_PAGES, PAGE_SIZE, *shape)
        if mode in ("fp8", "fp8-unit"):
            stale = torch.full(shape, 0x7F, dtype=torch.uint8, device=DEVICE)
            return stale.view(torch.float8_e4m3fn)
        return torch.randn(shape, device=DEVICE, dtype=dtype)

    if heads is None:
        return LayerCache("a", "mla", pages(k_dim), None, k_scale, k_scale, mode, v_dim, fmt)
    k, v = pages(heads, k_dim), pages(heads, v_dim)
    return LayerCache("a", "gqa", k, v, k_scale, v_scale, mode, v_dim, fmt)


def make_mla_layer(mode="fp8", **options):
    return make_layer(mode, heads=None, k_dim=576, v_dim=512, scales=((0.25,), (0.25,)), **options)


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


def random_pair(layer, tokens):
    """Return what ``tokens`` tokens write: K and V, or latent and rope part."""
    if layer.v is None:
        return randn(tokens, 512), randn(tokens, 64)
    return tuple(randn(tokens, *cache.shape[2:]) for cache in (layer.k, layer.v))


def filled(layer, lengths):
    """Fill the layer by the reference backend and return the batch of the new tokens."""
    whole, batch = make_batches(lengths)
    REFERENCE.write(layer, *random_pair(layer, whole.num_tokens), whole)
    return batch


OPTIONS = {
    "plain": AttentionOptions(0.1),
    "window": AttentionOptions(0.1, window=7),
    "soft cap": AttentionOptions(0.3, soft_cap=2.0),
    "sinks": AttentionOptions(0.1, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0], device=DEVICE)),
}


def relative_error(found, wanted):
    return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_attends_as_the_reference_does(options, lengths):
    layer = make_layer()
    batch = filled(layer, lengths)
    query = randn(batch.num_tokens, 4, K_DIM)

    found = TRITON.attend(layer, query, batch, options)

    assert has_kernel(layer, query, options)
    assert found.shape == (batch.num_tokens, 4, V_DIM)
    assert found.dtype == query.dtype
    assert relative_error(found, REFERENCE.attend(layer, query.float(), batch, options)) < 1e-3


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_attends_over_latent_rows_as_the_reference_does(lengths):
    layer = make_mla_layer()
    batch = filled(layer, lengths)
    query, options = randn(batch.num_tokens, 4, 576), AttentionOptions(0.05)

    found = TRITON.attend(layer, query, batch, options)

    assert has_kernel(layer, query, options)
    assert found.shape == (batch.num_tokens, 4, 512)
    assert relative_error(found, REFERENCE.attend(layer, query.float(), batch, options)) < 1e-3


@pytest.mark.parametrize("make", [make_layer, make_mla_layer])
def test_new_tokens_are_attended_to_as_they_are_given_save_those_that_decode(make):
    layer, options = make(), AttentionOptions(0.05)
    batch = filled(layer, MIXED)
    key, value = random_pair(layer, batch.num_tokens)
    query = randn(batch.num_tokens, 4, layer.k.shape[-1])

    found = TRITON.attend(layer, query, batch, options, key, value)

    wanted = REFERENCE.attend(layer, query.float(), batch, options, key, value)
    assert relative_error(found, wanted) < 1e-3
    # the cache holds other new tokens than those given, so that it shows which of them were read
    cached = REFERENCE.attend(layer, query.float(), batch, options)
    assert torch.equal(wanted[:2], cached[:2])
    assert relative_error(wanted[2:], cached[2:]) > 0.1


def random_rope(tokens, width):
    angles = torch.rand(tokens, width // 2, device=DEVICE).repeat(1, 2) * 6
    return Rope(angles.cos().half(), angles.sin().half())


@pytest.mark.parametrize("width", [16, K_DIM])
def test_rotates_quantises_and_writes_as_the_reference_does(width):
    ours, theirs = make_layer(), make_layer()
    whole, _ = make_batches(RAGGED)
    batch = dataclasses.replace(
        whole, slots=whole.slots.index_fill(0, whole.slots.new_tensor([0, 7]), -1)
    )
    query, (key, value) = randn(whole.num_tokens, 4, K_DIM), random_pair(ours, whole.num_tokens)
    rope = random_rope(whole.num_tokens, width)
    given = [tensor.clone() for tensor in (query, key, value)]

    found = TRITON.prepare_prefill_qkv(ours, query, key, value, batch, rope)

    wanted = REFERENCE.prepare_prefill_qkv(theirs, query, key, value, batch, rope)
    assert found.key is found.value is wanted.key is wanted.value is None
    assert torch.equal(found.query, wanted.query)
    assert not torch.allclose(found.query, query, atol=0.1)
    for one, other in ((ours.k, theirs.k), (ours.v, theirs.v)):
        assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    unrotated = make_layer()
    REFERENCE.write(unrotated, key, value, batch)
    assert not torch.equal(unrotated.k.view(torch.uint8), ours.k.view(torch.uint8))
    assert all(map(torch.equal, given, (query, key, value)))


@pytest.mark.parametrize("backend", [REFERENCE, TRITON], ids=["reference", "triton"])
@pytest.mark.parametrize("make", [make_layer, make_mla_layer])
def test_what_is_prepared_without_rope_is_the_query_and_the_cache(backend, make):
    ours, theirs = make(), make()
    whole, _ = make_batches(RAGGED)
    query, (key, value) = randn(whole.num_tokens, 4, 8), random_pair(ours, whole.num_tokens)

    ready = backend.prepare_prefill_qkv(ours, query, key, value, whole)

    REFERENCE.write(theirs, key, value, whole)
    assert ready.query is query
    assert ready.key is ready.value is None
    assert torch.equal(ours.k.view(torch.uint8), theirs.k.view(torch.uint8))


@pytest.mark.parametrize("backend", [REFERENCE, TRITON], ids=["reference", "triton"])
def test_a_call_on_codes_stays_within_what_their_rounding_allows(backend):
    """Every K and V off by 1/16 of itself at most, or by half the smallest code, all of them in the worst direction."""
    layer = make_layer(scales=((1 / 64,), (1 / 64,)))
    batch, options = make_batches([(40, 0)])[1], AttentionOptions(0.003)
    query, (key, value) = randn(40, 4, K_DIM), random_pair(layer, 40)
    ready = backend.prepare_prefill_qkv(layer, query, key, value, batch)
    quantised = backend.attend(layer, ready.query, batch, options).float()

    computed = backend.attend(layer, query, batch, options, key, value).float()

    keys, values = (part.float().repeat_interleave(2, 1) for part in (key, value))
    k_error, v_error = (part.abs().div(16).clamp(min=2**-10 / 64) for part in (keys, values))
    hidden = torch.ones(40, 40, dtype=torch.bool, device=DEVICE).triu(1)
    scores = torch.einsum("nhd,thd->hnt", query.float(), keys) * 0.003
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    moved = torch.einsum("nhd,thd->hnt", query.float().abs(), k_error) * 0.003
    # weights change by this factor at most
    factor = (2 * moved.masked_fill(hidden, 0).amax(-1)).exp().T[..., None]
    off_values = torch.einsum("hnt,thd->nhd", weights, v_error)
    off_weights = torch.einsum("hnt,thd->nhd", weights, values.abs())
    bound = factor * off_values + (factor - 1) * off_weights
    difference = (quantised - computed).abs()
    assert (difference <= bound + 2e-3).all()
    assert difference.max() > 0.1 * bound.max()


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
        key, value = (randn(2, whole.num_tokens, dim).transpose(0, 1) for dim in (K_DIM, V_DIM))

    TRITON.write(ours, key, value, batch)
    REFERENCE.write(theirs, key, value, batch)

    pairs = [(ours.k, theirs.k), (ours.v, theirs.v)]
    for found, wanted in pairs[: 1 if ours.v is None else 2]:
        assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("mode", ["bf16", "emulate"])
@pytest.mark.parametrize("make", [make_layer, make_mla_layer])
def test_caches_of_another_type_than_the_model_s_are_the_reference_s(mode, make):
    layer = make(mode)
    whole, batch = make_batches(RAGGED)
    tokens = whole.num_tokens
    shapes = (
        [(tokens, 512), (tokens, 64)]
        if layer.v is None
        else [(tokens, 2, K_DIM), (tokens, 2, V_DIM)]
    )
    key, value = randn(*shapes[0]), randn(*shapes[1])

    TRITON.write(layer, key, value, whole)
    query = randn(batch.num_tokens, 4, layer.k.shape[-1])
    found = TRITON.attend(layer, query, batch, OPTIONS["plain"])

    before = layer.k.clone()
    REFERENCE.write(layer, key, value, whole)
    assert torch.equal(layer.k, before)
    assert torch.equal(found, REFERENCE.attend(layer, query, batch, OPTIONS["plain"]))


@pytest.mark.parametrize("mode", ["bf16", "emulate"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("make", [make_layer, make_mla_layer])
def test_caches_of_the_model_s_own_type_have_kernels(mode, lengths, make, monkeypatch):
    ours, theirs = make(mode, dtype=torch.float16), make(mode, dtype=torch.float16)
    whole, batch = make_batches(lengths)
    whole = dataclasses.replace(
        whole, slots=whole.slots.index_fill(0, whole.slots.new_tensor([4]), -1)
    )
    for one, other in ((ours.k, theirs.k), (ours.v, theirs.v)):
        if one is not None:
            other.copy_(one)
    key, value = random_pair(ours, whole.num_tokens)
    query = randn(batch.num_tokens, 4, ours.k.shape[-1])
    REFERENCE.write(theirs, key, value, whole)
    wanted = REFERENCE.attend(theirs, query.float(), batch, AttentionOptions(0.05))
    assert has_kernel(ours, query, AttentionOptions(0.05))
    # kernels do it all
    monkeypatch.setattr(TRITON, "_reference", None)

    TRITON.write(ours, key, value, whole)
    found = TRITON.attend(ours, query, batch, AttentionOptions(0.05))

    assert torch.equal(ours.k, theirs.k)
    assert ours.v is None or torch.equal(ours.v, theirs.v)
    assert relative_error(found, wanted) < 1e-3


def test_rotates_and_writes_a_cache_of_the_model_s_own_type():
    ours, theirs = make_layer("bf16", dtype=torch.float16), make_layer("bf16", dtype=torch.float16)
    whole, _ = make_batches(DECODE)
    query, (key, value) = randn(whole.num_tokens, 4, K_DIM), random_pair(ours, whole.num_tokens)
    rope = random_rope(whole.num_tokens, K_DIM)
    found = TRITON.prepare_prefill_qkv(ours, query, key, value, whole, rope)
    wanted = REFERENCE.prepare_prefill_qkv(theirs, query, key, value, whole, rope)
    assert torch.equal(found.query, wanted.query)
    slots = whole.slots
    for one, other in ((ours.k, theirs.k), (ours.v, theirs.v)):
        assert torch.equal(one.flatten(0, 1)[slots], other.flatten(0, 1)[slots])


@pytest.mark.parametrize("mode", ["fp8", "bf16", "emulate", "float32"])
@pytest.mark.parametrize("make", [make_layer, make_mla_layer])
def test_rope_is_asked_for_where_one_launch_does_it_all(mode, make):
    assert TRITON.fuses_rope(make(mode)) == (make is make_layer and mode in ("fp8", "bf16"))
    assert not REFERENCE.fuses_rope(make(mode))


def test_rope_that_no_kernel_does_is_done_nevertheless():
    layer, plain = make_layer("emulate"), make_layer("emulate")
    whole, _ = make_batches(DECODE)
    query, (key, value) = randn(whole.num_tokens, 4, K_DIM), random_pair(layer, whole.num_tokens)
    rope = random_rope(whole.num_tokens, K_DIM)
    found = TRITON.prepare_prefill_qkv(layer, query, key, value, whole, rope)
    wanted = REFERENCE.prepare_prefill_qkv(plain, query, key, value, whole, rope)
    assert torch.equal(found.query, wanted.query)
    assert torch.equal(layer.k.flatten(0, 1)[whole.slots], plain.k.flatten(0, 1)[whole.slots])


@pytest.mark.parametrize(
    ("layer", "dtype", "options", "expected"),
    [
        ({}, torch.bfloat16, AttentionOptions(1.0), True),
        ({"v_dim": 256}, torch.float16, AttentionOptions(1.0, window=3, soft_cap=1.0), True),
        ({}, torch.float32, AttentionOptions(1.0), False),
        ({}, torch.bfloat16, AttentionOptions(1.0, chunk=8), False),
        ({"k_dim": 72}, torch.bfloat16, AttentionOptions(1.0), False),
        ({"k_dim": 32, "v_dim": 16}, torch.bfloat16, AttentionOptions(1.0), True),
        ({"v_dim": 56}, torch.bfloat16, AttentionOptions(1.0), False),
        ({"v_dim": 272}, torch.bfloat16, AttentionOptions(1.0), False),
        ({"mode": "bf16"}, torch.bfloat16, AttentionOptions(1.0), True),
        ({"mode": "emulate"}, torch.bfloat16, AttentionOptions(1.0), True),
        ({"mode": "bf16"}, torch.float16, AttentionOptions(1.0), False),
        ({"mode": "float32", "dtype": torch.float32}, torch.float32, AttentionOptions(1.0), False),
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
    shapes = ((4, 512), (4, 64)) if layer.v is None else ((4, 2, K_DIM), (4, 2, V_DIM))
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
