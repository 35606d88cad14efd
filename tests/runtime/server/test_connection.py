"""Bodies that are too large, too slow or not JSON, and clients that go away."""

import socket
import threading

import httpx
import pytest

pytest.importorskip("fastapi")

BODY = {"model": "fake", "prompt": "abc", "temperature": 0, "max_tokens": 300, "ignore_eos": True}
JSON = {"Content-Type": "application/json"}


def raw_request(url, head, body=b""):
    """Open a connection, send what is given, and return the connection."""
    _, host, port = url.replace("/", "").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    connection.sendall("\r\n".join([*head, f"Host: {host}", "", ""]).encode() + body)
    return connection


def all_free(llm):
    return llm.engine.status.num_free_pages == llm.engine.status.num_pages


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_what_is_not_declared_as_json_is_refused(client, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    response = client.post("/v1/completions", content=b"{}", headers=headers)
    assert response.status_code == 415
    assert "Content-Type: application/json" in response.json()["error"]["message"]


def test_a_charset_behind_the_type_is_taken(client):
    headers = {"Content-Type": "Application/JSON; charset=utf-8"}
    content = b'{"model": "fake", "prompt": "abc", "temperature": 0}'
    assert client.post("/v1/completions", content=content, headers=headers).status_code == 200


def test_compressed_bodies_are_refused(client):
    headers = JSON | {"Content-Encoding": "gzip"}
    assert client.post("/v1/completions", content=b"{}", headers=headers).status_code == 415


@pytest.mark.parametrize("size", [1001, 1500, 50_000])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_that_is_too_large_is_refused_with_or_without_its_length(
    listening, llm, size, is_chunked
):
    def pieces():
        for start in range(0, size, 500):
            yield b" " * min(500, size - start)

    with listening(llm, max_body_bytes=1000) as server:
        response = httpx.post(
            f"{server.url}/v1/completions",
            content=pieces() if is_chunked else b" " * size,
            headers=JSON,
        )
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"
        assert httpx.get(f"{server.url}/health").status_code == 200


def test_a_body_without_end_is_not_read_to_its_end(listening, llm):
    with listening(llm, max_body_bytes=1000) as server:
        head = ["POST /v1/completions HTTP/1.1", "Content-Type: application/json"]
        with raw_request(server.url, [*head, "Content-Length: 1000000"], b" " * 2001) as client:
            client.settimeout(5)
            assert client.recv(1000).startswith(b"HTTP/1.1 413")


def test_a_body_of_just_the_size_is_read(in_process, llm):
    content = b'{"model": "fake", "prompt": "abc", "temperature": 0}'
    with in_process(llm, max_body_bytes=len(content)) as client:
        assert client.post("/v1/completions", content=content, headers=JSON).status_code == 200
        response = client.post("/v1/completions", content=content + b" ", headers=JSON)
        assert response.status_code == 413


def test_a_body_that_does_not_come_is_given_up(listening, llm, monkeypatch):
    from fp8kv.runtime.server import connection

    monkeypatch.setattr(connection, "BODY_SECONDS", 0.05)
    with listening(llm) as server:
        head = ["POST /v1/completions HTTP/1.1", "Content-Type: application/json"]
        with raw_request(server.url, [*head, "Content-Length: 100"], b'{"model"') as client:
            assert client.recv(1000).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_frees_his_pages(live, llm, until, stream, route):
    permits = llm.hold()
    body = BODY | {"stream": stream}
    if route == "/v1/chat/completions":
        del body["prompt"]
        body["messages"] = [{"role": "user", "content": "x"}]
    content = httpx.Request("POST", live.url, json=body).content
    head = [f"POST {route} HTTP/1.1", "Content-Type: application/json"]
    with raw_request(live.url, [*head, f"Content-Length: {len(content)}"], content):
        permits.release(5)
        until(lambda: llm.engine.status.num_generated_tokens >= 3)
        assert llm.engine.status.num_free_pages < llm.engine.status.num_pages
    until(lambda: live.service.num_open == 0)
    until(lambda: all_free(llm) or permits.release())
    assert llm.engine.status.num_generated_tokens < 20
    assert httpx.get(f"{live.url}/health").status_code == 200


def test_who_goes_away_while_he_waits_is_forgotten(listening, fake_llm, until):
    llm = fake_llm(max_sequences=1)
    permits = llm.hold()
    with listening(llm) as server:
        content = httpx.Request("POST", server.url, json=BODY).content
        head = ["POST /v1/completions HTTP/1.1", "Content-Type: application/json"]
        head.append(f"Content-Length: {len(content)}")
        first = raw_request(server.url, head, content)
        until(lambda: llm.engine.status.num_running == 1)
        with raw_request(server.url, head, content):
            until(lambda: server.service.num_open == 2)
        until(lambda: server.service.num_open == 1)
        first.close()
        until(lambda: all_free(llm) or permits.release())
        assert not llm.engine.has_work


def test_who_reads_nothing_of_his_stream_is_dropped(listening, fake_llm, until, monkeypatch):
    from fp8kv.runtime.server import connection

    monkeypatch.setattr(connection, "STALL_SECONDS", 0.05)
    llm = fake_llm(max_positions=100_000, num_pages=3000)
    with listening(llm) as server:
        # enough to fill the buffers of the system, with a client that reads nothing
        wide = BODY | {"stream": True, "max_tokens": 2500, "logprobs": 20, "n": 4}
        content = httpx.Request("POST", server.url, json=wide).content
        head = ["POST /v1/completions HTTP/1.1", "Content-Type: application/json"]
        head.append(f"Content-Length: {len(content)}")
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        _, host, port = server.url.replace("/", "").split(":")
        client.connect((host, int(port)))
        client.sendall("\r\n".join([*head, f"Host: {host}", "", ""]).encode() + content)
        until(lambda: server.service.num_open == 1)
        until(lambda: server.service.num_open == 0)
        until(lambda: all_free(llm))
        assert llm.engine.status.num_generated_tokens < 4 * 2500
        client.close()


def test_many_that_come_and_go_leave_nothing_behind(live, llm, until):
    def visit(number):
        body = BODY | {"max_tokens": 5 + number % 7, "n": 1 + number % 3, "seed": number}
        if number % 3:
            response = httpx.post(f"{live.url}/v1/completions", json=body, timeout=20)
            assert response.status_code == 200
            return
        with httpx.stream(
            "POST", f"{live.url}/v1/completions", json=body | {"stream": True}, timeout=20
        ) as response:
            for _ in response.iter_lines():
                if number % 2:
                    break

    threads = [threading.Thread(target=visit, args=[number]) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: live.service.num_open == 0)
    until(lambda: all_free(llm))
