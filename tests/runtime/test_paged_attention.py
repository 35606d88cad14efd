"""What an attention module does over the pages, and what it is refused, without a model around it."""

from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fp8kv.calibrate.modeling.tap import AttentionModule, CacheWrite
from fp8kv.recipes.errors import UnsupportedModelError
from fp8kv.runtime.backends import AttentionOptions, PreparedQkv
from fp8kv.runtime.batch import make_batch
from fp8kv.runtime.paged_attention import ForwardPass, PagedLayer, hold_module, is_held

BATCH = make_batch([([5, 6, 7], 0, [0])], 4, "cpu")
PLAIN = AttentionOptions(scaling=1.0)


class Backend:
    """Notes what it is given, and attends with the query itself."""

    def __init__(self):
        self.calls = []

    def write(self, layer, key, value, batch):
        self.calls.append(("write", key, value))

    def attend(self, layer, query, batch, options, key=None, value=None):
        self.calls.append(("attend", key, value))
        return query.double()


class Hook(Backend):
    def prepare_prefill_qkv(self, layer, query, key, value, batch, rope=None):
        self.calls.append(("prepare", key, value))
        return PreparedQkv(query + 1, None, None)


def make(backend, window=None):
    """Return a pass, its one layer and what that is about to cache: 3 tokens, 2 heads of 4."""
    module = AttentionModule("layer", nn.Linear(1, 1), "gqa", None)
    hook = backend if isinstance(backend, Hook) else None
    current = ForwardPass(backend, hook, None)
    layer = PagedLayer(module, SimpleNamespace(), window, current, None)
    current.layers["layer"] = layer
    return (
        current,
        layer,
        CacheWrite(module, torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4), None),
    )


def attend(current, layer, write):
    """Run a pass up to its end; return the queries and what came of them."""
    queries = torch.randn(1, 4, 3, 4)
    current.begin(BATCH)
    current.note(write)
    return queries, layer.attend(queries, PLAIN)


def test_without_the_hook_tokens_are_written_and_given_to_attention():
    backend = Backend()
    current, layer, write = make(backend)
    queries, out = attend(current, layer, write)
    key, value = write.keys[0].transpose(0, 1), write.values[0].transpose(0, 1)
    assert [name for name, _, _ in backend.calls] == ["write", "attend"]
    for _, given_key, given_value in backend.calls:
        assert torch.equal(given_key, key)
        assert torch.equal(given_value, value)
    assert out.dtype == queries.dtype
    assert torch.equal(out, queries[0].transpose(0, 1))
    assert current.end() == []


def test_with_the_hook_attention_takes_what_it_returns():
    backend = Hook()
    queries, out = attend(*make(backend))
    assert [name for name, _, _ in backend.calls] == ["prepare", "attend"]
    assert backend.calls[1][1:] == (None, None)
    assert torch.equal(out, queries[0].transpose(0, 1) + 1)


def test_outside_a_pass_the_model_is_a_runners():
    current, layer, write = make(Backend())
    for call in (lambda: current.note(write), lambda: layer.attend(torch.ones(1, 4, 3, 4), PLAIN)):
        with pytest.raises(ValueError, match="layer belongs to a ModelRunner: close it"):
            call()


def test_a_layer_caches_before_it_attends_and_in_every_pass():
    current, layer, write = make(Backend())
    attend(current, layer, write)
    with pytest.raises(UnsupportedModelError, match="layer attends before it updates its cache"):
        layer.attend(torch.ones(1, 4, 3, 4), PLAIN)
    current.note(write)
    assert current.end() == []
    # of the pass that broke off nothing is left
    current.begin(BATCH)
    with pytest.raises(UnsupportedModelError, match="layer attends before it updates its cache"):
        layer.attend(torch.ones(1, 4, 3, 4), PLAIN)
    assert current.end() == ["layer"]


def test_a_window_is_the_declared_one():
    current, layer, write = make(Backend(), window=8)
    with pytest.raises(UnsupportedModelError, match=r"window of None tokens where .* says 8"):
        attend(current, layer, write)


def test_a_held_module_is_given_back():
    _, layer, _ = make(Backend())
    module = layer.attention.module
    module.config = SimpleNamespace(_attn_implementation="eager")
    with ExitStack() as stack:
        hold_module(layer, stack)
        assert is_held(module)
        assert module.config._attn_implementation != "eager"
    assert not is_held(module)
    assert module.config._attn_implementation == "eager"
