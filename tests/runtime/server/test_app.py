"""The routes beside the two that generate, and what stands before all of them."""

import threading

import pytest

pytest.importorskip("fastapi")

BODY = {"model": "fake", "prompt": "abc", "temperature": 0}
KEY = "s\N{LATIN SMALL LETTER E WITH ACUTE}cret"


def test_models_lists_the_one(client):
    model = client.get("/v1/models").json()["data"][0]
    assert client.get("/v1/models").json()["object"] == "list"
    assert (model["id"], model["object"], model["max_model_len"]) == ("fake", "model", 400)
    assert client.get("/v1/models/fake").json() == model
    response = client.get("/v1/models/other")
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_a_name_may_hold_a_slash(in_process, llm):
    with in_process(llm, model="group/name") as client:
        assert client.get("/v1/models/group/name").json()["id"] == "group/name"


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
def test_an_unknown_model_is_not_found(client, route):
    more = {"prompt": "a"} if route == "/v1/completions" else {}
    more |= {} if more else {"messages": [{"role": "user", "content": "x"}]}
    response = client.post(route, json={"model": "gpt-4"} | more)
    assert response.status_code == 404
    assert response.json()["error"] == {
        "message": "the model 'gpt-4' is not served here: ask for 'fake'",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }


def test_other_paths_and_methods_have_errors_of_the_same_shape(client):
    response = client.get("/v2/what")
    assert response.status_code == 404
    assert response.json()["error"]["message"] == "GET /v2/what: Not Found"
    response = client.get("/v1/completions")
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
    assert response.json()["error"]["code"] == "method_not_allowed"
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert client.get(path).status_code == 404


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Basic {KEY}".encode()},
        {"Authorization": f"Bearer {KEY} ".encode() + b"x"},
        {"Authorization": b"Bearer \xff\xfe"},
    ],
)
def test_a_wrong_key_learns_nothing(in_process, llm, header):
    with in_process(llm, api_key=KEY) as client:
        for method, path in (
            ("POST", "/v1/completions"),
            ("POST", "/v1/chat/completions"),
            ("GET", "/v1/models"),
            ("GET", "/metrics"),
            ("GET", "/not/there"),
        ):
            response = client.request(method, path, headers=header)
            assert response.status_code == 401, path
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/health", headers=header).status_code == 200


def test_the_key_opens(in_process, llm):
    with in_process(llm, api_key=KEY) as client:
        headers = {"Authorization": f"Bearer {KEY}".encode()}
        assert client.post("/v1/completions", json=BODY, headers=headers).status_code == 200
        assert client.get("/metrics", headers=headers).status_code == 200
        assert client.get("/not/there", headers=headers).status_code == 404


def test_a_full_queue_says_so(in_process, fake_llm, until):
    llm = fake_llm(max_sequences=2)
    permits = llm.hold()
    with in_process(llm, max_queue=1) as client:
        found = []
        threads = [
            threading.Thread(
                target=lambda: found.append(client.post("/v1/completions", json=BODY).status_code)
            )
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        until(lambda: client.service.num_open == 3)
        response = client.post("/v1/completions", json=BODY)
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["type"] == "rate_limit_error"
        assert response.json()["error"]["code"] == "queue_full"
        # four at once can never be let in, so it is no use to try again
        assert client.post("/v1/completions", json=BODY | {"n": 4}).status_code == 422
        assert client.get("/health").status_code == 200
        permits.release(1000)
        for thread in threads:
            thread.join()
        assert found == [200] * 3
        assert client.post("/v1/completions", json=BODY).status_code == 200


def test_where_the_engine_fails_all_that_ran_fail_and_health_says_so(in_process, llm, until):
    permits = llm.hold()
    with in_process(llm) as client:
        found = []
        threads = [
            threading.Thread(target=lambda: found.append(client.post("/v1/completions", json=BODY)))
            for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        until(lambda: client.service.num_open == 3)
        llm.model.fails = True
        permits.release(1000)
        for thread in threads:
            thread.join()
        assert [response.status_code for response in found] == [500] * 3
        assert "the engine failed: the model broke" in found[0].json()["error"]["message"]
        response = client.get("/health")
        assert response.status_code == 503
        assert response.json() == {"status": "failed"}
        response = client.post("/v1/completions", json=BODY)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "unavailable"
        # what is known is still told
        assert client.get("/metrics").status_code == 200
        assert client.get("/v1/models").status_code == 200


def test_a_stream_whose_engine_fails_ends_with_the_error(in_process, llm, events, until):
    permits = llm.hold()
    with in_process(llm) as client:
        found = []
        thread = threading.Thread(
            target=lambda: found.append(
                client.post("/v1/completions", json=BODY | {"stream": True, "ignore_eos": True})
            )
        )
        thread.start()
        permits.release(4)
        until(lambda: llm.engine.status.num_generated_tokens >= 3)
        llm.model.fails = True
        permits.release(100)
        thread.join()
        *chunks, last = events(found[0].text)
        assert len(chunks) >= 1
        assert last["error"]["code"] == "engine_failed"


def test_while_it_drains_the_server_says_so(in_process, llm):
    with in_process(llm) as client:
        client.service.is_draining = True
        response = client.get("/health")
        assert (response.status_code, response.json()) == (503, {"status": "draining"})
        response = client.post("/v1/completions", json=BODY)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert "shutting down" in response.json()["error"]["message"]


def test_a_bug_is_answered_in_the_same_shape_and_tells_nothing(in_process, llm):
    with in_process(llm, raises=False) as client:
        llm.encode = lambda prompt: 1 / 0
        response = client.post("/v1/completions", json=BODY)
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "internal_error"
        assert "division" not in response.text
        counted = 'fp8kv_requests_total{path="/v1/completions",status="500"} 1.0'
        assert counted in client.get("/metrics").text
        assert client.get("/health").status_code == 200


def test_metrics_count_what_was_answered_by_route(client):
    client.get("/nowhere/1")
    client.get("/nowhere/2")
    client.get("/v1/models/fake")
    client.post("/v1/completions", json=BODY)
    client.post("/v1/completions", json=BODY | {"n": 0})
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    rows = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if line[0] != "#")
    assert rows['fp8kv_requests_total{path="other",status="404"}'] == "2.0"
    assert rows['fp8kv_requests_total{path="/v1/models/{name:path}",status="200"}'] == "1.0"
    assert rows['fp8kv_requests_total{path="/v1/completions",status="200"}'] == "1.0"
    assert rows['fp8kv_requests_total{path="/v1/completions",status="422"}'] == "1.0"
    assert rows["fp8kv_first_token_seconds_count"] == "1.0"
    assert float(rows["fp8kv_generated_tokens_total"]) > 0
    assert float(rows["fp8kv_generated_tokens_per_second"]) > 0
    assert rows["fp8kv_cache_pages"] == rows["fp8kv_cache_free_pages"] == "200.0"
    assert "fp8kv_cache_values_total" not in response.text


def test_metrics_show_what_the_cache_lost_where_that_is_counted(in_process, llm):
    from fp8kv.runtime.cache_counters import LayerCounts, StreamCounts

    llm.counts = {"layers.0": LayerCounts(StreamCounts(10, 2, 3), StreamCounts(20, 4, 5))}
    with in_process(llm) as client:
        text = client.get("/metrics").text
        assert 'fp8kv_cache_values_total{layer="layers.0",stream="v"} 20.0' in text
        assert 'fp8kv_cache_clipped_values_total{layer="layers.0",stream="k"} 2.0' in text
        assert 'fp8kv_cache_flushed_values_total{layer="layers.0",stream="v"} 5.0' in text
