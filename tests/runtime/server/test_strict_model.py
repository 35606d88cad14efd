"""What is not supported is refused by its name, and so is what nobody knows."""

import pytest

pytest.importorskip("fastapi")

ROUTES = {
    "/v1/completions": {"model": "fake", "prompt": "abc", "temperature": 0},
    "/v1/chat/completions": {
        "model": "fake",
        "messages": [{"role": "user", "content": "x"}],
        "temperature": 0,
        "max_tokens": 3,
    },
}
UNSUPPORTED = {
    "/v1/completions": {
        "best_of": 2,
        "frequency_penalty": 0.1,
        "logit_bias": {"5": 1},
        "presence_penalty": -0.1,
        "suffix": "x",
    },
    "/v1/chat/completions": {
        "audio": {},
        "frequency_penalty": 1,
        "function_call": {"name": "f"},
        "functions": [{}],
        "logit_bias": {"5": 1},
        "metadata": {"a": "b"},
        "modalities": ["audio"],
        "moderation": {},
        "parallel_tool_calls": "x",
        "prediction": {},
        "presence_penalty": 1,
        "prompt_cache_key": "x",
        "prompt_cache_options": {},
        "prompt_cache_retention": "24h",
        "reasoning_effort": "low",
        "response_format": {"type": "json_object"},
        "safety_identifier": "x",
        "service_tier": "flex",
        "store": True,
        "tool_choice": "required",
        "tools": [{"type": "function"}],
        "verbosity": "low",
        "web_search_options": {},
    },
}
CASES = [
    (route, name, value) for route, all_ in UNSUPPORTED.items() for name, value in all_.items()
]


@pytest.mark.parametrize(("route", "name", "value"), CASES)
def test_what_is_not_supported_is_refused_by_name(client, route, name, value):
    response = client.post(route, json=ROUTES[route] | {name: value})
    assert response.status_code == 422
    assert response.json()["error"] == {
        "message": f"{name} is not supported by this server: leave it out",
        "type": "invalid_request_error",
        "param": name,
        "code": "unsupported_parameter",
    }


@pytest.mark.parametrize(("route", "name", "value"), CASES)
def test_a_null_asks_for_nothing(client, route, name, value):
    assert client.post(route, json=ROUTES[route] | {name: None}).status_code == 200


def test_values_that_ask_for_what_is_done_anyway_are_taken(client):
    route = "/v1/chat/completions"
    extra = {
        "tools": [],
        "tool_choice": "auto",
        "response_format": {"type": "text"},
        "presence_penalty": 0.0,
        "store": False,
        "stream_options": None,
        "modalities": ["text"],
    }
    assert client.post(route, json=ROUTES[route] | extra).status_code == 200
    route = "/v1/completions"
    assert client.post(route, json=ROUTES[route] | {"best_of": 3, "n": 3}).status_code == 200


@pytest.mark.parametrize("route", ROUTES)
def test_what_nobody_knows_is_refused_by_name(client, route):
    response = client.post(route, json=ROUTES[route] | {"frobnicate": None})
    assert response.status_code == 422
    error = response.json()["error"]
    assert error["message"] == "frobnicate is no parameter of this server: leave it out"
    assert (error["param"], error["code"]) == ("frobnicate", "unknown_parameter")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": 5.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"stream": "yes"}, "stream"),
        ({"stream": 1}, "stream"),
        ({"seed": 1 << 63}, "seed"),
        ({"stop": 5}, "stop"),
        ({"stop": [5]}, "stop"),
        ({"n": [1]}, "n"),
        ({"model": 3}, "model"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    ],
)
def test_a_wrong_type_is_refused_with_the_parameters_name(client, route, body, param):
    response = client.post(route, json=ROUTES[route] | body)
    assert response.status_code == 422, response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("missing", ["model", "prompt", "messages"])
def test_what_must_be_there_is_missed_by_name(client, route, missing):
    body = {name: value for name, value in ROUTES[route].items() if name != missing}
    if body == ROUTES[route]:
        return
    response = client.post(route, json=body)
    assert response.status_code == 422
    assert response.json()["error"]["message"] == f"{missing} is missing"


@pytest.mark.parametrize("route", ROUTES)
def test_stream_options_need_a_stream(client, route):
    response = client.post(route, json=ROUTES[route] | {"stream_options": {"include_usage": True}})
    assert response.status_code == 422
    assert "stream_options goes with stream" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "prompt", [None, 5, [], [[]], [[], [1]], ["a", 1], [1, "a"], [1.5], [True], {"a": 1}, [["a"]]]
)
def test_a_prompt_is_text_or_token_ids(client, prompt):
    response = client.post("/v1/completions", json={"model": "fake", "prompt": prompt})
    assert response.status_code == 422
    assert response.json()["error"]["param"] == "prompt"


@pytest.mark.parametrize("body", ["[]", "null", "3", '"text"', "true"])
@pytest.mark.parametrize("route", ROUTES)
def test_json_that_is_no_object_is_refused(client, route, body):
    response = client.post(route, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    assert response.json()["error"]["message"] == "give a JSON object"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": "fake",}',
        b"\xff\xfe{}",
        b'{"model": "fake\xe2\x82"}',
        b'{"model": "\\ud800"}',
        b"[" * 100_000,
        b'{"model": ' + b'{"a":' * 100_000,
        b"{} {}",
        b"\x00",
    ],
)
def test_a_body_that_is_no_json_in_utf8_is_refused(client, route, body):
    response = client.post(route, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["message"].startswith("the body is no JSON in UTF-8: ")
    assert error["code"] == "invalid_json"
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_are_finite(client, number):
    body = f'{{"model": "fake", "prompt": "a", "temperature": {number}}}'
    response = client.post(
        "/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 422
    assert "finite" in response.json()["error"]["message"]


def test_a_number_of_many_digits_is_refused(client):
    body = '{"model": "fake", "prompt": "a", "max_tokens": ' + "9" * 10_000 + "}"
    response = client.post(
        "/v1/completions", content=body, headers={"Content-Type": "application/json"}
    )
    assert response.status_code in (400, 422)
