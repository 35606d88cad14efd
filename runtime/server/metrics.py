"""What Prometheus reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from fp8kv.runtime.limits import EngineStatus

if TYPE_CHECKING:
    from fp8kv.runtime.cache_counters import LayerCounts

_GAUGES: Mapping[str, tuple[str, str]] = {
    "waiting_sequences": ("num_waiting", "Sequences without cache pages: the engine's queue."),
    "running_sequences": ("num_running", "Sequences with cache pages."),
    "cache_pages": ("num_pages", "Pages of the KV cache."),
    "cache_free_pages": (
        "num_free_pages",
        "Pages that can be had, those kept for reuse among them.",
    ),
}

_COUNTERS: Mapping[str, tuple[str, str]] = {
    "preemptions": ("num_preemptions", "Sequences that lost their pages and were recomputed."),
    "reused_tokens": ("num_reused_tokens", "Tokens found in the cache and not computed."),
    "computed_tokens": ("num_computed_tokens", "Tokens that went through the model."),
    "generated_tokens": ("num_generated_tokens", "Tokens that were sampled."),
}

_COUNTS: Mapping[str, tuple[str, str]] = {
    "cache_values": ("num_values", "Values written into the KV cache."),
    "cache_clipped_values": ("num_clipped", "Values that exceeded the largest code."),
    "cache_flushed_values": ("num_flushed", "Values other than zero that became zero."),
}

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """The counters of the HTTP side, and a page with these and the engine's state.

    Attributes:
        requests: answered, by path and status; 499 are those whose client went away.
        first_token_seconds: from the arrival of a request to its first token.
    """

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self.requests = Counter(
            "fp8kv_requests",
            "HTTP requests answered; 499: the client went away.",
            ["path", "status"],
            registry=self._registry,
        )
        self.first_token_seconds = Histogram(
            "fp8kv_first_token_seconds",
            "From the arrival of a request to its first token.",
            buckets=_SECONDS,
            registry=self._registry,
        )

    def page(
        self,
        status: EngineStatus,
        *,
        num_open: int,
        tokens_per_second: float,
        cache_counts: Mapping[str, LayerCounts],
    ) -> bytes:
        """Return all metrics in Prometheus' text format.

        Args:
            status: of the engine.
            num_open: requests that are not answered yet.
            tokens_per_second: generated, of late.
            cache_counts: by layer; {} where nobody counts.
        """
        families = [
            _gauge("open_requests", "Requests that are not answered yet.", num_open),
            _gauge(
                "generated_tokens_per_second",
                "Tokens generated, mean of the last 10 seconds.",
                tokens_per_second,
            ),
            *_engine_families(status),
            *_cache_families(cache_counts),
        ]
        return generate_latest(self._registry) + generate_latest(_Page(families))


class _Page(CollectorRegistry):
    """A registry of what is known at one moment."""

    def __init__(self, families: list[Metric]) -> None:
        super().__init__()
        self.register(_Families(families))


class _Families(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"fp8kv_{name}", text, value=value)


def _engine_families(status: EngineStatus) -> Iterator[Metric]:
    for name, (attribute, text) in _GAUGES.items():
        yield _gauge(name, text, getattr(status, attribute))
    for name, (attribute, text) in _COUNTERS.items():
        yield CounterMetricFamily(f"fp8kv_{name}", text, value=getattr(status, attribute))


def _cache_families(cache_counts: Mapping[str, LayerCounts]) -> Iterator[Metric]:
    if not cache_counts:
        return
    for name, (attribute, text) in _COUNTS.items():
        family = CounterMetricFamily(f"fp8kv_{name}", text, labels=["layer", "stream"])
        for layer, counts in cache_counts.items():
            for stream, own in (("k", counts.k), ("v", counts.v)):
                family.add_metric([layer, stream], getattr(own, attribute))
        yield family
