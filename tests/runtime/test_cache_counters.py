"""Counts of values that the cache clips or flushes."""

from types import SimpleNamespace

import pytest
import torch

from fp8kv.calibrate.modeling.tap import tap
from fp8kv.kernels.fp8 import FORMATS, quantize
from fp8kv.runtime.architectures import check_supported
from fp8kv.runtime.backends.base import AttendsLatents, PreparesPrefill
from fp8kv.runtime.backends.reference import ReferenceBackend
from fp8kv.runtime.cache_counters import (
    CountingBackend,
    LayerCounts,
    StreamCounts,
    lost_values,
)
from fp8kv.runtime.llm import LLM
from fp8kv.runtime.paged_cache import LayerCache
from fp8kv.runtime.sampling import SamplingParameters

SCALES = (1.0, 0.5, 0.0123, 3.0, 1 / 3, 1e-3, 700.0, 2.0**-40, 2.0**60)
NOTHING = StreamCounts(0, 0, 0)


def all_bfloat16():
    return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def brute_force(values, scale, fmt):
    """Round the quotients to the format's steps, in float64 and without an end to its exponents."""
    quotients = (values.float() / scale).double()
    exponents = torch.frexp(quotients).exponent - 1
    exponents = exponents.clamp(min=round(torch.tensor(fmt.smallest_normal).log2().item()))
    steps = torch.ldexp(torch.ones_like(quotients), exponents - fmt.mantissa_bits)
    rounded = torch.where(quotients.isfinite(), (quotients / steps).round() * steps, quotients)
    return rounded.abs() > fmt.max, (rounded == 0) & (values != 0)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", list(FORMATS))
def test_all_bfloat16_values_are_judged_as_exact_rounding_does(name, scale):
    fmt, values = FORMATS[name], all_bfloat16()
    scale = torch.tensor([scale])

    clipped, flushed = lost_values(values, scale, fmt)

    expected_clipped, expected_flushed = brute_force(values, scale, fmt)
    assert torch.equal(clipped, expected_clipped)
    assert torch.equal(flushed, expected_flushed)
    codes = quantize(values, scale, fmt).float()
    assert torch.equal(flushed, (codes == 0) & (values != 0))
    assert (codes[clipped].abs() == fmt.max).all()
    assert not (clipped | flushed)[values.isnan()].any()
    assert clipped[values.isinf()].all()


@pytest.mark.parametrize(
    ("name", "largest_kept"), [("e4m3fn", 464.0), ("e5m2", 61440.0), ("e4m3fnuz", 248.0)]
)
def test_the_border_lies_halfway_to_the_next_number_and_ties_go_to_the_even_one(name, largest_kept):
    # 464 rounds to 448, whose last bit is 0; the other two round up, away from a last bit of 1
    around = torch.tensor([largest_kept]).repeat(3)
    around[0] = torch.nextafter(around[0], torch.tensor(0.0))
    around[2] = torch.nextafter(around[2], torch.tensor(1e9))
    clipped, _ = lost_values(around, torch.ones(1), FORMATS[name])
    assert clipped.tolist() == [False, name != "e4m3fn", True]


def make_layer(attention="gqa", mode="fp8", fmt="e4m3fn", k_scale=(1.0,), v_scale=(1.0,)):
    fmt = FORMATS[fmt] if mode in ("fp8", "emulate") else None
    dtype = fmt.dtype if mode == "fp8" else torch.bfloat16
    k_scale, v_scale = torch.tensor(k_scale), torch.tensor(v_scale)
    if attention == "mla":
        k, v = torch.zeros(4, 4, 6, dtype=dtype), None
        v_scale = k_scale
    else:
        k, v = torch.zeros(4, 4, 2, 3, dtype=dtype), torch.zeros(4, 4, 2, 5, dtype=dtype)
    return LayerCache("layer", attention, k, v, k_scale, v_scale, mode, v_dim=5, fmt=fmt)


def tokens(count, *shape):
    """Numbers of which some are lost at scale 1."""
    values = torch.randn(count, *shape) * 300
    values[torch.rand(count, *shape) < 0.2] *= 1e-6
    values[torch.rand(count, *shape) < 0.1] = 0
    return values.bfloat16()


