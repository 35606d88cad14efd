"""From the start of a server to its end: addresses, and what runs when it is told to stop."""

import signal
import socket
import threading
from types import SimpleNamespace

import httpx
import pytest

pytest.importorskip("fastapi")

from fp8kv.recipes.errors import RequestError
from fp8kv.runtime.server.launch import bind, is_loopback, serve, url
from fp8kv.runtime.server.settings import ServerSettings

BODY = {"model": "fake", "prompt": "abc", "temperature": 0, "max_tokens": 20, "ignore_eos": True}


def test_an_address_that_is_taken_is_refused():
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        first.listen()
        with pytest.raises(RequestError, match=f"127.0.0.1 port {port}: .*; choose another"):
            bind("127.0.0.1", port)


def test_an_address_that_is_taken_while_the_model_loads_is_refused(llm):
    with bind("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with bind("127.0.0.1", port) as second:
            first.listen()
            settings = ServerSettings(model="fake")
            with pytest.raises(RequestError, match=f"127.0.0.1 port {port}: .*; choose another"):
                serve(llm, settings, second, say=print, started="started")


def test_an_address_that_nobody_knows_is_refused(monkeypatch):
    def look_up(*arguments, **options):
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(RequestError, match="nowhere port 80: Name or service not known; choose"):
        bind("nowhere", 80)


def test_who_is_reached_from_where():
    with bind("127.0.0.1", 0) as opened:
        assert is_loopback(opened)
        assert url(opened) == f"http://127.0.0.1:{opened.getsockname()[1]}"
    assert not is_loopback(SimpleNamespace(getsockname=lambda: ("0.0.0.0", 80)))
    assert not is_loopback(SimpleNamespace(getsockname=lambda: ("::", 80, 0, 0)))


@pytest.mark.skipif(not socket.has_ipv6, reason="needs IPv6")
def test_addresses_of_the_newer_kind():
    with bind("::1", 0) as opened:
        assert is_loopback(opened)
        assert url(opened) == f"http://[::1]:{opened.getsockname()[1]}"


def test_nobody_waits_at_a_socket_before_the_server_listens():
    with bind("127.0.0.1", 0) as opened, pytest.raises(ConnectionRefusedError):
        socket.create_connection(opened.getsockname(), timeout=5)


def asking(server, found, **more):
    """Ask in a thread."""
    thread = threading.Thread(
        target=lambda: found.append(
            httpx.post(f"{server.url}/v1/completions", json=BODY | more, timeout=30)
        )
    )
    thread.start()
    return thread


def test_what_runs_is_finished_and_nothing_more_is_taken(listening, llm, until):
    permits = llm.hold()
    found = []
    with listening(llm) as server:
        threads = [asking(server, found), asking(server, found, stream=True)]
        until(lambda: server.service.num_open == 2)
        permits.release(4)
        server.server.handle_exit(signal.SIGTERM, None)
        until(lambda: server.service.is_draining)
        assert httpx.get(f"{server.url}/health").json() == {"status": "draining"}
        assert httpx.post(f"{server.url}/v1/completions", json=BODY).status_code == 503
        permits.release(100)
        for thread in threads:
            thread.join()
        server.thread.join(20)
        assert [response.status_code for response in found] == [200, 200]
        streamed = next(one for one in found if "event-stream" in one.headers["content-type"])
        assert '"finish_reason":"length"' in streamed.text
        assert streamed.text.endswith("data: [DONE]\n\n")
        assert server.server.num_cut_short == 0
        assert server.said == ["started", "stopping: 2 requests have 30 seconds to end"]
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")
    assert llm.engine.status.num_free_pages == llm.engine.status.num_pages


@pytest.mark.parametrize("seconds", [0.0, 0.2])
def test_what_is_not_finished_in_time_is_cut_short(listening, llm, until, events, seconds):
    permits = llm.hold()
    found = []
    with listening(llm, shutdown_seconds=seconds) as server:
        threads = [
            asking(server, found, max_tokens=300),
            asking(server, found, max_tokens=300, stream=True),
        ]
        # a stream that has not begun would be answered by its status
        until(lambda: llm.engine.status.num_running == 2 or permits.release())
        server.server.handle_exit(signal.SIGTERM, None)
        until(lambda: server.service.engine._is_stopping)
        permits.release(100)
        for thread in threads:
            thread.join()
        server.thread.join(20)
        assert server.server.num_cut_short == 2
    statuses = {"stream" in one.headers["content-type"]: one for one in found}
    assert statuses[False].status_code == 503
    assert "shutting down" in statuses[False].json()["error"]["message"]
    assert events(statuses[True].text)[-1]["error"]["code"] == "unavailable"
    assert llm.engine.status.num_free_pages == llm.engine.status.num_pages


def test_who_is_impatient_finishes_nothing(listening, llm, until, capsys):
    permits = llm.hold()
    found = []
    with listening(llm) as server:
        thread = asking(server, found)
        until(lambda: server.service.num_open == 1)
        server.server.handle_exit(signal.SIGINT, None)
        until(lambda: server.service.is_draining)
        server.server.handle_exit(signal.SIGINT, None)
        until(lambda: server.service.engine._is_stopping)
        permits.release(100)
        thread.join()
        server.thread.join(20)
        assert found[0].status_code == 503
        assert server.server.num_cut_short == 1
    assert capsys.readouterr().err == ""
