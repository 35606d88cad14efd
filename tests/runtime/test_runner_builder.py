"""A loaded model over a cache: how large, how it runs, and what is left when it is closed."""

import weakref
from dataclasses import replace

import pytest

from fp8kv.demo import MODELS
from fp8kv.recipes.errors import RequestError
from fp8kv.runtime import runner_builder
from fp8kv.runtime.batch import make_batch
from fp8kv.runtime.limits import EngineLimits
from fp8kv.runtime.loading import load
from fp8kv.runtime.memory import run_largest
from fp8kv.runtime.runner_builder import RunnerOptions, build_runner

OPTIONS = RunnerOptions(
    cache="fp8",
    backend="reference",
    prefill="fp8",
    cuda_graphs=True,
    page_size=16,
    num_pages=None,
    memory_fraction=None,
    count_clipped=False,
)


@pytest.fixture(scope="module")
def loaded():
    return load(MODELS["tiny-minimax-m2"], device="cpu")


@pytest.fixture
def limits(loaded):
    return EngineLimits(loaded.vocab_size, 4096, max_batch_tokens=64, max_sequences=2)


def test_so_many_pages_as_are_asked_for(loaded, limits):
    built = build_runner(loaded, limits, replace(OPTIONS, num_pages=9))
    with built.held:
        assert (built.allocator.num_pages, built.allocator.page_size, built.capacity) == (
            9,
            16,
            144,
        )
        assert (built.backend, built.counters) == ("reference", None)
        assert {layer.k.shape[0] for layer in built.model.cache.layers.values()} == {9}


def test_on_a_cpu_the_cache_is_as_large_as_all_seats_need(loaded, limits):
    built = build_runner(loaded, limits, OPTIONS)
    with built.held:
        assert built.capacity == 2 * 4096


def test_on_a_cpu_the_cache_takes_no_more_than_its_share(loaded, limits, monkeypatch):
    monkeypatch.setattr(runner_builder, "CPU_CACHE_BYTES", 1 << 16)
    built = build_runner(loaded, limits, OPTIONS)
    with built.held:
        cache = built.model.cache
        page = cache.bytes_per_token * 16
        assert cache.num_pages == (1 << 16) // page
        assert sum(t.nbytes for one in cache.layers.values() for t in (one.k, one.v)) <= 1 << 16


@pytest.mark.parametrize("mode", ["fp8", "emulate", "float32"])
def test_the_largest_step_is_measured_over_a_cache_that_is_gone_then(
    loaded, limits, monkeypatch, caplog, mode
):
    seen = []

    def measure(forward, limits, page_size, device):
        seen.append(weakref.ref(forward.__self__.cache.layers["model.layers.0.self_attn"].k))
        run_largest(forward, limits, page_size, device)
        return 7

    monkeypatch.setattr(runner_builder, "measure_activations", measure)
    without = replace(loaded, scales=None)
    builder = runner_builder._Builder(without, limits, replace(OPTIONS, cache=mode))
    assert builder._measure() == 7
    assert seen[0]() is None
    assert not caplog.records, "missing scales are a matter of the cache that stays"
    build_runner(loaded, limits, replace(OPTIONS, num_pages=2)).held.close()


def test_counters_count_what_goes_into_the_cache(loaded, limits):
    built = build_runner(loaded, limits, replace(OPTIONS, num_pages=9, count_clipped=True))
    with built.held:
        built.steps.forward(make_batch([([1, 2, 3], 0, [4])], 16, "cpu"))
        counts = built.counters.counts()
    kv_heads = loaded.model.config.num_key_value_heads
    assert {one.k.num_values for one in counts.values()} == {
        3 * kv_heads * loaded.model.config.head_dim
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache": "fp4"}, "cache is 'fp4': give one of bf16"),
        ({"backend": "cuda"}, "backend is 'cuda': give one of reference, triton"),
        ({"prefill": None}, "prefill is None: give one of fp8, bf16"),
        ({"cuda_graphs": "on"}, "cuda_graphs is 'on'"),
        ({"count_clipped": 1}, "count_clipped is 1"),
        ({"page_size": 0}, "page_size is 0"),
        ({"page_size": 48}, "page_size is 48: give a power of two up to 256"),
        ({"num_pages": 0}, "num_pages is 0"),
        ({"num_pages": 4, "memory_fraction": 0.5}, "num_pages and memory_fraction both"),
        ({"memory_fraction": 0}, "memory_fraction is 0: give a number above 0"),
        ({"memory_fraction": 1.5}, "memory_fraction is 1.5"),
        ({"memory_fraction": "most"}, "memory_fraction is 'most'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(RequestError, match=message):
        replace(OPTIONS, **options)