def counted(values, scale, fmt="e4m3fn"):
    clipped, flushed = brute_force(values, torch.as_tensor(scale), FORMATS[fmt])
    return StreamCounts(values.numel(), int(clipped.sum()), int(flushed.sum()))


@pytest.mark.parametrize("mode", ["fp8", "emulate"])
def test_heads_are_counted_together_each_at_its_own_scale(mode):
    layer = make_layer(mode=mode, k_scale=[0.3, 3.0], v_scale=[1.0, 100.0])
    counting = CountingBackend(ReferenceBackend(), {"layer": layer})
    key, value = tokens(7, 2, 3), tokens(7, 2, 5)
    counting.write(layer, key, value, SimpleNamespace(slots=torch.arange(7)))

    found = counting.counts()["layer"]
    assert found == LayerCounts(counted(key, [[0.3], [3.0]]), counted(value, [[1.0], [100.0]]))
    assert min(found.k.num_clipped, found.k.num_flushed, found.v.num_clipped) > 0


def test_rows_of_mla_are_counted_by_their_two_parts():
    layer = make_layer("mla", k_scale=[0.3])
    counting = CountingBackend(ReferenceBackend(), {"layer": layer})
    latent, rope = tokens(7, 4), tokens(7, 2)
    counting.write(layer, latent, rope, SimpleNamespace(slots=torch.arange(7)))
    assert counting.counts()["layer"] == LayerCounts(counted(latent, [0.3]), counted(rope, [0.3]))


def test_padding_counts_nothing_whatever_it_holds():
    layer = make_layer()
    counting = CountingBackend(ReferenceBackend(), {"layer": layer})
    key, value = tokens(6, 2, 3), tokens(6, 2, 5)
    slots = torch.tensor([3, -1, 4, -1, -7, 5])
    key[slots < 0] = 1e30
    value[slots < 0] = float("nan")
    counting.write(layer, key, value, SimpleNamespace(slots=slots))
    real = slots >= 0
    expected = LayerCounts(counted(key[real], [1.0]), counted(value[real], [1.0]))
    assert counting.counts() == {"layer": expected}

    counting.write(layer, key, value, SimpleNamespace(slots=torch.full((6,), -1)))
    assert counting.counts() == {"layer": expected}


def test_layers_add_up_on_their_own_and_begin_anew():
    first, second = make_layer(), make_layer(fmt="e5m2")
    layers = {"a": first, "b": second}
    for name, layer in layers.items():
        object.__setattr__(layer, "name", name)
    counting = CountingBackend(ReferenceBackend(), layers)
    assert counting.counts() == {name: LayerCounts(NOTHING, NOTHING) for name in "ab"}
    key, value = tokens(7, 2, 3), tokens(7, 2, 5)
    batch = SimpleNamespace(slots=torch.arange(7))
    for _ in range(3):
        counting.write(first, key, value, batch)
    counting.write(second, key, value, batch)

    found = counting.counts()
    once = counted(key, [1.0])
    assert found["a"].k == StreamCounts(
        3 * once.num_values, 3 * once.num_clipped, 3 * once.num_flushed
    )
    assert found["b"] == LayerCounts(counted(key, [1.0], "e5m2"), counted(value, [1.0], "e5m2"))


def test_what_is_not_quantised_loses_nothing():
    layer = make_layer(mode="bf16")
    counting = CountingBackend(ReferenceBackend(), {"layer": layer})
    counting.write(layer, tokens(7, 2, 3), tokens(7, 2, 5), SimpleNamespace(slots=torch.arange(7)))
    assert counting.counts()["layer"] == LayerCounts(StreamCounts(42, 0, 0), StreamCounts(70, 0, 0))


class Recorder:
    """A backend that notes its calls and can do what it is made to."""

    name = "recorder"

    def __init__(self):
        self.calls = []

    def write(self, *arguments):
        self.calls.append(("write", arguments))

    def attend(self, *arguments):
        self.calls.append(("attend", arguments))
        return "attended"


class Preparing(Recorder):
    def fuses_rope(self, layer):
        return True

    def prepare_prefill_qkv(self, *arguments):
        self.calls.append(("prepare", arguments))
        return "prepared"


class Latent(Preparing):
    def attend_latents(self, *arguments):
        self.calls.append(("latents", arguments))
        return "latents attended"


