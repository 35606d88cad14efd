"""The load of a server, for a few seconds and with few clients; and that it sees what must not be."""

import asyncio
import importlib
import threading
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def serve_load(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(ROOT))
    return importlib.import_module("benchmarks.serve_load")


@pytest.fixture
def server():
    """The demo's model with few pages, so that sequences are preempted."""
    from fp8kv.demo import MODELS
    from fp8kv.runtime.llm import LLM
    from fp8kv.runtime.server.launch import DrainingServer, bind, url
    from fp8kv.runtime.server.service import Service
    from fp8kv.runtime.server.settings import ServerSettings

    options = {"cache": "fp8-unit", "backend": "reference", "device": "cpu", "dtype": "float32"}
    ready = threading.Event()
    with (
        LLM(MODELS["tiny-minimax-m2"], num_pages=40, page_size=16, **options) as llm,
        bind("127.0.0.1", 0) as opened,
    ):
        service = Service(llm, ServerSettings("tiny"))
        server = DrainingServer(service, say=lambda line: ready.set(), started="")
        thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]})
        thread.start()
        assert ready.wait(30)
        yield url(opened)
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()
        llm.engine._allocator.check([])


def test_a_few_seconds_of_load_leave_nothing_behind(serve_load, server):
    tally, before, halfway, after = asyncio.run(
        serve_load.load(server, "tiny", num_clients=12, seconds=5)
    )
    assert serve_load.findings(tally, halfway, after, growth_mib=200) == []
    assert sum(tally.answers.values()) > 12
    assert after["fp8kv_generated_tokens_total"] > before["fp8kv_generated_tokens_total"]
    text = serve_load.report(tally, before, halfway, after, 5)
    assert "cache pages free at the end | 40 of 40" in text


def test_what_must_not_be_is_found(serve_load):
    good = {
        "fp8kv_cache_free_pages": 9.0,
        "fp8kv_cache_pages": 9.0,
        "fp8kv_open_requests": 0.0,
        "fp8kv_running_sequences": 0.0,
        "fp8kv_waiting_sequences": 0.0,
        "process_resident_memory_bytes": 5e8,
    }
    tally = serve_load.Tally()
    tally.expect("whole", 200, (200, 429))
    assert serve_load.findings(tally, good, good, 64) == []
    lost = good | {"fp8kv_cache_free_pages": 8.0}
    assert "not idle" in serve_load.findings(tally, good, lost, 64)[0]
    grown = good | {"process_resident_memory_bytes": 6e8}
    assert "memory grew by 95 MiB" in serve_load.findings(tally, good, grown, 64)[0]
    tally.expect("whole", 500, (200, 429), "broken")
    assert serve_load.findings(tally, good, good, 64) == ["whole: 500 broken"]