@pytest.mark.parametrize("kind", [Recorder, Preparing, Latent])
def test_it_can_do_what_the_wrapped_backend_can(kind):
    layer, backend = make_layer(), kind()
    counting = CountingBackend(backend, {"layer": layer})
    assert counting.name == "recorder"
    assert isinstance(counting, PreparesPrefill) == isinstance(backend, PreparesPrefill)
    assert isinstance(counting, AttendsLatents) == isinstance(backend, AttendsLatents)
    key, value, batch = tokens(7, 2, 3), tokens(7, 2, 5), SimpleNamespace(slots=torch.arange(7))

    counting.write(layer, key, value, batch)
    assert backend.calls.pop() == ("write", (layer, key, value, batch))
    assert counting.attend(layer, "query", batch, "options") == "attended"
    name, arguments = backend.calls.pop()
    assert (name, arguments[:4]) == ("attend", (layer, "query", batch, "options"))
    once = counting.counts()["layer"].k
    if kind is not Recorder:
        assert counting.prepare_prefill_qkv(layer, "query", key, value, batch) == "prepared"
        assert backend.calls.pop()[1][:5] == (layer, "query", key, value, batch)
        twice = counting.counts()["layer"].k
        assert twice.num_clipped == 2 * once.num_clipped > 0
    if kind is Latent:
        assert counting.attend_latents("anything") == "latents attended"


def test_keys_must_come_rotated():
    layer = make_layer()
    counting = CountingBackend(Preparing(), {"layer": layer})
    assert not counting.fuses_rope(layer)
    with pytest.raises(ValueError, match="keys are counted after RoPE"):
        counting.prepare_prefill_qkv(layer, None, None, None, None, "angles")


@pytest.mark.parametrize("name", ["minimax", "deepseek"])
def test_what_a_model_writes_while_it_serves_is_counted(name, request):
    loaded = request.getfixturevalue(name)
    prompt = tuple(loaded.tokenizer("Question: Tom has 3 apples and buys 4 more.")["input_ids"])
    written = {}

    def note(write):
        written[write.attention.name] = write.keys[0], write.values[0]

    with tap(check_supported(loaded.model), note), torch.no_grad():
        loaded.model(input_ids=torch.tensor([prompt]), use_cache=False)
    options = {"backend": "reference", "device": "cpu", "num_pages": 4, "dtype": "float32"}
    with LLM(loaded.path, cache="fp8-unit", count_clipped=True, **options) as llm:
        llm.generate([prompt], SamplingParameters(max_tokens=1))
        found = llm.cache_counts()
        llm.generate([prompt[:5]], SamplingParameters(max_tokens=3, ignore_eos=True))
        more = llm.cache_counts()

    assert list(found) == list(written)
    for layer, (key, value) in written.items():
        assert found[layer].k.num_values == key.numel()
        assert found[layer].v.num_values == value.numel()
        # the last token that is generated is not written
        assert more[layer].k.num_values == key.numel() // len(prompt) * (len(prompt) + 5 + 2)
    # later layers read what the cache has lost
    first = next(iter(written))
    assert found[first] == LayerCounts(*(counted(one, [1.0]) for one in written[first]))
    assert found[first].k.num_flushed + found[first].v.num_flushed > 0


@pytest.mark.gpu
def test_a_captured_graph_counts_on_every_replay():
    layer = make_layer()
    layer = LayerCache(
        "layer", "gqa", layer.k.cuda(), layer.v.cuda(), layer.k_scale.cuda(), layer.v_scale.cuda(),
        "fp8", v_dim=5, fmt=layer.fmt,
    )  # fmt: skip
    counting = CountingBackend(ReferenceBackend(), {"layer": layer})
    key, value = tokens(7, 2, 3).cuda(), tokens(7, 2, 5).cuda()
    batch = SimpleNamespace(slots=torch.arange(7, device="cuda"))
    counting.write(layer, key, value, batch)
    once = counting.counts()["layer"]
    assert once == LayerCounts(counted(key.cpu(), [1.0]), counted(value.cpu(), [1.0]))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counting.write(layer, key, value, batch)
    for _ in range(3):
        graph.replay()
    # three replays, and the call in front of the capture
    found = counting.counts()["layer"]
    assert found.k.num_values == 4 * once.k.num_values
    assert found.k.num_clipped == 4 * once.k.num_clipped > 0
    assert found.v.num_flushed == 4 * once.v.num_flushed > 0
